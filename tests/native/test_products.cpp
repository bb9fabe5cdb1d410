// packed_linear and packed_conv2d beside plain loops in double.
//
// Int8 products of x with `step` = max |x| / 127 err by step / 2 * sum |w| beside what floats err by; by nothing more
// where x are multiples of the step, or on a grid.
#include <algorithm>
#include <limits>
#include <numeric>

#include "packed_conv2d.h"
#include "packed_linear.h"
#include "report.h"

using namespace sgsc;

// Three threads for what divides work, one after the other.
static Threads three() { return {3, Threads::one().run}; }

// Rows of 0 to 8 bits in disk form and as tiles.
struct Weights {
  int64_t rows, width;
  Array<uint8_t> bits, levels, lines;
  Array<int32_t> tile_bits, slots;
  Array<float> scale, offset, tile_scale, tile_offset;
  Tiles tiles{};

  Weights(const std::string& set, int64_t rows, int64_t width, const LevelOrder& order, int64_t groups)
      : rows(rows), width(width), bits(rows), levels(rows * width), scale(rows), offset(rows) {
    Array<int64_t> starts{0};
    for (int64_t r = 0; r < rows; ++r) {
      bits[r] = static_cast<uint8_t>((r * 5 + 8) % 9);
      scale[r] = 0.01f * static_cast<float>(r % 5 + 1);
      offset[r] = r % 7 == 6 ? 0.1f : static_cast<float>(r % 4) / 2 - static_cast<float>(1 << bits[r] >> 1);
      for (int64_t k = 0; k < width; ++k) levels[r * width + k] = static_cast<uint8_t>(chance(0, (1 << bits[r]) - 1));
      starts.push_back(starts.back() + (bits[r] * width + 7) / 8);
    }
    Array<uint8_t> data(starts.back());
    const PackedRows packed{data.data(), starts.back(), bits.data(), starts.data(), rows, width};
    check("test", packed);
    pack(levels.data(), packed, data.data(), three());

    for (int64_t g = 0; g < groups; ++g)
      for (bool removed : {true, false}) place(g * rows / groups, (g + 1) * rows / groups, removed);
    const int64_t lines_of_block = std::accumulate(tile_bits.begin(), tile_bits.end(), int64_t{0});
    lines.resize(lines_of_block * order.blocks() * LINE);
    tiles = {lines.data(),
             static_cast<int64_t>(lines.size()),
             tile_bits.data(),
             slots.data(),
             tile_scale.data(),
             tile_offset.data(),
             static_cast<int64_t>(tile_bits.size()),
             rows,
             order.blocks()};
    check("test", tiles);
    check_widths("test", packed, tiles);
    use("scalar");  // packed rows have sets of their own, which an emulation lacks
    tile(packed, order, tiles, lines.data(), three());
    use(set);
  }

  // Real weight, and what its float is made of.
  double real(int64_t r, int64_t k) const {
    return bits[r] ? (double{offset[r]} + levels[r * width + k]) * double{scale[r]} : 0;
  }
  double size(int64_t r, int64_t k) const {
    return bits[r] ? (std::fabs(double{offset[r]}) + levels[r * width + k]) * double{scale[r]} : 0;
  }

 private:
  void place(int64_t first, int64_t end, bool removed) {
    Array<int32_t> some;
    for (int64_t r = first; r < end; ++r)
      if (removed == !bits[r]) some.push_back(static_cast<int32_t>(r));
    std::stable_sort(some.begin(), some.end(), [this](int32_t a, int32_t b) { return bits[a] < bits[b]; });
    for (std::size_t i = 0; i < some.size(); i += TILE) {
      uint8_t widest = 0;
      for (std::size_t r = i; r < i + TILE; ++r) {
        const int32_t row = r < some.size() ? some[r] : -1;
        slots.push_back(row);
        tile_scale.push_back(row < 0 ? 0 : scale[row]);
        tile_offset.push_back(row < 0 ? 0 : offset[row]);
        if (row >= 0) widest = std::max(widest, bits[row]);
      }
      tile_bits.push_back(widest);
    }
  }
};

// x in lots of `lot`: multiples of 1 / 4 up to 127 / 4, which int8 keeps, or any.
static Array<float> values(int64_t n, int64_t lot, bool kept) {
  auto x = kept ? integers<float>(n, -127, 127) : reals(n);
  for (float& value : x) value /= 4;
  for (int64_t i = 0; kept && i < n; i += lot) x[i + chance(0, static_cast<int>(lot) - 1)] = 127.0f / 4;
  return x;
}

// Grids of x, with what they say of the levels of some weights.
struct Grids {
  Array<float> values;
  InputGrid grid;

  Grids(const Weights& w, bool skew) : values(sums(w, skew)), grid("test", values.data()) {}
  Array<float> round(Array<float> x) const {
    for (float& value : x)
      value = grid.scale * std::nearbyint(std::min(std::max(value / grid.scale, grid.code_min), grid.code_max));
    return x;
  }

 private:
  static Array<float> sums(const Weights& w, bool skew) {
    Array<float> all{0.0043f, skew ? -37.0f : 0.0f, skew ? 218.0f : 255.0f};
    for (int64_t r = 0; r < w.rows; ++r)
      all.push_back(std::accumulate(w.levels.begin() + r * w.width, w.levels.begin() + (r + 1) * w.width, 0.0f));
    return all;
  }
};

static float step_of(const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest / 127;
}

// One output value: what it is, and how far from it is right.
struct Wanted {
  Array<double> value, bound;

  template <class Terms>  // terms(add) calls add(row, k, x)
  void push(const Weights& w, int64_t row, float bias, double half_step, const Terms& terms) {
    double sum = bias, size = std::fabs(bias), weight = 0;
    terms([&](int64_t k, double x) {
      sum += w.real(row, k) * x;
      size += w.size(row, k) * std::fabs(x);
      weight += w.size(row, k);
    });
    value.push_back(sum);
    bound.push_back(size * rounding(std::min<int64_t>(w.width, 1024)) + half_step * weight);
  }
};

static void test_linear(const std::string& set) {
  Report report(set, "packed_linear");
  constexpr int64_t SHAPES[][2] = {{37, 77}, {16, 512}, {20, 1}, {150, 1029}};
  for (const auto& [rows, width] : SHAPES) {
    const Weights w(set, rows, width, LevelOrder(width, 1), 1);
    for (int64_t m : {1, 2, 3, 4, 5, 16, 17, 40})
      for (int kind = 0; kind < 6; ++kind) {
        const bool on_grid = kind > 3, int8 = on_grid || kind % 2, kept = kind / 2 == 1;
        const Grids grids(w, kind % 2);
        const auto x = values(m * width, width, kept), bias = reals(rows), q = on_grid ? grids.round(x) : x;
        Array<float> y(m * rows, std::numeric_limits<float>::quiet_NaN());
        packed_linear({Type::f32, x.data(), kept ? bias.data() : nullptr, y.data(), m, width, rows,
                       on_grid ? &grids.grid : nullptr},
                      w.tiles, int8, three());
        Wanted want;
        for (int64_t t = 0; t < m; ++t)
          for (int64_t r = 0; r < rows; ++r)
            want.push(w, r, kept ? bias[r] : 0, int8 && !kept && !on_grid ? step_of(&x[t * width], width) / 2 : 0,
                      [&](const auto& add) {
                        for (int64_t k = 0; k < width; ++k) add(k, q[t * width + k]);
                      });
        report.near(y.data(), want.value.data(), want.bound.data(), m * rows, {rows, width, m, kind});
      }
  }
}

static void test_conv2d(const std::string& set) {
  Report report(set, "packed_conv2d");
  const Convolution shapes[] = {{{2, 8, 9, 17}, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
                                {{1, 5, 8, 9}, 7, {3, 2}, {2, 1}, {0, 1}, {1, 2}, 1},
                                {{1, 40, 5, 7}, 35, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1},
                                {{1, 10, 6, 6}, 36, {3, 3}, {1, 2}, {2, 0}, {1, 1}, 2},
                                {{2, 6, 20, 21}, 12, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 6},
                                {{4, 64, 4, 4}, 9, {3, 3}, {2, 2}, {1, 1}, {1, 1}, 1},
                                // x where it lies: in padded planes, and as it is
                                {{1, 8, 5, 16}, 20, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1},
                                {{2, 12, 3, 32}, 17, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1},
                                {{1, 16, 4, 16}, 6, {3, 1}, {2, 1}, {1, 0}, {1, 1}, 2}};
  for (const Convolution& c : shapes) {
    const Weights w(set, c.rows, c.levels, c.order(), c.sliding() ? 1 : c.groups);
    for (int kind = 0; kind < (c.sliding() ? 4 : 6); ++kind) {  // what slides is on its grid before
      const bool on_grid = kind > 3, int8 = on_grid || kind % 2, kept = kind / 2 == 1;
      const int64_t image = c.inputs * c.height * c.width;
      const Grids grids(w, kind % 2);
      const auto x = values(c.batch * image, image, kept), bias = reals(c.rows), q = on_grid ? grids.round(x) : x;
      Array<float> y(c.batch * c.rows * c.area(), std::numeric_limits<float>::quiet_NaN());
      packed_conv2d({Type::f32, x.data(), kept ? bias.data() : nullptr, y.data(), on_grid ? &grids.grid : nullptr}, c,
                    w.tiles, int8, three());
      Wanted want;
      for (int64_t b = 0; b < c.batch; ++b) {
        const bool measured = int8 && !kept && !on_grid && !c.sliding();
        const double half_step = measured ? step_of(&x[b * image], image) / 2 : 0;
        for (int64_t r = 0; r < c.rows; ++r)
          for (int64_t p = 0; p < c.area(); ++p)
            want.push(w, r, kept ? bias[r] : 0, half_step, [&](const auto& add) {
              for (int64_t k = 0; k < c.levels; ++k) {
                const int64_t tap = k % c.taps(), channel = r / (c.rows / c.groups) * c.channels() + k / c.taps();
                const int64_t v = p / c.out_width * c.stride[0] + tap / c.kernel[1] * c.dilation[0] - c.padding[0];
                const int64_t h = p % c.out_width * c.stride[1] + tap % c.kernel[1] * c.dilation[1] - c.padding[1];
                const bool inside = v >= 0 && v < c.height && h >= 0 && h < c.width;
                add(k, inside ? q[b * image + (channel * c.height + v) * c.width + h] : 0);
              }
            });
      }
      report.near(y.data(), want.value.data(), want.bound.data(), static_cast<int64_t>(y.size()), {&c - shapes, kind});
    }
  }
}

void test_products(const std::string& set) {
  test_linear(set);
  test_conv2d(set);
}
