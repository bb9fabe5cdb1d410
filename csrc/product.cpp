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

// Runs use(strip, tile of the group, its panel, first block, blocks) for all of them.
template <class Numerics, class Use>
void for_each_panel(const TileList& tiles, std::int64_t first, std::int64_t n, std::int64_t strips, const Use& use) {
  constexpr std::int64_t FULL = Numerics::BLOCKS * BLOCK * TILE;
  const Scratch<typename Numerics::Weight> panels(n * FULL);
  for (std::int64_t b = 0; b < tiles.blocks(); b += Numerics::BLOCKS) {
    const std::int64_t blocks = std::min(Numerics::BLOCKS, tiles.blocks() - b);
    for (std::int64_t t = 0; t < n; ++t)
      if (tiles[first + t].bits) Numerics::unpack(tiles[first + t], b, blocks, panels.data() + t * FULL);
    for (std::int64_t s = 0; s < strips; ++s)
      for (std::int64_t t = 0; t < n; ++t)
        if (tiles[first + t].bits) use(s, t, panels.data() + t * FULL, b, blocks);
  }
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

Side side_of_rows(const Tile& tile) {
  Side side{};
  for (int r = 0; r < TILE; ++r) {
    const float offset = tile.offset[r];
    side.whole[r] = std::fabs(offset) <= 256 ? static_cast<std::int32_t>(std::nearbyint(offset)) : 0;
    side.part[r] = offset - static_cast<float>(side.whole[r]);
    side.factor[r] = tile.scale[r];
  }
  return side;
}

Side side_of_x(const std::int32_t* totals, const float* steps) {
  Side side{};
  for (int t = 0; t < TILE; ++t) {
    side.whole[t] = totals ? totals[t] : 0;
    side.part[t] = static_cast<float>(side.whole[t]);
    side.factor[t] = steps ? steps[t] : 1.0f;
  }
  return side;
}

template <class Value, class Sum>
void multiply_tokens(const TileList& tiles, std::int64_t first, std::int64_t n, const Strips<Value>& strips,
                     Sum* sums) {
  using Numerics = NumericsOf<Value>;
  const TileKernels& kernels = tile_kernels();
  const int m = std::min(kernels.most, TILE);
  constexpr std::int64_t UNIT = BLOCK / Numerics::STEPS;  // values of a token a step
  std::fill(sums, sums + strips.count * n * TILE * TILE, Sum{0});
  for_each_panel<Numerics>(
      tiles, first, n, strips.count,
      [&](std::int64_t s, std::int64_t t, const typename Numerics::Weight* panel, std::int64_t b, std::int64_t blocks) {
        const Value* x = strips.x + s * strips.each + b * BLOCK * TILE;
        for (int i = 0; i < TILE; i += m)
          Numerics::tokens(kernels, tiles[first + t].bits, blocks * Numerics::STEPS, panel, x + i * UNIT, m,
                           sums + ((s * n + t) * TILE + i) * TILE);
      });
}

template <class Value, class Sum>
void multiply_pixels(const TileList& tiles, std::int64_t first, std::int64_t n, std::int64_t levels,
                     const Strips<Value>& strips, Sum* sums) {
  using Numerics = NumericsOf<Value>;
  const TileKernels& kernels = tile_kernels();
  const int m = std::min(kernels.most, TILE);
  constexpr std::int64_t UNIT = BLOCK / Numerics::STEPS;
  std::fill(sums, sums + strips.count * n * TILE * TILE, Sum{0});
  for_each_panel<Numerics>(
      tiles, first, n, strips.count,
      [&](std::int64_t s, std::int64_t t, const typename Numerics::Weight* panel, std::int64_t b, std::int64_t blocks) {
        const std::int64_t from = b * Numerics::STEPS, all = (levels + UNIT - 1) / UNIT;
        const Value* x = strips.at ? strips.x + strips.starts[s] : strips.x + s * strips.each + b * BLOCK * TILE;
        const std::int64_t* at = strips.at ? strips.at + from : nullptr;
        for (int i = 0; i < TILE; i += m)
          Numerics::pixels(kernels, tiles[first + t].bits, std::min(blocks * Numerics::STEPS, all - from),
                           panel + i * UNIT, x, at, m, sums + ((s * n + t) * TILE + i) * TILE);
      });
}

template void multiply_tokens(const TileList&, std::int64_t, std::int64_t, const Strips<float>&, float*);
template void multiply_tokens(const TileList&, std::int64_t, std::int64_t, const Strips<std::int8_t>&, std::int32_t*);
template void multiply_pixels(const TileList&, std::int64_t, std::int64_t, std::int64_t, const Strips<float>&, float*);
template void multiply_pixels(const TileList&, std::int64_t, std::int64_t, std::int64_t, const Strips<std::int8_t>&,
                              std::int32_t*);

}  // namespace sgsc
