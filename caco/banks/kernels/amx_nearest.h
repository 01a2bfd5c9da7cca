// The search for the nearest rows on AMX tiles, with a proven error bound: rows are chosen from the scores of 32 rows and 32 keys while
// the tiles compute the next scores.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "amx_packing.h"
#include "amx_tiles.h"

#if defined(HAS_AMX)
namespace {
namespace amx {

constexpr int TOP = 16;  // candidates kept for each key; more than bank.h's, as scores from one bfloat16 leave several rows undecided

// The TOP best rows of 32 queries so far: values and rows [half][TOP], 16 queries to a vector. Rows whose score is more than `reach`
// [half][16] below the best may be left out.
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
            for (int half = 0; half < 2; half++)  // the peak comes second: where a score is not a number, the result is the second operand
                peak[half] = _mm512_max_ps(_mm512_load_ps(at + row * GROUP + half * 16), peak[half]);
    }
    // The number that a score must exceed to be kept.
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

// The best TOP rows of all keys, the best first: see caco_nearest. The thread takes one block of rows after the other from the counter
// `block`, which all threads share. lost: see `pack`.
template <int PARTS>
AMX_TARGET static void nearest_part(const Forward& f, int64_t R, const Packed& keys, const float* reach, int64_t padded,
                                std::atomic<int64_t>& block, float* best, int64_t* index, float* lost) {
    const int64_t D = round_up(f.D, GROUP), S = block_rows(D);
    Packed rows(S * D, PARTS);
    Buffer scratch(4 * SUMS), values(padded * TOP), numbers(padded * TOP);
    int32_t* row = (int32_t*)numbers.at;
    for (int64_t i = 0; i < padded * TOP; i++) values[i] = -3.0e38f, row[i] = -1;
    float most_lost = 0;  // a variable of this thread alone, as it is written for every row
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
            const bool none = row[at] < 0 || values[at] < -2.0f;  // padding of the bank is no row
            best[i * TOP + t] = none ? -3.0e38f : values[at];
            index[i * TOP + t] = none ? -1 : row[at];
        }
}

// The norm of a vector's error when it is rounded to bfloat16.
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

// The nearest rows, from products of numbers in PARTS bfloat16. error: a proven bound on the error of each key's cosines. With one part the
// error is k.m - k'.m' = (k - k').m + k'.(m - m'). With two parts, each number loses up to 2^-16 of itself, and the product of the second
// parts is left out: together 3 * 2^-16 and terms of higher order.
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
        reach[i] = 2 * bound(i, 1.01f / 256);  // rounding to bfloat16 changes a number by at most 2^-8 of itself
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

// The nearest rows with one part, and again with two parts for the keys that have more rows within reach than are kept.
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

}  // namespace amx
}  // namespace
#endif
