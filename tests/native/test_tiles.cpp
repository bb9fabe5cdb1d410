// Every kernel of an instruction set beside tile_kernels_scalar, and whole products beside plain loops in double.
//
//   test_tiles [SET ...]     all sets that the machine has, unless named
//
// Integers, and floats where no sum rounds, agree exactly. Other float sums err by at most (n + 8) 2^-24 times the sum
// of magnitudes, n the longest chain of additions there is.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <type_traits>
#include <utility>

#include "report.h"

using namespace sgsc;

#if defined(SGSC_SIMDE)  // the sets under test are emulated: what the machine has does not matter
static Isa now = Isa::scalar;
namespace sgsc {
Isa isa() { return now; }
}  // namespace sgsc
void use(const std::string& set) {
  now = set == "avx512" ? Isa::avx512 : set == "avxvnni" ? Isa::avxvnni : Isa::scalar;
}
static Array<std::string> all_sets() { return {"avxvnni", "avx512"}; }
#else
void use(const std::string& set) { set_isa(set); }
static Array<std::string> all_sets() {
  Array<std::string> sets;
  std::string names = isa_names() + ", ";
  for (std::size_t end; (end = names.find(", ")) != std::string::npos; names.erase(0, end + 2))
    sets.push_back(names.substr(0, end));
  return sets;
}
#endif

// The first m of TILE columns of `width` values each, `stride` apart; what lies between is never used.
template <class T>
Array<T> columns(const Array<T>& x, int64_t width, int64_t stride, int m) {
  const T poison = std::is_same<T, float>::value ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(128);
  const int64_t n = static_cast<int64_t>(x.size()) / (TILE * width);
  Array<T> strip(n * stride * width, poison);
  for (int64_t k = 0; k < n; ++k)
    std::copy_n(x.data() + k * TILE * width, m * width, strip.data() + k * stride * width);
  return strip;
}

// Calls f(m, stride) for all that a set takes.
template <class F>
void for_each_m(const TileKernels& kernels, const F& f) {
  for (int m = 1; m <= kernels.most; m *= 2)
    for (int stride : {m, m + 3}) f(m, stride);
}

static Array<float> offsets(bool whole) {
  Array<float> all(TILE);
  for (float& value : all) value = whole ? chance(-16, 16) * 0.5f : static_cast<float>(chance(-80000, 80000)) / 256;
  return all;
}

static void test_lines(const std::string& set, const TileKernels& kernels) {
  Report levels(set, "levels"), values(set, "values"), dot(set, "dot"), product(set, "product");
  const TileKernels& plain = tile_kernels_scalar;
  Array<int64_t> counts;
  for (int64_t blocks = 1; blocks <= 70; ++blocks) counts.push_back(blocks);
  for (int64_t blocks : {1, 2, 70, int(WIDEST / BLOCK)}) counts.push_back(-blocks);  // all at its largest
  for (int bits = 1; bits <= 8; ++bits)
    for (int64_t count : counts) {
      const int64_t blocks = std::abs(count), n = blocks * BLOCK;
      auto lines = integers<uint8_t>(bits * blocks * LINE, count < 0 ? 255 : 0, 255);
      auto x = integers<int8_t>(n * TILE, -128, 127);
      for (std::size_t i = 0; count < 0 && i < x.size(); ++i) x[i] = i / 4 % 2 ? 127 : -128;
      const auto exact = offsets(true), fine = offsets(false), small = integers<float>(n * TILE, -3, 3);

      Array<uint8_t> quads(n * TILE), want_quads(n * TILE);
      plain.levels(lines.data(), bits, blocks, want_quads.data());
      kernels.levels(lines.data(), bits, blocks, quads.data());
      levels.same(quads.data(), want_quads.data(), n * TILE, {bits, count});

      Array<float> panel(n * TILE), want_panel(n * TILE);
      plain.values(lines.data(), bits, blocks, fine.data(), want_panel.data());
      kernels.values(lines.data(), bits, blocks, fine.data(), panel.data());
      values.same(panel.data(), want_panel.data(), n * TILE, {bits, count});

      Array<int32_t> sums(TILE * TILE, 77), want(TILE * TILE, 78);
      plain.dot(lines.data(), bits, blocks, x.data(), TILE, TILE, want.data());
      for_each_m(kernels, [&](int m, int stride) {
        kernels.dot(lines.data(), bits, blocks, columns(x, 4, stride, m).data(), stride, m, sums.data());
        dot.same(sums.data(), want.data(), m * TILE, {bits, count, m, stride});
      });
      if (count < 0) continue;

      Array<float> totals(TILE * TILE, 77), want_totals(TILE * TILE, 78);
      plain.product(lines.data(), bits, blocks, exact.data(), small.data(), TILE, TILE, want_totals.data());
      for_each_m(kernels, [&](int m, int stride) {
        const auto strip = columns(small, 1, stride, m);
        kernels.product(lines.data(), bits, blocks, exact.data(), strip.data(), stride, m, totals.data());
        product.same(totals.data(), want_totals.data(), m * TILE, {bits, count, m, stride});
      });
      if (blocks % 23 > 1) continue;  // 1, 23, 24, 46, 47, 69, 70
      const auto fractions = reals(n * TILE);
      Array<double> wanted(TILE * TILE), bound(TILE * TILE);
      for (int64_t k = 0; k < n; ++k)
        for (int i = 0; i < TILE * TILE; ++i) {
          const double term = double{want_panel[k * TILE + i % TILE]} * fractions[k * TILE + i / TILE];
          wanted[i] += term;
          bound[i] += std::fabs(term) * rounding(std::min<int64_t>(n, 512) + n / 256);
        }
      for_each_m(kernels, [&](int m, int stride) {
        const auto strip = columns(fractions, 1, stride, m);
        kernels.product(lines.data(), bits, blocks, fine.data(), strip.data(), stride, m, totals.data());
        product.near(totals.data(), wanted.data(), bound.data(), m * TILE, {bits, count, m, stride});
      });
    }
}

// n lines of 64 bytes in any order, some twice, counted in values of `size` bytes.
static Array<int64_t> places(int64_t n, int64_t size) {
  auto at = integers<int64_t>(n, 0, static_cast<int>(n - 1));
  for (int64_t& place : at) place *= LINE / size;
  return at;
}

static void test_unpacked(const std::string& set, const TileKernels& kernels) {
  Report dot_levels(set, "dot_levels"), dot_values(set, "dot_values"), multiply(set, "multiply");
  const TileKernels& plain = tile_kernels_scalar;
  Array<int64_t> counts{-1, -70, -WIDEST / 4};  // negative: all at its largest
  for (int64_t n = 1; n <= 70; ++n) counts.push_back(n);
  for (int64_t count : counts) {
    const int64_t n = std::abs(count);
    auto codes = integers<int8_t>(n * LINE, -128, 127);
    for (std::size_t i = 0; count < 0 && i < codes.size(); ++i) codes[i] = i / 4 % 2 ? 127 : -128;
    const auto whole = integers<int32_t>(TILE * TILE, -9999, 9999);
    for (int bits = 1; bits <= 8; ++bits) {
      const int top = (1 << bits) - 1;
      const auto levels = integers<uint8_t>(n * LINE, count < 0 ? top : 0, top);
      auto want = whole;
      plain.dot_levels(levels.data(), bits, n, codes.data(), TILE, TILE, want.data());
      for_each_m(kernels, [&](int m, int stride) {
        auto sums = whole;
        kernels.dot_levels(levels.data(), bits, n, columns(codes, 4, stride, m).data(), stride, m, sums.data());
        dot_levels.same(sums.data(), want.data(), m * TILE, {bits, count, m, stride});
      });
      const auto at = places(n, 1);
      for (const int64_t* from : {static_cast<const int64_t*>(nullptr), at.data()}) {
        want = whole;
        plain.dot_values(codes.data(), from, bits, n, levels.data(), TILE, TILE, want.data());
        for_each_m(kernels, [&](int m, int stride) {
          auto sums = whole;
          const auto strip = columns(levels, 4, stride, m);
          kernels.dot_values(codes.data(), from, bits, n, strip.data(), stride, m, sums.data());
          dot_values.same(sums.data(), want.data(), m * TILE, {bits, count, m, stride, from != nullptr});
        });
      }
    }
    if (count < 0) continue;
    const auto at = places(n, sizeof(float));
    for (bool exact : {false, true})
      for (const int64_t* from : {static_cast<const int64_t*>(nullptr), at.data()}) {
        const auto lanes = exact ? integers<float>(n * TILE, -255, 255) : reals(n * TILE);
        const auto x = exact ? integers<float>(n * TILE, -99, 99) : reals(n * TILE);
        const auto first = integers<float>(TILE * TILE, -9, 9);
        Array<double> want(first.begin(), first.end()), bound(TILE * TILE);
        for (int64_t k = 0; k < n; ++k)
          for (int i = 0; i < TILE * TILE; ++i) {
            const double term = double{lanes[(from ? from[k] : k * TILE) + i % TILE]} * x[k * TILE + i / TILE];
            want[i] += term;
            bound[i] += exact ? 0 : (std::fabs(term) + 9) * rounding(n);
          }
        for_each_m(kernels, [&](int m, int stride) {
          auto sums = first;
          const auto strip = columns(x, 1, stride, m);
          kernels.multiply(lanes.data(), from, n, strip.data(), stride, m, sums.data());
          multiply.near(sums.data(), want.data(), bound.data(), m * TILE, {exact, n, m, stride, from != nullptr});
        });
      }
  }
}

static Side side() {
  Side all;
  for (int r = 0; r < TILE; ++r) {
    all.base[r] = chance(-(1 << 28), 1 << 28);
    all.whole[r] = chance(-30000, 30000);
    all.part[r] = reals(1)[0];
    all.factor[r] = r == 5 ? std::numeric_limits<float>::quiet_NaN() : reals(1)[0];
    all.add[r] = reals(1)[0];
  }
  return all;
}

static void test_loops(const std::string& set, const TileKernels& kernels) {
  Report rows(set, "side"), settle(set, "settle"), scale(set, "scale"), interleave(set, "interleave"),
      slide(set, "slide"), largest(set, "largest"), quantize(set, "quantize"), four(set, "quantize_four"),
      on_grid(set, "quantize_static"), four_on_grid(set, "quantize_four_static");
  const TileKernels& plain = tile_kernels_scalar;
  for (int m = 1; m <= TILE; ++m) {
    const Side lanes = side(), strip = side();
    const auto sums = integers<int32_t>(m * TILE, -(1 << 29), 1 << 29);
    const auto floats = reals(m * TILE);
    const int64_t stride = TILE + m % 3, n = TILE * stride;
    const Array<int32_t> backwards{15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
    for (const int32_t* places : {static_cast<const int32_t*>(nullptr), backwards.data()}) {
      Array<float> got(n, 77), want(n, 77);
      kernels.settle(sums.data(), m, lanes, strip, {got.data(), stride, places});
      plain.settle(sums.data(), m, lanes, strip, {want.data(), stride, places});
      settle.same(got.data(), want.data(), n, {m, places != nullptr});
      kernels.scale(floats.data(), m, lanes, strip, {got.data(), stride, places});
      plain.scale(floats.data(), m, lanes, strip, {want.data(), stride, places});
      scale.same(got.data(), want.data(), n, {m, places != nullptr});
    }
    auto offset = reals(TILE);
    offset[m % TILE] = m % 2 ? 300.5f : -256.0f;
    Side got, want;
    kernels.side(lanes.factor, offset.data(), got);
    plain.side(lanes.factor, offset.data(), want);
    rows.same(got.whole, want.whole, TILE, {m});
    rows.same(got.part, want.part, TILE, {m});
    rows.same(got.factor, lanes.factor, TILE, {m});
    for (int r = 0; r < TILE; ++r) {
      const float sum = static_cast<float>(got.whole[r]) + got.part[r];
      rows.same(&sum, &offset[r], 1, {m, r});
    }
  }
  for (int64_t n = 0; n <= 70; ++n) {
    for (int64_t stride : {n, n + 5}) {
      const auto rows = integers<int32_t>(stride * (TILE - 1) + n, -99999, 99999);
      Array<int32_t> got(n * TILE, 77), want(n * TILE, 78);
      kernels.interleave(rows.data(), stride, n, got.data());
      plain.interleave(rows.data(), stride, n, want.data());
      interleave.same(got.data(), want.data(), n * TILE, {n, stride});
    }
    for (int64_t stride = 1; stride <= 3; ++stride)
      for (int64_t taps : {1, 2, 9, 27}) {
        const auto at = integers<int64_t>(taps, 0, 40);
        const auto x = reals(*std::max_element(at.begin(), at.end()) + std::max<int64_t>(n - 1, 0) * stride + 1);
        const auto weights = reals(taps);
        const float bias = reals(1)[0];
        Array<float> got(n, 77);
        kernels.slide(x.data(), at.data(), weights.data(), taps, stride, bias, n, got.data());
        Array<double> want(n, bias), bound(n, std::fabs(bias));
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t k = 0; k < taps; ++k) {
            const double product = double{weights[k]} * x[at[k] + i * stride];
            want[i] += product, bound[i] += std::fabs(product);
          }
          bound[i] *= rounding(taps);
        }
        slide.near(got.data(), want.data(), bound.data(), n, {n, stride, taps});
      }
    constexpr float INF = std::numeric_limits<float>::infinity(), NAN_ = std::numeric_limits<float>::quiet_NaN();
    for (float special : {0.0f, -0.0f, -99.0f, 99.0f, 1e-42f, INF, -INF, NAN_, -NAN_}) {
      auto x = reals(n);
      if (n) x[chance(0, static_cast<int>(n) - 1)] = special;
      const float got = kernels.largest(x.data(), n);
      float want = 0;
      for (float value : x) want = value != value || std::fabs(value) > want ? std::fabs(value) : want;  // NaN stays
      largest.same(&got, &want, 1, {n});
    }
    for (bool ties : {false, true}) {
      auto x = reals(4 * n);
      if (ties) x = integers<float>(4 * n, -253, 253);
      const float inverse = ties ? 0.5f : 127.0f / 4;
      Array<int8_t> got(4 * n, 77), want(4 * n, 78);
      int32_t total = 0;
      for (int64_t i = 0; i < 4 * n; ++i) total += want[i] = static_cast<int8_t>(std::nearbyint(x[i] * inverse));
      const int32_t sum = kernels.quantize(x.data(), 4 * n, inverse, got.data());
      quantize.same(got.data(), want.data(), 4 * n, {n, ties});
      quantize.same(&sum, &total, 1, {n, ties});
      for (int64_t planes = 1; planes <= 4; ++planes) {
        Array<int8_t> side_by_side(4 * n);
        for (int64_t i = 0; i < planes * n; ++i) side_by_side[i % n * 4 + i / n] = want[i];
        kernels.quantize_four(x.data(), n, planes, inverse, got.data());
        four.same(got.data(), side_by_side.data(), 4 * n, {n, planes, ties});
      }
      for (const auto& [low, high] : {std::pair{0.0f, 255.0f}, {-128.0f, 127.0f}, {-37.0f, 218.0f}, {0.0f, 15.0f}}) {
        const float values[] = {ties ? 2.0f : 0.013f, low, high};  // no power of two: 1 / scale would miss ties
        const InputGrid grid("test", values);
        for (bool numbers : {true, false}) {
          auto odd = x;
          if (n) odd[0] = INF, odd[n - 1] = -INF;
          if (!numbers && n) odd[n / 2] = NAN_;
          int32_t its = 0, levels = 0;
          for (int64_t i = 0; i < 4 * n; ++i) {
            const float code = odd[i] != odd[i] ? low : std::min(std::max(odd[i] / values[0], low), high);
            its += want[i] = static_cast<int8_t>(static_cast<int>(std::nearbyint(code)) - grid.centre);
          }
          const bool all = kernels.quantize_static(odd.data(), 4 * n, grid, got.data(), &levels);
          on_grid.same(got.data(), want.data(), 4 * n, {n, ties, int(low), numbers});
          on_grid.same(&levels, &its, 1, {n, ties, int(low), numbers});
          const bool good = numbers || !n;
          on_grid.same(&all, &good, 1, {n, ties, int(low), numbers});
          for (int64_t planes = 1; planes <= 4; ++planes) {
            Array<int8_t> side_by_side(4 * n);
            for (int64_t i = 0; i < planes * n; ++i) side_by_side[i % n * 4 + i / n] = want[i];
            const bool four = kernels.quantize_four_static(odd.data(), n, planes, grid, got.data());
            four_on_grid.same(got.data(), side_by_side.data(), 4 * n, {n, planes, ties, int(low)});
            four_on_grid.same(&four, &good, 1, {n, planes, ties, int(low)});
          }
        }
      }
    }
  }
}

int main(int count, char** names) {
  Array<std::string> sets(names + 1, names + count);
  for (const std::string& set : sets.empty() ? all_sets() : sets) {
    use(set);
    test_lines(set, tile_kernels());
    test_unpacked(set, tile_kernels());
    test_loops(set, tile_kernels());
    test_products(set);
  }
  if (Report::failures) std::printf("%d FAILED\n", Report::failures);
  return Report::failures ? 1 : 0;
}
