// Convolution with any number of segments, alone or with what stands around it in a network without BatchNorm, and its
// filter gradient: products of matrices.

#pragma once

#include "fma.h"
#ifdef __AMX_BF16__
#include "amx.h"
#endif

// Whether the process has leave to use AMX; __init__.py asks for it.
extern "C" {
int64_t may_use_amx = 0;
}

// Calls f(Product()) with the faster of the ways to multiply matrices of this depth with so many filters.
template <typename F>
auto WithProduct(Size depth, Size filters, const F& f) {
#ifdef __AMX_BF16__
  // With less, it costs more to bring the matrices into the order of the registers than their products take.
  if (may_use_amx && std::min(depth, filters) >= 64) return f(Amx());
#endif
  return f(Fma());
}

// What stands before or behind a product, in its place: nothing.
struct Nothing {
  static constexpr bool kComputes = false;
  bool Computes() const { return false; }
  void Compute(const Images&, const float*, Size, Size, float*) const {}
  Nothing At(Size, Size, bool) const { return {}; }
};

// Writes, or adds, the first `columns` of a tile, and finishes it.
template <typename Rows, typename Finish = Nothing>
inline __attribute__((always_inline)) void StoreTile(const Sums* sums, Rows rows, Size columns, bool add, float* to,
                                                     Size to_step, const Finish& finish = {}) {
  for (int r = 0; r < rows; ++r, to += to_step) {
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

// Weights as the products read them: [segment][part][panel], a panel of kTileColumns filters.
inline Size Panels(Size filters) { return Ceil(filters, kTileColumns); }

template <typename Product>
Size PanelAt(const Convolution& conv, Size segment, const DepthPart& part, Size panel) {
  return (segment * Product::PanelSize(conv.depth()) + Product::PanelSize(part.begin)) * Panels(conv.filters) +
         panel * Product::PanelSize(part.depth);
}

// With `turned`, the kernel [taps][filters][segment][channels] is that of a convolution of which this one is the input
// gradient, and turned round.
template <typename Product>
void PackKernel(ffi::ThreadPool& pool, const Convolution& conv, const float* kernel, bool turned, float* packed) {
  constexpr Size kTogether = 64;  // channels whose lines stay in the L1 cache until they are full
  const std::vector<DepthPart> parts = DepthParts(conv, Product::kDepth);
  ParallelFor(pool, conv.segments * Panels(conv.filters), [&](Size task) {
    const Size segment = task / Panels(conv.filters), panel = task % Panels(conv.filters), first = panel * kTileColumns;
    const Size columns = std::min<Size>(kTileColumns, conv.filters - first);
    const Buffer turned_panel = turned ? NewBuffer(Product::kDepth * kTileColumns) : nullptr;
    for (const DepthPart& part : parts) {
      float* to = packed + PanelAt<Product>(conv, segment, part, panel);
      if (!turned) {
        Product::PackPanel(kernel + part.begin * conv.out.channels + segment * conv.filters + first, conv.out.channels, part.depth,
                  columns, to);
        continue;
      }
      float* at = turned_panel.get();
      for (const Chunk& chunk : part.chunks) {
        const Size row = (conv.taps - 1 - chunk.tap) * conv.filters + first;
        const float* from = kernel + row * conv.in.channels + segment * conv.channels + chunk.first;
        for (Size channel = 0; channel < chunk.size; channel += kTogether)
          for (Size column = 0; column < columns; ++column)
            for (Size c = channel; c < std::min(chunk.size, channel + kTogether); ++c)
              at[c * kTileColumns + column] = from[column * conv.in.channels + c];
        at += chunk.size * kTileColumns;
      }
      Product::PackPanel(turned_panel.get(), kTileColumns, part.depth, columns, to);
    }
  });
}

// With something before the product, a block of it is computed at a time, and is still in the cache when the product reads it.
template <typename Product, typename Before = Nothing, typename Finish = Nothing>
void Multiply(ffi::ThreadPool& pool, const Convolution& conv, const float* x, const float* packed, float* y,
              const Before& before = {}, const Finish& finish = {}) {
  const Size panels = Panels(conv.filters), pixels = conv.pixels(), tiles = Ceil(pixels, Product::kTileRows);
  const std::vector<DepthPart> parts = DepthParts(conv, Product::kDepth);
  // As many blocks for each thread; two of few pixels rather than one, since cores are not always equally fast.
  const Size threads = std::max<Size>(pool.num_threads(), 1);
  const Size least = std::max(Ceil(pixels, Product::kBlock), std::min(2 * threads, tiles / 4));
  const Size blocks = Ceil(least, threads) * threads;
  ParallelFor(pool, blocks, [&](Size block) {
    const Size begin = tiles * block / blocks * Product::kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * Product::kTileRows, pixels) - begin;
    if (rows <= 0) return;
    std::vector<const float*> at(conv.taps * Product::kBlock);
    std::unique_ptr<float[]> computed(before.Computes() ? new float[rows * conv.in.channels] : nullptr);
    if (before.Computes()) before.Compute(conv.in, x, begin, rows, computed.get());
    auto pixel = conv.PixelAt(begin);
    for (Size row = 0; row < rows; ++row, pixel = conv.Next(pixel))
      for (Size tap = 0; tap < conv.taps; ++tap)
        at[tap * Product::kBlock + row] = before.Computes() ? computed.get() + row * conv.in.channels : conv.At(x, pixel, tap);
    typename Product::PixelRows a;
    for (Size segment = 0; segment < conv.segments; ++segment) {
      for (const DepthPart& part : parts) {
        a.Read(at.data(), segment * conv.channels, part, rows);
        for (Size panel = 0; panel < panels; ++panel) {
          const Size first = segment * conv.filters + panel * kTileColumns;
          const Size columns = std::min<Size>(kTileColumns, conv.filters - panel * kTileColumns);
          a.Multiply(packed + PanelAt<Product>(conv, segment, part, panel), columns, [&](Size row, const Sums* sums, auto tile_rows) {
            const Size offset = (begin + row) * conv.out.channels + first;
            StoreTile(sums, tile_rows, columns, part.begin > 0, y + offset, conv.out.channels,
                      finish.At(offset, (segment * panels + panel) * kTileColumns, &part == &parts.back()));
          });
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
  WithProduct(conv.depth(), conv.filters, [&]<typename Product>(Product) {
    const Buffer packed = NewBuffer(segments * Panels(conv.filters) * Product::PanelSize(conv.depth()));
    PackKernel<Product>(pool, conv, kernel.typed_data(), turned, packed.get());
    Multiply<Product>(pool, conv, x.typed_data(), packed.get(), y->typed_data());
  });
  return ffi::Error::Success();
}

// kernel [depth, filters] = x^T [depth, pixels] dy [pixels, filters], one segment after the other.
template <typename Product>
void MultiplyTransposed(ffi::ThreadPool& pool, const Convolution& conv, const float* x, const float* dy, float* kernel) {
  const Size depth = conv.depth(), panels = Panels(conv.filters), pixels = conv.pixels();
  const Size size = depth * conv.out.channels, tiles = Ceil(depth, Product::kTileRows);
  const Size segments = conv.segments, blocks = Ceil(depth, Product::kRows);
  // A task is a block of rows and a part of the pixels. The parts are added at the end, so that their sums should need
  // little memory; and they must not depend on the number of threads.
  const Size most = std::max<Size>(std::min(pixels / 768, (2 << 20) / size), 1);
  const Size parts = std::clamp<Size>(Ceil(32, blocks * segments), 1, most);
  std::unique_ptr<float[]> sums(parts > 1 ? new float[parts * size] : nullptr);
  if (pixels == 0) std::fill_n(kernel, size, 0.0f);
  float* result = parts > 1 ? sums.get() : kernel;
  ParallelFor(pool, parts * segments * blocks, [&](Size task) {
    const Size part = task / (segments * blocks), segment = task / blocks % segments, block = task % blocks;
    const Size begin = pixels * part / parts, end = pixels * (part + 1) / parts;
    const Size first_row = tiles * block / blocks * Product::kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * Product::kTileRows, depth) - first_row;
    typename Product::ChannelRows a;
    const Buffer b = NewBuffer(Product::PanelSize(Product::kPixels));
    float* corner = result + part * size + first_row * conv.out.channels + segment * conv.filters;
    for (Size pixel = begin; pixel < end; pixel += Product::kPixels) {
      const Size count = std::min(Product::kPixels, end - pixel);
      a.Read(conv, x, segment, first_row, rows, pixel, count);
      for (Size panel = 0; panel < panels; ++panel) {
        const Size first = panel * kTileColumns, columns = std::min<Size>(kTileColumns, conv.filters - first);
        Product::PackPanel(dy + pixel * conv.out.channels + segment * conv.filters + first, conv.out.channels, count,
                  columns, b.get());
        a.Multiply(b.get(), columns, [&](Size row, const Sums* sums, auto tile_rows) {
          StoreTile(sums, tile_rows, columns, pixel > begin, corner + row * conv.out.channels + first, conv.out.channels);
        });
      }
    }
  });
  if (parts > 1) AddParts(pool, {sums.get(), size_t(parts * size)}, size, kernel);
}

inline ffi::Error ConvFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t segments, int64_t stride,
                                     int64_t top, int64_t left) {
  const Convolution conv(x.dimensions(), kernel->dimensions(), dy.dimensions(), segments, stride, top, left);
  WithProduct(conv.depth(), conv.filters, [&]<typename Product>(Product) {
    MultiplyTransposed<Product>(pool, conv, x.typed_data(), dy.typed_data(), kernel->typed_data());
  });
  return ffi::Error::Success();
}
