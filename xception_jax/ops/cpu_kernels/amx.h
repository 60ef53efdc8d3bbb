// Matrix products of float32 in the tile registers of AMX (Intel processors since 2023). conv.h describes the interface.
//
// AMX multiplies bfloat16 and sums in float32. A float32 is exactly the sum of three bfloat16: part 0 is the value rounded to
// bfloat16, part 1 the rest rounded, part 2 what is left then. Of the nine products of the parts of a and b, the six largest
// are summed:
//
//   a b  =  a0 b0 + a0 b1 + a1 b0 + a0 b2 + a1 b1 + a2 b0  +  (a1 b2 + a2 b1 + a2 b2)
//
// The three in parentheses are at most 2^-24 of the product, one rounding error of float32. AMX sums 16 products before it
// adds them to the sum so far, so that fewer rounding errors accumulate than with fused multiply-adds: the results are at
// least as exact. An infinity becomes NaN, and values below 2^-110 lose digits.
//
// A tile register has 16 rows of 16 words of 32 bits; a word holds two bfloat16. One instruction computes
// sums [16 x 16 float32] += a [16 rows x 32 depth] * b [32 depth x 16 columns]. A step is these 32 of the depth. Memory
// holds each step as three registers, one for each part, in the order in which they are loaded.

#pragma once

#include "geometry.h"

struct AmxGemm {
  // The hardware's sizes.
  static constexpr Size kSide = 16;  // rows of a register, and words of a row
  static constexpr Size kStep = 32;  // of the depth
  static constexpr Size kParts = 3;
  static constexpr Size kRegisterFloats = kSide * kSide;  // the memory of a register, in units of a float
  static constexpr Size kRegisterBytes = kRegisterFloats * sizeof(float), kRowBytes = kSide * sizeof(float);

  static constexpr Size kTileRows = kSide;
  static constexpr Size kPanelRegisters = 2;  // a panel is two registers wide: 32 columns
  static constexpr Size kPanelColumns = kPanelRegisters * kSide;

  // While a panel is multiplied, half of the L1 cache has the sums of all rows of a block, 192, and the other half some steps
  // of the panel, 4. The sums are loaded and stored once for these steps.
  static constexpr Size kBlockPixels = kL1Bytes / 2 / (kPanelColumns * sizeof(float));
  static constexpr Size kPanelSteps = kL1Bytes / 2 / (kParts * kPanelRegisters * kRegisterBytes);
  // Forward, half of the L2 cache has the parts of a block: a depth of 768.
  static constexpr Size kValueBytes = kParts * 2;
  static constexpr Size kBlockDepth = RoundDown(kL2Bytes / 2 / (kBlockPixels * kValueBytes), 256);
  // For the filter gradient, as many pixels as the L1 cache has steps of a panel, 128, and rows for four blocks of sums, so
  // that packing a panel of dy costs little beside multiplying it. The parts of a block take 576 KiB of the L2 cache.
  static constexpr Size kGradientPixels = kPanelSteps * kStep;
  static constexpr Size kGradientRows = 4 * kBlockPixels;
  static_assert(kBlockPixels == 192 && kPanelSteps == 4 && kBlockDepth == 768 && kGradientPixels == 128 && kGradientRows == 768);

  static constexpr bool kSkipsPadding = false;

  static Size Steps(Size depth) { return CeilDiv(depth, kStep); }
  static Size Panels(Size columns) { return CeilDiv(columns, kPanelColumns); }
  static Size PanelBegin(Size, Size panel) { return panel * kPanelColumns; }
  static Size PackedSize(Size depth, Size columns) { return Steps(depth) * kParts * kRegisterFloats * columns / kSide; }

  // Splits two vectors into their parts. A word of parts[i] has part i of a lane of x in its low half, and of y in its high
  // half. AMX multiplies words of a with words of b half by half, and sums: which depth a half stands for does not matter, as
  // long as it is the same on both sides. So x and y are the first and the second 16 of a step.
  static void Split(__m512 x, __m512 y, __m512i (&parts)[kParts]) {
    const __m512i half_unit = _mm512_set1_epi32(0x8000), high_half = _mm512_set1_epi32(0xffff0000);
    const auto round = [&](__m512 value, bool may_be_nan) {
      const __m512i bits = _mm512_castps_si512(value);
      // A NaN keeps its bits in part 0, which makes the result NaN: rounding one of all ones would leave a zero.
      if (may_be_nan) return _mm512_mask_add_epi32(bits, _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), bits, half_unit);
      return _mm512_add_epi32(bits, half_unit);
    };
    UNROLL for (Size part = 0; part < kParts; ++part) {
      const __m512i low = round(x, part == 0), high = _mm512_and_si512(round(y, part == 0), high_half);
      parts[part] = _mm512_or_si512(_mm512_srli_epi32(low, 16), high);
      x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(low, high_half)));
      y = _mm512_sub_ps(y, _mm512_castsi512_ps(high));
    }
  }

  // Layout: [step][part][register of the panel][16 words of the depth][16 columns], zeros behind the last column and depth.
  static void PackPanel(const float* b, Size stride, Size depth, Size columns, float* to) {
    for (Size first = 0; first < depth; first += kStep, to += kParts * kPanelRegisters * kRegisterFloats)
      for (Size reg = 0; reg < kPanelRegisters; ++reg)
        for (Size word = 0; word < kSide; ++word) {
          const auto row = [&](Size p) {
            return __m512(LoadFirst(p < depth ? columns - reg * kSide : 0, b + p * stride + reg * kSide));
          };
          __m512i parts[kParts];
          Split(row(first + word), row(first + word + kSide), parts);
          for (Size part = 0; part < kParts; ++part)
            _mm512_store_si512(to + (part * kPanelRegisters + reg) * kRegisterFloats + word * kSide, parts[part]);
        }
  }

  // Rows of the left-hand matrix, packed. Layout: [16 rows][step][part][row][16 words of the depth].
  class PackedRows {
   public:
    PackedRows() {
      struct alignas(kLineBytes) Configuration {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {kRowBytes, kRowBytes, kRowBytes};
        uint8_t rows[16] = {kSide, kSide, kSide};
      } const configuration;
      asm volatile("ldtilecfg %0" : : "m"(configuration));
    }
    ~PackedRows() { _tile_release(); }
    PackedRows(const PackedRows&) = delete;

    template <typename Output>
    void Multiply(const float* panel, const Output& output) const {
      alignas(kLineBytes) Vector sums[kBlockPixels][kPanelRegisters];
      const Size registers = CeilDiv(output.columns, kSide);
      for (Size first = 0; first < rows_; first += kBlockPixels) {
        const Size rows = std::min(rows_ - first, kBlockPixels);
        for (Size step = 0; step < steps_; step += kPanelSteps)
          for (Size row = 0; row < rows; row += kTileRows)
            for (Size reg = 0; reg < registers; ++reg)
              MultiplyTile(packed_.get() + Offset(first + row, step),
                           panel + (step * kParts * kPanelRegisters + reg) * kRegisterFloats,
                           std::min(steps_ - step, kPanelSteps), step > 0, &sums[row][reg]);
        output.Store(first, sums, rows);
      }
    }

   protected:
    void Resize(Size rows, Size depth) {
      rows_ = rows, steps_ = Steps(depth);
      const Size size = Offset(RoundUp(rows, kTileRows), 0);
      if (size > size_) packed_ = NewBuffer(size_ = size);
    }

    // Packs one step of a row: its first and its second 16 values.
    void Pack(Size row, Size step, __m512 x, __m512 y) {
      __m512i parts[kParts];
      Split(x, y, parts);
      float* to = packed_.get() + Offset(row, step);
      for (Size part = 0; part < kParts; ++part) _mm512_store_si512(to + part * kRegisterFloats, parts[part]);
    }

   private:
    Size Offset(Size row, Size step) const {
      return (row / kSide * steps_ + step) * kParts * kRegisterFloats + row % kSide * kSide;
    }

    // The micro-kernel: stores, or with `accumulate` adds, the product of `steps` steps of 16 rows and 16 columns. It uses three
    // of the eight registers (0 for the sums, 1 for a, 2 for b): where another hyper-thread of the core uses AMX too, more
    // leave fewer physical registers for loading ahead (docs/notebook/2026-11-27-cpu-kernels.md).
    static void MultiplyTile(const float* a, const float* b, Size steps, bool accumulate, Vector* sums) {
      constexpr Size kSumsRowBytes = kPanelRegisters * sizeof(Vector);
      asm volatile("" : : : "memory");  // compilers do not know that loads of registers read what was stored above
      if (accumulate) {
        _tile_loadd(0, sums, kSumsRowBytes);
      } else {
        _tile_zero(0);
      }
      for (; steps > 0; --steps, a += kParts * kRegisterFloats, b += kParts * kPanelRegisters * kRegisterFloats) {
        const auto load_a = [&](Size part) { _tile_loadd(1, a + part * kRegisterFloats, kRowBytes); };
        const auto load_b = [&](Size part) { _tile_loadd(2, b + part * kPanelRegisters * kRegisterFloats, kRowBytes); };
        const auto add_product = [] { _tile_dpbf16ps(0, 1, 2); };
        load_a(2), load_b(0), add_product();
        load_a(1), add_product();
        load_b(1), add_product();
        load_a(0), add_product();
        load_b(0), add_product();
        load_b(2), add_product();
      }
      _tile_stored(0, sums, kSumsRowBytes);
      asm volatile("" : : : "memory");
    }

    Buffer packed_;
    Size size_ = 0, rows_ = 0, steps_ = 0;
  };

  class ForwardBlock : public PackedRows {
   public:
    // input[tap * kBlockPixels + row]: the channels that a pixel reads at a tap.
    void Read(const float* const* input, const float*, Size segment_offset, const DepthBlock& depth_block, Size rows) {
      Resize(rows, depth_block.depth);
      float buffer[kBlockDepth];
      for (Size row = 0; row < rows; ++row) {
        const float* from = Concatenate(depth_block.chunks, buffer, [&](const Chunk& chunk) {
          return input[chunk.tap * kBlockPixels + row] + segment_offset + chunk.channel;
        });
        for (Size first = 0; first < depth_block.depth; first += kStep) {
          const Size left = depth_block.depth - first;
          Pack(row, first / kStep, __m512(LoadFirst(left, from + first)), __m512(LoadFirst(left - kSide, from + first + kSide)));
        }
      }
    }
  };

  class GradientBlock : public PackedRows {
   public:
    // Packs rows of X^T for `count` pixels from `pixel` on.
    void Read(const Convolution& conv, const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count) {
      Resize(rows, pixels_ = count);
      const std::vector<Chunk> chunks = conv.Chunks(first_row, first_row + rows);
      const Size buffer_size = chunks.size() > 1 ? rows : 0;
      std::vector<float> buffer(kStep * buffer_size);
      auto at = conv.PixelAt(pixel);
      for (Size first = 0; first < count; first += kStep) {
        const Size pixels = std::min(count - first, kStep);
        const float* from[kStep];
        for (Size p = 0; p < pixels; ++p, at = conv.Next(at))
          from[p] = conv.Gather(x, at, segment, chunks, buffer.data() + p * buffer_size);
        for (Size row = 0; row < rows; row += kSide) {
          __m512 squares[2][kSide];
          for (Size p = 0; p < kStep; ++p)
            squares[p / kSide][p % kSide] = p < pixels ? __m512(LoadFirst(rows - row, from[p] + row)) : _mm512_setzero_ps();
          Transpose(squares[0]);
          Transpose(squares[1]);
          for (Size r = 0; r < kSide; ++r) Pack(row + r, first / kStep, squares[0][r], squares[1][r]);
        }
      }
    }

    // dy: some columns, of pixels that are `stride` floats apart.
    template <typename Output>
    void Multiply(const float* dy, Size stride, const Output& output) const {
      PackPanel(dy, stride, pixels_, output.columns, panel_.get());
      PackedRows::Multiply(panel_.get(), output);
    }

   private:
    // Transposes 16 rows of 16 values: in pairs of rows, then fours, eights and all 16.
    static void Transpose(__m512 (&rows)[kSide]) {
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

    Buffer panel_ = NewBuffer(PackedSize(kGradientPixels, kPanelColumns));
    Size pixels_;
  };
};
