#include "tiles.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "isa.h"

namespace sgsc {
namespace {

// The levels of one row in the order of quads, (4 * quads): zeros where a quad has no channel.
void in_order(const std::uint8_t* levels, const LevelOrder& order, std::uint8_t* out) {
  for (std::int64_t c = 0; c < order.channels; c += 4)
    for (std::int64_t a = 0; a < order.area; ++a)
      for (std::int64_t i = 0; i < 4; ++i)
        *out++ = c + i < order.channels ? levels[(c + i) * order.area + a] : std::uint8_t{0};
}

// Whether the slots hold each row, and -1 only after the rows of a tile. A small product takes about as long as this
// does, so it has no branches: what is wrong sets a sign.
bool each_row_once(const Tiles& t) {
  constexpr std::int64_t MOST = std::numeric_limits<std::int32_t>::max();
  const auto rows = static_cast<std::uint32_t>(std::min(t.rows, MOST));
  std::uint32_t wrong = 0, none = 0;
  for (std::int64_t tile = 0; tile < t.count; ++tile) {
    std::uint32_t slots[TILE];
    std::memcpy(slots, t.slots + tile * TILE, sizeof slots);
    for (const std::uint32_t slot : slots) {
      wrong |= (slot + 1) | (rows - 1 - slot);
      none += slot >> 31;
    }
    for (int i = 1; i < TILE; ++i) wrong |= slots[i - 1] & ~slots[i];
  }
  if (wrong >> 31 || t.count * TILE - none != t.rows) return false;
  thread_local std::vector<std::uint8_t> seen;  // a byte a row: bits would wait for one another
  seen.assign(t.rows + 1, 0);
  std::uint8_t* const row = seen.data() + 1;
  const std::int32_t *slot = t.slots, *const end = slot + t.count * TILE;
  while (slot != end) row[*slot++] = 1;
  return !t.rows || !std::memchr(row, 0, t.rows);
}

}  // namespace

void check(const std::string& op, const Tiles& t) {
  const auto refuse = [&op](const std::string& what) { throw std::invalid_argument(op + ": " + what); };
  std::int64_t lines = 0;
  for (std::int64_t tile = 0; tile < t.count; ++tile) {
    if (t.bits[tile] < 0 || t.bits[tile] > 8)
      refuse("plan[" + std::to_string(tile) + "] is " + std::to_string(t.bits[tile]) +
             ", the width of a tile; want 0 to 8");
    lines += t.bits[tile];
  }
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(lines, t.blocks * LINE, &bytes) || bytes != t.length)
    refuse("lines has " + std::to_string(t.length) + " bytes, but these tiles and width need " + std::to_string(lines) +
           " times " + std::to_string(t.blocks * LINE));
  if (!each_row_once(t)) {
    const auto range = std::minmax_element(t.slots, t.slots + t.count * TILE);
    const auto held = std::count_if(t.slots, t.slots + t.count * TILE, [](std::int32_t slot) { return slot >= 0; });
    refuse("plan holds " + std::to_string(held) + " rows" +
           (t.count ? " from " + std::to_string(*range.first) + " to " + std::to_string(*range.second) : "") +
           "; want each of " + std::to_string(t.rows) + " rows once, and -1 only after the rows of a tile");
  }
}

void check_widths(const std::string& op, const PackedRows& packed, const Tiles& t) {
  for (std::int64_t i = 0; i < t.count * TILE; ++i) {
    const int wide = t.bits[i / TILE], bits = t.slots[i] < 0 ? wide : packed.bits[t.slots[i]];
    if (bits > wide || (bits == 0) != (wide == 0))
      throw std::invalid_argument(op + ": row " + std::to_string(t.slots[i]) + " has " + std::to_string(bits) +
                                  " bits, its tile " + std::to_string(wide) +
                                  "; want rows no wider than their tile, and removed rows in tiles of 0 bits");
  }
}

InputGrid::InputGrid(const std::string& op, const float* values)
    : scale(values[0]), code_min(values[1]), code_max(values[2]), centre(0), level_sums(values + 3) {
  const bool whole = std::nearbyint(code_min) == code_min && std::nearbyint(code_max) == code_max;
  if (!(scale > 0 && scale <= std::numeric_limits<float>::max() && whole && code_min <= 0 && code_max >= 0 &&
        code_min < code_max && code_max - code_min <= 255))
    throw std::invalid_argument(op + ": input_grid has a scale of " + std::to_string(scale) + " and codes " +
                                std::to_string(code_min) + " .. " + std::to_string(code_max) +
                                "; want a positive, finite scale, and 2 to 256 codes, 0 among them");
  if (code_min < -128 || code_max > 127) centre = static_cast<std::int32_t>(code_min) + 128;
}

void tile(const PackedRows& packed, const LevelOrder& order, const Tiles& shape, std::uint8_t* lines,
          const Threads& threads) {
  std::vector<std::int64_t> starts(shape.count + 1, 0);
  for (std::int64_t t = 0; t < shape.count; ++t) starts[t + 1] = starts[t] + shape.bytes(t);
  const RowKernels& rows = row_kernels();
  const std::int64_t width = shape.blocks * BLOCK;
  threads.run(shape.count, [&](std::int64_t t) {
    if (!shape.bits[t]) return;
    std::vector<std::uint8_t> levels(TILE * width, 0), as_stored(order.area > 1 ? packed.width : 0);
    for (int r = 0; r < TILE; ++r) {
      const std::int32_t row = shape.slots[t * TILE + r];
      if (row < 0 || !packed.bits[row]) continue;
      std::uint8_t* out = levels.data() + r * width;
      rows.levels(row_of(packed, row), packed.width, order.area > 1 ? as_stored.data() : out);
      if (order.area > 1) in_order(as_stored.data(), order, out);
    }
    tile_kernels().encode(levels.data(), width, shape.bits[t], shape.blocks, lines + starts[t]);
  });
}

const TileKernels& tile_kernels() {
  switch (isa()) {
#if defined(__x86_64__) && defined(__GNUC__)
    case Isa::avx512:
      return tile_kernels_avx512;
    case Isa::avxvnni:
      return tile_kernels_avxvnni;
    case Isa::avx2:
      return tile_kernels_avx2;
#elif defined(__aarch64__) && defined(__linux__)
    case Isa::neon:
      return tile_kernels_neon;
#endif
    default:
      return tile_kernels_scalar;
  }
}

}  // namespace sgsc
