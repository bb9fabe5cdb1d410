"""The convolution of triton_packed.py with fewer than four channels a group, as in a depthwise layer.

There are too few products a weight for tensor cores: a program slides over pixels of its rows' own channels, and takes
each level from the words just before it is used. Bound by bytes: x and y once, and 16 bytes of words for the 9 levels
of a 3x3 row, at any width.
"""

# Triton compiles these functions and gives names another meaning than Python's types do.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from . import fragments
from .triton_packed_kernels import Geometry, store_tile
from .triton_unpack import UNIT, WORDS

# Levels of a row that are read here: the first of a block, which at every width lie whole in one word.
MOST = 8 * min(next((n for n, p in enumerate(fragments.pieces(b)) if len(p) > 1), 16) for b in range(1, 9))


@triton.jit
def _level(words, k, bits):
    """2^23 + level k of rows whose words begin at `words`, as float32: half k % 2 of lane k % 8 // 2 of pair k // 8."""
    whole = 16 // bits  # levels of a half
    pair = k // 8
    plane = pair * ((255 + whole) // whole) >> 8  # pair // whole, below 12, without dividing for each level
    word = tl.load(words + (plane * WORDS + k % 8 // 2))
    level = (word >> ((pair - plane * whole) * bits + k % 2 * 16)) & ((1 << bits) - 1)
    return (level | 0x4B000000).to(tl.float32, bitcast=True)  # faster than a conversion


@triton.jit(do_not_specialize=["M", "N", "tiles", *Geometry._fields])
def depthwise_kernel(
    x, words, plan, grid, bias, y, M, N, tiles,
    channels, padded, taps, height, width, out_height, out_width, kernel_width, stride_down, stride_across,
    padding_down, padding_across, dilation_down, dilation_across, by_image, by_channel, by_row, by_column, rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EACH: tl.constexpr, ACROSS: tl.constexpr, DILATION: tl.constexpr,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """A program: EACH of a tile's ROWS rows at COLUMNS output pixels, neighbouring programs at neighbouring pixels.

    y (images, N, M / images) of a contiguous x as a `Geometry` says. The kernel's width is a multiple of ACROSS:
    places that lie side by side have addresses that are one but for a constant.
    """
    blocks = tl.cdiv(M, COLUMNS)
    part = tl.program_id(0) // blocks
    tile = part // (ROWS // EACH)
    row = part % (ROWS // EACH) * EACH + tl.arange(0, EACH)
    bits = tl.load(plan + tile)
    words += tl.load(plan + tiles + tile).to(tl.int64) * WORDS + (row // UNIT * (bits * WORDS) + row % UNIT * 4)
    place = tile * ROWS + row
    slot = tl.load(plan + 2 * tiles + place)
    offset = tl.load(grid + tiles * ROWS + place) if SHIFTED else 0.0
    centre = 8388608.0 if SHIFTED else 8388608.0 + (1 << bits >> 1).to(tl.float32)  # exact
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    left = column % out_width * stride_across - padding_across
    top = column // out_width % out_height * stride_down - padding_down
    x += (column // (out_width * out_height)).to(tl.int64) * by_image  # (COLUMNS,) pointers
    first = tl.maximum(slot, 0) // rows * (channels * by_channel)  # what an empty place reads is not stored
    sums = tl.zeros((EACH, COLUMNS), tl.float32)
    k = 0
    for channel in range(0, tl.where(bits > 0, channels, 0)):
        for down in range(0, taps // kernel_width):
            at_row = top + down * dilation_down
            in_row = (column < M) & (at_row >= 0) & (at_row < height)
            for some in range(0, kernel_width, ACROSS):
                beside = left + some * DILATION
                at = x[None, :] + ((channel * by_channel + at_row * by_row + beside)[None, :] + first[:, None])
                for i in tl.static_range(ACROSS):
                    weight = _level(words, k + i, bits) - centre
                    if SHIFTED:
                        weight += offset
                    here = in_row & (beside + i * DILATION >= 0) & (beside + i * DILATION < width)
                    value = tl.load(at + i * DILATION, mask=here[None, :], other=0.0)
                    sums += weight[:, None] * value.to(tl.float32)
                k += ACROSS
    store_tile(y, sums * tl.load(grid + place)[:, None], slot, column, bias, M, N, out_height * out_width, BIASED)
