"""A grid for x that is known before x is: what the packed products take beside x, and what it means.

    code = round(clamp(x / scale, code_min, code_max))    half to even, in float32: those of fake_quantize, shift 0
    q    = code * scale

    input_grid  (3 + C,)  float32: scale, code_min and code_max, then the sum of the levels of each row of the weights

The codes are integers, at most 256 of them, and 0 is one: so padding is exact. Integer products take code - centre, a
signed byte: centre is 0 where -128 .. 127 holds the codes, else code_min + 128. What that leaves out, centre times
the sum of (level + offset), needs no pass over weights or x: the sums of levels are known when a layer is laid out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fake_quantize import reference as fake_quantize
from .packing import PackedRows, unpack

WIDEST_STATIC = 2**14  # levels whose sum of products with codes fits 32 bits: 2^14 * (255 + 256) * 255 < 2^31


def with_sums(grid: Tensor, rows: PackedRows) -> Tensor:
    """The argument `input_grid` of products with these rows; grid is (3,): scale, code_min, code_max."""
    sums = unpack(rows).sum(1, dtype=torch.int32) if len(rows.bits) else rows.bits
    return torch.cat([grid, sums.to(grid.dtype)])  # below 2^24, where a product reads them


def check_grid(op: str, input_grid: Tensor | None, rows: int) -> None:
    """What every implementation refuses.

    Raises:
        ValueError: If `input_grid` does not have the shape that these rows want.
    """
    if input_grid is not None and input_grid.shape != (3 + rows,):
        raise ValueError(f"{op}: input_grid is {tuple(input_grid.shape)}; want ({3 + rows},), three numbers and sums")


def codes_on(x: Tensor, input_grid: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes of x, as floats, and their step, one a slice over `dims`: NaN where it holds NaN, whose codes are 0."""
    scale, low, high = input_grid[:3].float()
    codes = torch.minimum(torch.maximum(x.float() / scale, low), high).round()
    odd = codes.isnan().any(dims, keepdim=True)
    return codes.nan_to_num(0.0), torch.where(odd, torch.nan, scale)


def on_grid(x: Tensor, input_grid: Tensor, quantize: Callable[..., Tensor] = fake_quantize) -> Tensor:
    """x rounded to the grid, in its own dtype; `quantize` is the operation, or its reference."""
    scale, low, high = input_grid[:3].float().split(1)
    exact = x.float() if x.dtype == torch.float64 else x  # codes are those of float32
    return quantize(exact.reshape(1, -1), scale, low, high, torch.zeros_like(scale)).view(x.shape).to(x.dtype)
