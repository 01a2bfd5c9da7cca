// Resizing, as in Pillow. A line of `in` inputs becomes `out` outputs, of which only begin .. begin + size - 1 are computed. The
// filter is widened when the image shrinks.

#pragma once

#include "vectors.h"

namespace views {
namespace {

constexpr int kBits = 22;  // of a weight's fraction

INLINE int clipped(int v) { return std::min(std::max(v, 0), 255); }

double triangle(double x) { return std::max(0.0, 1.0 - std::fabs(x)); }

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

void find_taps(int in, int out, int begin, int size, bool bicubic, std::vector<double>& w, Taps& taps) {
  const double scale = double(in) / out, widening = std::max(scale, 1.0), support = (bicubic ? 2.0 : 1.0) * widening;
  const double inverse = 1.0 / widening;
  taps.first.resize(size);
  taps.used.resize(size);
  int most = 0;
  for (int i = 0; i < size; i++) {
    const double centre = (begin + i + 0.5) * scale;
    taps.first[i] = std::max(0, int(centre - support + 0.5));
    taps.used[i] = std::min(in, int(centre + support + 0.5)) - taps.first[i];
    most = std::max(most, taps.used[i]);
  }
  taps.count = (most + 3) & ~3;  // the vector code takes four taps at a time
  taps.weight.assign(size_t(size) * taps.count, 0);
  w.resize(taps.count);
  for (int i = 0; i < size; i++) {
    const double centre = (begin + i + 0.5) * scale;
    double sum = 0;
    for (int k = 0; k < taps.used[i]; k++) {
      const double x = (k + taps.first[i] - centre + 0.5) * inverse;
      sum += w[k] = bicubic ? cubic(x) : triangle(x);
    }
    for (int k = 0; k < taps.used[i]; k++) {
      const double weight = w[k] / sum * (1 << kBits);
      taps.weight[size_t(i) * taps.count + k] = int32_t(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
}

// The digits of a weight are summed separately, in 32 bits, and combined at the end, so that no bit is lost.

#ifdef MM

constexpr int kLanes = kWide / 4;  // outputs computed at once along a row: a lane of 16 bytes for each

// The rounded sum over `chunks` of four taps each. taps(c): the inputs of chunk c for all outputs of the vector; word(c, j): word j
// of the packed weights of chunk c.
template <int kChunks, class AllTaps, class Word>  // kChunks: the number of chunks where it is known at compile time, else 0
INLINE Bytes weighted_sum(int chunks, AllTaps taps, Word word) {
  if (kChunks) chunks = kChunks;
  Bytes sum = MM(set1_epi32)(1 << (kBits - 1)), digits[kDigits] = {};
  for (int c = 1; c < chunks; c++)
    for (int d = 0; d < kDigits; d++) digits[d] = add_taps(digits[d], taps(c), [&](int j) { return word(c, j); }, d);
  for (int d = kDigits - 1; d >= 0; d--) {
    sum = add_taps(sum, taps(0), [&](int j) { return word(0, j); }, d);
    if (kChunks != 1) sum = MM(add_epi32)(sum, digits[d]);
    sum = MM(srai_epi32)(sum, d ? kDigitBits : kBits - kDigitBits * (kDigits - 1));
  }
  return sum;
}

// Computes where each output's inputs begin, and repeats each output's packed weights over its lane.
void spread_taps(const Taps& taps, int size, bool flip, std::vector<int32_t>& offset, std::vector<int32_t>& spread) {
  const int chunks = taps.count / 4, padded = (size + kLanes - 1) / kLanes * kLanes;
  offset.assign(padded, 0);
  spread.assign(size_t(padded) * chunks * kWords * 4, 0);
  for (int at = 0; at < size; at++) {
    const int x = flip ? size - 1 - at : at;
    offset[at] = 3 * taps.first[x];
    for (int c = 0; c < chunks; c++) {
      int32_t words[kWords];
      pack_weights(&taps.weight[size_t(x) * taps.count + 4 * c], words);
      for (int j = 0; j < kWords; j++)
        std::fill_n(&spread[((at / kLanes * chunks + c) * kWords + j) * kWide + at % kLanes * 4], 4, words[j]);
    }
  }
}

template <int kChunks>
void resize_row(const uint8_t* in, uint8_t* out, int size, int chunks, const int32_t* offset, const int32_t* spread) {
  const Bytes order = broadcast(_mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1));
  if (kChunks) chunks = kChunks;
  for (int x = 0; x < size; x += kLanes, offset += kLanes, spread += chunks * kWords * kWide, out += 3 * kLanes) {
    const auto taps = [&](int c) { return MM(shuffle_epi8)(load_windows(in + 12 * c, offset), order); };
    const auto word = [&](int c, int j) { return load(spread + (c * kWords + j) * kWide); };
    const Bytes sum = weighted_sum<kChunks>(chunks, taps, word), words = MM(packs_epi32)(sum, sum);
    store_lanes(out, MM(packus_epi16)(words, words));
  }
}

template <int kChunks>
void resize_column(const uint8_t* const* in, uint8_t* out, int size, int chunks, const int32_t* words) {
  const auto word = [&](int c, int j) { return MM(set1_epi32)(words[c * kWords + j]); };
  for (int x = 0; x < size; x += sizeof(Bytes)) {
    const auto taps = [&](int c, int quarter) {
      const uint8_t* const* rows = in + 4 * c;
      const Bytes a = load(rows[0] + x), b = load(rows[1] + x), c_ = load(rows[2] + x), d = load(rows[3] + x);
      const Bytes ab = quarter < 2 ? MM(unpacklo_epi8)(a, b) : MM(unpackhi_epi8)(a, b);
      const Bytes cd = quarter < 2 ? MM(unpacklo_epi8)(c_, d) : MM(unpackhi_epi8)(c_, d);
      return quarter % 2 ? MM(unpackhi_epi16)(ab, cd) : MM(unpacklo_epi16)(ab, cd);
    };
    const auto sum = [&](int quarter) {
      return weighted_sum<kChunks>(chunks, [&](int c) { return taps(c, quarter); }, word);
    };
    const Bytes made = MM(packus_epi16)(MM(packs_epi32)(sum(0), sum(1)), MM(packs_epi32)(sum(2), sum(3)));
    std::memcpy(out + x, &made, sizeof made);
  }
}

#endif

// Resizes the box of the image to width x height, and writes the window of size x size pixels at (left, top) of it to s.image.
void resize(const uint8_t* pixels, int image_width, Box box, int width, int height, int left, int top, int size,
                   bool bicubic, bool flip, Scratch& s) {
  const bool across = width != box.width, down = height != box.height;
  if (across) find_taps(box.width, width, left, size, bicubic, s.weights, s.x);
  if (down) find_taps(box.height, height, top, size, bicubic, s.weights, s.y);
  const int first = down ? s.y.first[0] : top, last = down ? s.y.first[size - 1] + s.y.used[size - 1] : top + size;
  const int stride = size * 3;
  s.image.resize(size_t(size) * stride + kSlack);
  s.other.resize(s.image.size());
  if (down) s.rows.resize(size_t(last - first) * stride + kSlack);
  uint8_t* const rows = down ? s.rows.data() : s.image.data();
#ifdef MM
  if (across) {
    spread_taps(s.x, size, flip, s.offset, s.spread);
    s.row.resize(3 * (box.width + s.x.count) + kSlack);
  }
#endif
  for (int y = first; y < last; y++) {
    uint8_t* const row = rows + size_t(y - first) * stride;
    const uint8_t* in = pixels + (size_t(box.top + y) * image_width + box.left) * 3;
    if (across) {
#ifdef MM
      std::memcpy(s.row.data(), in, 3 * box.width);  // a copy, because vectors read past the end of the row
      const auto resize_it = s.x.count == 4 ? resize_row<1> : s.x.count == 8 ? resize_row<2> : resize_row<0>;
      resize_it(s.row.data(), row, size, s.x.count / 4, s.offset.data(), s.spread.data());
#else
      for (int at = 0; at < size; at++) {
        const int x = flip ? size - 1 - at : at;
        for (int c = 0; c < 3; c++) {
          int32_t sum = 1 << (kBits - 1);
          for (int k = 0; k < s.x.used[x]; k++) sum += in[3 * (s.x.first[x] + k) + c] * s.x.weight[size_t(x) * s.x.count + k];
          row[3 * at + c] = clipped(sum >> kBits);
        }
      }
#endif
    } else if (flip) {
      for (int x = 0; x < size; x++) std::memcpy(row + 3 * x, in + 3 * (left + size - 1 - x), 3);
    } else {
      std::memcpy(row, in + 3 * left, stride);
    }
  }
  if (!down) return;
  for (int y = 0; y < size; y++) {
    const uint8_t* const in = rows + size_t(s.y.first[y] - first) * stride;
    uint8_t* const out = s.image.data() + size_t(y) * stride;
    const int32_t* const w = &s.y.weight[size_t(y) * s.y.count];
    const int used = s.y.used[y];
#ifdef MM
    const int chunks = (used + 3) / 4;
    s.inputs.resize(4 * chunks);
    s.words.resize(kWords * chunks);
    for (int k = 0; k < 4 * chunks; k++) s.inputs[k] = in + size_t(std::min(k, used - 1)) * stride;
    for (int c = 0; c < chunks; c++) pack_weights(w + 4 * c, &s.words[kWords * c]);
    const auto resize_it = chunks == 1 ? resize_column<1> : resize_column<0>;
    resize_it(s.inputs.data(), out, stride, chunks, s.words.data());
#else
    for (int x = 0; x < stride; x++) {
      int32_t sum = 1 << (kBits - 1);
      for (int k = 0; k < used; k++) sum += in[size_t(k) * stride + x] * w[k];
      out[x] = clipped(sum >> kBits);
    }
#endif
  }
}

}  // namespace
}  // namespace views
