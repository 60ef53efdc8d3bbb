// The geometry of a convolution as a product of matrices.

#pragma once

#include "common.h"

// Some channels at one tap of the kernel.
struct Chunk {
  Size tap, first, size;
};

// Some chunks in one piece, each from where read(chunk) points: in place if there is one, else copied to `line`.
template <typename Read>
const float* InOnePiece(const std::vector<Chunk>& chunks, float* line, const Read& read) {
  if (chunks.size() == 1) return read(chunks[0]);
  float* to = line;
  for (const Chunk& chunk : chunks) {
    CopyFew(read(chunk), chunk.size, to);
    to += chunk.size;
  }
  return line;
}

// The convolution's geometry. Its matrix product has the taps' channels as depth: x [pixels, depth] kernel [depth, filters].
struct Convolution {
  Images in, out;
  Size segments, stride, top, left;
  Size taps, channels, filters;  // of a segment
  std::vector<float> zeros;
  std::vector<std::pair<Size, Size>> places;  // row and column of each tap, so that no pixel costs a division
  Size together = 1;                          // images that are gone through pixel by pixel, all of them at one before the next

  Convolution(ffi::Span<const int64_t> x, ffi::Span<const int64_t> kernel, ffi::Span<const int64_t> y, Size segments,
              Size stride, Size top, Size left)
      : in(x), out(y), segments(segments), stride(stride), top(top), left(left), taps(kernel[0] * kernel[1]),
        channels(in.channels / segments), filters(out.channels / segments), zeros(in.channels) {
    for (Size tap = 0; tap < taps; ++tap) places.emplace_back(tap / kernel[1], tap % kernel[1]);
  }

  Size pixels() const { return out.batch * out.height * out.width; }
  Size depth() const { return taps * channels; }

  struct Pixel {
    Size image, row, column;
    Size first, end;  // of the images that are gone through together
  };

  // The pixels in the order in which they are gone through.
  Pixel PixelAt(Size index) const {
    const Size first = index / (together * out.height * out.width) * together, end = std::min(first + together, out.batch);
    const Size within = index - first * out.height * out.width, place = within / (end - first);
    return {first + within % (end - first), place / out.width, place % out.width, first, end};
  }

  Pixel Next(Pixel pixel) const {
    if (++pixel.image < pixel.end) return pixel;
    pixel.image = pixel.first;
    if (++pixel.column < out.width) return pixel;
    pixel.column = 0;
    if (++pixel.row < out.height) return pixel;
    return {pixel.end, 0, 0, pixel.end, std::min(pixel.end + together, out.batch)};
  }

  // How many pixels from the one at `index` on lie in steps of `OutStep` in the output.
  Size Run(Size index) const {
    if (together == 1) return pixels() - index;
    const Pixel pixel = PixelAt(index);
    return pixel.end - pixel.image;
  }
  Size OutStep() const { return (together == 1 ? 1 : out.height * out.width) * out.channels; }
  Size OutOffset(const Pixel& pixel) const {
    return ((pixel.image * out.height + pixel.row) * out.width + pixel.column) * out.channels;
  }

  // Where the channels are that an output pixel reads at a tap; zeros outside the image.
  const float* At(const float* x, const Pixel& pixel, Size tap) const {
    const Size row = pixel.row * stride - top + places[tap].first;
    const Size column = pixel.column * stride - left + places[tap].second;
    if (row < 0 || row >= in.height || column < 0 || column >= in.width) return zeros.data();
    return x + ((pixel.image * in.height + row) * in.width + column) * in.channels;
  }

  // Goes through as many images together as a cache can hold, if many of the taps lie outside of them: what all pixels of a
  // tile read outside need not be multiplied.
  void GoTogether() {
    const auto inside = [&](Size taps, Size first, Size in, Size out) {
      Size count = 0;
      for (Size at = 0; at < out; ++at)
        for (Size tap = 0; tap < taps; ++tap) count += 0 <= at * stride - first + tap && at * stride - first + tap < in;
      return count;
    };
    const auto [last_row, last_column] = places.back();
    const Size read = inside(last_row + 1, top, in.height, out.height) * inside(last_column + 1, left, in.width, out.width);
    const Size images = std::min<Size>(64, (1 << 18) / std::max<Size>(in.height * in.width * in.channels, 1)) / 8 * 8;
    if (read < 0.85 * taps * out.height * out.width && std::min(images, out.batch) >= 16) together = images;
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

  // What an output pixel reads at some chunks, in one piece.
  const float* Gather(const float* x, const Pixel& pixel, Size segment, const std::vector<Chunk>& chunks, float* line) const {
    return InOnePiece(chunks, line, [&](const Chunk& chunk) {
      return At(x, pixel, chunk.tap) + segment * channels + chunk.first;
    });
  }
};

// The depth of a convolution, in parts.
struct DepthPart {
  Size begin, depth;
  std::vector<Chunk> chunks;
};

// In parts of about the same size, at most `most`, a multiple of 32.
inline std::vector<DepthPart> DepthParts(const Convolution& conv, Size most) {
  const Size depth = conv.depth(), step = Ceil(Ceil(depth, Ceil(depth, most)), 32) * 32;
  std::vector<DepthPart> parts;
  for (Size begin = 0, end; begin < depth; begin = end) {
    end = std::min(depth, begin + step);
    parts.push_back({begin, end - begin, conv.Chunks(begin, end)});
  }
  return parts;
}
