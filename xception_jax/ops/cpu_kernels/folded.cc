// Layers of a network whose BatchNorm is folded into its weights, as FFI handlers for inference:
//
//   [ReLU] [depthwise convolution] convolution, + bias, [+ residual] [ReLU]
//
// is one kernel, so that activations are read and written once. __init__.py builds this file, as a library of its own: training
// does not wait for it to compile.

#include "conv.h"
#include "depthwise.h"

namespace {

using F32 = ffi::Buffer<ffi::F32>;

// Computes [ReLU] [a convolution of depthwise.h] for a block of pixels. Disabled without a kernel.
struct DepthwisePrologue {
  const float* kernel;
  ffi::Span<const int64_t> shape;  // of the kernel
  Size top, left;
  bool relu;
  std::vector<float> zeros;  // a row of x; empty if disabled

  bool Enabled() const { return !zeros.empty(); }

  // Computes `count` pixels from `pixel` on, in memory order.
  void Compute(const ImageShape& in, const float* x, Size pixel, Size count, float* y) const {
    WithKernel(in.channels, shape, [&]<typename Segment>(auto k, const Segment& segment) {
      const auto convolve = relu ? ConvolveRow<k, true, Segment> : ConvolveRow<k, false, Segment>;
      for (Size end = pixel + count, step; pixel < end; pixel += step, y += step * in.channels) {
        const Size row = pixel / in.width, column = pixel % in.width;
        step = std::min(end - pixel, in.width - column);
        convolve(in, x, kernel, in.channels, row / in.height, row % in.height, column, column + step, top, left, zeros.data(),
                 segment, y, {});
      }
    });
  }
};

// [ReLU] (sum + bias [+ residual]), where the whole depth has been summed.
struct BiasResidualRelu {
  static constexpr bool kEnabled = true;
  const float* bias;      // of the packed columns; nullptr: nothing to do
  const float* residual;  // in the layout of y, or nullptr
  bool relu;

  // Returns the epilogue of a panel whose corner is at y + offset, and whose first packed column is `column`.
  BiasResidualRelu ForPanel(Size offset, Size column, bool last_depth_block) const {
    if (!last_depth_block) return {nullptr, nullptr, false};
    return {bias + column, residual ? residual + offset : nullptr, relu};
  }

  template <typename Access>
  Vector Apply(Vector value, const Access& access, Size offset, Size column) const {
    if (bias) value += Load(bias + column);
    if (residual) value += access.Load(residual + offset);
    return relu ? Relu(value) : value;
  }
};

// Packs the kernel and the bias for `FoldedConv`, once for all its calls.
ffi::Error PackConv(ffi::ThreadPool pool, Input kernel, Input bias, Output packed, Output packed_bias, bool use_amx,
                    int64_t segments) {
  const auto k = kernel.dimensions();
  const Size x[] = {1, 1, 1, k[2] * segments}, y[] = {1, 1, 1, k[3]};
  const Convolution conv({x, 4}, k, {y, 4}, segments, 1, 0, 0);
  WithGemm(use_amx, conv.depth(), conv.filters, [&]<typename Gemm>(Gemm) {
    PackKernel<Gemm>(pool, conv, kernel.typed_data(), false, packed->typed_data());
    const Size columns = PackedColumns<Gemm>(conv.filters);
    for (Size segment = 0; segment < segments; ++segment) {
      float* to = packed_bias->typed_data() + segment * columns;
      std::fill_n(std::copy_n(bias.typed_data() + segment * conv.filters, conv.filters, to), columns - conv.filters, 0.0f);
    }
  });
  return ffi::Error::Success();
}

// `depthwise` is a kernel [k, k, channels of a segment, channels], or an empty vector for none; `residual` may also be empty.
// With a depthwise convolution, `top` and `left` are its padding, and the other convolution is 1 x 1 of stride 1. `relu_first`
// is for a depthwise convolution only.
ffi::Error FoldedConv(ffi::ThreadPool pool, Input x, Input packed, Input bias, Input depthwise, Input residual, Output y,
                      bool use_amx, int64_t segments, int64_t stride, int64_t top, int64_t left, int64_t height, int64_t width,
                      bool relu_first, bool relu_last) {
  const Size channels = x.dimensions()[3];
  const Size kernel[] = {height, width, channels / segments, y->dimensions()[3]};
  const bool has_depthwise = depthwise.element_count() > 0;
  const Convolution conv(x.dimensions(), {kernel, 4}, y->dimensions(), segments, stride, has_depthwise ? 0 : top,
                         has_depthwise ? 0 : left);
  const BiasResidualRelu epilogue{bias.typed_data(), residual.element_count() ? residual.typed_data() : nullptr, relu_last};
  const DepthwisePrologue prologue{depthwise.typed_data(), depthwise.dimensions(), top, left, relu_first,
                                   std::vector<float>(has_depthwise ? conv.in.width * channels : 0)};
  return WithGemm(use_amx, conv.depth(), conv.filters, [&]<typename Gemm>(Gemm) {
    if (Size(packed.element_count()) != segments * Gemm::PackedSize(conv.depth(), PackedColumns<Gemm>(conv.filters)))
      return ffi::Error::InvalidArgument("the kernel was packed for other products: see XCEPTION_JAX_CPU_KERNELS");
    Forward<Gemm>(pool, conv, x.typed_data(), packed.typed_data(), y->typed_data(), prologue, epilogue);
    return ffi::Error::Success();
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(pack_conv, PackConv,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<F32>().Ret<F32>()
                                  .Attr<bool>("use_amx").Attr<Size>("segments"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(folded_conv, FoldedConv,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Arg<F32>().Ret<F32>().Attr<bool>("use_amx").Attr<Size>("segments").Attr<Size>("stride")
                                  .Attr<Size>("top").Attr<Size>("left").Attr<Size>("height").Attr<Size>("width")
                                  .Attr<bool>("relu_first").Attr<bool>("relu_last"));

// Sizes of the results of `pack_conv` for one segment, in floats.
extern "C" int64_t packed_size(bool use_amx, int64_t depth, int64_t filters) {
  return WithGemm(use_amx, depth, filters, [&]<typename Gemm>(Gemm) {
    return Gemm::PackedSize(depth, PackedColumns<Gemm>(filters));
  });
}
extern "C" int64_t packed_bias_size(bool use_amx, int64_t depth, int64_t filters) {
  return WithGemm(use_amx, depth, filters, [&]<typename Gemm>(Gemm) { return PackedColumns<Gemm>(filters); });
}
