// Headers first, target pragma after: no inline function shared with other files is then compiled for AVX2.
#include <cstring>

#include "packed_rows.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi2")
#endif

namespace sgsc {
namespace {

// Reads the levels of a row eight at a time: one load, one bit deposit, whatever the width.
class Reader {
 public:
  Reader(const Row& row, std::int64_t n)
      : row_(row), mask_(0x0101010101010101ull * ((1u << row.bits) - 1)), whole_(row.whole_words(n / 8)) {}

  std::int64_t whole() const { return whole_; }  // groups that may use `fast`

  // Eight levels, a byte each.
  std::uint64_t fast(std::int64_t group) const {
    std::uint64_t word;
    std::memcpy(&word, row_.bytes + group * row_.bits, sizeof word);
    return _pdep_u64(word, mask_);
  }
  std::uint64_t any(std::int64_t group) const {
    return group < whole_ ? fast(group) : _pdep_u64(row_.word(group), mask_);
  }

 private:
  Row row_;
  std::uint64_t mask_;
  std::int64_t whole_;
};

__m256 floats(std::uint64_t bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(bytes))));
}

__m256i first_lanes(std::int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

void levels(const Row& row, std::int64_t n, std::uint8_t* out) {
  const Reader reader(row, n);
  const std::int64_t groups = n / 8;
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::uint64_t bytes = reader.any(g);
    std::memcpy(out + 8 * g, &bytes, 8);
  }
  if (n % 8) {
    const std::uint64_t bytes = reader.any(groups);
    std::memcpy(out + 8 * groups, &bytes, n % 8);
  }
}

void values(const Row& row, std::int64_t n, float offset, float scale, float* out) {
  const Reader reader(row, n);
  const __m256 o = _mm256_set1_ps(offset), s = _mm256_set1_ps(scale);
  const std::int64_t groups = n / 8;
  for (std::int64_t g = 0; g < groups; ++g)
    _mm256_storeu_ps(out + 8 * g, _mm256_mul_ps(_mm256_add_ps(floats(reader.any(g)), o), s));
  if (n % 8)
    _mm256_maskstore_ps(out + 8 * groups, first_lanes(n % 8),
                        _mm256_mul_ps(_mm256_add_ps(floats(reader.any(groups)), o), s));
}

}  // namespace

const RowKernels row_kernels_avx2{levels, values};

}  // namespace sgsc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
