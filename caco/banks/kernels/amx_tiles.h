// Tiles of the bank's loops on AMX: products of bfloat16 with float32 sums, how numbers are packed for them, and exponentials in
// AVX-512 meanwhile. amx.h includes this.
//
// PARTS 1 rounds vectors and probabilities to bfloat16 (8 bits). PARTS 2 holds each as the sum of two, the second of which is
// what the first lost, and multiplies three of the four pairs of parts: 16 bits, for three times the products.
//
// Exponentials come in pairs of vectors, element beside element, as the right factor of a product wants its rows and as the
// left one may have its columns where the right one's rows are in the same order.
//
// Everything that a tile instruction reads or writes is stored as whole tiles of 1 KiB: 16 rows of 32 bfloat16, or (the right
// factor) 16 pairs of rows by 16 columns, or 16 rows of 16 floats. All three passes make their scores alike, rows of the bank
// by queries, so a vector is one row and 16 queries.

typedef uint16_t bf16;
constexpr int64_t TILE = 512, SUMS = 256;  // elements of a tile of bfloat16, of floats
constexpr int64_t GROUP = 32;              // rows, and queries, whose scores are made at a time: two tiles by two
constexpr int64_t PIECE = 4, PIECES = 8;   // rows of a group's scores that are worked on at a time, and how many times
constexpr int64_t AHEAD = 2048;            // floats; a processor's own look-ahead ends with the page

// Rows in a block: its packed copies stay in the second-level cache.
int64_t block_rows(int64_t D) { return std::max<int64_t>(GROUP, std::min<int64_t>(512, 65536 / round_up(D, GROUP) / GROUP * GROUP)); }

#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vbmi,fma,prefer-vector-width=512")))
#define MEMBER TARGET __attribute__((always_inline)) inline
#define INLINE MEMBER static

// The compiler's own intrinsics do not say that a load reads memory, so stores may be moved behind it.
#define LOAD(tile, at) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"((int64_t)64) : "memory")
#define MULTIPLY(sum, left, right) __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum ::)

// A thread's tiles are ready while one of these lives.
struct Tiles {
    Tiles() {
        struct {
            uint8_t palette = 1, start = 0, none[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~Tiles() { __asm__ volatile("tilerelease" ::); }
    Tiles(const Tiles&) = delete;
};

// Whether the processor has what this file uses, and the system lets this process use it.
bool available() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // amx-bf16, amx-tile
    if (!(c >> 1 & 1)) return false;                                                                  // avx512_vbmi
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;                     // avx512_bf16
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Space for tiles of bfloat16, in one or two parts.
struct Packed {
    Packed(int64_t elements, int parts) : buffer(elements * parts / 2), at((bf16*)buffer.at), part(elements) {}
    Buffer buffer;
    bf16* at;
    int64_t part;  // from the first part to the second
};

INLINE __m512 raise(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

// 32 floats, rounded; what is lost by it, rounded, is the second part.
template <int PARTS>
INLINE void split(__m512 low, __m512 high, __m512i out[PARTS]) {
    out[0] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (PARTS == 1) return;
    low = _mm512_sub_ps(low, raise(_mm512_castsi512_si256(out[0])));
    high = _mm512_sub_ps(high, raise(_mm512_extracti64x4_epi64(out[0], 1)));
    out[PARTS - 1] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Two rows of 16 numbers, element beside element: a right factor's row of pairs.
INLINE __m512i side_by_side(__m512i rows) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}

// 16 vectors of 16 words into their columns.
INLINE void transpose16(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[i], x[i + 1]), b = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[i + 2], x[i + 3]), d = _mm512_unpackhi_epi32(x[i + 2], x[i + 3]);
        y[i] = _mm512_unpacklo_epi64(a, c), y[i + 1] = _mm512_unpackhi_epi64(a, c);
        y[i + 2] = _mm512_unpacklo_epi64(b, d), y[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {  // y[4 n + i] has column 4 l + i of vectors 4 n to 4 n + 3 in its quarter l
        const __m512i a = _mm512_shuffle_i32x4(y[i], y[i + 4], 0x88), b = _mm512_shuffle_i32x4(y[i], y[i + 4], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0x88), d = _mm512_shuffle_i32x4(y[i + 8], y[i + 12], 0xdd);
        x[i] = _mm512_shuffle_i32x4(a, c, 0x88), x[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88), x[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
}

// 2^x for x up to 127, to 1e-7 of itself; from -127 down exactly 0, as p(0) is exactly 1.
INLINE __m512 power(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // in this order NaN stays NaN
    const __m512 shifted = _mm512_add_ps(x, _mm512_set1_ps(12582912.0f));  // the nearest integer, in the low bits
    const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, _mm512_set1_ps(12582912.0f)));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.326472918e-03f), r, _mm512_set1_ps(9.671513435e-03f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733746e-02f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224207e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469776e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// A bfloat16 of 2^x is x + 127 in 128ths but for its last seven bits, which are 2^f - 1 for the fraction f: a table of 128.
struct Mantissas {
    Mantissas() {
        for (int f = 0; f < 128; f++) at[f] = (uint8_t)lrint(128 * (exp2(f / 128.0) - 1));
    }
    alignas(64) uint8_t at[128];
};
const Mantissas mantissas;
constexpr float STEPS = 128.0f;                       // of an exponent, to 1
constexpr float IN_STEPS = 1.5f * 65536.0f + 127.0f;  // added to an exponent, it leaves x + 127 in steps in the float's low half
constexpr float LOWEST_EXPONENT = -383.0f;            // of those that do; all from -127 down give 0

// What to add to an exponent where the tiles' results are of PARTS: see `exponentials`. PARTS 1 takes whole steps.
template <int PARTS>
float offset_of(float exponent) {
    return PARTS == 1 ? IN_STEPS + std::round(exponent * STEPS) / STEPS : exponent;
}

// 2 to the power of what that left out.
template <int PARTS>
float left_out(float exponent) {
    return PARTS == 1 ? exp2f(exponent - std::round(exponent * STEPS) / STEPS) : 1.0f;
}

// 2^(a x + b), as the parts of pairs of x and y, and added up over them: `sum` has what the parts say (PARTS 1: to 0.7 % of
// each, without bias), `most` the largest, of both of a pair.
template <int PARTS>
INLINE void exponentials(__m512 x, __m512 y, __m512 a, __m512 b_x, __m512 b_y, __m512i out[PARTS], __m512& sum, __m512i& most) {
    x = _mm512_fmadd_ps(x, a, b_x), y = _mm512_fmadd_ps(y, a, b_y);
    if (PARTS == 1) {
        __m512i steps = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_castps_si512(x), _mm512_bslli_epi128(_mm512_castps_si512(y), 2));
        steps = _mm512_max_epi16(steps, _mm512_setzero_si512());
        const __m512i fraction = _mm512_permutex2var_epi8(_mm512_load_si512(mantissas.at), steps, _mm512_load_si512(mantissas.at + 64));
        out[0] = _mm512_ternarylogic_epi32(steps, fraction, _mm512_set1_epi16(0x7f), 0xD8);  // the fraction in its seven bits
        sum = _mm512_dpbf16_ps(sum, (__m512bh)out[0], (__m512bh)_mm512_set1_epi16(0x3f80));
        most = _mm512_max_epi16(most, out[0]);
    } else {
        x = power(x), y = power(y);
        sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
        most = _mm512_castps_si512(_mm512_max_ps(_mm512_castsi512_ps(most), _mm512_max_ps(x, y)));
        split<PARTS>(x, y, out);
        for (int part = 0; part < PARTS; part++) out[part] = side_by_side(out[part]);
    }
}

// Where the sums of tiles 0 to 3 lie, two by two: how many floats the next tile to the right and below is away, bytes of a row.
struct Sums {
    float* at;  // null: nowhere, zero
    int64_t right, below, row_bytes;
    template <int TILE_NUMBER>
    MEMBER float* tile() const { return at + (TILE_NUMBER & 1 ? right : 0) + (TILE_NUMBER & 2 ? below : 0); }
};
constexpr Sums NONE{};

template <int TILE_NUMBER>
INLINE void store(const Sums& to) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to.tile<TILE_NUMBER>()), "r"(to.row_bytes), "i"(TILE_NUMBER) : "memory");
}
INLINE void store(const Sums& to) { store<0>(to), store<1>(to), store<2>(to), store<3>(to); }

// A tile's sums go where the last product's belong, and those that this one's are added to come.
template <int TILE_NUMBER>
INLINE void turn(const Sums& before, const Sums& from) {
    if (before.at) store<TILE_NUMBER>(before);
    if (from.at)
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from.tile<TILE_NUMBER>()), "r"(from.row_bytes), "i"(TILE_NUMBER) : "memory");
    else
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE_NUMBER));
}

// Tiles 0 to 3 = `from` + left x right, two tiles by two. They still hold the last product, which goes to `before`: each right
// before it is needed, so that the tile unit, which takes 16 cycles for a product and for a store, need not stand still. The
// vector unit works beside it: `work` is what it has to do meanwhile.
template <int PARTS, class Work>
INLINE void multiply(const Packed& left, const bf16* a, int64_t a_row, const Packed& right, const bf16* b, int64_t b_column,
                     int64_t steps, const Sums& before, const Sums& from, Work& work) {
    constexpr int PAIRS = PARTS == 1 ? 1 : 3;  // of parts: first first, first second, second first
    const int64_t at_a_time = (PIECES + PAIRS * steps - 1) / (PAIRS * steps);
    int64_t piece = 0;
    for (int pair = 0; pair < PAIRS; pair++) {
        const bf16 *x = a + (pair == 2 ? left.part : 0), *y = b + (pair == 1 ? right.part : 0);
        for (int64_t k = 0; k < steps; k++, x += TILE, y += TILE) {
            if (pair == 0 && k == 0) {
                LOAD(4, x); LOAD(6, y); turn<0>(before, from); MULTIPLY(0, 4, 6);
                LOAD(7, y + b_column); turn<1>(before, from); MULTIPLY(1, 4, 7);
                LOAD(5, x + a_row); turn<2>(before, from); MULTIPLY(2, 5, 6);
                turn<3>(before, from); MULTIPLY(3, 5, 7);
            } else {
                LOAD(4, x); LOAD(6, y); LOAD(5, x + a_row); LOAD(7, y + b_column);
                MULTIPLY(0, 4, 6); MULTIPLY(1, 4, 7); MULTIPLY(2, 5, 6); MULTIPLY(3, 5, 7);
            }
            for (const int64_t until = std::min(PIECES, piece + at_a_time); piece < until; piece++) work.piece(piece);
        }
    }
}

struct Nothing {
    MEMBER void piece(int64_t) {}
};

// Several times out (+)= left x right; a, b and out lead on by a_next, b_next and out_next.
template <int PARTS>
INLINE void accumulate(const Packed& left, const bf16* a, int64_t a_row, int64_t a_next, const Packed& right, const bf16* b,
                       int64_t b_column, int64_t b_next, int64_t steps, bool fresh, Sums out, int64_t out_next, int64_t times) {
    Nothing nothing;
    Sums before = NONE;
    for (; times; times--, a += a_next, b += b_next, out.at += out_next) {
        multiply<PARTS>(left, a, a_row, right, b, b_column, steps, before, fresh ? NONE : out, nothing);
        before = out;
    }
    store(before);
}

// Scores of 32 rows and 32 queries, [32, 32], `groups` times, each group's made while `work` is done on the one before; a_next and
// b_next lead from group to group. There are `count` rows; those beyond have the score `beyond`.
template <int PARTS, class Work>
INLINE void scan(const Packed& rows, const bf16* a, int64_t a_next, const Packed& queries, const bf16* b, int64_t b_next, int64_t D,
                 int64_t groups, int64_t count, float beyond, float* scores, Work& work) {
    const int64_t steps = D / GROUP, next = steps * TILE;
    const Sums here{scores, 16, 16 * GROUP, 4 * GROUP};
    Nothing nothing;
    multiply<PARTS>(rows, a, next, queries, b, next, steps, NONE, NONE, nothing);
    for (int64_t g = 1; g < groups; g++) {
        a += a_next, b += b_next;
        work.begin(scores, g - 1);
        multiply<PARTS>(rows, a, next, queries, b, next, steps, here, NONE, work);
        work.end();
    }
    store(here);
    for (int64_t row = std::max<int64_t>(0, count - (groups - 1) * GROUP); row < GROUP; row++)
        for (int64_t half = 0; half < 2; half++) _mm512_store_ps(scores + row * GROUP + half * 16, _mm512_set1_ps(beyond));
    work.begin(scores, groups - 1);
    for (int64_t piece = 0; piece < PIECES; piece++) work.piece(piece);
    work.end();
}

// Unit rows of a block, as a left factor; rows beyond `count` are zero. D is a multiple of 32, `width` the rows' own. Returns
// whether each has a direction. lost: the largest square of what rounding took from one, if that is more.
template <int PARTS>
TARGET static bool pack(const float* w, int64_t count, int64_t width, int64_t D, Packed& rows, float* inverse_norm, float* lost = nullptr) {
    bool usable = true;
    for (int64_t j = 0; j < round_up(count, GROUP); j++) {
        const float* row = w + j * width;
        __m512 squares = _mm512_setzero_ps(), lost_squares = _mm512_setzero_ps();
        for (int64_t d = 0; j < count && d < width; d += 16) {
            const __m512 x = _mm512_maskz_loadu_ps(first(width - d), row + d);
            squares = _mm512_fmadd_ps(x, x, squares);
            _mm_prefetch((const char*)(row + d + AHEAD), _MM_HINT_T0);
        }
        const float inverse = j < count ? 1.0f / sqrtf(_mm512_reduce_add_ps(squares)) : 0.0f;
        usable &= j >= count || (inverse > 0 && inverse < INFINITY);
        if (inverse_norm) inverse_norm[j] = inverse;
        const __m512 scale = _mm512_set1_ps(inverse);
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t left = j < count ? width - d : 0;
            const __m512 x = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(first(left), row + d));
            const __m512 y = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(first(left - 16), row + d + 16));
            __m512i parts[PARTS];
            split<PARTS>(x, y, parts);
            bf16* to = rows.at + (j / 16 * D / GROUP + d / GROUP) * TILE + j % 16 * GROUP;
            for (int part = 0; part < PARTS; part++) _mm512_store_si512(to + part * rows.part, parts[part]);
            if (!lost) continue;
            const __m512 x_lost = _mm512_sub_ps(x, raise(_mm512_castsi512_si256(parts[0])));
            const __m512 y_lost = _mm512_sub_ps(y, raise(_mm512_extracti64x4_epi64(parts[0], 1)));
            lost_squares = _mm512_fmadd_ps(x_lost, x_lost, _mm512_fmadd_ps(y_lost, y_lost, lost_squares));
        }
        if (lost) *lost = std::max(*lost, _mm512_reduce_add_ps(lost_squares));
    }
    return usable;
}

// A block's rows, packed, transposed: a left factor of D rows and `steps` tiles in each.
template <int PARTS>
TARGET static void transpose(const Packed& rows, int64_t count, int64_t D, int64_t steps, Packed& transposed) {
    for (int64_t j = 0; j < round_up(count, GROUP); j += GROUP)
        for (int64_t d = 0; d < D; d += 16)
            for (int part = 0; part < PARTS; part++) {
                __m512i pairs[16];
                for (int64_t pair = 0; pair < 16; pair++) {
                    const int64_t row = j + 2 * pair;
                    const bf16* from = rows.at + part * rows.part + (row / 16 * D / GROUP + d / GROUP) * TILE + row % 16 * GROUP + d % GROUP;
                    const __m512i even = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)from));
                    const __m512i odd = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(from + GROUP)));
                    pairs[pair] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
                }
                transpose16(pairs);
                bf16* to = transposed.at + part * transposed.part + (d / 16 * steps + j / GROUP) * TILE;
                for (int64_t e = 0; e < 16; e++) _mm512_store_si512(to + e * GROUP, pairs[e]);
            }
}

// Queries as the right factor of scores: columns; zero beyond the last of G.
template <int PARTS>
TARGET static void pack_queries(const float* q, int64_t G, int64_t width, int64_t D, Packed& out) {
    for (int64_t i = 0; i < G; i += 16)
        for (int64_t d = 0; d < D; d += GROUP) {
            __m512i pairs[PARTS][16];
            for (int64_t n = 0; n < 16; n++) {
                const int64_t left = i + n < G ? width - d : 0;
                __m512i parts[PARTS];
                split<PARTS>(_mm512_maskz_loadu_ps(first(left), q + (i + n) * width + d),
                             _mm512_maskz_loadu_ps(first(left - 16), q + (i + n) * width + d + 16), parts);
                for (int part = 0; part < PARTS; part++) pairs[part][n] = parts[part];
            }
            for (int part = 0; part < PARTS; part++) {
                transpose16(pairs[part]);
                bf16* to = out.at + part * out.part + (i / 16 * D / GROUP + d / GROUP) * TILE;
                for (int64_t e = 0; e < 16; e++) _mm512_store_si512(to + e * GROUP, pairs[part][e]);
            }
        }
}

// Queries times their weights as the right factor of the rows' motion: rows, `steps` tiles for every 16 of D. A pair of rows is
// a query and the one 16 further, as `Share` has its columns.
template <int PARTS>
TARGET static void pack_weighted(const float* q, const float* weight, int64_t N, int64_t width, int64_t D, int64_t steps, Packed& out) {
    for (int64_t i = 0; i < N; i++) {
        if (i % GROUP >= 16) continue;
        for (int64_t d = 0; d < D; d += 16) {
            const __mmask16 mask = first(width - d), second = i + 16 < N ? mask : 0;
            __m512i parts[PARTS];
            split<PARTS>(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, q + i * width + d), _mm512_set1_ps(weight[i])),
                         _mm512_mul_ps(_mm512_maskz_loadu_ps(second, q + (i + 16) * width + d), _mm512_set1_ps(second ? weight[i + 16] : 0)),
                         parts);
            for (int part = 0; part < PARTS; part++)
                _mm512_store_si512(out.at + part * out.part + (d / 16 * steps + i / GROUP) * TILE + i % GROUP * 32, side_by_side(parts[part]));
        }
    }
}
