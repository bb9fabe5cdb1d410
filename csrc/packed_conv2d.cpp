#include "packed_conv2d.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace sgsc {
namespace {

constexpr std::int64_t UNIT = 4;               // bytes
constexpr std::int64_t STRIP_BYTES = 1 << 19;  // of the strips of a task
constexpr std::int64_t MOST_STRIPS = 16;       // of a task
constexpr std::int64_t MOST_VALUES = std::int64_t{1} << 40;
constexpr std::int64_t PLANE_VALUES = 1 << 14;  // of x a task, where planes are made

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("packed_conv2d: " + what); }

void check_pair(const char* name, const Convolution::Sizes& pair, std::int64_t least) {
  constexpr std::int64_t MOST = std::int64_t{1} << 24;  // products of two stay far from overflow
  for (const std::int64_t value : pair)
    if (value < least || value > MOST)
      refuse(std::string(name) + " holds " + std::to_string(value) + "; want " + std::to_string(least) + " to 2^24");
  if (pair.size() != 2) refuse(std::string(name) + " has " + std::to_string(pair.size()) + " numbers; want 2");
}

// A plane of floats, or of units of int8, with what stands for zero around it.
template <class T, class U>
void pad(const T* x, const Convolution& c, U zero, U* padded) {
  const std::int64_t wide = c.padded_width(), side = c.padding[1];
  std::fill_n(padded, c.padding[0] * wide + side, zero);
  padded += c.padding[0] * wide + side;
  for (std::int64_t y = 0; y < c.height; ++y, x += c.width, padded += wide) {
    if constexpr (std::is_same<T, U>::value)
      std::copy(x, x + c.width, padded);
    else
      for (std::int64_t i = 0; i < c.width; ++i) padded[i] = widen(x[i]);
    std::fill_n(padded + c.width, y + 1 < c.height ? 2 * side : side, zero);  // and the left of the next
  }
  std::fill_n(padded - side, c.padding[0] * wide, zero);
}

bool padded(const Convolution& c) { return c.padding[0] || c.padding[1]; }

// A unit of `some` channels whose values are 0, and of others that are not there.
std::uint32_t unit_of_zeros(std::int64_t some, std::int32_t centre) {
  std::int8_t codes[UNIT] = {};
  std::fill_n(codes, some, static_cast<std::int8_t>(-centre));
  std::uint32_t unit;
  std::memcpy(&unit, codes, sizeof unit);
  return unit;
}

// One image as planes of units, and the step of its values where they are int8. A quad is four channels at one tap.
class Exact {
 public:
  using Value = float;
  using Sum = float;
  static constexpr std::int64_t LINES = 4;  // of 16 units, a quad

  Exact(const ConvolutionData& data, const Convolution& c, std::int64_t image, const Threads& threads)
      : as_it_is_(data.type == Type::f32 && !padded(c)),
        padded_(as_it_is_ ? 0 : c.inputs * c.plane()),
        units_(as_it_is_ ? static_cast<const float*>(data.x) + image * c.inputs * c.plane() : padded_.data()) {
    if (!as_it_is_)
      threads.each(c.inputs, c.plane(), PLANE_VALUES,
                   [&](std::int64_t i) { pad_plane(data, c, image, i, padded_.data() + i * c.plane()); });
  }

  // The units of line `line` of quad channel `quad` of a group, or null where there is no such channel.
  const float* units(const Convolution& c, std::int64_t group, std::int64_t quad, std::int64_t line) const {
    const std::int64_t channel = 4 * quad + line;
    return channel < c.channels() ? units_ + (group * c.channels() + channel) * c.plane() : nullptr;
  }
  Side side(const float*, const std::int64_t*, std::int64_t) const { return side_of_x(nullptr, nullptr); }
  static void settle(const float* sums, int live, const Side& x, const Side& rows, const Target& out) {
    tile_kernels().scale(sums, live, x, rows, out);
  }

 private:
  bool as_it_is_;
  Scratch<float> padded_;
  const float* units_;
};

class Int8 {
 public:
  using Value = std::int8_t;
  using Sum = std::int32_t;
  static constexpr std::int64_t LINES = 1;

  Int8(const ConvolutionData& data, const Convolution& c, std::int64_t image, const Threads& threads)
      : quads_((c.channels() + 3) / 4), units_(c.groups * quads_ * c.plane() * UNIT), centre_(0) {
    const TileKernels& kernels = tile_kernels();
    const std::int64_t size = c.height * c.width;
    const Scratch<float> widened(data.type == Type::f32 ? 0 : c.inputs * size);
    const float* x = widened.data();
    if (data.type == Type::f32) x = static_cast<const float*>(data.x) + image * c.inputs * size;
    std::vector<float> largest(data.input ? 0 : c.inputs);
    if (!data.input || data.type != Type::f32)
      threads.each(c.inputs, size, PLANE_VALUES, [&](std::int64_t i) {
        if (data.type != Type::f32)
          to_floats(data.type, data.x, (image * c.inputs + i) * size, size, widened.data() + i * size);
        if (!data.input) largest[i] = kernels.largest(x + i * size, size);
      });
    if (data.input) {
      on_grid(*data.input, c, x, threads);
      return;
    }
    const Step step(kernels.largest(largest.data(), c.inputs));
    step_ = step.step;
    threads.each(c.groups * quads_, 4 * size, PLANE_VALUES, [&](std::int64_t i) {
      const std::int64_t first = i % quads_ * 4, some = std::min<std::int64_t>(c.channels() - first, 4);
      std::int8_t* out = units_.data() + i * c.plane() * UNIT;
      if (step.step != step.step) {
        std::fill_n(out, c.plane() * UNIT, std::int8_t{0});
      } else {
        const Scratch<std::uint32_t> apart(padded(c) ? size : 0);
        auto* codes = padded(c) ? reinterpret_cast<std::int8_t*>(apart.data()) : out;
        kernels.quantize_four(x + (i / quads_ * c.channels() + first) * size, size, some, step.inverse, codes);
        if (padded(c)) pad(apart.data(), c, std::uint32_t{0}, reinterpret_cast<std::uint32_t*>(out));
      }
    });
  }

  const std::int8_t* units(const Convolution& c, std::int64_t group, std::int64_t quad, std::int64_t) const {
    return units_.data() + (group * quads_ + quad) * c.plane() * UNIT;
  }
  Side side(const std::int8_t* strip, const std::int64_t* at, std::int64_t quads) const {
    constexpr std::uint8_t ones[4] = {1, 1, 1, 1};
    std::int32_t totals[TILE] = {};
    float steps[TILE];
    std::fill(steps, steps + TILE, step_);
    tile_kernels().dot_values(strip, at, 1, quads, ones, 0, 1, totals);
    for (std::int32_t& total : totals) total += centre_;
    return side_of_x(totals, steps);
  }
  static void settle(const std::int32_t* sums, int live, const Side& x, const Side& rows, const Target& out) {
    tile_kernels().settle(sums, live, x, rows, out);
  }

 private:
  void on_grid(const InputGrid& grid, const Convolution& c, const float* x, const Threads& threads) {
    const std::int64_t size = c.height * c.width;
    std::vector<std::uint8_t> numbers(c.groups * quads_);
    threads.each(c.groups * quads_, 4 * size, PLANE_VALUES, [&](std::int64_t i) {
      const std::int64_t first = i % quads_ * 4, some = std::min<std::int64_t>(c.channels() - first, 4);
      std::int8_t* out = units_.data() + i * c.plane() * UNIT;
      const Scratch<std::uint32_t> apart(padded(c) ? size : 0);
      auto* codes = padded(c) ? reinterpret_cast<std::int8_t*>(apart.data()) : out;
      const float* from = x + (i / quads_ * c.channels() + first) * size;
      numbers[i] = tile_kernels().quantize_four_static(from, size, some, grid, codes);
      if (padded(c)) pad(apart.data(), c, unit_of_zeros(some, grid.centre), reinterpret_cast<std::uint32_t*>(out));
    });
    const bool all = std::find(numbers.begin(), numbers.end(), 0) == numbers.end();
    step_ = all ? grid.scale : std::numeric_limits<float>::quiet_NaN();
    centre_ = grid.centre * static_cast<std::int32_t>(c.levels);
  }

  std::int64_t quads_;
  Scratch<std::int8_t> units_;
  float step_;
  std::int32_t centre_;  // of all levels of a row
};

// Units of a strip's 16 pixels from the first on. They lie in runs of neighbours of one length, a power of two.
struct Pixels {
  std::int64_t at[TILE];
  int run = TILE;

  Pixels(const Convolution& c, std::int64_t first) {
    for (int p = 0; p < TILE; ++p) {
      at[p] = c.place_of(std::min(first + p, c.area() - 1));
      while (at[p] != at[p / run * run] + p % run) run /= 2;
    }
  }
};

template <int RUN>
void gather_line(const std::uint8_t* units, const std::int64_t* at, std::uint8_t* line) {
  for (int p = 0; p < TILE; p += RUN) std::memcpy(line + p * UNIT, units + at[p] * UNIT, RUN * UNIT);
}

// Where each line of a strip lies from the strip's first pixel on, in values: x is then used as it is. Only where all
// strips are neighbours and all quads full.
template <class Numerics>
std::vector<std::int64_t> places(const Convolution& c, const Numerics& image) {
  std::vector<std::int64_t> at;
  if (c.stride[1] != 1 || c.out_width % TILE || c.channels() % 4) return at;
  constexpr std::int64_t unit = UNIT / static_cast<std::int64_t>(sizeof(typename Numerics::Value));
  const auto* base = image.units(c, 0, 0, 0);
  for (std::int64_t quad = 0; quad < c.channels() / 4; ++quad)
    for (std::int64_t tap = 0; tap < c.taps(); ++tap)
      for (std::int64_t line = 0; line < Numerics::LINES; ++line)
        at.push_back(image.units(c, 0, quad, line) - base + c.place_of_tap(tap) * unit);
  return at;
}

// The 16 pixels from `first` on at all K of a group.
template <class Numerics>
void gather(const Convolution& c, const Numerics& image, const std::vector<std::int64_t>& taps, std::int64_t group,
            std::int64_t first, std::int64_t size, typename Numerics::Value* strip) {
  const Pixels pixels(c, first);
  const auto gather_line = pixels.run == TILE       ? sgsc::gather_line<TILE>
                           : pixels.run == TILE / 2 ? sgsc::gather_line<TILE / 2>
                           : pixels.run == TILE / 4 ? sgsc::gather_line<TILE / 4>
                                                    : sgsc::gather_line<1>;
  auto* out = reinterpret_cast<std::uint8_t*>(strip);
  for (std::int64_t quad = 0; quad < (c.channels() + 3) / 4; ++quad)
    for (const std::int64_t tap : taps)
      for (std::int64_t line = 0; line < Numerics::LINES; ++line, out += LINE) {
        const auto* units = reinterpret_cast<const std::uint8_t*>(image.units(c, group, quad, line));
        if (!units) {
          std::memset(out, 0, LINE);
        } else {
          gather_line(units + tap * UNIT, pixels.at, out);
        }
      }
  std::fill(out, reinterpret_cast<std::uint8_t*>(strip + size), std::uint8_t{0});
}

// Consecutive tiles of one group.
struct Stretch {
  std::int64_t group, first, end;
};

std::vector<Stretch> by_group(const Convolution& c, const TileList& tiles, std::int64_t most) {
  std::vector<Stretch> all;
  for (std::int64_t t = 0; t < tiles.count(); ++t) {
    const std::int64_t group = std::max(tiles[t].slots[0], 0) / (c.rows / c.groups);
    if (all.empty() || all.back().group != group || all.back().end - all.back().first == most)
      all.push_back({group, t, t});
    ++all.back().end;
  }
  return all;
}

template <class Numerics>
void one_image(const ConvolutionData& data, const Convolution& c, const TileList& tiles, std::int64_t image,
               const Threads& threads) {
  using Value = typename Numerics::Value;
  using Sum = typename Numerics::Sum;
  const Numerics planes(data, c, image, threads);
  const std::vector<std::int64_t> at = places(c, planes);
  std::vector<std::int64_t> taps(c.taps());
  for (std::int64_t tap = 0; tap < c.taps(); ++tap) taps[tap] = c.place_of_tap(tap);
  const std::int64_t levels = (c.channels() + 3) / 4 * 4 * c.taps();

  const std::int64_t strips = (c.area() + TILE - 1) / TILE, strip_size = tiles.blocks() * BLOCK * TILE;
  const std::int64_t fit = STRIP_BYTES / std::max<std::int64_t>(strip_size * sizeof(Value), 1);
  const std::int64_t fair = (strips + 2 * threads.count - 1) / (2 * threads.count);
  const std::int64_t step = std::max<std::int64_t>(std::min({fit, fair, MOST_STRIPS}), 1);
  const std::int64_t pieces = (strips + step - 1) / step;
  // few pixels: what they lack in tasks, the rows bring
  const std::int64_t most = std::max<std::int64_t>(tiles.count() * std::min(pieces, threads.count) / threads.count, 1);
  const std::vector<Stretch> stretches = by_group(c, tiles, most);
  threads.run(static_cast<std::int64_t>(stretches.size()) * pieces, [&](std::int64_t task) {
    const Stretch& rows = stretches[task / pieces];
    const std::int64_t from = task % pieces * step, count = std::min(step, strips - from);
    const Scratch<Value> gathered(at.empty() ? count * strip_size : 0);
    std::int64_t starts[MOST_STRIPS];
    Strips<Value> x{gathered.data(), count, strip_size};
    if (at.empty()) {
      for (std::int64_t s = 0; s < count; ++s)
        gather(c, planes, taps, rows.group, (from + s) * TILE, strip_size, gathered.data() + s * strip_size);
    } else {
      for (std::int64_t s = 0; s < count; ++s)
        starts[s] = c.place_of((from + s) * TILE) * (UNIT / static_cast<std::int64_t>(sizeof(Value)));
      x = {planes.units(c, rows.group, 0, 0), count, 0, starts, at.data()};
    }
    std::vector<Side> sides;
    for (std::int64_t s = 0; s < count; ++s)
      sides.push_back(planes.side(x.at ? x.x + starts[s] : x.x + s * strip_size, x.at, levels / 4));
    for (std::int64_t first = rows.first; first < rows.end; first += GROUP) {
      const std::int64_t n = std::min(GROUP, rows.end - first);
      std::vector<Side> of_rows;
      for (std::int64_t t = 0; t < n; ++t)
        of_rows.push_back(side_of_rows(tiles[first + t], data.type, data.bias, data.input));
      multiply_pixels<Value, Sum>(tiles, first, n, levels, x, [&](std::int64_t s, std::int64_t t, const Sum* sums) {
        const Tile tile = tiles[first + t];
        const std::int64_t pixel = (from + s) * TILE, here = std::min<std::int64_t>(TILE, c.area() - pixel);
        if (sums && here == TILE && data.type == Type::f32) {
          float* y = static_cast<float*>(data.y) + image * c.rows * c.area() + pixel;
          return Numerics::settle(sums, tile.live(), sides[s], of_rows[t], {y, c.area(), tile.slots});
        }
        float values[TILE * TILE];
        if (sums) Numerics::settle(sums, tile.live(), sides[s], of_rows[t], {values});
        for (int r = 0; r < TILE && !sums; ++r) std::fill_n(values + r * TILE, TILE, of_rows[t].add[r]);
        write_pixels(data, c, image, tile.slots, pixel, here, values);
      });
    }
  });
}

}  // namespace

Convolution::Convolution(const Sizes& x, std::int64_t rows, const Sizes& kernel, const Sizes& stride,
                         const Sizes& padding, const Sizes& dilation, std::int64_t groups)
    : rows(rows), groups(groups), kernel(kernel), stride(stride), padding(padding), dilation(dilation) {
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
  std::int64_t values = 0;  // of all planes, and of y: what is computed from them stays far from overflow
  if (__builtin_mul_overflow(padded_height(), padded_width(), &values) ||
      __builtin_mul_overflow(values, inputs + 3 * groups, &values) || values > MOST_VALUES ||
      __builtin_mul_overflow(out_height, out_width, &values) || __builtin_mul_overflow(values, rows, &values) ||
      __builtin_mul_overflow(values, batch, &values) || values > MOST_VALUES)
    refuse("an image of " + std::to_string(inputs) + " channels of " + std::to_string(height) + " x " +
           std::to_string(width) + " with a padding of " + std::to_string(padding[0]) + " and " +
           std::to_string(padding[1]) + " has more than 2^40 values, or the result has");
}

void pad_plane(const ConvolutionData& data, const Convolution& c, std::int64_t image, std::int64_t channel,
               float* padded) {
  as_element(data.type, [&](auto element) {
    pad(static_cast<const decltype(element)*>(data.x) + (image * c.inputs + channel) * c.height * c.width, c, 0.0f,
        padded);
  });
}

void write_pixels(const ConvolutionData& data, const Convolution& c, std::int64_t image, const std::int32_t* rows,
                  std::int64_t first, std::int64_t n, const float* values) {
  as_element(data.type, [&](auto element) {
    auto* images = static_cast<decltype(element)*>(data.y) + image * c.rows * c.area() + first;
    for (int r = 0; r < TILE && rows[r] >= 0; ++r, values += std::max<std::int64_t>(n, TILE))
      for (std::int64_t i = 0; i < n; ++i) narrow(values[i], images[rows[r] * c.area() + i]);
  });
}

void check_groups(const Convolution& c, const Tiles& tiles) {
  if (c.sliding() || !c.rows) return;
  const std::int64_t each = c.rows / c.groups;
  for (std::int64_t i = 0; i < tiles.count * TILE; ++i)
    if (tiles.slots[i] >= 0 && tiles.slots[i] / each != std::max(tiles.slots[i / TILE * TILE], 0) / each)
      refuse("tile " + std::to_string(i / TILE) + " holds rows of several of the " + std::to_string(c.groups) +
             " groups; lay the rows out with tile_kernel, for these inputs and groups");
}

void packed_conv2d(const ConvolutionData& data, const Convolution& c, const Tiles& tiles, bool int8,
                   const Threads& threads) {
  if (!c.batch || !c.rows || !c.area()) return;
  tile_kernels();  // if it throws, then here: inside the threads the message would be lost
  const TileList list(tiles);
  if (c.sliding()) return sliding_conv2d(data, c, list, threads);
  const bool by_image = c.batch >= threads.count;  // else the threads share each image
  (by_image ? threads : Threads::one()).run(c.batch, [&](std::int64_t image) {
    const Threads& inside = by_image ? Threads::one() : threads;
    if (int8 && c.in_integers(data.input))
      one_image<Int8>(data, c, list, image, inside);
    else
      one_image<Exact>(data, c, list, image, inside);
  });
}

}  // namespace sgsc
