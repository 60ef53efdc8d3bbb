// The operations that XLA lowers badly for a CPU, for float32 and NHWC: depthwise convolution of stride 1 and its filter
// gradient, max pooling and its gradient, and the sums over pixels of BatchNorm. Built and called by native.py.
//
// Loops over channels are innermost, contiguous and free of dependences, so that the compiler vectorises them. Sums are
// cut into the same parts whatever the number of threads is: no result depends on it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Input = ffi::Buffer<ffi::F32>;
using Output = ffi::Result<ffi::Buffer<ffi::F32>>;
using Size = int64_t;

// Calls work(0) ... work(count - 1) on the threads of XLA's pool. The caller takes its share, and so never waits for a
// thread that has not begun.
template <typename Work>
void ParallelFor(ffi::ThreadPool& pool, Size count, const Work& work) {
  struct Progress {
    std::atomic<Size> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto take = [progress, count, &work] {
    for (Size i; (i = progress->next.fetch_add(1)) < count;) {
      work(i);
      if (progress->done.fetch_add(1) + 1 == count) progress->done.notify_all();
    }
  };
  for (Size helper = 1; helper < std::min<Size>(pool.num_threads(), count); ++helper) pool.Schedule(decltype(take)(take));
  take();
  for (Size done; (done = progress->done.load()) < count;) progress->done.wait(done);
}

// Items (rows of all images, or pixels) cut into parts of `least` or more, at most 64.
struct Parts {
  Size items, count;
  Parts(Size items, Size least) : items(items), count(std::clamp<Size>(items / least, 1, 64)) {}
  Size begin(Size part) const { return items * part / count; }
};

struct Images {
  Size batch, height, width, channels;
  explicit Images(ffi::Span<const int64_t> d) : batch(d[0]), height(d[1]), width(d[2]), channels(d[3]) {}
};

// Adds the parts of a sum of `size` values in their order.
void AddParts(const std::vector<float>& parts, Size size, float* sum) {
  std::fill_n(sum, size, 0.0f);
  for (size_t part = 0; part < parts.size(); part += size)
    for (Size k = 0; k < size; ++k) sum[k] += parts[part + k];
}

// Several floats, as many as the widest register holds.
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

template <typename T>
T Load(const float* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename T>
void Store(float* to, const T& value) {
  std::memcpy(to, &value, sizeof(T));
}

// Calls f(Lanes(), c) or f(float(), c) until all channels are done.
template <typename F>
void ForEachLane(Size channels, const F& f) {
  Size c = 0;
  for (; c + kLanes <= channels; c += kLanes) f(Lanes(), c);
  for (; c < channels; ++c) f(0.0f, c);
}

#define UNROLL _Pragma("GCC unroll 16")

// --- depthwise convolution -------------------------------------------------------------------------------------------

// y at Q neighbouring columns, which read Q + K - 1 columns of K rows; T is a float or several.
template <int K, int Q, typename T>
void ConvolveColumns(const float* const* rows, const float* kernel, Size channels, Size c, float* y) {
  T sum[Q] = {};
  UNROLL for (int i = 0; i < K; ++i) {
    T weights[K];
    UNROLL for (int j = 0; j < K; ++j) weights[j] = Load<T>(kernel + (i * K + j) * channels + c);
    UNROLL for (int column = 0; column < Q + K - 1; ++column) {
      const T value = Load<T>(rows[i] + column * channels + c);
      UNROLL for (int j = 0; j < K; ++j)
        if (0 <= column - j && column - j < Q) sum[column - j] += value * weights[j];
    }
  }
  UNROLL for (int q = 0; q < Q; ++q) Store(y + q * channels + c, sum[q]);
}

template <int K>
void Convolve(ffi::ThreadPool& pool, Input x, Input kernel, Output y, Size top, Size left) {
  constexpr int Q = 4;
  const Images in(x.dimensions()), out(y->dimensions());
  const Size channels = in.channels;
  const std::vector<float> zeros(in.width * channels);
  const Parts parts(out.batch * out.height, 4);
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line) {
      const Size image = line / out.height, row = line % out.height - top;
      const float* rows[K];
      for (int i = 0; i < K; ++i) {
        const bool inside = 0 <= row + i && row + i < in.height;
        rows[i] = inside ? x.typed_data() + (image * in.height + row + i) * in.width * channels : zeros.data();
      }
      for (Size column = 0; column < out.width;) {
        float* to = y->typed_data() + (line * out.width + column) * channels;
        const Size first = column - left;
        if (first >= 0 && first + Q + K - 1 <= in.width && column + Q <= out.width) {
          const float* window[K];
          for (int i = 0; i < K; ++i) window[i] = rows[i] + first * channels;
          ForEachLane(channels, [&](auto lanes, Size c) {
            ConvolveColumns<K, Q, decltype(lanes)>(window, kernel.typed_data(), channels, c, to);
          });
          column += Q;
          continue;
        }
        std::fill_n(to, channels, 0.0f);
        for (int i = 0; i < K; ++i) {
          for (Size j = std::max<Size>(0, -first); j < std::min<Size>(K, in.width - first); ++j) {
            const float* from = rows[i] + (first + j) * channels;
            const float* weight = kernel.typed_data() + (i * K + j) * channels;
            for (Size c = 0; c < channels; ++c) to[c] += from[c] * weight[c];
          }
        }
        ++column;
      }
    }
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
  AddParts(sums, size, kernel->typed_data());
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

ffi::Error Depthwise(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t top, int64_t left) {
  return WithKernelSize(kernel.dimensions()[0], [&](auto k) { Convolve<k>(pool, x, kernel, y, top, left); });
}

ffi::Error DepthwiseFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t top, int64_t left) {
  return WithKernelSize(kernel->dimensions()[0], [&](auto k) { Correlate<k>(pool, x, dy, kernel, top, left); });
}

// --- max pooling -----------------------------------------------------------------------------------------------------

struct Pooling {
  Size window, stride, top, left;
};

// Calls f(x offset, y offset) for each tap of each window of one image that lies inside it, in the order of the taps.
template <typename F>
void ForEachTap(const Images& in, const Images& out, const Pooling& pooling, Size image, Size row, Size column, const F& f) {
  const Size y0 = row * pooling.stride - pooling.top, x0 = column * pooling.stride - pooling.left;
  for (Size i = std::max<Size>(0, -y0); i < std::min(pooling.window, in.height - y0); ++i)
    for (Size j = std::max<Size>(0, -x0); j < std::min(pooling.window, in.width - x0); ++j)
      f(((image * in.height + y0 + i) * in.width + x0 + j) * in.channels);
}

ffi::Error MaxPool(ffi::ThreadPool pool, Input x, Output y, int64_t window, int64_t stride, int64_t top, int64_t left) {
  const Images in(x.dimensions()), out(y->dimensions());
  const Pooling pooling{window, stride, top, left};
  const Parts parts(out.batch * out.height, 4);
  ParallelFor(pool, parts.count, [&](Size part) {
    for (Size line = parts.begin(part); line < parts.begin(part + 1); ++line) {
      for (Size column = 0; column < out.width; ++column) {
        float* __restrict to = y->typed_data() + (line * out.width + column) * out.channels;
        std::fill_n(to, out.channels, -std::numeric_limits<float>::infinity());
        ForEachTap(in, out, pooling, line / out.height, line % out.height, column, [&](Size offset) {
          const float* __restrict from = x.typed_data() + offset;
          for (Size c = 0; c < in.channels; ++c) to[c] = (from[c] > to[c]) | (from[c] != from[c]) ? from[c] : to[c];
        });
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error MaxPoolGradient(ffi::ThreadPool pool, Input x, Input y, Input dy, Output dx, int64_t window, int64_t stride,
                           int64_t top, int64_t left) {
  const Images in(x.dimensions()), out(y.dimensions());
  const Pooling pooling{window, stride, top, left};
  ParallelFor(pool, in.batch, [&](Size image) {
    std::fill_n(dx->typed_data() + image * in.height * in.width * in.channels, in.height * in.width * in.channels, 0.0f);
    std::vector<float> left_over(in.channels);  // of dy, until the first value that equals the largest took it
    for (Size row = 0; row < out.height; ++row) {
      for (Size column = 0; column < out.width; ++column) {
        const Size at = ((image * out.height + row) * out.width + column) * out.channels;
        const float* __restrict largest = y.typed_data() + at;
        float* __restrict rest = left_over.data();
        std::copy_n(dy.typed_data() + at, in.channels, rest);
        ForEachTap(in, out, pooling, image, row, column, [&](Size offset) {
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

// --- sums over pixels ------------------------------------------------------------------------------------------------

// sums[0] is the sum of a over all pixels, sums[1] that of a * b, for each channel.
ffi::Error ChannelSums(ffi::ThreadPool pool, Input a, Input b, Output sums) {
  constexpr int Q = 4;
  const Size channels = a.dimensions().back(), pixels = a.element_count() / channels, size = 2 * channels;
  const Parts parts(pixels, 256);
  std::vector<float> all(parts.count * size);
  ParallelFor(pool, parts.count, [&](Size part) {
    float* __restrict sum = all.data() + part * size;
    float* __restrict product = sum + channels;
    Size pixel = parts.begin(part);
    for (Size step; pixel < parts.begin(part + 1); pixel += step) {
      step = pixel + Q <= parts.begin(part + 1) ? Q : 1;
      const float* __restrict p = a.typed_data() + pixel * channels;
      const float* __restrict q = b.typed_data() + pixel * channels;
      if (step == Q) {
        for (Size c = 0; c < channels; ++c) {
          float s = 0, t = 0;
          for (int k = 0; k < Q; ++k) s += p[k * channels + c], t += p[k * channels + c] * q[k * channels + c];
          sum[c] += s, product[c] += t;
        }
      } else {
        for (Size c = 0; c < channels; ++c) sum[c] += p[c], product[c] += p[c] * q[c];
      }
    }
  });
  AddParts(all, size, sums->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise, Depthwise,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("top").Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_filter_gradient, DepthwiseFilterGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("top").Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool, MaxPool,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("window").Attr<int64_t>("stride")
                                  .Attr<int64_t>("top").Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool_gradient, MaxPoolGradient,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>().Attr<int64_t>("window").Attr<int64_t>("stride")
                                  .Attr<int64_t>("top").Attr<int64_t>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(channel_sums, ChannelSums,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
