"""`fake_quantize` and its backward on a GPU, for one tensor and for all layers of a network in one launch.

The meaning is that of fake_quantize.py. A program walks over `rows` rows, `block` columns at a time:

    x, grad, q, grad_x      (C, K)  float32, bfloat16 or float16, computed in float32
    scale, lo, hi, shift    (C,)    float32

Floor in float32: 8 bytes an element forward (read x, write q), 12 backward (read grad and x, write grad_x); half that in
16 bits. One pass reaches it: nothing is saved but the inputs, and a row with hi <= lo reads no element at all. Division
and rounding are IEEE, so values equal the reference's bit for bit.

Row sums have one writer and an order that depends on the shape alone, never on the GPU: the same bits in every run. Few
and long rows (a whole tensor as one row) are cut into parts, whose sums a second launch adds up in order.

Arguments that are not float32 grids of such an x (float64 most of all) take the reference.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fake_quantize import reference, reference_backward
from .op import LIBRARY
from .triton_compat import INTERPRETED, clamp, narrow, rint

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MANY_BLOCK = 1024
_PER_WARP = 256  # elements of a tile a warp holds: 8 a thread, two 128-bit loads in flight of each float32 operand
_LONG = 16_384  # columns that one program walks over before cutting the row is worth a second launch
_PROGRAMS = 1_024  # that fill a large GPU (8 of 8 warps on each of 132 multiprocessors)


class Plan(NamedTuple):
    """How (C, K) elements fall to programs; a function of the shape alone.

    Attributes:
        rows: Rows a program takes at once, a power of two.
        block: Columns it takes at once, a power of two.
        parts: Programs that share a row.
        span: Columns of each part, a multiple of `block`.
    """

    rows: int
    block: int
    parts: int
    span: int

    @property
    def warps(self) -> int:
        """Warps a program."""
        return max(1, self.rows * self.block // _PER_WARP)


def plan(channels: int, width: int) -> Plan:
    """Tiles of at most 2,048 elements; short rows share a program, long ones are cut where rows are few."""
    block = min(2_048, max(16, triton.next_power_of_2(width)))
    rows = max(1, 1_024 // block)
    blocks = max(1, triton.cdiv(width, block))
    parts = 1
    if width > _LONG and channels < _PROGRAMS // 2:
        parts = min(blocks, _PROGRAMS // max(1, channels))
    span = triton.cdiv(blocks, parts) * block
    return Plan(rows, block, max(1, triton.cdiv(width, span)), span)


# ---- kernels ----


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
def _forward_kernel(x, out, scale, lo, hi, shift, C, K, span, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1).to(tl.int64) * span
    _quantize_tile(x, out, scale, lo, hi, shift, row, row < C, K, start, span, BLOCK)


@triton.jit(do_not_specialize=["C"])
def _backward_kernel(
    grad, x, out, to_scale, to_lo, to_hi, scale, lo, hi, shift, C, K, span, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    start = part.to(tl.int64) * span
    a, b, c = _backward_tile(grad, x, out, scale, lo, hi, shift, row, row < C, K, start, span, ROWS, BLOCK)
    at = row * tl.num_programs(1) + part
    tl.store(to_scale + at, a, mask=row < C)
    tl.store(to_lo + at, b, mask=row < C)
    tl.store(to_hi + at, c, mask=row < C)


@triton.jit
def _add_parts_kernel(parts_scale, parts_lo, parts_hi, to_scale, to_lo, to_hi, parts, PADDED: tl.constexpr):
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
def _many_forward_kernel(table, layers, DTYPE: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    column, row = _column_and_row(table, layers, LAYERS)
    if tl.load(column + 2 * layers) != 0:
        _forward_row(table, column, layers, row, DTYPE, BLOCK, True)
    else:
        _forward_row(table, column, layers, row, DTYPE, BLOCK, False)


@triton.jit(do_not_specialize=["layers"])
def _many_backward_kernel(table, layers, DTYPE: tl.constexpr, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    column, row = _column_and_row(table, layers, LAYERS)
    if tl.load(column + 2 * layers) != 0:
        _backward_row(table, column, layers, row, DTYPE, BLOCK, True)
    else:
        _backward_row(table, column, layers, row, DTYPE, BLOCK, False)


# ---- host ----


def _fits(x: Tensor, vectors: tuple[Tensor, ...], grad: Tensor | None = None) -> bool:
    """Whether the kernels may touch these; the reference answers, or complains, for all others."""
    return (
        x.dim() == 2
        and x.dtype in DTYPES
        and (x.is_cuda or INTERPRETED.value)
        and all(v.dtype == torch.float32 and v.device == x.device and v.shape == x.shape[:1] for v in vectors)
        and (grad is None or (grad.dtype == x.dtype and grad.device == x.device and grad.shape == x.shape))
    )


def forward(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """`fake_quantize` of (C, K) on a GPU; see the module's docstring."""
    if not _fits(x, (scale, lo, hi, shift)):
        return reference(x, scale, lo, hi, shift)
    x = x.contiguous()
    grid = [v.contiguous() for v in (scale, lo, hi, shift)]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, width = x.shape
    if x.numel():
        p = plan(channels, width)
        with torch.cuda.device_of(x):
            _forward_kernel[(triton.cdiv(channels, p.rows), p.parts)](
                x, out, *grid, channels, width, p.span, ROWS=p.rows, BLOCK=p.block, num_warps=p.warps
            )
    return out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (C, K) and of scale, lo, hi (C,) on a GPU; see the module's docstring."""
    if not _fits(x, (scale, lo, hi, shift), grad):
        return reference_backward(grad, x, scale, lo, hi, shift)
    grad, x = grad.contiguous(), x.contiguous()
    grid = [v.contiguous() for v in (scale, lo, hi, shift)]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, width = x.shape
    sums = [scale.new_empty(channels) for _ in range(3)]
    if channels:
        p = plan(channels, width)
        parts = sums if p.parts == 1 else list(scale.new_empty(3, channels, p.parts).unbind())
        with torch.cuda.device_of(x):
            _backward_kernel[(triton.cdiv(channels, p.rows), p.parts)](
                grad, x, out, *parts, *grid, channels, width, p.span, ROWS=p.rows, BLOCK=p.block, num_warps=p.warps
            )
            if p.parts > 1:
                _add_parts_kernel[(channels,)](*parts, *sums, p.parts, PADDED=triton.next_power_of_2(p.parts))
    return out, sums[0], sums[1], sums[2]


def _together(x: list[Tensor], vectors: tuple[list[Tensor], ...], grad: list[Tensor] | None) -> dict:
    """Which layers share a launch: indices by device and dtype. Long cut rows and what the kernels refuse go alone."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(x):
        if t.is_cuda and torch.cuda.is_current_stream_capturing():
            continue  # a replayed graph would read the table from host memory that is long reused; launches cost nothing
        if _fits(t, tuple(v[i] for v in vectors), grad and grad[i]) and t.numel() and plan(*t.shape).parts == 1:
            groups.setdefault((t.device, t.dtype), []).append(i)
    return groups


def _launch_many(kernel: triton.JITFunction, layers: list[list[Tensor]]) -> None:
    """One program a row of all layers; a layer is its tensors in the order of the table's lines, from `scale` on."""
    x = [one[4] for one in layers]
    first = [0, *itertools.accumulate(len(t) for t in x)]
    aligned = [int(all(t.data_ptr() % 16 == 0 for t in one[4:7]) and one[4].shape[1] % 16 == 0) for one in layers]
    addresses = [[t.data_ptr() for t in line] for line in zip(*layers, strict=True)]
    lines = [first[:-1], [t.shape[1] for t in x], aligned, *addresses]
    table = torch.tensor(lines, dtype=torch.int64, pin_memory=x[0].is_cuda).to(x[0].device, non_blocking=True)
    with torch.cuda.device_of(table):
        kernel[(first[-1],)](
            table,
            len(layers),
            DTYPE=DTYPES[x[0].dtype],
            LAYERS=max(32, triton.next_power_of_2(len(layers))),
            BLOCK=MANY_BLOCK,
            num_warps=MANY_BLOCK // _PER_WARP,
        )


def forward_many(
    x: list[Tensor], scale: list[Tensor], lo: list[Tensor], hi: list[Tensor], shift: list[Tensor]
) -> list[Tensor]:
    """`fake_quantize` of several (C_i, K_i), in one launch for each dtype among them."""
    done: dict[int, Tensor] = {}
    for members in _together(x, (scale, lo, hi, shift), None).values():
        layers = []
        for i in members:
            done[i] = torch.empty_like(x[i], memory_format=torch.contiguous_format)
            layers.append([*(t[i].contiguous() for t in (scale, lo, hi, shift, x)), done[i]])
        _launch_many(_many_forward_kernel, layers)
    every = enumerate(zip(x, scale, lo, hi, shift, strict=True))
    return [done[i] if i in done else forward(*one) for i, one in every]


def backward_many(
    grad: list[Tensor],
    x: list[Tensor],
    scale: list[Tensor],
    lo: list[Tensor],
    hi: list[Tensor],
    shift: list[Tensor],
) -> list[Tensor]:
    """Gradients of all x, then of all scale, lo and hi, in one launch for each dtype among them."""
    done: dict[int, tuple[Tensor, ...]] = {}
    for members in _together(x, (scale, lo, hi, shift), grad).values():
        layers = []
        for i in members:
            out = torch.empty_like(x[i], memory_format=torch.contiguous_format)
            done[i] = (out, *(scale[i].new_empty(len(out)) for _ in range(3)))
            inputs = [t[i].contiguous() for t in (scale, lo, hi, shift, x)]
            layers.append([*inputs, out, grad[i].contiguous(), *done[i][1:]])
        _launch_many(_many_backward_kernel, layers)
    every = enumerate(zip(grad, x, scale, lo, hi, shift, strict=True))
    results = [done[i] if i in done else backward(*one) for i, one in every]
    return [t for kind in zip(*results, strict=True) for t in kind]


IMPLEMENTATIONS = {
    "fake_quantize": forward,
    "fake_quantize_backward": backward,
    "fake_quantize_many": forward_many,
    "fake_quantize_many_backward": backward_many,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CUDA")
