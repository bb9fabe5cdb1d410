"""Rows of a packed table by index; one row an entry, the width differs from row to row.

    index   (n,) int64, 0 .. C - 1        data, bits, starts, width   as in packing.py, C rows of K levels
    scale, offset  (C,) float32           y  (n, K) float32: (level + offset) * scale, zeros where bits is 0

Exact: the values are those of the dequantized table, bit for bit. Floor: the packed bytes of the rows asked for, and y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .op import Op
from .packed_linear import grid
from .packing import case, dequantize, shapes


def reference(
    index: Tensor, data: Tensor, bits: Tensor, starts: Tensor, scale: Tensor, offset: Tensor, width: int
) -> Tensor:
    """The meaning: dequantize the table, then look up."""
    return torch.nn.functional.embedding(index, dequantize(data, bits, starts, scale, offset, width, scale.dtype))


def _cases() -> dict[str, tuple]:
    found = {}
    for name, (bits, width) in shapes().items():
        index = torch.arange(2 * len(bits)) % max(len(bits), 1)
        found[name] = (index, *case(bits, width)[1].args[:3], *grid(bits)[:2], width)
    return found


OP = Op(
    name="packed_embedding",
    schema="(Tensor index, Tensor data, Tensor bits, Tensor starts, Tensor scale, Tensor offset, int width) -> Tensor",
    reference=reference,
    fake=lambda index, data, bits, starts, scale, offset, width: scale.new_empty(index.shape[0], width),
    cases=_cases,
    traffic=lambda index, data, bits, starts, scale, offset, width: (
        index.numel() * width * 4 + (data.numel() * index.numel()) // max(len(bits), 1)
    ),
    operations=lambda index, data, bits, starts, scale, offset, width: 2 * index.numel() * width,
    exact=True,
)


def packed_embedding(
    index: Tensor, data: Tensor, bits: Tensor, starts: Tensor, scale: Tensor, offset: Tensor, width: int
) -> Tensor:
    """`torch.nn.functional.embedding` with a packed table; index (...) of int, the result (..., K) float32.

    Raises:
        IndexError: If an index lies outside the table (checked by the operation).
    """
    flat = OP(index.reshape(-1).long(), data, bits, starts, scale, offset, width)
    return flat.reshape(*index.shape, width)
