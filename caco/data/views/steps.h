// Makes one view of one image: the crop, then the drawn steps in the order of Pillow's code. views.h says how this is compiled.

#pragma once

#include "blur.h"
#include "colour.h"
#include "resize.h"
#include "rotate.h"

namespace views {
namespace {

void write_out(const Job& job, int v, int64_t n, const uint8_t* image) {
  const size_t count = size_t(job.views[v].size) * job.views[v].size * 3, start = n * count;
  if (!job.scale) {
    std::memcpy(static_cast<uint8_t*>(job.out[v]) + start, image, count);
    return;
  }
  float* out = static_cast<float*>(job.out[v]) + start;
  const bool apart = reinterpret_cast<uintptr_t>(out) % sizeof(floats) == 0;  // these stores bypass the cache, because nobody here reads the output again
  floats scale[3], offset[3];
  for (int i = 0; i < 3 * kWide; i++) scale[i / kWide][i % kWide] = job.scale[i % 3], offset[i / kWide][i % kWide] = job.offset[i % 3];
  size_t i = 0;
  for (; i + 3 * kWide <= count; i += 3 * kWide)
    for (int k = 0; k < 3; k++) {
      const floats value = __builtin_convertvector(load_bytes(image + i + kWide * k), floats) * scale[k] + offset[k];
      apart ? write_once(out + i + kWide * k, value) : (void)std::memcpy(out + i + kWide * k, &value, sizeof value);
    }
  for (; i < count; i++) out[i] = image[i] * job.scale[i % 3] + job.offset[i % 3];
}

void make_view(const Job& job, int64_t n, int v, const uint8_t* pixels, int width, int height, Scratch& s) {
  const View& view = job.views[v];
  const int size = view.size;
  if (job.plain) {
    const Plain plain = plain_window(job.plain, size, width, height);
    resize(pixels, width, {0, 0, width, height}, plain.width, plain.height, plain.left, plain.top, size, view.bicubic,
           false, s);
    write_out(job, v, n, s.image.data());
    return;
  }
  double u[kNumUniforms];
  draw_uniforms(job.stream, job.samples[n], v, u);
    // All steps after the crop and the rotation commute with mirroring, so the flip is done there.
  const bool flip = u[kFlip] < view.flip_p, rotate = view.rotate != 0 || view.shift != 0;
  resize(pixels, width, crop_box(view, width, height, u), size, size, 0, 0, size, view.bicubic, flip && !rotate, s);
  if (rotate)
    rotate_and_shift(between(-view.rotate, view.rotate, u[kAngle]), between(-view.shift, view.shift, u[kShiftX]) * size,
                     between(-view.shift, view.shift, u[kShiftY]) * size, size, flip, s);
  Step steps[6];
  int count = 0;
  if (u[kJitter] < view.jitter_p) {
    int order[4] = {0, 1, 2, 3};
    std::stable_sort(order, order + 4, [&](int a, int b) { return u[kOrder + a] < u[kOrder + b]; });
    for (int op : order) {
      const double strength = view.jitter[op], drawn = u[kFactor + op];
      if (strength == 0) continue;
      steps[count++] = op == kHue ? Step{kHue, float(int(between(-strength, strength, drawn) * 255) & 255)}
                                  : Step{Op(op), float(between(std::max(0.0, 1 - strength), 1 + strength, drawn))};
    }
  }
  if (u[kGray] < view.gray_p) steps[count++] = {kToGray, 0};
  const bool blurred = u[kBlur] < view.blur_p;
  if (blurred) {
    colour(s.image.data(), size * size, steps, count);
    blur(float(between(view.blur[0], view.blur[1], u[kSigma])), size, s);
    count = 0;
  }
  if (u[kSolarize] < view.solarize_p) steps[count++] = {kToSolarized, 0};
  colour(s.image.data(), size * size, steps, count);
  write_out(job, v, n, s.image.data());
}

}  // namespace
}  // namespace views
