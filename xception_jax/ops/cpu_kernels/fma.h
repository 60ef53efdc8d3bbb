// Products of matrices by fused multiply-adds.

#pragma once

#include "convolution.h"

struct Fma {
  // The sums of a tile stay in registers: kTileRows rows of kVectors vectors.
#ifdef __AVX512F__
  static constexpr int kTileRows = 8;
#else
  static constexpr int kTileRows = 4;
#endif
  static constexpr int kVectors = 3;
  static constexpr bool kPassesOver = true;       // what a whole tile reads outside of the images
  static constexpr Size kDepth = 1536;            // of the products between two stores: a panel of weights stays in the L2 cache
  static constexpr Size kAhead = 8;               // rows of a panel that are fetched before they are needed
  static constexpr Size kBlock = 192;             // pixels that share what the L2 cache holds
  static constexpr Size kPixels = 256;            // of the filter gradient between two stores
  static constexpr Size kRows = 384;              // of the filter gradient whose channels stay in the L2 cache, for those pixels

  // Columns in panels of up to kVectors vectors, the first as wide as any and none much narrower: where panel number `panel`
  // begins, and behind the last one, how many columns there are with those that fill its last vector.
  static Size Panels(Size columns) { return Ceil(columns, kVectors * kLanes); }
  static Size PanelBegin(Size columns, Size panel) { return Ceil(Ceil(columns, kLanes) * panel, Panels(columns)) * kLanes; }

  // What whole vectors of columns take, in floats.
  static Size PackedSize(Size depth, Size columns) { return depth * columns; }

  // Copies the columns of a panel of b next to one another, row by row, zeros behind the last column.
  static void PackPanel(const float* b, Size step, Size depth, Size columns, float* to) {
    for (Size p = 0; p < depth; ++p, b += step)
      for (Size c = 0; c < columns; c += kLanes, to += kLanes) Store(to, LoadUpTo(columns - c, b + c));
  }

  // sums[r] += *at(p, r) * b[p * step] over p, V vectors of each.
  template <int R, int V, typename At>
  static ALWAYS_INLINE void Accumulate(const At& at, const float* b, Size step, Size depth, Lanes (&sums)[R][V]) {
    Lanes sum[R][V];  // of its own, so that it is kept in registers whatever becomes of `sums`
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) sum[r][v] = sums[r][v];
    for (Size p = 0; p < depth; ++p, b += step) {
      Lanes row[V];
      UNROLL for (int v = 0; v < V; ++v) {
        __builtin_prefetch(b + kAhead * step + v * kLanes);
        row[v] = Load<Lanes>(b + v * kLanes);
      }
      UNROLL for (int r = 0; r < R; ++r) {
        const Lanes value = Broadcast(*at(p, r));
        UNROLL for (int v = 0; v < V; ++v) sum[r][v] += value * row[v];
      }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int v = 0; v < V; ++v) sums[r][v] = sum[r][v];
  }

  // Calls f(row, R, V) for the rows of each tile, R of them, and the vectors of `columns`, V: as constants.
  template <int V = kVectors, typename F>
  static void ForEachTile(Size rows, Size columns, const F& f) {
    if constexpr (V > 1) {
      if (columns <= (V - 1) * kLanes) return ForEachTile<V - 1>(rows, columns, f);
    }
    ForEachTileOf<kTileRows, V>(rows, f);
  }
  template <int R, int V, typename F>
  static void ForEachTileOf(Size rows, const F& f, Size row = 0) {
    for (; rows - row >= R; row += R) f(row, std::integral_constant<int, R>(), std::integral_constant<int, V>());
    if constexpr (R > 1) ForEachTileOf<R / 2, V>(rows, f, row);
  }

  // The pixels of a block, as the rows of a matrix, read where they lie (an indirect convolution: Dukhan 2019,
  // arXiv:1907.02129).
  class PixelRows {
   public:
    // at[tap * kBlock + row] is where the channels of a tap begin; those outside of the image, at `zeros`.
    void Read(const float* const* at, const float* zeros, Size segment_offset, const DepthPart& part, Size rows) {
      at_ = at, zeros_ = zeros, offset_ = segment_offset, part_ = &part, rows_ = rows, unread_ = true;
    }

    // Stores the product with a panel.
    template <typename To>
    void Multiply(const float* panel, const To& to) {
      ForEachTile(rows_, to.columns, [&](Size row, auto rows, auto vectors) {
        constexpr int R = rows, V = vectors;
        to.Expect(row, R);
        if (unread_) Expect(row + R, R);
        Lanes sums[R][V] = {};
        const float* b = panel;
        for (const Chunk& chunk : part_->chunks) {
          const float* const* at = at_ + chunk.tap * kBlock + row;
          bool inside = false;
          UNROLL for (int r = 0; r < R; ++r) inside |= at[r] != zeros_;
          if (inside) {
            const float* a[R];
            UNROLL for (int r = 0; r < R; ++r) a[r] = at[r] + offset_ + chunk.first;
            Accumulate([&](Size p, int r) { return a[r] + p; }, b, V * kLanes, chunk.size, sums);
          }
          b += chunk.size * V * kLanes;
        }
        to.Store(row, sums, rows);
      });
      unread_ = false;
    }

   private:
    // Fetches the rows of a tile, while the one before is computed. Those of several taps have been read for other pixels.
    ALWAYS_INLINE void Expect(Size row, Size rows) const {
      if (part_->chunks.size() > 1) return;
      const Chunk& chunk = part_->chunks[0];
      for (const Size end = std::min(row + rows, rows_); row < end; ++row)
        for (Size c = 0; c < chunk.size; c += kLine)
          __builtin_prefetch(at_[chunk.tap * kBlock + row] + offset_ + chunk.first + c, 0, 2);
    }

    const float* const* at_;
    const float* zeros_;
    bool unread_;  // whether no panel has been multiplied with these rows yet
    Size offset_, rows_;
    const DepthPart* part_;
  };

  // Some rows of the transposed x, for some pixels, in panels of kTileRows. A last panel of fewer has gaps. There is a line
  // between them, since of panels a page apart the same pixel would compete for the same few lines of the L1 cache.
  class ChannelRows {
   public:
    void Read(const Convolution& conv, const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count) {
      rows_ = rows, count_ = count, panel_size_ = count * kTileRows + kLine;
      const std::vector<Chunk> chunks = conv.Chunks(first_row, first_row + rows);
      float line[kRows];
      float* packed = packed_.get();
      auto at = conv.PixelAt(pixel);
      inside_.assign(Ceil(rows, kTileRows), conv.together == 1);
      if (conv.together > 1) {  // of images whose same pixels are all inside at a tap, or all outside
        Size row = 0;
        for (const Chunk& chunk : chunks) {
          const Size end = row + chunk.size;
          if (conv.At(x, at, chunk.tap) != conv.zeros.data())
            std::fill(inside_.begin() + row / kTileRows, inside_.begin() + Ceil(end, kTileRows), true);
          row = end;
        }
      }
      for (Size p = 0; p < count; ++p, at = conv.Next(at), packed += kTileRows) {
        const float* from = conv.Gather(x, at, segment, chunks, line);
        Size row = 0;
        for (; row + kTileRows <= rows; row += kTileRows)
          std::memcpy(packed + row / kTileRows * panel_size_, from + row, kTileRows * sizeof(float));
        std::copy(from + row, from + rows, packed + row / kTileRows * panel_size_);
      }
    }

    // Stores the product with some columns of dy, whose pixels are `step` apart; read where they lie, if they fill lines.
    template <typename To>
    void Multiply(const float* dy, Size step, const To& to) const {
      if (to.columns % kLine) {
        PackPanel(dy, step, count_, to.columns, dy_.get());
        dy = dy_.get(), step = Ceil(to.columns, kLanes) * kLanes;
      }
      ForEachTile(rows_, to.columns, [&](Size row, auto rows, auto vectors) {
        constexpr int R = rows, V = vectors;
        const bool inside = inside_[row / kTileRows];
        if (!inside && to.add) return;
        to.Expect(row, R);
        Lanes sums[R][V] = {};
        const float* a = packed_.get() + row / kTileRows * panel_size_ + row % kTileRows;
        if (inside) Accumulate([&](Size p, int r) { return a + p * kTileRows + r; }, dy, step, count_, sums);
        to.Store(row, sums, rows);
      });
    }

   private:
    Buffer packed_ = NewBuffer(kRows / kTileRows * (kPixels * kTileRows + kLine)), dy_ = NewBuffer(kPixels * kVectors * kLanes);
    std::vector<bool> inside_;  // of each panel: whether it has anything but zeros
    Size rows_, count_, panel_size_;
  };
};
