// Plain C++: the meaning of the run form, level by level, for machines whose instruction sets have no file.
#include "tile_common.h"

namespace sgsc {
namespace {

void levels(const std::uint8_t* lines, int bits, std::int64_t blocks, std::uint8_t* quads) {
  std::fill(quads, quads + blocks * QUADS * LINE, std::uint8_t{0});
  for (std::int64_t b = 0; b < blocks; ++b, lines += bits * LINE, quads += QUADS * LINE) {
    int low = 0;
    for (int plane = 8; plane; plane /= 2) {
      if (!(bits & plane)) continue;
      const int fields = 8 / plane, mask = (1 << plane) - 1;
      for (int q = 0; q < QUADS; ++q)
        for (int i = 0; i < LINE; ++i) {
          const int field = lines[(low + q / fields) * LINE + i] >> (q % fields * plane) & mask;
          quads[q * LINE + i] = static_cast<std::uint8_t>(quads[q * LINE + i] | field << low);
        }
      low += plane;
    }
  }
}

void values(const std::uint8_t* lines, int bits, std::int64_t blocks, const float* offset, float* panel) {
  std::uint8_t quads[QUADS * LINE];
  for (std::int64_t b = 0; b < blocks; ++b, panel += BLOCK * TILE) {
    levels(lines + b * bits * LINE, bits, 1, quads);
    for (int k = 0; k < BLOCK; ++k)
      for (int r = 0; r < TILE; ++r)
        panel[k * TILE + r] = static_cast<float>(quads[k / 4 * LINE + 4 * r + k % 4]) + offset[r];
  }
}

template <class Lane, class Strip>
void dot_any(const Lane* lanes, const std::int64_t* at, std::int64_t n, const Strip* strip, std::int64_t stride, int m,
             std::int32_t* sums) {
  for (std::int64_t q = 0; q < n; ++q, strip += 4 * stride) {
    const Lane* lane = lanes + (at ? at[q] : q * LINE);
    for (int i = 0; i < m; ++i)
      for (int r = 0; r < TILE; ++r)
        for (int k = 0; k < 4; ++k) sums[i * TILE + r] += lane[4 * r + k] * strip[4 * i + k];
  }
}

void dot_levels(const std::uint8_t* lanes, int, std::int64_t n, const std::int8_t* strip, std::int64_t stride, int m,
                std::int32_t* sums) {
  dot_any(lanes, nullptr, n, strip, stride, m, sums);
}

void dot_values(const std::int8_t* lanes, const std::int64_t* at, int, std::int64_t n, const std::uint8_t* strip,
                std::int64_t stride, int m, std::int32_t* sums) {
  dot_any(lanes, at, n, strip, stride, m, sums);
}

void multiply(const float* lanes, const std::int64_t* at, std::int64_t n, const float* strip, std::int64_t stride,
              int m, float* sums) {
  for (int i = 0; i < m; ++i) {
    float block[TILE] = {};  // a sum of block sums errs less than one long chain
    for (std::int64_t k = 0; k < n; ++k) {
      const float* lane = lanes + (at ? at[k] : k * TILE);
      for (int r = 0; r < TILE; ++r) block[r] += lane[r] * strip[k * stride + i];
    }
    for (int r = 0; r < TILE; ++r) sums[i * TILE + r] += block[r];
  }
}

void dot(const std::uint8_t* lines, int bits, std::int64_t blocks, const std::int8_t* strip, std::int64_t stride, int m,
         std::int32_t* sums) {
  std::uint8_t quads[QUADS * LINE];
  std::fill(sums, sums + m * TILE, 0);
  for (std::int64_t b = 0; b < blocks; ++b) {
    levels(lines + b * bits * LINE, bits, 1, quads);
    dot_levels(quads, bits, QUADS, strip + b * BLOCK * stride, stride, m, sums);
  }
}

void product(const std::uint8_t* lines, int bits, std::int64_t blocks, const float* offset, const float* strip,
             std::int64_t stride, int m, float* sums) {
  constexpr std::int64_t STRETCH = 8;
  float panel[STRETCH * BLOCK * TILE];
  std::fill(sums, sums + m * TILE, 0.0f);
  for (std::int64_t b = 0; b < blocks; b += STRETCH) {
    const std::int64_t here = std::min(STRETCH, blocks - b);
    values(lines + b * bits * LINE, bits, here, offset, panel);
    multiply(panel, nullptr, here * BLOCK, strip + b * BLOCK * stride, stride, m, sums);
  }
}

#include "tile_loops.inc"

}  // namespace

const TileKernels tile_kernels_scalar{TILE,
                                      encode,
                                      levels,
                                      values,
                                      dot,
                                      product,
                                      dot_levels,
                                      dot_values,
                                      multiply,
                                      side,
                                      settle,
                                      scale,
                                      interleave,
                                      slide,
                                      largest,
                                      quantize,
                                      quantize_four,
                                      quantize_static,
                                      quantize_four_static};

}  // namespace sgsc
