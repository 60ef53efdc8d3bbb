// What all kernels share: work for XLA's threads, and registers full of floats.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

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
      // Counting also waits for what was written past the caches: x86 does before every locked instruction.
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
inline void AddParts(ffi::ThreadPool& pool, std::span<const float> parts, Size size, float* sum) {
  const Parts ranges(size, 4096);
  ParallelFor(pool, ranges.count, [&](Size range) {
    const Size begin = ranges.begin(range), end = ranges.begin(range + 1);
    std::fill(sum + begin, sum + end, 0.0f);
    for (const float* part = parts.data(); part < parts.data() + parts.size(); part += size)
      for (Size k = begin; k < end; ++k) sum[k] += part[k];
  });
}

constexpr Size kLine = 64 / sizeof(float);  // floats in a line of the cache

inline Size Ceil(Size a, Size b) { return (a + b - 1) / b; }

// Floats that begin where a line of the cache does, not initialised.
struct Free {
  void operator()(float* floats) const { std::free(floats); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer NewBuffer(Size size) {
  return Buffer(static_cast<float*>(std::aligned_alloc(64, Ceil(size, 16) * 64)));
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

// Up to kLanes floats, zeros behind them.
inline Lanes LoadUpTo(Size count, const float* from) {
  if (count >= kLanes) return Load<Lanes>(from);
#ifdef __AVX512F__
  return Lanes(_mm512_maskz_loadu_ps((1u << std::max<Size>(count, 0)) - 1, from));
#else
  Lanes value = {};
  for (Size i = 0; i < count; ++i) value[i] = from[i];
  return value;
#endif
}

inline void StoreUpTo(Size count, float* to, Lanes value) {
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(to, (1u << count) - 1, __m512(value));
#else
  for (Size i = 0; i < count; ++i) to[i] = value[i];
#endif
}

// All lanes with the same value, in a register: a compiler may else load it anew for each use.
inline Lanes Broadcast(float value) {
  Lanes lanes = value - Lanes();
#ifdef __AVX512F__
  asm("" : "+v"(lanes));
#endif
  return lanes;
}

// Lane i of the result is lane from[i] of the value, counted round and round.
typedef int32_t Indices __attribute__((vector_size(kLanes * sizeof(int32_t))));
inline Lanes Permute(Lanes value, Indices from) {
#if defined(__AVX512F__)
  return Lanes(_mm512_permutexvar_ps(__m512i(from), __m512(value)));
#elif defined(__AVX2__)
  return Lanes(_mm256_permutevar8x32_ps(__m256(value), __m256i(from)));
#else
  Lanes result;
  for (int i = 0; i < kLanes; ++i) result[i] = value[from[i] % kLanes];
  return result;
#endif
}

// Copies some floats, too few to call a function for. The last ones go together with some before them.
template <int kTogether = kLanes>
inline void CopyFew(const float* from, Size count, float* to) {
  if (count >= kTogether) {
    for (Size c = 0; c + kTogether < count; c += kTogether) std::memcpy(to + c, from + c, kTogether * sizeof(float));
    std::memcpy(to + count - kTogether, from + count - kTogether, kTogether * sizeof(float));
  } else if constexpr (kTogether > 1) {
    CopyFew<kTogether / 2>(from, count, to);
  }
}

// Whether rows of `channels` of an array of `size` floats are better written past the caches: those would not keep it until
// it is read, and would fetch the lines that are to be overwritten. Lines have to be written whole.
inline bool Streams(const float* array, Size size, Size channels) {
  static const Size cache = [] {
    Size kilobytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kilobytes;
    return (kilobytes > 0 ? kilobytes : 32 << 10) * 1024;
  }();
  const bool whole_lines = kLanes == kLine && channels % kLine == 0 && reinterpret_cast<uintptr_t>(array) % 64 == 0;
  return whole_lines && size * Size(sizeof(float)) >= cache / 2;
}

// Neighbouring channels: as many as a vector has lanes, or fewer.
struct WholeVector {
  bool streams = false;
  static constexpr Size count = kLanes;
  Lanes Load(const float* from) const { return ::Load<Lanes>(from); }
  void Store(float* to, Lanes values) const {
#ifdef __AVX512F__
    if (streams) return _mm512_stream_ps(to, __m512(values));
#endif
    ::Store(to, values);
  }
};
struct PartOfVector {
  Size count;
  Lanes Load(const float* from) const { return LoadUpTo(count, from); }
  void Store(float* to, Lanes values) const { StoreUpTo(count, to, values); }
};

#define UNROLL _Pragma("GCC unroll 16")

#define ALWAYS_INLINE inline __attribute__((always_inline))
