// All views of a batch in one call: what caco/data/views.py makes with Pillow, to the last bit.
//
// Pillow keeps 8 bits a channel after every step, so each step can be repeated exactly: integer taps of 22 bits when it
// resizes, float blends that are cut off, box blurs of 24 bits. Here a view stays in the second-level cache from crop to
// output, pixels are 32-bit words (red lowest), and colour steps run over blocks of planar floats that hold integers.
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

struct Taps {  // for each of `size` outputs: its first input and `count` weights
  int count;
  std::vector<int> first;
  std::vector<int32_t> weight;
};

struct Scratch {  // one thread's memory
  std::vector<uint32_t> row, rows, image, other;
  std::vector<double> weights;
  Taps x, y;
};

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
  MakeView* const make_view = HAS_AVX2 ? avx2::make_view : any_processor::make_view;
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
  taps.count = (int(std::ceil(support)) * 2 + 2) & ~1;  // even: the horizontal pass takes two at a time
  taps.first.resize(size);
  taps.weight.assign(size_t(size) * taps.count, 0);
  w.resize(taps.count);
  int needed = 0;
  for (int i = 0; i < size; i++) {
    const double centre = (begin + i + 0.5) * scale;
    const int first = std::max(0, int(centre - support + 0.5)), last = std::min(in, int(centre + support + 0.5));
    double sum = 0;
    for (int k = 0; k < last - first; k++) {
      const double x = (k + first - centre + 0.5) * inverse;
      sum += w[k] = bicubic ? cubic(x) : triangle(x);
    }
    taps.first[i] = first;
    needed = std::max(needed, last - first);
    for (int k = 0; k < last - first; k++) {
      const double weight = w[k] / sum * (1 << kBits);
      taps.weight[size_t(i) * taps.count + k] = int32_t(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
  }
  needed = (needed + 1) & ~1;
  if (needed < taps.count) {  // drop what no output uses
    for (int i = 1; i < size; i++)
      std::copy_n(&taps.weight[size_t(i) * taps.count], needed, &taps.weight[size_t(i) * needed]);
    taps.count = needed;
  }
}

#ifdef WITH_AVX2

INLINE i32x4 load4(const void* p) { return (i32x4)_mm_cvtepu8_epi32(_mm_loadu_si32(p)); }
INLINE i32x8 load8(const void* p) { return (i32x8)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }

INLINE void store4(void* p, i32x4 v) {  // clipped to 0..255
  const __m128i words = _mm_packus_epi32((__m128i)v, (__m128i)v);
  _mm_storeu_si32(p, _mm_packus_epi16(words, words));
}

INLINE void store8(void* p, i32x8 v) {
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}

#else

INLINE i32x4 load4(const void* p) {
  const uint8_t* in = static_cast<const uint8_t*>(p);
  return i32x4{in[0], in[1], in[2], in[3]};
}

INLINE i32x8 load8(const void* p) {
  const uint8_t* in = static_cast<const uint8_t*>(p);
  return i32x8{in[0], in[1], in[2], in[3], in[4], in[5], in[6], in[7]};
}

INLINE void store4(void* p, i32x4 v) {
  for (int i = 0; i < 4; i++) static_cast<uint8_t*>(p)[i] = std::min(std::max(v[i], 0), 255);
}

INLINE void store8(void* p, i32x8 v) {
  for (int i = 0; i < 8; i++) static_cast<uint8_t*>(p)[i] = std::min(std::max(v[i], 0), 255);
}

#endif

INLINE void unpack_row(const uint8_t* in, int width, uint32_t* out) {
  int x = 0;
#ifdef WITH_AVX2
  const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
  for (; 3 * x + 16 <= 3 * width; x += 4)
    _mm_storeu_si128((__m128i*)(out + x), _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(in + 3 * x)), spread));
#endif
  for (; x < width; x++) out[x] = in[3 * x] | in[3 * x + 1] << 8 | in[3 * x + 2] << 16;
}

// The box of the image as size x size pixels in scratch.image: the window that begins at (left, top) of width x height.
INLINE void resize(const uint8_t* pixels, int image_width, Box box, int width, int height, int left, int top, int size,
                   bool bicubic, Scratch& s) {
  const bool across = width != box.width, down = height != box.height;
  if (across) find_taps(box.width, width, left, size, bicubic, s.weights, s.x);
  if (down) find_taps(box.height, height, top, size, bicubic, s.weights, s.y);
  const int first = down ? s.y.first[0] : top;
  const int last = down ? std::min(box.height, s.y.first[size - 1] + s.y.count) : top + size;
  s.row.resize(box.width + 16 + (across ? s.x.count : 0));
  s.rows.resize(size_t(size) * (last - first + (down ? s.y.count : 0)) + 16);
  s.image.resize(size_t(size) * size + 16);
  s.other.resize(s.image.size());
  uint32_t* const rows = down ? s.rows.data() : s.image.data();
  for (int y = first; y < last; y++) {
    uint32_t* const row = rows + size_t(y - first) * size;
    unpack_row(pixels + (size_t(box.top + y) * image_width + box.left) * 3, box.width, s.row.data());
    if (!across) {
      std::memcpy(row, s.row.data() + left, size_t(size) * 4);
      continue;
    }
    const int32_t* w = s.x.weight.data();
    for (int x = 0; x < size; x++) {
      const uint32_t* in = s.row.data() + s.x.first[x];
      i32x8 sum = {};
      for (int k = 0; k < s.x.count; k += 2, w += 2)
        sum += load8(in + k) * i32x8{w[0], w[0], w[0], w[0], w[1], w[1], w[1], w[1]};
      i32x4 half[2];
      std::memcpy(half, &sum, 32);
      store4(row + x, (half[0] + half[1] + (1 << (kBits - 1))) >> kBits);
    }
  }
  if (!down) return;
  std::fill(s.rows.end() - 16 - size_t(size) * s.y.count, s.rows.end(), 0);  // met by weights of zero
  for (int y = 0; y < size; y++) {
    const uint8_t* in = reinterpret_cast<const uint8_t*>(rows + size_t(s.y.first[y] - first) * size);
    uint8_t* out = reinterpret_cast<uint8_t*>(s.image.data() + size_t(y) * size);
    const int32_t* w = &s.y.weight[size_t(y) * s.y.count];
    for (int x = 0; x < size * 4; x += 16) {
      i32x8 a = i32x8{} + (1 << (kBits - 1)), b = a;
      for (int k = 0; k < s.y.count; k++) {
        a += load8(in + size_t(k) * size * 4 + x) * w[k];
        b += load8(in + size_t(k) * size * 4 + x + 8) * w[k];
      }
      store8(out + x, a >> kBits);
      store8(out + x + 8, b >> kBits);
    }
  }
}

// Turned about its middle and shifted, bilinear, black outside.
void rotate_and_shift(double degrees, double right, double down, int size, Scratch& s) {
  const double angle = degrees * (M_PI / 180), cosine = std::cos(angle), sine = std::sin(angle), middle = size / 2.0;
  const double dx = -middle - right, dy = -middle - down;
  const double x0 = cosine * dx - sine * dy + middle, y0 = sine * dx + cosine * dy + middle;
  const uint8_t* image = reinterpret_cast<const uint8_t*>(s.image.data());
  for (int y = 0; y < size; y++)
    for (int x = 0; x < size; x++) {
      double from_x = cosine * (x + 0.5) + -sine * (y + 0.5) + x0, from_y = sine * (x + 0.5) + cosine * (y + 0.5) + y0;
      uint32_t& out = s.other[size_t(y) * size + x];
      out = 0;
      if (from_x < 0 || from_x >= size || from_y < 0 || from_y >= size) continue;
      from_x -= 0.5, from_y -= 0.5;
      const int ix = int(std::floor(from_x)), iy = int(std::floor(from_y));
      const double part_x = from_x - ix, part_y = from_y - iy;
      const int xs[2] = {std::max(ix, 0), std::min(ix + 1, size - 1)}, ys[2] = {std::max(iy, 0), std::min(iy + 1, size - 1)};
      for (int c = 0; c < 3; c++) {
        double row[2];
        for (int k = 0; k < 2; k++) {
          const int a = image[(size_t(ys[k]) * size + xs[0]) * 4 + c], b = image[(size_t(ys[k]) * size + xs[1]) * 4 + c];
          row[k] = a + (b - a) * part_x;
        }
        out |= uint32_t(uint8_t(row[0] + (row[1] - row[0]) * part_y)) << (8 * c);
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

INLINE float luma(float r, float g, float b) {  // sums stay below 2^24: exact
  return float(int32_t((r * 19595.0f + g * 38470.0f + b * 7471.0f + 32768.0f) * 0x1p-16f));
}

INLINE float blend(float from, float to, float factor) {
  return float(int32_t(std::min(std::max(from + factor * (to - from), 0.0f), 255.0f)));
}

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x4 __attribute__((vector_size(32)));

INLINE f32x8 truncated(f32x8 x) { return __builtin_convertvector(__builtin_convertvector(x, i32x8), f32x8); }

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

INLINE void turn_hue(Block& p, int n, float turn) {
  const f32x8 zero = {}, one = zero + 1.0f;
  for (int i = 0; i < n; i += 8) {
    f32x8& r = *reinterpret_cast<f32x8*>(p.r + i);
    f32x8& g = *reinterpret_cast<f32x8*>(p.g + i);
    f32x8& b = *reinterpret_cast<f32x8*>(p.b + i);
    const f32x8 rg = r > g ? r : g, most = rg > b ? rg : b, gr = r < g ? r : g, spread = most - (gr < b ? gr : b);
    const f32x8 saturation = times255(spread / (most > zero ? most : one));
    // Of the two lesser channels one is the least, whose term is 1: so one division and one rounding, as in Pillow.
    const i32x8 red = r == most, green = g == most;
    const f32x8 plus = most - (red ? b : green ? r : g), minus = most - (red ? g : green ? b : r);
    const i32x8 least = plus == spread;
    const f32x8 base = (red ? zero : green ? zero + 2.0f : zero + 4.0f) + (least ? one : -one);
    f32x8 hue = base + (least ? -minus : plus) / (spread > zero ? spread : one);
    hue = hue / 6.0f + (hue < zero ? one : zero);
    f32x8 h = (spread > zero ? times255(hue) : zero) + turn;
    h = (h > 255.0f ? h - 256.0f : h) * 6.0f;
    const f32x8 sector = truncated((h + 0.5f) * (1.0f / 255.0f));  // 0..6
    const f32x8 part = (h - 255.0f * sector) / 255.0f, share = saturation / 255.0f;
    const i32x8 odd = (sector == 1.0f) | (sector == 3.0f) | (sector == 5.0f), first = (sector == 0.0f) | (sector == 6.0f);
    const f32x8 in[5] = {most, share, odd ? zero : one, odd ? one : -one, part};
    f32x4 half[5][2], out[2];
    std::memcpy(half, in, sizeof in);
    for (int k = 0; k < 2; k++) out[k] = middle_channel(half[0][k], half[1][k], half[2][k], half[3][k], half[4][k]);
    f32x8 middle;
    std::memcpy(&middle, out, sizeof out);
    const f32x8 low = truncated(most * (255.0f - saturation) * (1.0f / 255.0f) + 0.5f);
    r = (first | (sector == 5.0f)) ? most : ((sector == 1.0f) | (sector == 4.0f)) ? middle : low;
    g = ((sector == 1.0f) | (sector == 2.0f)) ? most : (first | (sector == 3.0f)) ? middle : low;
    b = ((sector == 3.0f) | (sector == 4.0f)) ? most : ((sector == 2.0f) | (sector == 5.0f)) ? middle : low;
  }
}

INLINE void apply(Block& p, int n, Step step) {
  const float f = step.value;
  switch (step.op) {
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
      turn_hue(p, n, f);
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

INLINE void colour(uint32_t* image, int n, const Step* steps, int count) {
  while (count > 0) {  // as far as the next contrast, which needs the whole image's mean
    const bool contrast = steps[0].op == kContrast;
    const float factor = steps[0].value;
    float mean = 0;
    if (contrast) {
      int64_t sum = 0;
      for (int from = 0; from < n; from += kBlock) {
        int32_t part = 0;
        for (int i = from; i < std::min(n, from + kBlock); i++)
          part += int32_t(luma(image[i] & 255, image[i] >> 8 & 255, image[i] >> 16 & 255));
        sum += part;
      }
      mean = float(int(double(sum) / n + 0.5));
      steps++, count--;
    }
    int now = 0;
    while (now < count && steps[now].op != kContrast) now++;
    Block p;
    for (int from = 0; from < n; from += kBlock) {
      const int m = std::min(kBlock, n - from);
      uint32_t* block = image + from;
      for (int i = 0; i < m; i++) {
        p.r[i] = float(int32_t(block[i] & 255)), p.g[i] = float(int32_t(block[i] >> 8 & 255));
        p.b[i] = float(int32_t(block[i] >> 16 & 255));
      }
      if (contrast)
        for (int i = 0; i < m; i++)
          p.r[i] = blend(mean, p.r[i], factor), p.g[i] = blend(mean, p.g[i], factor), p.b[i] = blend(mean, p.b[i], factor);
      for (int k = 0; k < now; k++) apply(p, m, steps[k]);
      for (int i = 0; i < m; i++) block[i] = int32_t(p.r[i]) | int32_t(p.g[i]) << 8 | int32_t(p.b[i]) << 16;
    }
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

// out[i] from in[i + k * stride], k = -radius - 1 .. radius + 1
INLINE void box_line(const uint8_t* __restrict in, uint8_t* __restrict out, int n, int stride, BoxFilter f) {
  const uint8_t *far_left = in - (f.radius + 1) * stride, *far_right = in + (f.radius + 1) * stride;
  if (f.radius == 0)
    for (int i = 0; i < n; i++)
      out[i] = (in[i] * f.inner + uint16_t(far_left[i] + far_right[i]) * f.outer + (1 << 23)) >> 24;
  else if (f.radius == 1)
    for (int i = 0; i < n; i++)
      out[i] = (uint16_t(in[i - stride] + in[i] + in[i + stride]) * f.inner +
                uint16_t(far_left[i] + far_right[i]) * f.outer + (1 << 23)) >> 24;
  else
    for (int i = 0; i < n; i++) {
      uint32_t sum = 0;
      for (int k = -f.radius; k <= f.radius; k++) sum += in[i + k * stride];
      out[i] = (sum * f.inner + (far_left[i] + far_right[i]) * f.outer + (1 << 23)) >> 24;
    }
}

constexpr int kStrip = 64;  // bytes of a column of pixels that are blurred downwards together

INLINE void blur(float sigma, int size, Scratch& s) {
  const BoxFilter f = box_filter(sigma);
  const int pad = f.radius + 1, length = size + 2 * pad;
  s.rows.resize(std::max(s.rows.size(), size_t(length) * kStrip / 2 + 16));
  uint32_t* lines[2] = {s.rows.data(), s.rows.data() + length};
  for (int y = 0; y < size; y++) {
    uint32_t* row = s.image.data() + size_t(y) * size;
    std::memcpy(lines[0] + pad, row, size_t(size) * 4);
    for (int pass = 0; pass < 3; pass++) {
      uint32_t* in = lines[pass % 2];
      std::fill_n(in, pad, in[pad]);
      std::fill_n(in + pad + size, pad, in[pad + size - 1]);
      uint32_t* out = pass == 2 ? row : lines[(pass + 1) % 2] + pad;
      box_line(reinterpret_cast<uint8_t*>(in + pad), reinterpret_cast<uint8_t*>(out), size * 4, 4, f);
    }
  }
  uint8_t* const image = reinterpret_cast<uint8_t*>(s.image.data());
  uint8_t* strips[2] = {reinterpret_cast<uint8_t*>(s.rows.data()), reinterpret_cast<uint8_t*>(s.rows.data()) + length * kStrip};
  for (int x = 0; x < size * 4; x += kStrip) {
    const int width = std::min(kStrip, size * 4 - x);
    for (int y = 0; y < size; y++) std::memcpy(strips[0] + (pad + y) * kStrip, image + size_t(y) * size * 4 + x, width);
    for (int pass = 0; pass < 3; pass++) {
      uint8_t *in = strips[pass % 2], *out = strips[(pass + 1) % 2] + pad * kStrip;
      for (int k = 0; k < pad; k++) {
        std::memcpy(in + k * kStrip, in + pad * kStrip, kStrip);
        std::memcpy(in + (pad + size + k) * kStrip, in + (pad + size - 1) * kStrip, kStrip);
      }
      box_line(in + pad * kStrip, out, size * kStrip, kStrip, f);
    }
    for (int y = 0; y < size; y++) std::memcpy(image + size_t(y) * size * 4 + x, strips[1] + (pad + y) * kStrip, width);
  }
}

INLINE void write_out(const Job& job, int v, int64_t n, bool flip, const uint32_t* image) {
  const int size = job.views[v].size;
  const size_t start = size_t(n) * size * size * 3;
  for (int y = 0; y < size; y++) {
    const uint32_t* row = image + size_t(y) * size;
    if (job.scale) {
      float* out = static_cast<float*>(job.out[v]) + start + size_t(y) * size * 3;
      const f32x4 scale = {job.scale[0], job.scale[1], job.scale[2], 0}, offset = {job.offset[0], job.offset[1], job.offset[2], 0};
      for (int x = 0; x < size; x++, out += 3) {
        const f32x4 value = __builtin_convertvector(load4(row + (flip ? size - 1 - x : x)), f32x4) * scale + offset;
        std::memcpy(out, &value, x + 1 < size || y + 1 < size ? 16 : 12);  // a fourth float is overwritten by the next pixel
      }
    } else {
      uint8_t* out = static_cast<uint8_t*>(job.out[v]) + start + size_t(y) * size * 3;
      for (int x = 0; x < size; x++, out += 3) {
        const uint32_t pixel = row[flip ? size - 1 - x : x];
        std::memcpy(out, &pixel, x + 1 < size || y + 1 < size ? 4 : 3);
      }
    }
  }
}

void make_view(const Job& job, int64_t n, int v, const uint8_t* pixels, int width, int height, Scratch& s) {
  const View& view = job.views[v];
  const int size = view.size;
  if (job.plain) {
    const int shorter = std::min(width, height);
    const int w = int(int64_t(job.plain) * width / shorter), h = int(int64_t(job.plain) * height / shorter);
    resize(pixels, width, {0, 0, width, height}, w, h, int(std::nearbyint((w - size) / 2.0)),
           int(std::nearbyint((h - size) / 2.0)), size, false, s);
    write_out(job, v, n, false, s.image.data());
    return;
  }
  double u[kNumUniforms];
  draw_uniforms(job.stream, job.samples[n], v, u);
  resize(pixels, width, crop_box(view, width, height, u), size, size, 0, 0, size, view.bicubic, s);
  if (view.rotate != 0 || view.shift != 0)
    rotate_and_shift(between(-view.rotate, view.rotate, u[kAngle]), between(-view.shift, view.shift, u[kShiftX]) * size,
                     between(-view.shift, view.shift, u[kShiftY]) * size, size, s);
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
  write_out(job, v, n, u[kFlip] < view.flip_p, s.image.data());
}

}  // namespace STEPS
}  // namespace

#endif
