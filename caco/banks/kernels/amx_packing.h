// Packs rows and queries as factors of products on tiles: rounded to bfloat16 and in the order that the tiles need.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "amx_tiles.h"

#if defined(HAS_AMX)
namespace {
namespace amx {

INLINE __m512 raise(__m256i halves) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16)); }
INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1; }

// 32 floats rounded to bfloat16, the first part; the second part, if there is one, is the rounding error, rounded to bfloat16 too.
template <int PARTS>
INLINE void split(__m512 low, __m512 high, __m512i out[PARTS]) {
    out[0] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (PARTS == 1) return;
    low = _mm512_sub_ps(low, raise(_mm512_castsi512_si256(out[0])));
    high = _mm512_sub_ps(high, raise(_mm512_extracti64x4_epi64(out[0], 1)));
    out[PARTS - 1] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Interleaves two rows of 16 numbers, element beside element, to a right factor's row of pairs.
INLINE __m512i side_by_side(__m512i rows) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, rows);
}

// Transposes 16 vectors of 16 words.
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

// Packs the unit rows of a block as a left factor; rows beyond `count` are zero. D is the rows' width rounded up to a multiple of 32,
// `width` the width itself. Returns whether each row has a direction. lost: raised to the largest squared norm of a row's rounding error,
// if that is larger.
template <int PARTS>
AMX_TARGET static bool pack(const float* w, int64_t count, int64_t width, int64_t D, Packed& rows, float* inverse_norm, float* lost = nullptr) {
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

// Transposes a block's packed rows to a left factor of D rows, with `steps` tiles in each.
template <int PARTS>
AMX_TARGET static void transpose(const Packed& rows, int64_t count, int64_t D, int64_t steps, Packed& transposed) {
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

// Packs queries as the right factor of the scores, in which they are columns; columns beyond the last of the G queries are zero.
template <int PARTS>
AMX_TARGET static void pack_queries(const float* q, int64_t G, int64_t width, int64_t D, Packed& out) {
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

// Packs queries times their weights as the right factor of the rows' motion, in which they are rows, with `steps` tiles for every 16
// columns of D. A pair of rows is a query and the query 16 places further on, because `Share` has its columns in that order.
template <int PARTS>
AMX_TARGET static void pack_weighted(const float* q, const float* weight, int64_t N, int64_t width, int64_t D, int64_t steps, Packed& out) {
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

}  // namespace amx
}  // namespace
#endif
