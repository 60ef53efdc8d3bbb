// The operations that XLA lowers badly for a CPU, as FFI handlers: float32, NHWC. __init__.py builds this file and calls them.

#include "conv.h"
#include "depthwise.h"
#include "max_pool.h"

namespace {

using F32 = ffi::Buffer<ffi::F32>;

auto Binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(conv, Conv,
                              Binding().Arg<F32>().Arg<F32>().Ret<F32>().Attr<bool>("use_amx").Attr<Size>("segments")
                                  .Attr<Size>("stride").Attr<Size>("top").Attr<Size>("left").Attr<bool>("transposed"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(conv_filter_gradient, ConvFilterGradient,
                              Binding().Arg<F32>().Arg<F32>().Ret<F32>().Attr<bool>("use_amx").Attr<Size>("segments")
                                  .Attr<Size>("stride").Attr<Size>("top").Attr<Size>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise, Depthwise,
                              Binding().Arg<F32>().Arg<F32>().Ret<F32>().Attr<Size>("top").Attr<Size>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(depthwise_filter_gradient, DepthwiseFilterGradient,
                              Binding().Arg<F32>().Arg<F32>().Ret<F32>().Attr<Size>("top").Attr<Size>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool, MaxPool,
                              Binding().Arg<F32>().Ret<F32>().Attr<Size>("window").Attr<Size>("stride")
                                  .Attr<Size>("top").Attr<Size>("left"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(max_pool_gradient, MaxPoolGradient,
                              Binding().Arg<F32>().Arg<F32>().Arg<F32>().Ret<F32>().Attr<Size>("window")
                                  .Attr<Size>("stride").Attr<Size>("top").Attr<Size>("left"));
