// What the files of the instruction sets share. Headers first, target pragma after: no inline function that other files
// use is then compiled for an instruction set that the machine may lack.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "tiles.h"

#define SGSC_LAMBDA __attribute__((always_inline))

namespace sgsc {

constexpr int AHEAD = 4096;  // bytes from what is read to what is asked of memory

inline std::int32_t word(const void* p) {
  std::int32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace sgsc
