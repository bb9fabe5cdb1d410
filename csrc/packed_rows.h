// Rows of packed levels; the layout is in kernels/packing.py: eight levels of b bits fill b bytes, least significant
// bit first, and a row starts on a byte.
//
// A reader takes the levels eight at a time from one 64-bit word. Near the end of the buffer such a word would reach
// past it, so every reader knows how many bytes are left and takes only those.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "threads.h"

namespace sgsc {

struct PackedRows {
  const std::uint8_t* data;
  std::int64_t length;         // bytes of data
  const std::uint8_t* bits;    // (rows,)
  const std::int64_t* starts;  // (rows + 1,) first byte of each row, and the end of the last
  std::int64_t rows, width;
};

// Throws std::invalid_argument, naming `op`, unless bits are at most 8, starts follow from bits and width, and data
// holds what they promise. After it, no kernel below can read or write outside the arrays.
void check(const std::string& op, const PackedRows& packed);

// Floor: one byte a level and the packed bytes, each once.
void pack(const std::uint8_t* levels, const PackedRows& shape, std::uint8_t* data, const Threads& threads);
void unpack(const PackedRows& packed, std::uint8_t* levels, const Threads& threads);

// y (n, width): rows by index, as (level + offset) * scale; zeros for rows of 0 bits. Throws std::out_of_range, before
// anything is written, for an index that is not in 0 .. rows - 1.
// Floor: the packed bytes of those rows, and 4 bytes written a value.
void packed_embedding(const std::int64_t* index, std::int64_t n, const PackedRows& packed, const float* scale,
                      const float* offset, float* y, const Threads& threads);

// ---- what an instruction set provides ----

// One row of 1 to 8 bits a level.
struct Row {
  const std::uint8_t* bytes;
  std::int64_t left;  // bytes from `bytes` to the end of the buffer
  int bits;

  Row from(std::int64_t level) const {  // `level` a multiple of 8
    const std::int64_t skipped = level / 8 * bits;
    return {bytes + skipped, left - skipped, bits};
  }

  // Levels 8 * group ... 8 * group + 7, the first in the lowest bits; what follows them is arbitrary.
  std::uint64_t word(std::int64_t group) const {
    const std::int64_t rest = left - group * bits;
    std::uint64_t value = 0;
    for (int i = 0; i < 8 && i < rest; ++i) value |= std::uint64_t{bytes[group * bits + i]} << (8 * i);
    return value;
  }

  // How many of the first `groups` words can be read as eight bytes at once.
  std::int64_t whole_words(std::int64_t groups) const {
    const std::int64_t fit = left < 8 ? 0 : (left - 8) / bits + 1;
    return fit < groups ? fit : groups;
  }
};

inline Row row_of(const PackedRows& p, std::int64_t row) {
  return {p.data + p.starts[row], p.length - p.starts[row], p.bits[row]};
}

struct RowKernels {
  void (*levels)(const Row& row, std::int64_t n, std::uint8_t* out);
  // (level + offset) * scale
  void (*values)(const Row& row, std::int64_t n, float offset, float scale, float* out);
};

const RowKernels& row_kernels();
extern const RowKernels row_kernels_avx2;

}  // namespace sgsc
