// What the native tests share: data by chance, the sets to test, a line a kernel.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "isa.h"
#include "tiles.h"

using std::int32_t, std::int64_t, std::int8_t, std::uint8_t;
template <class T>
using Array = std::vector<T>;

inline std::mt19937 generator(1);
inline int chance(int low, int high) {
  return low + static_cast<int>(generator() % static_cast<unsigned>(high - low + 1));
}

template <class T>
Array<T> integers(int64_t n, int low, int high) {
  Array<T> all(n);
  for (T& value : all) value = static_cast<T>(chance(low, high));
  return all;
}

inline Array<float> reals(int64_t n) {
  Array<float> all(n);
  for (float& value : all) value = static_cast<float>(chance(-(1 << 23), 1 << 23)) * 0x1p-21f;
  return all;
}

// Of what no chain of additions is longer than `n`, times the sum of magnitudes.
inline double rounding(int64_t n) { return static_cast<double>(n + 8) * 0x1p-24; }

// One line of the report.
class Report {
 public:
  Report(const std::string& set, const char* kernel) : name_(set + " " + kernel) {}
  Report(const Report&) = delete;
  ~Report() {
    std::printf("%-24s %8ld values %s%s\n", name_.c_str(), values_, bad_ ? "FAILED " : "ok", first_.c_str());
    failures += bad_ > 0 || values_ == 0;
  }

  template <class T>
  void same(const T* got, const T* want, int64_t n, std::initializer_list<int64_t> where) {
    for (int64_t i = 0; i < n; ++i)
      judge(got[i] == want[i] || (got[i] != got[i] && want[i] != want[i]), got[i], want[i], i, where);
  }
  void near(const float* got, const double* want, const double* bound, int64_t n,
            std::initializer_list<int64_t> where) {
    for (int64_t i = 0; i < n; ++i) judge(std::fabs(got[i] - want[i]) <= bound[i], got[i], want[i], i, where);
  }
  static inline int failures = 0;

 private:
  void judge(bool good, double got, double want, int64_t i, std::initializer_list<int64_t> where) {
    ++values_;
    if (good || bad_++) return;
    for (int64_t number : where) first_ += std::to_string(number) + " ";
    first_ += "[" + std::to_string(i) + "]: " + std::to_string(got) + ", want " + std::to_string(want);
  }
  std::string name_, first_;
  long values_ = 0, bad_ = 0;
};

// Whole products with set `set` in force, which is one of `use`.
void test_products(const std::string& set);
void use(const std::string& set);
