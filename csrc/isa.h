// Instruction sets, and which one the kernels use.
//
// Chosen at the first call: the best that this machine runs, or the one that the environment variable SGSC_ISA names.
// The variable can only lower the level: asking for what the machine lacks is an error, never a crash.
#pragma once

#include <string>

namespace sgsc {

// avx2: with FMA, F16C and BMI2. avxvnni: and the 256-bit dot product. avx512: F, BW, VL, DQ, VNNI, with avx2's.
// neon: with the dot product of ARMv8.2.
enum class Isa { scalar, neon, avx2, avxvnni, avx512 };

// The set in force. Throws std::runtime_error if SGSC_ISA names a set that this machine or this build lacks.
Isa isa();

// "scalar", "avx2" …
std::string isa_name();

// All that this machine and this build have, worst first, with ", " between.
std::string isa_names();

// For tests: use another set. Throws std::invalid_argument if this machine or this build lacks it.
void set_isa(const std::string& name);

}  // namespace sgsc
