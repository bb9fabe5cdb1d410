#include "packed_rows.h"

#include <algorithm>
#include <stdexcept>

#include "isa.h"

namespace sgsc {
namespace {

constexpr std::int64_t TASK = 16384;  // levels

std::uint32_t level_in(std::uint64_t word, int i, int bits) {
  return static_cast<std::uint32_t>(word >> (i * bits)) & ((1u << bits) - 1);
}

template <class Use>
void for_each_level(const Row& row, std::int64_t n, const Use& use) {
  for (std::int64_t k = 0; k < n; k += 8) {
    const std::uint64_t word = row.word(k / 8);
    for (int i = 0; i < 8 && k + i < n; ++i) use(k + i, level_in(word, i, row.bits));
  }
}

void levels(const Row& row, std::int64_t n, std::uint8_t* out) {
  for_each_level(row, n, [&](std::int64_t k, std::uint32_t level) { out[k] = static_cast<std::uint8_t>(level); });
}

void values(const Row& row, std::int64_t n, float offset, float scale, float* out) {
  for_each_level(row, n,
                 [&](std::int64_t k, std::uint32_t level) { out[k] = (static_cast<float>(level) + offset) * scale; });
}

constexpr RowKernels row_kernels_scalar{levels, values};

}  // namespace

const RowKernels& row_kernels() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() >= Isa::avx2) return row_kernels_avx2;
#endif
  return row_kernels_scalar;
}

void check(const std::string& op, const PackedRows& p) {
  const auto refuse = [&op](const std::string& what) { throw std::invalid_argument(op + ": " + what); };
  if (p.width < 0 || p.width > (std::int64_t{1} << 56))
    refuse("a width of " + std::to_string(p.width) + " levels; want 0 to 2^56");
  std::int64_t start = 0;
  for (std::int64_t row = 0; row <= p.rows; ++row) {
    if (p.starts[row] != start)
      refuse("starts[" + std::to_string(row) + "] is " + std::to_string(p.starts[row]) + ", but rows of " +
             std::to_string(p.width) + " levels at these bits make it " + std::to_string(start) +
             "; use PackedRows.starts");
    if (row == p.rows) break;
    if (p.bits[row] > 8)
      refuse("bits[" + std::to_string(row) + "] is " + std::to_string(p.bits[row]) + "; want 0 to 8");
    std::int64_t bytes = (p.bits[row] * p.width + 7) / 8;
    if (__builtin_add_overflow(start, bytes, &start)) refuse("these bits and width need more than 2^63 bytes");
  }
  if (p.length < start)
    refuse("data has " + std::to_string(p.length) + " bytes, but these bits and width need " + std::to_string(start));
}

void pack(const std::uint8_t* levels, const PackedRows& shape, std::uint8_t* data, const Threads& threads) {
  threads.each(shape.rows, shape.width, TASK, [&](std::int64_t row) {
    const int bits = shape.bits[row];
    const std::uint8_t* in = levels + row * shape.width;
    std::uint8_t* out = data + shape.starts[row];
    const std::uint8_t* end = data + shape.starts[row + 1];
    for (std::int64_t k = 0; bits && k < shape.width; k += 8) {
      std::uint64_t word = 0;
      for (int i = 0; i < 8 && k + i < shape.width; ++i)
        word |= std::uint64_t{in[k + i] & ((1u << bits) - 1)} << (i * bits);
      for (int i = 0; i < bits && out < end; ++i) *out++ = static_cast<std::uint8_t>(word >> (8 * i));
    }
  });
  std::fill(data + shape.starts[shape.rows], data + shape.length, std::uint8_t{0});
}

void unpack(const PackedRows& packed, std::uint8_t* levels, const Threads& threads) {
  const RowKernels& kernels = row_kernels();
  threads.each(packed.rows, packed.width, TASK, [&](std::int64_t row) {
    std::uint8_t* out = levels + row * packed.width;
    if (packed.bits[row])
      kernels.levels(row_of(packed, row), packed.width, out);
    else
      std::fill(out, out + packed.width, std::uint8_t{0});
  });
}

void packed_embedding(const std::int64_t* index, std::int64_t n, const PackedRows& packed, const float* scale,
                      const float* offset, float* y, const Threads& threads) {
  for (std::int64_t i = 0; i < n; ++i)
    if (index[i] < 0 || index[i] >= packed.rows)
      throw std::out_of_range("packed_embedding: index " + std::to_string(index[i]) +
                              " is out of range; the table has " + std::to_string(packed.rows) + " rows");
  const RowKernels& kernels = row_kernels();
  threads.each(n, packed.width, TASK, [&](std::int64_t i) {
    const std::int64_t row = index[i];
    float* out = y + i * packed.width;
    if (packed.bits[row])
      kernels.values(row_of(packed, row), packed.width, offset[row], scale[row], out);
    else
      std::fill(out, out + packed.width, 0.0f);
  });
}

}  // namespace sgsc
