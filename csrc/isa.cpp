#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace sgsc {
namespace {

constexpr int UNCHOSEN = -1;
constexpr const char* NAMES[] = {"scalar", "avx2"};  // by Isa, each at least as able as the one before

std::atomic<int> chosen{UNCHOSEN};

Isa best() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::scalar;
}

// The level of that name, or UNCHOSEN where this machine lacks it.
int find(const std::string& name) {
  for (int level = 0; level <= static_cast<int>(best()); ++level)
    if (name == NAMES[level]) return level;
  return UNCHOSEN;
}

std::string available() {
  std::string names = NAMES[0];
  for (int level = 1; level <= static_cast<int>(best()); ++level) names += std::string(" and ") + NAMES[level];
  return names;
}

}  // namespace

Isa isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == UNCHOSEN) {
    const char* wanted = std::getenv("SGSC_ISA");
    level = wanted && *wanted ? find(wanted) : static_cast<int>(best());
    if (level == UNCHOSEN)
      throw std::runtime_error(std::string("SGSC_ISA=") + wanted + ": this machine runs " + available());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

std::string isa_name() { return NAMES[static_cast<int>(isa())]; }

void set_isa(const std::string& name) {
  const int level = find(name);
  if (level == UNCHOSEN)
    throw std::invalid_argument("instruction set '" + name + "': this machine runs " + available());
  chosen.store(level, std::memory_order_relaxed);
}

}  // namespace sgsc
