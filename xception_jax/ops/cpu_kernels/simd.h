// Vectors of float32 (SIMD), aligned buffers, and the sizes of registers and caches that blocks are derived from.
//
// `Vector` is a vector extension of GCC and Clang: arithmetic on it is element by element, and multiply-adds are fused where
// the processor can. It has 16 lanes with AVX-512 and 8 without; on processors whose registers are narrower the compiler
// splits it.

#pragma once

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <type_traits>

#include "parallel.h"

#ifdef __AVX2__
// Some intrinsics of GCC initialise a register with itself, and GCC warns of it (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#endif

#define UNROLL _Pragma("GCC unroll 16")

#define ALWAYS_INLINE inline __attribute__((always_inline))

// --- Registers and caches ------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int kLanes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kLanes = 8;
constexpr int kVectorRegisters = 16;
#endif
constexpr int kMostLanes = 16;  // of any processor

constexpr Size kLineBytes = 64, kLineFloats = kLineBytes / sizeof(float);  // of a cache line

// Caches of a core of the servers that block sizes are made for (Intel since 2023). They are constants, rather than read from
// the machine, because block sizes decide where sums are cut, and all machines should compute the same bits.
constexpr Size kL1Bytes = 48 << 10, kL2Bytes = 2 << 20;

constexpr Size RoundDown(Size value, Size multiple) { return value / multiple * multiple; }
constexpr Size RoundUp(Size value, Size multiple) { return CeilDiv(value, multiple) * multiple; }

// --- Vectors -------------------------------------------------------------------------------------------------------------

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Indices __attribute__((vector_size(kLanes * sizeof(int32_t))));

inline Vector Load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline void Store(float* to, const Vector& value) { std::memcpy(to, &value, sizeof(value)); }

// Copies a few floats, inline. The last vector overlaps the one before it. Fewer than a vector go in narrower ones.
template <int kWidth = kLanes>
inline void CopyFew(const float* from, Size count, float* to) {
  if (count >= kWidth) {
    for (Size c = 0; c + kWidth < count; c += kWidth) std::memcpy(to + c, from + c, kWidth * sizeof(float));
    std::memcpy(to + count - kWidth, from + count - kWidth, kWidth * sizeof(float));
  } else if constexpr (kWidth > 1) {
    CopyFew<kWidth / 2>(from, count, to);
  }
}

// Loads the first `count` lanes; the others are zero. All lanes for a count of kLanes or more, none for 0 or less.
inline Vector LoadFirst(Size count, const float* from) {
  if (count >= kLanes) return Load(from);
#ifdef __AVX512F__
  return Vector(_mm512_maskz_loadu_ps((1u << std::max<Size>(count, 0)) - 1, from));
#elif defined(__AVX2__)
  constexpr Indices lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return Vector(_mm256_maskload_ps(from, __m256i(lane < int32_t(count))));
#else
  Vector value = {};
  for (Size i = 0; i < count; ++i) value[i] = from[i];
  return value;
#endif
}

// Stores the first `count` lanes, at most kLanes.
inline void StoreFirst(Size count, float* to, Vector value) {
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(to, (1u << count) - 1, __m512(value));
#else
  float buffer[kLanes];
  Store(buffer, value);
  CopyFew(buffer, count, to);
#endif
}

// Returns the vector whose lane i is value[from[i] % kLanes].
inline Vector Permute(Vector value, Indices from) {
#if defined(__AVX512F__)
  return Vector(_mm512_permutexvar_ps(__m512i(from), __m512(value)));
#elif defined(__AVX2__)
  return Vector(_mm256_permutevar8x32_ps(__m256(value), __m256i(from)));
#else
  Vector result;
  for (int i = 0; i < kLanes; ++i) result[i] = value[from[i] % kLanes];
  return result;
#endif
}

inline Vector Relu(Vector value) { return value < 0.0f ? Vector() : value; }  // a NaN stays one

// How neighbouring channels in memory become a vector and back. FullVector: as many channels as lanes.
struct FullVector {
  bool streams = false;  // stores bypass the caches; see `Streams`
  static constexpr Size count = kLanes;
  Vector Load(const float* from) const { return ::Load(from); }
  void Store(float* to, Vector values) const {
#ifdef __AVX512F__
    if (streams) return _mm512_stream_ps(to, __m512(values));
#endif
    ::Store(to, values);
  }
};
// PartialVector: fewer channels than lanes. Nothing beyond them is read or written.
struct PartialVector {
  Size count;
  Vector Load(const float* from) const { return LoadFirst(count, from); }
  void Store(float* to, Vector values) const { StoreFirst(count, to, values); }
};

// Whether an array of `size` floats, in rows of `channels`, should be written with non-temporal stores. Those pay where the
// array is too large for the last-level cache to hold it until it is read: they save fetching the lines that are going to be
// overwritten. They need rows of whole cache lines.
inline bool Streams(const float* array, Size size, Size channels) {
  static const Size cache_bytes = [] {
    Size kibibytes = 0;
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kibibytes;
    return (kibibytes > 0 ? kibibytes : 32 << 10) * 1024;
  }();
  const bool whole_lines =
      kLanes == kLineFloats && channels % kLineFloats == 0 && reinterpret_cast<uintptr_t>(array) % kLineBytes == 0;
  return whole_lines && size * Size(sizeof(float)) >= cache_bytes / 2;
}

// --- Buffers -------------------------------------------------------------------------------------------------------------

struct FreeMemory {
  void operator()(float* floats) const { std::free(floats); }
};
using Buffer = std::unique_ptr<float[], FreeMemory>;

// Returns uninitialised floats that begin at a cache line.
inline Buffer NewBuffer(Size size) {
  return Buffer(static_cast<float*>(std::aligned_alloc(kLineBytes, RoundUp(size * Size(sizeof(float)), kLineBytes))));
}
