#include "fake_quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "isa.h"
#include "memory.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <xmmintrin.h>
#endif

namespace sgsc {
namespace {

constexpr std::int64_t ALONE = 1 << 18;  // below so many elements one thread is done before others have woken up
constexpr std::int64_t BLOCK = 16384;    // elements a task: some microseconds, well above the cost of starting one

// The meaning, in the arithmetic of the reference: S is the type of the grid, T that of the elements. A division stays
// a division and nothing is contracted, or codes next to a tie would differ. Comparisons are such that a NaN is kept.
template <class T, class S>
void forward(const void* x, const Grid& grid, void* q, std::int64_t n) {
  const auto* in = static_cast<const T*>(x);
  auto* out = static_cast<T*>(q);
  const S scale = S(grid.scale), lo = S(grid.lo), hi = S(grid.hi), shift = S(grid.shift);
  for (std::int64_t i = 0; i < n; ++i) {
    const S v = widen(in[i]) / scale - shift;
    const S code = std::nearbyint(v < lo ? lo : v > hi ? hi : v);
    narrow((code + shift) * scale, out[i]);
  }
}

template <class T, class S>
void backward(const void* grad, const void* x, const Grid& grid, void* grad_x, std::int64_t n, Sums& sums) {
  const auto *in = static_cast<const T*>(x), *up = static_cast<const T*>(grad);
  auto* out = static_cast<T*>(grad_x);
  const S scale = S(grid.scale), lo = S(grid.lo), hi = S(grid.hi), shift = S(grid.shift);
  for (std::int64_t i = 0; i < n; ++i) {
    const S g = widen(up[i]), v = widen(in[i]) / scale - shift;
    if (v < lo) {
      sums.scale += g * (std::nearbyint(lo) + shift);
      sums.lo += g * scale;
      narrow(S(0), out[i]);
    } else if (v > hi) {
      sums.scale += g * (std::nearbyint(hi) + shift);
      sums.hi += g * scale;
      narrow(S(0), out[i]);
    } else {
      sums.scale += g * (std::nearbyint(v) - v);
      sums.inside += g * widen(in[i]);
      out[i] = up[i];
    }
  }
}

GridKernels grid_kernels_scalar(Type type) {
  switch (type) {
    case Type::f64:
      return {forward<double, double>, backward<double, double>, backward<double, double>};
    case Type::bf16:
      return {forward<Bfloat16, float>, backward<Bfloat16, float>, backward<Bfloat16, float>};
    case Type::f16:
      return {forward<Float16, float>, backward<Float16, float>, backward<Float16, float>};
    default:
      return {forward<float, float>, backward<float, float>, backward<float, float>};
  }
}

GridKernels grid_kernels(Type type, [[maybe_unused]] bool stream) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (isa() == Isa::avx512 && type != Type::f64) return grid_kernels_avx512(type, stream);
  if (isa() >= Isa::avx2 && type != Type::f64) return grid_kernels_avx2(type, stream);
#endif
  return grid_kernels_scalar(type);
}

double vector_at(const GridRows& t, const void* vector, std::int64_t row) {
  return t.type == Type::f64 ? static_cast<const double*>(vector)[row] : static_cast<const float*>(vector)[row];
}

void set_vector(const GridRows& t, void* vector, std::int64_t row, double value) {
  if (t.type == Type::f64)
    static_cast<double*>(vector)[row] = value;
  else
    static_cast<float*>(vector)[row] = static_cast<float>(value);
}

void set_sums(const GridRows& t, std::int64_t row, const Sums& sums) {
  set_vector(t, t.grad_scale, row, sums.scale);
  set_vector(t, t.grad_lo, row, sums.lo);
  set_vector(t, t.grad_hi, row, sums.hi);
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t blocks_a_row(const GridRows& t) { return std::max<std::int64_t>(divide_up(t.width, BLOCK), 1); }
std::int64_t rows_a_task(const GridRows& t) {
  return std::max<std::int64_t>(BLOCK / std::max<std::int64_t>(t.width, 1), 1);
}

std::int64_t elements_of(const std::vector<GridRows>& tensors) {
  std::int64_t elements = 0;
  for (const GridRows& t : tensors) elements += t.rows * t.width;
  return elements;
}

// Orders what was streamed before what follows.
void fence() {
#if defined(__x86_64__) && defined(__GNUC__)
  _mm_sfence();
#endif
}

// Runs work(tensor, row, block, first element of the block, its length) once for every block of every row; an element
// is worked on so many `times`.
template <class Work>
void for_each_block(const std::vector<GridRows>& tensors, const Threads& threads, const Work& work,
                    std::int64_t times = 1) {
  std::vector<std::int64_t> first_task(1, 0);  // of each tensor, and the number of all
  for (const GridRows& t : tensors)
    first_task.push_back(first_task.back() + divide_up(t.rows, rows_a_task(t)) * blocks_a_row(t));
  const auto run = [&](std::int64_t task) {
    const auto which = std::upper_bound(first_task.begin(), first_task.end(), task) - first_task.begin() - 1;
    const GridRows& t = tensors[which];
    const std::int64_t blocks = blocks_a_row(t), step = rows_a_task(t), inner = task - first_task[which];
    const std::int64_t block = inner % blocks, row = inner / blocks * step, begin = block * BLOCK;
    for (std::int64_t r = row; r < std::min(row + step, t.rows); ++r)
      work(static_cast<std::size_t>(which), r, block, r * t.width + begin, std::min(BLOCK, t.width - begin));
    fence();  // once a task: after every row of 16 KiB, it would cost a tenth of the time
  };
  if (elements_of(tensors) * times < ALONE)
    for (std::int64_t task = 0; task < first_task.back(); ++task) run(task);
  else
    threads.run(first_task.back(), run);
}

struct Part {  // of a tensor
  GridKernels kernels;
  std::vector<Sums> sums;  // one a block; empty where a row is one block
};

std::atomic<std::int64_t>& stream_from() {
  static std::atomic<std::int64_t> bytes{last_cache()};
  return bytes;
}

// Results that fit no cache would only push out what is in it, after reading in the lines that they overwrite.
bool streams(const std::vector<GridRows>& tensors) {
  std::int64_t bytes = 0;
  for (const GridRows& t : tensors) bytes += t.rows * t.width * size_of(t.type);
  return bytes >= stream_from();
}

std::vector<Part> parts_of(const std::vector<GridRows>& tensors, bool with_sums) {
  std::vector<Part> parts;
  const bool stream = streams(tensors);
  for (const GridRows& t : tensors) {
    const std::int64_t blocks = blocks_a_row(t);
    parts.push_back({grid_kernels(t.type, stream), std::vector<Sums>(with_sums && blocks > 1 ? t.rows * blocks : 0)});
  }
  return parts;
}

Grid grid_of(const GridRows& t, std::int64_t row) {
  return {vector_at(t, t.scale, row), vector_at(t, t.lo, row), vector_at(t, t.hi, row), vector_at(t, t.shift, row)};
}

const void* at(const GridRows& t, const void* base, std::int64_t element) {
  return static_cast<const char*>(base) + element * size_of(t.type);
}

void* at(const GridRows& t, void* base, std::int64_t element) {
  return static_cast<char*>(base) + element * size_of(t.type);
}

void clear(const GridRows& t, std::int64_t element, std::int64_t n) {
  if (n > 0) std::memset(at(t, t.out, element), 0, n * size_of(t.type));
}

// ---- mixtures ----

constexpr std::int64_t CHUNK = 512;  // elements that go through all grids, one after the other, in the first cache

// Elements from + first …: themselves where they are of S, else in `wide`.
template <class T, class S>
const S* widened(const void* from, std::int64_t first, std::int64_t n, S* wide) {
  const T* x = static_cast<const T*>(from) + first;
  if constexpr (std::is_same_v<T, S>) return x;
  for (std::int64_t i = 0; i < n; ++i) wide[i] = widen(x[i]);
  return wide;
}

// One block of the row, in the arithmetic of the grids; with `sums`, one a grid, backward.
template <class T, class S>
void mix(const MixedRow& mixed, std::int64_t first, std::int64_t length, Sums* sums) {
  const GridRows& t = mixed.row;
  const GridKernels kernels = grid_kernels(std::is_same_v<S, double> ? Type::f64 : Type::f32, false);
  S wide_x[CHUNK], wide_grad[CHUNK], part[CHUNK], total[CHUNK];
  for (std::int64_t begin = first; begin < first + length; begin += CHUNK) {
    const std::int64_t n = std::min(CHUNK, first + length - begin);
    const S* x = widened<T, S>(t.x, begin, n, wide_x);
    const S* grad = sums ? widened<T, S>(t.grad, begin, n, wide_grad) : nullptr;
    std::fill_n(total, n, S(0));
    for (std::int64_t i = 0; i < mixed.grids; ++i) {
      const Grid grid = grid_of(t, i);
      if (!(grid.hi > grid.lo)) continue;
      if (sums)
        kernels.backward_mixed(grad, x, grid, part, n, sums[i]);
      else
        kernels.forward(x, grid, part, n);
      const S share = S(vector_at(t, mixed.share, i));
      for (std::int64_t j = 0; j < n; ++j) total[j] += share * part[j];
    }
    for (std::int64_t i = 0; i < n; ++i) narrow(total[i], (static_cast<T*>(t.out) + begin)[i]);
  }
}

// A grid is as much work as one pass over the row.
void mix(const MixedRow& mixed, const Threads& threads, Sums* sums) {
  const auto run = [&](auto element, auto real) {
    for_each_block(
        {mixed.row}, threads,
        [&](std::size_t, std::int64_t, std::int64_t block, std::int64_t first, std::int64_t n) {
          mix<decltype(element), decltype(real)>(mixed, first, n, sums ? sums + block * mixed.grids : nullptr);
        },
        mixed.grids);
  };
  if (mixed.row.type == Type::f64)
    run(double{}, double{});
  else
    as_element(mixed.row.type, [&](auto element) { run(element, float{}); });
}

}  // namespace

void fake_quantize(const std::vector<GridRows>& tensors, const Threads& threads) {
  const std::vector<Part> parts = parts_of(tensors, false);
  for_each_block(tensors, threads,
                 [&](std::size_t i, std::int64_t row, std::int64_t, std::int64_t element, std::int64_t n) {
                   const GridRows& t = tensors[i];
                   const Grid grid = grid_of(t, row);
                   if (grid.hi > grid.lo)
                     parts[i].kernels.forward(at(t, t.x, element), grid, at(t, t.out, element), n);
                   else
                     clear(t, element, n);
                 });
}

void fake_quantize_backward(const std::vector<GridRows>& tensors, const Threads& threads) {
  std::vector<Part> parts = parts_of(tensors, true);
  for_each_block(
      tensors, threads, [&](std::size_t i, std::int64_t row, std::int64_t block, std::int64_t element, std::int64_t n) {
        const GridRows& t = tensors[i];
        const Grid grid = grid_of(t, row);
        Sums sums;
        if (grid.hi > grid.lo)
          parts[i].kernels.backward(at(t, t.grad, element), at(t, t.x, element), grid, at(t, t.out, element), n, sums);
        else
          clear(t, element, n);
        if (parts[i].sums.empty())
          set_sums(t, row, sums);
        else
          parts[i].sums[row * blocks_a_row(t) + block] = sums;
      });
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (parts[i].sums.empty()) continue;
    const std::int64_t blocks = blocks_a_row(tensors[i]);
    for (std::int64_t row = 0; row < tensors[i].rows; ++row) {
      Sums sums;
      for (std::int64_t block = 0; block < blocks; ++block) sums.add(parts[i].sums[row * blocks + block]);
      set_sums(tensors[i], row, sums);
    }
  }
}

void fake_quantize_mixed(const MixedRow& mixed, const Threads& threads) { mix(mixed, threads, nullptr); }

void fake_quantize_mixed_backward(const MixedRow& mixed, const Threads& threads) {
  const GridRows& t = mixed.row;
  std::vector<Sums> sums(blocks_a_row(t) * mixed.grids);
  mix(mixed, threads, sums.data());
  for (std::int64_t i = 0; i < mixed.grids; ++i) {
    Sums all;
    for (std::int64_t block = 0; block < blocks_a_row(t); ++block) all.add(sums[block * mixed.grids + i]);
    // what `scale` sums is (q - x) / scale inside and q / scale outside; it is 0 where there is no grid
    const double on_grid = all.scale == 0 ? 0 : vector_at(t, t.scale, i) * all.scale;
    set_vector(t, mixed.grad_share, i, on_grid + all.inside);
    const double share = vector_at(t, mixed.share, i);
    set_sums(t, i, {share * all.scale, share * all.lo, share * all.hi});
  }
}

std::int64_t set_stream_from(std::int64_t bytes) { return stream_from().exchange(bytes); }

void stream(const float* from, const float* with, float* to, std::int64_t n, const Threads& threads) {
  threads.run(divide_up(n, BLOCK), [&](std::int64_t task) {
    const std::int64_t begin = task * BLOCK, length = std::min(BLOCK, n - begin);
    const float* second = with ? with + begin : nullptr;
#if defined(__x86_64__) && defined(__GNUC__)
    if (isa() >= Isa::avx2) return stream_avx2(from + begin, second, to + begin, length);
#endif
    for (std::int64_t i = 0; i < length; ++i) to[begin + i] = second ? from[begin + i] + second[i] : from[begin + i];
  });
}

}  // namespace sgsc
