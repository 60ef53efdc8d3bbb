// Convolution with any number of segments as matrix products (GEMM), forward and for the filter gradient; the input gradient
// at stride 1 is a forward convolution with the transposed kernel.
//
//   Forward          y [pixels, filters]    = X [pixels, depth]     kernel [depth, filters]     for each segment
//   FilterGradient   dk [depth, filters]    = X^T [depth, pixels]   dy [pixels, filters]
//
// geometry.h says what pixels, depth and X are. This file has the loops around the products; a `Gemm` class has the products
// themselves: FmaGemm (fma.h) by fused multiply-adds, AmxGemm (amx.h) in the tile registers of newer Intel processors. Both
// work the way of Goto and van de Geijn (2008), and have the same members:
//
//   tile    kTileRows rows x the columns of a panel: what the micro-kernel computes at a time, in registers
//   panel   columns of the right-hand matrix, in the order in which the micro-kernel reads them (packed)
//   block   rows and depth of the left-hand matrix that stay in the L2 cache while all panels are multiplied with them
//
//   kTileRows                              rows of a tile
//   kBlockPixels, kBlockDepth              size of a block, forward
//   kGradientRows, kGradientPixels         size of a block of X^T
//   kSkipsPadding                          whether a tile that reads only padding at a tap is not multiplied there
//   Panels(columns)                        number of panels
//   PanelBegin(columns, panel)             first column of a panel; for panel = Panels(columns), the columns with zero padding
//   PackedSize(depth, columns)             floats of packed panels
//   PackPanel(b, stride, depth, columns, to)   packs columns of b, whose rows are `stride` floats apart
//   ForwardBlock                           a block of X:  .Read(...), then .Multiply(panel, output)
//   GradientBlock                          one of X^T:    .Read(...), then .Multiply(dy, stride, output)
//
// A prologue computes what the convolution reads, a block at a time, while it is in the cache; an epilogue is applied to each
// value before it is stored. folded.cc has both; training has neither (NoPrologue, NoEpilogue).

#pragma once

#include "fma.h"
#ifdef __AMX_BF16__
#include "amx.h"
#endif

// Calls f with the Gemm for matrices of this depth and number of filters. `use_amx`: the process may use AMX.
template <typename F>
auto WithGemm([[maybe_unused]] bool use_amx, [[maybe_unused]] Size depth, [[maybe_unused]] Size filters, const F& f) {
#ifdef __AMX_BF16__
  // With less, splitting and packing the matrices takes longer than AMX saves (measured).
  constexpr Size kLeastForAmx = 64;
  if (use_amx && std::min(depth, filters) >= kLeastForAmx) return f(AmxGemm());
#endif
  return f(FmaGemm());
}

struct NoPrologue {
  bool Enabled() const { return false; }
  void Compute(const ImageShape&, const float*, Size, Size, float*) const {}
};

struct NoEpilogue {
  static constexpr bool kEnabled = false;
  NoEpilogue ForPanel(Size, Size, bool) const { return {}; }
};

// Row offsets of an output: equally spaced,
struct StridedRows {
  Size stride;
  Size operator()(Size row) const { return row * stride; }
};
// or from a table.
struct IndexedRows {
  const Size* offsets;
  Size operator()(Size row) const { return offsets[row]; }
};

// Where the product with a panel is stored: rows at corner + rows(row), of `columns` floats.
template <typename Rows, typename Epilogue>
struct OutputPanel {
  float* corner;
  Rows rows;
  Size columns;
  bool accumulate;  // adds to the values there
  bool streams;     // stores bypass the caches
  Epilogue epilogue;

  // Fetches what `Store` will write, while the sums are computed. Inlined by force: GCC drops calls of a function that only
  // prefetches.
  ALWAYS_INLINE void Prefetch(Size row, Size count) const {
    if (streams) return;
    for (const Size end = row + count; row < end; ++row)
      for (Size c = 0; c < columns + kLineFloats - 1; c += kLineFloats)
        __builtin_prefetch(corner + rows(row) + std::min(c, columns - 1), 1);
  }

  // Stores some rows of sums, each V vectors wide.
  template <int V>
  ALWAYS_INLINE void Store(Size row, const Vector (*sums)[V], Size count) const {
    UNROLL for (int v = 0; v < V; ++v) {
      const auto store = [&](const auto& access) {
        for (Size r = 0; r < count; ++r) {
          const Size offset = rows(row + r) + v * kLanes;
          Vector value = accumulate ? access.Load(corner + offset) + sums[r][v] : sums[r][v];
          if constexpr (Epilogue::kEnabled) value = epilogue.Apply(value, access, offset, v * kLanes);
          access.Store(corner + offset, value);
        }
      };
      if (const Size left = columns - v * kLanes; left >= kLanes) store(FullVector{streams});
      else if (left > 0) store(PartialVector{left});
    }
  }
};

// Returns (first column, number of columns) of a panel.
template <typename Gemm>
std::pair<Size, Size> PanelColumns(Size columns, Size panel) {
  const Size begin = Gemm::PanelBegin(columns, panel);
  return {begin, std::min(Gemm::PanelBegin(columns, panel + 1), columns) - begin};
}

// Returns how many columns the packed panels of a segment have, padding included.
template <typename Gemm>
Size PackedColumns(Size filters) { return Gemm::PanelBegin(filters, Gemm::Panels(filters)); }

// Returns the offset of a packed panel. Their order is [segment][depth block][panel].
template <typename Gemm>
Size PanelOffset(const Convolution& conv, Size segment, const DepthBlock& block, Size panel) {
  const Size columns = PackedColumns<Gemm>(conv.filters);
  return segment * Gemm::PackedSize(conv.depth(), columns) + Gemm::PackedSize(block.begin, columns) +
         Gemm::PackedSize(block.depth, Gemm::PanelBegin(conv.filters, panel));
}

// Packs a kernel [depth][all filters]. With `transposed`, `kernel` belongs to the convolution of which `conv` is the input
// gradient, so that its layout is [taps in reverse order][filters of a segment][segment][channels of a segment].
template <typename Gemm>
void PackKernel(ffi::ThreadPool& pool, const Convolution& conv, const float* kernel, bool transposed, float* packed) {
  constexpr Size kTransposedChannels = 64;  // their lines, one a channel, stay in the L1 cache until all columns are written
  const std::vector<DepthBlock> blocks = conv.DepthBlocks(Gemm::kBlockDepth);
  const Size panels = Gemm::Panels(conv.filters);
  ParallelFor(pool, conv.segments * panels, [&](Size task) {
    const Size segment = task / panels, panel = task % panels;
    const auto [first, columns] = PanelColumns<Gemm>(conv.filters, panel);
    const Buffer buffer = transposed ? NewBuffer(Gemm::kBlockDepth * columns) : nullptr;
    for (const DepthBlock& block : blocks) {
      float* to = packed + PanelOffset<Gemm>(conv, segment, block, panel);
      if (!transposed) {
        const float* corner = kernel + block.begin * conv.out.channels + segment * conv.filters + first;
        Gemm::PackPanel(corner, conv.out.channels, block.depth, columns, to);
        continue;
      }
      float* at = buffer.get();
      for (const Chunk& chunk : block.chunks) {
        const Size row = (conv.taps - 1 - chunk.tap) * conv.filters + first;
        const float* from = kernel + row * conv.in.channels + segment * conv.channels + chunk.channel;
        for (Size begin = 0; begin < chunk.size; begin += kTransposedChannels)
          for (Size column = 0; column < columns; ++column)
            for (Size c = begin; c < std::min(chunk.size, begin + kTransposedChannels); ++c)
              at[c * columns + column] = from[column * conv.in.channels + c];
        at += chunk.size * columns;
      }
      Gemm::PackPanel(buffer.get(), columns, block.depth, columns, to);
    }
  });
}

// y = X kernel, with the kernel packed. Blocks of pixels run in parallel; in each, for segments, blocks of the depth, panels.
template <typename Gemm, typename Prologue = NoPrologue, typename Epilogue = NoEpilogue>
void Forward(ffi::ThreadPool& pool, Convolution conv, const float* x, const float* packed, float* y,
             const Prologue& prologue = {}, const Epilogue& epilogue = {}) {
  if (Gemm::kSkipsPadding) conv.InterleaveImages();
  const Size panels = Gemm::Panels(conv.filters), pixels = conv.pixels(), tiles = CeilDiv(pixels, Gemm::kTileRows);
  const std::vector<DepthBlock> depth_blocks = conv.DepthBlocks(Gemm::kBlockDepth);
  const bool streams = depth_blocks.size() == 1 && conv.filters % kLanes == 0 &&
                       Streams(y, pixels * conv.out.channels, conv.out.channels);
  // The same number of blocks for each thread. At least two, unless they had fewer than four tiles: cores are not equally fast.
  const Size threads = std::max<Size>(pool.num_threads(), 1);
  const Size least = std::max(CeilDiv(pixels, Gemm::kBlockPixels), std::min(2 * threads, tiles / 4));
  const Size blocks = RoundUp(least, threads);
  ParallelFor(pool, blocks, [&](Size block) {
    const Size begin = tiles * block / blocks * Gemm::kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * Gemm::kTileRows, pixels) - begin;
    if (rows <= 0) return;
    std::vector<const float*> input(conv.taps * Gemm::kBlockPixels);  // [tap][row]
    std::unique_ptr<float[]> computed(prologue.Enabled() ? new float[rows * conv.in.channels] : nullptr);
    if (prologue.Enabled()) prologue.Compute(conv.in, x, begin, rows, computed.get());
    auto pixel = conv.PixelAt(begin);
    Size offsets[Gemm::kBlockPixels];
    for (Size row = 0; row < rows; ++row, pixel = conv.Next(pixel)) {
      offsets[row] = conv.OutputOffset(pixel);
      for (Size tap = 0; tap < conv.taps; ++tap)
        input[tap * Gemm::kBlockPixels + row] =
            prologue.Enabled() ? computed.get() + row * conv.in.channels : conv.InputAt(x, pixel, tap);
    }
    typename Gemm::ForwardBlock a;
    for (Size segment = 0; segment < conv.segments; ++segment) {
      for (const DepthBlock& depth_block : depth_blocks) {
        a.Read(input.data(), conv.zeros.data(), segment * conv.channels, depth_block, rows);
        for (Size panel = 0; panel < panels; ++panel) {
          const auto [first, columns] = PanelColumns<Gemm>(conv.filters, panel);
          const Size corner = segment * conv.filters + first;
          const Size packed_column = segment * PackedColumns<Gemm>(conv.filters) + first;
          const auto panel_epilogue = epilogue.ForPanel(corner, packed_column, &depth_block == &depth_blocks.back());
          const OutputPanel<IndexedRows, Epilogue> output{
              y + corner, {offsets}, columns, depth_block.begin > 0, streams, panel_epilogue};
          a.Multiply(packed + PanelOffset<Gemm>(conv, segment, depth_block, panel), output);
        }
      }
    }
  });
}

// dk = X^T dy. Tasks are a segment, a block of rows (of the depth) and a part of the pixels. The parts have sums of their own,
// which are added at the end.
template <typename Gemm>
void FilterGradient(ffi::ThreadPool& pool, Convolution conv, const float* x, const float* dy, float* kernel) {
  // Parts of the pixels depend on the shapes only, not on the number of threads: they decide where sums are cut.
  constexpr Size kTasks = 32;  // enough to balance; more would need more memory for sums
  constexpr Size kLeastPixels = 3 * FmaGemm::kGradientPixels;  // of a part: adding up its sums is then a small share of its work
  constexpr Size kMostSums = 2 << 20;  // values in the sums of all parts, 8 MiB
  if (Gemm::kSkipsPadding) conv.InterleaveImages();
  const Size depth = conv.depth(), panels = Gemm::Panels(conv.filters), pixels = conv.pixels();
  const Size size = depth * conv.out.channels, tiles = CeilDiv(depth, Gemm::kTileRows);
  const Size segments = conv.segments, threads = std::max<Size>(pool.num_threads(), 1);
  Size blocks = CeilDiv(depth, Gemm::kGradientRows);
  const Size most = std::max<Size>(std::min(pixels / kLeastPixels, kMostSums / size), 1);
  const Size parts = std::clamp<Size>(CeilDiv(kTasks, blocks * segments), 1, most);
  // With few tasks, the same number for each thread. Blocks of rows, unlike parts, do not change sums.
  if (parts * segments * blocks < 4 * threads) blocks = std::min(RoundUp(blocks, threads), tiles);
  std::unique_ptr<float[]> sums(parts > 1 ? new float[parts * size] : nullptr);
  if (pixels == 0) std::fill_n(kernel, size, 0.0f);
  float* result = parts > 1 ? sums.get() : kernel;
  ParallelFor(pool, parts * segments * blocks, [&](Size task) {
    const Size part = task / (segments * blocks), segment = task / blocks % segments, block = task % blocks;
    const Size begin = pixels * part / parts, end = pixels * (part + 1) / parts;
    const Size first_row = tiles * block / blocks * Gemm::kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * Gemm::kTileRows, depth) - first_row;
    typename Gemm::GradientBlock a;
    float* corner = result + part * size + first_row * conv.out.channels + segment * conv.filters;
    for (Size pixel = begin, count; pixel < end; pixel += count) {
      count = std::min({Gemm::kGradientPixels, end - pixel, conv.EvenlySpaced(pixel)});
      a.Read(conv, x, segment, first_row, rows, pixel, count);
      const float* gradient = dy + conv.OutputOffset(conv.PixelAt(pixel)) + segment * conv.filters;
      for (Size panel = 0; panel < panels; ++panel) {
        const auto [first, columns] = PanelColumns<Gemm>(conv.filters, panel);
        const OutputPanel<StridedRows, NoEpilogue> output{
            corner + first, {conv.out.channels}, columns, pixel > begin, /*streams=*/false, {}};
        a.Multiply(gradient + first, conv.OutputStep(), output);
      }
    }
  });
  if (parts > 1) SumParts(pool, {sums.get(), size_t(parts * size)}, size, kernel);
}

// The handlers. With `transposed`, `kernel` belongs to the convolution of which this is the input gradient.
inline ffi::Error Conv(ffi::ThreadPool pool, Input x, Input kernel, Output y, bool use_amx, int64_t segments, int64_t stride,
                       int64_t top, int64_t left, bool transposed) {
  const auto k = kernel.dimensions();
  const Size transposed_shape[] = {k[0], k[1], k[3] / segments, k[2] * segments};
  const Convolution conv(x.dimensions(), transposed ? ffi::Span<const Size>(transposed_shape, 4) : k, y->dimensions(),
                         segments, stride, top, left);
  WithGemm(use_amx, conv.depth(), conv.filters, [&]<typename Gemm>(Gemm) {
    const Buffer packed = NewBuffer(segments * Gemm::PackedSize(conv.depth(), PackedColumns<Gemm>(conv.filters)));
    PackKernel<Gemm>(pool, conv, kernel.typed_data(), transposed, packed.get());
    Forward<Gemm>(pool, conv, x.typed_data(), packed.get(), y->typed_data());
  });
  return ffi::Error::Success();
}

inline ffi::Error ConvFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, bool use_amx, int64_t segments,
                                     int64_t stride, int64_t top, int64_t left) {
  const Convolution conv(x.dimensions(), kernel->dimensions(), dy.dimensions(), segments, stride, top, left);
  WithGemm(use_amx, conv.depth(), conv.filters, [&]<typename Gemm>(Gemm) {
    FilterGradient<Gemm>(pool, conv, x.typed_data(), dy.typed_data(), kernel->typed_data());
  });
  return ffi::Error::Success();
}
