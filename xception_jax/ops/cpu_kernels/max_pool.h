// Max pooling and its gradient. Channels are the innermost loop, without branches, so that compilers vectorise it.

#pragma once

#include <limits>

#include "geometry.h"

struct Pooling {
  Size window, stride, top, left;
};

// Calls f(offset in x) for each tap of a window that lies inside the image, row by row.
template <typename F>
void ForEachTap(const ImageShape& in, const Pooling& pooling, Size image, Size row, Size column, const F& f) {
  const Size y0 = row * pooling.stride - pooling.top, x0 = column * pooling.stride - pooling.left;
  for (Size i = std::max<Size>(0, -y0); i < std::min(pooling.window, in.height - y0); ++i)
    for (Size j = std::max<Size>(0, -x0); j < std::min(pooling.window, in.width - x0); ++j)
      f(((image * in.height + y0 + i) * in.width + x0 + j) * in.channels);
}

// Stores the largest value of each window; NaN if one of its values is.
inline ffi::Error MaxPool(ffi::ThreadPool pool, Input x, Output y, int64_t window, int64_t stride, int64_t top, int64_t left) {
  const ImageShape in(x.dimensions()), out(y->dimensions());
  const Pooling pooling{window, stride, top, left};
  const Parts parts(out.batch * out.height, 4);
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size row = parts.begin(part); row < parts.begin(part + 1); ++row) {
      for (Size column = 0; column < out.width; ++column) {
        float* __restrict to = y->typed_data() + (row * out.width + column) * out.channels;
        std::fill_n(to, out.channels, -std::numeric_limits<float>::infinity());
        ForEachTap(in, pooling, row / out.height, row % out.height, column, [&](Size offset) {
          const float* __restrict from = x.typed_data() + offset;
          for (Size c = 0; c < in.channels; ++c) {
            const bool larger_or_nan = (from[c] > to[c]) | (from[c] != from[c]);
            to[c] = larger_or_nan ? from[c] : to[c];
          }
        });
      }
    }
  });
  return ffi::Error::Success();
}

// Adds each value of dy to the first of the largest values in its window. Windows overlap, so that an image is one task.
inline ffi::Error MaxPoolGradient(ffi::ThreadPool pool, Input x, Input y, Input dy, Output dx, int64_t window, int64_t stride,
                                  int64_t top, int64_t left) {
  const ImageShape in(x.dimensions()), out(y.dimensions());
  const Pooling pooling{window, stride, top, left};
  ParallelFor(pool, in.batch, [&](Size image) {
    const Size size = in.height * in.width * in.channels;
    std::fill_n(dx->typed_data() + image * size, size, 0.0f);
    std::vector<float> remaining(in.channels);  // dy, until a tap has taken it
    for (Size row = 0; row < out.height; ++row) {
      for (Size column = 0; column < out.width; ++column) {
        const Size at = ((image * out.height + row) * out.width + column) * out.channels;
        const float* __restrict largest = y.typed_data() + at;
        float* __restrict rest = remaining.data();
        std::copy_n(dy.typed_data() + at, in.channels, rest);
        ForEachTap(in, pooling, image, row, column, [&](Size offset) {
          const float* __restrict from = x.typed_data() + offset;
          float* __restrict to = dx->typed_data() + offset;
          for (Size c = 0; c < in.channels; ++c) {
            const bool hit = from[c] == largest[c];
            to[c] += hit ? rest[c] : 0.0f;
            rest[c] = hit ? 0.0f : rest[c];
          }
        });
      }
    }
  });
  return ffi::Error::Success();
}
