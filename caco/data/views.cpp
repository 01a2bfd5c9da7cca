// All views of a batch in one call: what caco/data/views.py makes with Pillow, to the last bit.
//
// Pillow keeps 8 bits a channel after every step, so each step can be repeated exactly: integer taps of 22 bits when it
// resizes, float blends that are cut off, box blurs of 24 bits. Here a view's bytes stay in the second-level cache from crop
// to output, a flip is where the crop is written to, and colour steps run over blocks of planar floats that hold integers.
// Compiled without contraction of a * b + c: the bits must not depend on what the processor can fuse.
//
// The file includes itself: the steps are compiled for any processor and for those with AVX2, and chosen when called.

#ifndef STEPS

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));

// The structs below are mirrored in caco/data/native.py.
struct View {  // caco.data.views.View
  int32_t size, bicubic;
  double scale[2], ratio[2], rotate, shift, jitter[4], jitter_p, gray_p, blur[2], blur_p, solarize_p, flip_p;
};

struct Image {  // uint8 [height, width, 3], or a JPEG of `bytes`
  const uint8_t* data;
  int64_t bytes;  // 0: pixels
  int32_t height, width;
};

struct TurboJpeg {  // the library's functions, handed in: nothing is linked
  void* (*start)();
  int (*read_header)(void*, const uint8_t*, unsigned long, int* width, int* height, int* subsampling, int* colours);
  int (*decompress)(void*, const uint8_t*, unsigned long, uint8_t* out, int width, int pitch, int height, int format, int flags);
  const char* (*error)(void*);
  int (*is_fatal)(void*);  // tjGetErrorCode
  int (*stop)(void*);
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
  int32_t portable;  // not 0: without AVX2 although there is some, for tests
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
  std::vector<uint32_t> row;
  std::vector<uint8_t> rows, image, other;
  std::vector<int32_t> spread;
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
#undef STEPS
#pragma GCC pop_options
#define HAS_AVX2 __builtin_cpu_supports("avx2")
#else
#define HAS_AVX2 false
namespace avx2 = any_processor;
#endif

namespace {

// A JPEG as pixels; refused where Pillow refuses it, so not for a mere oddity that libjpeg warns of.
bool decode(const TurboJpeg& t, void* handle, const Image& image, std::vector<uint8_t>& pixels) {
  int width, height, subsampling, colours;
  if (t.read_header(handle, image.data, image.bytes, &width, &height, &subsampling, &colours) != 0) return false;
  if (width != image.width || height != image.height) return false;
  pixels.resize(size_t(width) * height * 3);
  if (t.decompress(handle, image.data, image.bytes, pixels.data(), width, 0, height, 0, 0) == 0) return true;
  return !t.is_fatal(handle) && !std::strstr(t.error(handle), "Premature end");
}

void work(const Job& job, std::atomic<int64_t>& next) {
  MakeView* const make_view = HAS_AVX2 && !job.portable ? avx2::make_view : any_processor::make_view;
  Scratch scratch;
  std::vector<uint8_t> decoded;
  void* const handle = job.turbojpeg ? job.turbojpeg->start() : nullptr;
  for (int64_t n; (n = next++) < job.num_images;) {
    const Image& image = job.images[n];
    const uint8_t* pixels = image.data;
    if (image.bytes) {
      if (!decode(*job.turbojpeg, handle, image, decoded)) {
        job.unreadable[n] = 1;
        continue;
      }
      pixels = decoded.data();
    }
    for (int v = 0; v < job.num_views; v++) make_view(job, n, v, pixels, image.width, image.height, scratch);
  }
  if (handle) job.turbojpeg->stop(handle);
}

}  // namespace

extern "C" void caco_make_views(const Job* job) {
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
  taps.count = (most + 1) & ~1;  // even: the horizontal pass takes two at a time
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

// What the processor's own instructions are needed for. Stores clip to 0..255.

#ifdef WITH_AVX2

INLINE i32x8 load8(const void* p) { return (i32x8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

INLINE void store8(void* p, i32x8 v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}

INLINE void store_pixel(uint8_t* p, i32x4 v) {  // and a byte of nothing
  const __m128i words = _mm_packus_epi32((__m128i)v, (__m128i)v);
  _mm_storeu_si32(p, _mm_packus_epi16(words, words));
}

INLINE i32x8 load_pixels(const uint8_t* p) {  // 8 pixels, red lowest; touches 28 bytes
  const __m256i halves = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p)),
                                                 _mm_loadu_si128((const __m128i*)(p + 12)), 1);
  return (i32x8)_mm256_shuffle_epi8(halves, _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,
                                                             0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
}

INLINE void store_pixels(uint8_t* p, i32x8 v) {
  const __m256i packed = _mm256_shuffle_epi8((__m256i)v, _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,
                                                                          0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1));
  const __m128i last = _mm256_extracti128_si256(packed, 1);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  _mm_storel_epi64((__m128i*)(p + 12), last);
  _mm_storeu_si32(p + 20, _mm_srli_si128(last, 8));
}

INLINE f32x4 lower(f32x8 v) { return (f32x4)_mm256_castps256_ps128((__m256)v); }
INLINE f32x4 upper(f32x8 v) { return (f32x4)_mm256_extractf128_ps((__m256)v, 1); }
INLINE f32x8 joined(f32x4 low, f32x4 high) { return (f32x8)_mm256_set_m128((__m128)high, (__m128)low); }
INLINE float truncated(float x) { return __builtin_truncf(x); }
INLINE f32x8 truncated(f32x8 x) { return (f32x8)_mm256_round_ps((__m256)x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }

#else

INLINE i32x8 load8(const void* p) {
  const uint8_t* in = static_cast<const uint8_t*>(p);
  return i32x8{in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7]};
}

INLINE void store8(void* p, i32x8 v) {
  for (int i = 0; i < 8; i++) static_cast<uint8_t*>(p)[i] = std::min(std::max(v[i], 0), 255);
}

INLINE void store_pixel(uint8_t* p, i32x4 v) {
  for (int i = 0; i < 3; i++) p[i] = std::min(std::max(v[i], 0), 255);
}

INLINE i32x8 load_pixels(const uint8_t* p) {
  i32x8 v;
  for (int i = 0; i < 8; i++) v[i] = p[3 * i] | p[3 * i + 1] << 8 | p[3 * i + 2] << 16;
  return v;
}

INLINE void store_pixels(uint8_t* p, i32x8 v) {
  for (int i = 0; i < 24; i++) p[i] = v[i / 3] >> (8 * (i % 3));
}

INLINE f32x4 lower(f32x8 v) { return f32x4{v[0], v[1], v[2], v[3]}; }
INLINE f32x4 upper(f32x8 v) { return f32x4{v[4], v[5], v[6], v[7]}; }
INLINE f32x8 joined(f32x4 low, f32x4 high) { return f32x8{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]}; }
INLINE float truncated(float x) { return float(int32_t(x)); }
INLINE f32x8 truncated(f32x8 x) { return __builtin_convertvector(__builtin_convertvector(x, i32x8), f32x8); }

#endif

INLINE void unpack_row(const uint8_t* in, int width, uint32_t* out) {
  int x = 0;
  for (; 3 * x + 28 <= 3 * width; x += 8) {
    const i32x8 v = load_pixels(in + 3 * x);
    std::memcpy(out + x, &v, 32);
  }
  for (; x < width; x++) out[x] = in[3 * x] | in[3 * x + 1] << 8 | in[3 * x + 2] << 16;
}

template <int kCount>  // taps, if they are known
INLINE void resize_row(const uint32_t* in, uint8_t* out, int size, bool flip, const Taps& taps, const int32_t* spread) {
  const int count = kCount ? kCount : taps.count;
  for (int at = 0; at < size; at++, out += 3) {
    const int x = flip ? size - 1 - at : at;
    const uint32_t* from = in + taps.first[x];
    const int32_t* w = spread + size_t(x) * count * 4;
    i32x8 sum = {};
    for (int k = 0; k < count; k += 2) {
      i32x8 weights;
      std::memcpy(&weights, w + 4 * k, 32);
      sum += load8(from + k) * weights;
    }
    i32x4 half[2];
    std::memcpy(half, &sum, 32);
    store_pixel(out, (half[0] + half[1] + (1 << (kBits - 1))) >> kBits);
  }
}

// The box of the image as size x size pixels in scratch.image: the window that begins at (left, top) of width x height.
INLINE void resize(const uint8_t* pixels, int image_width, Box box, int width, int height, int left, int top, int size,
                   bool bicubic, bool flip, Scratch& s) {
  const bool across = width != box.width, down = height != box.height;
  if (across) {
    find_taps(box.width, width, left, size, bicubic, s.weights, s.x);
    s.spread.resize(s.x.weight.size() * 4);
    for (size_t i = 0; i < s.x.weight.size(); i++) std::fill_n(&s.spread[4 * i], 4, s.x.weight[i]);
  }
  if (down) find_taps(box.height, height, top, size, bicubic, s.weights, s.y);
  const int first = down ? s.y.first[0] : top, last = down ? s.y.first[size - 1] + s.y.used[size - 1] : top + size;
  const size_t stride = size_t(size) * 3;
  s.row.resize(box.width + 16 + (across ? s.x.count : 0));
  s.image.resize(size * stride + kSlack);
  s.other.resize(s.image.size());
  if (down) s.rows.resize((last - first) * stride + kSlack);
  uint8_t* const rows = down ? s.rows.data() : s.image.data();
  for (int y = first; y < last; y++) {
    uint8_t* const row = rows + (y - first) * stride;
    const uint8_t* in = pixels + (size_t(box.top + y) * image_width + box.left) * 3;
    if (across) {
      unpack_row(in, box.width, s.row.data());
      switch (s.x.count) {
        case 2: resize_row<2>(s.row.data(), row, size, flip, s.x, s.spread.data()); break;
        case 4: resize_row<4>(s.row.data(), row, size, flip, s.x, s.spread.data()); break;
        case 6: resize_row<6>(s.row.data(), row, size, flip, s.x, s.spread.data()); break;
        default: resize_row<0>(s.row.data(), row, size, flip, s.x, s.spread.data());
      }
    } else if (flip) {
      for (int x = 0; x < size; x++) std::memcpy(row + 3 * x, in + 3 * (left + size - 1 - x), 3);
    } else {
      std::memcpy(row, in + 3 * left, stride);
    }
  }
  if (!down) return;
  for (int y = 0; y < size; y++) {
    const uint8_t* in = rows + (s.y.first[y] - first) * stride;
    uint8_t* out = s.image.data() + y * stride;
    const int32_t* w = &s.y.weight[size_t(y) * s.y.count];
    for (size_t x = 0; x < stride; x += 32) {
      i32x8 sum[4];
      for (i32x8& one : sum) one = i32x8{} + (1 << (kBits - 1));
      for (int k = 0; k < s.y.used[y]; k++)
        for (int i = 0; i < 4; i++) sum[i] += load8(in + k * stride + x + 8 * i) * w[k];
      for (int i = 0; i < 4; i++) store8(out + x + 8 * i, sum[i] >> kBits);
    }
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
  alignas(32) float r[kBlock], g[kBlock], b[kBlock];
};

INLINE f32x8& plane(float* values, int i) { return *reinterpret_cast<f32x8*>(values + i); }

INLINE float luma(float r, float g, float b) {  // sums stay below 2^24: exact
  return truncated((r * 19595.0f + g * 38470.0f + b * 7471.0f + 32768.0f) * 0x1p-16f);
}

INLINE float blend(float from, float to, float factor) {
  return truncated(std::min(std::max(from + factor * (to - from), 0.0f), 255.0f));
}

INLINE f32x8 times255(f32x8 x) {  // the integer part of the exact product
  const f32x8 high = x * 256.0f, product = high - x, lost = -x - (product - high), whole = truncated(product);
  return ((whole == product) & (lost < 0.0f)) ? whole - 1.0f : whole;
}

// Pillow rounds the middle channel in double precision, and near one half that shows.
INLINE f32x4 middle_channel(f32x4 most, f32x4 share, f32x4 start, f32x4 sign, f32x4 part) {
  const f64x4 slope = __builtin_convertvector(start, f64x4) + __builtin_convertvector(sign, f64x4) * __builtin_convertvector(part, f64x4);
  const f64x4 value = __builtin_convertvector(most, f64x4) * (1.0 - __builtin_convertvector(share, f64x4) * slope) + 0.5;
  return __builtin_convertvector(__builtin_convertvector(value, i32x4), f32x4);
}

INLINE void to_hsv(Block& p, int n) {  // in place: hue, saturation, value, each 0..255
  const f32x8 zero = {}, one = zero + 1.0f;
  for (int i = 0; i < n; i += 8) {
    f32x8 &r = plane(p.r, i), &g = plane(p.g, i), &b = plane(p.b, i);
    const f32x8 rg = r > g ? r : g, most = rg > b ? rg : b, gr = r < g ? r : g, spread = most - (gr < b ? gr : b);
    const f32x8 saturation = times255(spread / (most > zero ? most : one));
    // Of the two lesser channels one is the least, whose term is 1: so one division and one rounding, as in Pillow.
    const i32x8 red = r == most, green = g == most;
    const f32x8 plus = most - (red ? b : green ? r : g), minus = most - (red ? g : green ? b : r);
    const i32x8 least = plus == spread;
    const f32x8 base = (red ? zero : green ? zero + 2.0f : zero + 4.0f) + (least ? one : -one);
    const f32x8 hue = base + (least ? -minus : plus) / (spread > zero ? spread : one);
    r = spread > zero ? times255(hue / 6.0f + (hue < zero ? one : zero)) : zero;
    g = saturation;
    b = most;
  }
}

INLINE void from_hsv(Block& p, int n, float turn) {  // and the hue turned
  const f32x8 zero = {}, one = zero + 1.0f;
  for (int i = 0; i < n; i += 8) {
    f32x8 &r = plane(p.r, i), &g = plane(p.g, i), &b = plane(p.b, i);
    const f32x8 turned = r + turn, h = (turned > 255.0f ? turned - 256.0f : turned) * 6.0f, saturation = g, most = b;
    const f32x8 sector = truncated((h + 0.5f) * (1.0f / 255.0f));  // 0..6
    const f32x8 part = (h - 255.0f * sector) / 255.0f, share = saturation / 255.0f;
    const i32x8 one_ = sector == 1.0f, three = sector == 3.0f, five = sector == 5.0f, odd = one_ | three | five;
    const f32x8 start = odd ? zero : one, sign = odd ? one : -one;
    const f32x8 middle = joined(middle_channel(lower(most), lower(share), lower(start), lower(sign), lower(part)),
                                middle_channel(upper(most), upper(share), upper(start), upper(sign), upper(part)));
    const f32x8 low = truncated(most * (255.0f - saturation) * (1.0f / 255.0f) + 0.5f);
    const i32x8 zeroth = (sector == 0.0f) | (sector == 6.0f), two = sector == 2.0f, four = sector == 4.0f;
    r = zeroth | five ? most : one_ | four ? middle : low;
    g = one_ | two ? most : zeroth | three ? middle : low;
    b = three | four ? most : two | five ? middle : low;
  }
}

INLINE void apply(Block& p, int n, Step step, float mean) {
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

INLINE void load_block(const uint8_t* in, int n, Block& p) {
  for (int i = 0; i < n; i += 8) {
    const i32x8 v = load_pixels(in + 3 * i);
    plane(p.r, i) = __builtin_convertvector(v & 255, f32x8);
    plane(p.g, i) = __builtin_convertvector((v >> 8) & 255, f32x8);
    plane(p.b, i) = __builtin_convertvector(v >> 16, f32x8);
  }
}

INLINE void store_block(const Block& p, int n, uint8_t* out) {
  for (int i = 0; i < n; i += 8) {
    const i32x8 r = __builtin_convertvector(*reinterpret_cast<const f32x8*>(p.r + i), i32x8);
    const i32x8 g = __builtin_convertvector(*reinterpret_cast<const f32x8*>(p.g + i), i32x8);
    const i32x8 b = __builtin_convertvector(*reinterpret_cast<const f32x8*>(p.b + i), i32x8);
    store_pixels(out + 3 * i, r | g << 8 | b << 16);
  }
}

// All steps up to the next contrast in one pass over the image, and with them the sum of grays that it needs.
INLINE void colour(uint8_t* image, int n, const Step* steps, int count) {
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

// out[i] from in[i + k * stride], k = -radius - 1 .. radius + 1; writes up to 31 bytes more
template <int kRadius>  // if it is known
INLINE void box_line(const uint8_t* in, uint8_t* __restrict out, int n, int stride, BoxFilter f) {
  const int radius = kRadius < 0 ? f.radius : kRadius, far = (radius + 1) * stride;
#ifdef WITH_AVX2
  if (radius < 64) {  // sums that are still 16 bits signed; weights in two halves of 12 bits
    const __m256i high = _mm256_set1_epi32((f.inner >> 12) | (f.outer >> 12) << 16);
    const __m256i low = _mm256_set1_epi32((f.inner & 4095) | (f.outer & 4095) << 16), half = _mm256_set1_epi32(1 << 23);
    const auto load16 = [](const uint8_t* p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)); };
    const auto weighted = [&](__m256i pairs) {
      const __m256i rest = _mm256_srli_epi32(_mm256_add_epi32(_mm256_madd_epi16(pairs, low), half), 12);
      return _mm256_srli_epi32(_mm256_add_epi32(_mm256_madd_epi16(pairs, high), rest), 12);
    };
    for (int i = 0; i < n; i += 32) {
      __m256i words[2];
      for (int h = 0; h < 2; h++) {
        const uint8_t* p = in + i + 16 * h;
        __m256i inner = load16(p);
        for (int k = 1; k <= radius; k++)
          inner = _mm256_add_epi16(inner, _mm256_add_epi16(load16(p - k * stride), load16(p + k * stride)));
        const __m256i outer = _mm256_add_epi16(load16(p - far), load16(p + far));
        words[h] = _mm256_packus_epi32(weighted(_mm256_unpacklo_epi16(inner, outer)), weighted(_mm256_unpackhi_epi16(inner, outer)));
      }
      _mm256_storeu_si256((__m256i*)(out + i), _mm256_permute4x64_epi64(_mm256_packus_epi16(words[0], words[1]), 0xD8));
    }
    return;
  }
#endif
  for (int i = 0; i < n; i++) {
    uint32_t inner = 0;
    for (int k = -radius; k <= radius; k++) inner += in[i + k * stride];
    out[i] = (inner * f.inner + (in[i - far] + in[i + far]) * f.outer + (1 << 23)) >> 24;
  }
}

// Three passes over lines[0], whose n bytes begin after `pad` strides; the result is in lines[1].
INLINE void box_thrice(uint8_t* lines[2], int pad, int n, int stride, BoxFilter f) {
  for (int pass = 0; pass < 3; pass++) {
    uint8_t *in = lines[pass % 2] + pad * stride, *out = lines[(pass + 1) % 2] + pad * stride;
    for (int k = 1; k <= pad; k++) {  // the first and the last are repeated
      std::memcpy(in - k * stride, in, stride);
      std::memcpy(in + n + (k - 1) * stride, in + n - stride, stride);
    }
    switch (f.radius) {
      case 0: box_line<0>(in, out, n, stride, f); break;
      case 1: box_line<1>(in, out, n, stride, f); break;
      default: box_line<-1>(in, out, n, stride, f);
    }
  }
}

constexpr int kStrip = 64;  // bytes of a column of pixels that are blurred downwards together

INLINE void blur(float sigma, int size, Scratch& s) {
  const BoxFilter f = box_filter(sigma);
  const int pad = f.radius + 1, stride = size * 3, length = (size + 2 * pad) * kStrip + kSlack;
  s.rows.resize(std::max(s.rows.size(), size_t(2) * length));
  uint8_t* lines[2] = {s.rows.data(), s.rows.data() + length};
  for (int y = 0; y < size; y++) {
    uint8_t* row = s.image.data() + size_t(y) * stride;
    std::memcpy(lines[0] + 3 * pad, row, stride);
    box_thrice(lines, pad, stride, 3, f);
    std::memcpy(row, lines[1] + 3 * pad, stride);
  }
  for (int x = 0; x < stride; x += kStrip) {
    uint8_t* column = s.image.data() + x;
    const int width = std::min(kStrip, stride - x);
    for (int y = 0; y < size; y++) std::memcpy(lines[0] + (pad + y) * kStrip, column + size_t(y) * stride, width);
    box_thrice(lines, pad, size * kStrip, kStrip, f);
    for (int y = 0; y < size; y++) std::memcpy(column + size_t(y) * stride, lines[1] + (pad + y) * kStrip, width);
  }
}

INLINE void write_out(const Job& job, int v, int64_t n, const uint8_t* image) {
  const size_t count = size_t(job.views[v].size) * job.views[v].size * 3, start = n * count;
  if (!job.scale) {
    std::memcpy(static_cast<uint8_t*>(job.out[v]) + start, image, count);
    return;
  }
  float* out = static_cast<float*>(job.out[v]) + start;
  f32x8 scale[3], offset[3];
  for (int i = 0; i < 24; i++) scale[i / 8][i % 8] = job.scale[i % 3], offset[i / 8][i % 8] = job.offset[i % 3];
  size_t i = 0;
  for (; i + 24 <= count; i += 24)
    for (int k = 0; k < 3; k++) {
      const f32x8 value = __builtin_convertvector(load8(image + i + 8 * k), f32x8) * scale[k] + offset[k];
      std::memcpy(out + i + 8 * k, &value, 32);
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
