// Exponentials in AVX-512, beside the tiles.
//
// Exponentials come in pairs of vectors, element beside element, as the right factor of a product wants its rows and as the
// left one may have its columns where the right one's rows are in the same order.

#pragma once

#include <cmath>
#include <cstdint>

#include "amx_packing.h"
#include "amx_tiles.h"

#if defined(HAS_AMX)
namespace {
namespace amx {

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

}  // namespace amx
}  // namespace
#endif
