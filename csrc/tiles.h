// The run form of packed rows: 16 rows side by side, so that one vector holds the same four levels of all of them.
//
//   line   64 bytes. Byte 4 r + i belongs to row r of the tile and to level 4 q + i of the row, for some quads q.
//   block  32 levels of 16 rows in `bits` lines, whatever the width: bits is a sum of planes of 8, 4, 2 and 1 bits,
//          the largest first and in the lowest bits of a level. A plane of w bits has w lines; field f of its line l
//          (bits f w .. f w + w - 1 of each byte) holds quad l (8 / w) + f of the block's eight.
//   tile   16 rows at one width, the widest of theirs: the blocks of K levels one after the other, zeros past K.
//
// Any width costs bits / 8 bytes a weight, a tile is one stream of memory, a sum needs no reduction over lanes, and
// all instruction sets read the same lines. kernels/tiling.py says it in Python.
#pragma once

#include <cstdint>
#include <string>

#include "packed_rows.h"
#include "threads.h"

namespace sgsc {

constexpr int TILE = 16;                  // rows of a tile, and values of x side by side in a strip
constexpr int LINE = 64;                  // bytes
constexpr int BLOCK = 32;                 // levels
constexpr int QUADS = 8;                  // of a block
constexpr std::int64_t WIDEST = 1 << 15;  // levels whose int8 products still fit 32 bits: 2^15 * (255 + 256) * 127
constexpr std::int64_t WIDEST_STATIC = 1 << 14;  // the same of codes on an InputGrid: 2^14 * (255 + 256) * 255

// Whether int8 numerics multiply integers; wider rows are computed in exact ones.
inline bool as_integers(std::int64_t width, bool with_grid) { return width <= (with_grid ? WIDEST_STATIC : WIDEST); }

struct Tiles {
  const std::uint8_t* lines;
  std::int64_t length;          // bytes of lines
  const std::int32_t* bits;     // (count,) width of each tile; 0: its rows are removed
  const std::int32_t* slots;    // (count * TILE,) the row that each place of a tile holds, -1 for none
  const float *scale, *offset;  // (count * TILE,): real = (level + offset) * scale
  std::int64_t count, rows, blocks;

  std::int64_t bytes(std::int64_t tile) const { return bits[tile] * blocks * LINE; }
};

// Throws std::invalid_argument, naming `op`, unless bits are at most 8, lines hold what they promise, and slots are
// rows or -1. After it, no kernel below can read or write outside the arrays.
void check(const std::string& op, const Tiles& tiles);

// Throws unless each row fits its tile: no wider, and removed where the tile is.
void check_widths(const std::string& op, const PackedRows& packed, const Tiles& tiles);

// How a row's levels become quads: `area` levels a channel lie side by side on disk; in a tile a quad is four channels
// at one place of the area. A matrix has an area of 1, and the order is the same.
struct LevelOrder {
  std::int64_t channels, area;

  LevelOrder(std::int64_t width, std::int64_t area) : channels(width / area), area(area) {}
  std::int64_t quads() const { return (channels + 3) / 4 * area; }
  std::int64_t blocks() const { return (quads() + QUADS - 1) / QUADS; }
};

// From the disk form to the run form. Floor: the bytes of both, once.
void tile(const PackedRows& packed, const LevelOrder& order, const Tiles& shape, std::uint8_t* lines,
          const Threads& threads);

// ---- what an instruction set provides; the algorithms are in tile_kernels.inc ----
//
// A strip is what a product takes beside the tile: `stride` values side by side, of which it uses the first `m`:
// (quads, stride, 4) bytes or (levels, stride) floats. Sums are (m, TILE); m is a power of two up to `most`.

// A grid of x that is known before x is: code = x / scale within code_min .. code_max, half to even. What is multiplied
// is code - centre, a signed byte; `centre` times the sum of a row's levels, known beforehand too, makes up for it.
struct InputGrid {
  float scale, code_min, code_max;
  std::int32_t centre;
  const float* level_sums;  // (rows,) integers

  // Throws std::invalid_argument, naming `op`, unless scale is positive and finite, and the codes are integers, 2 to
  // 256 of them, and 0 is among them. `values`: scale, code_min, code_max and the sums.
  InputGrid(const std::string& op, const float* values);
};

// For rows: their offset, the integer before the fraction, scale, bias, and what the centre of codes brings. For x:
// twice its sum, and its step. The integers take part before anything is rounded: as floats, the sum of levels and the
// offset's share would cancel.
struct Side {
  std::int32_t base[TILE], whole[TILE];
  float part[TILE], factor[TILE], add[TILE];
};

// Where the 16 lanes of each value of a strip go: those of value i to values + i * stride, or, where there are places,
// to values + places[i] * stride.
struct Target {
  float* values;
  std::int64_t stride = TILE;
  const std::int32_t* places = nullptr;

  float* operator[](std::int64_t i) const { return values + (places ? places[i] : i) * stride; }
};

struct TileKernels {
  int most;
  // Lines of `blocks` blocks from the levels of 16 rows, `stride` bytes apart: the inverse of `levels`.
  void (*encode)(const std::uint8_t* levels, std::int64_t stride, int bits, std::int64_t blocks, std::uint8_t* lines);
  // The quads of `blocks` blocks, (8 * blocks, TILE, 4).
  void (*levels)(const std::uint8_t* lines, int bits, std::int64_t blocks, std::uint8_t* quads);
  // level + offset, (32 * blocks, TILE).
  void (*values)(const std::uint8_t* lines, int bits, std::int64_t blocks, const float* offset, float* panel);
  // sums = products with the lines as they lie.
  void (*dot)(const std::uint8_t* lines, int bits, std::int64_t blocks, const std::int8_t* strip, std::int64_t stride,
              int m, std::int32_t* sums);
  void (*product)(const std::uint8_t* lines, int bits, std::int64_t blocks, const float* offset, const float* strip,
                  std::int64_t stride, int m, float* sums);
  // sums += products of what `levels` and `values` made, for a strip that lies so, over n quads or levels. The lanes
  // are 64 bytes each, side by side; or, where `at` is given, at those places, counted in bytes, or in floats. Either
  // the lanes are rows and the strip x, or (signed lanes; `multiply` serves both) the other way round.
  void (*dot_levels)(const std::uint8_t* lanes, int bits, std::int64_t n, const std::int8_t* strip, std::int64_t stride,
                     int m, std::int32_t* sums);
  void (*dot_values)(const std::int8_t* lanes, const std::int64_t* at, int bits, std::int64_t n,
                     const std::uint8_t* strip, std::int64_t stride, int m, std::int32_t* sums);
  void (*multiply)(const float* lanes, const std::int64_t* at, std::int64_t n, const float* strip, std::int64_t stride,
                   int m, float* sums);
  // What a tile's 16 rows bring to a product, but for their bias.
  void (*side)(const float* scale, const float* offset, Side& rows);
  // From sums (m, TILE), any m, of levels times codes of x to those of real weights times real x, with the bias. Lanes
  // and strip bring what they have: (sum + lanes.base + strip.base + lanes.whole * strip.whole + lanes.part *
  // strip.part) * lanes.factor * strip.factor + lanes.add + strip.add.
  void (*settle)(const std::int32_t* sums, int m, const Side& lanes, const Side& strip, const Target& out);
  // The same of float sums, which hold the offset already: sum * lanes.factor * strip.factor + lanes.add + strip.add.
  void (*scale)(const float* sums, int m, const Side& lanes, const Side& strip, const Target& out);
  // (n, 16) from 16 rows `stride` apart, and of four bytes each: a strip from tokens.
  void (*interleave)(const void* rows, std::int64_t stride, std::int64_t n, void* strip);
  // out[i] = bias + sum over k < taps of weights[k] * x[at[k] + i * stride], i < n
  void (*slide)(const float* x, const std::int64_t* at, const float* weights, std::int64_t taps, std::int64_t stride,
                float bias, std::int64_t n, float* out);
  // The largest magnitude; NaN or infinity where one is among x.
  float (*largest)(const float* x, std::int64_t n);
  // Rounds x * inverse, half to even, each within -127 .. 127; returns their sum.
  std::int32_t (*quantize)(const float* x, std::int64_t n, float inverse, std::int8_t* out);
  // The same of `planes` <= 4 planes of n values, side by side: (n, 4), zeros for planes that are not there.
  void (*quantize_four)(const float* x, std::int64_t n, std::int64_t planes, float inverse, std::int8_t* out);
  // Both for a grid: code - centre. Whether all x are numbers; one that is not counts as code_min.
  bool (*quantize_static)(const float* x, std::int64_t n, const InputGrid& grid, std::int8_t* out, std::int32_t* sum);
  bool (*quantize_four_static)(const float* x, std::int64_t n, std::int64_t planes, const InputGrid& grid,
                               std::int8_t* out);
};

const TileKernels& tile_kernels();
extern const TileKernels tile_kernels_scalar, tile_kernels_avx2, tile_kernels_avxvnni, tile_kernels_avx512,
    tile_kernels_neon;

}  // namespace sgsc
