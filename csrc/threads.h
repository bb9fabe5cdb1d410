// How kernels run in parallel without knowing whose threads they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace sgsc {

struct Threads {
  std::int64_t count;  // how many may run at once
  // Runs task 0 .. tasks - 1, each once, in any order; returns when all are done.
  void (*run)(std::int64_t tasks, const std::function<void(std::int64_t)>& task);

  // Runs use(i) for all i < n, each of `size` values: as many to a task as have `most` together, one at least.
  template <class Use>
  void each(std::int64_t n, std::int64_t size, std::int64_t most, const Use& use) const {
    const std::int64_t some = std::max<std::int64_t>(most / std::max<std::int64_t>(size, 1), 1);
    const auto task = [&](std::int64_t t) {
      for (std::int64_t i = t * some; i < std::min((t + 1) * some, n); ++i) use(i);
    };
    if (n <= some)
      task(0);  // nobody to wake
    else
      run((n + some - 1) / some, task);
  }

  // The calling thread alone, for work inside a task.
  static Threads one() {
    return {1, [](std::int64_t tasks, const std::function<void(std::int64_t)>& task) {
              for (std::int64_t i = 0; i < tasks; ++i) task(i);
            }};
  }
};

}  // namespace sgsc
