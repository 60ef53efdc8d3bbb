// Products of matrices in the tile registers of AMX, as exact as float32: the interface of fma.h.
//
// The registers hold bfloat16 and sum in float32. A float32 is the sum of three bfloat16, exactly: each the rest that the
// ones before leave, rounded. Of the nine products of two such sums, the six largest are taken. The other three together are
// at most 2^-24 of the product, as much as one rounding of a float32; and since the registers sum 16 products before they
// round to what is there, fewer roundings than of fused multiply-adds add up. Infinities become NaN; values below
// 2^-110 lose digits.

#pragma once

#include <immintrin.h>

#include "convolution.h"

struct Amx {
  static constexpr int kTileRows = 16;     // a register high
  static constexpr bool kPassesOver = false;  // what a whole tile reads outside of the images
  static constexpr Size kDepth = 768;      // of the products between two stores
  static constexpr Size kBlock = 192;      // pixels whose parts stay in the L2 cache, at that depth
  static constexpr Size kPixels = 128;     // of the filter gradient between two stores
  static constexpr Size kRows = 768;       // of the filter gradient whose parts stay in the L2 cache, for those pixels

  static constexpr Size kChunk = 4;       // steps whose columns stay in the L1 cache
  static constexpr Size kStep = 32;       // of the depth: a row of a register holds the parts of 32 values
  static constexpr Size kRegister = 256;  // floats that take the same memory

  static Size Steps(Size depth) { return Ceil(depth, kStep); }

  // Columns in panels of 32: where panel number `panel` begins, and behind the last one, how many there are with zeros that
  // fill it.
  static Size Panels(Size columns) { return Ceil(columns, 32); }
  static Size PanelBegin(Size, Size panel) { return panel * 32; }

  // What whole panels of columns take, in floats.
  static Size PackedSize(Size depth, Size columns) { return Steps(depth) * 3 * kRegister * columns / 16; }

  // The three parts of two vectors: those of x in the low halves of the words, those of y in the high ones. As the order of the
  // depth does not matter to a product, x and y may be any two of its stretches, the same ones on both sides.
  static void Split(__m512 x, __m512 y, __m512i (&parts)[3]) {
    const auto round = [](__m512 value, bool first) {
      const __m512i bits = _mm512_castps_si512(value), half = _mm512_set1_epi32(0x8000);
      // A NaN keeps its bits: rounded, one of all ones would become a zero. Once is enough, as its rest is a NaN, too.
      if (first) return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), bits, half);
      return _mm512_add_epi32(bits, half);
    };
    const __m512i high_half = _mm512_set1_epi32(0xffff0000);
    UNROLL for (int part = 0; part < 3; ++part) {
      const __m512i low = round(x, part == 0), high = _mm512_and_si512(round(y, part == 0), high_half);
      parts[part] = _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
      x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(low, high_half)));
      y = _mm512_sub_ps(y, _mm512_castsi512_ps(high));
    }
  }

  // Splits the columns of a panel, `depth` rows of b: [step][part][half of the columns][16 words][16 columns].
  static void PackPanel(const float* b, Size step, Size depth, Size columns, float* to) {
    for (Size first = 0; first < depth; first += kStep, to += 3 * 2 * kRegister)
      for (Size half = 0; half < 2; ++half)
        for (Size word = 0; word < 16; ++word) {
          const auto row = [&](Size row) {
            return LoadUpTo(row < depth ? columns - half * 16 : 0, b + row * step + half * 16);
          };
          __m512i parts[3];
          Split(row(first + word), row(first + word + 16), parts);
          for (Size part = 0; part < 3; ++part)
            _mm512_store_si512(to + (part * 2 + half) * kRegister + word * 16, parts[part]);
        }
  }

  // The rows of a matrix in three parts: [16 rows][step][part][row][16 words].
  class SplitRows {
   public:
    SplitRows() {
      struct alignas(64) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64};
        uint8_t rows[16] = {16, 16, 16};
      } const configuration;
      asm volatile("ldtilecfg %0" : : "m"(configuration));
    }
    ~SplitRows() { _tile_release(); }
    SplitRows(const SplitRows&) = delete;

    // Stores the product with a panel.
    template <typename To>
    void Multiply(const float* panel, const To& to) const {
      alignas(64) Lanes sums[kBlock][2];
      for (Size first = 0; first < rows_; first += kBlock) {
        const Size rows = std::min(rows_ - first, kBlock);
        for (Size step = 0; step < steps_; step += kChunk)
          for (Size row = 0; row < rows; row += 16)
            for (int half = 0; half < (to.columns > 16 ? 2 : 1); ++half)
              MultiplyTile(packed_.get() + At(first + row, step), panel + (step * 6 + half) * kRegister,
                           std::min(steps_ - step, kChunk), step > 0, &sums[row][half]);
        to.Store(first, sums, rows);
      }
    }

   protected:
    void Resize(Size rows, Size depth) {
      rows_ = rows, steps_ = Steps(depth);
      const Size size = At(Ceil(rows, 16) * 16, 0);
      if (size > size_) packed_ = NewBuffer(size_ = size);
    }

    // Two stretches of 16 values of a row, in a step of the depth.
    void Put(Size row, Size step, __m512 x, __m512 y) {
      __m512i parts[3];
      Split(x, y, parts);
      float* to = packed_.get() + At(row, step);
      for (Size part = 0; part < 3; ++part) _mm512_store_si512(to + part * kRegister, parts[part]);
    }

   private:
    Size At(Size row, Size step) const { return (row / 16 * steps_ + step) * 3 * kRegister + row % 16 * 16; }

    // Sums, or adds, a product in register 0, from one of rows and one of columns. Not more, though there are eight: where another
    // thread of the core has its own in use, few are left to hold what is loaded ahead.
    static void MultiplyTile(const float* a, const float* b, Size steps, bool add, Lanes* sums) {
      asm volatile("" : : : "memory");  // what the registers load has been written
      if (add) {
        _tile_loadd(0, sums, 2 * sizeof(Lanes));
      } else {
        _tile_zero(0);
      }
      for (; steps > 0; --steps, a += 3 * kRegister, b += 6 * kRegister) {
        const auto row_part = [&](int part) { _tile_loadd(1, a + part * kRegister, 64); };
        const auto column_part = [&](int part) { _tile_loadd(2, b + part * 2 * kRegister, 64); };
        const auto add = [] { _tile_dpbf16ps(0, 1, 2); };
        row_part(2), column_part(0), add();
        row_part(1), add();
        column_part(1), add();
        row_part(0), add();
        column_part(0), add();
        column_part(2), add();
      }
      _tile_stored(0, sums, 2 * sizeof(Lanes));
      asm volatile("" : : : "memory");
    }

    Buffer packed_;
    Size size_ = 0, rows_ = 0, steps_ = 0;
  };

  // The pixels of a block, as the rows of a matrix.
  class PixelRows : public SplitRows {
   public:
    // at[tap * kBlock + row] is where the channels of a tap begin.
    void Read(const float* const* at, const float*, Size segment_offset, const DepthPart& part, Size rows) {
      Resize(rows, part.depth);
      float line[kDepth];
      for (Size row = 0; row < rows; ++row) {
        const float* from = InOnePiece(part.chunks, line, [&](const Chunk& chunk) {
          return at[chunk.tap * kBlock + row] + segment_offset + chunk.first;
        });
        for (Size first = 0; first < part.depth; first += kStep)
          Put(row, first / kStep, LoadUpTo(part.depth - first, from + first),
              LoadUpTo(part.depth - first - 16, from + first + 16));
      }
    }
  };

  static void Transpose(__m512 (&rows)[16]) {
    __m512 pairs[16], fours[16], eights[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
      UNROLL for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(pairs[i + j]), high = _mm512_castps_pd(pairs[i + j + 2]);
        fours[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        fours[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    // Now fours[i + j] has columns j, j + 4, j + 8 and j + 12 of rows i to i + 3.
    UNROLL for (int i = 0; i < 16; i += 8) {
      UNROLL for (int j = 0; j < 4; ++j) {
        eights[i + j] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0x88);
        eights[i + j + 4] = _mm512_shuffle_f32x4(fours[i + j], fours[i + j + 4], 0xdd);
      }
    }
    UNROLL for (int j = 0; j < 4; ++j) {
      rows[j] = _mm512_shuffle_f32x4(eights[j], eights[j + 8], 0x88);
      rows[j + 8] = _mm512_shuffle_f32x4(eights[j], eights[j + 8], 0xdd);
      rows[j + 4] = _mm512_shuffle_f32x4(eights[j + 4], eights[j + 12], 0x88);
      rows[j + 12] = _mm512_shuffle_f32x4(eights[j + 4], eights[j + 12], 0xdd);
    }
  }

  // Some rows of the transposed x, for some pixels.
  class ChannelRows : public SplitRows {
   public:
    void Read(const Convolution& conv, const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count) {
      Resize(rows, count_ = count);
      const std::vector<Chunk> chunks = conv.Chunks(first_row, first_row + rows);
      std::vector<float> lines(chunks.size() > 1 ? kStep * rows : 0);
      auto at = conv.PixelAt(pixel);
      for (Size first = 0; first < count; first += kStep) {
        const Size pixels = std::min(count - first, kStep);
        const float* from[kStep];
        for (Size p = 0; p < pixels; ++p, at = conv.Next(at))
          from[p] = conv.Gather(x, at, segment, chunks, lines.data() + (chunks.size() > 1 ? p * rows : 0));
        for (Size row = 0; row < rows; row += 16) {
          __m512 stretches[2][16];
          for (Size p = 0; p < kStep; ++p)
            stretches[p / 16][p % 16] = p < pixels ? LoadUpTo(rows - row, from[p] + row) : _mm512_setzero_ps();
          Transpose(stretches[0]);
          Transpose(stretches[1]);
          for (Size r = 0; r < 16; ++r) Put(row + r, first / kStep, stretches[0][r], stretches[1][r]);
        }
      }
    }

    // Stores the product with some columns of dy, whose pixels are `step` apart.
    template <typename To>
    void Multiply(const float* dy, Size step, const To& to) const {
      PackPanel(dy, step, count_, to.columns, panel_.get());
      SplitRows::Multiply(panel_.get(), to);
    }

   private:
    Buffer panel_ = NewBuffer(PackedSize(kPixels, PanelBegin(1, 1)));
    Size count_;
  };
};
