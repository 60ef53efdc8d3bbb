// Fuzzes the shapes of the CPU kernels: small images, windows, strides, paddings and numbers of channels.
//
// Every buffer has exactly the size that its shape says, so that the address sanitizer finds each read and write beside it. All
// values are ones, so that every sum is a whole number, which is compared. With -DREPLAY, the program runs the inputs in the
// files that it is given, without a fuzzer.

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "conv.h"
#include "depthwise.h"
#include "max_pool.h"

namespace {

using F32 = ffi::Buffer<ffi::F32>;

// A float32 array of four dimensions, aligned as those of XLA.
struct Array {
  std::vector<int64_t> shape;
  Size count;
  float* data;
  XLA_FFI_Buffer buffer{};

  Array(std::vector<int64_t> dimensions, float value) : shape(std::move(dimensions)), count(1) {
    for (const int64_t side : shape) count *= side;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, count * sizeof(float))) std::abort();
    data = static_cast<float*>(memory);
    std::fill(data, data + count, value);
    buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    buffer.dtype = XLA_FFI_DataType_F32;
    buffer.data = data;
    buffer.rank = 4;
    buffer.dims = shape.data();
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }

  F32 input() { return F32(&buffer); }
  Output output() { return Output(F32(&buffer)); }
};

// Runs the tasks of a pool of three threads at once, in the calling thread.
ffi::ThreadPool Pool() {
  static XLA_FFI_Api api = [] {
    XLA_FFI_Api functions{};
    functions.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) -> XLA_FFI_Error* {
      *args->num_threads = 3;
      return nullptr;
    };
    functions.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) -> XLA_FFI_Error* {
      args->task(args->data);
      return nullptr;
    };
    return functions;
  }();
  static ffi::DiagnosticEngine diagnostic;
  return *ffi::CtxDecoding<ffi::ThreadPool>::Decode(&api, nullptr, diagnostic);
}

// Reads numbers from the input, zeros after its end.
struct Numbers {
  const uint8_t* data;
  size_t left;
  Size operator()(Size low, Size high) {
    const Size value = left ? *data : 0;
    if (left) ++data, --left;
    return low + value % (high - low + 1);
  }
};

void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::abort();
}

// Number of positions of a window that lie inside of the image, along one axis.
Size Inside(Size position, Size stride, Size pad, Size window, Size size) {
  Size count = 0;
  for (Size k = 0; k < window; ++k) {
    const Size at = position * stride - pad + k;
    count += at >= 0 && at < size;
  }
  return count;
}

struct Shape {
  Size batch, height, width, rows, columns, window, stride, top, left;
};

// Checks y, in which each value must be the number of values that its window sees, times `channels`.
void CheckSums(const Array& y, const Shape& s, Size channels) {
  const float* value = y.data;
  for (Size image = 0; image < s.batch; ++image)
    for (Size row = 0; row < s.rows; ++row)
      for (Size column = 0; column < s.columns; ++column) {
        const Size seen = Inside(row, s.stride, s.top, s.window, s.height) * Inside(column, s.stride, s.left, s.window, s.width);
        for (Size filter = 0; filter < y.shape[3]; ++filter, ++value) Require(*value == float(seen * channels), "a sum");
      }
}

void Run(const uint8_t* data, size_t size) {
  Numbers next{data, size};
  const Size kind = next(0, 5);
  Shape s{};
  s.batch = next(1, 3), s.height = next(1, 24), s.width = next(1, 24);
  const bool is_depthwise = kind == 2 || kind == 3;
  s.window = is_depthwise ? 3 + 2 * next(0, 2) : next(1, 7);
  const bool transposed = kind == 0 && next(0, 1);
  s.stride = is_depthwise || transposed ? 1 : next(1, 3);
  s.top = next(0, s.window - 1), s.left = next(0, s.window - 1);
  const Size bottom = next(0, s.window - 1), right = next(0, s.window - 1);
  if (s.height + s.top + bottom < s.window || s.width + s.left + right < s.window) return;
  s.rows = (s.height + s.top + bottom - s.window) / s.stride + 1;
  s.columns = (s.width + s.left + right - s.window) / s.stride + 1;
  const Size segments = next(1, 9);
  const bool few = is_depthwise && s.window == 3 && next(0, 1);  // channels in a segment, and its filters
  const Size channels = is_depthwise ? (few ? next(1, 8) : 1) : next(1, 40);
  const Size filters = is_depthwise ? (few ? next(1, 8) : 1) : next(1, 40);
  const Size groups = is_depthwise && !few ? segments * next(1, 9) : segments;

  Array x({s.batch, s.height, s.width, groups * channels}, 1);
  if (kind >= 4) {
    // Pooling pads with less than a window, so every window sees a value.
    Array y({s.batch, s.rows, s.columns, x.shape[3]}, -1);
    MaxPool(Pool(), x.input(), y.output(), s.window, s.stride, s.top, s.left);
    for (Size i = 0; i < y.count; ++i) Require(y.data[i] == 1, "a maximum");
    if (kind == 5) {
      Array dy({s.batch, s.rows, s.columns, x.shape[3]}, 1), dx(x.shape, -1);
      MaxPoolGradient(Pool(), x.input(), y.input(), dy.input(), dx.output(), s.window, s.stride, s.top, s.left);
      double sum = 0;
      for (Size i = 0; i < dx.count; ++i) sum += dx.data[i];
      Require(sum == double(dy.count), "a gradient of max pooling");
    }
    return;
  }
  Array y({s.batch, s.rows, s.columns, groups * filters}, kind % 2 ? 1 : -1);
  Array kernel({s.window, s.window, channels, groups * filters}, kind % 2 ? -1 : 1);
  if (kind == 0 && transposed) {
    // The gradient for x: y and x change places.
    Array back({s.window, s.window, filters, groups * channels}, 1);
    Conv(Pool(), x.input(), back.input(), y.output(), false, groups, 1, s.top, s.left, true);
    CheckSums(y, s, channels);
  } else if (kind == 0) {
    Conv(Pool(), x.input(), kernel.input(), y.output(), false, groups, s.stride, s.top, s.left, false);
    CheckSums(y, s, channels);
  } else if (kind == 1) {
    ConvFilterGradient(Pool(), x.input(), y.input(), kernel.output(), false, groups, s.stride, s.top, s.left);
  } else if (kind == 2) {
    Depthwise(Pool(), x.input(), kernel.input(), y.output(), s.top, s.left);
    CheckSums(y, s, channels);
  } else {
    DepthwiseFilterGradient(Pool(), x.input(), y.input(), kernel.output(), s.top, s.left);
  }
  if (kind % 2) {
    double sum = 0, expected = 0;
    for (Size i = 0; i < kernel.count; ++i) sum += kernel.data[i];
    for (Size row = 0; row < s.rows; ++row)
      for (Size column = 0; column < s.columns; ++column)
        expected += Inside(row, s.stride, s.top, s.window, s.height) * Inside(column, s.stride, s.left, s.window, s.width);
    Require(sum == expected * s.batch * channels * groups * filters, "a gradient of the kernel");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Run(data, size);
  return 0;
}

#ifdef REPLAY
int main(int count, char** paths) {
  for (int i = 1; i < count; ++i) {
    std::ifstream file(paths[i], std::ios::binary);
    const std::vector<char> data((std::istreambuf_iterator<char>(file)), {});
    std::printf("%s\n", paths[i]);
    std::fflush(stdout);
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(data.data()), data.size());
  }
}
#endif
