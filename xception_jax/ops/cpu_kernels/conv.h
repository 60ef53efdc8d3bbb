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

// Rows of a matrix: so many floats apart,
struct EvenRows {
  Size step;
  Size operator()(Size row) const { return row * step; }
};
// or each somewhere.
struct PlacedRows {
  const Size* offsets;
  Size operator()(Size row) const { return offsets[row]; }
};

// Where a product with a panel goes: `columns` columns of rows that are counted from `corner` on.
template <typename Rows, typename Finish = Nothing>
struct Target {
  float* corner;
  Rows place;
  Size columns;
  bool add;      // to what is there
  bool streams;  // past the caches
  Finish finish{};

  // Fetches what `Store` will write, so that it comes while the sums are computed. Not inlined, a function that only fetches
  // would be one without effect to GCC, and its calls be dropped.
  ALWAYS_INLINE void Expect(Size row, Size rows) const {
    if (streams) return;
    for (const Size end = row + rows; row < end; ++row)
      for (Size c = 0; c < columns + kLine - 1; c += kLine)
        __builtin_prefetch(corner + place(row) + std::min(c, columns - 1), 1);
  }

  // Some rows of the product, each V vectors wide.
  template <int V, typename Count>
  ALWAYS_INLINE void Store(Size row, const Lanes (*sums)[V], Count rows) const {
    UNROLL for (int v = 0; v < V; ++v) {
      const auto store = [&](const auto& vector) {
        UNROLL for (Size r = 0; r < rows; ++r) {
          const Size offset = place(row + r) + v * kLanes;
          Lanes value = add ? vector.Load(corner + offset) + sums[r][v] : sums[r][v];
          if constexpr (Finish::kComputes) value = finish.Compute(value, vector, offset, v * kLanes);
          vector.Store(corner + offset, value);
        }
      };
      if (const Size count = columns - v * kLanes; count >= kLanes) store(WholeVector{streams});
      else if (count > 0) store(PartOfVector{count});
    }
  }
};

// The columns of a product's panel.
template <typename Product>
struct Panel {
  Size begin, columns;
  Panel(Size columns, Size panel)
      : begin(Product::PanelBegin(columns, panel)),
        columns(std::min(Product::PanelBegin(columns, panel + 1), columns) - begin) {}
};

// How many columns a product packs for so many filters.
template <typename Product>
Size PackedColumns(Size filters) { return Product::PanelBegin(filters, Product::Panels(filters)); }

// Weights as the products read them: [segment][part][panel].
template <typename Product>
Size PanelAt(const Convolution& conv, Size segment, const DepthPart& part, Size panel) {
  const Size columns = PackedColumns<Product>(conv.filters);
  return segment * Product::PackedSize(conv.depth(), columns) + Product::PackedSize(part.begin, columns) +
         Product::PackedSize(part.depth, Product::PanelBegin(conv.filters, panel));
}

// With `turned`, the kernel [taps][filters][segment][channels] is that of a convolution of which this one is the input
// gradient, and turned round.
template <typename Product>
void PackKernel(ffi::ThreadPool& pool, const Convolution& conv, const float* kernel, bool turned, float* packed) {
  constexpr Size kTogether = 64;  // channels whose lines stay in the L1 cache until they are full
  const std::vector<DepthPart> parts = DepthParts(conv, Product::kDepth);
  const Size panels = Product::Panels(conv.filters);
  ParallelFor(pool, conv.segments * panels, [&](Size task) {
    const Size segment = task / panels, panel = task % panels;
    const auto [first, columns] = Panel<Product>(conv.filters, panel);
    const Buffer turned_panel = turned ? NewBuffer(Product::kDepth * columns) : nullptr;
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
              at[c * columns + column] = from[column * conv.in.channels + c];
        at += chunk.size * columns;
      }
      Product::PackPanel(turned_panel.get(), columns, part.depth, columns, to);
    }
  });
}

// With something before the product, a block of it is computed at a time, and is still in the cache when the product reads it.
template <typename Product, typename Before = Nothing, typename Finish = Nothing>
void Multiply(ffi::ThreadPool& pool, Convolution conv, const float* x, const float* packed, float* y,
              const Before& before = {}, const Finish& finish = {}) {
  if (Product::kPassesOver) conv.GoTogether();
  const Size panels = Product::Panels(conv.filters), pixels = conv.pixels(), tiles = Ceil(pixels, Product::kTileRows);
  const std::vector<DepthPart> parts = DepthParts(conv, Product::kDepth);
  const bool streams = parts.size() == 1 && conv.filters % kLanes == 0 && Streams(y, pixels * conv.out.channels, conv.out.channels);
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
    Size offsets[Product::kBlock];
    for (Size row = 0; row < rows; ++row, pixel = conv.Next(pixel)) {
      offsets[row] = conv.OutOffset(pixel);
      for (Size tap = 0; tap < conv.taps; ++tap)
        at[tap * Product::kBlock + row] = before.Computes() ? computed.get() + row * conv.in.channels : conv.At(x, pixel, tap);
    }
    typename Product::PixelRows a;
    for (Size segment = 0; segment < conv.segments; ++segment) {
      for (const DepthPart& part : parts) {
        a.Read(at.data(), conv.zeros.data(), segment * conv.channels, part, rows);
        for (Size panel = 0; panel < panels; ++panel) {
          const auto [first, columns] = Panel<Product>(conv.filters, panel);
          const Size corner = segment * conv.filters + first;
          const Target to{y + corner, PlacedRows{offsets}, columns, part.begin > 0, streams,
                          finish.At(corner, segment * PackedColumns<Product>(conv.filters) + first, &part == &parts.back())};
          a.Multiply(packed + PanelAt<Product>(conv, segment, part, panel), to);
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
    const Buffer packed = NewBuffer(segments * Product::PackedSize(conv.depth(), PackedColumns<Product>(conv.filters)));
    PackKernel<Product>(pool, conv, kernel.typed_data(), turned, packed.get());
    Multiply<Product>(pool, conv, x.typed_data(), packed.get(), y->typed_data());
  });
  return ffi::Error::Success();
}

// kernel [depth, filters] = x^T [depth, pixels] dy [pixels, filters], one segment after the other.
template <typename Product>
void MultiplyTransposed(ffi::ThreadPool& pool, Convolution conv, const float* x, const float* dy, float* kernel) {
  if (Product::kPassesOver) conv.GoTogether();
  const Size depth = conv.depth(), panels = Product::Panels(conv.filters), pixels = conv.pixels();
  const Size size = depth * conv.out.channels, tiles = Ceil(depth, Product::kTileRows);
  const Size segments = conv.segments, threads = std::max<Size>(pool.num_threads(), 1);
  // A task is a block of rows and a part of the pixels. The parts are added at the end, so that their sums should need
  // little memory; and they must not depend on the number of threads.
  Size blocks = Ceil(depth, Product::kRows);
  const Size most = std::max<Size>(std::min(pixels / 768, (2 << 20) / size), 1);
  const Size parts = std::clamp<Size>(Ceil(32, blocks * segments), 1, most);
  // A few tasks, as many for each thread.
  if (parts * segments * blocks < 4 * threads) blocks = std::min(Ceil(blocks, threads) * threads, tiles);
  std::unique_ptr<float[]> sums(parts > 1 ? new float[parts * size] : nullptr);
  if (pixels == 0) std::fill_n(kernel, size, 0.0f);
  float* result = parts > 1 ? sums.get() : kernel;
  ParallelFor(pool, parts * segments * blocks, [&](Size task) {
    const Size part = task / (segments * blocks), segment = task / blocks % segments, block = task % blocks;
    const Size begin = pixels * part / parts, end = pixels * (part + 1) / parts;
    const Size first_row = tiles * block / blocks * Product::kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * Product::kTileRows, depth) - first_row;
    typename Product::ChannelRows a;
    float* corner = result + part * size + first_row * conv.out.channels + segment * conv.filters;
    for (Size pixel = begin, count; pixel < end; pixel += count) {
      count = std::min({Product::kPixels, end - pixel, conv.Run(pixel)});
      a.Read(conv, x, segment, first_row, rows, pixel, count);
      const float* gradient = dy + conv.OutOffset(conv.PixelAt(pixel)) + segment * conv.filters;
      for (Size panel = 0; panel < panels; ++panel) {
        const auto [first, columns] = Panel<Product>(conv.filters, panel);
        const Target to{corner + first, EvenRows{conv.out.channels}, columns, pixel > begin, false, Nothing()};
        a.Multiply(gradient + first, conv.OutStep(), to);
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
