// Products of bfloat16 matrices with float32 sums on AMX tiles, where the compiler knows these, interleaved with work of the vector unit.
//
// PARTS 1 rounds vectors and probabilities to bfloat16 (8 bits). PARTS 2 represents each number as the sum of two bfloat16, the second
// of which is the rounding error of the first, and multiplies three of the four pairs of parts: this gives 16 bits for three times the
// products.
//
// Everything that a tile instruction reads or writes is stored as whole tiles of 1 KiB: 16 rows of 32 bfloat16, or (the right
// factor) 16 pairs of rows by 16 columns, or 16 rows of 16 floats. All three passes lay out their scores in the same way, rows of the
// bank by queries, so a vector of scores belongs to one row and 16 queries.

#pragma once

#include <algorithm>
#include <cstdint>

#include "bank.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(HAS_AMX)
namespace {
namespace amx {

typedef uint16_t bf16;
constexpr int64_t TILE = 512, SUMS = 256;  // elements of a tile of bfloat16, and of a tile of floats
constexpr int64_t GROUP = 32;              // rows, and queries, whose scores are computed at a time: two tiles by two
constexpr int64_t PIECE = 4, PIECES = 8;   // rows in a piece of a group's scores, and pieces in a group
constexpr int64_t AHEAD = 2048;            // floats to prefetch ahead, as the processor's own prefetching stops at the end of a page

// Rows in a block, so that its packed copies stay in the second-level cache.
int64_t block_rows(int64_t D) { return std::max<int64_t>(GROUP, std::min<int64_t>(512, 65536 / round_up(D, GROUP) / GROUP * GROUP)); }

// How many threads are worth starting for G queries and R rows of width D; each thread gets one block of rows at least.
int64_t worth(int64_t G, int64_t R, int64_t D, int threads) {
    if ((double)G * R * D < 3.0e7) return 1;  // less work than starting a thread
    return std::max<int64_t>(1, std::min<int64_t>(threads, (R + block_rows(D) - 1) / block_rows(D)));
}

#define AMX_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,avx512vbmi,fma,prefer-vector-width=512")))
#define MEMBER AMX_TARGET __attribute__((always_inline)) inline
#define INLINE MEMBER static

// Not the compiler's own intrinsics: these do not say that a load reads memory, so stores may be moved behind it.
#define LOAD(tile, at) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(at), "r"((int64_t)64) : "memory")
#define MULTIPLY(sum, left, right) __asm__ volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum ::)

// While an object of this class lives, its thread's tiles are configured.
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

// Whether the processor has the instructions that this file uses, and the system lets this process use them.
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
    int64_t part;  // elements from the first part to the second
};

// Where the sums of tiles 0 to 3, two by two, lie in memory: the distance in floats to the next tile to the right and to the next tile
// below, and the bytes of a row.
struct Sums {
    float* at;  // null: nowhere; loading from there gives zeros
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

// Stores a tile's sums, which are those of the previous product, to `before`, and loads the sums that the next product is added to.
template <int TILE_NUMBER>
INLINE void turn(const Sums& before, const Sums& from) {
    if (before.at) store<TILE_NUMBER>(before);
    if (from.at)
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from.tile<TILE_NUMBER>()), "r"(from.row_bytes), "i"(TILE_NUMBER) : "memory");
    else
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE_NUMBER));
}

// Tiles 0 to 3 = `from` + left x right, two tiles by two. The tiles still hold the previous product, which is stored to `before`, each
// tile right before it is needed. So the tile unit, which takes 16 cycles for a product and for a store, does not have to wait. The
// vector unit does `work` in the meantime.
template <int PARTS, class Work>
INLINE void multiply(const Packed& left, const bf16* a, int64_t a_row, const Packed& right, const bf16* b, int64_t b_column,
                     int64_t steps, const Sums& before, const Sums& from, Work& work) {
    constexpr int PAIRS = PARTS == 1 ? 1 : 3;  // pairs of parts: first with first, first with second, second with first
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

// Computes out = left x right (`fresh`) or out += left x right, `times` times. From one time to the next a, b and out move on by a_next,
// b_next and out_next.
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

// Computes the scores of 32 rows and 32 queries, [32, 32], for `groups` groups. While the tiles compute a group's scores, `work` is done on
// those of the group before. a_next and b_next lead from one group to the next. There are `count` rows; rows beyond these get the score
// `beyond`.
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

}  // namespace amx
}  // namespace
#endif
