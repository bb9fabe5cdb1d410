// 2-D convolution from tiles; the contract is in kernels/packed_conv2d.py, the numerics are in product.h.
//
// An image becomes planes of four-byte units with the padding around them: a channel of floats, or four channels of
// int8 side by side. A strip is 16 output pixels at all K, 64 bytes at a time. Where the pixels are neighbours (stride
// 1, width a multiple of 16) it is used where it lies; elsewhere some strips are gathered, half a megabyte of them, and
// stay in cache while the rows pass over them. Pixels stand on the lanes: so neither an im2col matrix nor another order
// of x is needed, and what is written is contiguous.
// Floor: the bytes of tiles, x and y once; 2 operations a weight and output pixel.
#pragma once

#include "number.h"
#include "product.h"

namespace sgsc {

struct Convolution {
  using Sizes = std::vector<std::int64_t>;

  std::int64_t batch, inputs, height, width;  // of x
  std::int64_t rows, groups, levels;          // levels: K, of a row
  std::int64_t out_height, out_width;
  Sizes kernel, stride, padding, dilation;  // vertical, horizontal

  // `x` is the shape of x, `rows` the number of output channels. Throws std::invalid_argument unless all fits.
  Convolution(const Sizes& x, std::int64_t rows, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, std::int64_t groups);

  std::int64_t taps() const { return kernel[0] * kernel[1]; }
  std::int64_t channels() const { return inputs / groups; }  // of a group
  std::int64_t area() const { return out_height * out_width; }
  std::int64_t padded_height() const { return height + 2 * padding[0]; }
  std::int64_t padded_width() const { return width + 2 * padding[1]; }
  std::int64_t plane() const { return padded_height() * padded_width(); }

  // Depthwise, or nearly so: tiles would be all but empty, and there is nothing to gain from int8. The rows are tiled
  // as those of a matrix are, and each slides over its own channels in exact numerics.
  bool sliding() const { return groups > 1 && channels() < 4; }
  bool in_integers(bool with_grid) const { return !sliding() && as_integers(levels, with_grid); }  // of int8 numerics
  LevelOrder order() const { return LevelOrder(levels, sliding() ? 1 : taps()); }

  // Where the inputs of output pixel `pixel` begin in a padded plane, and where tap `tap` lies from there.
  std::int64_t place_of(std::int64_t pixel) const {
    return pixel / out_width * stride[0] * padded_width() + pixel % out_width * stride[1];
  }
  std::int64_t place_of_tap(std::int64_t tap) const {
    return tap / kernel[1] * dilation[0] * padded_width() + tap % kernel[1] * dilation[1];
  }
};

// x (batch, inputs, height, width), y (batch, rows, out_height, out_width) and bias (rows,), or null, of `type`.
// `input` as that of a Linear.
struct ConvolutionData {
  Type type;
  const void *x, *bias;
  void* y;
  const InputGrid* input = nullptr;
};

// Throws unless the rows of each tile belong to one group.
void check_groups(const Convolution& shape, const Tiles& tiles);

void packed_conv2d(const ConvolutionData& data, const Convolution& shape, const Tiles& tiles, bool int8,
                   const Threads& threads);

// One plane of x, `image` and channel, with its padding, as floats.
void pad_plane(const ConvolutionData& data, const Convolution& shape, std::int64_t image, std::int64_t channel,
               float* padded);

// `n` values from `first` on of up to 16 output channels, those in `rows` before a -1. The values of a channel follow
// those of the one before after 16, or after n where that is more.
void write_pixels(const ConvolutionData& data, const Convolution& shape, std::int64_t image, const std::int32_t* rows,
                  std::int64_t first, std::int64_t n, const float* values);

// For shapes that slide.
void sliding_conv2d(const ConvolutionData& data, const Convolution& shape, const TileList& tiles,
                    const Threads& threads);

}  // namespace sgsc
