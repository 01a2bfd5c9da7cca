// Pillow's Gaussian blur: three box blurs along each axis. The outermost pixels at both ends of a box count by a fraction.

#pragma once

#include "vectors.h"

namespace views {
namespace {

struct BoxFilter {
  int radius;
  uint32_t inner, outer;
};

BoxFilter box_filter(float sigma) {
  const float variance = sigma * sigma / 3, length = float(std::sqrt(12.0 * variance + 1.0));
  const float whole = float(std::floor((length - 1.0) / 2.0));
  float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
  part /= 6 * (variance - (whole + 1) * (whole + 1));
  const float radius = whole + part;
  const uint32_t inner = uint32_t((1 << 24) / (radius * 2 + 1));
  return {int(radius), inner, ((1 << 24) - (int(radius) * 2 + 1) * inner) / 2};
}

// Computes out[i] as the weighted sum of in[radius + 1 + k][i] for k = -radius - 1 .. radius + 1. Reads and writes up to 63 bytes
// past the end.
template <int kRadius>  // kRadius: the radius where it is known at compile time, else -1
void box_line(const uint8_t* const* in, uint8_t* __restrict out, int n, BoxFilter f) {
  const int radius = kRadius < 0 ? f.radius : kRadius, last = 2 * radius + 2;
#ifdef MM
  if (radius < 64) {  // then sums fit into 16 signed bits; each weight is split into two halves of 12 bits
    const Bytes high = MM(set1_epi32)((f.inner >> 12) | (f.outer >> 12) << 16), bytes = MM(set1_epi16)(255);
    const Bytes low = MM(set1_epi32)((f.inner & 4095) | (f.outer & 4095) << 16), half = MM(set1_epi32)(1 << 23);
    const auto weighted = [&](Bytes pairs) {
      return MM(srli_epi32)(add_products(MM(srli_epi32)(add_products(half, pairs, low), 12), pairs, high), 12);
    };
    for (int i = 0; i < n; i += sizeof(Bytes)) {
      Bytes inner[2] = {}, outer[2] = {}, words[2];  // first of the even bytes, then of the odd bytes
      const auto add = [&](Bytes* sums, int k) {
        const Bytes v = load(in[k] + i);
        sums[0] = MM(add_epi16)(sums[0], v & bytes), sums[1] = MM(add_epi16)(sums[1], MM(srli_epi16)(v, 8));
      };
      for (int k = 1; k < last; k++) add(inner, k);
      add(outer, 0), add(outer, last);
      for (int h = 0; h < 2; h++)
        words[h] = MM(packus_epi32)(weighted(MM(unpacklo_epi16)(inner[h], outer[h])), weighted(MM(unpackhi_epi16)(inner[h], outer[h])));
      const Bytes made = words[0] | MM(slli_epi16)(words[1], 8);
      std::memcpy(out + i, &made, sizeof made);
    }
    return;
  }
#endif
  for (int i = 0; i < n; i++) {
    uint32_t inner = 0;
    for (int k = 1; k < last; k++) inner += in[k][i];
    out[i] = (inner * f.inner + (in[0][i] + in[last][i]) * f.outer + (1 << 23)) >> 24;
  }
}

// Blurs row by row. Three box blurs across give a row, which then goes through three box blurs down; each of these keeps only as
// many rows as its box covers.
void blur(float sigma, int size, Scratch& s) {
  const BoxFilter f = box_filter(sigma);
  const auto box = f.radius == 0 ? box_line<0> : f.radius == 1 ? box_line<1> : box_line<-1>;
  const int pad = f.radius + 1, kept = 2 * pad + 1, stride = size * 3, room = stride + 6 * pad + kSlack;
  s.rows.resize(std::max(s.rows.size(), size_t(2 + 3 * kept) * room));
  s.inputs.resize(kept);
  const uint8_t** const in = s.inputs.data();
  const auto row_of = [&](int level, int y) { return s.rows.data() + (2 + level * kept + y % kept) * room; };
  for (int now = 0; now < size + 3 * pad; now++) {
    if (now < size) {
      uint8_t* line = s.rows.data() + 3 * pad;  // has room on both sides for the repeated edge pixels
      std::memcpy(line, &s.image[size_t(now) * stride], stride);
      for (int pass = 0; pass < 3; pass++) {
        for (int k = 1; k <= pad; k++) {
          std::memcpy(line - 3 * k, line, 3);
          std::memcpy(line + stride + 3 * (k - 1), line + stride - 3, 3);
        }
        for (int k = 0; k < kept; k++) in[k] = line + 3 * (k - pad);
        line = pass == 2 ? row_of(0, now) : s.rows.data() + (pass + 1) % 2 * room + 3 * pad;
        box(in, line, stride, f);
      }
    }
    for (int level = 1; level <= 3; level++) {
      const int y = now - level * pad;
      if (y < 0 || y >= size) continue;
      for (int k = 0; k < kept; k++) in[k] = row_of(level - 1, std::min(std::max(y + k - pad, 0), size - 1));
      box(in, level == 3 ? &s.image[size_t(y) * stride] : row_of(level, y), stride, f);
    }
  }
}

}  // namespace
}  // namespace views
