// Decodes JPEGs. libturbojpeg decodes whole images. Where many rows of an image are not needed, libjpeg-turbo's own interface
// skips these rows, provided that its header was found at compile time and its library is found at run time. Both give the same
// pixels.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#if __has_include(<jpeglib.h>) && __has_include(<dlfcn.h>)
#include <csetjmp>
#include <dlfcn.h>
#include <jpeglib.h>
#endif

#include "job.h"

namespace views {
namespace {

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

  // Decodes at least rows first..last of the image into their place in `pixels`. False if this is not possible, whatever was
  // written by then; the caller then decodes the whole image, which also decides whether it is unreadable. It is false for every
  // image that is truncated, gives a warning, or has several scans.
  bool decode(const uint8_t* data, size_t bytes, int width, int height, int first, int last, uint8_t* pixels) {
    if (!usable_ || bytes < 4 || data[bytes - 2] != 0xFF || data[bytes - 1] != 0xD9) return false;
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
    first = first / block * block - block, last += block;
    if (first > 0) skip_(&info_, first);
    while (int(info_.output_scanline) < (last < height ? last : height)) {
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
  bool decode(const uint8_t*, size_t, int, int, int, int, uint8_t*) { return false; }
};

#endif

// Whether decoding would take too long, by the rule of caco/data/sets/reading.py: every scan passes over all pixels.
bool takes_too_long(const uint8_t* data, size_t bytes, int width, int height) {
  int64_t scans = 0;
  const uint8_t* const end = data + bytes;
  for (const uint8_t* at = data; (at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at))); at++)
    scans += at + 1 < end && at[1] == 0xDA;
  return scans > 500 || int64_t(width) * height * scans > 1000000000;
}

// The decoder of one thread.
class Decoder {
 public:
  explicit Decoder(const TurboJpeg& library) : library_(library), handle_(library.start()) {}
  ~Decoder() { library_.stop(handle_); }
  Decoder(const Decoder&) = delete;

  // Pixels, uint8 [height, width, 3], of which at least rows first..last are correct. Null if Pillow refuses the image too; an
  // image that libjpeg merely warns of is decoded.
  const uint8_t* decode(const uint8_t* data, size_t bytes, int width, int height, int first, int last) {
    int w, h, subsampling, colours;
    if (library_.read_header(handle_, data, bytes, &w, &h, &subsampling, &colours) != 0) return nullptr;
    if (w != width || h != height || takes_too_long(data, bytes, width, height)) return nullptr;
    try {
      pixels_.resize(size_t(width) * height * 3);
    } catch (const std::bad_alloc&) {
      return nullptr;  // an exception that leaves a thread would end the process
    }
    if (height - (last - first) >= 32 && rows_.decode(data, bytes, width, height, first, last, pixels_.data())) return pixels_.data();
    if (library_.decompress(handle_, data, bytes, pixels_.data(), w, 0, h, 0, 0) == 0) return pixels_.data();
    // libturbojpeg keeps only its last message; for a truncated file with several scans that may be about something else.
    const uint8_t *const end = data + bytes, end_marker[] = {0xFF, 0xD9};
    const bool truncated = std::strstr(library_.error(handle_), "Premature end") ||
                           std::search(data + bytes / 2, end, end_marker, end_marker + 2) == end;
    return library_.is_fatal(handle_) || truncated ? nullptr : pixels_.data();
  }

 private:
  const TurboJpeg& library_;
  void* const handle_;
  RowDecoder rows_;
  std::vector<uint8_t> pixels_;
};

}  // namespace
}  // namespace views
