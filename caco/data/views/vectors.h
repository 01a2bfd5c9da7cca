// The operations that need the processor's own instructions, on kWide pixels at once: each pixel is a lane of 32 bits with red in
// the lowest byte. The same functions are defined three times, for AVX-512, for AVX2 and for any processor. The first two sets also
// define `Bytes` and MM(name), which gives the instruction of that name in the right width.

#pragma once

#include "views.h"

#define INLINE static inline __attribute__((always_inline))

namespace views {
namespace {

#ifdef WITH_AVX512
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif

typedef int32_t ints __attribute__((vector_size(4 * kWide)));
typedef float floats __attribute__((vector_size(4 * kWide)));

#if defined(WITH_AVX512)

typedef __m512i Bytes;
#define MM(name) _mm512_##name

INLINE Bytes broadcast(__m128i v) { return _mm512_broadcast_i32x4(v); }
INLINE void write_once(float* p, floats v) { _mm512_stream_ps(p, (__m512)v); }
INLINE bool any(ints v) { return _mm512_test_epi32_mask((__m512i)v, (__m512i)v); }

INLINE ints load_bytes(const uint8_t* p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }

INLINE ints load_pixels(const uint8_t* p) {  // reads 64 bytes
  const __m512i each = _mm512_setr_epi32(0x020100, 0x050403, 0x080706, 0x0B0A09, 0x0E0D0C, 0x11100F, 0x141312, 0x171615,
                                         0x1A1918, 0x1D1C1B, 0x201F1E, 0x232221, 0x262524, 0x292827, 0x2C2B2A, 0x2F2E2D);
  return (ints)_mm512_maskz_permutexvar_epi8(0x7777777777777777, each, _mm512_loadu_si512(p));
}

INLINE __m512i without_fourths(__m512i v) {  // removes the fourth of every 4 bytes
  return _mm512_permutexvar_epi8(_mm512_setr_epi32(0x04020100, 0x09080605, 0x0E0D0C0A, 0x14121110, 0x19181615, 0x1E1D1C1A,
                                                   0x24222120, 0x29282625, 0x2E2D2C2A, 0x34323130, 0x39383635, 0x3E3D3C3A,
                                                   0, 0, 0, 0), v);
}

INLINE void store_pixels(uint8_t* p, ints v) { _mm512_mask_storeu_epi8(p, (1ull << 48) - 1, without_fourths((__m512i)v)); }

INLINE void store_lanes(uint8_t* p, Bytes v) {  // writes the first three bytes of each 16, then four bytes without meaning
  _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128(without_fourths(_mm512_permutexvar_epi32(_mm512_setr_epi32(
                                    0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), v))));
}

INLINE Bytes load_windows(const uint8_t* in, const int32_t* offset) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu2_m128i((const __m128i*)(in + offset[1]), (const __m128i*)(in + offset[0]))),
                            _mm256_loadu2_m128i((const __m128i*)(in + offset[3]), (const __m128i*)(in + offset[2])), 1);
}

// A weight is split into three digits of 8 bits.
constexpr int kDigits = 3, kWords = 3, kDigitBits = 8;

INLINE void pack_weights(const int32_t* w, int32_t* words) {
  for (int k = 0; k < 4; k++) {
    const int low = int8_t(w[k]), middle = int8_t((w[k] - low) >> 8), digits[3] = {(w[k] - low - middle * 256) >> 16, middle, low};
    for (int d = 0; d < 3; d++) reinterpret_cast<int8_t*>(words + d)[k] = digits[d];
  }
}

template <class Word>
INLINE Bytes add_taps(Bytes sum, Bytes taps, Word word, int digit) {
  return _mm512_dpbusd_epi32(sum, taps, word(digit));
}

INLINE Bytes add_products(Bytes sum, Bytes a, Bytes b) { return _mm512_dpwssd_epi32(sum, a, b); }

#elif defined(WITH_AVX2)

typedef __m256i Bytes;
#define MM(name) _mm256_##name

INLINE Bytes broadcast(__m128i v) { return _mm256_broadcastsi128_si256(v); }
INLINE void write_once(float* p, floats v) { _mm256_stream_ps(p, (__m256)v); }
INLINE bool any(ints v) { return _mm256_movemask_epi8((__m256i)v); }

INLINE ints load_bytes(const uint8_t* p) { return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

INLINE ints load_pixels(const uint8_t* p) {  // reads 28 bytes
  const __m256i halves = _mm256_loadu2_m128i((const __m128i*)(p + 12), (const __m128i*)p);
  return (ints)_mm256_shuffle_epi8(halves, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                                            0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
}

INLINE __m256i without_fourths(__m256i v) {  // removes the fourth of every 4 bytes, in each half
  return _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
                                                 0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
}

INLINE void store_pixels(uint8_t* p, ints v) {
  const __m256i packed = without_fourths((__m256i)v);
  const __m128i last = _mm256_extracti128_si256(packed, 1);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  _mm_storel_epi64((__m128i*)(p + 12), last);
  _mm_storeu_si32(p + 20, _mm_srli_si128(last, 8));
}

INLINE void store_lanes(uint8_t* p, Bytes v) {  // writes the first three bytes of each 16, then two bytes without meaning
  _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(without_fourths(_mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0)))));
}

INLINE Bytes load_windows(const uint8_t* in, const int32_t* offset) {
  return _mm256_loadu2_m128i((const __m128i*)(in + offset[1]), (const __m128i*)(in + offset[0]));
}

// A weight is split into two digits of 11 bits. Of the words for four taps, the first and the third are adjacent, and so are the
// second and the fourth.
constexpr int kDigits = 2, kWords = 4, kDigitBits = 11;

INLINE void pack_weights(const int32_t* w, int32_t* words) {
  for (int k = 0; k < 4; k++) {
    int16_t* const high = reinterpret_cast<int16_t*>(words + k % 2) + k / 2;
    high[0] = int16_t(w[k] >> 11), high[4] = w[k] & 2047;
  }
}

template <class Word>
INLINE Bytes add_taps(Bytes sum, Bytes taps, Word word, int digit) {
  const Bytes even = _mm256_and_si256(taps, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(taps, 8);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, word(2 * digit)), _mm256_madd_epi16(odd, word(2 * digit + 1))));
}

INLINE Bytes add_products(Bytes sum, Bytes a, Bytes b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

#else

INLINE void write_once(float* p, floats v) { std::memcpy(p, &v, sizeof v); }
INLINE bool any(ints v) {
  int32_t all = 0;
  for (int i = 0; i < kWide; i++) all |= v[i];
  return all;
}

INLINE ints load_bytes(const uint8_t* p) { return ints{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]}; }

INLINE ints load_pixels(const uint8_t* p) {
  ints v;
  for (int i = 0; i < kWide; i++) v[i] = p[3 * i] | p[3 * i + 1] << 8 | p[3 * i + 2] << 16;
  return v;
}

INLINE void store_pixels(uint8_t* p, ints v) {
  for (int i = 0; i < 3 * kWide; i++) p[i] = v[i / 3] >> (8 * (i % 3));
}

#endif

#ifdef MM

INLINE Bytes load(const void* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

#endif

}  // namespace
}  // namespace views
