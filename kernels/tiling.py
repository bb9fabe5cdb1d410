"""The run form of packed rows: 16 rows side by side, so that one vector holds the same levels of all of them.

    tile   16 rows at one width, the widest of theirs; rows of like width share tiles, removed rows have tiles of 0 bits
    block  32 levels of a tile: `bits` lines of 64 bytes, whatever the width. bits is a sum of planes of 8, 4, 2 and 1
           bits, the largest first and in the lowest bits of a level; a plane of w bits has w lines
    line   byte 4 r + i belongs to row r of the tile and to level 4 q + i, for each of some quads q: field f (bits
           f w .. f w + w - 1 of each byte) of a plane's line l holds quad l (8 / w) + f of the block's eight

So any width costs bits / 8 bytes a weight, a tile is one stream of memory, all instruction sets read the same lines,
and a sum of products needs no reduction over the lanes of a vector. Levels past K are 0.

A matrix keeps its order of levels. In a convolution a quad is four channels at one place of the kernel, zeros where
there are fewer, and quads run over the kernel's `area` first: channels of x then lie as four bytes side by side.

The disk form (packing.py) knows nothing of this; it is made once, when a layer is made or loaded (run_form.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Op
from .packing import PackedRows, case, shapes, unpack_reference

TILE, LINE, BLOCK, QUADS = 16, 64, 32, 8
_PLANES = (8, 4, 2, 1)


def quads_of(width: int, area: int) -> int:
    """Quads of a row of `width` levels."""
    return (width // area + 3) // 4 * area


def blocks_of(width: int, area: int = 1) -> int:
    """Blocks of a row of `width` levels, `area` of them a channel."""
    return (quads_of(width, area) + QUADS - 1) // QUADS


def _fields(bits: int) -> list[tuple[int, int, int, int]]:
    """(line, shift up in the line, mask, lowest bit in the level) for each quad of a block, plane by plane."""
    found, low = [], 0
    for plane in _PLANES:
        if bits & plane:
            count = 8 // plane
            found += [(low + q // count, q % count * plane, (1 << plane) - 1, low) for q in range(QUADS)]
            low += plane
    return found


def _tile_reference(
    data: Tensor, bits: Tensor, starts: Tensor, plan: Tensor, width: int, area: int, length: int
) -> Tensor:
    tile_bits, slots = widths_and_rows(plan)
    levels = unpack_reference(data, bits, starts, width)
    rows, tiles, quads, blocks = len(bits), len(tile_bits), quads_of(width, area), blocks_of(width, area)
    levels = torch.nn.functional.pad(levels.view(rows, width // area, area), (0, 0, 0, -(width // area) % 4))
    levels = levels.view(rows, quads // area, 4, area).transpose(2, 3).reshape(rows, 4 * quads)
    levels = torch.nn.functional.pad(levels, (0, blocks * BLOCK - 4 * quads, 0, 1))  # a row of zeros for -1
    by_place = levels[slots.long()].view(tiles, TILE, blocks, QUADS, 4)
    by_quad = by_place.permute(0, 2, 3, 1, 4).reshape(tiles, blocks, QUADS, LINE)
    lines = data.new_empty(length)
    for b in range(1, 9):
        which, numbers = _line_numbers(tile_bits, blocks, b)
        block = data.new_zeros(len(which), blocks, b, LINE)
        for i, (line, up, mask, low) in enumerate(_fields(b)):
            block[:, :, line] |= ((by_quad[which][:, :, i % QUADS] >> low) & mask) << up
        lines.view(-1, LINE)[numbers] = block.view(len(which), blocks * b, LINE)
    return lines


def widths_and_rows(plan: Tensor) -> tuple[Tensor, Tensor]:
    """The two parts of a plan: (T,) width of each tile, (T * 16,) row of each place, -1 for none."""
    count = len(plan) // (1 + TILE)
    return plan[:count], plan[count:]


def row_bits(plan: Tensor) -> Tensor:
    """Width of the tile of each row, in the order of the tiles: (C,) int32."""
    tile_bits, slots = widths_and_rows(plan)
    return tile_bits.repeat_interleave(TILE)[slots >= 0]


def _line_numbers(tile_bits: Tensor, blocks: int, bits: int) -> tuple[Tensor, Tensor]:
    """Which tiles are `bits` wide, and where their lines lie: (n, blocks * bits)."""
    (which,) = (tile_bits == bits).nonzero(as_tuple=True)
    first = (tile_bits.long().cumsum(0) - tile_bits) * blocks
    return which, first[which][:, None] + torch.arange(blocks * bits, device=tile_bits.device)


def untile(lines: Tensor, plan: Tensor, rows: int, width: int, area: int = 1) -> Tensor:
    """The levels that lines hold, (rows, width) uint8, in plain PyTorch."""
    tile_bits, slots = widths_and_rows(plan)
    count, quads, blocks = len(tile_bits), quads_of(width, area), blocks_of(width, area)
    by_quad = lines.new_zeros(count, blocks, QUADS, LINE)
    for b in range(1, 9):
        which, numbers = _line_numbers(tile_bits, blocks, b)
        block = lines.view(-1, LINE)[numbers].view(len(which), blocks, b, LINE)
        levels = lines.new_zeros(len(which), blocks, QUADS, LINE)
        for i, (line, up, mask, low) in enumerate(_fields(b)):
            levels[:, :, i % QUADS] |= ((block[:, :, line] >> up) & mask) << low
        by_quad[which] = levels
    by_place = by_quad.view(count, blocks, QUADS, TILE, 4).permute(0, 3, 1, 2, 4).reshape(count * TILE, blocks * BLOCK)
    by_place = by_place[:, : 4 * quads].reshape(len(slots), quads // area, area, 4).transpose(2, 3)
    levels = lines.new_zeros(rows + 1, width)  # the last row takes what stands in no row's place
    levels[slots.long()] = by_place.reshape(len(slots), 4 * quads)[:, :width]
    return levels[:rows]


def plan_rows(bits: Tensor, groups: int = 1, tile: int = TILE) -> Tensor:
    """Which row goes where: (17 T,) int32, the width of each of T tiles, then the row in each place, -1 for none.

    `tile` is the number of rows of a tile, TILE on the CPU; 17 is one more.

    Rows are sorted by width within their group, and at most the first tile of a group, its narrowest, has empty places:
    a row rarely lies at more than its own width. Places in use come first.
    """
    rows = len(bits)
    group = torch.arange(rows, device=bits.device) // max(rows // groups, 1)
    part = 2 * group + (bits > 0)  # removed rows have tiles of their own
    order = torch.argsort(part * 9 + bits, stable=True)
    count = torch.bincount(part, minlength=2 * groups)
    tiles = (count + tile - 1) // tile
    first_place, first_row = (tiles.cumsum(0) - tiles) * tile, count.cumsum(0) - count
    of = part[order]
    rank = torch.arange(rows, device=bits.device) - first_row[of]
    first = (count[of] - 1) % tile + 1  # rows in the first tile
    place = first_place[of] + torch.where(rank < first, rank, rank + tile - first)
    total = int(tiles.sum())
    slots = torch.full((total * tile,), -1, dtype=torch.int32, device=bits.device)
    slots[place] = order.to(torch.int32)
    widths = torch.nn.functional.pad(bits.int(), (0, 1))[slots.long()].view(total, tile)
    return torch.cat([widths.amax(1) if total else slots, slots])


def _tile_cases() -> dict[str, tuple]:
    found = {}
    for name, (bits, width) in shapes().items():
        for area in (1, 3):
            if width % area == 0 and len(bits) % area == 0:
                found[f"{name}-area-{area}"] = tile_arguments(case(bits, width)[1], area, area)
    return found


def tile_arguments(rows: PackedRows, area: int, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """The arguments of the operation `tile` that lay packed rows out.

    Args:
        rows: The disk form, C rows of K levels.
        area: Kernel height times width of a convolution, else 1; divides K.
        groups: Of a convolution, else 1; divides C.

    Returns:
        data, bits and starts of the rows, the plan of `plan_rows`, K, area, and the bytes of the lines.
    """
    plan = plan_rows(rows.bits, groups)
    length = int(widths_and_rows(plan)[0].sum()) * blocks_of(rows.width, area) * LINE
    return rows.data, rows.bits, rows.starts, plan, rows.width, area, length


def _bench_cases() -> dict[str, tuple]:
    bits = torch.tensor([0, 2, 3, 3, 4, 4, 5, 8], dtype=torch.uint8)
    return {f"{n}x{n}-mixed": tile_arguments(case(bits.repeat(n // 8), n)[1], 1, 1) for n in (512, 4096)}


OP = Op(
    name="tile",
    schema="(Tensor data, Tensor bits, Tensor starts, Tensor plan, int width, int area, int length) -> Tensor",
    reference=_tile_reference,
    fake=lambda data, bits, starts, plan, width, area, length: data.new_empty(length),
    cases=_tile_cases,
    bench_cases=_bench_cases,
    traffic=lambda data, *rest: data.numel() + rest[-1],
    operations=lambda data, bits, starts, plan, width, area, length: bits.shape[0] * width,
    exact=True,
)
