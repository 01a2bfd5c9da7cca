// What caco/data/views/native.py asks for with one call. The structs are mirrored there.

#pragma once

#include <cstdint>

namespace views {

struct TurboJpeg {  // the library's functions, handed in: nothing is linked
  void* (*start)();
  int (*read_header)(void*, const uint8_t*, unsigned long, int* width, int* height, int* subsampling, int* colours);
  int (*decompress)(void*, const uint8_t*, unsigned long, uint8_t* out, int width, int pitch, int height, int format, int flags);
  const char* (*error)(void*);
  int (*is_fatal)(void*);  // tjGetErrorCode
  int (*stop)(void*);
};

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

}  // namespace views
