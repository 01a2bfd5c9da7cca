// Decodes the usual kinds of JPEG, to the pixels that Pillow decodes them to (caco/data/sets/reading.py). Everything else is left
// to Pillow, which decodes or refuses it: other formats, rare kinds of JPEG, whatever Pillow might fail at, and every JPEG of which
// libjpeg-turbo gives an error or a warning.
//
// libturbojpeg decodes whole images. Of a JPEG with one scan, libjpeg-turbo's own interface decodes only the rows that are needed,
// provided that its header was found at compile time and its library is found at run time.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <new>
#include <type_traits>
#include <vector>

#if __has_include(<jpeglib.h>) && __has_include(<dlfcn.h>)
#include <csetjmp>
#include <dlfcn.h>
#include <jpeglib.h>
#endif

#include "headers.h"
#include "job.h"

namespace views {
namespace {

struct Rows {  // from `first` to the one before `last`
  int first, last;
};

#ifdef LIBJPEG_TURBO_VERSION

#define NAME_OF(x) #x
#define NAME(x) NAME_OF(x)

class RowDecoder {
 public:
  RowDecoder() {
    void* const library = dlopen("libjpeg.so." NAME(JPEG_LIB_VERSION), RTLD_NOW | RTLD_LOCAL);
    const auto find = [&](auto& function, const char* name) {
      function = library ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name)) : nullptr;
      return function != nullptr;
    };
    decltype(&jpeg_std_error) std_error;
    decltype(&jpeg_CreateDecompress) create;
    usable_ = find(std_error, "jpeg_std_error") && find(create, "jpeg_CreateDecompress") && find(destroy_, "jpeg_destroy_decompress") &&
              find(abort_, "jpeg_abort_decompress") && find(source_, "jpeg_mem_src") && find(header_, "jpeg_read_header") &&
              find(start_, "jpeg_start_decompress") && find(skip_, "jpeg_skip_scanlines") && find(read_, "jpeg_read_scanlines");
    if (!usable_) return;
    info_.err = std_error(&errors_);
    errors_.error_exit = [](j_common_ptr info) { std::longjmp(*static_cast<std::jmp_buf*>(info->client_data), 1); };
    errors_.emit_message = [](j_common_ptr info, int level) { info->err->num_warnings += level < 0; };
    info_.client_data = &failed_;
    usable_ = false;
    if (setjmp(failed_)) return;  // the library has another version than the header
    create(&info_, JPEG_LIB_VERSION, sizeof info_);
    created_ = usable_ = true;
  }
  ~RowDecoder() {
    if (created_) destroy_(&info_);
  }
  RowDecoder(const RowDecoder&) = delete;

  // Decodes at least these rows of the image into their place in `pixels`. False if this is not possible, whatever was written by
  // then.
  bool decode(const uint8_t* data, size_t bytes, int width, int height, Rows rows, uint8_t* pixels) {
    if (!usable_) return false;
    errors_.num_warnings = 0;
    if (setjmp(failed_)) return abort_(&info_), false;
    source_(&info_, const_cast<uint8_t*>(data), bytes);
    header_(&info_, TRUE);
    if (int(info_.image_width) != width || int(info_.image_height) != height) return abort_(&info_), false;
    const bool plain = info_.jpeg_color_space == JCS_YCbCr || info_.jpeg_color_space == JCS_GRAYSCALE;
    if (!plain || info_.progressive_mode || info_.comps_in_scan != info_.num_components) return abort_(&info_), false;
    info_.out_color_space = JCS_RGB;
    start_(&info_);
    const int block = 8 * info_.max_v_samp_factor;  // decode one block more at both ends: libjpeg interpolates colours across a block's edge
    const int first = rows.first / block * block - block, last = std::min(height, rows.last + block);
    if (first > 0) skip_(&info_, first);
    while (int(info_.output_scanline) < last) {
      uint8_t* row = pixels + size_t(info_.output_scanline) * width * 3;
      read_(&info_, &row, 1);
    }
    abort_(&info_);
    return errors_.num_warnings == 0;
  }

 private:
  jpeg_decompress_struct info_;
  jpeg_error_mgr errors_;
  std::jmp_buf failed_;
  bool usable_ = false, created_ = false;
  decltype(&jpeg_destroy_decompress) destroy_;
  decltype(&jpeg_abort_decompress) abort_;
  decltype(&jpeg_mem_src) source_;
  decltype(&jpeg_read_header) header_;
  decltype(&jpeg_start_decompress) start_;
  decltype(&jpeg_skip_scanlines) skip_;
  decltype(&jpeg_read_scanlines) read_;
};

#else

struct RowDecoder {
  bool decode(const uint8_t*, size_t, int, int, Rows, uint8_t*) { return false; }
};

#endif

// The decoder of one thread. It has one image at a time.
class Decoder {
 public:
  explicit Decoder(const TurboJpeg& library) : library_(library), handle_(library.start()) {}
  ~Decoder() { library_.stop(handle_); }
  Decoder(const Decoder&) = delete;

  // Reads an image's bytes and headers. False if it is not decoded here. Otherwise `width` and `height`, where they are 0, become
  // those of the image.
  bool open(const Image& image, int* width, int* height) {
    try {
      if (image.bytes < 0 && !file_.read(reinterpret_cast<const char*>(image.data))) return false;
      data_ = image.bytes < 0 ? file_.data() : image.data, bytes_ = image.bytes < 0 ? file_.bytes() : size_t(image.bytes);
      if (!read_headers(data_, bytes_, headers_) || takes_too_long(headers_)) return false;
      if (!*width && !*height) *width = headers_.width, *height = headers_.height;
      if (headers_.width != *width || headers_.height != *height) return false;
      pixels_.resize(size_t(*width) * *height * 3);
    } catch (const std::bad_alloc&) {
      return false;  // an exception that leaves a thread would end the process
    }
    return true;
  }

  // Pixels of the image that was opened, uint8 [height, width, 3], of which at least these rows are correct. Null if the image is not
  // decoded here.
  const uint8_t* decode(Rows rows) {
    const int width = headers_.width, height = headers_.height;
    uint8_t* const pixels = pixels_.data();
    if (headers_.is_one_scan && rows_.decode(data_, bytes_, width, height, rows, pixels)) return pixels;
    return library_.decompress(handle_, data_, bytes_, pixels, width, 0, height, 0, 0) == 0 ? pixels : nullptr;
  }

 private:
  const TurboJpeg& library_;
  void* const handle_;
  RowDecoder rows_;
  FileContent file_;
  Headers headers_;
  const uint8_t* data_;
  size_t bytes_;
  std::vector<uint8_t> pixels_;
};

}  // namespace
}  // namespace views
