// Depthwise convolution of stride 1 with a square kernel, and its filter gradient.

#pragma once

#include "common.h"

// ReLU of what a kernel reads, if the network has one there.
template <bool kRelu, typename T>
T Read(const float* from) {
  T value = Load<T>(from);
  if constexpr (kRelu) value = value < 0.0f ? T() : value;
  return value;
}

// y at Q neighbouring columns; at(i, column) is where row i and one of the Q + K - 1 columns that they read begins.
template <int K, int Q, bool kRelu, typename T, typename At>
inline __attribute__((always_inline)) void ConvolveColumns(const At& at, const float* kernel, Size channels, Size c,
                                                           float* y) {
  T sum[Q] = {};
  UNROLL for (int i = 0; i < K; ++i) {
    T weights[K];
    UNROLL for (int j = 0; j < K; ++j) weights[j] = Load<T>(kernel + (i * K + j) * channels + c);
    UNROLL for (int column = 0; column < Q + K - 1; ++column) {
      const T value = Read<kRelu, T>(at(i, column) + c);
      UNROLL for (int j = 0; j < K; ++j)
        if (0 <= column - j && column - j < Q) sum[column - j] += value * weights[j];
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) Store(y + q * channels + c, sum[q]);
}

// y at the columns from `begin` to `end` of one row of an image; `zeros` has a row of the image.
template <int K, bool kRelu>
void ConvolveRow(const Images& in, const float* x, const float* kernel, Size image, Size row, Size begin, Size end, Size top,
                 Size left, const float* zeros, float* y) {
  constexpr int Q = 4;
  const Size channels = in.channels;
  const float* rows[K];
  for (int i = 0; i < K; ++i) {
    const Size from = row - top + i;
    rows[i] = 0 <= from && from < in.height ? x + (image * in.height + from) * in.width * channels : zeros;
  }
  for (Size column = begin, step; column < end; column += step, y += step * channels) {
    const Size first = column - left;
    if (first >= 0 && first + Q + K - 1 <= in.width && column + Q <= end) {
      step = Q;
      const float* window[K];
      for (int i = 0; i < K; ++i) window[i] = rows[i] + first * channels;
      const auto at = [&](int i, int j) { return window[i] + j * channels; };
      ForEachLane(channels, [&](auto lanes, Size c) {
        ConvolveColumns<K, Q, kRelu, decltype(lanes)>(at, kernel, channels, c, y);
      });
    } else {
      step = 1;
      const float* window[K][K];
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j)
          window[i][j] = 0 <= first + j && first + j < in.width ? rows[i] + (first + j) * channels : zeros;
      const auto at = [&](int i, int j) { return window[i][j]; };
      ForEachLane(channels, [&](auto lanes, Size c) {
        ConvolveColumns<K, 1, kRelu, decltype(lanes)>(at, kernel, channels, c, y);
      });
    }
  }
}

template <int K>
void Convolve(ffi::ThreadPool& pool, Input x, Input kernel, Output y, Size top, Size left) {
  const Images in(x.dimensions()), out(y->dimensions());
  const std::vector<float> zeros(in.width * in.channels);
  const Parts parts(out.batch * out.height, 4);
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line)
      ConvolveRow<K, false>(in, x.typed_data(), kernel.typed_data(), line / out.height, line % out.height, 0, out.width, top,
                            left, zeros.data(), y->typed_data() + line * out.width * in.channels);
  });
}

// Adds to each of K taps of one row of the kernel what Q neighbouring columns of dy contribute.
template <int K, int Q, typename T>
void CorrelateColumns(const float* x, const float* dy, Size channels, Size c, float* taps) {
  T sum[K], gradient[Q];
  UNROLL for (int j = 0; j < K; ++j) sum[j] = Load<T>(taps + j * channels + c);
  UNROLL for (int q = 0; q < Q; ++q) gradient[q] = Load<T>(dy + q * channels + c);
  UNROLL for (int column = 0; column < Q + K - 1; ++column) {
    const T value = Load<T>(x + column * channels + c);
    UNROLL for (int j = 0; j < K; ++j)
      if (0 <= column - j && column - j < Q) sum[j] += value * gradient[column - j];
  }
  UNROLL for (int j = 0; j < K; ++j) Store(taps + j * channels + c, sum[j]);
}

template <int K>
void Correlate(ffi::ThreadPool& pool, Input x, Input dy, Output kernel, Size top, Size left) {
  constexpr int Q = 8;
  const Images in(x.dimensions()), out(dy.dimensions());
  const Size channels = in.channels, size = K * K * channels;
  const Parts parts(out.batch * out.height, 8);
  std::vector<float> sums(parts.count * size);
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line) {
      const Size image = line / out.height, row = line % out.height - top;
      for (Size column = 0, step; column < out.width; column += step) {
        const Size first = column - left;
        const bool whole = first >= 0 && first + Q + K - 1 <= in.width && column + Q <= out.width;
        step = whole ? Q : 1;
        const float* gradient = dy.typed_data() + (line * out.width + column) * channels;
        for (Size i = std::max<Size>(0, -row); i < std::min<Size>(K, in.height - row); ++i) {
          const float* from = x.typed_data() + ((image * in.height + row + i) * in.width + first) * channels;
          float* taps = sums.data() + part * size + i * K * channels;
          if (whole) {
            ForEachLane(channels, [&](auto lanes, Size c) {
              CorrelateColumns<K, Q, decltype(lanes)>(from, gradient, channels, c, taps);
            });
            continue;
          }
          for (Size j = std::max<Size>(0, -first); j < std::min<Size>(K, in.width - first); ++j)
            for (Size c = 0; c < channels; ++c) taps[j * channels + c] += from[j * channels + c] * gradient[c];
        }
      }
    }
  });
  AddParts(pool, sums, size, kernel->typed_data());
}

// Calls f with the side of the kernel as a constant.
template <typename F>
ffi::Error WithKernelSize(Size side, const F& f) {
  switch (side) {
    case 3: f(std::integral_constant<int, 3>()); break;
    case 5: f(std::integral_constant<int, 5>()); break;
    case 7: f(std::integral_constant<int, 7>()); break;
    default: return ffi::Error::InvalidArgument("a kernel of 3, 5 or 7 rows is needed");
  }
  return ffi::Error::Success();
}

inline ffi::Error Depthwise(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t top, int64_t left) {
  return WithKernelSize(kernel.dimensions()[0], [&](auto k) { Convolve<k>(pool, x, kernel, y, top, left); });
}

inline ffi::Error DepthwiseFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t top, int64_t left) {
  return WithKernelSize(kernel->dimensions()[0], [&](auto k) { Correlate<k>(pool, x, dy, kernel, top, left); });
}
