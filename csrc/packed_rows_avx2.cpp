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

float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
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

// M rows of x against one row of weights; each sum is spread over CHAINS registers to hide the latency of the add.
template <int M>
void dot_of(const Row& row, std::int64_t n, float offset, const float* x, std::int64_t stride, float* sums) {
  constexpr int CHAINS = M == 1 ? 4 : M <= 4 ? 2 : 1;
  const Reader reader(row, n);
  const __m256 o = _mm256_set1_ps(offset);
  __m256 sum[CHAINS][M];
  for (auto& chain : sum)
    for (__m256& s : chain) s = _mm256_setzero_ps();

  const std::int64_t groups = n / 8;
  std::int64_t g = 0;
  for (; g + CHAINS <= reader.whole(); g += CHAINS)
    for (int c = 0; c < CHAINS; ++c) {
      const __m256 w = _mm256_add_ps(floats(reader.fast(g + c)), o);
      for (int i = 0; i < M; ++i)
        sum[c][i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i * stride + 8 * (g + c)), sum[c][i]);
    }
  for (; g < groups; ++g) {
    const __m256 w = _mm256_add_ps(floats(reader.any(g)), o);
    for (int i = 0; i < M; ++i) sum[0][i] = _mm256_fmadd_ps(w, _mm256_loadu_ps(x + i * stride + 8 * g), sum[0][i]);
  }
  if (n % 8) {
    const __m256i here = first_lanes(n % 8);
    const __m256 w = _mm256_and_ps(_mm256_add_ps(floats(reader.any(g)), o), _mm256_castsi256_ps(here));
    for (int i = 0; i < M; ++i)
      sum[0][i] = _mm256_fmadd_ps(w, _mm256_maskload_ps(x + i * stride + 8 * g, here), sum[0][i]);
  }
  for (int i = 0; i < M; ++i) {
    for (int c = 1; c < CHAINS; ++c) sum[0][i] = _mm256_add_ps(sum[0][i], sum[c][i]);
    sums[i] = total(sum[0][i]);
  }
}

void dot(const Row& row, std::int64_t n, float offset, const float* x, std::int64_t stride, int m, float* sums) {
  static_assert(FUSED == 8, "one entry a number of rows");
  using Dot = void (*)(const Row&, std::int64_t, float, const float*, std::int64_t, float*);
  constexpr Dot of[FUSED] = {dot_of<1>, dot_of<2>, dot_of<3>, dot_of<4>, dot_of<5>, dot_of<6>, dot_of<7>, dot_of<8>};
  if (m > 0) of[m - 1](row, n, offset, x, stride, sums);
}

void transpose(__m256 (&v)[8]) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

void panel(const Row* rows, const float* offsets, int count, std::int64_t n, float* out) {
  static_assert(PANEL == 16, "two halves of eight rows");
  for (int half = 0; half < PANEL; half += 8) {
    const Row none{nullptr, 0, 1};
    const auto reader = [&](int r) { return Reader(half + r < count ? rows[half + r] : none, n); };
    const Reader readers[8] = {reader(0), reader(1), reader(2), reader(3), reader(4), reader(5), reader(6), reader(7)};
    const int live = count < half ? 0 : count - half < 8 ? count - half : 8;
    for (std::int64_t k = 0; k < n; k += 8) {
      __m256 v[8];
      for (int r = 0; r < 8; ++r)
        v[r] = r < live ? _mm256_add_ps(floats(readers[r].any(k / 8)), _mm256_set1_ps(offsets[half + r]))
                        : _mm256_setzero_ps();
      transpose(v);
      for (int i = 0; i < 8 && k + i < n; ++i) _mm256_storeu_ps(out + (k + i) * PANEL + half, v[i]);
    }
  }
}

// M rows of x times a panel, added to the sums at the end: a sum of block sums errs less than one long chain.
// Sums in registers: 2 * M of them for the sums, two for the panel, one for x.
template <int M>
void multiply_of(const float* x, std::int64_t stride, const float* panel, std::int64_t n, float* sums) {
  __m256 left[M], right[M];
  // gcc keeps arrays in registers only where every loop over them is unrolled early
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    left[i] = right[i] = _mm256_setzero_ps();
  }
  for (std::int64_t k = 0; k < n; ++k) {
    const __m256 a = _mm256_loadu_ps(panel + k * PANEL), b = _mm256_loadu_ps(panel + k * PANEL + 8);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const __m256 value = _mm256_broadcast_ss(x + i * stride + k);
      left[i] = _mm256_fmadd_ps(value, a, left[i]);
      right[i] = _mm256_fmadd_ps(value, b, right[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    _mm256_storeu_ps(sums + i * PANEL, _mm256_add_ps(_mm256_loadu_ps(sums + i * PANEL), left[i]));
    _mm256_storeu_ps(sums + i * PANEL + 8, _mm256_add_ps(_mm256_loadu_ps(sums + i * PANEL + 8), right[i]));
  }
}

void multiply(const float* x, std::int64_t stride, std::int64_t m, const float* panel, std::int64_t n, float* sums) {
  std::int64_t i = 0;
  for (; i + 6 <= m; i += 6) multiply_of<6>(x + i * stride, stride, panel, n, sums + i * PANEL);
  for (; i + 2 <= m; i += 2) multiply_of<2>(x + i * stride, stride, panel, n, sums + i * PANEL);
  if (i < m) multiply_of<1>(x + i * stride, stride, panel, n, sums + i * PANEL);
}

}  // namespace

const RowKernels row_kernels_avx2{levels, values, dot, panel, multiply};

}  // namespace sgsc

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
