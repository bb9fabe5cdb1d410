"""`packed_linear` and `packed_conv2d` on a GPU, from the words of fragments.py: any mix of widths in one launch.

    few columns     (tokens, or pixels; up to DENSE) _product: a program unpacks a tile's words once, for all of
                    its columns, straight into the operand of the tensor cores. Each part of K is a program too where
                    tiles alone would not fill the GPU; the order of their sums is fixed. Of a grouped convolution a
                    tile reads the channels of its own group. `linear` starts beside the kernel before, where the GPU
                    can (triton_early.py)
    depthwise       (fewer than four channels a group; any number of pixels) _depthwise slides over x
    many columns    the weights once to a dense matrix of x's dtype, then torch's own product or convolution:
                    unpacking costs one pass over the matrix, which many columns outweigh, and nothing is faster than
                    cuBLAS there
    many, int8      levels and codes as int8, a product on the integer tensor cores

Floor, few columns: the bytes of the words, bits / 8 a weight. Float32 x is cut into three bfloat16 parts whose products
are exact, so that sums have float32's error at three times the operations; of many columns torch decides, as for its
own layers (`allow_tf32`). int8 numerics bound the error, they ask for no rounding: up to DENSE columns, where bytes
bind and not operations, x stays as it is, and what is not finite gives what it does in exact numerics. An input_grid
is applied first, by fake_quantize, and then the product is the exact one, in either numerics.

Workspaces (sums in parts, dense weights, codes) are plain tensors. torch's allocator is the cache: a call after the
first gets the same blocks in a microsecond, without a wait for the GPU; the memory is a stream's own until its work is
done, others may have it between two layers, and a capture takes it from its graph's pool. A buffer of ours would be
none of that, and would stay at the size of the largest layer. Only counters are kept (triton_counters.py), for their
zeros.

What the kernels do not take (float64) goes to the reference; depthwise layers of more than MOST levels a row take the
dense route. Importing needs triton but no GPU.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from . import (
    fragments,
    triton_counters,
    triton_dense_kernels,
    triton_depthwise_kernels,
    triton_early,
    triton_launch,
    triton_packed_kernels,
    triton_tables,
)
from .fake_quantize import OP as FAKE_QUANTIZE
from .input_grid import check_grid, on_grid
from .op import LIBRARY
from .packed_conv2d import check as check_conv2d
from .packed_conv2d import output_size, slides
from .packed_conv2d import reference as conv2d_reference
from .packed_linear import WIDEST
from .packed_linear import check as check_linear
from .packed_linear import reference as linear_reference
from .triton_compat import INTERPRETED
from .triton_configuration import Config, Gpu, ceil_div, configure, gpu, sliding
from .triton_packed_kernels import Geometry

# Weights of x's dtype hold every level exactly; float32 has no tensor cores of its own precision.
LEVELS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.bfloat16}
DENSE = 256  # columns from which a dense copy of the weights pays; of an H100 in bitsandbytes' and Marlin's tables
EARLY = 64  # columns of a program up to which `linear` starts beside the kernel before, where the GPU can; 0: never
DENSE_PIXELS = 4_096  # the same for a convolution, where a program gathers x too
LARGE = 2**31 - 1_024  # values of x, and output pixels, from which 32 bits do not hold where they are

_products: Any = triton_packed_kernels  # type checkers take a launch for a call of the Python function
_passes: Any = triton_dense_kernels
_slides: Any = triton_depthwise_kernels


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
        return self.grid.shape[0] == 2  # len() of a tensor is Python


def _tiles(lines: Tensor, plan: Tensor, grid: Tensor, rows: int) -> _Tiles:
    count, size = fragments.tiles_of(plan, grid.shape[1])
    return _Tiles(lines, plan, grid, rows, size, count)


def _whole(plan: Tensor, places: int) -> bool:
    count, size = fragments.tiles_of(plan, places)
    return size in (fragments.UNIT, 4 * fragments.UNIT) and (plan.numel(), places) == (count * (2 + size), count * size)


def _fits(x: Tensor, lines: Tensor, plan: Tensor, grid: Tensor, bias: Tensor | None, rows: int) -> bool:
    """Whether the kernels may touch these; the reference answers, or complains, for all others."""
    return (
        x.dtype in LEVELS
        and lines.dtype == torch.int32
        and (x.is_cuda or INTERPRETED.value)
        and gpu(x.device.index).capability not in range(1, 80)  # bfloat16 in the tensor cores
        and lines.get_device() == plan.get_device() == grid.get_device() == x.get_device()
        and lines.is_contiguous()
        and plan.is_contiguous()
        and grid.is_contiguous()
        and grid.dim() == 2
        and _whole(plan, grid.shape[1])
        and (bias is None or (bias.shape == (rows,) and bias.device == x.device))
    )


def starts_early(config: Config, here: Gpu) -> bool:
    """Whether `linear` is launched as triton_early.py says."""
    return config.columns <= EARLY and here.capability >= triton_early.FROM and not INTERPRETED.value


def _product(
    x: Tensor, t: _Tiles, bias: Tensor | None, y: Tensor, columns: int, width: int, across: int, g: Geometry | None
) -> Tensor:
    """Fill y, (columns, rows) or images of (rows, area)."""
    if not columns or not t.count:
        return y
    with torch.cuda.device_of(x):
        here = gpu(x.device.index)
        lies = "tokens" if g is None else "runs" if g.in_runs() and x.data_ptr() % 16 == 0 else "pixels"
        groups = 1 if g is None else t.rows // g.rows
        c = triton_tables.tuned(x, t.words, lies, columns, t.count, t.size, across, groups)
        c = c or configure(x.dtype, columns, t.count, t.size, across, here, lies)
        many = ceil_div(columns, c.columns)
        early = g is None and starts_early(c, here)
        partial, counters = t.grid, t.plan  # not looked at where one part is all
        if c.parts > 1:
            partial = x.new_empty(many * t.count * c.parts * t.size * c.columns, dtype=torch.float32)
            counters = triton_counters.zeros(t.plan, many * t.count)
        per = ceil_div(ceil_div(across, c.blocks), c.parts) * c.blocks
        tensors = x, t.words, t.plan, t.grid, t.grid if bias is None else bias, y, partial, counters
        on = t.count * c.parts, many, 1
        key = x.device.index, _types(x, t, bias), lies, c, t.size, t.shifted
        if g is None:
            numbers = columns, t.rows, width, t.count, across, c.parts, per, t.words.numel() // fragments.WORDS
            key = *key, early, width % 16 == 0, width == 1
        else:
            numbers = columns, t.rows, t.count, across, c.parts, per, g.out_height * g.out_width, *g
        if not triton_launch.again(key, on, tensors, numbers):
            constants = {"DTYPE": LEVELS[x.dtype], "ROWS": t.size, "COLUMNS": c.columns, "BLOCKS": c.blocks}
            constants |= {"ORDER": c.order} | ({} if g is None else {"X": lies})
            constants |= {"SHIFTED": t.shifted, "BIASED": bias is not None} | ({"EARLY": early} if g is None else {})
            options = {"num_warps": c.warps, "num_stages": c.stages} | ({"launch_pdl": True} if early else {})
            kernel = _products.linear_kernel if g is None else _products.conv2d_kernel
            triton_launch.first(key, kernel, on, tensors, numbers, constants, options)
    return y


def _types(x: Tensor, t: _Tiles, bias: Tensor | None) -> tuple:
    return x.dtype, t.plan.dtype, t.grid.dtype, bias is not None and bias.dtype


def _depthwise(x: Tensor, t: _Tiles, bias: Tensor | None, y: Tensor, columns: int, g: Geometry) -> Tensor:
    """Fill y, images of (rows, area), where fewer than four channels make a group."""
    if not columns or not t.count:
        return y
    with torch.cuda.device_of(x):
        places = t.count * t.size
        c = sliding(columns, places, g.kernel_width, gpu(x.device.index))
        on = places // c.each * ceil_div(columns, c.columns), 1, 1
        tensors = x, t.words, t.plan, t.grid, t.grid if bias is None else bias, y
        numbers = columns, t.rows, t.count, *g
        key = x.device.index, _types(x, t, bias), "alone", c, t.size, t.shifted, g.dilation_across
        if not triton_launch.again(key, on, tensors, numbers):
            constants = {"ROWS": t.size, "COLUMNS": c.columns, "EACH": c.each, "ACROSS": c.across}
            constants |= {"DILATION": g.dilation_across, "SHIFTED": t.shifted, "BIASED": bias is not None}
            options = {"num_warps": c.warps}
            triton_launch.first(key, _slides.depthwise_kernel, on, tensors, numbers, constants, options)
    return y


def dense(
    t: _Tiles, channels: int, taps: int, like: Tensor, dtype: torch.dtype | None = None, *, last: bool = True
) -> Tensor:
    """The weights, (C, taps * channels), the channels of each tap together; with `dtype` int8 the centred levels.

    Unless `last`, the taps of each channel are together.

    Rows are padded with zeros to a multiple of 16 elements in int8, as the product wants it.
    """
    levels = dtype == torch.int8
    width = channels * taps
    across = fragments.blocks_of(width, taps)
    shape = (ceil_div(t.rows, 8) * 8, ceil_div(width, 16) * 16) if levels else (t.rows, width)
    out = like.new_zeros(shape, dtype=dtype) if levels else like.new_empty(shape)
    if t.count and across:
        with torch.cuda.device_of(like):
            _passes.weight_kernel[t.count, across](
                t.words, t.plan, t.grid, out, t.count, across, channels, fragments.channels_of(width, taps), taps,
                out.shape[1], DTYPE=LEVELS.get(out.dtype, tl.float16), ROWS=t.size, SHIFTED=t.shifted,
                LEVELS=levels, LAST=last, num_warps=1 if t.size == fragments.UNIT else 4,
            )  # fmt: skip
    return out


def _keep_removed(y: Tensor, t: _Tiles, bias: Tensor | None, columns: int, area: int) -> Tensor:
    """Give removed rows their bias alone: in a dense product 0 times infinity is not 0."""
    if not y.numel():
        return y
    with torch.cuda.device_of(y):
        _passes.removed_kernel[ceil_div(columns, 128), t.count](
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
        _passes.settle_kernel[ceil_div(tokens, 64), t.count](
            sums, step, total, t.plan, t.grid, y if bias is None else bias, y, tokens, t.rows, sums.shape[1], t.count,
            ROWS=t.size, COLUMNS=64, SHIFTED=t.shifted, BIASED=bias is not None,
        )  # fmt: skip
    return y


def linear(
    x: Tensor,
    lines: Tensor,
    plan: Tensor,
    grid: Tensor,
    bias: Tensor | None,
    rows: int,
    width: int,
    int8: bool,
    input_grid: Tensor | None = None,
) -> Tensor:
    """`packed_linear` on a GPU."""
    if not _fits(x, lines, plan, grid, bias, rows):
        return linear_reference(x, lines, plan, grid, bias, rows, width, int8, input_grid)
    check_linear(x, width)
    if input_grid is not None:
        check_grid("packed_linear", input_grid, rows)
        x, int8 = on_grid(x, input_grid, FAKE_QUANTIZE), False
    bias = None if bias is None else bias.contiguous()
    t, x = _tiles(lines, plan, grid, rows), x.contiguous()
    *outer, _ = x.shape
    tokens = prod(outer)
    if tokens <= DENSE or not rows:
        return _product(x, t, bias, x.new_empty(*outer, rows), tokens, width, fragments.blocks_of(width), None)
    flat = x.reshape(tokens, width)
    if int8 and 0 < width <= WIDEST:
        return _integer(flat, t, bias, x.new_empty(*outer, rows))
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(flat, dense(t, width, 1, x), bias).view(*outer, rows)
    return _keep_removed(y, t, bias, tokens, 1)


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
    input_grid: Tensor | None = None,
) -> Tensor:
    """`packed_conv2d` on a GPU; in int8 numerics too x stays as it is, which their bound allows."""
    geometry = (kernel, stride, padding, dilation, groups)
    if not _fits(x, lines, plan, grid, bias, rows):
        return conv2d_reference(x, lines, plan, grid, bias, rows, *geometry, int8, input_grid)
    check_conv2d(x, rows, *geometry)
    if input_grid is not None:
        check_grid("packed_conv2d", input_grid, rows)
        x = on_grid(x, input_grid, FAKE_QUANTIZE)
    bias = None if bias is None else bias.contiguous()
    t, taps, inputs = _tiles(lines, plan, grid, rows), prod(kernel), x.shape[1] // groups
    height, width = (output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    pixels, alone = len(x) * height * width, slides(x.shape[1], groups)
    direct = inputs * taps <= triton_depthwise_kernels.MOST if alone else pixels <= DENSE_PIXELS
    if direct and max(x.numel(), pixels) < LARGE:
        # one pass over x where it saves reading each value by itself, once a tap
        runs = inputs % 16 == 0 and not alone
        x = x.contiguous(memory_format=torch.channels_last if runs else torch.contiguous_format)
        places = *x.shape[2:], height, width
        how = kernel[1], *stride, *padding, *dilation
        by = (0 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True))  # of one there is no next
        padded = fragments.channels_of(inputs * taps, taps)
        g = Geometry._make((inputs, padded, taps, *places, *how, *by, rows // groups))
        y = x.new_empty(len(x), rows, height, width)
        if alone:
            return _depthwise(x, t, bias, y, pixels, g)
        return _product(x, t, bias, y, pixels, inputs * taps, fragments.blocks_of(inputs * taps, taps), g)
    if alone:
        weight = dense(t, inputs * taps, 1, x).view(rows, inputs, *kernel)
    elif x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        weight = dense(t, inputs, taps, x, last=False).view(rows, inputs, *kernel)
    else:  # as x lies: torch brings both into the layout that either has, and x is the larger
        weight = dense(t, inputs, taps, x).view(rows, *kernel, inputs).permute(0, 3, 1, 2)
    with torch.autocast(x.device.type, enabled=False):
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups).contiguous()
    return _keep_removed(y, t, bias, pixels, height * width)


IMPLEMENTATIONS = {"packed_linear": linear, "packed_conv2d": convolution}
for _name, _implementation in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CUDA")
