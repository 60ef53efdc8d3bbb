// The geometry of a convolution that is computed as a matrix product (GEMM).
//
// For each segment of channels, with the layouts of NHWC and HWIO:
//
//   y [pixels, filters] = X [pixels, depth] kernel [depth, filters]
//
// A pixel is an output pixel. The depth enumerates (tap, channel), channels fastest; a tap is a position (row, column) in the
// window of the kernel. X is never built (im2col): it is an indirection. Row p of X consists of one run of channels for each
// tap, which lies in x, or in a row of zeros where the tap falls into the padding (an indirect convolution: Dukhan 2019,
// arXiv:1907.02129).

#pragma once

#include <vector>

#include "simd.h"

// The shape of a batch of images or activations, NHWC.
struct ImageShape {
  Size batch, height, width, channels;
  explicit ImageShape(ffi::Span<const int64_t> d) : batch(d[0]), height(d[1]), width(d[2]), channels(d[3]) {}
};

// A contiguous range of the depth within one tap.
struct Chunk {
  Size tap, channel, size;  // channel: of the segment
};

// A contiguous range of the depth.
struct DepthBlock {
  Size begin, depth;
  std::vector<Chunk> chunks;
};

// Returns the values of `chunks` as one contiguous array; source(chunk) points at those of one. A single chunk is read in
// place, several are copied to `buffer`.
template <typename Source>
const float* Concatenate(const std::vector<Chunk>& chunks, float* buffer, const Source& source) {
  if (chunks.size() == 1) return source(chunks[0]);
  float* to = buffer;
  for (const Chunk& chunk : chunks) {
    CopyFew(source(chunk), chunk.size, to);
    to += chunk.size;
  }
  return buffer;
}

struct Convolution {
  ImageShape in, out;
  Size segments, stride, top, left;  // top, left: rows and columns of padding
  Size taps, channels, filters;      // channels, filters: of a segment
  std::vector<float> zeros;          // read in the padding
  std::vector<std::pair<Size, Size>> tap_positions;  // (row, column) in the window
  Size interleaved = 1;  // images in a group; see `InterleaveImages`

  Convolution(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> y, Size segments,
              Size stride, Size top, Size left)
      : in(x), out(y), segments(segments), stride(stride), top(top), left(left), taps(kernel[0] * kernel[1]),
        channels(in.channels / segments), filters(out.channels / segments), zeros(in.channels) {
    for (Size tap = 0; tap < taps; ++tap) tap_positions.emplace_back(tap / kernel[1], tap % kernel[1]);
  }

  Size pixels() const { return out.batch * out.height * out.width; }
  Size depth() const { return taps * channels; }

  // A position in the order in which pixels are enumerated: as they lie in memory, or, with interleaved images, all images of
  // a group at one (row, column) before the next.
  struct Pixel {
    Size image, row, column;
    Size group_begin, group_end;  // images
  };

  Pixel PixelAt(Size index) const {
    const Size begin = index / (interleaved * out.height * out.width) * interleaved;
    const Size end = std::min(begin + interleaved, out.batch);
    const Size in_group = index - begin * out.height * out.width, position = in_group / (end - begin);
    return {begin + in_group % (end - begin), position / out.width, position % out.width, begin, end};
  }

  Pixel Next(Pixel pixel) const {
    if (++pixel.image < pixel.group_end) return pixel;
    pixel.image = pixel.group_begin;
    if (++pixel.column < out.width) return pixel;
    pixel.column = 0;
    if (++pixel.row < out.height) return pixel;
    return {pixel.group_end, 0, 0, pixel.group_end, std::min(pixel.group_end + interleaved, out.batch)};
  }

  // Returns how many pixels from `index` on lie at equal distances of `OutputStep()` floats in y.
  Size EvenlySpaced(Size index) const {
    if (interleaved == 1) return pixels() - index;
    const Pixel pixel = PixelAt(index);
    return pixel.group_end - pixel.image;
  }
  Size OutputStep() const { return (interleaved == 1 ? 1 : out.height * out.width) * out.channels; }
  Size OutputOffset(const Pixel& pixel) const {
    return ((pixel.image * out.height + pixel.row) * out.width + pixel.column) * out.channels;
  }

  // Returns the channels (of all segments) that a pixel reads at a tap.
  const float* InputAt(const float* x, const Pixel& pixel, Size tap) const {
    const Size row = pixel.row * stride - top + tap_positions[tap].first;
    const Size column = pixel.column * stride - left + tap_positions[tap].second;
    if (row < 0 || row >= in.height || column < 0 || column >= in.width) return zeros.data();
    return x + ((pixel.image * in.height + row) * in.width + column) * in.channels;
  }

  // Interleaves small images if much of what their pixels read is padding. The rows of a tile then are the same pixel of
  // several images, so that a tap in the padding is so for all of them, and is skipped.
  void InterleaveImages() {
    constexpr double kMostInside = 0.85;  // share of taps that are not padding: with more, there is too little to skip
    constexpr Size kMostFloats = kL2Bytes / 2 / sizeof(float);  // of the input of a group
    constexpr Size kMostImages = 64, kLeastImages = 16, kMultiple = 8;  // a group consists of whole tiles, of 8 or 4 rows
    const auto inside = [&](Size taps, Size padding, Size in, Size out) {
      Size count = 0;
      for (Size at = 0; at < out; ++at)
        for (Size tap = 0; tap < taps; ++tap) count += 0 <= at * stride - padding + tap && at * stride - padding + tap < in;
      return count;
    };
    const auto [last_row, last_column] = tap_positions.back();
    const Size taps_inside = inside(last_row + 1, top, in.height, out.height) * inside(last_column + 1, left, in.width, out.width);
    const Size fit = kMostFloats / std::max<Size>(in.height * in.width * in.channels, 1);
    const Size images = RoundDown(std::min(kMostImages, fit), kMultiple);
    if (taps_inside < kMostInside * taps * out.height * out.width && std::min(images, out.batch) >= kLeastImages)
      interleaved = images;
  }

  // Returns the depth from `begin` to `end`, cut where a tap ends.
  std::vector<Chunk> Chunks(Size begin, Size end) const {
    std::vector<Chunk> chunks;
    for (Size at = begin, size; at < end; at += size) {
      size = std::min(end - at, channels - at % channels);
      chunks.push_back({at / channels, at % channels, size});
    }
    return chunks;
  }

  // Returns what a pixel reads of some chunks, as one contiguous array; `buffer` has room for it.
  const float* Gather(const float* x, const Pixel& pixel, Size segment, const std::vector<Chunk>& chunks, float* buffer) const {
    return Concatenate(chunks, buffer, [&](const Chunk& chunk) {
      return InputAt(x, pixel, chunk.tap) + segment * channels + chunk.channel;
    });
  }

  // Cuts the depth into blocks of about the same size: a multiple of kDepthStep, at most `most`.
  std::vector<DepthBlock> DepthBlocks(Size most) const {
    constexpr Size kDepthStep = 32;  // of AMX, see amx.h
    const Size step = RoundUp(CeilDiv(depth(), CeilDiv(depth(), most)), kDepthStep);
    std::vector<DepthBlock> blocks;
    for (Size begin = 0, end; begin < depth(); begin = end) {
      end = std::min(depth(), begin + step);
      blocks.push_back({begin, end - begin, Chunks(begin, end)});
    }
    return blocks;
  }
};
