// Colour steps. They work on blocks of pixels whose three channels are separate planes of floats that hold 0..255.

#pragma once

#include "vectors.h"

namespace views {
namespace {

constexpr int kBlock = 512;  // pixels whose three planes of floats stay in the first-level cache

enum Op { kBrightness, kContrast, kSaturation, kHue, kToGray, kToSolarized };

struct Step {
  Op op;
  float value;
};

struct Block {
  alignas(64) float r[kBlock], g[kBlock], b[kBlock];
};

INLINE floats& plane(float* values, int i) { return *reinterpret_cast<floats*>(values + i); }

INLINE float truncated(float x) { return float(int32_t(x)); }
INLINE floats truncated(floats x) { return __builtin_convertvector(__builtin_convertvector(x, ints), floats); }

INLINE float luma(float r, float g, float b) {  // the sums stay below 2^24, so they are exact in floats
  return truncated((r * 19595.0f + g * 38470.0f + b * 7471.0f + 32768.0f) * 0x1p-16f);
}

INLINE float blend(float from, float to, float factor) {
  return truncated(std::min(std::max(from + factor * (to - from), 0.0f), 255.0f));
}

// Both conversions to and from HSV give Pillow's bytes for every input; tests/data/test_native.py tries all of them.

void to_hsv(Block& p, int n) {  // in place: hue, saturation, value, each 0..255
  const floats zero = {}, one = zero + 1.0f;
  for (int i = 0; i < n; i += kWide) {
    floats &r = plane(p.r, i), &g = plane(p.g, i), &b = plane(p.b, i);
    const floats rg = r > g ? r : g, most = rg > b ? rg : b, gr = r < g ? r : g, spread = most - (gr < b ? gr : b);
    const floats saturation = truncated(spread / (most > zero ? most : one) * 255.0f);
    // One of the two lesser channels is the least, and its term of Pillow's formula is exactly 1. So one division and one rounding
    // are enough to give Pillow's result.
    const ints red = r == most, green = g == most;
    const floats plus = most - (red ? b : green ? r : g), minus = most - (red ? g : green ? b : r);
    const ints least = plus == spread;
    const floats base = (red ? zero : green ? zero + 2.0f : zero + 4.0f) + (least ? one : -one);
    const floats hue = base + (least ? -minus : plus) / (spread > zero ? spread : one);
    r = spread > zero ? truncated((hue / 6.0f + (hue < zero ? one : zero)) * 255.0f) : zero;
    g = saturation;
    b = most;
  }
}

// The middle channel in Pillow's own mix of single and double precision. The precision matters where a value is close to a half.
float middle_channel(float most, float saturation, float rest, bool odd) {
  const double share = saturation / 255.0f, part = rest / 255.0f;
  return float(int(most * (1.0 - share * (odd ? part : 1.0 - part)) + 0.5));
}

void from_hsv(Block& p, int n, float turn) {  // in place; also turns the hue
  for (int i = 0; i < n; i += kWide) {
    floats &r = plane(p.r, i), &g = plane(p.g, i), &b = plane(p.b, i);
    const floats turned = r + turn, h = (turned > 255.0f ? turned - 256.0f : turned) * 6.0f, saturation = g, most = b;
    const floats sector = truncated((h + 0.5f) * (1.0f / 255.0f)), rest = h - 255.0f * sector;  // 0..6, 0..254
    const ints zeroth = (sector == 0.0f) | (sector == 6.0f), one = sector == 1.0f, two = sector == 2.0f, three = sector == 3.0f,
               four = sector == 4.0f, five = sector == 5.0f, odd = one | three | five;
    const floats exact = most + 0.5f - saturation * (odd ? rest : 255.0f - rest) * (most * (1.0f / 65025.0f));
    floats middle = truncated(exact + 1e-4f);
    const ints unsure = middle != truncated(exact - 1e-4f);
    if (__builtin_expect(any(unsure), 0))
      for (int k = 0; k < kWide; k++)
        if (unsure[k]) middle[k] = middle_channel(most[k], saturation[k], rest[k], odd[k]);
    const floats low = truncated(most * (255.0f - saturation) * (1.0f / 255.0f) + 0.5f);
    r = zeroth | five ? most : one | four ? middle : low;
    g = one | two ? most : zeroth | three ? middle : low;
    b = three | four ? most : two | five ? middle : low;
  }
}

void apply(Block& p, int n, Step step, float mean) {
  const float f = step.value;
  switch (step.op) {
    case kContrast:
      for (int i = 0; i < n; i++)
        p.r[i] = blend(mean, p.r[i], f), p.g[i] = blend(mean, p.g[i], f), p.b[i] = blend(mean, p.b[i], f);
      break;
    case kBrightness:
      for (int i = 0; i < n; i++)
        p.r[i] = blend(0, p.r[i], f), p.g[i] = blend(0, p.g[i], f), p.b[i] = blend(0, p.b[i], f);
      break;
    case kSaturation:
      for (int i = 0; i < n; i++) {
        const float gray = luma(p.r[i], p.g[i], p.b[i]);
        p.r[i] = blend(gray, p.r[i], f), p.g[i] = blend(gray, p.g[i], f), p.b[i] = blend(gray, p.b[i], f);
      }
      break;
    case kHue:
      to_hsv(p, n);
      from_hsv(p, n, f);
      break;
    case kToGray:
      for (int i = 0; i < n; i++) p.r[i] = p.g[i] = p.b[i] = luma(p.r[i], p.g[i], p.b[i]);
      break;
    default:
      for (int i = 0; i < n; i++) {
        p.r[i] = p.r[i] < 128.0f ? p.r[i] : 255.0f - p.r[i];
        p.g[i] = p.g[i] < 128.0f ? p.g[i] : 255.0f - p.g[i];
        p.b[i] = p.b[i] < 128.0f ? p.b[i] : 255.0f - p.b[i];
      }
  }
}

void load_block(const uint8_t* in, int n, Block& p) {
  for (int i = 0; i < n; i += kWide) {
    const ints v = load_pixels(in + 3 * i);
    plane(p.r, i) = __builtin_convertvector(v & 255, floats);
    plane(p.g, i) = __builtin_convertvector((v >> 8) & 255, floats);
    plane(p.b, i) = __builtin_convertvector(v >> 16, floats);
  }
}

void store_block(const Block& p, int n, uint8_t* out) {
  for (int i = 0; i < n; i += kWide) {
    const ints r = __builtin_convertvector(*reinterpret_cast<const floats*>(p.r + i), ints);
    const ints g = __builtin_convertvector(*reinterpret_cast<const floats*>(p.g + i), ints);
    const ints b = __builtin_convertvector(*reinterpret_cast<const floats*>(p.b + i), ints);
    store_pixels(out + 3 * i, r | g << 8 | b << 16);
  }
}

// Applies all steps. Each pass over the image applies the steps up to the next contrast, and computes the sum of grays that this
// contrast needs.
void colour(uint8_t* image, int n, const Step* steps, int count) {
  if (count == 0) return;
  float mean = 0;
  if (steps[0].op == kContrast) {
    Block p;
    int64_t sum = 0;
    for (int from = 0; from < n; from += kBlock) {
      const int m = std::min(kBlock, n - from);
      load_block(image + 3 * from, m, p);
      int32_t part = 0;
      for (int i = 0; i < m; i++) part += int32_t(luma(p.r[i], p.g[i], p.b[i]));
      sum += part;
    }
    mean = float(int(double(sum) / n + 0.5));
  }
  while (count > 0) {
    int now = 1;
    while (now < count && steps[now].op != kContrast) now++;
    int64_t sum = 0;
    for (int from = 0; from < n; from += kBlock) {
      const int m = std::min(kBlock, n - from);
      Block p;
      load_block(image + 3 * from, m, p);
      for (int k = 0; k < now; k++) apply(p, m, steps[k], mean);
      if (now < count) {
        int32_t part = 0;
        for (int i = 0; i < m; i++) part += int32_t(luma(p.r[i], p.g[i], p.b[i]));
        sum += part;
      }
      store_block(p, m, image + 3 * from);
    }
    mean = float(int(double(sum) / n + 0.5));
    steps += now, count -= now;
  }
}

}  // namespace
}  // namespace views
