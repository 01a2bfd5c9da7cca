// The loops for each instruction set that has no tiles: plain, avx2, wide and avx512. "wide" is the tile of AVX-512 in AVX2's
// instructions, for tests.

#pragma once

#include "loops.h"  // for any processor

#if defined(__x86_64__)
#define SET avx2
#define TARGET __attribute__((target("avx2,fma")))
#define V 8
#define MR 6
#include "loops.h"

#define SET wide
#define TARGET __attribute__((target("avx2,fma")))
#define V 16
#define MR 12
#include "loops.h"

#define SET avx512
#define TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")))
#define V 16
#define MR 12
#include "loops.h"
#endif
