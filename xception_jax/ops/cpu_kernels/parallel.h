// Parallel loops on the threads of XLA's pool, and sums that are computed in parts.
//
// Work is cut into the same parts whatever the number of threads is, wherever the cut changes the order of additions.
// Results therefore have the same bits on any number of cores.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

using Input = ffi::Buffer<ffi::F32>;
using Output = ffi::Result<ffi::Buffer<ffi::F32>>;
using Size = int64_t;

constexpr Size CeilDiv(Size a, Size b) { return (a + b - 1) / b; }

// Calls work(0) ... work(count - 1) on the threads of the pool. The calling thread takes part, so that it never waits for a
// task that no thread has started.
template <typename Work>
void ParallelFor(ffi::ThreadPool& pool, Size count, const Work& work) {
  struct Progress {
    std::atomic<Size> next{0}, done{0};
  };
  // Shared: a helper that starts late still reads `next` after this function has returned.
  auto progress = std::make_shared<Progress>();
  auto take = [progress, count, &work] {
    for (Size i; (i = progress->next.fetch_add(1)) < count;) {
      work(i);
      // On x86 the locked instruction also completes the non-temporal stores of `work`.
      if (progress->done.fetch_add(1) + 1 == count) progress->done.notify_all();
    }
  };
  for (Size helper = 1; helper < std::min<Size>(pool.num_threads(), count); ++helper) pool.Schedule(decltype(take)(take));
  take();
  for (Size done; (done = progress->done.load()) < count;) progress->done.wait(done);
}

// Cuts `items` into parts of at least `least` items, at most kMost of them: enough to balance any number of cores that this
// code meets, and few enough that a partial sum of each is cheap.
struct Parts {
  static constexpr Size kMost = 64;
  Size items, count;
  Parts(Size items, Size least) : items(items), count(std::clamp<Size>(items / least, 1, kMost)) {}
  Size begin(Size part) const { return items * part / count; }
};

// Stores the sum of `parts`, arrays of `size` values one after the other, in `sum`. They are added in their order.
inline void SumParts(ffi::ThreadPool& pool, std::span<const float> parts, Size size, float* sum) {
  constexpr Size kLeastValues = 4096;  // 16 KiB: less work than this is not worth another thread
  const Parts ranges(size, kLeastValues);
  ParallelFor(pool, ranges.count, [&](Size range) {
    const Size begin = ranges.begin(range), end = ranges.begin(range + 1);
    std::fill(sum + begin, sum + end, 0.0f);
    for (const float* part = parts.data(); part < parts.data() + parts.size(); part += size)
      for (Size k = begin; k < end; ++k) sum[k] += part[k];
  });
}
