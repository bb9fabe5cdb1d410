// y = x W^T + bias from tiles; see kernels/packed_linear.py and product.h.
#pragma once

#include "number.h"
#include "product.h"

namespace sgsc {

// x (m, width) and y (m, rows) of `type`; bias (rows,) of `type`, or null. `input`, or
// null: for int8 that multiplies integers, since in exact numerics x is on its grid already.
struct Linear {
  Type type;
  const void *x, *bias;
  void* y;
  std::int64_t m, width, rows;
  const InputGrid* input = nullptr;
};

// Floor of one token: the bytes of the tiles, once. Of many: their operations at the rate of the arithmetic units.
void packed_linear(const Linear& layer, const Tiles& tiles, bool int8, const Threads& threads);

}  // namespace sgsc
