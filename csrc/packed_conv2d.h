// 2-D convolution from packed rows; the contract is in kernels/packed_conv2d.py.
//
// A task is one image, one group and a tile of output pixels: the patches under the tile are gathered into a buffer of
// about 256 KiB, and the group's rows pass over them a panel at a time, as in packed_linear.h. No im2col matrix.
// Floor: packed bytes, x and y once; 2 operations a weight and output pixel.
#pragma once

#include "packed_rows.h"

namespace sgsc {

struct Convolution {
  using Sizes = std::vector<std::int64_t>;

  std::int64_t batch, inputs, height, width;  // of x
  std::int64_t groups, levels;                // levels: K, of a packed row
  std::int64_t out_height, out_width;
  Sizes kernel, stride, padding, dilation;  // vertical, horizontal

  // `x` is the shape of x, `rows` the number of output channels. Throws std::invalid_argument unless all fits.
  Convolution(const Sizes& x, std::int64_t rows, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
              const Sizes& dilation, std::int64_t groups);
};

// x (batch, inputs, height, width), y (batch, rows, out_height, out_width), bias (rows,) or null.
void packed_conv2d(const float* x, const Convolution& shape, const PackedRows& packed, const float* scale,
                   const float* offset, const float* bias, float* y, const Threads& threads);

}  // namespace sgsc
