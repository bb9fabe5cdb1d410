"""Levels <-> bytes: the layout of packed rows, on disk and in memory.

A (C, K) matrix of levels; row c holds values 0 .. 2^bits[c] - 1, bits[c] in 0..8.

    Level k of a row occupies bits [k * b, (k + 1) * b) of the row's bit string, least significant bit first within a
    byte and within a level. Each row starts on a byte; unused bits of its last byte are 0. Rows follow one another
    in order, without gaps: row c starts at byte starts[c] = sum of ceil(bits[i] * K / 8) over i < c.

So eight levels fill exactly b bytes for every b: any width costs b/8 bytes a weight, a reader needs one 64-bit word
for eight levels, and a row of 0 bits costs nothing. The real value is (level + offset) * scale, offset and scale a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .op import Op


def row_bytes(bits: Tensor, width: int) -> Tensor:
    """Bytes of each row: ceil(bits * width / 8), (C,) int64."""
    return (bits.long() * width + 7) // 8


def row_starts(bits: Tensor, width: int) -> Tensor:
    """First byte of each row and, last, the length of the whole: (C + 1,) int64."""
    return torch.nn.functional.pad(row_bytes(bits, width).cumsum(0), (1, 0))


def _pack_reference(levels: Tensor, bits: Tensor, starts: Tensor, length: int) -> Tensor:
    width = levels.shape[1]
    data = levels.new_zeros(length)
    for b in range(1, 9):
        (rows,) = (bits == b).nonzero(as_tuple=True)
        if rows.numel() == 0 or width == 0:
            continue
        string = (levels[rows][..., None] >> torch.arange(b, device=levels.device, dtype=torch.uint8)) & 1
        string = torch.nn.functional.pad(string.flatten(1), (0, -b * width % 8)).unflatten(1, (-1, 8))
        value = (string << torch.arange(8, device=levels.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        data[starts[rows][:, None] + torch.arange(value.shape[1], device=levels.device)] = value
    return data


def unpack_reference(data: Tensor, bits: Tensor, starts: Tensor, width: int) -> Tensor:
    """The levels of packed rows, (C, K) uint8, in plain PyTorch."""
    levels = data.new_zeros(bits.shape[0], width)
    for b in range(1, 9):
        (rows,) = (bits == b).nonzero(as_tuple=True)
        if rows.numel() == 0 or width == 0:
            continue
        count = (b * width + 7) // 8
        value = data[starts[rows][:, None] + torch.arange(count, device=data.device)]
        string = (value[..., None] >> torch.arange(8, device=data.device, dtype=torch.uint8)) & 1
        string = string.flatten(1)[:, : b * width].unflatten(1, (width, b))
        levels[rows] = (string << torch.arange(b, device=data.device, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return levels


def case(bits: Tensor, width: int, seed: int = 0) -> tuple[Tensor, PackedRows]:
    """Random levels of the given widths, and the same packed by the reference."""
    make = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (len(bits), width), generator=make, dtype=torch.uint8)
    levels = (levels.int() & ((1 << bits.int()) - 1)[:, None]).to(torch.uint8)
    starts = row_starts(bits, width)
    return levels, PackedRows(_pack_reference(levels, bits, starts, int(starts[-1])), bits, width)


def shapes() -> dict[str, tuple[Tensor, int]]:
    """(bits, width) of small matrices, named after the edge each presses on; shared by all packed operations."""

    def of(*bits: int) -> Tensor:
        return torch.tensor(bits, dtype=torch.uint8)

    every = torch.arange(9, dtype=torch.uint8)
    return {
        "one-weight": (of(1), 1),
        "every-width": (every, 24),
        "every-width-one-past-a-group": (every, 25),
        "every-width-one-before-a-group": (every.flip(0), 31),
        "narrower-than-a-group": (every, 5),
        "wider-than-a-block": (every, 1_037),
        "all-removed": (of(0, 0, 0), 40),
        "removed-first-and-last": (of(0, 3, 0, 8, 0), 19),
        "no-rows": (of(), 8),
        "no-columns": (of(3, 4), 0),
        "many-rows": (every.repeat(15), 72),
    }


PACK = Op(
    name="pack",
    schema="(Tensor levels, Tensor bits, Tensor starts, int length) -> Tensor",
    reference=_pack_reference,
    fake=lambda levels, bits, starts, length: levels.new_empty(length),
    cases=lambda: {
        name: (levels, rows.bits, rows.starts, rows.data.numel())
        for name, (levels, rows) in ((name, case(*shape)) for name, shape in shapes().items())
    },
    traffic=lambda levels, bits, starts, length: levels.numel() + length,
    operations=lambda levels, *_: levels.numel(),
    exact=True,
)
UNPACK = Op(
    name="unpack",
    schema="(Tensor data, Tensor bits, Tensor starts, int width) -> Tensor",
    reference=unpack_reference,
    fake=lambda data, bits, starts, width: data.new_empty(bits.shape[0], width),
    cases=lambda: {name: case(*shape)[1].args for name, shape in shapes().items()},
    traffic=lambda data, bits, starts, width: data.numel() + bits.shape[0] * width,
    operations=lambda data, bits, starts, width: bits.shape[0] * width,
    exact=True,
)


@dataclass(frozen=True)
class PackedRows:
    """A packed (C, K) matrix of levels.

    Attributes:
        data: (N,) uint8, laid out as the module's docstring says.
        bits: (C,) uint8, 0 to 8.
        width: K, levels a row.
    """

    data: Tensor
    bits: Tensor
    width: int

    def __post_init__(self) -> None:
        if self.bits.dtype != torch.uint8 or self.bits.dim() != 1 or (self.bits > 8).any():
            raise ValueError(
                f"bits: want a vector of uint8 from 0 to 8, got {self.bits.dtype} {tuple(self.bits.shape)}"
            )
        promised = int(row_bytes(self.bits, self.width).sum())
        if self.data.dtype != torch.uint8 or tuple(self.data.shape) != (promised,):
            raise ValueError(
                f"packed data: {tuple(self.data.shape)} {self.data.dtype}, but {len(self.bits)} rows of {self.width} "
                f"levels at these widths need ({promised},) uint8"
            )

    @property
    def starts(self) -> Tensor:
        """(C + 1,) int64 first byte of each row; computed anew at each access."""
        return row_starts(self.bits, self.width)

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """(data, bits, starts, width), as the packed operations take them."""
        return self.data, self.bits, self.starts, self.width


def pack(levels: Tensor, bits: Tensor) -> PackedRows:
    """Pack levels into bytes.

    Args:
        levels: (C, K) uint8; row c below 2^bits[c] (all 0 where bits[c] is 0).
        bits: (C,) uint8, 0 to 8.

    Raises:
        ValueError: If a level does not fit its row's width, or shapes and dtypes are wrong.
    """
    if levels.dtype != torch.uint8 or levels.dim() != 2 or bits.shape != levels.shape[:1]:
        raise ValueError(
            f"pack: levels {levels.dtype} {tuple(levels.shape)}, bits {tuple(bits.shape)}; want uint8 (C, K) and (C,)"
        )
    too_big = levels.int() >= (1 << bits.int())[:, None]
    if too_big.any():
        row, column = (int(i) for i in too_big.nonzero()[0])
        raise ValueError(
            f"pack: level {int(levels[row, column])} at row {row}, column {column} does not fit {int(bits[row])} bits"
        )
    starts = row_starts(bits, levels.shape[1])
    return PackedRows(PACK(levels.contiguous(), bits, starts, int(starts[-1])), bits, levels.shape[1])


def unpack(rows: PackedRows) -> Tensor:
    """The levels of packed rows: (C, K) uint8; the inverse of `pack`."""
    return UNPACK(*rows.args)


def dequantize(
    data: Tensor, bits: Tensor, starts: Tensor, scale: Tensor, offset: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """(level + offset) * scale in plain PyTorch, (C, K) in `dtype`; rows of 0 bits are zeros.

    Computed in float32 and rounded once: the same values, bit for bit, as `fake_quantize` on the same grid.
    """
    levels = unpack_reference(data, bits, starts, width)
    values = (levels.to(scale.dtype) + offset[:, None]) * scale[:, None]
    return torch.where(bits[:, None] > 0, values, 0.0).to(dtype)
