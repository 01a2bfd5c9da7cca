// What the loop over images (views.cpp) and the steps of one view (steps.h) share.
//
// The steps are compiled three times: for any processor, for AVX2 and for AVX-512 (as of 2019: with VBMI and VNNI). Each of the files
// steps_*.cpp does so with a pragma of its own, and all that the steps need of the standard library is included here, before it:
// what is included after the pragma may run on one kind of processor only, and the linker may choose it for every other.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "job.h"
#include "random.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_CHOICE
#endif

namespace views {

struct Taps {  // for each of `size` outputs: its first input, how many it has, and `count` weights
  int count;
  std::vector<int> first, used;
  std::vector<int32_t> weight;
};

struct Scratch {  // one thread's memory
  std::vector<uint8_t> row, rows, image, other;
  std::vector<const uint8_t*> inputs;
  std::vector<int32_t> offset, spread, words;
  std::vector<double> weights;
  Taps x, y;
};

constexpr int kSlack = 64;  // bytes past the end of an image that vectors may touch

typedef void MakeView(const Job& job, int64_t n, int view, const uint8_t* pixels, int width, int height, Scratch& s);

extern MakeView *const make_view_plain, *const make_view_avx2, *const make_view_avx512;

}  // namespace views
