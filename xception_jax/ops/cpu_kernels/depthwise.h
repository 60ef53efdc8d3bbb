// Convolution of stride 1 with a square kernel and as many filters as channels in each segment: a depthwise one, or one with
// segments of a few channels. Lanes are output channels, so that none is left idle however small a segment is. And the
// filter gradient.

#pragma once

#include "common.h"

// Reads, for the output channels from c on, a channel of their segment: the only one,
struct OneChannel {
  static constexpr int kColumns = 8;  // of dy that contribute to the filter gradient together
  static constexpr Size size = 1;
  template <typename T>
  T Read(const float* from, Size c, Size) const { return Load<T>(from + c); }
};

// or one of some, where vectors hold whole segments.
struct FewChannels {
  static constexpr int kColumns = 4;
  Size size;
  Indices first{};  // lane of the segment of each

  explicit FewChannels(Size size) : size(size) {
    for (int lane = 0; lane < kLanes; ++lane) first[lane] = lane / size * size;
  }
  template <typename T>
  T Read(const float* from, Size c, Size channel) const {
    if constexpr (std::is_same_v<T, Lanes>) return Permute(Load<Lanes>(from + c), first + int32_t(channel));
    else return from[c / size * size + channel];
  }
};

// y at Q neighbouring columns; at(i, column) is where row i and one of the Q + K - 1 columns that they read begins.
// The ReLU of what is read, if the network has one there.
template <int K, int Q, bool kRelu, typename T, typename At, typename Segment>
inline __attribute__((always_inline)) void ConvolveColumns(const At& at, const float* kernel, Size channels, Size c,
                                                           const Segment& segment, float* y) {
  T sum[Q] = {};
  UNROLL for (int i = 0; i < K; ++i) {
    for (Size channel = 0; channel < segment.size; ++channel) {
      T weights[K];
      UNROLL for (int j = 0; j < K; ++j) weights[j] = Load<T>(kernel + ((i * K + j) * segment.size + channel) * channels + c);
      UNROLL for (int column = 0; column < Q + K - 1; ++column) {
        T value = segment.template Read<T>(at(i, column), c, channel);
        if constexpr (kRelu) value = value < 0.0f ? T() : value;
        UNROLL for (int j = 0; j < K; ++j)
          if (0 <= column - j && column - j < Q) sum[column - j] += value * weights[j];
      }
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) Store(y + q * channels + c, sum[q]);
}

// y at the columns from `begin` to `end` of one row of an image; `zeros` has a row of the image.
template <int K, bool kRelu, typename Segment>
void ConvolveRow(const Images& in, const float* x, const float* kernel, Size image, Size row, Size begin, Size end, Size top,
                 Size left, const float* zeros, const Segment& segment, float* y) {
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
        ConvolveColumns<K, Q, kRelu, decltype(lanes)>(at, kernel, channels, c, segment, y);
      });
    } else {
      step = 1;
      const float* window[K][K];
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j)
          window[i][j] = 0 <= first + j && first + j < in.width ? rows[i] + (first + j) * channels : zeros;
      const auto at = [&](int i, int j) { return window[i][j]; };
      ForEachLane(channels, [&](auto lanes, Size c) {
        ConvolveColumns<K, 1, kRelu, decltype(lanes)>(at, kernel, channels, c, segment, y);
      });
    }
  }
}

template <int K, typename Segment>
void Convolve(ffi::ThreadPool& pool, Input x, Input kernel, Output y, Size top, Size left, const Segment& segment) {
  const Images in(x.dimensions()), out(y->dimensions());
  const std::vector<float> zeros(in.width * in.channels);
  const Parts parts(out.batch * out.height, 4);
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line)
      ConvolveRow<K, false>(in, x.typed_data(), kernel.typed_data(), line / out.height, line % out.height, 0, out.width, top,
                            left, zeros.data(), segment, y->typed_data() + line * out.width * in.channels);
  });
}

// Adds to each of K taps of one row of the kernel what Q neighbouring columns of dy contribute.
template <int K, int Q, typename T, typename Segment>
void CorrelateColumns(const float* x, const float* dy, Size channels, Size c, const Segment& segment, float* taps) {
  T gradient[Q];
  UNROLL for (int q = 0; q < Q; ++q) gradient[q] = Load<T>(dy + q * channels + c);
  for (Size channel = 0; channel < segment.size; ++channel) {
    T sum[K];
    UNROLL for (int j = 0; j < K; ++j) sum[j] = Load<T>(taps + (j * segment.size + channel) * channels + c);
    UNROLL for (int column = 0; column < Q + K - 1; ++column) {
      const T value = segment.template Read<T>(x + column * channels, c, channel);
      UNROLL for (int j = 0; j < K; ++j)
        if (0 <= column - j && column - j < Q) sum[j] += value * gradient[column - j];
    }
    UNROLL for (int j = 0; j < K; ++j) Store(taps + (j * segment.size + channel) * channels + c, sum[j]);
  }
}

template <int K, typename Segment>
void Correlate(ffi::ThreadPool& pool, Input x, Input dy, Output kernel, Size top, Size left, const Segment& segment) {
  constexpr int Q = Segment::kColumns;
  const Images in(x.dimensions()), out(dy.dimensions());
  const Size channels = in.channels, row_size = K * segment.size * channels, size = K * row_size;
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
          float* taps = sums.data() + part * size + i * row_size;
          if (whole) {
            ForEachLane(channels, [&](auto lanes, Size c) {
              CorrelateColumns<K, Q, decltype(lanes)>(from, gradient, channels, c, segment, taps);
            });
            continue;
          }
          for (Size j = std::max<Size>(0, -first); j < std::min<Size>(K, in.width - first); ++j)
            ForEachLane(channels, [&](auto lanes, Size c) {
              CorrelateColumns<1, 1, decltype(lanes)>(from + j * channels, gradient, channels, c, segment,
                                                      taps + j * segment.size * channels);
            });
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

// Calls f(K, segment) for a kernel [K, K, channels of a segment, channels].
template <typename F>
ffi::Error WithKernel(ffi::Span<const int64_t> kernel, const F& f) {
  if (kernel[2] == 1) return WithKernelSize(kernel[0], [&](auto k) { f(k, OneChannel()); });
  if (kernel[0] != 3 || kLanes % kernel[2] || kernel[3] % kLanes)
    return ffi::Error::InvalidArgument("segments of several channels need a kernel of 3 rows, and to fill vectors");
  f(std::integral_constant<int, 3>(), FewChannels(kernel[2]));
  return ffi::Error::Success();
}

inline ffi::Error Depthwise(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t top, int64_t left) {
  return WithKernel(kernel.dimensions(),
                    [&](auto k, const auto& segment) { Convolve<k>(pool, x, kernel, y, top, left, segment); });
}

inline ffi::Error DepthwiseFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t top, int64_t left) {
  return WithKernel(kernel->dimensions(),
                    [&](auto k, const auto& segment) { Correlate<k>(pool, x, dy, kernel, top, left, segment); });
}
