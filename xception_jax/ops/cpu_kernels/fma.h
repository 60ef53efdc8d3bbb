// Matrix products by fused multiply-adds. conv.h describes the interface and the terms.
//
// The micro-kernel multiplies R rows of the left-hand matrix with V vectors of columns of a panel:
//
//   for p in depth:  sums[r][v] += broadcast(a[r][p]) * panel[p][v]     for all r < R, v < V
//
// Its R x V sums stay in vector registers over the whole depth. The left-hand matrix is read one value at a time, so that
// forward it needs no packing: its rows are read where they lie in x. X^T is packed, since its rows are strided in x.

#pragma once

#include "geometry.h"

struct FmaGemm {
  static constexpr int kVectors = 3;  // of a tile, at most
  // As many rows as registers allow, besides those for the vectors of the panel and one for a broadcast value: 8 with AVX-512
  // (24 sums in 32 registers), 4 with AVX2 (12 in 16). A power of two, so that halves of a tile take the last rows.
  static constexpr int kTileRows = (kVectorRegisters - kVectors - 1) / kVectors >= 8 ? 8 : 4;
  static_assert(kTileRows * kVectors + kVectors + 1 <= kVectorRegisters);

  // Block sizes are made for the widest panel, that of AVX-512 (48 columns), so that all processors cut sums at the same places.
  static constexpr Size kWidestPanel = kVectors * kMostLanes;
  // Forward, a block is four panels high, so that a panel, which comes from the L3 cache, is read for 192 pixels. Its depth is
  // such that the block, a panel and the next one, which is being fetched, fit into the L2 cache: 1536, as deep as the
  // deepest layer of Xception.
  static constexpr Size kBlockPixels = 4 * kWidestPanel;
  static constexpr Size kBlockDepth = RoundDown(kL2Bytes / sizeof(float) / (kBlockPixels + 2 * kWidestPanel), 512);
  // For the filter gradient, a panel of dy fills the L1 cache: 256 pixels. For those, a block takes 384 KiB of the L2 cache.
  static constexpr Size kGradientPixels = kL1Bytes / sizeof(float) / kWidestPanel;
  static constexpr Size kGradientRows = kBlockDepth / 4;
  static_assert(kBlockPixels == 192 && kBlockDepth == 1536 && kGradientPixels == 256 && kGradientRows == 384);

  static constexpr bool kSkipsPadding = true;
  static constexpr Size kPrefetchDistance = 8;  // rows of a panel

  // Panels consist of whole vectors, up to kVectors. Their widths differ by one vector at most: a last panel that is much
  // narrower would use few of the registers.
  static Size Panels(Size columns) { return CeilDiv(columns, kVectors * kLanes); }
  static Size PanelBegin(Size columns, Size panel) {
    return CeilDiv(CeilDiv(columns, kLanes) * panel, Panels(columns)) * kLanes;
  }
  static Size PackedSize(Size depth, Size columns) { return depth * columns; }

  // Layout: [depth][columns, zeros behind the last one].
  static void PackPanel(const float* b, Size stride, Size depth, Size columns, float* to) {
    for (Size p = 0; p < depth; ++p, b += stride)
      for (Size c = 0; c < columns; c += kLanes, to += kLanes) Store(to, LoadFirst(columns - c, b + c));
  }

  // The micro-kernel: sums[r][v] += *a(p, r) * (vector v of row p of b), for p < depth. Rows of b are `stride` floats apart.
  template <int R, int V, typename A>
  static ALWAYS_INLINE void MultiplyTile(const A& a, const float* b, Size stride, Size depth, Vector (&sums)[R][V]) {
    Vector in_registers[R][V];  // a local array, which no other use of `sums` can force into memory
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) in_registers[r][v] = sums[r][v];
    for (Size p = 0; p < depth; ++p, b += stride) {
      Vector row[V];
      UNROLL for (int v = 0; v < V; ++v) {
        __builtin_prefetch(b + kPrefetchDistance * stride + v * kLanes);
        row[v] = Load(b + v * kLanes);
      }
      UNROLL for (int r = 0; r < R; ++r) {
        const float value = *a(p, r);
        UNROLL for (int v = 0; v < V; ++v) in_registers[r][v] += value * row[v];
      }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) sums[r][v] = in_registers[r][v];
  }

  // Calls f(row, R, V) for each tile of `rows` rows and `columns` columns. R and V are integral constants: the number of rows
  // (kTileRows, then halves of it for the rest), and of vectors.
  template <int V = kVectors, typename F>
  static void ForEachTile(Size rows, Size columns, const F& f) {
    if constexpr (V > 1) {
      if (columns <= (V - 1) * kLanes) return ForEachTile<V - 1>(rows, columns, f);
    }
    ForEachTileFrom<kTileRows, V>(0, rows, f);
  }
  template <int R, int V, typename F>
  static void ForEachTileFrom(Size row, Size rows, const F& f) {
    for (; rows - row >= R; row += R) f(row, std::integral_constant<int, R>(), std::integral_constant<int, V>());
    if constexpr (R > 1) ForEachTileFrom<R / 2, V>(row, rows, f);
  }

  class ForwardBlock {
   public:
    // input[tap * kBlockPixels + row]: the channels that a pixel reads at a tap; `zeros` in the padding.
    void Read(const float* const* input, const float* zeros, Size segment_offset, const DepthBlock& depth_block, Size rows) {
      input_ = input, zeros_ = zeros, segment_offset_ = segment_offset, depth_block_ = &depth_block, rows_ = rows;
      first_panel_ = true;
    }

    template <typename Output>
    void Multiply(const float* panel, const Output& output) {
      ForEachTile(rows_, output.columns, [&](Size row, auto rows, auto vectors) {
        constexpr int R = rows, V = vectors;
        output.Prefetch(row, R);
        if (first_panel_) PrefetchRows(row + R, R);
        Vector sums[R][V] = {};
        const float* b = panel;
        for (const Chunk& chunk : depth_block_->chunks) {
          const float* const* input = input_ + chunk.tap * kBlockPixels + row;
          bool inside = false;
          UNROLL for (int r = 0; r < R; ++r) inside |= input[r] != zeros_;
          if (inside) {
            const float* a[R];
            UNROLL for (int r = 0; r < R; ++r) a[r] = input[r] + segment_offset_ + chunk.channel;
            MultiplyTile([&](Size p, int r) { return a[r] + p; }, b, V * kLanes, chunk.size, sums);
          }
          b += chunk.size * V * kLanes;
        }
        output.Store(row, sums, R);
      });
      first_panel_ = false;
    }

   private:
    // Fetches the rows of a tile into the L2 cache while the tile before is computed. With several taps, most of them have
    // been read for neighbouring pixels.
    ALWAYS_INLINE void PrefetchRows(Size row, Size count) const {
      if (depth_block_->chunks.size() > 1) return;
      const Chunk& chunk = depth_block_->chunks[0];
      for (const Size end = std::min(row + count, rows_); row < end; ++row)
        for (Size c = 0; c < chunk.size; c += kLineFloats)
          __builtin_prefetch(input_[chunk.tap * kBlockPixels + row] + segment_offset_ + chunk.channel + c, 0, 2);
    }

    const float* const* input_;
    const float* zeros_;
    const DepthBlock* depth_block_;
    Size segment_offset_, rows_;
    bool first_panel_;
  };

  class GradientBlock {
   public:
    // Packs rows of X^T for `count` pixels from `pixel` on. Layout: [tile][pixel][kTileRows]. A cache line between the tiles
    // keeps equal pixels of different tiles, which are written together, from competing for the same sets of the L1 cache.
    void Read(const Convolution& conv, const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count) {
      rows_ = rows, count_ = count, tile_size_ = count * kTileRows + kLineFloats;
      const std::vector<Chunk> chunks = conv.Chunks(first_row, first_row + rows);
      float buffer[kGradientRows];
      float* packed = packed_.get();
      auto at = conv.PixelAt(pixel);
      inside_.assign(CeilDiv(rows, kTileRows), conv.interleaved == 1);
      if (conv.interleaved > 1) {  // the pixels are the same of several images
        Size row = 0;
        for (const Chunk& chunk : chunks) {
          const Size end = row + chunk.size;
          if (conv.InputAt(x, at, chunk.tap) != conv.zeros.data())
            std::fill(inside_.begin() + row / kTileRows, inside_.begin() + CeilDiv(end, kTileRows), true);
          row = end;
        }
      }
      for (Size p = 0; p < count; ++p, at = conv.Next(at), packed += kTileRows) {
        const float* from = conv.Gather(x, at, segment, chunks, buffer);
        Size row = 0;
        for (; row + kTileRows <= rows; row += kTileRows)
          std::memcpy(packed + row / kTileRows * tile_size_, from + row, kTileRows * sizeof(float));
        std::copy(from + row, from + rows, packed + row / kTileRows * tile_size_);
      }
    }

    // dy: some columns, of pixels that are `stride` floats apart. Columns that fill cache lines are read in place.
    template <typename Output>
    void Multiply(const float* dy, Size stride, const Output& output) const {
      if (output.columns % kLineFloats) {
        PackPanel(dy, stride, count_, output.columns, panel_.get());
        dy = panel_.get(), stride = RoundUp(output.columns, kLanes);
      }
      ForEachTile(rows_, output.columns, [&](Size row, auto rows, auto vectors) {
        constexpr int R = rows, V = vectors;
        const bool inside = inside_[row / kTileRows];
        if (!inside && output.accumulate) return;
        output.Prefetch(row, R);
        Vector sums[R][V] = {};
        const float* a = packed_.get() + row / kTileRows * tile_size_ + row % kTileRows;
        if (inside) MultiplyTile([&](Size p, int r) { return a + p * kTileRows + r; }, dy, stride, count_, sums);
        output.Store(row, sums, R);
      });
    }

   private:
    Buffer packed_ = NewBuffer(kGradientRows / kTileRows * (kGradientPixels * kTileRows + kLineFloats));
    Buffer panel_ = NewBuffer(kGradientPixels * kVectors * kLanes);
    std::vector<bool> inside_;  // whether a tile has other values than padding
    Size rows_, count_, tile_size_;
  };
};
