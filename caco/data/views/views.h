// Declarations that the loop over images (views.cpp) and the steps of one view (steps.h) share.
//
// The steps are compiled three times: for any processor, for AVX2 and for AVX-512 (with VBMI and VNNI, as processors have it since
// 2019). Each of the files steps_*.cpp sets its instruction set by a pragma. The standard library's headers that the steps need are
// all included here, before that pragma. If one were included after it, its functions might use instructions that other processors
// lack, and the linker might choose these copies for every processor.

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

struct Taps {  // the weights of a resize: for each output its first input, how many inputs it uses, and room for `count` weights
  int count;
  std::vector<int> first, used;
  std::vector<int32_t> weight;
};

struct Scratch {  // the working memory of one thread
  std::vector<uint8_t> row, rows, image, other;
  std::vector<const uint8_t*> inputs;
  std::vector<int32_t> offset, spread, words;
  std::vector<double> weights;
  Taps x, y;
};

constexpr int kSlack = 64;  // vector instructions may touch this many bytes past the end of an image

typedef void MakeView(const Job& job, int64_t n, int view, const uint8_t* pixels, int width, int height, Scratch& s);

extern MakeView *const make_view_plain, *const make_view_avx2, *const make_view_avx512;

}  // namespace views
