#include "packed_linear.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

namespace sgsc {
namespace {

constexpr std::int64_t BYTES = 16384;          // of tiles a thread, times tokens: some microseconds
constexpr std::int64_t STRIP_BYTES = 1 << 20;  // of the strips of a task: what a second-level cache may hold
constexpr std::int64_t VALUES = 1 << 16;       // of x a thread, where x is prepared for many tokens

// The rows of x one at a time as floats, from whatever they are.
class Rows {
 public:
  Rows(const Linear& layer) : layer_(layer), widened_(layer.type == Type::f32 ? 0 : layer.width) {}

  const float* operator[](std::int64_t row) const {
    const std::int64_t at = row * layer_.width;
    if (layer_.type == Type::f32) return static_cast<const float*>(layer_.x) + at;
    to_floats(layer_.type, layer_.x, at, layer_.width, widened_.data());
    return widened_.data();
  }

 private:
  const Linear& layer_;
  Scratch<float> widened_;
};

// A strip of `stride` tokens, of which `count` are there. Levels past the width are zeros.
struct Exact {
  using Value = float;
  using Sum = float;
  static constexpr bool IN_REGISTERS = false;

  static void fill(const Rows& rows, const Linear& layer, std::int64_t first, std::int64_t count, std::int64_t stride,
                   std::int64_t levels, float* strip, std::int32_t*, float*) {
    if (count < stride) std::fill(strip, strip + levels * stride, 0.0f);
    std::fill(strip + layer.width * stride, strip + levels * stride, 0.0f);
    if (count == TILE && layer.type == Type::f32)
      return tile_kernels().interleave(rows[first], layer.width, layer.width, strip);
    for (std::int64_t t = 0; t < count; ++t) {
      const float* x = rows[first + t];
      for (std::int64_t k = 0; k < layer.width; ++k) strip[k * stride + t] = x[k];
    }
  }
  static void product(const Tile& tile, std::int64_t blocks, const float* strip, int m, float* sums) {
    float_kernels(tile).product(tile.lines, tile.bits, blocks, tile.offset, strip, m, m, sums);
  }
  static void settle(const Side& rows, const Side& x, const float* sums, int m, const Target& out) {
    tile_kernels().scale(sums, m, rows, x, out);
  }
};

struct Int8 {
  using Value = std::int8_t;
  using Sum = std::int32_t;
  // Of many strips too each unpacks for itself, where its sums fit the registers: that is a tenth faster than to write
  // what was unpacked and read it again. Of floats it is not.
  static constexpr bool IN_REGISTERS = true;

  static void fill(const Rows& rows, const Linear& layer, std::int64_t first, std::int64_t count, std::int64_t stride,
                   std::int64_t levels, std::int8_t* strip, std::int32_t* totals, float* steps) {
    const TileKernels& kernels = tile_kernels();
    const Scratch<std::int8_t> scratch(stride == 1 ? 0 : stride * levels);
    std::int8_t* codes = stride == 1 ? strip : scratch.data();
    std::fill(totals, totals + TILE, 0);
    std::fill(steps, steps + TILE, 0.0f);
    for (std::int64_t t = 0; t < stride; ++t, codes += levels) {
      if (t < count) {
        const float* x = rows[first + t];
        if (layer.input) {
          const bool numbers = kernels.quantize_static(x, layer.width, *layer.input, codes, totals + t);
          totals[t] += layer.input->centre * static_cast<std::int32_t>(layer.width);
          steps[t] = numbers ? layer.input->scale : std::numeric_limits<float>::quiet_NaN();
        } else {
          const Step step(kernels.largest(x, layer.width));
          steps[t] = step.step;
          if (step.step == step.step) totals[t] = kernels.quantize(x, layer.width, step.inverse, codes);
        }
      }
      const bool there = t < count && steps[t] == steps[t];
      std::fill(codes + (there ? layer.width : 0), codes + levels, std::int8_t{0});
    }
    if (stride == TILE) return kernels.interleave(scratch.data(), levels / 4, levels / 4, strip);
    for (std::int64_t t = 0; t < stride && stride > 1; ++t)
      for (std::int64_t q = 0; q < levels / 4; ++q)
        std::memcpy(strip + (q * stride + t) * 4, scratch.data() + t * levels + 4 * q, 4);
  }
  static void product(const Tile& tile, std::int64_t blocks, const std::int8_t* strip, int m, std::int32_t* sums) {
    tile_kernels().dot(tile.lines, tile.bits, blocks, strip, m, m, sums);
  }
  static void settle(const Side& rows, const Side& x, const std::int32_t* sums, int m, const Target& out) {
    tile_kernels().settle(sums, m, rows, x, out);
  }
};

// The rows of a tile, and how its results come to y.
class Writer {
 public:
  Writer(const Linear& layer, const Tile& tile)
      : layer_(layer),
        slots_(tile.slots),
        live_(tile.live()),
        rows_(side_of_rows(tile, layer.type, layer.bias, layer.input)) {
    bool follow = layer.type == Type::f32 && live_ == TILE;
    for (int r = 0; r < TILE; ++r) follow &= slots_[r] == slots_[0] + r;
    straight_ = follow;
  }

  // Of `count` tokens from `first` on; no sums: removed rows.
  template <class Numerics>
  void write(std::int64_t first, int count, const Side& x, const typename Numerics::Sum* sums) const {
    if (straight_ && sums) {
      float* y = static_cast<float*>(layer_.y) + first * layer_.rows + slots_[0];
      return Numerics::settle(rows_, x, sums, count, {y, layer_.rows});
    }
    float values[TILE * TILE];
    if (sums) Numerics::settle(rows_, x, sums, count, {values});
    for (int t = 0; t < count && !sums; ++t) std::copy(rows_.add, rows_.add + TILE, values + t * TILE);
    as_element(layer_.type, [&](auto element) {
      auto* y = static_cast<decltype(element)*>(layer_.y) + first * layer_.rows;
      for (int t = 0; t < count; ++t, y += layer_.rows)
        for (int r = 0; r < live_; ++r) narrow(values[t * TILE + r], y[slots_[r]]);
    });
  }

 private:
  const Linear& layer_;
  const std::int32_t* slots_;
  int live_;
  bool straight_;
  Side rows_;
};

// The tokens of x as strips of m, and what their int8 codes are worth.
template <class Numerics>
struct Prepared {
  using Value = typename Numerics::Value;

  std::int64_t strips, levels, each;  // each: values of a strip
  const Value* x;
  std::vector<Side> sides;

  Prepared(const Linear& layer, const TileList& tiles, int m, const Threads& threads)
      : strips((layer.m + m - 1) / m),
        levels(tiles.blocks() * BLOCK),
        each(levels * m),
        sides(strips, side_of_x(nullptr, nullptr)),
        as_it_is_(m == 1 && std::is_same<Value, float>::value && layer.type == Type::f32 && levels == layer.width),
        scratch_(as_it_is_ ? 0 : strips * each) {
    x = as_it_is_ ? static_cast<const Value*>(layer.x) : scratch_.data();
    if (as_it_is_) return;
    threads.each(strips, each, VALUES, [&](std::int64_t s) {
      std::int32_t totals[TILE] = {};
      float steps[TILE];
      std::fill(steps, steps + TILE, 1.0f);
      const std::int64_t here = std::min<std::int64_t>(m, layer.m - s * m);
      Numerics::fill(Rows(layer), layer, s * m, here, m, levels, scratch_.data() + s * each, totals, steps);
      sides[s] = side_of_x(totals, steps);
    });
  }

 private:
  bool as_it_is_;
  Scratch<Value> scratch_;
};

// Strips of a task, of which each thread gets one or more: where tokens suffice, threads share them and not the rows,
// whose places in y alternate.
template <class Numerics>
std::int64_t strips_of_a_task(const Prepared<Numerics>& x, const Threads& threads) {
  const std::int64_t fit = STRIP_BYTES / std::max<std::int64_t>(x.each * sizeof(typename Numerics::Value), 1);
  return std::max<std::int64_t>(std::min(fit, (x.strips + threads.count - 1) / threads.count), 1);
}

// Every strip by itself: its sums stay in registers, and so do the tiles that each unpacks anew.
template <class Numerics>
void in_registers(const Linear& layer, const TileList& tiles, int m, const Threads& threads) {
  const Prepared<Numerics> x(layer, tiles, m, threads);
  const std::int64_t step = strips_of_a_task(x, threads), stretches = (x.strips + step - 1) / step;
  const std::int64_t most = std::max<std::int64_t>(std::min(tiles.bytes() * m / BYTES, tiles.count()), 1);
  const std::int64_t parts = std::min((threads.count + stretches - 1) / stretches, most);
  threads.run(stretches * parts, [&](std::int64_t task) {
    const std::int64_t part = task % parts, from = task / parts * step, end = std::min(from + step, x.strips);
    for (std::int64_t t = tiles.boundary(part, parts); t < tiles.boundary(part + 1, parts); ++t) {
      const Tile tile = tiles[t];
      const Writer writer(layer, tile);
      for (std::int64_t s = from; s < end; ++s) {
        alignas(LINE) typename Numerics::Sum sums[TILE * TILE];
        if (tile.bits) Numerics::product(tile, tiles.blocks(), x.x + s * x.each, m, sums);
        const int here = static_cast<int>(std::min<std::int64_t>(m, layer.m - s * m));
        writer.template write<Numerics>(s * m, here, x.sides[s], tile.bits ? sums : nullptr);
      }
    }
  });
}

// A group of tiles is unpacked once, for many strips.
template <class Numerics>
void in_panels(const Linear& layer, const TileList& tiles, const Threads& threads) {
  const Prepared<Numerics> x(layer, tiles, TILE, threads);
  const std::int64_t groups = (tiles.count() + GROUP - 1) / GROUP;
  const std::int64_t step = strips_of_a_task(x, threads), stretches = (x.strips + step - 1) / step;
  threads.run(groups * stretches, [&](std::int64_t task) {
    const std::int64_t first = task % groups * GROUP, n = std::min(GROUP, tiles.count() - first);
    const std::int64_t from = task / groups * step, count = std::min(step, x.strips - from);
    std::vector<Writer> writers;
    for (std::int64_t t = 0; t < n; ++t) writers.emplace_back(layer, tiles[first + t]);
    multiply_tokens<typename Numerics::Value, typename Numerics::Sum>(
        tiles, first, n, {x.x + from * x.each, count, x.each},
        [&](std::int64_t s, std::int64_t t, const typename Numerics::Sum* sums) {
          const std::int64_t token = (from + s) * TILE;
          const int here = static_cast<int>(std::min<std::int64_t>(TILE, layer.m - token));
          writers[t].template write<Numerics>(token, here, x.sides[from + s], sums);
        });
  });
}

template <class Numerics>
void product(const Linear& layer, const TileList& tiles, const Threads& threads) {
  const std::int64_t most = std::min(tile_kernels().most, TILE);
  int m = 1;
  while (m < std::min(layer.m, most)) m *= 2;
  if (layer.m <= most || (Numerics::IN_REGISTERS && most == TILE))
    in_registers<Numerics>(layer, tiles, m, threads);
  else
    in_panels<Numerics>(layer, tiles, threads);
}

}  // namespace

void packed_linear(const Linear& layer, const Tiles& tiles, bool int8, const Threads& threads) {
  if (!layer.m || !layer.rows) return;
  tile_kernels();  // if it throws, then here: inside the threads the message would be lost
  const TileList list(tiles);
  if (int8 && as_integers(layer.width, layer.input))
    product<Int8>(layer, list, threads);
  else
    product<Exact>(layer, list, threads);
}

}  // namespace sgsc
