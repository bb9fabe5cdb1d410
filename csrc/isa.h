// Instruction sets, and which one the kernels use.
//
// Chosen at the first call: the best that this machine runs, or the one that the environment variable SGSC_ISA names.
// The variable can only lower the level: asking for more than the machine has is an error, never a crash.
#pragma once

#include <string>

namespace sgsc {

enum class Isa { scalar, avx2 };

// The set in force. Throws std::runtime_error if SGSC_ISA names a set that this machine or this build lacks.
Isa isa();

// "scalar", "avx2"
std::string isa_name();

// For tests: use another set. Throws std::invalid_argument if this machine or this build lacks it.
void set_isa(const std::string& name);

}  // namespace sgsc
