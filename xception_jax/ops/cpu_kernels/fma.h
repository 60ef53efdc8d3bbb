// Products of matrices by fused multiply-adds.

#pragma once

#include "convolution.h"

struct Fma {
  // The sums of a tile stay in registers.
#ifdef __AVX512F__
  static constexpr int kTileRows = 12;
#else
  static constexpr int kTileRows = 6;
#endif
  static constexpr Size kDepth = 1536;            // of the products between two stores: a panel of weights stays in the L2 cache
  static constexpr Size kAhead = 8;               // rows of a panel that are fetched before they are needed
  static constexpr Size kBlock = 16 * kTileRows;  // pixels that share what the L2 cache holds
  static constexpr Size kPixels = 256;            // of the filter gradient between two stores: a panel of dy stays in the L1 cache
  static constexpr Size kRows = 32 * kTileRows;   // of the filter gradient that use such a panel

  // What a panel takes, in floats.
  static Size PanelSize(Size depth) { return depth * kTileColumns; }

  // Copies up to kTileColumns columns of `depth` rows of b next to one another, zeros behind the last column.
  static void PackPanel(const float* b, Size step, Size depth, Size columns, float* to) {
    for (Size p = 0; p < depth; ++p, b += step, to += kTileColumns) {
      if (columns >= kTileColumns) {
        std::memcpy(to, b, kTileColumns * sizeof(float));
      } else {
        for (Size c = 0; c < kTileColumns; ++c) to[c] = c < columns ? b[c] : 0.0f;
      }
    }
  }

  // sums[r] += a[r][p * kStep] * b[p] over p, where b[p] is kTileColumns wide.
  template <int R, int kStep>
  static inline __attribute__((always_inline)) void Accumulate(const float* const* a, const float* b, Size depth, Sums* sums) {
    const float* rows[R];
    UNROLL for (int r = 0; r < R; ++r) rows[r] = a[r];
    for (Size p = 0; p < depth; ++p) {
      __builtin_prefetch(b + (p + kAhead) * kTileColumns);
      __builtin_prefetch(b + (p + kAhead) * kTileColumns + kLanes);
      const Lanes b0 = Load<Lanes>(b + p * kTileColumns), b1 = Load<Lanes>(b + p * kTileColumns + kLanes);
      UNROLL for (int r = 0; r < R; ++r) {
        const float value = rows[r][p * kStep];
        sums[r][0] += value * b0;
        sums[r][1] += value * b1;
      }
    }
  }

  // Calls f(row, R) for the rows of each tile, R of them as a constant.
  template <int R = kTileRows, typename F>
  static void ForEachTile(Size rows, const F& f, Size row = 0) {
    for (; rows - row >= R; row += R) f(row, std::integral_constant<int, R>());
    if constexpr (R > 1) ForEachTile<R - 1>(rows, f, row);
  }

  // The pixels of a block, as the rows of a matrix, read where they lie (an indirect convolution: Dukhan 2019,
  // arXiv:1907.02129).
  class PixelRows {
   public:
    // at[tap * kBlock + row] is where the channels of a tap begin.
    void Read(const float* const* at, Size segment_offset, const DepthPart& part, Size rows) {
      at_ = at, offset_ = segment_offset, part_ = &part, rows_ = rows;
    }

    // Calls use(row, sums, rows) with all tiles of the product with a panel, from their first row on.
    template <typename Use>
    void Multiply(const float* panel, Size, const Use& use) const {
      ForEachTile(rows_, [&](Size row, auto rows) {
        constexpr int R = rows;
        Sums sums[R] = {};
        const float* b = panel;
        for (const Chunk& chunk : part_->chunks) {
          const float* a[R];
          UNROLL for (int r = 0; r < R; ++r) a[r] = at_[chunk.tap * kBlock + row + r] + offset_ + chunk.first;
          Accumulate<R, 1>(a, b, chunk.size, sums);
          b += chunk.size * kTileColumns;
        }
        use(row, sums, rows);
      });
    }

   private:
    const float* const* at_;
    Size offset_, rows_;
    const DepthPart* part_;
  };

  // Some rows of the transposed x, for some pixels, in panels of kTileRows. A last panel of fewer has gaps.
  class ChannelRows {
   public:
    void Read(const Convolution& conv, const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count) {
      rows_ = rows, count_ = count;
      const std::vector<Chunk> chunks = conv.Chunks(first_row, first_row + rows);
      float line[kRows];
      float* packed = packed_.get();
      auto at = conv.PixelAt(pixel);
      for (Size p = 0; p < count; ++p, at = conv.Next(at), packed += kTileRows) {
        const float* from = conv.Gather(x, at, segment, chunks, line);
        Size row = 0;
        for (; row + kTileRows <= rows; row += kTileRows)
          std::memcpy(packed + row * count, from + row, kTileRows * sizeof(float));
        std::copy(from + row, from + rows, packed + row * count);
      }
    }

    template <typename Use>
    void Multiply(const float* panel, Size, const Use& use) const {
      ForEachTile(rows_, [&](Size row, auto rows) {
        constexpr int R = rows;
        Sums sums[R] = {};
        const float* at[R];
        UNROLL for (int r = 0; r < R; ++r) at[r] = packed_.get() + row * count_ + r;
        Accumulate<R, kTileRows>(at, panel, count_, sums);
        use(row, sums, rows);
      });
    }

   private:
    Buffer packed_ = NewBuffer(kRows * kPixels);
    Size rows_, count_;
  };
};
