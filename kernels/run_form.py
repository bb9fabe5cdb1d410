"""What a layer runs from: packed rows laid out for a device, in tiles of rows at one width.

The CPU reads the lines of tiling.py, a GPU the words of fragments.py; in both, rows are sorted by width and the real
value of a level is (level + offset) * scale. Which of the two it is, the dtype of `lines` tells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import fragments, tiling
from .packing import UNPACK, PackedRows


class TiledRows(NamedTuple):
    """A (C, K) matrix of packed weights as a device's products read it.

    Attributes:
        lines: (N,) uint8 as tiling.py says, or int32 as fragments.py does.
        plan: int32; the width of each tile and the row in each place, -1 for none (and on a GPU where a tile begins).
        grid: (2, places) float32, scale and offset of the row in each place. (1, places) where every offset is that of
            a centred grid, -2^(bits - 1) at its tile's width: a GPU then has no sums of x to take.
        rows: C.
    """

    lines: Tensor
    plan: Tensor
    grid: Tensor
    rows: int


def tile_rows(rows: PackedRows, scale: Tensor, offset: Tensor, *, area: int = 1, groups: int = 1) -> TiledRows:
    """Lay packed rows out for running on the device where they are.

    Args:
        rows: The disk form, C rows of K levels.
        scale: (C,) float32 step of each row.
        offset: (C,) float32; real = (level + offset) * scale. The CPU kernels are fast where it is a multiple of 1/256
            below 2^14, as those of every quantizer here are, and right for any.
        area: Kernel height times width of a convolution.
        groups: Of a convolution; the rows of a tile belong to one.

    Raises:
        ValueError: If the vectors do not have C elements, or `area` and `groups` do not divide K and C.
    """
    count = len(rows.bits)
    if scale.shape != (count,) or offset.shape != (count,):
        raise ValueError(f"tile_rows: scale {tuple(scale.shape)}, offset {tuple(offset.shape)}; want ({count},)")
    if area < 1 or groups < 1 or rows.width % area or count % groups:
        raise ValueError(
            f"tile_rows: an area of {area} and {groups} groups do not divide {rows.width} levels and {count} rows"
        )
    return form_of(rows.data.device).lay_out(rows, scale, offset, area, groups)


def _lines(rows: PackedRows, scale: Tensor, offset: Tensor, area: int, groups: int) -> TiledRows:
    """The form of tiling.py, for the CPU."""
    arguments = tiling.tile_arguments(rows, area, groups)
    plan = arguments[3]
    grid = _by_place(scale, offset, tiling.widths_and_rows(plan)[1])
    return TiledRows(tiling.OP(*arguments), plan, grid, len(rows.bits))


def _fragments(rows: PackedRows, scale: Tensor, offset: Tensor, area: int, groups: int) -> TiledRows:
    """The form of fragments.py, for a GPU."""
    count = len(rows.bits)
    plan, planes = fragments.plan_tiles(rows.bits, fragments.blocks_of(rows.width, area), groups)
    size = fragments.tile_size(count // groups)
    places = size * (len(plan) // (2 + size))
    widths, _, slots = fragments.parts_of(plan, scale.new_empty(1, places))
    by_place = widths.repeat_interleave(size)
    wide = by_place.new_zeros(count + 1)  # the last takes what stands in no row's place
    wide[slots.long()] = by_place
    own, wide = rows.bits.int(), wide[:count]
    shift = torch.where(own > 0, (1 << wide >> 1) - (1 << own >> 1), 0)
    levels = UNPACK(rows.data, rows.bits, rows.starts, rows.width) + shift[:, None].to(torch.uint8)
    # removed rows take part as numbers, times sums that are 0
    grid = _by_place(torch.where(own > 0, scale, 0.0), torch.where(own > 0, offset - shift, 0.0), slots)
    centred = grid[1] == -torch.exp2(by_place - 1.0)
    if (centred | (slots < 0) | (by_place == 0)).all():
        grid = grid[:1].contiguous()
    lines = fragments.fragment(levels, plan, places, rows.width, area, planes)
    return TiledRows(lines, plan, grid, count)


class Form(NamedTuple):
    """A layout: the dtype of its lines, and what makes them of rows, scale, offset, area and groups."""

    dtype: torch.dtype
    lay_out: Callable[[PackedRows, Tensor, Tensor, int, int], TiledRows]


LINES, FRAGMENTS = Form(torch.uint8, _lines), Form(torch.int32, _fragments)
FORMS = {"cuda": FRAGMENTS}  # elsewhere LINES


def form_of(device: torch.device) -> Form:
    """What products on a device read."""
    return FORMS.get(device.type, LINES)


def _by_place(scale: Tensor, offset: Tensor, slots: Tensor) -> Tensor:
    # a place that holds no row takes the last of these: any number will do, as long as it is one
    grid = torch.nn.functional.pad(torch.stack([scale, offset]).float(), (0, 1))
    return grid[:, slots.long()].contiguous()


def tiled_weight(
    lines: Tensor, plan: Tensor, grid: Tensor, rows: int, width: int, area: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What tiles stand for: (level + offset) * scale, (rows, width) in `dtype`; and which rows are not removed."""
    if lines.dtype == FRAGMENTS.dtype:
        levels = fragments.unfragment(lines, plan, grid, rows, width, area)
        widths, _, slots = fragments.parts_of(plan, grid)
        by_place = widths.repeat_interleave(fragments.tiles_of(plan, grid.shape[1])[1])
        if len(grid) == 1:
            grid = torch.stack([grid[0], -torch.exp2(by_place - 1.0)])
    else:
        levels = tiling.untile(lines, plan, rows, width, area)
        widths, slots = tiling.widths_and_rows(plan)
        by_place = widths.repeat_interleave(tiling.TILE)
    at = torch.zeros(rows + 1, dtype=torch.long, device=lines.device)
    at[slots.long()] = torch.arange(len(slots), device=lines.device)
    at = at[:rows]
    live = by_place[at] > 0
    scale, offset = grid[:, at, None]
    return torch.where(live[:, None], (levels.to(grid.dtype) + offset) * scale, 0.0).to(dtype), live
