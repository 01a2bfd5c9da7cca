// The search for the nearest row in integers, for one instruction set, in a namespace of the set's name. Rows and keys are rounded to
// integers, and the rounding errors are measured, so the few rows that can be the nearest are known. sets.h includes this file once for
// each set, with these macros: V numbers of 32 bits fill a vector; a tile of scores is MR keys by 16 rows; TARGET is the attribute of
// every function; NUMBER is the type that is rounded to; ADD_PRODUCTS(sum, rows, key) adds to each lane the products of the numbers that
// lie in that lane; ABOVE(x, bar) is not 0 if any lane of x is above bar.
//
// The error bound. Let k be a key, m a unit row, and k' and m' their rounded values (the integers times their steps). Then
//   |k.m - k'.m'| <= |k - k'| + |k'| |m - m'|.
// Products of integers and their sums are exact, because an int32 holds them: with bytes a sum is at most 127 * 255 * D; with 16 bits any
// part of the sum is at most the product of the integer vectors' norms, each of which is LENGTH up to sqrt(D) / 2, so it is below 2^31.
// There remains float32's rounding of a row's norm and of the last conversions, at most (D / 4 + 4) * 2^-23, which is less than
// sum_error(D).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bank.h"

#ifndef SET
#define SET plain_words
#define TARGET
#define V 4
#define MR 3
#define NUMBER int16_t
#define ADD_PRODUCTS(sum, rows, key) sum + rows * key
#define ABOVE(x, bar) any(x > bar)
#endif

namespace {
namespace SET {

typedef float reals __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef int32_t words __attribute__((vector_size(4 * V), aligned(4), may_alias));
typedef NUMBER numbers __attribute__((vector_size(sizeof(NUMBER) * V), aligned(1), may_alias));
constexpr int NV = PANEL / V;
constexpr bool BYTES = sizeof(NUMBER) == 1;

TARGET static inline float sum(reals x) {
    float total = 0;
    for (int lane = 0; lane < V; lane++) total += x[lane];
    return total;
}

// V numbers beginning at x; those after the first `left` are 0.
TARGET static inline reals some(const float* x, int64_t left) {
    if (left >= V) return *(const reals*)x;
    reals y = reals{};
    memcpy(&y, x, left * sizeof(float));
    return y;
}

// Rounds x to integers and pads them with zeros to whole vectors. A vector whose norm is zero or not finite becomes 0.
TARGET static Rounded round_one(const float* x, int64_t D, NUMBER* to) {
    reals squares = reals{}, most = reals{}, lost = reals{};
    for (int64_t d = 0; d < D; d += V) {
        const reals y = some(x + d, D - d), size = y < 0 ? -y : y;
        squares += y * y;
        most = most > size ? most : size;
    }
    float largest = 0;
    for (int lane = 0; lane < V; lane++) largest = std::max(largest, most[lane]);
    const float norm = sqrtf(sum(squares)), scale = (BYTES ? 127.0f : LENGTH) / (BYTES ? largest : norm);
    if (!(norm > 0 && norm < INFINITY && 1.0f / norm < INFINITY && scale < INFINITY)) {
        memset(to, 0, round_up(D, V) * sizeof(NUMBER));
        return {0, 0, 0};
    }
    for (int64_t d = 0; d < D; d += V) {
        const reals exact = some(x + d, D - d) * scale, whole = (exact + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
        lost += (exact - whole) * (exact - whole);
        *(numbers*)(to + d) = __builtin_convertvector(__builtin_convertvector(whole, words), numbers);
    }
    return {norm, 1.0f / scale, sqrtf(sum(lost)) / scale};
}

// Rounds the rows of a block to integers, as panels [panel][word][16]. step: for each row the value of the integer 1, for the row scaled to
// norm 1; 0 for a row without a direction. lost: raised to the largest norm of such a row's rounding error, if that is larger.
TARGET static void pack(const float* w, int64_t count, int64_t D, NUMBER* row, int32_t* panels, float* step, float* lost) {
    const int64_t depth = words_of<NUMBER>(D);
    for (int64_t j = 0; j < round_up(count, PANEL); j++) {
        int32_t* to = panels + j / PANEL * depth * PANEL + j % PANEL;
        Rounded of{0, 0, 0};
        if (j < count) of = round_one(w + j * D, D, row);
        step[j] = of.norm > 0 ? of.step / of.norm : 0;
        if (step[j] > 0) *lost = std::max(*lost, of.lost / of.norm);
        for (int64_t d = 0; d < depth; d++) {
            int32_t word = 0;
            if (j < count) memcpy(&word, row + d * 4 / sizeof(NUMBER), 4);
            to[d * PANEL] = BYTES ? word ^ (int32_t)0x80808080 : word;  // a row's bytes are unsigned, so 128 is added to each
        }
    }
}

// The products of MR keys with one panel of 16 rows. Each byte of a row is 128 too large, which `before` corrects.
TARGET static inline void scores(const int32_t* key, const int32_t* before, int64_t depth, const int32_t* panel, words s[MR][NV]) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) s[r][v] = words{} + before[r];
    for (int64_t d = 0; d < depth; d++) {
        words b[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) b[v] = *(const words*)(panel + d * PANEL + v * V);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            const words a = words{} + key[r * depth + d];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) s[r][v] = ADD_PRODUCTS(s[r][v], b[v], a);
        }
    }
}

// Rounds the keys to integers, [padded][word].
TARGET static void round_keys(const float* k, int64_t G, int64_t D, WholeKeys& keys) {
    const int64_t depth = words_of<NUMBER>(D);
    std::vector<NUMBER> key(round_up(D, 16));
    for (int64_t i = 0; i < G; i++) {
        keys.of[i] = round_one(k + i * D, D, key.data());
        memcpy(&keys.words[i * depth], key.data(), depth * 4);
        for (int64_t d = 0; BYTES && d < D; d++) keys.before[i] -= 128 * key[d];
    }
}

// The KEPT best rows of all keys among some rows, the best first. Scores are in steps of the key: see nearest_in_integers.
TARGET static void nearest_part(const WholeKeys& keys, const float* w, int64_t D, int64_t first_row, int64_t last_row, float* best,
                                int64_t* index, float* lost) {
    const int64_t S = block_rows(D), depth = words_of<NUMBER>(D), padded = keys.of.size();
    std::vector<NUMBER> row(round_up(D, 16));
    std::vector<int32_t> panels(S * depth);
    std::vector<float> step(S), bar(padded);
    float most_lost = 0;  // the largest rounding error of the rows so far, which are all that the bars below compare
    for (int64_t start = first_row; start < last_row; start += S) {
        const int64_t count = std::min(S, last_row - start);
        pack(w + start * D, count, D, row.data(), panels.data(), step.data(), &most_lost);
        const auto raised = [&](int64_t i) {  // what a score must exceed to be kept
            const float* values = best + i * KEPT;
            return std::max(values[KEPT - 1], values[0] - keys.reach(i, most_lost, D));
        };
        for (int64_t i = 0; i < padded; i++) bar[i] = keys.of[i].norm > 0 ? raised(i) : 3.0e38f;
        for (int64_t panel = 0; panel < count; panel += PANEL) {
            reals scale[NV], beyond[NV];
            for (int v = 0; v < NV; v++) {
                scale[v] = *(const reals*)&step[panel + v * V];
                beyond[v] = scale[v] > 0 ? reals{} : reals{} - 3.0e38f;
            }
            for (int64_t i = 0; i < padded; i += MR) {
                words s[MR][NV];
                scores(&keys.words[i * depth], &keys.before[i], depth, &panels[panel * depth], s);
                reals x[MR][NV];
                int above[MR], found = 0;
#pragma GCC unroll 16
                for (int r = 0; r < MR; r++) {
                    above[r] = 0;
#pragma GCC unroll 4
                    for (int v = 0; v < NV; v++) {
                        x[r][v] = __builtin_convertvector(s[r][v], reals) * scale[v] + beyond[v];
                        above[r] |= ABOVE(x[r][v], (reals{} + bar[i + r]));
                    }
                    found |= above[r];
                }
                for (int r = 0; found && r < MR; r++) {
                    if (!above[r]) continue;
                    alignas(64) float scored[PANEL];
                    memcpy(scored, x[r], sizeof scored);
                    insert<KEPT>(scored, PANEL, start + panel, best + (i + r) * KEPT, index + (i + r) * KEPT);
                    bar[i + r] = raised(i + r);
                }
            }
        }
    }
    *lost = most_lost;
}

}  // namespace SET
}  // namespace

#undef SET
#undef TARGET
#undef V
#undef MR
#undef NUMBER
#undef ADD_PRODUCTS
#undef ABOVE
