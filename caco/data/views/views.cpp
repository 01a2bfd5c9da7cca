// All views of a batch in one call: what caco/data/views/augmentation.py makes with Pillow, to the last bit.
//
// Pillow keeps 8 bits a channel after every step, so each step can be repeated exactly: integer taps of 22 bits when it
// resizes, float blends that are cut off, box blurs of 24 bits. Here a view's bytes stay in the second-level cache from crop
// to output, a flip is where the crop is written to, and colour steps run over blocks of planar floats that hold integers.
// Compiled without contraction of a * b + c: the bits must not depend on what the processor can fuse.
//
// The file includes itself: the steps are compiled for any processor, for AVX2 and for AVX-512 (as of 2019: with VBMI and
// VNNI), and chosen when called.

#ifndef STEPS

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "jpeg.h"

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

// The structs below are mirrored in caco/data/views/native.py.
struct View {  // caco.data.views.augmentation.View
  int32_t size, bicubic;
  double scale[2], ratio[2], rotate, shift, jitter[4], jitter_p, gray_p, blur[2], blur_p, solarize_p, flip_p;
};

struct Image {  // uint8 [height, width, 3], or a JPEG of `bytes`
  const uint8_t* data;
  int64_t bytes;  // 0: pixels
  int32_t height, width;
};

struct Job {
  int64_t num_images;
  const Image* images;
  const int64_t* samples;  // what each image's random numbers depend on
  uint64_t stream;         // ... besides this and the number of the view
  int32_t num_views;
  const View* views;
  void* const* out;  // a view's [num_images, size, size, 3]: float32 where `scale` is given, else uint8
  const float* scale;
  const float* offset;
  int32_t plain;  // > 0: no random view, but the middle of the image whose shorter side is resized to this
  int32_t num_threads;
  int32_t set;  // the Set that is asked for, -1 for the best; the call puts here which one served
  const TurboJpeg* turbojpeg;
  uint8_t* unreadable;  // set to 1 for each JPEG that cannot be decoded; its views are left as they were
};

constexpr int kTries = 10, kCropTop = 20, kCropLeft = 21, kJitter = 22, kGray = 23, kBlur = 24, kSigma = 25, kSolarize = 26,
              kFlip = 27, kAngle = 28, kShiftX = 29, kShiftY = 30, kOrder = 31, kFactor = 35, kNumUniforms = 39;
constexpr int kBits = 22;    // of a weight when resizing
constexpr int kBlock = 512;  // pixels whose three planes of floats stay in the first-level cache

struct Box {
  int left, top, width, height;
};

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

uint64_t mix(uint64_t z) {  // SplitMix64's
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

typedef void MakeView(const Job& job, int64_t n, int view, const uint8_t* pixels, int width, int height, Scratch& s);

}  // namespace

#define INLINE static inline __attribute__((always_inline))
#define STEPS any_processor
#include "views.cpp"
#undef STEPS
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2")
#define STEPS avx2
#define WITH_AVX2  // __AVX2__ does not follow the pragma
#include "views.cpp"
#undef WITH_AVX2
#undef MM
#undef STEPS
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#pragma GCC diagnostic ignored "-Wuninitialized"  // of its own headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define STEPS avx512
#define WITH_AVX512
#include "views.cpp"
#undef WITH_AVX512
#undef STEPS
#pragma GCC pop_options
#define HAS_CHOICE
#endif

namespace {

enum Set { PLAIN, AVX2, AVX512 };  // as caco/instructions.py numbers them

// The best instruction set of this processor that is no better than the one asked for; asked = -1 sets no bound.
int chosen(int asked) {
  int best = PLAIN;
#ifdef HAS_CHOICE
  if (__builtin_cpu_supports("avx2")) best = AVX2;
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) best = AVX512;
#endif
  return asked < 0 ? best : std::min(asked, best);
}

void work(const Job& job, std::atomic<int64_t>& next) {
  MakeView* make_view = any_processor::make_view;
#ifdef HAS_CHOICE
  if (job.set == AVX2) make_view = avx2::make_view;
  if (job.set == AVX512) make_view = avx512::make_view;
#endif
  Scratch scratch;
  std::unique_ptr<Decoder> decoder(job.turbojpeg ? new Decoder(*job.turbojpeg) : nullptr);
  for (int64_t n; (n = next++) < job.num_images;) {
    const Image& image = job.images[n];
    const uint8_t* pixels = image.data;
    if (image.bytes) {
      int first = job.plain ? 0 : image.height, last = job.plain ? image.height : 0;
      for (int v = 0; v < job.num_views && !job.plain; v++) {
        double u[kNumUniforms];
        draw_uniforms(job.stream, job.samples[n], v, u);
        const Box box = crop_box(job.views[v], image.width, image.height, u);
        first = std::min(first, box.top), last = std::max(last, box.top + box.height);
      }
      pixels = decoder->decode(image.data, image.bytes, image.width, image.height, first, last);
      if (!pixels) {
        job.unreadable[n] = 1;
        continue;
      }
    }
    for (int v = 0; v < job.num_views; v++) make_view(job, n, v, pixels, image.width, image.height, scratch);
  }
}

}  // namespace

// The Set that serves where this one is asked for.
extern "C" int caco_set(int asked) { return chosen(asked); }

extern "C" void caco_make_views(Job* job) {
  job->set = chosen(job->set);
  std::atomic<int64_t> next(0);
  std::vector<std::thread> threads;
  for (int i = 1; i < std::min<int64_t>(job->num_threads, job->num_images); i++)
    threads.emplace_back(work, std::cref(*job), std::ref(next));
  work(*job, next);
  for (std::thread& thread : threads) thread.join();
}

#else  // STEPS

namespace {
namespace STEPS {

#ifdef WITH_AVX512
constexpr int kWide = 16;
#else
constexpr int kWide = 8;
#endif

INLINE int clipped(int v) { return std::min(std::max(v, 0), 255); }

// Resizing: outputs begin..begin + size of the `out` that `in` inputs become; the filter is widened when it shrinks.

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
  taps.count = (most + 3) & ~3;  // vectors take four at a time
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

// What the processor's own instructions are needed for: `Pixels` at once, each a lane of 32 bits, red lowest.

typedef int32_t ints __attribute__((vector_size(4 * kWide)));
typedef float floats __attribute__((vector_size(4 * kWide)));

#if defined(WITH_AVX512)

typedef __m512i Bytes;
#define MM(name) _mm512_##name

INLINE Bytes broadcast(__m128i v) { return _mm512_broadcast_i32x4(v); }
INLINE void write_once(float* p, floats v) { _mm512_stream_ps(p, (__m512)v); }
INLINE bool any(ints v) { return _mm512_test_epi32_mask((__m512i)v, (__m512i)v); }

INLINE ints load_bytes(const uint8_t* p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }

INLINE ints load_pixels(const uint8_t* p) {  // touches 64 bytes
  const __m512i each = _mm512_setr_epi32(0x020100, 0x050403, 0x080706, 0x0B0A09, 0x0E0D0C, 0x11100F, 0x141312, 0x171615,
                                         0x1A1918, 0x1D1C1B, 0x201F1E, 0x232221, 0x262524, 0x292827, 0x2C2B2A, 0x2F2E2D);
  return (ints)_mm512_maskz_permutexvar_epi8(0x7777777777777777, each, _mm512_loadu_si512(p));
}

INLINE __m512i without_fourths(__m512i v) {  // of each 4 bytes
  return _mm512_permutexvar_epi8(_mm512_setr_epi32(0x04020100, 0x09080605, 0x0E0D0C0A, 0x14121110, 0x19181615, 0x1E1D1C1A,
                                                   0x24222120, 0x29282625, 0x2E2D2C2A, 0x34323130, 0x39383635, 0x3E3D3C3A,
                                                   0, 0, 0, 0), v);
}

INLINE void store_pixels(uint8_t* p, ints v) { _mm512_mask_storeu_epi8(p, (1ull << 48) - 1, without_fourths((__m512i)v)); }

INLINE void store_lanes(uint8_t* p, Bytes v) {  // the first three bytes of each 16, and four of nothing
  _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128(without_fourths(_mm512_permutexvar_epi32(_mm512_setr_epi32(
                                    0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), v))));
}

INLINE Bytes load_windows(const uint8_t* in, const int32_t* offset) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu2_m128i((const __m128i*)(in + offset[1]), (const __m128i*)(in + offset[0]))),
                            _mm256_loadu2_m128i((const __m128i*)(in + offset[3]), (const __m128i*)(in + offset[2])), 1);
}

// Three digits of 8 bits make a weight.
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

INLINE ints load_pixels(const uint8_t* p) {  // touches 28 bytes
  const __m256i halves = _mm256_loadu2_m128i((const __m128i*)(p + 12), (const __m128i*)p);
  return (ints)_mm256_shuffle_epi8(halves, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                                            0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
}

INLINE __m256i without_fourths(__m256i v) {  // of each 4 bytes, in each half
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

INLINE void store_lanes(uint8_t* p, Bytes v) {  // the first three bytes of each 16, and two of nothing
  _mm_storel_epi64((__m128i*)p, _mm256_castsi256_si128(without_fourths(_mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0)))));
}

INLINE Bytes load_windows(const uint8_t* in, const int32_t* offset) {
  return _mm256_loadu2_m128i((const __m128i*)(in + offset[1]), (const __m128i*)(in + offset[0]));
}

// Two digits of 11 bits make a weight; of four taps' words the first and third lie together, and the second and fourth.
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

// A weight's digits are summed apart, in 32 bits, and put together at the end: no bit is lost.

#ifdef MM

constexpr int kLanes = kWide / 4;  // outputs across at a time: a lane of 16 bytes each

INLINE Bytes load(const void* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The sum over `chunks` of four taps, rounded. taps(c): one of four outputs' or more; word(c, j): the weights packed above.
template <int kChunks, class AllTaps, class Word>  // kChunks: if they are known
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

// Where each output's inputs begin, and the weights, spread over its lane.
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

// The box of the image as size x size pixels in scratch.image: the window that begins at (left, top) of width x height.
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
      std::memcpy(s.row.data(), in, 3 * box.width);  // vectors touch what lies behind
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

// Turned about its middle and shifted, bilinear, black outside.
void rotate_and_shift(double degrees, double right, double down, int size, bool flip, Scratch& s) {
  const double angle = degrees * (M_PI / 180), cosine = std::cos(angle), sine = std::sin(angle), middle = size / 2.0;
  const double dx = -middle - right, dy = -middle - down;
  const double x0 = cosine * dx - sine * dy + middle, y0 = sine * dx + cosine * dy + middle;
  for (int y = 0; y < size; y++)
    for (int x = 0; x < size; x++) {
      double from_x = cosine * (x + 0.5) + -sine * (y + 0.5) + x0, from_y = sine * (x + 0.5) + cosine * (y + 0.5) + y0;
      uint8_t* const out = &s.other[(size_t(y) * size + (flip ? size - 1 - x : x)) * 3];
      std::fill_n(out, 3, 0);
      if (from_x < 0 || from_x >= size || from_y < 0 || from_y >= size) continue;
      from_x -= 0.5, from_y -= 0.5;
      const int ix = int(std::floor(from_x)), iy = int(std::floor(from_y));
      const double part_x = from_x - ix, part_y = from_y - iy;
      const int xs[2] = {std::max(ix, 0), std::min(ix + 1, size - 1)}, ys[2] = {std::max(iy, 0), std::min(iy + 1, size - 1)};
      for (int c = 0; c < 3; c++) {
        double row[2];
        for (int k = 0; k < 2; k++) {
          const int a = s.image[(size_t(ys[k]) * size + xs[0]) * 3 + c], b = s.image[(size_t(ys[k]) * size + xs[1]) * 3 + c];
          row[k] = a + (b - a) * part_x;
        }
        out[c] = uint8_t(row[0] + (row[1] - row[0]) * part_y);
      }
    }
  s.image.swap(s.other);
}

// Colour: steps over a block's planes of floats that hold 0..255.

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

INLINE float luma(float r, float g, float b) {  // sums stay below 2^24: exact
  return truncated((r * 19595.0f + g * 38470.0f + b * 7471.0f + 32768.0f) * 0x1p-16f);
}

INLINE float blend(float from, float to, float factor) {
  return truncated(std::min(std::max(from + factor * (to - from), 0.0f), 255.0f));
}

// Both ways through HSV give Pillow's bytes for every input: tests/data/test_native.py tries them all.

void to_hsv(Block& p, int n) {  // in place: hue, saturation, value, each 0..255
  const floats zero = {}, one = zero + 1.0f;
  for (int i = 0; i < n; i += kWide) {
    floats &r = plane(p.r, i), &g = plane(p.g, i), &b = plane(p.b, i);
    const floats rg = r > g ? r : g, most = rg > b ? rg : b, gr = r < g ? r : g, spread = most - (gr < b ? gr : b);
    const floats saturation = truncated(spread / (most > zero ? most : one) * 255.0f);
    // Of the two lesser channels one is the least, whose term is 1: so one division and one rounding, as in Pillow.
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

// The middle channel as Pillow computes it, in single and double precision: near one half that shows.
float middle_channel(float most, float saturation, float rest, bool odd) {
  const double share = saturation / 255.0f, part = rest / 255.0f;
  return float(int(most * (1.0 - share * (odd ? part : 1.0 - part)) + 0.5));
}

void from_hsv(Block& p, int n, float turn) {  // and the hue turned
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

// All steps up to the next contrast in one pass over the image, and with them the sum of grays that it needs.
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

// Pillow's Gaussian blur: three box blurs along each axis, the box's two outermost pixels weighted by a fraction.

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

// out[i] from in[radius + 1 + k][i], k = -radius - 1 .. radius + 1; reads and writes up to 63 bytes more
template <int kRadius>  // if it is known
void box_line(const uint8_t* const* in, uint8_t* __restrict out, int n, BoxFilter f) {
  const int radius = kRadius < 0 ? f.radius : kRadius, last = 2 * radius + 2;
#ifdef MM
  if (radius < 64) {  // sums that are still 16 bits signed; weights in two halves of 12 bits
    const Bytes high = MM(set1_epi32)((f.inner >> 12) | (f.outer >> 12) << 16), bytes = MM(set1_epi16)(255);
    const Bytes low = MM(set1_epi32)((f.inner & 4095) | (f.outer & 4095) << 16), half = MM(set1_epi32)(1 << 23);
    const auto weighted = [&](Bytes pairs) {
      return MM(srli_epi32)(add_products(MM(srli_epi32)(add_products(half, pairs, low), 12), pairs, high), 12);
    };
    for (int i = 0; i < n; i += sizeof(Bytes)) {
      Bytes inner[2] = {}, outer[2] = {}, words[2];  // of the even bytes, of the odd
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

// Row by row: what three boxes across made of it goes through three boxes down, each with as many rows as it looks at.
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
      uint8_t* line = s.rows.data() + 3 * pad;  // with room for its ends, repeated
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

void write_out(const Job& job, int v, int64_t n, const uint8_t* image) {
  const size_t count = size_t(job.views[v].size) * job.views[v].size * 3, start = n * count;
  if (!job.scale) {
    std::memcpy(static_cast<uint8_t*>(job.out[v]) + start, image, count);
    return;
  }
  float* out = static_cast<float*>(job.out[v]) + start;
  const bool apart = reinterpret_cast<uintptr_t>(out) % sizeof(floats) == 0;  // from the cache, which has no use for it
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
    const int shorter = std::min(width, height);
    const int w = int(int64_t(job.plain) * width / shorter), h = int(int64_t(job.plain) * height / shorter);
    resize(pixels, width, {0, 0, width, height}, w, h, int(std::nearbyint((w - size) / 2.0)),
           int(std::nearbyint((h - size) / 2.0)), size, false, false, s);
    write_out(job, v, n, s.image.data());
    return;
  }
  double u[kNumUniforms];
  draw_uniforms(job.stream, job.samples[n], v, u);
  // All steps after the crop and the rotation give the mirror image of a mirror image: so it is turned there.
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

}  // namespace STEPS
}  // namespace

#endif
