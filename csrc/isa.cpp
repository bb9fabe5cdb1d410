#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sgsc {
namespace {

constexpr int UNCHOSEN = -1, LEVELS = 5;
constexpr const char* NAMES[LEVELS] = {"scalar", "neon", "avx2", "avxvnni", "avx512"};  // by Isa, worst first

std::atomic<int> chosen{UNCHOSEN};

bool runs(int level) {
  const Isa isa = static_cast<Isa>(level);
  if (isa == Isa::scalar) return true;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avxvnni) return avx2 && __builtin_cpu_supports("avxvnni");
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long ASIMDDP = 1 << 20;  // HWCAP_ASIMDDP
  if (isa == Isa::neon) return getauxval(AT_HWCAP) & ASIMDDP;
#endif
  return false;
}

int best() {
  int level = LEVELS - 1;
  while (!runs(level)) --level;
  return level;
}

// The level of that name, or UNCHOSEN where this machine lacks it.
int find(const std::string& name) {
  for (int level = 0; level < LEVELS; ++level)
    if (name == NAMES[level] && runs(level)) return level;
  return UNCHOSEN;
}

}  // namespace

Isa isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level == UNCHOSEN) {
    const char* wanted = std::getenv("SGSC_ISA");
    level = wanted && *wanted ? find(wanted) : best();
    if (level == UNCHOSEN)
      throw std::runtime_error(std::string("SGSC_ISA=") + wanted + ": this machine runs " + isa_names());
    chosen.store(level, std::memory_order_relaxed);
  }
  return static_cast<Isa>(level);
}

std::string isa_name() { return NAMES[static_cast<int>(isa())]; }

std::string isa_names() {
  std::string names;
  for (int level = 0; level < LEVELS; ++level)
    if (runs(level)) names += (names.empty() ? "" : ", ") + std::string(NAMES[level]);
  return names;
}

void set_isa(const std::string& name) {
  const int level = find(name);
  if (level == UNCHOSEN)
    throw std::invalid_argument("instruction set '" + name + "': this machine runs " + isa_names());
  chosen.store(level, std::memory_order_relaxed);
}

}  // namespace sgsc
