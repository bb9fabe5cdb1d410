"""The passes of triton_packed.py beside a product of torch's own: dense weights, codes of tokens, epilogues."""

# Triton compiles these functions and gives names another meaning than Python's types do.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_compat import narrow, rint
from .triton_packed_kernels import store_tile
from .triton_unpack import SPAN, UNIT, WORDS, load_words, weights


@triton.jit
def _dense(words, row, block, across, BITS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr):
    unit = row // UNIT * (across * (BITS * WORDS)) + row % UNIT * 4
    at = words + unit[:, None] + (block * (BITS * WORDS) + tl.arange(0, 4))[None, :]
    bits = load_words(at, (row >= 0)[:, None], BITS)
    return weights(bits, BITS, DTYPE, ROWS, 1, "wide").to(tl.float32)


@triton.jit(do_not_specialize=["tiles", "channels", "padded", "taps"])
def weight_kernel(
    words, plan, grid, out, tiles, across, channels, padded, taps, stride,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, SHIFTED: tl.constexpr, LEVELS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A program: one block of one tile, as rows of `out`, (C, stride), K in the order of the words less padding.

    Unless LAST, taps are neighbours there, not channels. Real values; where LEVELS the levels less their centre.
    Removed rows are zeros.
    """
    tile = tl.program_id(0)
    block = tl.program_id(1)
    bits = tl.load(plan + tile)
    words += tl.load(plan + tiles + tile).to(tl.int64) * WORDS
    row = tl.arange(0, ROWS)
    value = tl.zeros((ROWS, SPAN), tl.float32)
    for BITS in tl.static_range(1, 9):
        if bits == BITS:
            value = _dense(words, row, block, across, BITS, DTYPE, ROWS)
    place = tile * ROWS + row
    if not LEVELS:
        if SHIFTED:
            value += (tl.load(grid + tiles * ROWS + place) + (1 << bits >> 1).to(tl.float32))[:, None]
        value *= tl.load(grid + place)[:, None]
        value = tl.where(bits > 0, value, 0.0)
    k = tl.arange(0, SPAN) + block * SPAN
    channel = k % padded
    tap = k // padded
    slot = tl.load(plan + 2 * tiles + place)
    here = (slot >= 0)[:, None] & ((channel < channels) & (tap < taps))[None, :]
    column = tap * channels + channel if LAST else channel * taps + tap
    at = slot.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(out + at, narrow(value, out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M", "tiles", "area"])
def removed_kernel(plan, bias, y, M, N, tiles, area, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr):
    """A program: the bias alone to one tile of removed rows, if it is one, at COLUMNS tokens or pixels.

    Columns are the first axis of the grid, the one without a limit.
    """
    tile = tl.program_id(1)
    if tl.load(plan + tile) == 0:
        slot = tl.load(plan + 2 * tiles + tile * ROWS + tl.arange(0, ROWS))
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        store_tile(y, tl.zeros((ROWS, COLUMNS), tl.float32), slot, column, bias, M, N, area, BIASED)


@triton.jit(do_not_specialize=["K"])
def tokens_kernel(x, codes, step, total, K, stride, BLOCK: tl.constexpr):
    """A program: one row of x, (M, K), to codes, (M, stride) int8, padded with zeros; its step and sum of codes."""
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, K, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.abs(tl.load(x + token * K + k, mask=k < K, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    most = tl.reduce(largest, 0, _larger)
    inverse = tl.minimum(tl.math.div_rn(127.0, most), 8.507059173023462e37)  # 2^126: steps are normal numbers
    finite = most < float("inf")
    inverse = tl.where(finite, inverse, 0.0)
    count = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, stride, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + token * K + k, mask=k < K, other=0.0).to(tl.float32)
        code = rint(tl.where(finite, value, 0.0) * inverse).to(tl.int32)
        count += code
        tl.store(codes + token * stride + k, code.to(tl.int8), mask=k < stride)
    tl.store(step + token, tl.where(finite, tl.math.div_rn(1.0, inverse), float("nan")))
    tl.store(total + token, tl.sum(count))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["M", "tiles"])
def settle_kernel(
    sums, step, total, plan, grid, bias, y, M, N, stride, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A program: sums of codes and levels, (M, stride) int32, of one tile and COLUMNS tokens, to y, (M, N)."""
    tile = tl.program_id(1)
    place = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    bits = tl.load(plan + tile)
    slot = tl.load(plan + 2 * tiles + place)
    here = (slot >= 0)[:, None] & (column < M)[None, :] & (bits > 0)
    at = column.to(tl.int64)[None, :] * stride + slot[:, None]
    value = tl.load(sums + at, mask=here, other=0).to(tl.float32)
    if SHIFTED:
        offset = tl.load(grid + tiles * ROWS + place) + (1 << bits >> 1).to(tl.float32)
        value += offset[:, None] * tl.load(total + column, mask=column < M, other=0).to(tl.float32)[None, :]
    value *= tl.load(step + column, mask=column < M, other=0.0)[None, :]
    value = tl.where(bits > 0, value * tl.load(grid + place)[:, None], 0.0)
    store_tile(y, value, slot, column, bias, M, N, 1, BIASED)
