// The loops for each instruction set without tiles: plain, avx2, wide and avx512. "wide" is the tile size of AVX-512 in AVX2's
// instructions; only tests use it. Also the searches in integers: 16 bits on AVX2 and wide (avx2_words), and 8 and 16 bits on AVX-512 if
// the processor sums their products in one instruction (AVX512_VNNI: vnni_bytes, vnni_words). Without that instruction AVX-512 multiplies
// 16-bit integers no faster than float32.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <vector>

#include "bank.h"
#include "loops.h"  // the set "plain", for any processor

#if defined(__x86_64__)
#define SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#define V 8
#define MR 6
#define STREAM(at, x) _mm256_stream_ps(at, (__m256)x)
#include "loops.h"

#define SET avx2_words
#define TARGET __attribute__((target("avx2,fma")))
#define V 8
#define MR 6
#define NUMBER int16_t
#define ADD_PRODUCTS(sum, rows, key) sum + (words)_mm256_madd_epi16((__m256i)rows, (__m256i)key)
#define ABOVE(x, bar) _mm256_movemask_ps((__m256)(x > bar))
#include "integers.h"

#define SET wide
#define TARGET __attribute__((target("avx2,fma")))
#define V 16
#define MR 12
#define STREAM(at, x) store(at, x)
#include "loops.h"

#define SET avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")))
#define V 16
#define MR 12
#define STREAM(at, x) _mm512_stream_ps(at, (__m512)x)
#include "loops.h"

#define SET vnni_words
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,fma,prefer-vector-width=512")))
#define V 16
#define MR 12
#define NUMBER int16_t
#define ADD_PRODUCTS(sum, rows, key) (words)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)rows, (__m512i)key)
#define ABOVE(x, bar) _mm512_cmp_ps_mask((__m512)x, (__m512)bar, _CMP_GT_OQ)
#include "integers.h"

#define SET vnni_bytes
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,fma,prefer-vector-width=512")))
#define V 16
#define MR 12
#define NUMBER int8_t
#define ADD_PRODUCTS(sum, rows, key) (words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)rows, (__m512i)key)
#define ABOVE(x, bar) _mm512_cmp_ps_mask((__m512)x, (__m512)bar, _CMP_GT_OQ)
#include "integers.h"
#endif

namespace {

enum Set { PLAIN, AVX2, AVX512, AMX, WIDE };  // caco/instructions.py has the same numbers

#if defined(__x86_64__)
#define DISPATCH(set, call)                     \
    switch (set) {                              \
        case AVX512: avx512::call; break;       \
        case WIDE: wide::call; break;           \
        case AVX2: avx2::call; break;           \
        default: plain::call;                   \
    }
#else
#define DISPATCH(set, call) plain::call
#endif

// The functions of one search in integers.
struct Integers {
    int64_t (*depth)(int64_t D);
    void (*round_keys)(const float*, int64_t, int64_t, WholeKeys&);
    void (*nearest_part)(const WholeKeys&, const float*, int64_t, int64_t, int64_t, float*, int64_t*, float*);
};

// The searches in integers that an instruction set has, the fastest first.
std::vector<Integers> integers_of(int set, int64_t D) {
    std::vector<Integers> ways;
#if defined(__x86_64__)
    if (set == AVX2 || set == WIDE) ways.push_back({words_of<int16_t>, avx2_words::round_keys, avx2_words::nearest_part});
    if (set == AVX512 && __builtin_cpu_supports("avx512vnni")) {
        if (D < (1 << 16)) ways.push_back({words_of<int8_t>, vnni_bytes::round_keys, vnni_bytes::nearest_part});
        ways.push_back({words_of<int16_t>, vnni_words::round_keys, vnni_words::nearest_part});
    }
#endif
    return ways;
}

}  // namespace
