// Convolution with any number of segments, alone or with what stands around it in a network without BatchNorm, and its
// filter gradient: products of matrices.

#pragma once

#include "common.h"

// A tile of the result has kTileRows pixels and kTileColumns filters, whose sums stay in registers.
#ifdef __AVX512F__
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileColumns = 2 * kLanes;
constexpr Size kDepth = 1536;            // of the products between two stores: a panel of weights stays in the L2 cache
constexpr Size kAhead = 8;               // rows of a panel that are fetched before they are needed
constexpr Size kBlock = 16 * kTileRows;  // pixels that share what the L2 cache holds
constexpr Size kPixels = 256;            // of the filter gradient between two stores: a panel of dy stays in the L1 cache
constexpr Size kRows = 32 * kTileRows;   // of the filter gradient that use such a panel

inline Size Ceil(Size a, Size b) { return (a + b - 1) / b; }

// sums[r] += a[r][p * kStep] * b[p] over p, where b[p] is kTileColumns wide.
template <int R, int kStep>
inline __attribute__((always_inline)) void Accumulate(const float* const* a, const float* b, Size depth, Lanes (*sums)[2]) {
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

// What stands before or behind a product, in its place: nothing.
struct Nothing {
  static constexpr bool kComputes = false;
  bool Computes() const { return false; }
  void Compute(const Images&, const float*, Size, Size, float*) const {}
  Nothing At(Size, Size, bool) const { return {}; }
};

// Writes, or adds, the first `columns` of a tile, and finishes it.
template <int R, typename Finish = Nothing>
inline __attribute__((always_inline)) void StoreTile(const Lanes (*sums)[2], Size columns, bool add, float* to, Size to_step,
                                                     const Finish& finish = {}) {
  for (int r = 0; r < R; ++r, to += to_step) {
    if (columns == kTileColumns) {
      UNROLL for (int half = 0; half < 2; ++half) {
        float* at = to + half * kLanes;
        Lanes value = add ? Load<Lanes>(at) + sums[r][half] : sums[r][half];
        if constexpr (Finish::kComputes) value = finish.Compute(value, r * to_step, half * kLanes);
        Store(at, value);
      }
    } else {
      float row[kTileColumns];
      std::memcpy(row, sums[r], sizeof(row));
      for (Size c = 0; c < columns; ++c) {
        float value = add ? to[c] + row[c] : row[c];
        if constexpr (Finish::kComputes) value = finish.Compute(value, r * to_step, c);
        to[c] = value;
      }
    }
  }
}

// Fetches the lines that a tile will be written to, while its products are summed.
template <int R>
inline __attribute__((always_inline)) void PrefetchTile(const float* to, Size to_step) {
  for (int r = 0; r < R; ++r) __builtin_prefetch(to + r * to_step, 1);
}

// Calls f with min(rows, kTileRows) as a constant.
template <int R = kTileRows, typename F>
inline void WithRows(Size rows, const F& f) {
  if (rows >= R) return f(std::integral_constant<int, R>());
  if constexpr (R > 1) WithRows<R - 1>(rows, f);
}

// Copies up to kTileColumns columns of `depth` rows of b next to one another, zeros behind the last column.
inline void PackPanel(const float* b, Size step, Size depth, Size columns, float* to) {
  for (Size p = 0; p < depth; ++p, b += step, to += kTileColumns) {
    if (columns >= kTileColumns) {
      std::memcpy(to, b, kTileColumns * sizeof(float));
    } else {
      for (Size c = 0; c < kTileColumns; ++c) to[c] = c < columns ? b[c] : 0.0f;
    }
  }
}

// Some channels at one tap of the kernel.
struct Chunk {
  Size tap, first, size;
};

// The convolution's geometry. Its matrix product has the taps' channels as depth: x [pixels, depth] kernel [depth, filters].
struct Convolution {
  Images in, out;
  Size kernel_height, kernel_width, segments, stride, top, left;
  Size taps, channels, filters;  // of a segment
  std::vector<float> zeros;

  Convolution(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> y, Size segments,
              Size stride, Size top, Size left)
      : in(x), out(y), kernel_height(kernel[0]), kernel_width(kernel[1]), segments(segments), stride(stride), top(top),
        left(left), taps(kernel[0] * kernel[1]), channels(in.channels / segments), filters(out.channels / segments),
        zeros(in.channels) {}

  Size pixels() const { return out.batch * out.height * out.width; }
  Size panels() const { return Ceil(filters, kTileColumns); }

  struct Pixel {
    Size image, row, column;
  };

  Pixel PixelAt(Size index) const {
    return {index / out.width / out.height, index / out.width % out.height, index % out.width};
  }

  Pixel Next(Pixel pixel) const {
    if (++pixel.column == out.width) {
      pixel.column = 0;
      if (++pixel.row == out.height) pixel.row = 0, ++pixel.image;
    }
    return pixel;
  }

  // Where the channels are that an output pixel reads at a tap; zeros outside the image.
  const float* At(const float* x, const Pixel& pixel, Size tap) const {
    const Size row = pixel.row * stride - top + tap / kernel_width;
    const Size column = pixel.column * stride - left + tap % kernel_width;
    if (row < 0 || row >= in.height || column < 0 || column >= in.width) return zeros.data();
    return x + ((pixel.image * in.height + row) * in.width + column) * in.channels;
  }

  // The depth from `begin` to `end`, tap by tap.
  std::vector<Chunk> Chunks(Size begin, Size end) const {
    std::vector<Chunk> chunks;
    for (Size at = begin, size; at < end; at += size) {
      size = std::min(end - at, channels - at % channels);
      chunks.push_back({at / channels, at % channels, size});
    }
    return chunks;
  }

  // Copies some rows of the transposed x, for some pixels, into panels of kTileRows. A last panel of fewer has gaps.
  void PackRows(const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count, float* packed) const {
    const std::vector<Chunk> chunks = Chunks(first_row, first_row + rows);
    float line[kRows];
    Pixel at = PixelAt(pixel);
    for (Size p = 0; p < count; ++p, at = Next(at), packed += kTileRows) {
      auto read = [&](const Chunk& chunk) { return At(x, at, chunk.tap) + segment * channels + chunk.first; };
      const float* from = chunks.size() == 1 ? read(chunks[0]) : line;
      if (float* to = line; from == line)
        for (const Chunk& chunk : chunks) to = std::copy_n(read(chunk), chunk.size, to);
      Size row = 0;
      for (; row + kTileRows <= rows; row += kTileRows)
        std::memcpy(packed + row * count, from + row, kTileRows * sizeof(float));
      std::copy(from + row, from + rows, packed + row * count);
    }
  }
};

// The depth of a convolution, in parts.
struct DepthPart {
  Size begin, depth;
  std::vector<Chunk> chunks;
};

inline std::vector<DepthPart> DepthParts(const Convolution& conv) {
  const Size depth = conv.taps * conv.channels, step = Ceil(depth, Ceil(depth, kDepth));
  std::vector<DepthPart> parts;
  for (Size begin = 0, end; begin < depth; begin = end) {
    end = std::min(depth, begin + step);
    parts.push_back({begin, end - begin, conv.Chunks(begin, end)});
  }
  return parts;
}

// Weights as the products read them: [segment][part][panel][depth of the part][kTileColumns].
inline Size PanelAt(const Convolution& conv, Size segment, const DepthPart& part, Size panel) {
  return ((segment * conv.taps * conv.channels + part.begin) * conv.panels() + panel * part.depth) * kTileColumns;
}

inline void PackKernel(ffi::ThreadPool& pool, const Convolution& conv, const float* kernel, float* packed) {
  const std::vector<DepthPart> parts = DepthParts(conv);
  ParallelFor(pool, conv.segments * conv.panels(), [&](Size task) {
    const Size segment = task / conv.panels(), panel = task % conv.panels(), first = panel * kTileColumns;
    for (const DepthPart& part : parts)
      PackPanel(kernel + part.begin * conv.out.channels + segment * conv.filters + first, conv.out.channels, part.depth,
                conv.filters - first, packed + PanelAt(conv, segment, part, panel));
  });
}

// The same for the input gradient of a convolution, of its kernel [taps][filters][segment][channels]: turned round.
inline void PackTurnedKernel(ffi::ThreadPool& pool, const Convolution& conv, const float* kernel, float* packed) {
  constexpr Size kTogether = 64;  // channels whose lines stay in the L1 cache until they are full
  const std::vector<DepthPart> parts = DepthParts(conv);
  ParallelFor(pool, conv.segments * conv.panels(), [&](Size task) {
    const Size segment = task / conv.panels(), panel = task % conv.panels(), first = panel * kTileColumns;
    const Size columns = std::min<Size>(kTileColumns, conv.filters - first);
    for (const DepthPart& part : parts) {
      float* to = packed + PanelAt(conv, segment, part, panel);
      std::fill_n(to, columns < kTileColumns ? part.depth * kTileColumns : 0, 0.0f);
      for (const Chunk& chunk : part.chunks) {
        const Size row = (conv.taps - 1 - chunk.tap) * conv.filters + first;
        const float* from = kernel + row * conv.in.channels + segment * conv.channels + chunk.first;
        for (Size channel = 0; channel < chunk.size; channel += kTogether)
          for (Size column = 0; column < columns; ++column)
            for (Size c = channel; c < std::min(chunk.size, channel + kTogether); ++c)
              to[c * kTileColumns + column] = from[column * conv.in.channels + c];
        to += chunk.size * kTileColumns;
      }
    }
  });
}

// Rows of x are read where they lie (an indirect convolution: Dukhan 2019, arXiv:1907.02129). With something before the
// product, a block of it is computed at a time, and is still in the cache when the product reads it.
template <typename Before = Nothing, typename Finish = Nothing>
void Multiply(ffi::ThreadPool& pool, const Convolution& conv, const float* x, const float* packed, float* y,
              const Before& before = {}, const Finish& finish = {}) {
  const Size panels = conv.panels(), pixels = conv.pixels(), tiles = Ceil(pixels, kTileRows);
  const std::vector<DepthPart> parts = DepthParts(conv);
  // As many blocks for each thread; two of few pixels rather than one, since cores are not always equally fast.
  const Size threads = std::max<Size>(pool.num_threads(), 1);
  const Size least = std::max(Ceil(pixels, kBlock), std::min(2 * threads, tiles / 4));
  const Size blocks = Ceil(least, threads) * threads;
  ParallelFor(pool, blocks, [&](Size block) {
    const Size begin = tiles * block / blocks * kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * kTileRows, pixels) - begin;
    if (rows <= 0) return;
    std::vector<const float*> at(conv.taps * kBlock);
    std::unique_ptr<float[]> computed(before.Computes() ? new float[rows * conv.in.channels] : nullptr);
    if (before.Computes()) before.Compute(conv.in, x, begin, rows, computed.get());
    auto pixel = conv.PixelAt(begin);
    for (Size row = 0; row < rows; ++row, pixel = conv.Next(pixel))
      for (Size tap = 0; tap < conv.taps; ++tap)
        at[tap * kBlock + row] = before.Computes() ? computed.get() + row * conv.in.channels : conv.At(x, pixel, tap);
    for (Size segment = 0; segment < conv.segments; ++segment) {
      for (const DepthPart& part : parts) {
        for (Size panel = 0; panel < panels; ++panel) {
          const Size first = segment * conv.filters + panel * kTileColumns;
          const float* weights = packed + PanelAt(conv, segment, part, panel);
          for (Size row = 0; row < rows; row += kTileRows) {
            WithRows(rows - row, [&](auto constant) {
              constexpr int R = constant;
              const Size offset = (begin + row) * conv.out.channels + first;
              PrefetchTile<R>(y + offset, conv.out.channels);
              Lanes sums[R][2] = {};
              const float* b = weights;
              for (const Chunk& chunk : part.chunks) {
                const float* a[R];
                UNROLL for (int r = 0; r < R; ++r)
                  a[r] = at[chunk.tap * kBlock + row + r] + segment * conv.channels + chunk.first;
                Accumulate<R, 1>(a, b, chunk.size, sums);
                b += chunk.size * kTileColumns;
              }
              StoreTile<R>(sums, std::min<Size>(kTileColumns, conv.filters - panel * kTileColumns), part.begin > 0,
                           y + offset, conv.out.channels,
                           finish.At(offset, (segment * panels + panel) * kTileColumns, &part == &parts.back()));
            });
          }
        }
      }
    }
  });
}

// With `turned`, the kernel is that of a convolution of which this one is the input gradient.
inline ffi::Error Conv(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t segments, int64_t stride, int64_t top,
                       int64_t left, int64_t turned) {
  const auto k = kernel.dimensions();
  const Size turned_shape[] = {k[0], k[1], k[3] / segments, k[2] * segments};
  const Convolution conv(x.dimensions(), turned ? ffi::Span<const Size>(turned_shape, 4) : k, y->dimensions(), segments,
                         stride, top, left);
  std::unique_ptr<float[]> packed(new float[segments * conv.panels() * conv.taps * conv.channels * kTileColumns]);
  (turned ? PackTurnedKernel : PackKernel)(pool, conv, kernel.typed_data(), packed.get());
  Multiply(pool, conv, x.typed_data(), packed.get(), y->typed_data());
  return ffi::Error::Success();
}

// kernel [depth, filters] = x^T [depth, pixels] dy [pixels, filters], one segment after the other.
inline ffi::Error ConvFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t segments, int64_t stride,
                                     int64_t top, int64_t left) {
  const Convolution conv(x.dimensions(), kernel->dimensions(), dy.dimensions(), segments, stride, top, left);
  const Size depth = conv.taps * conv.channels, panels = conv.panels(), pixels = conv.pixels();
  const Size size = kernel->element_count(), tiles = Ceil(depth, kTileRows), blocks = Ceil(depth, kRows);
  // A task is a block of rows and a part of the pixels. The parts are added at the end, so that their sums should need
  // little memory; and they must not depend on the number of threads.
  const Size most = std::max<Size>(std::min(pixels / 768, (2 << 20) / size), 1);
  const Size parts = std::clamp<Size>(Ceil(32, blocks * segments), 1, most);
  std::unique_ptr<float[]> sums(parts > 1 ? new float[parts * size] : nullptr);
  if (pixels == 0) std::fill_n(kernel->typed_data(), size, 0.0f);
  float* result = parts > 1 ? sums.get() : kernel->typed_data();
  ParallelFor(pool, parts * segments * blocks, [&](Size task) {
    const Size part = task / (segments * blocks), segment = task / blocks % segments, block = task % blocks;
    const Size begin = pixels * part / parts, end = pixels * (part + 1) / parts;
    const Size first_row = tiles * block / blocks * kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * kTileRows, depth) - first_row;
    // [panel of rows][pixel][kTileRows] and [panel][pixel][kTileColumns]
    std::unique_ptr<float[]> a(new float[kRows * kPixels]), b(new float[kTileColumns * kPixels]);
    float* corner = result + part * size + first_row * conv.out.channels + segment * conv.filters;
    for (Size pixel = begin; pixel < end; pixel += kPixels) {
      const Size count = std::min(kPixels, end - pixel);
      conv.PackRows(x.typed_data(), segment, first_row, rows, pixel, count, a.get());
      for (Size panel = 0; panel < panels; ++panel) {
        const Size first = panel * kTileColumns, columns = std::min<Size>(kTileColumns, conv.filters - first);
        PackPanel(dy.typed_data() + pixel * conv.out.channels + segment * conv.filters + first, conv.out.channels, count,
                  columns, b.get());
        for (Size row = 0; row < rows; row += kTileRows) {
          WithRows(rows - row, [&](auto constant) {
            constexpr int R = constant;
            float* to = corner + row * conv.out.channels + first;
            PrefetchTile<R>(to, conv.out.channels);
            Lanes tile[R][2] = {};
            const float* at[R];
            UNROLL for (int r = 0; r < R; ++r) at[r] = a.get() + row * count + r;
            Accumulate<R, kTileRows>(at, b.get(), count, tile);
            StoreTile<R>(tile, columns, pixel > begin, to, conv.out.channels);
          });
        }
      }
    }
  });
  if (parts > 1) AddParts(pool, {sums.get(), size_t(parts * size)}, size, kernel->typed_data());
  return ffi::Error::Success();
}
