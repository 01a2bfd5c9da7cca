// The bank's loops for one instruction set, in a namespace of the set's name. sets.h includes this file once for each set, with these
// macros: V floats fill a vector, a tile of scores is MR queries by 16 rows, TARGET is the attribute of every function, STREAM(at, x)
// stores a vector past the caches.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "bank.h"

#ifndef SET
#define SET plain
#define TARGET
#define V 4
#define MR 3
#define STREAM(at, x) store(at, x)
#endif

namespace {
namespace SET {

typedef float vec __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * V), aligned(4), may_alias));
constexpr int NV = PANEL / V;

TARGET static inline vec load(const float* at) { return *(const vec*)at; }
TARGET static inline void store(float* at, vec x) { *(vec*)at = x; }
// As `store`, past the caches. `at` is aligned to the vector's size.
TARGET static inline void stream(float* at, vec x) { STREAM(at, x); }

// e^x, with an error of about one unit in the last place, for x up to 88. For x below -87 it gives e^-87, which is too small to change
// any of the sums that it is used in.
TARGET static inline vec exponential(vec x) {
    const vec low = vec{} - 87.0f;
    x = x < low ? low : x;
    const vec shifted = x * 1.44269504088896341f + 12582912.0f;  // its low bits hold the nearest integer
    const vec n = shifted - 12582912.0f;
    const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vec)((ints)p + ((ints)shifted << 23));
}

TARGET static inline float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < V; lane++) total += x[lane];
    return total;
}

TARGET static inline float dot(const float* a, const float* b, int64_t D) {
    vec products = vec{};
    int64_t d = 0;
    for (; d + V <= D; d += V) products += load(a + d) * load(b + d);
    float total = sum(products);
    for (; d < D; d++) total += a[d] * b[d];
    return total;
}

// The products of MR queries with one panel of 16 rows.
TARGET static inline void scores(const float* q, int64_t D, const float* panel, vec s[MR][NV]) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) s[r][v] = vec{};
    for (int64_t d = 0; d < D; d++) {
        vec b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) b[v] = load(panel + d * PANEL + v * V);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            const float a = q[r * D + d];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) s[r][v] += a * b[v];
        }
    }
}

// out[r][0..16) += sum_k a[r * row + k * step] * b[k][0..16).
TARGET static inline void accumulate(
    const float* a, int64_t row, int64_t step, const float* b, int64_t depth, float* out, int64_t out_row) {
    vec c[MR][NV];
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) c[r][v] = load(out + r * out_row + v * V);
    for (int64_t k = 0; k < depth; k++) {
        vec x[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) x[v] = load(b + k * PANEL + v * V);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            const float w = a[r * row + k * step];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) c[r][v] += w * x[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) store(out + r * out_row + v * V, c[r][v]);
}

// Writes the unit rows of a block into `transposed`, as panels [panel][d][16], and, unless it is null, into `rows`, not transposed, as
// panels [d / 16][row][16]. Rows beyond `count` become zero.
TARGET static void pack(
    const float* w, int64_t count, int64_t D, int64_t S, float* transposed, float* rows, float* inverse_norm) {
    const int64_t padded = round_up(count, PANEL), wide = round_up(D, PANEL);
    for (int64_t j = 0; j < padded; j++) {
        float inverse = 0;
        if (j < count) {
            inverse = 1.0f / sqrtf(dot(w + j * D, w + j * D, D));
        }
        if (inverse_norm) inverse_norm[j] = inverse;
        float* to = transposed + (j / PANEL) * D * PANEL + j % PANEL;
        for (int64_t d = 0; d < D; d++) to[d * PANEL] = j < count ? w[j * D + d] * inverse : 0.0f;
        if (!rows) continue;
        for (int64_t d = 0; d < wide; d++)
            rows[(d / PANEL) * S * PANEL + j * PANEL + d % PANEL] = j < count && d < D ? w[j * D + d] * inverse : 0.0f;
    }
}

// The sums of caco_forward for some queries over some rows. f.q is padded to whole tiles of queries.
TARGET static void forward_part(const Forward& f, int64_t first_query, int64_t last_query, int64_t first_row, int64_t last_row,
                         double* z, double* z2, float* peak, float* sums) {
    const int64_t D = f.D, S = block_rows(D), wide = round_up(D, PANEL), queries = last_query - first_query;
    const int64_t tile_rows = S + PANEL;
    Buffer transposed(S * D), rows(sums ? S * wide : 0), tile(QUERY_TILE * tile_rows), totals(queries * V), totals2(f.second ? queries * V : 0),
        peaks(queries * V);
    for (int64_t i = 0; i < queries * V; i++) peaks[i] = -3.0e38f;
    for (int64_t start = first_row; start < last_row; start += S) {
        const int64_t count = std::min(S, last_row - start), panels = round_up(count, PANEL) / PANEL;
        pack(f.w + start * D, count, D, S, transposed.at, sums ? rows.at : nullptr, nullptr);
        float* kept = f.kept ? f.kept + (start / S * f.kept_queries + first_query) * S : nullptr;
        for (int64_t tile_start = 0; tile_start < queries; tile_start += QUERY_TILE) {
            const int64_t tile_queries = std::min(QUERY_TILE, queries - tile_start);
            for (int64_t panel = 0; panel < panels; panel++) {
                const int64_t valid = count - panel * PANEL;
                for (int64_t i = 0; i < tile_queries; i += MR) {
                    vec s[MR][NV];
                    scores(f.q + (first_query + tile_start + i) * D, D, transposed.at + panel * D * PANEL, s);
#pragma GCC unroll 16
                    for (int r = 0; r < MR; r++) {
                        const int64_t query = tile_start + i + r;
                        vec total = load(&totals[query * V]), top = load(&peaks[query * V]), total2 = vec{};
#pragma GCC unroll 4
                        for (int v = 0; v < NV; v++) {
                            vec e = exponential(s[r][v] * f.inverse_tau - f.shift);
                            vec e2 = f.second ? exponential(s[r][v] * f.inverse_tau2 - f.shift2) : vec{};
                            if (valid < PANEL)
                                for (int lane = 0; lane < V; lane++)
                                    if (v * V + lane >= valid) e[lane] = e2[lane] = 0.0f, s[r][v][lane] = -3.0e38f;
                            total += e;
                            total2 += e2;
                            top = s[r][v] > top ? s[r][v] : top;
                            if (sums) store(&tile[(i + r) * tile_rows + panel * PANEL + v * V], e);
                            if (kept) stream(kept + query * S + panel * PANEL + v * V, f.second ? e2 : e);
                        }
                        store(&totals[query * V], total);
                        if (f.second) store(&totals2[query * V], load(&totals2[query * V]) + total2);
                        store(&peaks[query * V], top);
                    }
                }
            }
            if (!sums) continue;
            for (int64_t d = 0; d < wide; d += PANEL)
                for (int64_t i = 0; i < tile_queries; i += MR)
                    accumulate(&tile[i * tile_rows], tile_rows, 1, rows.at + d * S, panels * PANEL,
                               sums + (tile_start + i) * wide + d, wide);
        }
        // A block's sum is a float's, the whole bank's a double's.
        for (int64_t i = 0; i < queries; i++) {
            z[i] += sum(load(&totals[i * V]));
            store(&totals[i * V], vec{});
            if (!f.second) continue;
            z2[i] += sum(load(&totals2[i * V]));
            store(&totals2[i * V], vec{});
        }
    }
    for (int64_t i = 0; i < queries; i++)
        for (int lane = 0; lane < V; lane++) peak[i] = std::max(peak[i], peaks[i * V + lane]);
}

// The TOP rows with the largest scores of some queries among some rows, the largest first: see caco_nearest.
TARGET static void nearest_part(const Forward& f, int64_t first_query, int64_t last_query, int64_t first_row, int64_t last_row,
                         float* best, int64_t* index) {
    const int64_t D = f.D, S = block_rows(D), queries = last_query - first_query;
    Buffer transposed(S * D);
    for (int64_t start = first_row; start < last_row; start += S) {
        const int64_t count = std::min(S, last_row - start), panels = round_up(count, PANEL) / PANEL;
        pack(f.w + start * D, count, D, S, transposed.at, nullptr, nullptr);
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t valid = std::min<int64_t>(PANEL, count - panel * PANEL);
            for (int64_t i = 0; i < queries; i += MR) {
                vec s[MR][NV];
                scores(f.q + (first_query + i) * D, D, transposed.at + panel * D * PANEL, s);
#pragma GCC unroll 16
                for (int r = 0; r < MR; r++) {
                    float* values = best + (i + r) * TOP;
                    ints above = s[r][0] > values[TOP - 1];
#pragma GCC unroll 4
                    for (int v = 1; v < NV; v++) above |= s[r][v] > values[TOP - 1];
                    if (!any(above)) continue;
                    alignas(64) float row[PANEL];
#pragma GCC unroll 4
                    for (int v = 0; v < NV; v++) store(row + v * V, s[r][v]);
                    insert<TOP>(row, valid, start + panel * PANEL, values, index + (i + r) * TOP);
                }
            }
        }
    }
}

// The cosine of a unit key and a row of any norm but zero.
TARGET static inline void cosine_of(const float* k, const float* w, int64_t D, float* cosine) {
    *cosine = dot(k, w, D) * (1.0f / sqrtf(dot(w, w, D)));
}

// Updates one row and its velocity. t: the sum of the queries, each times its weight and its probability.
TARGET static inline void move_row(const Update& u, int64_t j, float inverse, float* __restrict__ t) {
    const int64_t D = u.D;
    float *__restrict__ w = u.w + j * D, *__restrict__ v = u.v + j * D;
    if (u.push != 1.0f)
        for (int64_t d = 0; d < D; d++) t[d] *= u.push;
    // At its positive a query has the weight pull (1 - p) instead of push p.
    for (int64_t at = u.first_of_row[j]; at < u.first_of_row[j + 1]; at++) {
        const int64_t i = u.by_row[at];
        const float* q = u.q + i * D;
        const float p = expf(dot(q, w, D) * inverse * u.inverse_tau - u.log_sum[i]);
        const float weight = (u.pull - (u.pull + u.push) * p) * u.grad[i];
        for (int64_t d = 0; d < D; d++) t[d] += weight * q[d];
    }
    // sum_i w_ij (I - m m^T) q_i needs only the sum of the weighted queries: the projection is linear.
    const float along = dot(t, w, D) * inverse * inverse, scale = -u.inverse_tau * inverse;
    for (int64_t d = 0; d < D; d++) {
        const float velocity = u.momentum * v[d] + (scale * (t[d] - along * w[d]) + u.weight_decay * w[d]);
        v[d] = velocity;
        w[d] -= u.lr * velocity;
    }
    if (u.normalise) {
        const float back = 1.0f / sqrtf(dot(w, w, D));
        for (int64_t d = 0; d < D; d++) w[d] *= back;
    }
}

// Updates one block of rows: first its gradient over all queries, then velocity and rows. See caco_update.
TARGET static void update_block(const Update& u, int64_t start, float* transposed, float* tile, float* toward, float* inverse_norm) {
    const int64_t D = u.D, S = block_rows(D), wide = round_up(D, PANEL), tile_rows = S + PANEL;
    const int64_t count = std::min(S, u.R - start), panels = round_up(count, PANEL) / PANEL;
    if (u.kept)
        for (int64_t j = 0; j < count; j++) inverse_norm[j] = 1.0f / sqrtf(dot(u.w + (start + j) * D, u.w + (start + j) * D, D));
    else
        pack(u.w + start * D, count, D, S, transposed, nullptr, inverse_norm);
    memset(toward, 0, S * wide * sizeof(float));
    if (u.push != 0.0f)
        for (int64_t tile_start = 0; tile_start < u.padded; tile_start += QUERY_TILE) {
            const int64_t tile_queries = std::min(QUERY_TILE, u.padded - tile_start);
            for (int64_t i = 0; u.kept && i < tile_queries; i++) {
                const Kept& kept = u.kept[tile_start + i];
                const float* from = kept.at ? kept.at + start / S * kept.stride : nullptr;
                for (int64_t row = 0; row < panels * PANEL; row += V)
                    store(tile + i * tile_rows + row, from ? load(from + row) * kept.factor : vec{});
            }
            for (int64_t panel = 0; !u.kept && panel < panels; panel++)
                for (int64_t i = 0; i < tile_queries; i += MR) {
                    vec s[MR][NV];
                    scores(u.q + (tile_start + i) * D, D, transposed + panel * D * PANEL, s);
#pragma GCC unroll 16
                    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
                        for (int v = 0; v < NV; v++)
                            store(tile + (i + r) * tile_rows + panel * PANEL + v * V,
                                  exponential(s[r][v] * u.inverse_tau - u.log_sum[tile_start + i + r]));
                }
            for (int64_t j = 0; j < count; j += MR)
                for (int64_t d = 0; d < wide; d += PANEL)
                    accumulate(tile + j, 1, tile_rows, u.weighted + d * u.padded + tile_start * PANEL, tile_queries,
                               toward + j * wide + d, wide);
        }
    for (int64_t j = 0; j < count; j++) move_row(u, start + j, inverse_norm[j], toward + j * wide);
}

}  // namespace SET
}  // namespace

#undef SET
#undef TARGET
#undef V
#undef MR
#undef STREAM
