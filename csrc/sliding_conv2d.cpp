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

  const std::int64_t size = c.plane(), each = c.rows / c.groups;
  std::vector<std::int64_t> at(c.levels);
  for (std::int64_t k = 0; k < c.levels; ++k) at[k] = k / c.taps() * size + c.place_of_tap(k % c.taps());

  const std::int64_t total = c.batch * c.groups,
                     step = std::max<std::int64_t>(VALUES / std::max<std::int64_t>(c.area() * each, 1), 1);
  threads.run((total + step - 1) / step, [&](std::int64_t task) {
    const Scratch<float> planes(c.channels() * size), out(c.area());
    for (std::int64_t i = task * step; i < std::min((task + 1) * step, total); ++i) {
      const std::int64_t image = i / c.groups, group = i % c.groups;
      for (std::int64_t channel = 0; channel < c.channels(); ++channel)
        pad_plane(data, c, image, group * c.channels() + channel, planes.data() + channel * size);
      for (std::int64_t row = group * each; row < (group + 1) * each; ++row) {
        if (live.data()[row])
          for (std::int64_t y = 0; y < c.out_height; ++y)
            tile_kernels().slide(planes.data() + c.place_of(y * c.out_width), at.data(),
                                 weights.data() + row * c.levels, c.levels, c.stride[1], c.out_width,
                                 out.data() + y * c.out_width);
        else
          std::fill(out.data(), out.data() + c.area(), 0.0f);
        const std::int32_t only[2] = {static_cast<std::int32_t>(row), -1};
        write_pixels(data, c, image, only, 0, c.area(), out.data());
      }
    }
  });
}

}  // namespace sgsc
