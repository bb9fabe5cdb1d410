// Convolutions of one to three channels a group: a row's few weights slide over its own planes.
//
// Floor: x and y once; at 3x3 and stride 1, nine multiply-adds a pixel from planes in the first-level cache.
#include <algorithm>

#include "packed_conv2d.h"

namespace sgsc {
namespace {

constexpr std::int64_t VALUES = 1 << 14;  // of y a task

// All rows as (rows, levels) real values, and whether each is there.
void unpack(const Convolution& c, const TileList& tiles, float* weights, bool* live) {
  const std::int64_t blocks = tiles.blocks();
  const Scratch<float> panel(blocks * BLOCK * TILE);
  for (std::int64_t t = 0; t < tiles.count(); ++t) {
    const Tile tile = tiles[t];
    if (tile.bits) float_kernels(tile).values(tile.lines, tile.bits, blocks, tile.offset, panel.data());
    for (int r = 0; r < TILE && tile.slots[r] >= 0; ++r) {
      const std::int64_t row = tile.slots[r];
      live[row] = tile.bits;
      for (std::int64_t k = 0; k < c.levels && tile.bits; ++k)
        weights[row * c.levels + k] = panel.data()[k * TILE + r] * tile.scale[r];
    }
  }
}

}  // namespace

void sliding_conv2d(const ConvolutionData& data, const Convolution& c, const TileList& tiles, const Threads& threads) {
  const Scratch<float> weights(c.rows * c.levels);
  const Scratch<bool> live(c.rows);
  std::fill(live.data(), live.data() + c.rows, false);
  unpack(c, tiles, weights.data(), live.data());
  const Scratch<float> bias(c.rows);
  std::fill(bias.data(), bias.data() + c.rows, 0.0f);
  if (data.bias) to_floats(data.type, data.bias, 0, c.rows, bias.data());

  const std::int64_t size = c.plane(), each = c.rows / c.groups;
  std::vector<std::int64_t> at(c.levels);
  for (std::int64_t k = 0; k < c.levels; ++k) at[k] = k / c.taps() * size + c.place_of_tap(k % c.taps());

  const bool straight = data.type == Type::f32;
  threads.each(c.batch * c.groups, c.area() * each, VALUES, [&](std::int64_t i) {
    const Scratch<float> planes(c.channels() * size), apart(straight ? 0 : c.area());
    const std::int64_t image = i / c.groups, group = i % c.groups;
    for (std::int64_t channel = 0; channel < c.channels(); ++channel)
      pad_plane(data, c, image, group * c.channels() + channel, planes.data() + channel * size);
    for (std::int64_t row = group * each; row < (group + 1) * each; ++row) {
      float* out = straight ? static_cast<float*>(data.y) + (image * c.rows + row) * c.area() : apart.data();
      if (live.data()[row])
        for (std::int64_t y = 0; y < c.out_height; ++y)
          tile_kernels().slide(planes.data() + c.place_of(y * c.out_width), at.data(), weights.data() + row * c.levels,
                               c.levels, c.stride[1], bias.data()[row], c.out_width, out + y * c.out_width);
      else
        std::fill(out, out + c.area(), bias.data()[row]);
      const std::int32_t only[2] = {static_cast<std::int32_t>(row), -1};
      if (!straight) write_pixels(data, c, image, only, 0, c.area(), out);
    }
  });
}

}  // namespace sgsc
