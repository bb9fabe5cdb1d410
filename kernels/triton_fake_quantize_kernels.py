"""The GPU programs behind triton_fake_quantize.py, which says what they compute and launches them."""

# Triton compiles these functions and gives names another meaning than Python's types do.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import clamp, narrow, rint


@triton.jit
def _quantize_tile(x, out, scale, lo, hi, shift, row, exists, K, start, span, BLOCK: tl.constexpr):
    """`fake_quantize` of the given rows, columns start .. start + span."""
    s = tl.load(scale + row, mask=exists, other=1.0)[:, None]
    low = tl.load(lo + row, mask=exists, other=0.0)[:, None]
    high = tl.load(hi + row, mask=exists, other=0.0)[:, None]
    z = tl.load(shift + row, mask=exists, other=0.0)[:, None]
    alive = high > low
    first = row.to(tl.int64)[:, None] * K + start
    width = tl.minimum(K - start, span).to(tl.int32)
    at = 0
    while at < width:
        column = at + tl.arange(0, BLOCK)[None, :]
        here = (column < width) & exists[:, None]
        v = tl.load(x + first + column, mask=here & alive, other=0.0).to(tl.float32)
        code = rint(clamp(tl.math.div_rn(v, s) - z, low, high))
        q = tl.where(alive, (code + z) * s, 0.0)
        tl.store(out + first + column, narrow(q, out.dtype.element_ty), mask=here)
        at += BLOCK


@triton.jit
def _backward_tile(
    grad, x, out, scale, lo, hi, shift, row, exists, K, start, span, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write grad_x of the given rows, columns start .. start + span; returns their sums for scale, lo, hi, (ROWS,)."""
    s = tl.load(scale + row, mask=exists, other=1.0)
    low = tl.load(lo + row, mask=exists, other=0.0)[:, None]
    high = tl.load(hi + row, mask=exists, other=0.0)[:, None]
    z = tl.load(shift + row, mask=exists, other=0.0)[:, None]
    alive = high > low
    first = row.to(tl.int64)[:, None] * K + start
    width = tl.minimum(K - start, span).to(tl.int32)
    to_scale = tl.zeros((ROWS, BLOCK), tl.float32)
    to_lo = tl.zeros((ROWS, BLOCK), tl.float32)
    to_hi = tl.zeros((ROWS, BLOCK), tl.float32)
    at = 0
    while at < width:
        column = at + tl.arange(0, BLOCK)[None, :]
        here = (column < width) & exists[:, None]
        read = here & alive
        g = tl.load(grad + first + column, mask=read, other=0.0).to(tl.float32)
        v = tl.math.div_rn(tl.load(x + first + column, mask=read, other=0.0).to(tl.float32), s[:, None]) - z
        code = rint(clamp(v, low, high))
        below = (v < low) & read
        above = (v > high) & read
        outside = below | above
        inside = tl.where(outside, 0.0, g)  # g is 0 where nothing was read
        tl.store(out + first + column, narrow(inside, out.dtype.element_ty), mask=here)
        to_scale += g * tl.where(read, tl.where(outside, code + z, code - v), 0.0)
        to_lo += tl.where(below, g, 0.0)
        to_hi += tl.where(above, g, 0.0)
        at += BLOCK
    return tl.sum(to_scale, 1), tl.sum(to_lo, 1) * s, tl.sum(to_hi, 1) * s


@triton.jit(do_not_specialize=["C"])
def forward_kernel(x, out, scale, lo, hi, shift, C, K, span, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A program: ROWS rows of x (C, K) and, of these, the columns of one part."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1).to(tl.int64) * span
    _quantize_tile(x, out, scale, lo, hi, shift, row, row < C, K, start, span, BLOCK)


@triton.jit(do_not_specialize=["C"])
def backward_kernel(
    grad, x, out, to_scale, to_lo, to_hi, scale, lo, hi, shift, C, K, span, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """As `forward_kernel`; to_scale, to_lo and to_hi are (C, parts)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    start = part.to(tl.int64) * span
    a, b, c = _backward_tile(grad, x, out, scale, lo, hi, shift, row, row < C, K, start, span, ROWS, BLOCK)
    at = row * tl.num_programs(1) + part
    tl.store(to_scale + at, a, mask=row < C)
    tl.store(to_lo + at, b, mask=row < C)
    tl.store(to_hi + at, c, mask=row < C)


@triton.jit
def add_parts_kernel(parts_scale, parts_lo, parts_hi, to_scale, to_lo, to_hi, parts, PADDED: tl.constexpr):
    """Sums of (C, parts) over parts, a row a program, always in the same order."""
    row = tl.program_id(0)
    part = tl.arange(0, PADDED)
    at = row * parts + part
    tl.store(to_scale + row, tl.sum(tl.load(parts_scale + at, mask=part < parts, other=0.0)))
    tl.store(to_lo + row, tl.sum(tl.load(parts_lo + at, mask=part < parts, other=0.0)))
    tl.store(to_hi + row, tl.sum(tl.load(parts_hi + at, mask=part < parts, other=0.0)))


# ---- all layers in one launch: a table of addresses, a column a layer ----
#
# line 0  first row of the layer, counted over all layers     line 2  1 where all addresses and K are multiples of 16
# line 1  K                                                   lines 3 to 8  scale, lo, hi, shift, x, out
#                                                             lines 9 to 12, backward  grad, to_scale, to_lo, to_hi


@triton.jit
def _column_and_row(table, layers, LAYERS: tl.constexpr):
    """This program's column of the table and its row within that layer, (1,)."""
    layer = tl.arange(0, LAYERS)
    first = tl.load(table + layer, mask=layer < layers, other=9223372036854775807)
    column = table + tl.sum((first <= tl.program_id(0)).to(tl.int32)) - 1
    return column, (tl.program_id(0) - tl.load(column)).to(tl.int32) + tl.arange(0, 1)


@triton.jit
def _pointer(table, address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to an address; ALIGNED promises multiples of 16 bytes.

    Counted from the table's own pointer, since the compiler forgets what it is told of one cast from an integer.
    """
    step = (tl.load(address) - table.to(tl.int64)) // (dtype.primitive_bitwidth // 8)
    if ALIGNED:
        step = tl.multiple_of(step, 128 // dtype.primitive_bitwidth)
    return table.to(tl.pointer_type(dtype)) + step


@triton.jit
def _width(column, layers, ALIGNED: tl.constexpr):
    K = tl.load(column + layers)
    return tl.multiple_of(K, 16) if ALIGNED else K


@triton.jit
def _forward_row(table, column, layers, row, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    K = _width(column, layers, ALIGNED)
    scale = _pointer(table, column + 3 * layers, tl.float32, False)
    lo = _pointer(table, column + 4 * layers, tl.float32, False)
    hi = _pointer(table, column + 5 * layers, tl.float32, False)
    shift = _pointer(table, column + 6 * layers, tl.float32, False)
    x = _pointer(table, column + 7 * layers, DTYPE, ALIGNED)
    out = _pointer(table, column + 8 * layers, DTYPE, ALIGNED)
    _quantize_tile(x, out, scale, lo, hi, shift, row, row >= 0, K, 0, K, BLOCK)


@triton.jit
def _backward_row(table, column, layers, row, DTYPE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    K = _width(column, layers, ALIGNED)
    scale = _pointer(table, column + 3 * layers, tl.float32, False)
    lo = _pointer(table, column + 4 * layers, tl.float32, False)
    hi = _pointer(table, column + 5 * layers, tl.float32, False)
    shift = _pointer(table, column + 6 * layers, tl.float32, False)
    x = _pointer(table, column + 7 * layers, DTYPE, ALIGNED)
    out = _pointer(table, column + 8 * layers, DTYPE, ALIGNED)
    grad = _pointer(table, column + 9 * layers, DTYPE, ALIGNED)
    a, b, c = _backward_tile(grad, x, out, scale, lo, hi, shift, row, row >= 0, K, 0, K, 1, BLOCK)
    tl.store(_pointer(table, column + 10 * layers, tl.float32, False) + row, a)
    tl.store(_pointer(table, column + 11 * layers, tl.float32, False) + row, b)
    tl.store(_pointer(table, column + 12 * layers, tl.float32, False) + row, c)


@triton.jit(do_not_specialize=["layers"])
def many_forward_kernel(table, layers, DTYPE: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one row of one layer."""
    column, row = _column_and_row(table, layers, LAYERS)
    if tl.load(column + 2 * layers) != 0:
        _forward_row(table, column, layers, row, DTYPE, BLOCK, True)
    else:
        _forward_row(table, column, layers, row, DTYPE, BLOCK, False)


@triton.jit(do_not_specialize=["layers"])
def many_backward_kernel(table, layers, DTYPE: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """A program: one row of one layer."""
    column, row = _column_and_row(table, layers, LAYERS)
    if tl.load(column + 2 * layers) != 0:
        _backward_row(table, column, layers, row, DTYPE, BLOCK, True)
    else:
        _backward_row(table, column, layers, row, DTYPE, BLOCK, False)
