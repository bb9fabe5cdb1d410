#include "product.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>

namespace sgsc {
namespace {

// What the two numerics do differently.
struct Exact {
  using Weight = float;
  static constexpr std::int64_t BLOCKS = 16;    // of a tile, unpacked at once: 32 KiB
  static constexpr std::int64_t STEPS = BLOCK;  // of a block, each a line of lanes and a place of a strip

  static void unpack(const Tile& tile, std::int64_t first, std::int64_t blocks, float* panel) {
    float_kernels(tile).values(tile.lines + first * tile.bits * LINE, tile.bits, blocks, tile.offset, panel);
  }
  static void tokens(const TileKernels& kernels, int, std::int64_t n, const float* rows, const float* x, int m,
                     float* sums) {
    kernels.multiply(rows, nullptr, n, x, TILE, m, sums);
  }
  static void pixels(const TileKernels& kernels, int, std::int64_t n, const float* rows, const float* x,
                     const std::int64_t* at, int m, float* sums) {
    kernels.multiply(x, at, n, rows, TILE, m, sums);
  }
};

struct Int8 {
  using Weight = std::uint8_t;
  static constexpr std::int64_t BLOCKS = 64;
  static constexpr std::int64_t STEPS = QUADS;

  static void unpack(const Tile& tile, std::int64_t first, std::int64_t blocks, std::uint8_t* panel) {
    tile_kernels().levels(tile.lines + first * tile.bits * LINE, tile.bits, blocks, panel);
  }
  static void tokens(const TileKernels& kernels, int bits, std::int64_t n, const std::uint8_t* rows,
                     const std::int8_t* x, int m, std::int32_t* sums) {
    kernels.dot_levels(rows, bits, n, x, TILE, m, sums);
  }
  static void pixels(const TileKernels& kernels, int bits, std::int64_t n, const std::uint8_t* rows,
                     const std::int8_t* x, const std::int64_t* at, int m, std::int32_t* sums) {
    kernels.dot_values(x, at, bits, n, rows, TILE, m, sums);
  }
};

template <class Value>
using NumericsOf = std::conditional_t<std::is_same<Value, float>::value, Exact, Int8>;

// multiply(strip, tile, its panel, first block, blocks, sums) adds to the sums of a strip and a tile of the group.
// Where one panel holds all levels, there are sums of one of them at a time. What is written should follow what was
// written before: rows of y hold the tiles of a token, or the strips of a row.
template <class Numerics, bool TILES_FIRST, class Sum, class Multiply>
void in_panels(const TileList& tiles, std::int64_t first, std::int64_t n, std::int64_t strips, const Multiply& multiply,
               const Done<Sum>& done) {
  constexpr std::int64_t AREA = TILE * TILE;
  const std::int64_t most = std::min(Numerics::BLOCKS, tiles.blocks()), panel = most * BLOCK * TILE;
  const bool once = most == tiles.blocks();
  const Scratch<typename Numerics::Weight> panels(n * panel);
  const Scratch<Sum> sums((once ? 1 : strips * n) * AREA);
  std::int64_t b = 0, blocks;
  do {  // also where there are no levels: all sums are then zero
    blocks = std::min(most, tiles.blocks() - b);
    for (std::int64_t t = 0; t < n; ++t)
      if (tiles[first + t].bits) Numerics::unpack(tiles[first + t], b, blocks, panels.data() + t * panel);
    const bool last = b + blocks == tiles.blocks();
    for (std::int64_t i = 0; i < strips * n; ++i) {
      const std::int64_t s = TILES_FIRST ? i / n : i % strips, t = TILES_FIRST ? i % n : i / strips;
      const int bits = tiles[first + t].bits;
      Sum* its = sums.data() + (once ? 0 : i * AREA);
      if (bits && !b) std::fill(its, its + AREA, Sum{0});
      if (bits) multiply(s, bits, panels.data() + t * panel, b, blocks, its);
      if (last) done(s, t, bits ? its : nullptr);
    }
    b += blocks;
  } while (b < tiles.blocks());
}

#if defined(SGSC_WATCHED)
constexpr std::int64_t LEAST = 1;  // the address sanitizer is to see where a block ends
#else
constexpr std::int64_t LEAST = 1 << 14;  // bytes of a block of scratch memory
#endif

bool offsets_fit(const float* offset) {
  bool fit = true;
  for (int r = 0; r < TILE; ++r)
    fit &= std::fabs(offset[r]) < 0x1p14f && offset[r] * 256 == static_cast<float>(static_cast<int>(offset[r] * 256));
  return fit;
}

}  // namespace

Arena& Arena::of_this_thread() {
  thread_local Arena arena;
  return arena;
}

Arena::~Arena() {
  for (const Block& block : kept_) free_pages(block.data, block.bytes);
}

Block Arena::take(std::int64_t bytes) {
  std::size_t best = kept_.size();
  for (std::size_t i = 0; i < kept_.size(); ++i)
    if (kept_[i].bytes >= bytes && (best == kept_.size() || kept_[i].bytes < kept_[best].bytes)) best = i;
  if (best == kept_.size()) {
    kept_.reserve(kept_.size() + 64);  // so that `give` need not allocate
    bytes = std::max<std::int64_t>((bytes + LEAST - 1) / LEAST * LEAST, LEAST);
    void* data = allocate_pages(bytes);
    if (!data) throw std::bad_alloc();
    return {data, bytes};
  }
  std::swap(kept_[best], kept_.back());
  const Block block = kept_.back();
  kept_.pop_back();
  return block;
}

void Arena::give(const Block& block) noexcept {
  std::int64_t total = block.bytes;
  for (const Block& other : kept_) total += other.bytes;
  std::size_t gone = 0;  // the oldest go first
  for (; gone < kept_.size() && total > KEPT; ++gone) {
    total -= kept_[gone].bytes;
    free_pages(kept_[gone].data, kept_[gone].bytes);
  }
  kept_.erase(kept_.begin(), kept_.begin() + gone);
  if (total <= KEPT && kept_.size() < kept_.capacity())
    kept_.push_back(block);
  else
    free_pages(block.data, block.bytes);
}

TileList::TileList(const Tiles& tiles) : tiles_(tiles), starts_(tiles.count + 1, 0) {
  for (std::int64_t t = 0; t < tiles.count; ++t) starts_[t + 1] = starts_[t] + tiles.bytes(t);
}

Tile TileList::operator[](std::int64_t tile) const {
  const std::int64_t at = tile * TILE;
  return {tiles_.lines + starts_[tile], tiles_.bits[tile], tiles_.slots + at, tiles_.scale + at, tiles_.offset + at};
}

const TileKernels& float_kernels(const Tile& tile) {
  return offsets_fit(tile.offset) ? tile_kernels() : tile_kernels_scalar;
}

std::int64_t TileList::boundary(std::int64_t part, std::int64_t parts) const {
  if (part == parts) return count();
  const std::int64_t wanted = bytes() / parts * part;
  return part ? std::lower_bound(starts_.begin(), starts_.end() - 1, wanted) - starts_.begin() : 0;
}

Step::Step(float largest) {
  const float finite = largest < std::numeric_limits<float>::infinity() ? largest : 0.0f;  // also where it is NaN
  inverse = std::min(127.0f / finite, 0x1p126f);  // whose own inverse is a normal number
  step = finite == largest ? 1.0f / inverse : std::numeric_limits<float>::quiet_NaN();
}

int Tile::live() const {
  int n = TILE;
  while (n > 0 && slots[n - 1] < 0) --n;
  return n;
}

Side side_of_rows(const Tile& tile, Type type, const void* bias, const InputGrid* input) {
  Side side;
  tile_kernels().side(tile.scale, tile.offset, side);
  std::fill(side.add, side.add + TILE, 0.0f);
  std::fill(side.base, side.base + TILE, 0);
  for (int r = 0; input && r < TILE && tile.slots[r] >= 0; ++r)
    side.base[r] = input->centre * static_cast<std::int32_t>(input->level_sums[tile.slots[r]]);
  if (bias)
    as_element(type, [&](auto element) {
      const auto* values = static_cast<const decltype(element)*>(bias);
      for (int r = 0; r < TILE && tile.slots[r] >= 0; ++r) side.add[r] = widen(values[tile.slots[r]]);
    });
  return side;
}

Side side_of_x(const std::int32_t* totals, const float* steps) {
  Side side{};
  for (int t = 0; t < TILE; ++t) {
    side.whole[t] = totals ? totals[t] : 0;
    side.part[t] = static_cast<float>(side.whole[t]);
    side.factor[t] = steps ? steps[t] : 1.0f;
    side.add[t] = 0;
  }
  return side;
}

template <class Value, class Sum>
void multiply_tokens(const TileList& tiles, std::int64_t first, std::int64_t n, const Strips<Value>& strips,
                     const Done<Sum>& done) {
  using Numerics = NumericsOf<Value>;
  const TileKernels& kernels = tile_kernels();
  const int m = std::min(kernels.most, TILE);
  constexpr std::int64_t UNIT = BLOCK / Numerics::STEPS;  // values of a token a step
  in_panels<Numerics, true, Sum>(
      tiles, first, n, strips.count,
      [&](std::int64_t s, int bits, const typename Numerics::Weight* panel, std::int64_t b, std::int64_t blocks,
          Sum* sums) {
        const Value* x = strips.x + s * strips.each + b * BLOCK * TILE;
        for (int i = 0; i < TILE; i += m)
          Numerics::tokens(kernels, bits, blocks * Numerics::STEPS, panel, x + i * UNIT, m, sums + i * TILE);
      },
      done);
}

template <class Value, class Sum>
void multiply_pixels(const TileList& tiles, std::int64_t first, std::int64_t n, std::int64_t levels,
                     const Strips<Value>& strips, const Done<Sum>& done) {
  using Numerics = NumericsOf<Value>;
  const TileKernels& kernels = tile_kernels();
  const int m = std::min(kernels.most, TILE);
  constexpr std::int64_t UNIT = BLOCK / Numerics::STEPS;
  in_panels<Numerics, false, Sum>(
      tiles, first, n, strips.count,
      [&](std::int64_t s, int bits, const typename Numerics::Weight* panel, std::int64_t b, std::int64_t blocks,
          Sum* sums) {
        const std::int64_t from = b * Numerics::STEPS, all = (levels + UNIT - 1) / UNIT;
        const Value* x = strips.at ? strips.x + strips.starts[s] : strips.x + s * strips.each + b * BLOCK * TILE;
        const std::int64_t* at = strips.at ? strips.at + from : nullptr;
        for (int i = 0; i < TILE; i += m)
          Numerics::pixels(kernels, bits, std::min(blocks * Numerics::STEPS, all - from), panel + i * UNIT, x, at, m,
                           sums + i * TILE);
      },
      done);
}

template void multiply_tokens(const TileList&, std::int64_t, std::int64_t, const Strips<float>&, const Done<float>&);
template void multiply_tokens(const TileList&, std::int64_t, std::int64_t, const Strips<std::int8_t>&,
                              const Done<std::int32_t>&);
template void multiply_pixels(const TileList&, std::int64_t, std::int64_t, std::int64_t, const Strips<float>&,
                              const Done<float>&);
template void multiply_pixels(const TileList&, std::int64_t, std::int64_t, std::int64_t, const Strips<std::int8_t>&,
                              const Done<std::int32_t>&);

}  // namespace sgsc
