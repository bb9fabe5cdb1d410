"""The products of triton_packed.py with few columns.

A program holds the sums of a tile's ROWS rows at COLUMNS columns of x (tokens, or pixels): weights are the first
operand of `tl.dot`, the only one that may stay in registers. Scale, bias and the order of rows wait for the epilogue.
"""

# Triton compiles these functions and gives names another meaning than Python's types do.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .triton_compat import narrow
from .triton_early import start_early
from .triton_unpack import INTERPRETED, SPAN, UNIT, WORDS, load_words, order, weights


class Geometry(NamedTuple):
    """A convolution as the kernels read it; strides of x in elements, `padded` channels as fragments.py lays them.

    `channels` of x and `rows` of y are those of a group. Kernels take the numbers one by one and join them again: of a
    tuple Triton makes a variant for each pattern of ones and multiples of 16, whatever `do_not_specialize` says.
    """

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
    rows: int

    def in_runs(self) -> bool:
        """Whether 16 channels of x are neighbours, and 16 bytes of them (8 elements and more) are aligned."""
        apart = (self.by_image, self.by_row, self.by_column)
        return self.by_channel == 1 and self.channels % 16 == 0 and all(n % 8 == 0 for n in apart)


@triton.jit
def _parts(x):
    """x as three numbers that bfloat16 holds and that add up to it: eight bits of the mantissa each, cut off.

    Cut, since rounding could reach infinity; and an infinity leaves no rest.
    """
    first = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = tl.where(tl.abs(first) == float("inf"), 0.0, x - first)
    second = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return first, second, rest - second


@triton.jit
def _dot(weight, x, sums, DTYPE: tl.constexpr):
    return tl.dot(weight, x.to(tl.float32 if INTERPRETED else DTYPE), sums)


@triton.jit
def _times(weight, x, sums, DTYPE: tl.constexpr):
    """sums + weight x, x of any dtype; products and sums are those of float32."""
    if x.dtype == tl.float32:
        a, b, c = _parts(x)
        return _dot(weight, a, _dot(weight, b, _dot(weight, c, sums, DTYPE), DTYPE), DTYPE)
    else:
        return _dot(weight, x, sums, DTYPE)


@triton.jit
def _x_of_tokens(x, k, column, M, K):
    """(len(k), len(column)) values of x, (M, K); zeros outside."""
    here = (k < K)[:, None] & (column < M)[None, :]
    return tl.load(x + column.to(tl.int64)[None, :] * K + k[:, None], mask=here, other=0.0)


@triton.jit
def _x_of_pixels(x, k, column, M, g, RUN: tl.constexpr):
    """(len(k), len(column)) values of x under the kernel at output pixels, zeros in the padding; g as `Geometry`.

    RUN neighbours of k are neighbouring channels at one place of the kernel, and are read together; 1 promises nothing.
    """
    channel = tl.max_contiguous(tl.multiple_of(k % g.padded, RUN), RUN)
    tap = tl.max_constancy(k // g.padded, RUN)
    across = column % g.out_width
    down = column // g.out_width % g.out_height
    image = column // (g.out_width * g.out_height)
    row = (tap // g.kernel_width * g.dilation_down)[:, None] + (down * g.stride_down - g.padding_down)[None, :]
    beside = (tap % g.kernel_width * g.dilation_across)[:, None]
    beside = beside + (across * g.stride_across - g.padding_across)[None, :]
    here = (tap < g.taps)[:, None] & (column < M)[None, :]
    here = here & (row >= 0) & (row < g.height) & (beside >= 0) & (beside < g.width)
    at = image.to(tl.int64)[None, :] * g.by_image + row * g.by_row + beside * g.by_column
    if RUN > 1:
        at = tl.multiple_of(at, (8, 8)) + channel[:, None]
    else:
        here = here & (channel < g.channels)[:, None]
        at += channel.to(tl.int64)[:, None] * g.by_channel
    return tl.load(x + at, mask=here, other=0.0)


@triton.jit
def _sums(
    x, words, column, row, M, g, begin, end, across,
    BITS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    ORDER: tl.constexpr, X: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Products of blocks `begin` to `end` of a tile of BITS, (ROWS, COLUMNS), and where SHIFTED the sums of x.

    `g` says how x lies: a `Geometry` where X is "pixels" or, the channels last, "runs" of them; K where it is "tokens".
    """
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_x = tl.zeros((COLUMNS,), tl.float32)
    lane = tl.arange(0, 4 * BLOCKS)
    unit = row // UNIT * (across * (BITS * WORDS)) + row % UNIT * 4
    at = words + unit[:, None] + (lane // 4 * (BITS * WORDS) + lane % 4)[None, :]
    for block in range(begin, end, BLOCKS):
        bits = load_words(at + block * (BITS * WORDS), (block + lane // 4 < across)[None, :], BITS)
        k = tl.arange(0, BLOCKS * SPAN) + block * SPAN
        if X == "tokens":
            some = _x_of_tokens(x, k, column, M, g)
        else:
            some = _x_of_pixels(x, k, column, M, g, 1 if X == "pixels" else 16)
        if SHIFTED:
            of_x += tl.sum(some.to(tl.float32), 0)
        some = order(some, BLOCKS * SPAN, COLUMNS, ORDER)
        sums = _times(weights(bits, BITS, DTYPE, ROWS, BLOCKS, ORDER), some, sums, DTYPE)
    return sums, of_x


@triton.jit
def store_tile(y, sums, slot, column, bias, M, N, area, BIASED: tl.constexpr):
    """Sums of a tile, (ROWS, COLUMNS), with the bias of their rows, to y: (M, N), or (images, N, area) of pixels."""
    exists = slot >= 0
    if BIASED:
        sums += tl.load(bias + slot, mask=exists, other=0.0).to(tl.float32)[:, None]
    at = (column // area).to(tl.int64) * N * area + column % area
    here = exists[:, None] & (column < M)[None, :]
    tl.store(y + at[None, :] + slot.to(tl.int64)[:, None] * area, narrow(sums, y.dtype.element_ty), mask=here)


@triton.jit
def _product(
    x, words, plan, grid, bias, y, partial, counters, M, N, tiles, across, parts, per, area, g,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ORDER: tl.constexpr,
    X: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A program: one part of K of one tile, the widest tiles first, at COLUMNS tokens or pixels.

    The parts of a tile, `per` blocks each, leave their sums in `partial`; the last to arrive, by `counters`, zeros
    before and after, adds them up in order.
    """
    tile = tiles - 1 - tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    bits = tl.load(plan + tile)
    words += tl.load(plan + tiles + tile).to(tl.int64) * WORDS
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if X != "tokens":  # on to the channels of the tile's group; the first place of a tile has a row
        group = tl.load(plan + 2 * tiles + tile * ROWS) // g.rows
        x += tl.multiple_of(group * (g.channels * g.by_channel), 1 if X == "pixels" else 16)
    begin = part * per
    end = tl.minimum(begin + per, across)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_x = tl.zeros((COLUMNS,), tl.float32)
    for BITS in tl.static_range(1, 9):
        if bits == BITS:
            sums, of_x = _sums(x, words, column, row, M, g, begin, end, across,
                               BITS, DTYPE, ROWS, COLUMNS, BLOCKS, ORDER, X, SHIFTED)  # fmt: skip
    place = tile * ROWS + row
    if SHIFTED:
        offset = tl.load(grid + tiles * ROWS + place) + (1 << bits >> 1).to(tl.float32)
        sums += offset[:, None] * of_x[None, :]
    last = parts == 1
    if parts > 1:
        sharing = tl.program_id(1) * tiles + tile
        mine = partial + sharing.to(tl.int64) * (parts * ROWS * COLUMNS) + row[:, None] * COLUMNS
        mine += tl.arange(0, COLUMNS)[None, :]
        tl.store(mine + part * (ROWS * COLUMNS), sums)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        last = tl.atomic_add(counters + sharing, 1, sem="acq_rel") == parts - 1
        if last:
            tl.store(counters + sharing, 0)
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in range(parts):
                sums += tl.load(mine + i * (ROWS * COLUMNS), cache_modifier=".cg")
    if last:
        scale = tl.load(grid + place)
        slot = tl.load(plan + 2 * tiles + place)
        store_tile(y, sums * scale[:, None], slot, column, bias, M, N, area, BIASED)


@triton.jit(do_not_specialize=["M", "N", "tiles", "across", "parts", "per", "planes"])
def linear_kernel(
    x, words, plan, grid, bias, y, partial, counters, M, N, K, tiles, across, parts, per, planes,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ORDER: tl.constexpr,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) times the tiles, of `planes`; a column is a token. EARLY as in triton_early.py."""
    if EARLY:
        start_early(words, plan, planes, tiles, tiles - 1 - tl.program_id(0) // parts)
    _product(x, words, plan, grid, bias, y, partial, counters, M, N, tiles, across, parts, per, 1, K,
             DTYPE, ROWS, COLUMNS, BLOCKS, ORDER, "tokens", SHIFTED, BIASED)  # fmt: skip


@triton.jit(do_not_specialize=["M", "N", "tiles", "across", "parts", "per", "area", *Geometry._fields])
def conv2d_kernel(
    x, words, plan, grid, bias, y, partial, counters, M, N, tiles, across, parts, per, area,
    channels, padded, taps, height, width, out_height, out_width, kernel_width, stride_down, stride_across,
    padding_down, padding_across, dilation_down, dilation_across, by_image, by_channel, by_row, by_column, rows,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, ORDER: tl.constexpr,
    X: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """y (images, N, area), M = images * area, of x as a `Geometry` says; a column is an output pixel."""
    g = Geometry(
        channels, padded, taps, height, width, out_height, out_width, kernel_width, stride_down, stride_across,
        padding_down, padding_across, dilation_down, dilation_across, by_image, by_channel, by_row, by_column, rows,
    )  # fmt: skip
    _product(x, words, plan, grid, bias, y, partial, counters, M, N, tiles, across, parts, per, area, g,
             DTYPE, ROWS, COLUMNS, BLOCKS, ORDER, X, SHIFTED, BIASED)  # fmt: skip
