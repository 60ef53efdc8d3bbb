// Convolution of stride 1 with a square kernel and few channels and filters in each segment: a depthwise one, say. Lanes are
// output channels, so that few are left idle however small a segment is. And the filter gradient.

#pragma once

#include "common.h"

// Segments as the lanes of a vector of output channels see them: of one channel and one filter,
struct OneChannel {
  static constexpr Size size = 1, lanes = kLanes, reads = kLanes;
  template <typename Vector>
  Vector Reads(const Vector& vector) const { return vector; }
  Lanes Select(Lanes values, Size) const { return values; }
};

// or of a few. A vector is as many whole segments as fit, and `reads` their channels.
struct FewChannels {
  Size size, filters, lanes, reads;
  Indices first{};  // where the channels of each lane's segment begin

  FewChannels(Size size, Size filters)
      : size(size), filters(filters), lanes(kLanes / std::max(size, filters) * filters), reads(lanes / filters * size) {
    for (int lane = 0; lane < kLanes; ++lane) first[lane] = lane / filters * size;
  }
  template <typename Vector>
  PartOfVector Reads(const Vector& vector) const { return {vector.count == lanes ? reads : vector.count / filters * size}; }
  Lanes Select(Lanes values, Size channel) const { return Permute(values, first + int32_t(channel)); }
};

// Calls f(vector, c, from) for vectors of the output channels from c on, whose segments read the channels from `from` on.
template <typename Segment, typename F>
ALWAYS_INLINE void ForEachVector(Size filters, const Segment& segment, const F& f, WholeVector whole = {}) {
  Size c = 0, from = 0;
  if (segment.lanes == kLanes)
    for (; c + kLanes <= filters; c += kLanes, from += segment.reads) f(whole, c, from);
  for (; c < filters; c += segment.lanes, from += segment.reads)
    f(PartOfVector{std::min<Size>(segment.lanes, filters - c)}, c, from);
}

// A vector of y at Q neighbouring columns; at(i, column) is where the channels begin that it reads in row i and one of Q + K - 1
// columns. The ReLU of what is read, if the network has one there.
template <int K, int Q, bool kRelu, typename At, typename Vector, typename Segment>
ALWAYS_INLINE void ConvolveColumns(const At& at, const float* kernel, Size filters, const Vector& vector, const Segment& segment,
                                   float* y) {
  const auto reads = segment.Reads(vector);
  Lanes sum[Q] = {};
  UNROLL for (int i = 0; i < K; ++i) {
    for (Size channel = 0; channel < segment.size; ++channel) {
      Lanes weights[K];
      UNROLL for (int j = 0; j < K; ++j) weights[j] = vector.Load(kernel + ((i * K + j) * segment.size + channel) * filters);
      UNROLL for (int column = 0; column < Q + K - 1; ++column) {
        Lanes value = segment.Select(reads.Load(at(i, column)), channel);
        if constexpr (kRelu) value = value < 0.0f ? Lanes() : value;
        UNROLL for (int j = 0; j < K; ++j)
          if (0 <= column - j && column - j < Q) sum[column - j] += value * weights[j];
      }
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) vector.Store(y + q * filters, sum[q]);
}

// y at the columns from `begin` to `end` of one row of an image; `zeros` has a row of the image.
template <int K, bool kRelu, typename Segment>
void ConvolveRow(const Images& in, const float* x, const float* kernel, Size filters, Size image, Size row, Size begin, Size end,
                 Size top, Size left, const float* zeros, const Segment& segment, float* y, WholeVector whole = {}) {
  const Size channels = in.channels;
  const float* rows[K];
  for (int i = 0; i < K; ++i) {
    const Size from = row - top + i;
    rows[i] = 0 <= from && from < in.height ? x + (image * in.height + from) * in.width * channels : zeros;
  }
  const auto convolve = [&](Size column, auto count) {
    constexpr int Q = count;
    const Size first = column - left;
    float* to = y + (column - begin) * filters;
    const auto columns_at = [&](const auto& at) {
      ForEachVector(filters, segment, [&](const auto& vector, Size c, Size from) {
        ConvolveColumns<K, Q, kRelu>([&](int i, int j) { return at(i, j) + from; }, kernel + c, filters, vector, segment, to + c);
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
  const WholeVector whole{Streams(y->typed_data(), y->element_count(), out.channels)};
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line)
      ConvolveRow<K, false>(in, x.typed_data(), kernel.typed_data(), out.channels, line / out.height, line % out.height, 0,
                            out.width, top, left, zeros.data(), segment, y->typed_data() + line * out.width * out.channels, whole);
  });
}

// What the rows of dy from `begin` to `end` contribute to R rows of taps, from row `first` of the kernel on. The sums stay in
// registers; a column of x contributes to K taps, with as many columns of dy. `zeros` has a row of the image.
template <int K, int R, typename Vector, typename Segment>
ALWAYS_INLINE void CorrelateLines(const Images& in, const Images& out, const float* x, const float* dy, Size begin, Size end,
                                  Size first, Size left, const float* zeros, const Vector& vector, const Segment& segment,
                                  Size channel, Lanes (&sums)[R][K]) {
  const auto reads = segment.Reads(vector);
  for (Size line = begin; line < end; ++line) {
    const Size image = line / out.height, row = line % out.height + first;
    const float* rows[R];
    UNROLL for (int r = 0; r < R; ++r)
      rows[r] = 0 <= row + r && row + r < in.height ? x + (image * in.height + row + r) * in.width * in.channels : zeros;
    const auto at = [&](Size column) { return dy + (line * out.width + column) * out.channels; };
    const auto dy_at = [&](Size column) { return 0 <= column && column < out.width ? vector.Load(at(column)) : Lanes(); };
    Lanes gradient[K];
    UNROLL for (int j = 0; j < K; ++j) gradient[j] = dy_at(left - 1 - j);
    for (Size column = 0; column < in.width; ++column) {
      UNROLL for (int j = K - 1; j > 0; --j) gradient[j] = gradient[j - 1];
      gradient[0] = dy_at(column + left);
      // The next vectors, too far apart for the processor to guess: their last values, whose lines are not here yet.
      __builtin_prefetch(at(column + left) + 2 * kLanes - 1);
      __builtin_prefetch(rows[R - 1] + column * in.channels + 2 * kLanes - 1);
      UNROLL for (int r = 0; r < R; ++r) {
        const Lanes value = segment.Select(reads.Load(rows[r] + column * in.channels), channel);
        UNROLL for (int j = 0; j < K; ++j) sums[r][j] += value * gradient[j];
      }
    }
  }
}

template <int K, typename Segment>
void Correlate(ffi::ThreadPool& pool, Input x, Input dy, Output kernel, Size top, Size left, const Segment& segment) {
  constexpr int R = K == 3 ? 3 : 1;  // rows of taps whose sums fit into the registers
  const Images in(x.dimensions()), out(dy.dimensions());
  const Size filters = out.channels, size = K * K * segment.size * filters;
  const std::vector<float> zeros(in.width * in.channels);
  const Parts parts(out.batch * out.height, 8);
  const Buffer sums = NewBuffer(parts.count * size);
  ParallelFor(pool, parts.count, [&](Size part) {
    ForEachVector(filters, segment, [&](const auto& vector, Size c, Size from) {
      for (Size channel = 0; channel < segment.size; ++channel) {
        for (Size i = 0; i < K; i += R) {
          Lanes sum[R][K] = {};
          CorrelateLines(in, out, x.typed_data() + from, dy.typed_data() + c, parts.begin(part), parts.begin(part + 1), i - top,
                         left, zeros.data() + from, vector, segment, channel, sum);
          float* taps = sums.get() + part * size + (i * K * segment.size + channel) * filters + c;
          UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int j = 0; j < K; ++j) vector.Store(taps + (r * K + j) * segment.size * filters, sum[r][j]);
        }
      }
    });
  });
  AddParts(pool, {sums.get(), size_t(parts.count * size)}, size, kernel->typed_data());
}

// Calls f(K, segment) for a kernel [K, K, channels of a segment, all filters], with K as a constant.
template <typename F>
ffi::Error WithKernel(Size channels, ffi::Span<const int64_t> kernel, const F& f) {
  const Size side = kernel[0], size = kernel[2], filters = kernel[3] * size / channels;
  const bool depthwise = size == 1 && filters == 1;
  if (side == 3 && depthwise) f(std::integral_constant<int, 3>(), OneChannel());
  else if (side == 5 && depthwise) f(std::integral_constant<int, 5>(), OneChannel());
  else if (side == 7 && depthwise) f(std::integral_constant<int, 7>(), OneChannel());
  else if (side == 3 && std::max(size, filters) <= kLanes) f(std::integral_constant<int, 3>(), FewChannels(size, filters));
  else return ffi::Error::InvalidArgument("there is no kernel of this shape");
  return ffi::Error::Success();
}

inline ffi::Error Depthwise(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t top, int64_t left) {
  return WithKernel(x.dimensions()[3], kernel.dimensions(),
                    [&](auto k, const auto& segment) { Convolve<k>(pool, x, kernel, y, top, left, segment); });
}

inline ffi::Error DepthwiseFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t top, int64_t left) {
  return WithKernel(x.dimensions()[3], kernel->dimensions(),
                    [&](auto k, const auto& segment) { Correlate<k>(pool, x, dy, kernel, top, left, segment); });
}
