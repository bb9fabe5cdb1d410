"""What Triton's interpreter cannot do, in one place: kernels call these and never ask which mode they run in.

The interpreter (TRITON_INTERPRET=1, read when triton is imported) has no libdevice, and its cast to bfloat16 truncates
and is wrong below the normal numbers. It also computes with the bit patterns of bfloat16 as integers, silently: widen
to float32 before any arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED: tl.constexpr = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def rint(v):
    """Round float32 to the nearest integer, half to even; keeps NaN, infinity and the sign of zero.

    In the interpreter by the addition of 2^23, exact at every size. Never so on a GPU, where the addition may fuse
    with a multiplication before it and break ties otherwise.
    """
    if INTERPRETED:
        size = tl.abs(v)
        whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
        return tl.where(v < 0.0, -1.0 * whole, tl.where(v > 0.0, whole, v))  # 0 - whole would lose -0.0
    else:
        return libdevice.rint(v)


@triton.jit
def narrow(v, dtype: tl.constexpr):
    """Cast float32 to `dtype`, rounding to nearest, half to even; a NaN stays one."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = v.to(tl.uint32, bitcast=True)
        bits = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return v.to(dtype)


@triton.jit
def clamp(v, low, high):
    """min(max(v, low), high), where a NaN in any of the three comes out as NaN."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)
