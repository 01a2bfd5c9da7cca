// Makes all views of a batch in one call, with the same bits as caco/data/views/augmentation.py makes with Pillow.
//
// Pillow rounds to 8 bits a channel after every step, so each step can be repeated exactly: its resize uses integer weights of 22
// bits, its blends truncate floats, and its box blurs use weights of 24 bits. For speed, a view's bytes stay in the second-level
// cache from crop to output, a flip only changes where the crop's pixels are written, and colour steps run over blocks of planar
// floats that hold integers. The compiler must not contract a * b + c into one instruction: the bits must not depend on whether a
// processor has that instruction.
//
// The steps (steps.h) are compiled for any processor, for AVX2 and for AVX-512; the choice is made at each call (see views.h).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "job.h"
#include "jpeg.h"
#include "random.h"
#include "views.h"

namespace views {
namespace {

enum Set { PLAIN, AVX2, AVX512 };  // numbered as in caco/instructions.py

// The best instruction set of this processor that is no better than the one asked for; asked = -1 sets no bound.
int chosen(int asked) {
  int best = PLAIN;
#ifdef HAS_CHOICE
  if (__builtin_cpu_supports("avx2")) best = AVX2;
  if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni")) best = AVX512;
#endif
  return asked < 0 ? best : std::min(asked, best);
}

// The rows of an image that its views use.
Rows needed(const Job& job, int64_t n, int width, int height) {
  Rows rows{height, 0};
  for (int v = 0; v < job.num_views; v++) {
    const View& view = job.views[v];
    if (job.plain) {
      // A row of the resized image depends on the rows around its place, as far as one row of either image reaches, or two.
      const Plain plain = plain_window(job.plain, view.size, width, height);
      const double scale = double(height) / plain.height, margin = (view.bicubic ? 2 : 1) * std::max(scale, 1.0) + 1;
      rows.first = std::min(rows.first, std::max(0, int(plain.top * scale - margin)));
      rows.last = std::max(rows.last, std::min(height, int((plain.top + view.size) * scale + margin) + 1));
    } else {
      double u[kNumUniforms];
      draw_uniforms(job.stream, job.samples[n], v, u);
      const Box box = crop_box(view, width, height, u);
      rows.first = std::min(rows.first, box.top), rows.last = std::max(rows.last, box.top + box.height);
    }
  }
  return rows;
}

void work(const Job& job, std::atomic<int64_t>& next) {
  MakeView* make_view = make_view_plain;
#ifdef HAS_CHOICE
  if (job.set == AVX2) make_view = make_view_avx2;
  if (job.set == AVX512) make_view = make_view_avx512;
#endif
  Scratch scratch;
  std::unique_ptr<Decoder> decoder(job.turbojpeg ? new Decoder(*job.turbojpeg) : nullptr);
  for (int64_t n; (n = next++) < job.num_images;) {
    const Image& image = job.images[n];
    const uint8_t* pixels = image.data;
    int width = image.width, height = image.height;
    if (image.bytes) {
      pixels = decoder->open(image, &width, &height) ? decoder->decode(needed(job, n, width, height)) : nullptr;
      if (!pixels) {
        job.unreadable[n] = 1;
        continue;
      }
    }
    for (int v = 0; v < job.num_views; v++) make_view(job, n, v, pixels, width, height, scratch);
  }
}

}  // namespace
}  // namespace views

// The Set that is used where the caller asks for this one.
extern "C" int caco_set(int asked) { return views::chosen(asked); }

extern "C" void caco_make_views(views::Job* job) {
  job->set = views::chosen(job->set);
  std::atomic<int64_t> next(0);
  std::vector<std::thread> threads;
  for (int i = 1; i < std::min<int64_t>(job->num_threads, job->num_images); i++)
    threads.emplace_back(views::work, std::cref(*job), std::ref(next));
  views::work(*job, next);
  for (std::thread& thread : threads) thread.join();
}
