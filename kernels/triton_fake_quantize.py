"""`fake_quantize` and its backward on a GPU, for one tensor and for all layers of a network in one launch.

The meaning is that of fake_quantize.py; here is how it falls to programs, each walking over whole tiles of rows:

    x, grad, q, grad_x      (C, K)  float32, bfloat16 or float16, computed in float32
    scale, lo, hi, shift    (C,)    float32

Floor in float32: 8 bytes an element forward (read x, write q), 12 backward (read grad and x, write grad_x); half of it
in 16 bits. One pass reaches it: nothing is saved but the inputs, and a row with hi <= lo reads no element at all.
Division and rounding are IEEE, so that values equal the reference's bit for bit.

Each row sum has one writer and an order that no race decides: the same bits in every run. Few and long rows (a whole
tensor as one row) are cut into parts, by their shape alone; a second launch adds up the sums of the parts in order.

The size term is not among their sums: sgsc/size.py says why.

What the kernels do not take (float64 above all) goes to the reference. Importing needs triton but no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import triton_fake_quantize_kernels
from .fake_quantize import Grid, reference, reference_backward
from .op import LIBRARY
from .triton_compat import INTERPRETED
from .triton_configuration import ceil_div

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MANY_BLOCK = 1_024  # columns at once where layers share a launch, a row a program
PER_WARP = 256  # elements a warp holds: 8 a thread, so two 128-bit loads of each float32 operand are in flight
_LONG = 16_384  # columns that one program may walk over before cutting the row is worth a second launch
_PROGRAMS = 1_024  # that fill a large GPU: 8 programs of 8 warps on each of 132 multiprocessors

_kernels: Any = triton_fake_quantize_kernels  # type checkers take a launch for a call of the Python function


class Plan(NamedTuple):
    """How (C, K) elements fall to programs; a function of the shape alone.

    Attributes:
        rows: Rows that a program takes at once, a power of two.
        block: Columns that it takes at once, a power of two.
        parts: Programs that share a row.
        span: Columns of each part, a multiple of `block`.
    """

    rows: int
    block: int
    parts: int
    span: int

    @property
    def warps(self) -> int:
        """Warps of a program."""
        return max(1, self.rows * self.block // PER_WARP)


def plan(channels: int, width: int) -> Plan:
    """Tiles of 1,024 or 2,048 elements: short rows share a program, long ones are cut where there are few."""
    block = min(2_048, max(16, _power_of_two(width)))
    blocks = max(1, ceil_div(width, block))
    parts = 1
    if width > _LONG and channels < _PROGRAMS // 2:
        parts = min(blocks, _PROGRAMS // max(1, channels))
    span = ceil_div(blocks, parts) * block
    return Plan(max(1, 1_024 // block), block, max(1, ceil_div(width, span)), span)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _fits(x: Tensor, grid: Grid, grad: Tensor | None = None) -> bool:
    """Whether the kernels may touch these; the reference answers, or complains, for all others."""
    return (
        x.dim() == 2
        and x.dtype in DTYPES
        and (x.is_cuda or INTERPRETED.value)
        and all(v.dtype == torch.float32 and v.device == x.device and v.shape == x.shape[:1] for v in grid)
        and (grad is None or (grad.dtype == x.dtype and grad.device == x.device and grad.shape == x.shape))
    )


def forward(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """`fake_quantize` on a GPU: (C, K) and four (C,) to (C, K)."""
    if not _fits(x, (scale, lo, hi, shift)):
        return reference(x, scale, lo, hi, shift)
    x = x.contiguous()
    grid = [v.contiguous() for v in (scale, lo, hi, shift)]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, width = x.shape
    if x.numel():
        p = plan(channels, width)
        with torch.cuda.device_of(x):
            _kernels.forward_kernel[ceil_div(channels, p.rows), p.parts](
                x, out, *grid, channels, width, p.span, ROWS=p.rows, BLOCK=p.block, num_warps=p.warps
            )
    return out


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (C, K) and of scale, lo, hi (C,) on a GPU."""
    if not _fits(x, (scale, lo, hi, shift), grad):
        return reference_backward(grad, x, scale, lo, hi, shift)
    grad, x = grad.contiguous(), x.contiguous()
    grid = [v.contiguous() for v in (scale, lo, hi, shift)]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, width = x.shape
    sums = [scale.new_empty(channels) for _ in range(3)]
    if channels:
        p = plan(channels, width)
        parts = sums if p.parts == 1 else [scale.new_empty(channels, p.parts) for _ in range(3)]
        with torch.cuda.device_of(x):
            _kernels.backward_kernel[ceil_div(channels, p.rows), p.parts](
                grad, x, out, *parts, *grid, channels, width, p.span, ROWS=p.rows, BLOCK=p.block, num_warps=p.warps
            )
            if p.parts > 1:
                _kernels.add_parts_kernel[(channels,)](*parts, *sums, p.parts, PADDED=_power_of_two(p.parts))
    return out, sums[0], sums[1], sums[2]


# ---- many tensors ----


def _together(x: Sequence[Tensor], grids: Sequence[Grid], grads: Sequence[Tensor | None]) -> list[list[int]]:
    """Which layers share a launch, by index: those of a device and dtype, but for rows that are cut into parts."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, (t, grid, grad) in enumerate(zip(x, grids, grads, strict=True)):
        # A graph replayed later would read the table from host memory that has other uses by then; and in a graph
        # a launch a layer costs little.
        captured = t.is_cuda and torch.cuda.is_current_stream_capturing()
        if not captured and _fits(t, grid, grad) and t.numel() and plan(*t.shape).parts == 1:
            groups.setdefault((t.device, t.dtype), []).append(i)
    return list(groups.values())


def _launch(kernel: Any, layers: list[list[Tensor]]) -> None:
    """Run all rows of all layers; a layer lists its tensors as the lines of the table, from scale on, do."""
    x = [layer[4] for layer in layers]
    first = [0, *itertools.accumulate(len(t) for t in x)]
    widths = [t.shape[1] for t in x]
    addresses = [[t.data_ptr() for t in line] for line in zip(*layers, strict=True)]
    wide = [all(n % 16 == 0 for n in each) for each in zip(widths, *addresses[4:7], strict=True)]  # x, out, grad
    table = torch.tensor([first[:-1], widths, wide, *addresses], dtype=torch.int64, pin_memory=x[0].is_cuda)
    table = table.to(x[0].device, non_blocking=True)
    with torch.cuda.device_of(table):
        kernel[(first[-1],)](
            table,
            len(layers),
            DTYPE=DTYPES[x[0].dtype],
            LAYERS=max(32, _power_of_two(len(layers))),
            BLOCK=MANY_BLOCK,
            num_warps=MANY_BLOCK // PER_WARP,
        )


def forward_many(
    x: list[Tensor], scale: list[Tensor], lo: list[Tensor], hi: list[Tensor], shift: list[Tensor]
) -> list[Tensor]:
    """`fake_quantize` of several (C_i, K_i), one launch for each dtype among them."""
    grids = list(zip(scale, lo, hi, shift, strict=True))
    done: dict[int, Tensor] = {}
    for members in _together(x, grids, [None] * len(x)):
        layers = []
        for i in members:
            done[i] = torch.empty_like(x[i], memory_format=torch.contiguous_format)
            layers.append([*(t.contiguous() for t in (*grids[i], x[i])), done[i]])
        _launch(_kernels.many_forward_kernel, layers)
    return [done[i] if i in done else forward(t, *grids[i]) for i, t in enumerate(x)]


def backward_many(
    grad: list[Tensor],
    x: list[Tensor],
    scale: list[Tensor],
    lo: list[Tensor],
    hi: list[Tensor],
    shift: list[Tensor],
) -> list[Tensor]:
    """Gradients of all x, then of all scale, lo and hi; one launch for each dtype among them."""
    grids = list(zip(scale, lo, hi, shift, strict=True))
    done: dict[int, tuple[Tensor, ...]] = {}
    for members in _together(x, grids, grad):
        layers = []
        for i in members:
            out = torch.empty_like(x[i], memory_format=torch.contiguous_format)
            done[i] = (out, *(scale[i].new_empty(len(out)) for _ in range(3)))
            layers.append([*(t.contiguous() for t in (*grids[i], x[i])), out, grad[i].contiguous(), *done[i][1:]])
        _launch(_kernels.many_backward_kernel, layers)
    each = [done[i] if i in done else backward(grad[i], t, *grids[i]) for i, t in enumerate(x)]
    return [t for kind in zip(*each, strict=True) for t in kind]


IMPLEMENTATIONS = {
    "fake_quantize": forward,
    "fake_quantize_backward": backward,
    "fake_quantize_many": forward_many,
    "fake_quantize_many_backward": backward_many,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CUDA")
