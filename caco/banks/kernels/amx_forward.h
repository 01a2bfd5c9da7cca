// The loss's sums over the bank's rows on AMX tiles: the work on the scores of 32 rows and 32 queries, which is done while the tiles
// compute the next scores, and the sharing of rows between threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "amx_exponentials.h"
#include "amx_packing.h"
#include "amx_tiles.h"

#if defined(HAS_AMX)
namespace {
namespace amx {

// The work on a group of rows and 32 queries: their exponentials, stored as a right factor (in pairs of rows), the exponentials' sums and
// the largest exponential of each query.
template <int PARTS>
struct Weigh {
    const Forward& f;
    Packed& tile;
    int64_t steps, count;  // groups in a full block, and rows in this one
    const float* scores = nullptr;
    bf16* weights = nullptr;
    int64_t valid = 0;  // number of the group's rows; may exceed GROUP
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
    // Writes the largest exponential of each of the 32 queries.
    MEMBER void largest(float* out) const {
        for (int half = 0; half < 2; half++) {
            __m512i top = most[half];
            if (PARTS == 1) top = _mm512_max_epi32(_mm512_slli_epi32(top, 16), _mm512_and_si512(top, _mm512_set1_epi32(0xffff0000)));
            _mm512_store_ps(out + half * 16, _mm512_castsi512_ps(top));
        }
    }
};

// The sums of caco_forward over some rows for all queries, and the largest exponential of each query. `sums` holds tiles of 16 columns of
// D by 16 queries, `padded` / 16 tiles for every 16 columns. Returns whether all rows have a direction.
template <int PARTS>
AMX_TARGET static bool forward_part(const Forward& f, const Packed& queries, int64_t padded, int64_t first_row, int64_t last_row,
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
            // The sums over a block are float, those over the whole bank double.
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

// Shares of consecutive rows. Each share has sums of its own, which are added in the order of the shares, so the result does not depend
// on which thread computed which share. If the sums do not take much memory, there are several shares for each thread, so that a thread
// on a slower core takes fewer of them.
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
        z[i] = usable && squares < 1.0202 ? 0 : NAN;  // a longer query's exponents may leave the range of `exponentials`
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

}  // namespace amx
}  // namespace
#endif
