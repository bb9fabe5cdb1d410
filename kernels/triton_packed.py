"""`packed_linear` and `packed_conv2d` on a GPU, from the words of fragments.py: any mix of widths in one launch.

    few columns     (tokens, or pixels; up to DENSE) _product: a program unpacks a tile's words once, for all of
                    its columns, straight into the operand of the tensor cores. Each part of K is a program too where
                    tiles alone would not fill the GPU; the order of their sums is fixed
    many columns    the weights once to a dense matrix of x's dtype, then torch's own product or convolution: unpacking
                    costs one pass over the matrix, which many columns outweigh, and nothing is faster than cuBLAS there
    many, int8      levels and codes as int8, a product on the integer tensor cores

Floor, few columns: the bytes of the words, bits / 8 a weight. Float32 x is cut into three bfloat16 parts whose products
are exact, so that sums have float32's error at three times the operations. int8 numerics bound the error, they ask for
no rounding: up to DENSE columns, where bytes bind and not operations, x stays as it is.

What the kernels do not take (grouped convolutions, float64) goes to the reference. Importing needs triton but no GPU.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import fragments, triton_dense_kernels, triton_packed_kernels, triton_tables
from .op import LIBRARY
from .packed_conv2d import check as check_conv2d
from .packed_conv2d import output_size, slides
from .packed_conv2d import reference as conv2d_reference
from .packed_linear import WIDEST
from .packed_linear import check as check_linear
from .packed_linear import reference as linear_reference
from .triton_compat import INTERPRETED
from .triton_configuration import configure, gpu

# Weights of x's dtype hold every level exactly; float32 has no tensor cores of its own precision.
LEVELS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.bfloat16}
DENSE = 256  # columns from which a dense copy of the weights pays; of an H100 in bitsandbytes' and Marlin's tables
DENSE_PIXELS = 4_096  # the same for a convolution, where a program gathers x too

_products: Any = triton_packed_kernels  # type checkers take a launch for a call of the Python function
_passes: Any = triton_dense_kernels


class Geometry(NamedTuple):
    """A convolution as the kernels read it; strides of x in elements, `padded` channels as fragments.py lays them."""

    channels: int
    padded: int
    taps: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_width: int
    stride_down: int
    stride_across: int
    padding_down: int
    padding_across: int
    dilation_down: int
    dilation_across: int
    by_image: int
    by_channel: int
    by_row: int
    by_column: int

    def in_runs(self) -> bool:
        """Whether 16 channels of x are neighbours, and 16 bytes of them (8 elements and more) are aligned."""
        apart = (self.by_image, self.by_row, self.by_column)
        return self.by_channel == 1 and self.channels == self.padded and all(n % 8 == 0 for n in apart)


_counters: dict[tuple, Tensor] = {}


def _zeros(device: torch.device, count: int) -> Tensor:
    """`count` counters at 0, which every product leaves at 0 again; those of a stream serve one product at a time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)  # a graph has its own: it may run beside others
    key = device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _counters[key]


class _Tiles(NamedTuple):
    """The run form with what its shapes tell."""

    words: Tensor
    plan: Tensor
    grid: Tensor
    rows: int
    size: int
    count: int

    @property
    def shifted(self) -> bool:
        return len(self.grid) == 2


def _tiles(lines: Tensor, plan: Tensor, grid: Tensor, rows: int) -> _Tiles:
    size = fragments.tile_size(rows)
    return _Tiles(lines, plan, grid, rows, size, grid.shape[1] // size)


def _fits(x: Tensor, lines: Tensor, grid: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype in LEVELS
        and lines.dtype == torch.int32
        and (x.is_cuda or INTERPRETED.value)
        and lines.device == grid.device == x.device
        and (bias is None or bias.device == x.device)
    )


def _product(
    x: Tensor, t: _Tiles, bias: Tensor | None, y: Tensor, columns: int, width: int, across: int, g: Geometry | None
) -> Tensor:
    """Fill y, (columns, rows) or images of (rows, area)."""
    if not columns or not t.count:
        return y
    c = triton_tables.tuned(x, t.words, g is not None, columns, t.count, t.size, across)
    how_x_lies = "tokens" if g is None else "runs" if g.in_runs() and x.data_ptr() % 16 == 0 else "pixels"
    c = c or configure(x.dtype, columns, t.count, t.size, across, gpu(x.device.index), how_x_lies)
    groups = -(-columns // c.columns)
    partial = counters = y
    if c.parts > 1:
        partial = x.new_empty(groups * t.count * c.parts * t.size * c.columns, dtype=torch.float32)
        counters = _zeros(x.device, groups * t.count)
    steps = -(-across // c.blocks)
    per = -(-steps // c.parts) * c.blocks
    kernel, how, where = _products.linear_kernel, (width, t.count, across, c.parts, per), {}
    if g is not None:
        kernel, how = _products.conv2d_kernel, (t.count, across, c.parts, per, g.out_height * g.out_width, g)
        where = {"X": how_x_lies}
    with torch.cuda.device_of(x):
        kernel[t.count * c.parts, groups](
            x, t.words, t.plan, t.grid, t.grid if bias is None else bias, y, partial, counters, columns, t.rows, *how,
            DTYPE=LEVELS[x.dtype], ROWS=t.size, COLUMNS=c.columns, BLOCKS=c.blocks, ORDER=c.order, SHIFTED=t.shifted,
            BIASED=bias is not None, num_warps=c.warps, num_stages=c.stages, **where,
        )  # fmt: skip
    return y


def dense(t: _Tiles, channels: int, taps: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weights, (C, taps * channels), the channels of each tap together; with `dtype` int8 the centred levels.

    Rows are padded with zeros to a multiple of 16 elements in int8, as the product wants it.
    """
    levels = dtype == torch.int8
    width = channels * taps
    across = fragments.blocks_of(width, taps)
    shape = (-(-t.rows // 8) * 8, -(-width // 16) * 16) if levels else (t.rows, width)
    out = like.new_zeros(shape, dtype=dtype) if levels else like.new_empty(shape)
    if t.count and across:
        with torch.cuda.device_of(like):
            _passes.weight_kernel[t.count, across](
                t.words, t.plan, t.grid, out, t.count, across, channels, fragments.channels_of(width, taps), taps,
                out.shape[1], DTYPE=LEVELS.get(out.dtype, tl.float16), ROWS=t.size, BLOCKS=1, SHIFTED=t.shifted,
                LEVELS=levels, num_warps=1 if t.size == fragments.UNIT else 4,
            )  # fmt: skip
    return out


def _keep_removed(y: Tensor, t: _Tiles, bias: Tensor | None, columns: int, area: int) -> Tensor:
    """Give removed rows their bias alone: in a dense product 0 times infinity is not 0."""
    if not y.numel():
        return y
    with torch.cuda.device_of(y):
        _passes.removed_kernel[t.count, -(-columns // 128)](
            t.plan, y if bias is None else bias, y, columns, t.rows, t.count, area,
            ROWS=t.size, COLUMNS=128, BIASED=bias is not None,
        )  # fmt: skip
    return y


def _integer(x: Tensor, t: _Tiles, bias: Tensor | None, y: Tensor) -> Tensor:
    """Fill y, (M, C), from x, (M, K), rounded to 8 bits a token."""
    tokens, width = x.shape
    weight = dense(t, width, 1, x, torch.int8)
    stride = weight.shape[1]
    codes = x.new_empty(tokens, stride, dtype=torch.int8)
    step, total = x.new_empty(tokens, dtype=torch.float32), x.new_empty(tokens, dtype=torch.int32)
    with torch.cuda.device_of(x):
        _passes.tokens_kernel[(tokens,)](x, codes, step, total, width, stride, BLOCK=1_024)
        sums = torch._int_mm(codes, weight.t())
        _passes.settle_kernel[t.count, -(-tokens // 64)](
            sums, step, total, t.plan, t.grid, y if bias is None else bias, y, tokens, t.rows, sums.shape[1], t.count,
            ROWS=t.size, COLUMNS=64, SHIFTED=t.shifted, BIASED=bias is not None,
        )  # fmt: skip
    return y


def linear(
    x: Tensor, lines: Tensor, plan: Tensor, grid: Tensor, bias: Tensor | None, rows: int, width: int, int8: bool
) -> Tensor:
    """`packed_linear` on a GPU."""
    if not _fits(x, lines, grid, bias):
        return linear_reference(x, lines, plan, grid, bias, rows, width, int8)
    check_linear(x, width)
    t, flat = _tiles(lines, plan, grid, rows), x.reshape(x.shape[:-1].numel(), width).contiguous()
    tokens = len(flat)
    if tokens <= DENSE:
        y = x.new_empty(*x.shape[:-1], rows)
        return _product(flat, t, bias, y, tokens, width, fragments.blocks_of(width), None)
    if int8 and 0 < width <= WIDEST:
        return _integer(flat, t, bias, x.new_empty(*x.shape[:-1], rows))
    return _keep_removed(F.linear(x, dense(t, width, 1, x), bias), t, bias, tokens, 1)


def convolution(
    x: Tensor,
    lines: Tensor,
    plan: Tensor,
    grid: Tensor,
    bias: Tensor | None,
    rows: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    int8: bool,
) -> Tensor:
    """`packed_conv2d` on a GPU; in int8 numerics too x stays as it is, which their bound allows."""
    if not _fits(x, lines, grid, bias):
        return conv2d_reference(x, lines, plan, grid, bias, rows, kernel, stride, padding, dilation, groups, int8)
    check_conv2d(x, rows, kernel, stride, padding, dilation, groups)
    t, taps, inputs = _tiles(lines, plan, grid, rows), prod(kernel), x.shape[1] // groups
    height, width = (output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    pixels = len(x) * height * width
    if groups == 1 and pixels <= DENSE_PIXELS:
        if inputs % 16 == 0:  # one pass over x; else each of its values would be read by itself, once a tap
            x = x.contiguous(memory_format=torch.channels_last)
        places = *x.shape[2:], height, width
        how = kernel[1], *stride, *padding, *dilation
        g = Geometry._make((inputs, fragments.channels_of(inputs * taps, taps), taps, *places, *how, *x.stride()))
        y = x.new_empty(len(x), rows, height, width)
        across = fragments.blocks_of(inputs * taps, taps)
        return _product(x, t, bias, y, pixels, inputs * taps, across, g)
    if slides(x.shape[1], groups):
        weight = dense(t, inputs * taps, 1, x).view(rows, inputs, *kernel)
    else:
        weight = dense(t, inputs, taps, x).view(rows, *kernel, inputs).permute(0, 3, 1, 2)
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous()
    return _keep_removed(y, t, bias, pixels, height * width)


IMPLEMENTATIONS = {"packed_linear": linear, "packed_conv2d": convolution}
for _name, _implementation in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CUDA")
