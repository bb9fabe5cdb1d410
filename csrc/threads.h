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

  // Runs use(i) for all i < n, `some` to a task.
  template <class Use>
  void each(std::int64_t n, std::int64_t some, const Use& use) const {
    run((n + some - 1) / some, [&](std::int64_t task) {
      for (std::int64_t i = task * some; i < std::min((task + 1) * some, n); ++i) use(i);
    });
  }

  // The calling thread alone, for work inside a task.
  static Threads one() {
    return {1, [](std::int64_t tasks, const std::function<void(std::int64_t)>& task) {
              for (std::int64_t i = 0; i < tasks; ++i) task(i);
            }};
  }
};

}  // namespace sgsc
