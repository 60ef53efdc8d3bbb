// The operations that XLA lowers badly for a CPU: float32, NHWC. __init__.py builds and calls them.
//
// Loops over channels are innermost, contiguous and free of dependences, so that the compiler vectorises them. Sums are
// cut into the same parts whatever the number of threads is: no result depends on it.

#include "conv.h"
#include "depthwise.h"
#include "max_pool.h"

namespace {

using F32 = ffi::Buffer<ffi::F32>;

auto Binding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(conv, Conv,
                              Binding().Arg<F32>().Arg<F32>().Ret<F32>().Attr<Size>("segments").Attr<Size>("stride")
                                  .Attr<Size>("top").Attr<Size>("left").Attr<Size>("turned"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(conv_filter_gradient, ConvFilterGradient,
                              Binding().Arg<F32>().Arg<F32>().Ret<F32>().Attr<Size>("segments").Attr<Size>("stride")
                                  .Attr<Size>("top").Attr<Size>("left"));
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
