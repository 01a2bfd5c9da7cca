// A view's random numbers, the crop box that they choose, and the window of the plain view. A number depends on seed, epoch, image, view and its position alone,
// so turning one step on or off leaves all other numbers unchanged (caco/data/views/draws.py has the same positions).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "job.h"

namespace views {
namespace {

constexpr int kTries = 10, kCropTop = 20, kCropLeft = 21, kJitter = 22, kGray = 23, kBlur = 24, kSigma = 25, kSolarize = 26,
              kFlip = 27, kAngle = 28, kShiftX = 29, kShiftY = 30, kOrder = 31, kFactor = 35, kNumUniforms = 39;

struct Box {
  int left, top, width, height;
};

uint64_t mix(uint64_t z) {  // the output function of SplitMix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;

void draw_uniforms(uint64_t stream, int64_t sample, int view, double* u) {
  uint64_t state = mix(mix(stream + kStep * uint64_t(sample + 1)) + kStep * uint64_t(view + 1));
  for (int i = 0; i < kNumUniforms; i++) u[i] = double(mix(state += kStep) >> 11) * 0x1p-53;
}

double between(double low, double high, double u) { return low + (high - low) * u; }

Box crop_box(const View& view, int width, int height, const double* u) {
  const double low = std::log(view.ratio[0]), high = std::log(view.ratio[1]);
  for (int i = 0; i < kTries; i++) {
    const double area = double(width) * height * between(view.scale[0], view.scale[1], u[2 * i]);
    const double aspect = std::exp(between(low, high, u[2 * i + 1]));
    const double w = std::nearbyint(std::sqrt(area * aspect)), h = std::nearbyint(std::sqrt(area / aspect));
    if (0 < w && w <= width && 0 < h && h <= height)
      return {int(u[kCropLeft] * (width - w + 1)), int(u[kCropTop] * (height - h + 1)), int(w), int(h)};
  }
  const int w = std::min(width, std::max(1, int(std::nearbyint(height * view.ratio[1]))));
  const int h = std::min(height, std::max(1, int(std::nearbyint(width / view.ratio[0]))));
  return {(width - w) / 2, (height - h) / 2, w, h};
}

// The plain view: the image is resized to width x height, and the view's square begins at (left, top).
struct Plain {
  int width, height, left, top;
};

Plain plain_window(int shorter, int size, int image_width, int image_height) {
  const int least = std::min(image_width, image_height);
  const int width = int(int64_t(shorter) * image_width / least), height = int(int64_t(shorter) * image_height / least);
  return {width, height, int(std::nearbyint((width - size) / 2.0)), int(std::nearbyint((height - size) / 2.0))};
}

}  // namespace
}  // namespace views
