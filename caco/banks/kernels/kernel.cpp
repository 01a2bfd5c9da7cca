// The bank on a CPU. One visit to a block of rows computes scores, sums and updates; each thread needs memory for one block.
//
// A pass makes two products with the queries, both in tiles that stay in the cache: first the cosines (MR queries x 16 rows), whose
// exponentials are taken while the cosines are still in registers; then the sum of vectors that these exponentials weight. The cosine
// of unit vectors is at most 1, so a fixed shift of the logits takes the place of a running maximum. Arithmetic is float32.
// caco/banks/kernels/fused.py calls this file's functions through ctypes.
//
// One binary serves every machine. The loops (loops.h) are compiled for plain vectors, for AVX2 with FMA and for AVX-512 (sets.h);
// beside them there are the passes on AMX tiles (amx_*.h) and the searches in integers (integers.h, nearest.h). Each call takes the
// best of these that the processor has.

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // raised by some compilers' own intrinsics

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "amx_forward.h"
#include "amx_nearest.h"
#include "amx_update.h"
#include "bank.h"
#include "nearest.h"
#include "sets.h"

namespace {

int best_set() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(HAS_AMX)
        if (amx::available()) return AMX;
#endif
        return AVX512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PLAIN;
}

// The best instruction set of this processor that is no better than the one asked for; asked = -1 sets no bound.
int chosen(int asked) {
    static const int best = best_set();  // called whatever was asked, as it requests the permission to use tiles
    if (asked == WIDE) return best >= AVX2 ? WIDE : PLAIN;
    return asked < 0 ? best : std::min(asked, best);
}

}  // namespace

extern "C" {

// The Set that the functions below use when they are called with this `set`.
int caco_set(int asked) { return chosen(asked); }

// How many candidates caco_nearest keeps for each key, T.
int caco_top(int set) {
#if defined(HAS_AMX)
    if (chosen(set) == AMX) return amx::TOP;
#endif
    return TOP;
}

// How many numbers a forward pass of G queries over R rows keeps, or 0 where it cannot keep them: AMX computes a product about
// as fast as memory could return its result.
int64_t caco_kept(int64_t G, int64_t R, int64_t D, int set) {
    return chosen(set) == AMX ? 0 : round_up(G, 12) * round_up(R, block_rows(D));
}

// Computes for each of G queries q, over R rows w of any norm, with m = w / |w|:
//   z = sum_j exp(inverse_tau q.m_j - shift); z2 the same at a second temperature (null: not computed); peak = max_j q.m_j;
//   sums = sum_j exp(inverse_tau q.m_j - shift) m_j, [G, D] (null: not computed).
// Returns 0, or 1 if memory ran out. A row of norm zero, or anything that is not finite, makes z infinite or NaN.
// low: whether AMX may round to bfloat16. The other sets compute in float32 in any case.
// kept: takes the exponentials at the second temperature, or else the first, for caco_update (null: not kept); caco_kept says how many
// numbers these are. AMX does not keep them.
int caco_forward(const float* q, int64_t G, const float* w, int64_t R, int64_t D, float inverse_tau, float shift,
                 float inverse_tau2, float shift2, double* z, double* z2, float* peak, float* sums, float* kept, int low, int threads,
                 int set) try {
    set = chosen(set);
#if defined(HAS_AMX)
    if (set == AMX) {
        const Forward f{q, w, D, z2 != nullptr, inverse_tau, inverse_tau2, shift, shift2};
        return !(low ? amx::forward<1> : amx::forward<2>)(f, G, R, z, z2, peak, sums, threads);
    }
#endif
    const Shares shares(G, R, D, threads);
    const int64_t wide = round_up(D, PANEL), share = shares.queries, padded = shares.query_shares * share;
    Buffer padded_q(padded * D);
    memcpy(padded_q.at, q, G * D * sizeof(float));
    const Forward f{padded_q.at, w, D, z2 != nullptr, inverse_tau, inverse_tau2, shift, shift2, kept, round_up(G, 12)};
    std::vector<double> totals(padded * shares.row_shares), totals2(z2 ? padded * shares.row_shares : 0);
    std::vector<float> peaks(padded * shares.row_shares, -3.0e38f);
    Buffer weighed(sums ? padded * shares.row_shares * wide : 0);
    const bool done = in_parallel(threads, shares.query_shares * shares.row_shares, [&](int64_t part) {
        const int64_t qs = part % shares.query_shares, rs = part / shares.query_shares;
        const int64_t at = rs * padded + qs * share;
        const int64_t last = round_up(std::min(G, (qs + 1) * share), 12), last_row = std::min(R, (rs + 1) * shares.rows);
        DISPATCH(set, forward_part(f, qs * share, last, rs * shares.rows, last_row, &totals[at], z2 ? &totals2[at] : nullptr,
                                   &peaks[at], sums ? &weighed[at * wide] : nullptr));
    });
    if (!done) return 1;
    for (int64_t i = 0; i < G; i++) {
        z[i] = 0, peak[i] = -3.0e38f;
        if (z2) z2[i] = 0;
        for (int64_t rs = 0; rs < shares.row_shares; rs++) {
            z[i] += totals[rs * padded + i];
            if (z2) z2[i] += totals2[rs * padded + i];
            peak[i] = std::max(peak[i], peaks[rs * padded + i]);
        }
        for (int64_t d = 0; sums && d < D; d++) {
            float total = 0;
            for (int64_t rs = 0; rs < shares.row_shares; rs++) total += weighed[(rs * padded + i) * wide + d];
            sums[i * D + d] = total;
        }
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// Finds for each of G keys T candidates for the nearest row, the largest cosine first and equal ones by index: values and index
// [G, T], and a bound on the error of each key's values, [G]. Rows that cannot be the nearest may be left out; then the value is -3e38
// and the index -1. Returns 0, or 1 if memory ran out.
int caco_nearest(const float* k, int64_t G, const float* w, int64_t R, int64_t D, float* values, int64_t* index, float* error,
                 int threads, int set) try {
    set = chosen(set);
#if defined(HAS_AMX)
    if (set == AMX) return !amx::nearest(Forward{k, w, D, false, 0, 0, 0, 0}, G, R, values, index, error, threads);
#endif
    return !nearest(k, G, w, R, D, values, index, error, threads, set);
} catch (const std::bad_alloc&) {
    return 1;
}

// Moves R rows and their velocities along the gradient of N queries (caco/equations.py: bank_gradient, bank_update).
//   positive: [N], the index of one of these rows, or any other number for a positive that is none of them; log_sum: [N], log of the sum
//   of exponentials at this temperature; grad: [N], weight of the query's loss;
//   kept: [passes], what that many forward passes kept, together for all N queries in order (null: not kept); kept_queries: [passes],
//   the queries of each; factor: [N], what makes a query's exponentials its probabilities.
// Returns 0, or 1 if memory ran out.
int caco_update(const float* q, const int64_t* positive, const float* log_sum, const float* grad, int64_t N, float* w,
                float* v, int64_t R, int64_t D, float inverse_tau, float pull, float push, float lr, float momentum,
                float weight_decay, int normalise, const float* const* kept, const int64_t* kept_queries, const float* factor,
                int low, int threads, int set) try {
    set = chosen(set);
    std::vector<int64_t> first_of_row(R + 1), by_row(N);
    for (int64_t i = 0; i < N; i++)
        if (positive[i] >= 0 && positive[i] < R) first_of_row[positive[i]]++;
    for (int64_t j = 0; j < R; j++) first_of_row[j + 1] += first_of_row[j];  // the ends; the next loop turns them into starts
    for (int64_t i = N - 1; i >= 0; i--)
        if (positive[i] >= 0 && positive[i] < R) by_row[--first_of_row[positive[i]]] = i;
    Update u{q, nullptr, log_sum, grad, first_of_row.data(), by_row.data(), nullptr, w, v, R, D, N,
             inverse_tau, pull, push, lr, momentum, weight_decay, normalise != 0};
#if defined(HAS_AMX)
    if (set == AMX) return !(low && amx::in_range(u, N) ? amx::update<1> : amx::update<2>)(u, N, threads);
#endif
    const int64_t wide = round_up(D, PANEL), S = block_rows(D), padded = round_up(N, 12);
    Buffer padded_q(padded * D), weighted(padded * wide), sums(padded), weights(padded);
    memcpy(padded_q.at, q, N * D * sizeof(float));
    memcpy(sums.at, log_sum, N * sizeof(float));
    memcpy(weights.at, grad, N * sizeof(float));
    for (int64_t i = 0; i < N; i++)
        for (int64_t d = 0; d < D; d++)
            weighted[(d / PANEL) * padded * PANEL + i * PANEL + d % PANEL] = q[i * D + d] * grad[i];
    std::vector<Kept> of_query(kept ? padded : 0);
    for (int64_t i = 0, pass = 0, from = 0; kept && i < N; i++) {
        for (; i - from == kept_queries[pass]; pass++) from = i;
        of_query[i] = {kept[pass] + (i - from) * S, round_up(kept_queries[pass], 12) * S, factor[i]};
    }
    if (kept) u.kept = of_query.data();
    u.q = padded_q.at, u.weighted = weighted.at, u.log_sum = sums.at, u.grad = weights.at, u.padded = padded;
    if ((double)N * R * D < 4.0e6) threads = 1;
    const int64_t blocks = (R + S - 1) / S, workers = std::max<int64_t>(1, std::min<int64_t>(threads, blocks));
    std::atomic<int64_t> block{0};
    const bool done = in_parallel((int)workers, workers, [&](int64_t) {
        Buffer transposed(S * D), tile(QUERY_TILE * (S + PANEL)), toward(S * wide), inverse_norm(S);
        for (int64_t b; (b = block++) < blocks;)
            DISPATCH(set, update_block(u, b * S, transposed.at, tile.at, toward.at, inverse_norm.at));
    });
    return done && block >= blocks ? 0 : 1;
} catch (const std::bad_alloc&) {
    return 1;
}
}
