// The bank's passes on AMX tiles (amx_tiles.h): what each does with 32 rows' and 32 queries' scores while the next are made, and how
// threads share the rows. kernel.cpp includes this once, in a namespace of its own, after the AVX-512 set.

#include "amx_tiles.h"

constexpr int TOP = 16;               // candidates kept for each key: one bfloat16 leaves some rows in question
constexpr int64_t QUERY_CHUNK = 512;  // queries whose probabilities an update holds at a time

// Exponentials of a group of rows and 32 queries, as a right factor of pairs of rows, their sums and the largest.
template <int PARTS>
struct Weigh {
    const Forward& f;
    Packed& tile;
    int64_t steps, count;  // tiles of a block, and its rows
    const float* scores = nullptr;
    bf16* weights = nullptr;
    int64_t valid = 0;  // rows of the group
    const __m512 a, b;
    __m512 total[2], total2[2];
    __m512i most[2];

    MEMBER Weigh(const Forward& f, Packed& tile, int64_t steps, int64_t count)
        : f(f), tile(tile), steps(steps), count(count), a(_mm512_set1_ps(f.inverse_tau * LOG2_E)),
          b(_mm512_set1_ps(offset_of<PARTS>(-f.shift * LOG2_E))) {
        for (int half = 0; half < 2; half++) total[half] = total2[half] = _mm512_setzero_ps(), most[half] = _mm512_setzero_si512();
    }
    MEMBER void begin(const float* scores_, int64_t group) {
        scores = scores_;
        weights = tile.at + group * TILE;
        valid = count - group * GROUP;
    }
    MEMBER void end() {}
    MEMBER void piece(int64_t piece) {
        const float* at = scores + piece * PIECE * GROUP;
        bf16* to = weights + piece * PIECE / 2 * GROUP;
        for (int half = 0; half < 2; half++) {
#pragma GCC unroll 2
            for (int pair = 0; pair < PIECE / 2; pair++) {
                const float* x = at + pair * 2 * GROUP + half * 16;
                __m512i parts[PARTS];
                exponentials<PARTS>(_mm512_load_ps(x), _mm512_load_ps(x + GROUP), a, b, b, parts, total[half], most[half]);
                for (int part = 0; part < PARTS; part++)
                    _mm512_store_si512(to + part * tile.part + half * steps * TILE + pair * GROUP, parts[part]);
            }
            if (!f.second) continue;
            const __m512 a2 = _mm512_set1_ps(f.inverse_tau2 * LOG2_E), b2 = _mm512_set1_ps(-f.shift2 * LOG2_E);
            for (int64_t row = 0; row < std::min(PIECE, valid - piece * PIECE); row++)
                total2[half] = _mm512_add_ps(total2[half], power(_mm512_fmadd_ps(_mm512_load_ps(at + row * GROUP + half * 16), a2, b2)));
        }
    }
    // The largest exponential of each of 32 queries.
    MEMBER void largest(float* out) const {
        for (int half = 0; half < 2; half++) {
            __m512i top = most[half];
            if (PARTS == 1) top = _mm512_max_epi32(_mm512_slli_epi32(top, 16), _mm512_and_si512(top, _mm512_set1_epi32(0xffff0000)));
            _mm512_store_ps(out + half * 16, _mm512_castsi512_ps(top));
        }
    }
};

// Sums over some rows for all queries, and the largest exponential: see caco_forward. `sums` holds tiles of 16 of D by 16
// queries, `padded` / 16 for each 16 of D. Returns whether all rows have a direction.
template <int PARTS>
TARGET static bool forward_part(const Forward& f, const Packed& queries, int64_t padded, int64_t first_row, int64_t last_row,
                                double* z, double* z2, float* most, float* sums) {
    const int64_t D = round_up(f.D, GROUP), S = block_rows(D), steps = S / GROUP;
    Packed rows(S * D, PARTS), transposed(sums ? S * D : 0, PARTS), tile(S * GROUP, PARTS);
    Buffer scratch(4 * SUMS);
    const float beyond = (-200.0f + f.shift * LOG2_E) / (f.inverse_tau * LOG2_E);  // a score whose exponential is 0
    bool usable = true;
    const Tiles ready;
    for (int64_t start = first_row; start < last_row; start += S) {
        const int64_t count = std::min(S, last_row - start), groups = round_up(count, GROUP) / GROUP;
        usable &= pack<PARTS>(f.w + start * f.D, count, f.D, D, rows, nullptr);
        if (sums) transpose<PARTS>(rows, count, D, steps, transposed);
        for (int64_t i = 0; i < padded; i += GROUP) {
            Weigh<PARTS> work(f, tile, steps, count);
            scan<PARTS>(rows, rows.at, GROUP * D, queries, queries.at + i * D, 0, D, groups, count, beyond, scratch.at, work);
            if (sums)
                accumulate<PARTS>(transposed, transposed.at, steps * TILE, 2 * steps * TILE, tile, tile.at, steps * TILE, 0, groups,
                                  start == first_row, Sums{sums + i * 16, SUMS, padded * 16, 64}, GROUP * padded, D / GROUP);
            // A block's sum is a float's, the whole bank's a double's.
            alignas(64) float total[2 * GROUP], top[GROUP];
            for (int half = 0; half < 2; half++) {
                _mm512_store_ps(total + half * 16, work.total[half]);
                _mm512_store_ps(total + GROUP + half * 16, work.total2[half]);
            }
            work.largest(top);
            for (int64_t n = 0; n < GROUP; n++) {
                z[i + n] += total[n];
                if (f.second) z2[i + n] += total[GROUP + n];
                most[i + n] = std::max(most[i + n], top[n]);
            }
        }
    }
    return usable;
}

// The TOP best rows of 32 queries so far: values and rows [half][TOP], 16 queries to a vector. Rows further than `reach` [half][16]
// behind the best may be left out.
struct Choose {
    float* values;
    int32_t* index;
    const float* reach;
    int32_t first_row;
    const float* scores = nullptr;
    __m512 peak[2];
    int32_t first_here = 0;

    MEMBER void begin(const float* scores_, int64_t group) {
        scores = scores_;
        first_here = first_row + (int32_t)(group * GROUP);
        peak[0] = peak[1] = _mm512_set1_ps(-1e6f);
    }
    MEMBER void piece(int64_t piece) {
        const float* at = scores + piece * PIECE * GROUP;
#pragma GCC unroll 4
        for (int row = 0; row < PIECE; row++)
            for (int half = 0; half < 2; half++) peak[half] = _mm512_max_ps(peak[half], _mm512_load_ps(at + row * GROUP + half * 16));
    }
    // What a score must exceed to be kept.
    MEMBER __m512 bar(int half) const {
        const float* best = values + half * TOP * 16;
        return _mm512_max_ps(_mm512_load_ps(best + (TOP - 1) * 16), _mm512_sub_ps(_mm512_load_ps(best), _mm512_load_ps(reach + half * 16)));
    }
    MEMBER void end() {
        for (int half = 0; half < 2; half++) {
            float* best = values + half * TOP * 16;
            int32_t* row = index + half * TOP * 16;
            if (!_mm512_cmp_ps_mask(peak[half], bar(half), _CMP_GT_OQ)) continue;
            for (int32_t r = 0; r < GROUP; r++) {
                __m512 x = _mm512_load_ps(scores + r * GROUP + half * 16);
                if (!_mm512_cmp_ps_mask(x, bar(half), _CMP_GT_OQ)) continue;
                __m512i j = _mm512_set1_epi32(first_here + r);
                for (int t = 0; t < TOP; t++) {
                    const __m512 held = _mm512_load_ps(best + t * 16);
                    const __m512i holder = _mm512_load_si512(row + t * 16);
                    const __mmask16 better = _mm512_cmp_ps_mask(x, held, _CMP_GT_OQ);
                    _mm512_store_ps(best + t * 16, _mm512_mask_blend_ps(better, held, x));
                    _mm512_store_si512(row + t * 16, _mm512_mask_blend_epi32(better, holder, j));
                    x = _mm512_mask_blend_ps(better, x, held);
                    j = _mm512_mask_blend_epi32(better, j, holder);
                }
            }
        }
    }
};

// The best TOP rows of all keys among some blocks, as they are to be had, best first: see caco_nearest. lost: see `pack`.
template <int PARTS>
TARGET static void nearest_part(const Forward& f, int64_t R, const Packed& keys, const float* reach, int64_t padded,
                                std::atomic<int64_t>& block, float* best, int64_t* index, float* lost) {
    const int64_t D = round_up(f.D, GROUP), S = block_rows(D);
    Packed rows(S * D, PARTS);
    Buffer scratch(4 * SUMS), values(padded * TOP), numbers(padded * TOP);
    int32_t* row = (int32_t*)numbers.at;
    for (int64_t i = 0; i < padded * TOP; i++) values[i] = -3.0e38f, row[i] = -1;
    float most_lost = 0;  // of this thread alone, as it is written for every row
    const Tiles ready;
    for (int64_t start; (start = block++ * S) < R;) {
        const int64_t count = std::min(S, R - start);
        pack<PARTS>(f.w + start * f.D, count, f.D, D, rows, nullptr, PARTS == 1 ? &most_lost : nullptr);
        for (int64_t i = 0; i < padded; i += GROUP) {
            Choose work{values.at + i * TOP, row + i * TOP, reach + i, (int32_t)start};
            scan<PARTS>(rows, rows.at, GROUP * D, keys, keys.at + i * D, 0, D, round_up(count, GROUP) / GROUP, count, -1e6f, scratch.at, work);
        }
    }
    *lost = most_lost;
    for (int64_t i = 0; i < padded; i++)
        for (int t = 0; t < TOP; t++) {
            const int64_t at = i / 16 * TOP * 16 + t * 16 + i % 16;
            const bool none = row[at] < 0 || values[at] < -2.0f;  // rows that pad the bank are no rows
            best[i * TOP + t] = none ? -3.0e38f : values[at];
            index[i * TOP + t] = none ? -1 : row[at];
        }
}

// Probabilities of 32 rows and the queries of a chunk, as a left factor: of 32 queries, one of the first 16 and one of the last in turn.
template <int PARTS>
struct Share {
    const Update& u;
    const float* offset;  // of the chunk's queries: see offset_of
    Packed& tile;
    const __m512 a;
    const float* scores = nullptr;
    int64_t group = 0;

    MEMBER Share(const Update& u, const float* offset, Packed& tile)
        : u(u), offset(offset), tile(tile), a(_mm512_set1_ps(u.inverse_tau * LOG2_E)) {}
    MEMBER void begin(const float* scores_, int64_t group_) { scores = scores_, group = group_; }
    MEMBER void end() {}
    MEMBER void piece(int64_t piece) {
        const __m512 b = _mm512_load_ps(offset + group * GROUP), b_next = _mm512_load_ps(offset + group * GROUP + 16);
        const float* at = scores + piece * PIECE * GROUP;
        bf16* to = tile.at + (piece / (16 / PIECE) * (QUERY_CHUNK / GROUP) + group) * TILE + piece % (16 / PIECE) * PIECE * GROUP;
        __m512 sum;
        __m512i most;
#pragma GCC unroll 4
        for (int row = 0; row < PIECE; row++) {
            __m512i parts[PARTS];
            exponentials<PARTS>(_mm512_load_ps(at + row * GROUP), _mm512_load_ps(at + row * GROUP + 16), a, b, b_next, parts, sum, most);
            for (int part = 0; part < PARTS; part++) _mm512_store_si512(to + part * tile.part + row * GROUP, parts[part]);
        }
    }
};

// Some blocks of rows, as they are to be had: see caco_update. `weighted` has padded / 32 tiles for every 16 of D.
template <int PARTS>
TARGET static void update_part(const Update& u, const Packed& queries, const Packed& weighted, const float* offset, std::atomic<int64_t>& block) {
    const int64_t D = round_up(u.D, GROUP), S = block_rows(D), steps = u.padded / GROUP;
    Packed rows(S * D, PARTS), tile(GROUP * QUERY_CHUNK, PARTS);
    Buffer scratch(4 * SUMS), toward(S * D), inverse_norm(S), together(D);
    const Tiles ready;
    for (int64_t start; (start = block++ * S) < u.R;) {
        const int64_t count = std::min(S, u.R - start);
        pack<PARTS>(u.w + start * u.D, count, u.D, D, rows, inverse_norm.at);
        if (u.push == 0.0f) memset(toward.at, 0, S * D * sizeof(float));
        for (int64_t i = 0; u.push != 0.0f && i < u.padded; i += QUERY_CHUNK) {
            const int64_t groups = std::min(QUERY_CHUNK, u.padded - i) / GROUP;
            for (int64_t j = 0; j < count; j += GROUP) {
                Share<PARTS> work(u, offset + i, tile);
                scan<PARTS>(rows, rows.at + j * D, 0, queries, queries.at + i * D, GROUP * D, D, groups, GROUP * groups, 0, scratch.at, work);
                accumulate<PARTS>(tile, tile.at, QUERY_CHUNK / GROUP * TILE, 0, weighted, weighted.at + i / GROUP * TILE, steps * TILE,
                                  2 * steps * TILE, groups, i == 0, Sums{toward.at + j * D, SUMS, D * 16, 64}, GROUP * 16, D / GROUP);
            }
        }
        for (int64_t j = 0; j < count; j++) {
            for (int64_t d = 0; d < D; d += 16) {
                _mm_prefetch((const char*)(u.v + (start + j) * u.D + d + AHEAD), _MM_HINT_T0);
                _mm512_store_ps(together.at + d, _mm512_load_ps(toward.at + j / 16 * D * 16 + d * 16 + j % 16 * 16));
            }
            avx512::move_row(u, start + j, inverse_norm[j], together.at);
        }
    }
}

// How many threads the work on so many queries, rows and numbers in each is worth, one block of rows a thread at least.
int64_t worth(int64_t G, int64_t R, int64_t D, int threads) {
    if ((double)G * R * D < 3.0e7) return 1;  // less work than starting a thread
    return std::max<int64_t>(1, std::min<int64_t>(threads, (R + block_rows(D) - 1) / block_rows(D)));
}

// Shares of consecutive rows with sums of their own, added up in their order. Which thread has which does not show in the bits, and
// a thread on a slower core has fewer: hence several a thread, where their sums do not take much memory.
struct Shares {
    Shares(int64_t G, int64_t R, int64_t D, int threads) : padded(round_up(G, GROUP)) {
        const int64_t blocks = (R + block_rows(D) - 1) / block_rows(D), workers = worth(G, R, D, threads);
        const int64_t several = workers == 1 ? 1 : std::min<int64_t>(16, (1 << 20) / (padded * D));  // 4 MiB
        count = std::min<int64_t>({blocks, MOST_ROW_SHARES, std::max(workers, several)});
        rows = (blocks + count - 1) / count * block_rows(D);
        count = (R + rows - 1) / rows;
    }
    int64_t padded, count, rows;
};

template <int PARTS>
bool forward(const Forward& f, int64_t G, int64_t R, double* z, double* z2, float* peak, float* sums, int threads) {
    const int64_t D = round_up(f.D, GROUP);
    const Shares shares(G, R, D, threads);
    const int64_t padded = shares.padded;
    Packed queries(padded * D, PARTS);
    pack_queries<PARTS>(f.q, G, f.D, D, queries);
    std::vector<double> totals(padded * shares.count), totals2(z2 ? padded * shares.count : 0);
    std::vector<float> most(padded * shares.count);
    Buffer weighed(sums ? padded * shares.count * D : 0);
    std::atomic<bool> usable{true};
    const bool done = in_parallel(threads, shares.count, [&](int64_t part) {
        if (!forward_part<PARTS>(f, queries, padded, part * shares.rows, std::min(R, (part + 1) * shares.rows), &totals[part * padded],
                                 z2 ? &totals2[part * padded] : nullptr, &most[part * padded], sums ? &weighed[part * padded * D] : nullptr))
            usable = false;
    });
    if (!done) return false;
    const float rest = left_out<PARTS>(-f.shift * LOG2_E);
    for (int64_t i = 0; i < G; i++) {
        double squares = 0;
        for (int64_t d = 0; d < f.D; d++) squares += (double)f.q[i * f.D + d] * f.q[i * f.D + d];
        z[i] = usable && squares < 1.0202 ? 0 : NAN;  // longer ones may leave the exponents that there are
        if (z2) z2[i] = 0;
        float largest = 0;
        for (int64_t part = 0; part < shares.count; part++) {
            z[i] += rest * totals[part * padded + i];
            if (z2) z2[i] += totals2[part * padded + i];
            largest = std::max(largest, most[part * padded + i]);
        }
        peak[i] = std::min(1.0f, (logf(rest * largest) + f.shift) / f.inverse_tau);
    }
    for (int64_t tile = 0; sums && tile < padded * D / SUMS; tile++) {
        const int64_t d = tile / (padded / 16) * 16, i = tile % (padded / 16) * 16;
        for (int64_t n = 0; n < std::min<int64_t>(16, G - i); n++)
            for (int64_t e = 0; e < std::min<int64_t>(16, f.D - d); e++) {
                float total = 0;
                for (int64_t part = 0; part < shares.count; part++) total += weighed[part * padded * D + tile * SUMS + e * 16 + n];
                sums[(i + n) * f.D + d + e] = rest * total;
            }
    }
    return true;
}

// What rounding to bfloat16 takes from a vector: its norm.
float lost(const float* x, int64_t D) {
    double squares = 0;
    for (int64_t d = 0; d < D; d++) {
        uint32_t bits;
        memcpy(&bits, x + d, 4);
        bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        float rounded;
        memcpy(&rounded, &bits, 4);
        squares += ((double)x[d] - rounded) * ((double)x[d] - rounded);
    }
    return (float)sqrt(squares) * 1.0001f;
}

// The nearest rows by products of PARTS. error: a bound on that of each key's cosines, proven: with one part k.m - k'.m' is
// (k - k').m + k'.(m - m'); two leave up to 2^-16 of a number out and not the product of the second ones, 3 * 2^-16 and terms of
// higher order.
template <int PARTS>
bool nearest(const Forward& f, int64_t G, int64_t R, float* values, int64_t* index, float* error, int threads) {
    const int64_t D = round_up(f.D, GROUP);
    const int64_t padded = round_up(G, GROUP), workers = std::min(MOST_ROW_SHARES, worth(G, R, D, threads));
    std::vector<float> best(padded * workers * TOP), rows_lost(workers), keys_lost(G);
    std::vector<int64_t> rows(padded * workers * TOP);
    Packed keys(padded * D, PARTS);
    Buffer reach(padded);
    pack_queries<PARTS>(f.q, G, f.D, D, keys);
    const auto bound = [&](int64_t i, float row) {
        return sum_error(D) * 1.02f + (PARTS == 1 ? keys_lost[i] + (1.0f + keys_lost[i]) * row : 1.0f / 16384);
    };
    for (int64_t i = 0; i < G; i++) {
        if (PARTS == 1) keys_lost[i] = lost(f.q + i * f.D, f.D);
        reach[i] = 2 * bound(i, 1.01f / 256);  // half a last bit is 2^-8 of a number
    }
    std::fill(best.begin(), best.end(), -3.0e38f), std::fill(rows.begin(), rows.end(), -1);
    std::atomic<int64_t> block{0};
    const bool done = in_parallel((int)workers, workers, [&](int64_t part) {
        nearest_part<PARTS>(f, R, keys, reach.at, padded, block, &best[part * padded * TOP], &rows[part * padded * TOP], &rows_lost[part]);
    });
    if (!done) return false;
    merge(best, rows, padded, workers, G, TOP, values, index);
    const float row = sqrtf(*std::max_element(rows_lost.begin(), rows_lost.end())) * 1.0001f;
    for (int64_t i = 0; i < G; i++) error[i] = bound(i, row);
    return true;
}

// The same by one part, and by two for the keys that have more rows in reach than are kept.
bool nearest(const Forward& f, int64_t G, int64_t R, float* values, int64_t* index, float* error, int threads) {
    if (!nearest<1>(f, G, R, values, index, error, threads)) return false;
    std::vector<int64_t> crowded;
    for (int64_t i = 0; i < G; i++)
        if (values[i * TOP + TOP - 1] >= values[i * TOP] - 2 * error[i]) crowded.push_back(i);
    const int64_t C = crowded.size();
    if (C == 0) return true;
    std::vector<float> keys(C * f.D), their_values(C * TOP), their_error(C);
    std::vector<int64_t> their_index(C * TOP);
    for (int64_t c = 0; c < C; c++) std::copy_n(f.q + crowded[c] * f.D, f.D, &keys[c * f.D]);
    Forward of_these = f;
    of_these.q = keys.data();
    if (!nearest<2>(of_these, C, R, their_values.data(), their_index.data(), their_error.data(), threads)) return false;
    for (int64_t c = 0; c < C; c++) {
        std::copy_n(&their_values[c * TOP], TOP, values + crowded[c] * TOP);
        std::copy_n(&their_index[c * TOP], TOP, index + crowded[c] * TOP);
        error[crowded[c]] = their_error[c];
    }
    return true;
}

// Whether a bfloat16's exponents hold every probability.
bool in_range(const Update& u, int64_t N) {
    for (int64_t i = 0; i < N; i++)
        if (!((-1.01f * u.inverse_tau - u.log_sum[i]) * LOG2_E > LOWEST_EXPONENT)) return false;
    return true;
}

template <int PARTS>
bool update(Update& u, int64_t N, int threads) {
    const int64_t D = round_up(u.D, GROUP), padded = round_up(N, GROUP), S = block_rows(D);
    Packed queries(padded * D, PARTS), weighted(padded * D, PARTS);
    Buffer offset(padded), weight(N);
    for (int64_t i = 0; i < padded; i++) {
        const float exponent = i < N ? -u.log_sum[i] * LOG2_E : -200.0f;  // of no query: 0
        offset[i] = offset_of<PARTS>(exponent);
        if (i < N) weight[i] = u.grad[i] * left_out<PARTS>(exponent);
    }
    pack_queries<PARTS>(u.q, N, u.D, D, queries);
    pack_weighted<PARTS>(u.q, weight.at, N, u.D, D, padded / GROUP, weighted);
    u.padded = padded;
    const int64_t workers = worth(N, u.R, D, threads);
    std::atomic<int64_t> block{0};
    return in_parallel((int)workers, workers, [&](int64_t) { update_part<PARTS>(u, queries, weighted, offset.at, block); }) &&
           block * S >= u.R;
}

#undef LOAD
#undef MULTIPLY
#undef INLINE
#undef MEMBER
#undef TARGET
