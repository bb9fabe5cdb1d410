// Products of tiles with values of x, in either numerics: what linear and convolution share.
//
//   exact  float values of x and float sums.
//   int8   x rounded to 8 bits, one step a token (a row of x; an image of a convolution): with step = max |x| / 127,
//          |error| <= step / 2 * sum_k |w_k|, beside the rounding of floats. Sums of levels are exact in 32 bits.
//          Or x on an InputGrid: then what is left of the error is the rounding of floats.
//
// x comes in strips: 16 tokens side by side, (quads, 16, 4) int8 or (levels, 16) float, zeros where there is none.
#pragma once

#include <functional>
#include <vector>

#include "memory.h"
#include "number.h"
#include "tiles.h"

namespace sgsc {

// Memory on a cache line whose contents are not set, for the length of a call. It comes from what the thread has kept
// of earlier calls: fresh pages would cost more than many a product.
class Arena {
 public:
#if defined(SGSC_WATCHED)
  static constexpr std::int64_t KEPT = 0;
#else
  static constexpr std::int64_t KEPT = std::int64_t{32} << 20;  // most bytes that a thread keeps
#endif

  Arena() = default;
  ~Arena();
  Block take(std::int64_t bytes);
  void give(const Block& block) noexcept;
  static Arena& of_this_thread();

 private:
  std::vector<Block> kept_;
};

template <class T>
class Scratch {
 public:
  explicit Scratch(std::int64_t n) {
    if (n) block_ = Arena::of_this_thread().take(n * static_cast<std::int64_t>(sizeof(T)));
  }
  ~Scratch() {
    if (block_.data) Arena::of_this_thread().give(block_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return static_cast<T*>(block_.data); }

 private:
  Block block_{};
};

// One tile, and what a product needs to know of it.
struct Tile {
  const std::uint8_t* lines;
  int bits;
  const std::int32_t* slots;
  const float *scale, *offset;

  int live() const;  // rows of it that are there; they come first
};

// The kernels that take the tile's offsets: the fast ones want multiples of 1 / 256 below 2^14, as those of every
// quantizer here are.
const TileKernels& float_kernels(const Tile& tile);

// The tiles of a matrix as a call sees them.
class TileList {
 public:
  explicit TileList(const Tiles& tiles);

  std::int64_t count() const { return tiles_.count; }
  std::int64_t blocks() const { return tiles_.blocks; }
  std::int64_t bytes() const { return starts_.back(); }
  Tile operator[](std::int64_t tile) const;
  // The first tile of part `part` of `parts` of about equal bytes; the end for the last.
  std::int64_t boundary(std::int64_t part, std::int64_t parts) const;

 private:
  Tiles tiles_;
  std::vector<std::int64_t> starts_;
};

// The step of int8 values of x whose largest magnitude is `largest`, and its inverse. NaN, as every result then is,
// where a value was not finite.
struct Step {
  float step, inverse;
  explicit Step(float largest);
};

Side side_of_rows(const Tile& tile, Type type, const void* bias, const InputGrid* input);  // of `type`; or null
// Sums of codes of 16 tokens and their steps; the first may be null for exact numerics, the second for steps of 1.
Side side_of_x(const std::int32_t* totals, const float* steps);

// The strips of a product: `count` of them, side by side, `each` values apart; or, where `at` is given, strip s is
// where starts[s] says and its quads, or levels, are at those places from there: then x is used where it lies.
template <class Value>
struct Strips {
  const Value* x;
  std::int64_t count, each;
  const std::int64_t *starts = nullptr, *at = nullptr;
};

// A group of tiles unpacked for many strips, some hundred levels (of int8, some thousand) at a time: what is unpacked
// stays in the second-level cache while all strips pass by.
constexpr std::int64_t GROUP = 8;  // tiles

// Takes the finished sums (16, 16) of a strip and a tile of the group, null of removed rows, from the nearest cache.
template <class Sum>
using Done = std::function<void(std::int64_t strip, std::int64_t tile, const Sum* sums)>;

// Tiles first .. first + n - 1, n <= GROUP, times strips. Rows stand on the lanes (the last axis of sums) and tokens
// before; `multiply_pixels`, of whose strips `levels` are there, has it the other way round.
template <class Value, class Sum>
void multiply_tokens(const TileList& tiles, std::int64_t first, std::int64_t n, const Strips<Value>& strips,
                     const Done<Sum>& done);
template <class Value, class Sum>
void multiply_pixels(const TileList& tiles, std::int64_t first, std::int64_t n, std::int64_t levels,
                     const Strips<Value>& strips, const Done<Sum>& done);

}  // namespace sgsc
