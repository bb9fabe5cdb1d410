"""What packed layers share: rows in disk form, and where they multiply, the run form and the grid of the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sgsc.kernels import NUMERICS, PackedRows, TiledRows, tile_rows
from sgsc.kernels.input_grid import with_sums
from sgsc.kernels.packing import dequantize
from sgsc.kernels.run_form import form_of
from sgsc.quantizers.base import at_least_float32


def input_grid(scale: float, code_min: float, code_max: float) -> Tensor:
    """The buffer `input_grid` of a packed layer.

    Raises:
        ValueError: If it is no grid that the operations take.
    """
    grid = torch.tensor([float(scale), float(code_min), float(code_max)], dtype=torch.float32)
    if not 0 < grid[0] < float("inf"):
        raise ValueError(f"the input's grid has the scale {scale}; want a positive, finite float32")
    whole = float(code_min).is_integer() and float(code_max).is_integer()
    if not whole or not code_min <= 0 <= code_max or not 0 < code_max - code_min < 256:
        raise ValueError(
            f"the input's grid has the codes {code_min} .. {code_max}; want 2 to 256 integers, 0 among them"
        )
    return grid


class PackedLayer(nn.Module):
    """Packed rows and the grid of each; abstract. State is plain tensors, all of them buffers.

    data    (N,) uint8     codes, laid out as kernels/packing.py says
    bits    (C,) uint8     width of each row
    scale   (C,) float32   step of each row
    offset  (C,) float32   real = (level + offset) * scale
    bias    (C,) or None
    """

    type_name: str
    data: Tensor
    bits: Tensor
    scale: Tensor
    offset: Tensor
    starts: Tensor
    bias: Tensor | None
    _float32: tuple[str, ...] = ("scale", "offset")  # what stays as it was stored under .half() and .bfloat16()

    def __init__(self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.channels, self.width = len(rows.bits), rows.width
        buffers = {"data": rows.data, "bits": rows.bits, "scale": scale, "offset": offset, "bias": bias}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("starts", rows.starts, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # .half() and .bfloat16() are for activations and bias
        grid = {name: getattr(self, name) for name in self._float32}
        super()._apply(fn, recurse)
        for name, before in grid.items():
            if before is not None:
                setattr(self, name, at_least_float32(before, getattr(self, name)))
        return self

    @property
    def rows(self) -> PackedRows:
        """The packed matrix."""
        return PackedRows(self.data, self.bits, self.width)

    @property
    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(data, bits, starts, scale, offset), as the packed operations take them."""
        return self.data, self.bits, self.starts, self.scale, self.offset

    def weight_rows(self) -> Tensor:
        """The dequantized weight, (C, K) float32: for inspection, not for running."""
        return dequantize(*self.grid, self.width, torch.float32)

    def settings(self) -> dict[str, Any]:
        """What the constructor needs beside the tensors, JSON-able."""
        return {}

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that this stands for."""
        return (len(self.bits), self.width)

    def extra_repr(self) -> str:
        """Shape and mean width."""
        mean = self.bits.float().mean().item() if len(self.bits) else 0.0
        return f"{list(self.weight_shape())}, mean_bits={mean:.2f}, bytes={self.data.numel()}"


class PackedProduct(PackedLayer):
    """A packed layer that multiplies: beside the disk form it holds the run form of its rows; abstract.

    `numerics` is "exact", float activations, or "int8", activations rounded to 8 bits on the fly: several times as fast
    where arithmetic binds, with the bound of kernels/packed_linear.py. See `set_numerics`.

    A layer whose input has a grid of its own rounds to that grid in either numerics, as the trained one does:

    input_grid  (3,) float32, scale, code_min and code_max; or None

    "exact" then multiplies the rounded input as floats, on the reference path bit for bit as the trained layer; it is
    the default here too. "int8" multiplies the codes as integers, and only the rounding of floats is left between the
    two.
    """

    lines: Tensor
    plan: Tensor
    tile_grid: Tensor
    input_grid: Tensor | None
    input_form: Tensor | None  # the grid as the operations take it
    _float32 = (*PackedLayer._float32, "tile_grid", "input_grid", "input_form")

    def __init__(
        self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None, input_grid: Tensor | None = None
    ) -> None:
        super().__init__(rows, scale, offset, bias)
        self.register_buffer("input_grid", input_grid)
        self.numerics = NUMERICS[0]

    def _apply(self, fn, recurse: bool = True):
        before = self.lines.device.type
        super()._apply(fn, recurse)
        device = self.lines.device
        if "meta" not in (before, device.type) and self.lines.dtype != form_of(device).dtype:
            self.lay_out()  # moved to where products read another form
        return self

    def lay_out(self) -> None:
        """Make the run form anew, from the disk form; call it after changing a buffer of that."""
        tiles = self._tile(self.rows)
        form = None if self.input_grid is None else with_sums(self.input_grid, self.rows)
        made = {"lines": tiles.lines, "plan": tiles.plan, "tile_grid": tiles.grid, "input_form": form}
        for name, value in made.items():
            self.register_buffer(name, value, persistent=False)

    def _tile(self, rows: PackedRows) -> TiledRows:
        return tile_rows(rows, self.scale, self.offset)

    @property
    def tiles(self) -> TiledRows:
        """The run form."""
        b = self._buffers  # nn.Module's own look-up costs as much as a small product
        return tuple.__new__(TiledRows, (b["lines"], b["plan"], b["tile_grid"], self.channels))

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.register_buffer("starts", self.rows.starts, persistent=False)
        self.lay_out()

    def extra_repr(self) -> str:
        """Shape, mean width, and the grid of the input."""
        said = super().extra_repr()
        if self.input_grid is None:
            return said
        scale, low, high = self.input_grid.tolist()
        return f"{said}, input={scale:.4g} * {low:.0f}..{high:.0f}"
