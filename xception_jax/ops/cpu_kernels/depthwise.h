// Convolution of stride 1 with a square kernel and as many filters as channels in each segment: a depthwise one, or one with
// segments of a few channels. Lanes are output channels, so that none is left idle however small a segment is. And the
// filter gradient.

#pragma once

#include "common.h"

// Segments as the lanes of a vector see them, when each reads one channel of its own: the only one,
struct OneChannel {
  static constexpr Size size = 1, lanes = kLanes;
  Lanes Select(Lanes values, Size) const { return values; }
};

// or one of a few; as many lanes as whole segments fill.
struct FewChannels {
  Size size, lanes;
  Indices first{};  // lane of the segment of each

  explicit FewChannels(Size size) : size(size), lanes(kLanes / size * size) {
    for (int lane = 0; lane < kLanes; ++lane) first[lane] = lane / size * size;
  }
  Lanes Select(Lanes values, Size channel) const { return Permute(values, first + int32_t(channel)); }
};

// Calls f(vector, c) for vectors of the output channels from c on, until all channels are done.
template <typename Segment, typename F>
ALWAYS_INLINE void ForEachVector(Size channels, const Segment& segment, const F& f, WholeVector whole = {}) {
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
  const Size channels = in.channels;
  const float* rows[K];
  for (int i = 0; i < K; ++i) {
    const Size from = row - top + i;
    rows[i] = 0 <= from && from < in.height ? x + (image * in.height + from) * in.width * channels : zeros;
  }
  const auto convolve = [&](Size column, auto count) {
    constexpr int Q = count;
    const Size first = column - left;
    const auto columns_at = [&](const auto& at) {
      ForEachVector(channels, segment, [&](const auto& vector, Size c) {
        ConvolveColumns<K, Q, kRelu>(at, kernel, channels, c, vector, segment, y + (column - begin) * channels);
      }, whole);
    };
    if (first >= 0 && first + Q + K - 1 <= in.width) {
      const float* window[K];
      for (int i = 0; i < K; ++i) window[i] = rows[i] + first * channels;
      columns_at([&](int i, int j) { return window[i] + j * channels; });
    } else {
      const float* window[K][Q + K - 1];
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < Q + K - 1; ++j)
          window[i][j] = 0 <= first + j && first + j < in.width ? rows[i] + (first + j) * channels : zeros;
      columns_at([&](int i, int j) { return window[i][j]; });
    }
  };
  constexpr int kTogether = 4;  // the last ones again with some before them
  if (end - begin < kTogether) {
    for (Size column = begin; column < end; ++column) convolve(column, std::integral_constant<int, 1>());
  } else {
    for (Size column = begin; column < end; column += kTogether)
      convolve(std::min(column, end - kTogether), std::integral_constant<int, kTogether>());
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

// What the rows of dy from `begin` to `end` contribute to R rows of taps, from row `first` of the kernel on. The sums stay in
// registers; a column of x contributes to K taps, with as many columns of dy. `zeros` has a row of the image.
template <int K, int R, typename Vector, typename Segment>
ALWAYS_INLINE void CorrelateLines(const Images& in, const Images& out, const float* x, const float* dy, Size begin, Size end,
                                  Size first, Size left, const float* zeros, const Vector& vector, const Segment& segment,
                                  Size channel, Lanes (&sums)[R][K]) {
  const Size channels = in.channels;
  for (Size line = begin; line < end; ++line) {
    const Size image = line / out.height, row = line % out.height + first;
    const float* rows[R];
    UNROLL for (int r = 0; r < R; ++r)
      rows[r] = 0 <= row + r && row + r < in.height ? x + (image * in.height + row + r) * in.width * channels : zeros;
    const auto dy_at = [&](Size column) {
      return 0 <= column && column < out.width ? vector.Load(dy + (line * out.width + column) * channels) : Lanes();
    };
    Lanes gradient[K];
    UNROLL for (int j = 0; j < K; ++j) gradient[j] = dy_at(left - 1 - j);
    for (Size column = 0; column < in.width; ++column) {
      UNROLL for (int j = K - 1; j > 0; --j) gradient[j] = gradient[j - 1];
      gradient[0] = dy_at(column + left);
      // What the next vector needs lies too far apart for the processor to guess.
      __builtin_prefetch(dy + (line * out.width + column + left) * channels + 2 * kLanes - 1);
      __builtin_prefetch(rows[R - 1] + column * channels + 2 * kLanes - 1);
      UNROLL for (int r = 0; r < R; ++r) {
        const Lanes value = segment.Select(vector.Load(rows[r] + column * channels), channel);
        UNROLL for (int j = 0; j < K; ++j) sums[r][j] += value * gradient[j];
      }
    }
  }
}

template <int K, typename Segment>
void Correlate(ffi::ThreadPool& pool, Input x, Input dy, Output kernel, Size top, Size left, const Segment& segment) {
  constexpr int R = K == 3 ? 3 : 1;  // rows of taps whose sums fit into the registers
  const Images in(x.dimensions()), out(dy.dimensions());
  const Size channels = in.channels, size = K * K * segment.size * channels;
  const std::vector<float> zeros(in.width * channels);
  const Parts parts(out.batch * out.height, 8);
  const Buffer sums = NewBuffer(parts.count * size);
  ParallelFor(pool, parts.count, [&](Size part) {
    ForEachVector(channels, segment, [&](const auto& vector, Size c) {
      for (Size channel = 0; channel < segment.size; ++channel) {
        for (Size i = 0; i < K; i += R) {
          Lanes sum[R][K] = {};
          CorrelateLines(in, out, x.typed_data() + c, dy.typed_data() + c, parts.begin(part), parts.begin(part + 1), i - top,
                         left, zeros.data() + c, vector, segment, channel, sum);
          float* taps = sums.get() + part * size + (i * K * segment.size + channel) * channels + c;
          UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int j = 0; j < K; ++j) vector.Store(taps + (r * K + j) * segment.size * channels, sum[r][j]);
        }
      }
    });
  });
  AddParts(pool, {sums.get(), size_t(parts.count * size)}, size, kernel->typed_data());
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
