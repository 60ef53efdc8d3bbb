// Convolution with any number of segments, and its filter gradient, as products of matrices.

#pragma once

#include "common.h"

// A tile of the result has kTileRows pixels and kTileColumns filters, whose sums stay in registers.
#ifdef __AVX512F__
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileColumns = 2 * kLanes;
constexpr Size kDepth = 256;           // of the products between two stores: a panel of weights stays in the L1 cache
constexpr Size kPacked = 8 * kDepth;   // pixels of dy that are packed at once
constexpr Size kBlock = 16 * kTileRows;  // pixels (or rows of the filter gradient) that share what the L2 cache holds

inline Size Ceil(Size a, Size b) { return (a + b - 1) / b; }

// sums[r] += a[r][p * kStep] * b[p] over p, where b[p] is kTileColumns wide.
template <int R, int kStep>
inline __attribute__((always_inline)) void Accumulate(const float* const* a, const float* b, Size depth, Lanes (*sums)[2]) {
  const float* rows[R];
  UNROLL for (int r = 0; r < R; ++r) rows[r] = a[r];
  for (Size p = 0; p < depth; ++p) {
    const Lanes b0 = Load<Lanes>(b + p * kTileColumns), b1 = Load<Lanes>(b + p * kTileColumns + kLanes);
    UNROLL for (int r = 0; r < R; ++r) {
      const float value = rows[r][p * kStep];
      sums[r][0] += value * b0;
      sums[r][1] += value * b1;
    }
  }
}

// Writes, or adds, the first `columns` of a tile.
template <int R>
inline __attribute__((always_inline)) void StoreTile(const Lanes (*sums)[2], Size columns, bool add, float* to, Size to_step) {
  for (int r = 0; r < R; ++r, to += to_step) {
    if (columns == kTileColumns) {
      UNROLL for (int half = 0; half < 2; ++half) {
        float* at = to + half * kLanes;
        Store(at, add ? Load<Lanes>(at) + sums[r][half] : sums[r][half]);
      }
    } else {
      float row[kTileColumns];
      std::memcpy(row, sums[r], sizeof(row));
      for (Size c = 0; c < columns; ++c) to[c] = add ? to[c] + row[c] : row[c];
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

  // Copies some rows of the transposed x, for some pixels, into panels of kTileRows.
  void PackRows(const float* x, Size segment, Size first_row, Size rows, Size pixel, Size count, float* packed) const {
    const std::vector<Chunk> chunks = Chunks(first_row, first_row + rows);
    float line[kBlock] = {};
    Pixel at = PixelAt(pixel);
    for (Size p = 0; p < count; ++p, at = Next(at)) {
      float* to = line;
      for (const Chunk& chunk : chunks)
        to = std::copy_n(At(x, at, chunk.tap) + segment * channels + chunk.first, chunk.size, to);
      for (Size row = 0; row < rows; row += kTileRows)
        std::memcpy(packed + row * count + p * kTileRows, line + row, kTileRows * sizeof(float));
    }
  }
};

// Rows of x are read where they lie (an indirect convolution: Dukhan 2019, arXiv:1907.02129); weights are packed.
inline ffi::Error Conv(ffi::ThreadPool pool, Input x, Input kernel, Output y, int64_t segments, int64_t stride, int64_t top,
                       int64_t left) {
  const Convolution conv(x.dimensions(), kernel.dimensions(), y->dimensions(), segments, stride, top, left);
  const Size depth = conv.taps * conv.channels, panels = conv.panels(), pixels = conv.pixels();
  const Size parts = Ceil(depth, kDepth), part_depth = Ceil(depth, parts);
  struct Part {
    Size begin, depth;
    std::vector<Chunk> chunks;
  };
  std::vector<Part> depth_parts;
  for (Size begin = 0; begin < depth; begin += part_depth) {
    const Size end = std::min(depth, begin + part_depth);
    depth_parts.push_back({begin, end - begin, conv.Chunks(begin, end)});
  }
  // [segment][part][panel][depth of the part][kTileColumns]
  std::unique_ptr<float[]> packed(new float[segments * panels * depth * kTileColumns]);
  const auto panel_of = [&](Size segment, const Part& part, Size panel) {
    return packed.get() + ((segment * depth + part.begin) * panels + panel * part.depth) * kTileColumns;
  };
  ParallelFor(pool, segments * panels, [&](Size task) {
    const Size segment = task / panels, panel = task % panels, first = panel * kTileColumns;
    for (const Part& part : depth_parts)
      PackPanel(kernel.typed_data() + part.begin * conv.out.channels + segment * conv.filters + first, conv.out.channels,
                part.depth, conv.filters - first, panel_of(segment, part, panel));
  });
  // As many blocks for each thread.
  const Size threads = std::max<Size>(pool.num_threads(), 1), blocks = Ceil(Ceil(pixels, kBlock), threads) * threads;
  const Size tiles = Ceil(pixels, kTileRows);
  ParallelFor(pool, blocks, [&](Size block) {
    const Size begin = tiles * block / blocks * kTileRows;
    const Size rows = std::min(tiles * (block + 1) / blocks * kTileRows, pixels) - begin;
    std::vector<const float*> at(conv.taps * kBlock);
    auto pixel = conv.PixelAt(begin);
    for (Size row = 0; row < rows; ++row, pixel = conv.Next(pixel))
      for (Size tap = 0; tap < conv.taps; ++tap) at[tap * kBlock + row] = conv.At(x.typed_data(), pixel, tap);
    for (Size segment = 0; segment < segments; ++segment) {
      for (const Part& part : depth_parts) {
        for (Size panel = 0; panel < panels; ++panel) {
          const Size first = panel * kTileColumns;
          float* to = y->typed_data() + begin * conv.out.channels + segment * conv.filters + first;
          for (Size row = 0; row < rows; row += kTileRows) {
            WithRows(rows - row, [&](auto constant) {
              constexpr int R = constant;
              PrefetchTile<R>(to + row * conv.out.channels, conv.out.channels);
              Lanes sums[R][2] = {};
              const float* b = panel_of(segment, part, panel);
              for (const Chunk& chunk : part.chunks) {
                const float* a[R];
                UNROLL for (int r = 0; r < R; ++r)
                  a[r] = at[chunk.tap * kBlock + row + r] + segment * conv.channels + chunk.first;
                Accumulate<R, 1>(a, b, chunk.size, sums);
                b += chunk.size * kTileColumns;
              }
              StoreTile<R>(sums, std::min<Size>(kTileColumns, conv.filters - first), part.begin > 0,
                           to + row * conv.out.channels, conv.out.channels);
            });
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

// kernel [depth, filters] = x^T [depth, pixels] dy [pixels, filters], one segment after the other.
inline ffi::Error ConvFilterGradient(ffi::ThreadPool pool, Input x, Input dy, Output kernel, int64_t segments, int64_t stride,
                                     int64_t top, int64_t left) {
  const Convolution conv(x.dimensions(), kernel->dimensions(), dy.dimensions(), segments, stride, top, left);
  const Size depth = conv.taps * conv.channels, panels = conv.panels(), pixels = conv.pixels();
  const Size size = kernel->element_count(), blocks = Ceil(depth, kBlock);
  // Pixels are cut into parts as long as that needs little memory: their sums are added at the end. Blocks of rows are
  // cut into groups, as many as keep the threads busy; each group packs dy for itself.
  const Size parts = std::clamp<Size>(std::min<Size>(pixels / 768, (2 << 20) / size), 1, 64);
  const Size groups = std::clamp<Size>(Ceil(4 * pool.num_threads(), parts * segments), 1, blocks);
  std::vector<float> sums(parts > 1 ? parts * size : 0);
  if (pixels == 0) std::fill_n(kernel->typed_data(), size, 0.0f);
  float* result = parts > 1 ? sums.data() : kernel->typed_data();
  ParallelFor(pool, parts * segments * groups, [&](Size task) {
    const Size part = task / (segments * groups), segment = task / groups % segments, group = task % groups;
    const Size begin = pixels * part / parts, end = pixels * (part + 1) / parts;
    // [panel of rows][pixel][kTileRows] and [depth part][panel][pixel][kTileColumns]
    std::unique_ptr<float[]> a(new float[kBlock * kDepth]), b(new float[panels * kTileColumns * kPacked]);
    for (Size start = begin; start < end; start += kPacked) {
      const Size stop = std::min(end, start + kPacked);
      for (Size pixel = start; pixel < stop; pixel += kDepth) {
        const Size count = std::min(kDepth, stop - pixel);
        for (Size panel = 0; panel < panels; ++panel) {
          const Size first = panel * kTileColumns;
          PackPanel(dy.typed_data() + pixel * conv.out.channels + segment * conv.filters + first, conv.out.channels,
                    count, conv.filters - first, b.get() + ((pixel - start) * panels + panel * count) * kTileColumns);
        }
      }
      for (Size block = blocks * group / groups; block < blocks * (group + 1) / groups; ++block) {
        const Size first_row = block * kBlock, rows = std::min(kBlock, depth - first_row);
        float* corner = result + part * size + first_row * conv.out.channels + segment * conv.filters;
        for (Size pixel = start; pixel < stop; pixel += kDepth) {
          const Size count = std::min(kDepth, stop - pixel);
          conv.PackRows(x.typed_data(), segment, first_row, rows, pixel, count, a.get());
          for (Size panel = 0; panel < panels; ++panel) {
            const float* packed = b.get() + ((pixel - start) * panels + panel * count) * kTileColumns;
            const Size columns = std::min<Size>(kTileColumns, conv.filters - panel * kTileColumns);
            for (Size row = 0; row < rows; row += kTileRows) {
              WithRows(rows - row, [&](auto constant) {
                constexpr int R = constant;
                float* to = corner + row * conv.out.channels + panel * kTileColumns;
                PrefetchTile<R>(to, conv.out.channels);
                Lanes tile[R][2] = {};
                const float* at[R];
                UNROLL for (int r = 0; r < R; ++r) at[r] = a.get() + row * count + r;
                Accumulate<R, kTileRows>(at, packed, count, tile);
                StoreTile<R>(tile, columns, pixel > begin, to, conv.out.channels);
              });
            }
          }
        }
      }
    }
  });
  if (parts > 1) AddParts(pool, sums, size, kernel->typed_data());
  return ffi::Error::Success();
}
