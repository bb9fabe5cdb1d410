#include "packed_linear.h"

#include <algorithm>

namespace sgsc {
namespace {

constexpr std::int64_t BYTES = 8192;  // packed, a task: some microseconds
constexpr std::int64_t TALL = 192;    // rows of x a task; a panel is unpacked once a task
constexpr std::int64_t SHORT = 48;    // the same where panels alone cannot keep all threads busy

void fused(const float* x, std::int64_t m, const PackedRows& p, const float* scale, const float* offset,
           const float* bias, float* y, const Threads& threads) {
  const RowKernels& kernels = row_kernels();
  const std::int64_t total = p.starts[p.rows];
  const std::int64_t tasks = std::max<std::int64_t>(std::min(threads.count, total * m / BYTES), 1);
  const auto boundary = [&](std::int64_t task) {  // first row of a task
    if (task == 0 || task == tasks) return task == 0 ? 0 : p.rows;
    return static_cast<std::int64_t>(std::lower_bound(p.starts, p.starts + p.rows, total / tasks * task) - p.starts);
  };
  threads.run(tasks, [&](std::int64_t task) {
    for (std::int64_t row = boundary(task); row < boundary(task + 1); ++row) {
      const float add = bias ? bias[row] : 0.0f;
      float sums[FUSED] = {};
      if (p.bits[row]) kernels.dot(row_of(p, row), p.width, offset[row], x, p.width, static_cast<int>(m), sums);
      for (std::int64_t i = 0; i < m; ++i) y[i * p.rows + row] = p.bits[row] ? sums[i] * scale[row] + add : add;
    }
  });
}

void by_panels(const float* x, std::int64_t m, const PackedRows& p, const float* scale, const float* offset,
               const float* bias, float* y, const Threads& threads) {
  const RowKernels& kernels = row_kernels();
  const std::vector<std::int64_t> live = live_rows(p, 0, p.rows);
  for (std::int64_t row = 0; row < p.rows; ++row)
    if (!p.bits[row])
      for (std::int64_t i = 0; i < m; ++i) y[i * p.rows + row] = bias ? bias[row] : 0.0f;

  const std::int64_t count = static_cast<std::int64_t>(live.size()), panels = (count + PANEL - 1) / PANEL;
  const std::int64_t step = panels < threads.count ? SHORT : TALL, blocks = (m + step - 1) / step;
  threads.run(panels * blocks, [&](std::int64_t task) {
    const std::int64_t* rows = live.data() + task / blocks * PANEL;
    const int here = static_cast<int>(std::min<std::int64_t>(live.data() + count - rows, PANEL));
    const std::int64_t first = task % blocks * step, height = std::min(step, m - first);
    alignas(64) float sums[TALL * PANEL];
    panel_product(kernels, p, offset, rows, here, x + first * p.width, height, sums);
    for (std::int64_t i = 0; i < height; ++i)
      for (int r = 0; r < here; ++r) {
        const float add = bias ? bias[rows[r]] : 0.0f;
        y[(first + i) * p.rows + rows[r]] = sums[i * PANEL + r] * scale[rows[r]] + add;
      }
  });
}

}  // namespace

void packed_linear(const float* x, std::int64_t m, const PackedRows& packed, const float* scale, const float* offset,
                   const float* bias, float* y, const Threads& threads) {
  if (m <= FUSED)
    fused(x, m, packed, scale, offset, bias, y, threads);
  else
    by_panels(x, m, packed, scale, offset, bias, y, threads);
}

}  // namespace sgsc
