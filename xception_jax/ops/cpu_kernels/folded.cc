// A layer of a network whose BatchNorm is folded into its weights, in one pass over its activations, for inference.
// __init__.py builds and calls it, as a library of its own: training does without it.

#include "conv.h"
#include "depthwise.h"

namespace {

using F32 = ffi::Buffer<ffi::F32>;

// What depthwise.h computes before a product, and perhaps a ReLU before that; without a kernel, nothing.
struct DepthwiseBefore {
  const float* kernel;
  ffi::Span<const int64_t> shape;  // of the kernel
  Size top, left;
  bool relu;
  std::vector<float> zeros;  // as many as a row of x has

  bool Computes() const { return !zeros.empty(); }

  // The convolution at `count` pixels, in the order in which they lie in memory.
  void Compute(const Images& in, const float* x, Size pixel, Size count, float* y) const {
    WithKernel(in.channels, shape, [&]<typename Segment>(auto k, const Segment& segment) {
      for (Size end = pixel + count, step; pixel < end; pixel += step, y += step * in.channels) {
        const Size line = pixel / in.width, column = pixel % in.width;
        step = std::min(end - pixel, in.width - column);
        const auto convolve = relu ? ConvolveRow<k, true, Segment> : ConvolveRow<k, false, Segment>;
        convolve(in, x, kernel, in.channels, line / in.height, line % in.height, column, column + step, top, left, zeros.data(),
                 segment, y, {});
      }
    });
  }
};

// [ReLU] (product + bias [+ residual]), once all of the product's depth is summed.
struct BiasBehind {
  static constexpr bool kComputes = true;
  const float* bias;  // of the packed columns
  const float* residual;  // like y, or none
  bool relu;

  // For the panel whose corner is `offset` values into y, and whose columns begin at `column` of the packed ones.
  BiasBehind At(Size offset, Size column, bool complete) const {
    if (!complete) return {nullptr, nullptr, false};
    return {bias + column, residual ? residual + offset : nullptr, relu};
  }

  template <typename Vector>
  Lanes Compute(Lanes value, const Vector& vector, Size offset, Size column) const {
    if (bias) value += Load<Lanes>(bias + column);
    if (residual) value += vector.Load(residual + offset);
    if (relu) value = value < 0.0f ? Lanes() : value;
    return value;
  }
};

// The weights and constants of `FoldedConv`, once for all its calls.
ffi::Error PackConv(ffi::ThreadPool pool, Input kernel, Input bias, Output packed, Output packed_bias, int64_t segments) {
  const auto k = kernel.dimensions();
  const Size x[] = {1, 1, 1, k[2] * segments}, y[] = {1, 1, 1, k[3]};
  const Convolution conv({x, 4}, k, {y, 4}, segments, 1, 0, 0);
  WithProduct(conv.depth(), conv.filters, [&]<typename Product>(Product) {
    PackKernel<Product>(pool, conv, kernel.typed_data(), false, packed->typed_data());
    const Size columns = PackedColumns<Product>(conv.filters);
    for (Size segment = 0; segment < segments; ++segment) {
      float* to = packed_bias->typed_data() + segment * columns;
      std::fill_n(std::copy_n(bias.typed_data() + segment * conv.filters, conv.filters, to), columns - conv.filters, 0.0f);
    }
  });
  return ffi::Error::Success();
}

// [ReLU] [convolution of depthwise.h] convolution, bias, [residual] [ReLU]. An empty `depthwise` (of no side) or `residual`
// stands for none; before a convolution of depthwise.h may be a ReLU, and the one after it is 1 x 1 of stride 1.
ffi::Error FoldedConv(ffi::ThreadPool pool, Input x, Input packed, Input bias, Input depthwise, Input residual, Output y,
                      int64_t side, int64_t segments, int64_t stride, int64_t top, int64_t left, int64_t height,
                      int64_t width, int64_t relu_first, int64_t relu_last) {
  const Size channels = x.dimensions()[3];
  const Size kernel[] = {height, width, channels / segments, y->dimensions()[3]};
  const Convolution conv(x.dimensions(), {kernel, 4}, y->dimensions(), segments, stride, side ? 0 : top, side ? 0 : left);
  const BiasBehind behind{bias.typed_data(), residual.element_count() ? residual.typed_data() : nullptr, relu_last != 0};
  const DepthwiseBefore before{depthwise.typed_data(), depthwise.dimensions(), top, left, relu_first != 0,
                               std::vector<float>(side ? conv.in.width * channels : 0)};
  WithProduct(conv.depth(), conv.filters, [&]<typename Product>(Product) {
    Multiply<Product>(pool, conv, x.typed_data(), packed.typed_data(), y->typed_data(), before, behind);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pack_conv, PackConv,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>()
                                  .Attr<Size>("segments"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(folded_conv, FoldedConv,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Arg<F32>().Ret<F32>().Attr<Size>("side").Attr<Size>("segments").Attr<Size>("stride")
                                  .Attr<Size>("top").Attr<Size>("left").Attr<Size>("height").Attr<Size>("width")
                                  .Attr<Size>("relu_first").Attr<Size>("relu_last"));

// How many floats `pack_conv` returns for a segment of `depth` values and each of `filters`: of the kernel, of the bias.
extern "C" int64_t packed_size(int64_t depth, int64_t filters) {
  return WithProduct(depth, filters, [&]<typename Product>(Product) {
    return Product::PackedSize(depth, PackedColumns<Product>(filters));
  });
}
extern "C" int64_t packed_bias_size(int64_t depth, int64_t filters) {
  return WithProduct(depth, filters, [&]<typename Product>(Product) { return PackedColumns<Product>(filters); });
}
