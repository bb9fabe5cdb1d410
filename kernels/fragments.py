"""The run form of packed rows on a GPU: words whose bits are tensor-core fragments after a shift and a mask.

    tile    ROWS rows (64 in a large layer, 16 in a small one) at one width, the widest of theirs; sorted by width, so
            that a row rarely lies at more than its own. A row in a wider tile keeps its distance from the centre
            2^(bits - 1) of the levels; its offset moves along. Some places may be empty, the first never is
    unit    16 rows of a tile: a run of blocks, contiguous
    block   128 levels of a unit: `bits` planes of 64 int32 words, word 4 r + t of row r and quad lane t
    word    two 16-bit halves with the same bits of two levels. Together the words of a lane hold 16 pairs:
            pair p, half h  is  level 16 (p // 2) + 8 (p % 2) + 2 t + h  of the block,
            which is how m16n8k16 and m64nNk16 want the first operand

A half holds 16 // bits whole levels from bit 0 on; what is left of the halves holds the remaining levels in pieces
(`pieces`). So any width costs exactly bits / 8 bytes a weight, one run of memory a tile, and no weight passes through
shared memory on its way to the tensor cores.

In a convolution levels run over the channels first, padded to a multiple of 16 for each place of the kernel: the 16
levels of a product then lie at one place, and neighbours in x are read together. A tile's rows are of one group: its
first tells which. A group of fewer than 16 rows pays for 16, and its channels for a multiple of 16; but weights of such
layers are few beside x (of 32 groups of 4 channels at 4 bits: 64 KiB, of x at 56 pixels a side in 16 bits: 784 KiB).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .tiling import plan_rows

UNIT, SPAN, WORDS = 16, 128, 64  # rows of a unit, levels of a block, words of a plane
MANY = 512  # rows from which a tile has four units: then at most a few per cent are stored wider than they are


@cache
def pieces(bits: int) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """Where the 16 pairs of a lane lie: for each, (plane, lowest bit in the half, bits, lowest bit in the level)."""
    whole = 16 // bits
    pairs = [[(plane, i * bits, bits, 0)] for plane in range(bits) for i in range(whole)]
    left = [(plane, at) for plane in range(bits) for at in range(whole * bits, 16)]  # bit by bit
    for first in range(0, len(left), bits):
        joined: list[tuple[int, int, int, int]] = []
        for to, (plane, at) in enumerate(left[first : first + bits]):
            if joined and joined[-1][0] == plane:
                joined[-1] = (plane, joined[-1][1], joined[-1][2] + 1, joined[-1][3])
            else:
                joined.append((plane, at, 1, to))
        pairs.append(joined)
    return tuple(tuple(pair) for pair in pairs)


def channels_of(width: int, area: int) -> int:
    """Levels at one place of the kernel, with their padding; of a matrix all of them."""
    channels = width // area
    return channels if area == 1 else -(-channels // 16) * 16


def blocks_of(width: int, area: int = 1) -> int:
    """Blocks of a row of `width` levels."""
    return -(-channels_of(width, area) * area // SPAN)


def tile_size(rows: int) -> int:
    """Rows of a tile, of `rows` that may share tiles: those of a group."""
    return 4 * UNIT if rows >= MANY else UNIT


def plan_tiles(bits: Tensor, blocks: int, groups: int = 1) -> tuple[Tensor, int]:
    """Which row goes where, and the planes of all tiles.

    Returns:
        ((2 + ROWS) T,) int32: the width of each of T tiles, the widest last, its first plane, then the row in each
        place, -1 for none; and the planes together.
    """
    rows = tile_size(len(bits) // groups)
    plan = plan_rows(bits, groups, rows)
    widths, slots = plan.tensor_split([len(plan) // (1 + rows)])
    order = widths.argsort(stable=True)
    widths, slots = widths[order], slots.view(-1, rows)[order].view(-1)
    planes = widths.long() * (rows // UNIT * blocks)
    return torch.cat([widths, (planes.cumsum(0) - planes).int(), slots]), int(planes.sum())


def tiles_of(plan: Tensor, places: int) -> tuple[int, int]:
    """Tiles, and rows of each, as the shapes tell."""
    count = (len(plan) - places) // 2
    return count, places // count if count else UNIT


def parts_of(plan: Tensor, grid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) width and (T,) first plane of each tile, (T * ROWS,) row in each place."""
    count, _ = tiles_of(plan, grid.shape[1])
    widths, firsts, slots = plan.tensor_split([count, 2 * count])
    return widths, firsts, slots


def _planes(widths: Tensor, firsts: Tensor, units: int, blocks: int, bits: int) -> tuple[Tensor, Tensor]:
    """Which tiles are `bits` wide, and where their planes lie: (n, units * blocks * bits)."""
    (which,) = (widths == bits).nonzero(as_tuple=True)
    return which, firsts[which].long()[:, None] + torch.arange(units * blocks * bits, device=widths.device)


def fragment(levels: Tensor, plan: Tensor, places: int, width: int, area: int, planes: int) -> Tensor:
    """Lay levels out: (C, K) uint8 to (planes * 64,) int32; a row's levels are those of its tile's width already."""
    widths, firsts, slots = parts_of(plan, plan.new_empty(1, places))
    rows, channels, blocks = len(levels), channels_of(width, area), blocks_of(width, area)
    _, size = tiles_of(plan, places)
    levels = torch.nn.functional.pad(levels.view(rows, width // area, area), (0, 0, 0, channels - width // area))
    levels = levels.transpose(1, 2).reshape(rows, channels * area)
    levels = torch.nn.functional.pad(levels, (0, blocks * SPAN - channels * area, 0, 1))  # a row of zeros for -1
    units = size // UNIT
    words = levels.new_zeros(planes, WORDS, dtype=torch.int32)
    for bits in range(1, 9):
        which, numbers = _planes(widths, firsts, units, blocks, bits)
        if not len(which):
            continue
        some = levels[slots.view(-1, size)[which].long()].view(len(which), units, UNIT, blocks, 16, 4, 2)
        pairs = some.permute(0, 1, 3, 4, 2, 5, 6).int()  # (tile, unit, block, pair, row, lane, half)
        block = words.new_zeros(len(which), units, blocks, bits, UNIT, 4)
        for pair, where in enumerate(pieces(bits)):
            for plane, at, count, low in where:
                piece = (pairs[:, :, :, pair] >> low) & ((1 << count) - 1)
                block[:, :, :, plane] |= (piece[..., 0] << at) | (piece[..., 1] << (at + 16))
        words[numbers] = block.view(len(which), units * blocks * bits, WORDS)
    return words.view(-1)


def unfragment(words: Tensor, plan: Tensor, grid: Tensor, rows: int, width: int, area: int) -> Tensor:
    """The levels that words hold, (rows, width) uint8, in plain PyTorch."""
    widths, firsts, slots = parts_of(plan, grid)
    channels, blocks = channels_of(width, area), blocks_of(width, area)
    _, size = tiles_of(plan, grid.shape[1])
    units = size // UNIT
    by_place = words.new_zeros(len(widths), units, blocks, 16, UNIT, 4, 2, dtype=torch.uint8)
    for bits in range(1, 9):
        which, numbers = _planes(widths, firsts, units, blocks, bits)
        if not len(which):
            continue
        block = words.view(-1, WORDS)[numbers].view(len(which), units, blocks, bits, UNIT, 4)
        some = words.new_zeros(len(which), *by_place.shape[1:])
        for pair, where in enumerate(pieces(bits)):
            for plane, at, count, low in where:
                for half in (0, 1):
                    piece = (block[:, :, :, plane] >> (at + 16 * half)) & ((1 << count) - 1)
                    some[:, :, :, pair, ..., half] |= piece << low
        by_place[which] = some.to(torch.uint8)
    by_place = by_place.permute(0, 1, 4, 2, 3, 5, 6).reshape(len(slots), blocks * SPAN)[:, : channels * area]
    by_place = by_place.view(len(slots), area, channels).transpose(1, 2)[:, : width // area].reshape(len(slots), width)
    levels = by_place.new_zeros(rows + 1, width)  # the last row takes what stands in no row's place
    levels[slots.long()] = by_place
    return levels[:rows]
