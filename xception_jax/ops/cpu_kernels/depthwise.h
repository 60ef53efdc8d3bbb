// Convolution of stride 1 with a square kernel and as many filters as channels in each segment: a depthwise one, or one with
// segments of a few channels. Lanes are output channels, so that none is left idle however small a segment is. And the
// filter gradient.

#pragma once

#include "common.h"

// Segments as the lanes of a vector see them, when each reads one channel of its own: the only one,
struct OneChannel {
  static constexpr int kColumns = 8;  // of dy that contribute to the filter gradient together
  static constexpr Size size = 1, lanes = kLanes;
  Lanes Select(Lanes values, Size) const { return values; }
};

// or one of a few; as many lanes as whole segments fill.
struct FewChannels {
  static constexpr int kColumns = 4;
  Size size, lanes;
  Indices first{};  // lane of the segment of each

  explicit FewChannels(Size size) : size(size), lanes(kLanes / size * size) {
    for (int lane = 0; lane < kLanes; ++lane) first[lane] = lane / size * size;
  }
  Lanes Select(Lanes values, Size channel) const { return Permute(values, first + int32_t(channel)); }
};

// Calls f(vector, c) for vectors of the output channels from c on, until all channels are done.
template <typename Segment, typename F>
void ForEachVector(Size channels, const Segment& segment, const F& f, WholeVector whole = {}) {
  Size c = 0;
  if (segment.lanes == kLanes)
    for (; c + kLanes <= channels; c += kLanes) f(whole, c);
  for (; c < channels; c += segment.lanes) f(PartOfVector{std::min<Size>(segment.lanes, channels - c)}, c);
}

// y at Q neighbouring columns; at(i, column) is where row i and one of the Q + K - 1 columns that they read begins.
// The ReLU of what is read, if the network has one there.
template <int K, int Q, bool kRelu, typename At, typename Vector, typename Segment>
ALWAYS_INLINE void ConvolveColumns(const At& at, const float* kernel, Size channels, Size c,
                                                           const Vector& vector, const Segment& segment, float* y) {
  Lanes sum[Q] = {};
  UNROLL for (int i = 0; i < K; ++i) {
    for (Size channel = 0; channel < segment.size; ++channel) {
      Lanes weights[K];
      UNROLL for (int j = 0; j < K; ++j) weights[j] = vector.Load(kernel + ((i * K + j) * segment.size + channel) * channels + c);
      UNROLL for (int column = 0; column < Q + K - 1; ++column) {
        Lanes value = segment.Select(vector.Load(at(i, column) + c), channel);
        if constexpr (kRelu) value = value < 0.0f ? Lanes() : value;
        UNROLL for (int j = 0; j < K; ++j)
          if (0 <= column - j && column - j < Q) sum[column - j] += value * weights[j];
      }
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) vector.Store(y + q * channels + c, sum[q]);
}

// y at the columns from `begin` to `end` of one row of an image; `zeros` has a row of the image.
template <int K, bool kRelu, typename Segment>
void ConvolveRow(const Images& in, const float* x, const float* kernel, Size image, Size row, Size begin, Size end, Size top,
                 Size left, const float* zeros, const Segment& segment, float* y, WholeVector whole = {}) {
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
      ForEachVector(channels, segment, [&](const auto& vector, Size c) {
        ConvolveColumns<K, Q, kRelu>(at, kernel, channels, c, vector, segment, y);
      }, whole);
    } else {
      step = 1;
      const float* window[K][K];
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < K; ++j)
          window[i][j] = 0 <= first + j && first + j < in.width ? rows[i] + (first + j) * channels : zeros;
      const auto at = [&](int i, int j) { return window[i][j]; };
      ForEachVector(channels, segment, [&](const auto& vector, Size c) {
        ConvolveColumns<K, 1, kRelu>(at, kernel, channels, c, vector, segment, y);
      }, whole);
    }
  }
}

template <int K, typename Segment>
void Convolve(ffi::ThreadPool& pool, Input x, Input kernel, Output y, Size top, Size left, const Segment& segment) {
  const Images in(x.dimensions()), out(y->dimensions());
  const std::vector<float> zeros(in.width * in.channels);
  const Parts parts(out.batch * out.height, 4);
  const WholeVector whole{Streams(y->typed_data(), y->element_count(), in.channels)};
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line)
      ConvolveRow<K, false>(in, x.typed_data(), kernel.typed_data(), line / out.height, line % out.height, 0, out.width, top,
                            left, zeros.data(), segment, y->typed_data() + line * out.width * in.channels, whole);
  });
}

// Adds to each of K taps of one row of the kernel what Q neighbouring columns of dy contribute.
template <int K, int Q, typename Vector, typename Segment>
void CorrelateColumns(const float* x, const float* dy, Size channels, Size c, const Vector& vector, const Segment& segment,
                      float* taps) {
  Lanes gradient[Q];
  UNROLL for (int q = 0; q < Q; ++q) gradient[q] = vector.Load(dy + q * channels + c);
  for (Size channel = 0; channel < segment.size; ++channel) {
    Lanes sum[K];
    UNROLL for (int j = 0; j < K; ++j) sum[j] = vector.Load(taps + (j * segment.size + channel) * channels + c);
    UNROLL for (int column = 0; column < Q + K - 1; ++column) {
      const Lanes value = segment.Select(vector.Load(x + column * channels + c), channel);
      UNROLL for (int j = 0; j < K; ++j)
        if (0 <= column - j && column - j < Q) sum[j] += value * gradient[column - j];
    }
    UNROLL for (int j = 0; j < K; ++j) vector.Store(taps + (j * segment.size + channel) * channels + c, sum[j]);
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
            ForEachVector(channels, segment, [&](const auto& vector, Size c) {
              CorrelateColumns<K, Q>(from, gradient, channels, c, vector, segment, taps);
            });
            continue;
          }
          for (Size j = std::max<Size>(0, -first); j < std::min<Size>(K, in.width - first); ++j)
            ForEachVector(channels, segment, [&](const auto& vector, Size c) {
              CorrelateColumns<1, 1>(from + j * channels, gradient, channels, c, vector, segment,
                                     taps + j * segment.size * channels);
            });
        }
      }
    }
  });
  AddParts(pool, sums, size, kernel->typed_data());
}

// Calls f(K, segment) for a kernel [K, K, channels of a segment, channels], with K as a constant.
template <typename F>
ffi::Error WithKernel(ffi::Span<const int64_t> kernel, const F& f) {
  const Size side = kernel[0], size = kernel[2];
  if (side == 3 && size == 1) f(std::integral_constant<int, 3>(), OneChannel());
  else if (side == 5 && size == 1) f(std::integral_constant<int, 5>(), OneChannel());
  else if (side == 7 && size == 1) f(std::integral_constant<int, 7>(), OneChannel());
  else if (side == 3 && size <= kLanes) f(std::integral_constant<int, 3>(), FewChannels(size));
  else return ffi::Error::InvalidArgument("there is no kernel of this shape");
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
