// Exponentials in AVX-512, computed while the tiles multiply.
//
// Two vectors of exponentials are interleaved, element beside element. The right factor of a product on tiles needs its rows in this
// order. The left factor may have its columns in it if the right factor's rows are in the same order.

#pragma once

#include <cmath>
#include <cstdint>

#include "amx_packing.h"
#include "amx_tiles.h"

#if defined(HAS_AMX)
namespace {
namespace amx {

// 2^x for x up to 127, with a relative error of 1e-7. For x of -127 and less it is exactly 0, because p(0) is exactly 1.
INLINE __m512 power(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // in this order NaN stays NaN
    const __m512 shifted = _mm512_add_ps(x, _mm512_set1_ps(12582912.0f));  // its low bits hold the nearest integer
    const __m512 r = _mm512_sub_ps(x, _mm512_sub_ps(shifted, _mm512_set1_ps(12582912.0f)));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.326472918e-03f), r, _mm512_set1_ps(9.671513435e-03f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733746e-02f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224207e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469776e-01f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
}

// Read as an integer, a bfloat16 is its value's exponent plus 127 in units of 1/128, plus a mantissa of seven bits. So for 2^x it is
// x + 127 in 128ths, except that its last seven bits are 2^f - 1 instead of x's fraction f. This is a table of these 128 mantissas.
struct Mantissas {
    Mantissas() {
        for (int f = 0; f < 128; f++) at[f] = (uint8_t)lrint(128 * (exp2(f / 128.0) - 1));
    }
    alignas(64) uint8_t at[128];
};
const Mantissas mantissas;
constexpr float STEPS = 128.0f;                       // steps in an exponent's unit
constexpr float IN_STEPS = 1.5f * 65536.0f + 127.0f;  // added to an exponent x, it makes the float's low half x + 127 in steps
constexpr float LOWEST_EXPONENT = -383.0f;            // the lowest exponent for which that holds; all from -127 down give 0

// The offset b of `exponentials` for an exponent's constant term. PARTS 1 needs whole steps.
template <int PARTS>
float offset_of(float exponent) {
    return PARTS == 1 ? IN_STEPS + std::round(exponent * STEPS) / STEPS : exponent;
}

// 2 to the power of the remainder that offset_of left out.
template <int PARTS>
float left_out(float exponent) {
    return PARTS == 1 ? exp2f(exponent - std::round(exponent * STEPS) / STEPS) : 1.0f;
}

// Computes 2^(a x + b_x) and 2^(a y + b_y). `out` gets them as PARTS bfloat16, interleaved. Both are added to `sum` (with PARTS 1 as
// rounded in `out`, to 0.7 % of each and without bias), and `most` is raised to the larger.
template <int PARTS>
INLINE void exponentials(__m512 x, __m512 y, __m512 a, __m512 b_x, __m512 b_y, __m512i out[PARTS], __m512& sum, __m512i& most) {
    x = _mm512_fmadd_ps(x, a, b_x), y = _mm512_fmadd_ps(y, a, b_y);
    if (PARTS == 1) {
        __m512i steps = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_castps_si512(x), _mm512_bslli_epi128(_mm512_castps_si512(y), 2));
        steps = _mm512_max_epi16(steps, _mm512_setzero_si512());
        const __m512i fraction = _mm512_permutex2var_epi8(_mm512_load_si512(mantissas.at), steps, _mm512_load_si512(mantissas.at + 64));
        out[0] = _mm512_ternarylogic_epi32(steps, fraction, _mm512_set1_epi16(0x7f), 0xD8);  // mantissas into the last seven bits
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
