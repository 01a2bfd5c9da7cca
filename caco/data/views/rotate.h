// Rotation and shift of an image.

#pragma once

#include "views.h"

namespace views {
namespace {

// Rotates the image about its middle and shifts it, with bilinear interpolation; black where the image does not reach.
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

}  // namespace
}  // namespace views
