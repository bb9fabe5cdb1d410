// Round rows to their grids, forward and backward; the formulas are in kernels/fake_quantize.py.
//
// Several tensors go through one parallel region: work is cut into tasks of about BLOCK elements whatever the shapes,
// so that one wide row, many narrow ones, and a list of small layers all use every thread.
//
// Gradient sums do not depend on the number of threads: a row is cut into fixed blocks, each block is summed in float
// lanes of at most 32 terms and in double beyond, and the blocks of a row are added in order.
//
// Results larger than the last-level cache are written past it, so that no line is read before it is overwritten;
// those of mixtures, which are bound by arithmetic, are not.
//
// Floor in float32: forward 8 bytes an element (read x, write q), about 6 operations; backward 12 bytes (read grad and
// x, write the gradient of x), about 14 operations. Both are bound by memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "number.h"
#include "threads.h"

namespace sgsc {

// One (rows, width) tensor, row after row without gaps. Pointers of the direction that is not run stay null.
struct GridRows {
  Type type;  // of x, grad and out
  std::int64_t rows, width;
  const void *x, *grad;
  const void *scale, *lo, *hi, *shift;   // one value a row: double where type is f64, else float
  void* out;                             // the values on the grid, or the gradient of x
  void *grad_scale, *grad_lo, *grad_hi;  // one value a row, of the type of scale
};

void fake_quantize(const std::vector<GridRows>& tensors, const Threads& threads);
void fake_quantize_backward(const std::vector<GridRows>& tensors, const Threads& threads);

// One row on several grids at once, and the sum of what comes, weighed; the formulas are in
// kernels/fake_quantize_mixed.py. Its vectors have one value a grid. Pointers of the direction that is not run stay
// null.
struct MixedRow {
  GridRows row;  // rows = 1
  std::int64_t grids;
  const void* share;
  void* grad_share;
};

void fake_quantize_mixed(const MixedRow& mixed, const Threads& threads);
void fake_quantize_mixed_backward(const MixedRow& mixed, const Threads& threads);

// For tests: results of so many bytes and more go past the caches. Returns what held before.
std::int64_t set_stream_from(std::int64_t bytes);

// to = from, or from + with, past the caches: what a bench compares the two above with. No aliasing.
void stream(const float* from, const float* with, float* to, std::int64_t n, const Threads& threads);

// What an instruction set provides: a stretch of one row whose hi exceeds lo.
struct Grid {
  double scale, lo, hi, shift;  // of a float row: values of float
};

struct Sums {
  double scale = 0, lo = 0, hi = 0;
  double inside = 0;  // of grad * x where x is inside: what mixtures need, and `backward_mixed` alone makes

  void add(const Sums& other) {
    scale += other.scale;
    lo += other.lo;
    hi += other.hi;
    inside += other.inside;
  }
};

struct GridKernels {
  void (*forward)(const void* x, const Grid& grid, void* q, std::int64_t n);
  void (*backward)(const void* grad, const void* x, const Grid& grid, void* grad_x, std::int64_t n, Sums& sums);
  void (*backward_mixed)(const void* grad, const void* x, const Grid& grid, void* grad_x, std::int64_t n, Sums& sums);
};

// Not for f64. With `stream`, results go past the caches, to memory, and the caller fences them.
GridKernels grid_kernels_avx2(Type type, bool stream);
GridKernels grid_kernels_avx512(Type type, bool stream);
void stream_avx2(const float* from, const float* with, float* to, std::int64_t n);

constexpr std::size_t CACHE_LINE = 64;  // bytes of a cache line

// Elements up to the next cache line, at most n: what is streamed fills whole lines.
template <class T>
std::int64_t to_line(const T* p, std::int64_t n) {
  const auto bytes = -reinterpret_cast<std::uintptr_t>(p) & (CACHE_LINE - 1);
  return std::min<std::int64_t>(static_cast<std::int64_t>(bytes / sizeof(T)), n);
}

}  // namespace sgsc
