// Convolution of stride 1 with a square kernel and few channels and filters in each segment, and its filter gradient: depthwise
// (one channel, one filter) and segments of up to a vector's lanes.
//
// As matrix products these would leave most lanes idle. Here the lanes of a vector are neighbouring output channels, of several
// segments; for each channel of a segment, every lane reads that channel of its own segment. Sums stay in registers.
//
// The kernel's layout is [K, K, channels of a segment, all filters]. K is a template argument, so that loops over taps are
// unrolled.

#pragma once

#include "geometry.h"

// A segment policy says how the lanes of a vector of output channels read input channels. Its members:
//   size                     channels of a segment
//   lanes                    output channels of a vector: of as many whole segments as fit
//   input_channels           how many input channels these segments have
//   InputAccess(access)      how to load the input channels for output channels that are stored with `access`
//   Select(values, channel)  moves the given channel of each lane's segment into the lane
struct DepthwiseSegments {
  static constexpr Size size = 1, lanes = kLanes, input_channels = kLanes;
  template <typename Access>
  Access InputAccess(const Access& access) const { return access; }
  Vector Select(Vector values, Size) const { return values; }
};

struct SmallSegments {
  Size size, filters, lanes, input_channels;
  Indices first_channel{};  // of each lane's segment, in the loaded vector

  SmallSegments(Size size, Size filters)
      : size(size), filters(filters), lanes(kLanes / std::max(size, filters) * filters), input_channels(lanes / filters * size) {
    for (int lane = 0; lane < kLanes; ++lane) first_channel[lane] = lane / filters * size;
  }
  template <typename Access>
  PartialVector InputAccess(const Access& access) const {
    return {access.count == lanes ? input_channels : access.count / filters * size};
  }
  Vector Select(Vector values, Size channel) const { return Permute(values, first_channel + int32_t(channel)); }
};

// Calls f(access, c, input) for vectors of the output channels from c on, which read the input channels from `input` on.
template <typename Segment, typename F>
ALWAYS_INLINE void ForEachVector(Size filters, const Segment& segment, const F& f, FullVector full = {}) {
  Size c = 0, input = 0;
  if (segment.lanes == kLanes)
    for (; c + kLanes <= filters; c += kLanes, input += segment.input_channels) f(full, c, input);
  for (; c < filters; c += segment.lanes, input += segment.input_channels)
    f(PartialVector{std::min<Size>(segment.lanes, filters - c)}, c, input);
}

// Computes one vector of output channels at Q neighbouring columns. at(i, column) points at the channels that it reads in row i
// of the window and one of Q + K - 1 columns; each is loaded once for all the outputs that use it.
template <int K, int Q, bool kRelu, typename At, typename Access, typename Segment>
ALWAYS_INLINE void ConvolveColumns(const At& at, const float* kernel, Size filters, const Access& access, const Segment& segment,
                                   float* y) {
  const auto input_access = segment.InputAccess(access);
  Vector sum[Q] = {};
  UNROLL for (int i = 0; i < K; ++i) {
    for (Size channel = 0; channel < segment.size; ++channel) {
      Vector weights[K];
      UNROLL for (int j = 0; j < K; ++j) weights[j] = access.Load(kernel + ((i * K + j) * segment.size + channel) * filters);
      UNROLL for (int column = 0; column < Q + K - 1; ++column) {
        Vector value = segment.Select(input_access.Load(at(i, column)), channel);
        if constexpr (kRelu) value = Relu(value);
        UNROLL for (int j = 0; j < K; ++j)
          if (0 <= column - j && column - j < Q) sum[column - j] += value * weights[j];
      }
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) access.Store(y + q * filters, sum[q]);
}

// Computes columns `begin` to `end` of one output row, with a ReLU of the input if kRelu. `zeros` is a row of the image.
template <int K, bool kRelu, typename Segment>
void ConvolveRow(const ImageShape& in, const float* x, const float* kernel, Size filters, Size image, Size row, Size begin,
                 Size end, Size top, Size left, const float* zeros, const Segment& segment, float* y, FullVector full = {}) {
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
    const auto convolve_at = [&](const auto& at) {
      ForEachVector(filters, segment, [&](const auto& access, Size c, Size input) {
        ConvolveColumns<K, Q, kRelu>([&](int i, int j) { return at(i, j) + input; }, kernel + c, filters, access, segment, to + c);
      }, full);
    };
    if (first >= 0 && first + Q + K - 1 <= in.width) {
      const float* window[K];
      for (int i = 0; i < K; ++i) window[i] = rows[i] + first * channels;
      convolve_at([&](int i, int j) { return window[i] + j * channels; });
    } else {
      const float* window[K][Q + K - 1];
      for (int i = 0; i < K; ++i)
        for (int j = 0; j < Q + K - 1; ++j)
          window[i][j] = 0 <= first + j && first + j < in.width ? rows[i] + (first + j) * channels : zeros;
      convolve_at([&](int i, int j) { return window[i][j]; });
    }
  };
  constexpr int kColumns = 4;  // at a time; the last ones overlap those before
  if (end - begin < kColumns) {
    for (Size column = begin; column < end; ++column) convolve(column, std::integral_constant<int, 1>());
  } else {
    for (Size column = begin; column < end; column += kColumns)
      convolve(std::min(column, end - kColumns), std::integral_constant<int, kColumns>());
  }
}

template <int K, typename Segment>
void Convolve(ffi::ThreadPool& pool, Input x, Input kernel, Output y, Size top, Size left, const Segment& segment) {
  const ImageShape in(x.dimensions()), out(y->dimensions());
  const std::vector<float> zeros(in.width * in.channels);
  const Parts parts(out.batch * out.height, 4);
  const FullVector full{Streams(y->typed_data(), y->element_count(), out.channels)};
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size row = parts.begin(part); row < parts.begin(part + 1); ++row)
      ConvolveRow<K, false>(in, x.typed_data(), kernel.typed_data(), out.channels, row / out.height, row % out.height, 0,
                            out.width, top, left, zeros.data(), segment, y->typed_data() + row * out.width * out.channels, full);
  });
}

// Adds to `sums` what rows `begin` to `end` of dy (of all images) contribute to the filter gradient, at K columns and R rows of
// taps from row `first` on, relative to the padding. The last K columns of dy are kept in registers: each column of x is loaded
// once and multiplied with all of them. `zeros` is a row of the image.
template <int K, int R, typename Access, typename Segment>
ALWAYS_INLINE void CorrelateRows(const ImageShape& in, const ImageShape& out, const float* x, const float* dy, Size begin, Size end,
                                 Size first, Size left, const float* zeros, const Access& access, const Segment& segment,
                                 Size channel, Vector (&sums)[R][K]) {
  const auto input_access = segment.InputAccess(access);
  for (Size dy_row = begin; dy_row < end; ++dy_row) {
    const Size image = dy_row / out.height, row = dy_row % out.height + first;
    const float* rows[R];
    UNROLL for (int r = 0; r < R; ++r)
      rows[r] = 0 <= row + r && row + r < in.height ? x + (image * in.height + row + r) * in.width * in.channels : zeros;
    const auto at = [&](Size column) { return dy + (dy_row * out.width + column) * out.channels; };
    const auto load_dy = [&](Size column) { return 0 <= column && column < out.width ? access.Load(at(column)) : Vector(); };
    Vector gradient[K];
    UNROLL for (int j = 0; j < K; ++j) gradient[j] = load_dy(left - 1 - j);
    for (Size column = 0; column < in.width; ++column) {
      UNROLL for (int j = K - 1; j > 0; --j) gradient[j] = gradient[j - 1];
      gradient[0] = load_dy(column + left);
      // The next vectors of these columns, up to their last value. They are too far apart for the hardware's prefetcher.
      __builtin_prefetch(at(column + left) + 2 * kLanes - 1);
      __builtin_prefetch(rows[R - 1] + column * in.channels + 2 * kLanes - 1);
      UNROLL for (int r = 0; r < R; ++r) {
        const Vector value = segment.Select(input_access.Load(rows[r] + column * in.channels), channel);
        UNROLL for (int j = 0; j < K; ++j) sums[r][j] += value * gradient[j];
      }
    }
  }
}

template <int K, typename Segment>
void Correlate(ffi::ThreadPool& pool, Input x, Input dy, Output kernel, Size top, Size left, const Segment& segment) {
  constexpr int R = K == 3 ? 3 : 1;  // rows of taps whose sums fit into 16 registers, besides K columns of dy
  const ImageShape in(x.dimensions()), out(dy.dimensions());
  const Size filters = out.channels, size = K * K * segment.size * filters;
  const std::vector<float> zeros(in.width * in.channels);
  const Parts parts(out.batch * out.height, 8);
  const Buffer sums = NewBuffer(parts.count * size);
  ParallelFor(pool, parts.count, [&](Size part) {
    ForEachVector(filters, segment, [&](const auto& access, Size c, Size input) {
      for (Size channel = 0; channel < segment.size; ++channel) {
        for (Size i = 0; i < K; i += R) {
          Vector sum[R][K] = {};
          CorrelateRows(in, out, x.typed_data() + input, dy.typed_data() + c, parts.begin(part), parts.begin(part + 1), i - top,
                        left, zeros.data() + input, access, segment, channel, sum);
          float* taps = sums.get() + part * size + (i * K * segment.size + channel) * filters + c;
          UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int j = 0; j < K; ++j) access.Store(taps + (r * K + j) * segment.size * filters, sum[r][j]);
        }
      }
    });
  });
  SumParts(pool, {sums.get(), size_t(parts.count * size)}, size, kernel->typed_data());
}

// Calls f(K, segments) for a kernel of this shape, with K as an integral constant.
template <typename F>
ffi::Error WithKernel(Size channels, ffi::Span<const int64_t> kernel, const F& f) {
  const Size side = kernel[0], size = kernel[2], filters = kernel[3] * size / channels;
  const bool depthwise = size == 1 && filters == 1;
  if (side == 3 && depthwise) f(std::integral_constant<int, 3>(), DepthwiseSegments());
  else if (side == 5 && depthwise) f(std::integral_constant<int, 5>(), DepthwiseSegments());
  else if (side == 7 && depthwise) f(std::integral_constant<int, 7>(), DepthwiseSegments());
  else if (side == 3 && std::max(size, filters) <= kLanes) f(std::integral_constant<int, 3>(), SmallSegments(size, filters));
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
