// y = scale * ((levels + offset) x) + bias from packed rows; the formula and its error bound are in
// kernels/packed_linear.py. Rows of 0 bits give the bias alone and cost nothing else.
//
// Up to FUSED rows of x: levels are unpacked in registers and used at once; floor bits / 8 bytes a weight; tasks are
// cut at equal packed bytes, because rows differ in width. More: PANEL rows at a time are unpacked to floats that stay
// in the first-level cache and serve a block of rows of x; floor 2 operations a weight and row of x.
// Sums are float32 in an order that does not depend on the number of threads.
#pragma once

#include "packed_rows.h"

namespace sgsc {

// x (m, width), y (m, rows), bias (rows,) or null.
void packed_linear(const float* x, std::int64_t m, const PackedRows& packed, const float* scale, const float* offset,
                   const float* bias, float* y, const Threads& threads);

}  // namespace sgsc
