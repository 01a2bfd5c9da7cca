// The arguments of one call from caco/data/views/native.py, which mirrors these structs.

#pragma once

#include <cstdint>

namespace views {

struct TurboJpeg {  // the functions of libturbojpeg; Python passes them in, so that nothing is linked
  void* (*start)();
  int (*decompress)(void*, const uint8_t*, unsigned long, uint8_t* out, int width, int pitch, int height, int format, int flags);
  int (*stop)(void*);
};

struct View {  // caco.data.views.augmentation.View
  int32_t size, bicubic;
  double scale[2], ratio[2], rotate, shift, jitter[4], jitter_p, gray_p, blur[2], blur_p, solarize_p, flip_p;
};

struct Image {  // pixels, uint8 [height, width, 3], or a JPEG in memory or in a file
  const uint8_t* data;  // of a file: its path, which ends with a zero
  int64_t bytes;  // length of a JPEG in memory; 0 for pixels, -1 for a file
  int32_t height, width;  // 0 for a JPEG whose size is only known from its own header
};

struct Job {
  int64_t num_images;
  const Image* images;
  const int64_t* samples;  // number of each image; its random numbers depend on it,
  uint64_t stream;         // ... on this and on the number of the view
  int32_t num_views;
  const View* views;
  void* const* out;  // for each view [num_images, size, size, 3]: float32 if `scale` is given, else uint8
  const float* scale;
  const float* offset;
  int32_t plain;  // > 0: instead of random views the plain view, the middle of the image with its shorter side resized to this
  int32_t num_threads;
  int32_t set;  // the Set that the caller asks for, -1 for the best one; the call writes the Set that it used
  const TurboJpeg* turbojpeg;
  uint8_t* unreadable;  // set to 1 for each image that was not decoded here (jpeg.h); the views of that image are not written
};

}  // namespace views
