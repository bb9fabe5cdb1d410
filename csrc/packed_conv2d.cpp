#include "packed_conv2d.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace sgsc {
namespace {

constexpr std::int64_t TILE_FLOATS = 65536;  // of patches: 256 KiB
constexpr std::int64_t MOST_PIXELS = 96;     // a tile
constexpr std::int64_t FEWEST_PIXELS = 6;

// The patch under each of `pixels` output pixels from `first` on, (pixels, K), zeros where it hangs over the edge.
// `x` is the first input channel of the group.
void gather(const float* x, const Convolution& c, std::int64_t channels, std::int64_t first, std::int64_t pixels,
            float* patch) {
  for (std::int64_t pixel = first; pixel < first + pixels; ++pixel) {
    const std::int64_t top = pixel / c.out_width * c.stride[0] - c.padding[0];
    const std::int64_t left = pixel % c.out_width * c.stride[1] - c.padding[1];
    for (std::int64_t channel = 0; channel < channels; ++channel)
      for (std::int64_t i = 0; i < c.kernel[0]; ++i) {
        const std::int64_t y = top + i * c.dilation[0];
        const std::int64_t line = (channel * c.height + y) * c.width;
        for (std::int64_t j = 0; j < c.kernel[1]; ++j) {
          const std::int64_t at = left + j * c.dilation[1];
          *patch++ = y >= 0 && y < c.height && at >= 0 && at < c.width ? x[line + at] : 0.0f;
        }
      }
  }
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("packed_conv2d: " + what); }

void check_pair(const char* name, const Convolution::Sizes& pair, std::int64_t least) {
  constexpr std::int64_t MOST = std::int64_t{1} << 24;  // products of two stay far from overflow
  for (const std::int64_t value : pair)
    if (value < least || value > MOST)
      refuse(std::string(name) + " holds " + std::to_string(value) + "; want " + std::to_string(least) + " to 2^24");
  if (pair.size() != 2) refuse(std::string(name) + " has " + std::to_string(pair.size()) + " numbers; want 2");
}

}  // namespace

Convolution::Convolution(const Sizes& x, std::int64_t rows, const Sizes& kernel, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation, std::int64_t groups)
    : groups(groups), kernel(kernel), stride(stride), padding(padding), dilation(dilation) {
  check_pair("kernel", kernel, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  check_pair("dilation", dilation, 1);
  if (x.size() != 4) refuse("x has " + std::to_string(x.size()) + " dimensions; want (batch, channels, height, width)");
  batch = x[0], inputs = x[1], height = x[2], width = x[3];
  if (groups < 1 || inputs % groups || rows % groups)
    refuse(std::to_string(groups) + " groups do not divide " + std::to_string(inputs) + " inputs and " +
           std::to_string(rows) + " outputs");
  if (__builtin_mul_overflow(inputs / groups, kernel[0] * kernel[1], &levels)) refuse("the kernel is too large");
  const auto output = [&](int axis) {
    const std::int64_t size = x[2 + axis], covered = dilation[axis] * (kernel[axis] - 1) + 1;
    if (size + 2 * padding[axis] < covered)
      refuse("a kernel that covers " + std::to_string(covered) + " is larger than the input, " + std::to_string(size) +
             " and a padding of " + std::to_string(padding[axis]));
    return (size + 2 * padding[axis] - covered) / stride[axis] + 1;
  };
  out_height = output(0), out_width = output(1);
}

void packed_conv2d(const float* x, const Convolution& c, const PackedRows& p, const float* scale, const float* offset,
                   const float* bias, float* y, const Threads& threads) {
  const std::int64_t area = c.out_height * c.out_width, channels = c.inputs / c.groups, rows = p.rows / c.groups;
  const std::int64_t fit = TILE_FLOATS / std::max<std::int64_t>(p.width, 1);
  const std::int64_t step = std::min(std::max(fit, FEWEST_PIXELS), MOST_PIXELS), tiles = (area + step - 1) / step;
  const RowKernels& kernels = row_kernels();
  std::vector<std::vector<std::int64_t>> live;
  for (std::int64_t group = 0; group < c.groups; ++group)
    live.push_back(live_rows(p, group * rows, (group + 1) * rows));

  threads.run(c.batch * c.groups * tiles, [&](std::int64_t task) {
    const std::int64_t first = task % tiles * step, group = task / tiles % c.groups, image = task / tiles / c.groups;
    const std::int64_t pixels = std::min(step, area - first);
    const auto out = [&](std::int64_t row) { return y + (image * p.rows + row) * area + first; };
    const auto add = [&](std::int64_t row) { return bias ? bias[row] : 0.0f; };
    for (std::int64_t row = group * rows; row < (group + 1) * rows; ++row)
      if (!p.bits[row]) std::fill_n(out(row), pixels, add(row));
    if (live[group].empty()) return;

    std::vector<float> patches(pixels * p.width);
    gather(x + (image * c.inputs + group * channels) * c.height * c.width, c, channels, first, pixels, patches.data());
    alignas(64) float sums[MOST_PIXELS * PANEL];
    const std::int64_t count = static_cast<std::int64_t>(live[group].size());
    for (std::int64_t at = 0; at < count; at += PANEL) {
      const std::int64_t* those = live[group].data() + at;
      const int here = static_cast<int>(std::min<std::int64_t>(count - at, PANEL));
      panel_product(kernels, p, offset, those, here, patches.data(), pixels, sums);
      for (int r = 0; r < here; ++r) {
        float* to = out(those[r]);
        const float factor = scale[those[r]], plus = add(those[r]);
        for (std::int64_t i = 0; i < pixels; ++i) to[i] = sums[i * PANEL + r] * factor + plus;
      }
    }
  });
}

}  // namespace sgsc
