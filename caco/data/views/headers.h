// Reads the file and the headers of a JPEG. Headers are accepted if Pillow accepts them too, by its rules of 2026 (version 13) for
// each kind of segment; any doubt counts against them, because Pillow then reads the image. Also the limits of
// caco/data/sets/reading.py on the work of decoding.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace views {
namespace {

constexpr int64_t kMaxFile = int64_t(1) << 32, kMaxPixels = 178956970, kMaxWork = 1000000000, kMaxScans = 500;
constexpr int kMaxAspect = 512;

// The content of one file at a time, in memory that is reused.
class FileContent {
 public:
  // False if the file cannot be read, is no plain file, or is too large.
  bool read(const char* path) {
    const int file = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return false;
    const bool whole = read_all(file);
    ::close(file);
    return whole;
  }
  const uint8_t* data() const { return content_.data(); }
  size_t bytes() const { return bytes_; }

 private:
  bool read_all(int file) {
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size <= 0 || status.st_size > kMaxFile) return false;
    const size_t size = status.st_size;
    try {
      if (content_.size() < size) content_.resize(size);
    } catch (const std::bad_alloc&) {
      return false;
    }
    for (bytes_ = 0; bytes_ < size;) {
      const ssize_t count = ::read(file, content_.data() + bytes_, size - bytes_);
      if (count <= 0) return false;
      bytes_ += count;
    }
    return true;
  }

  std::vector<uint8_t> content_;
  size_t bytes_ = 0;
};

struct Headers {
  int width, height;
  bool is_one_scan;  // all pixels are in one scan, after which the file ends
  int64_t num_scans;  // as reading.py counts them, those of thumbnails too
};

struct Segment {
  const uint8_t* data;
  size_t size;

  bool begins(const char* text, size_t length) const { return size >= length && std::memcmp(data, text, length) == 0; }
  uint32_t number(size_t at, int bytes, bool little) const {
    uint32_t made = 0;
    for (int i = 0; i < bytes; i++) made = made << 8 | data[at + (little ? bytes - 1 - i : i)];
    return made;
  }
};

// EXIF data whose resolution Pillow finds, or finds missing, in the usual form.
bool is_usual_exif(Segment exif) {
  const bool little = exif.begins("II", 2);
  if (exif.size < 8 || !(little || exif.begins("MM", 2)) || exif.number(2, 2, little) != 42) return false;
  const size_t first = exif.number(4, 4, little);
  if (first < 8 || first + 2 > exif.size) return false;
  const size_t count = exif.number(first, 2, little);
  if (first + 2 + 12 * count > exif.size) return false;
  for (size_t at = first + 2; at < first + 2 + 12 * count; at += 12) {
    const uint32_t tag = exif.number(at, 2, little), type = exif.number(at + 2, 2, little), length = exif.number(at + 4, 4, little);
    if (tag == 0x0128 && (type != 3 || length != 1)) return false;  // ResolutionUnit: a short
    if (tag == 0x011A && (type != 5 || length != 1 || exif.number(at + 8, 4, little) > exif.size - 8)) return false;  // XResolution
  }
  return true;
}

#define BEGINS(segment, text) segment.begins(text, sizeof text - 1)

// Application data that Pillow reads without failing. A second segment of EXIF data continues the first, so it is not accepted.
bool is_usual(int marker, Segment segment, bool& has_exif) {
  if (marker == 0xE0 && BEGINS(segment, "JFIF")) return segment.size >= 14;
  if (marker == 0xE1 && BEGINS(segment, "Exif\0\0")) {
    const bool is_first = !has_exif;
    has_exif = true;
    return is_first && is_usual_exif({segment.data + 6, segment.size - 6});
  }
  if (marker == 0xE2 && BEGINS(segment, "ICC_PROFILE\0")) return segment.size >= 14;
  if (marker == 0xE2) return !BEGINS(segment, "MPF\0");  // several images in one file
  // Pillow follows the resource blocks and fails if the last one ends within its name.
  if (marker == 0xED && BEGINS(segment, "Photoshop 3.0\0"))
    return segment.size < 20 || std::memcmp(segment.data + segment.size - 6, "8BIM", 4) != 0;
  if (marker == 0xEE && BEGINS(segment, "Adobe")) return segment.size >= 12;
  return true;
}

// Reads everything up to the first scan, and looks at the markers after it. False if anything is unusual.
bool read_headers(const uint8_t* data, size_t bytes, Headers& made) {
  if (bytes < 4 || data[0] != 0xFF || data[1] != 0xD8) return false;
  const uint8_t *at = data + 2, *const end = data + bytes;
  bool has_frame = false, has_exif = false, is_progressive = false;
  for (bool in_scan = false; !in_scan;) {
    if (end - at < 4 || at[0] != 0xFF) return false;
    const int marker = at[1], length = at[2] << 8 | at[3];
    if (length < 2 || length > end - at - 2) return false;
    const Segment segment{at + 4, size_t(length - 2)};
    at += 2 + length;
    if (marker >= 0xC0 && marker <= 0xC2) {  // frames of 8 bits, coded by Huffman's method: grey, or three colours
      if (has_frame || segment.size < 6 || segment.data[0] != 8) return false;
      const int components = segment.data[5];
      if ((components != 1 && components != 3) || segment.size != size_t(6 + 3 * components)) return false;
      made.height = segment.number(1, 2, false), made.width = segment.number(3, 2, false);
      has_frame = true, is_progressive = marker == 0xC2;
    } else if (marker >= 0xE0 && marker <= 0xEF) {
      if (!is_usual(marker, segment, has_exif)) return false;
    } else if (marker == 0xDA) {
      in_scan = true;
    } else if (marker != 0xC4 && marker != 0xDB && marker != 0xDD && marker != 0xFE) {  // tables, restarts, comments
      return false;
    }
  }
  if (!has_frame || made.width == 0 || made.height == 0) return false;
  const uint8_t* const scan = at;
  made.num_scans = 0;
  made.is_one_scan = false;
  bool only_data = !is_progressive;
  for (at = data; (at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at))); at++) {
    if (at + 1 == end) break;
    const int next = at[1];
    made.num_scans += next == 0xDA;
    if (at >= scan && next != 0 && (next & 0xF8) != 0xD0) {
      made.is_one_scan = only_data && next == 0xD9 && at + 2 == end;
      only_data = false;
    }
  }
  return true;
}

// Whether decoding would take too much time or memory, by the rules of caco/data/sets/reading.py: every scan passes over all pixels.
bool takes_too_long(const Headers& image) {
  const int64_t pixels = int64_t(image.width) * image.height;
  return pixels > kMaxPixels || std::max(image.width, image.height) > int64_t(kMaxAspect) * std::min(image.width, image.height) ||
         image.num_scans > kMaxScans || pixels * image.num_scans > kMaxWork;
}

}  // namespace
}  // namespace views
