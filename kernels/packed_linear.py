"""y = x W^T + bias from packed rows; the width differs from row to row, removed rows give the bias alone.

    x       (M, K)  float32, bfloat16 or float16          data, bits, starts, width   as in packing.py, C rows of K
    scale   (C,)  float32                                 offset  (C,)  float32: real = (level + offset) * scale
    bias    (C,)  dtype of x, or None                     y       (M, C)  dtype of x

Exact numerics: float activations and float32 sums. Of each implementation the error against float64 is bounded by
that of any order of summation: |y - exact| <= K * 2^-23 * sum_k |w_k x_k|, plus one rounding to the dtype of y.

Floor at M = 1: the packed bytes, b/8 a weight. At large M: 2 * M * C * K operations.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .packing import case, dequantize, shapes


def reference(
    x: Tensor,
    data: Tensor,
    bits: Tensor,
    starts: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    width: int,
) -> Tensor:
    """The meaning: dequantize, then torch's own linear."""
    y = F.linear(x, dequantize(data, bits, starts, scale, offset, width, x.dtype), bias)
    alone = torch.zeros_like(y) if bias is None else bias.to(y.dtype)
    return torch.where(bits > 0, y, alone)  # also where x is not finite


def grid(bits: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and bias for rows of these widths, for cases."""
    make = torch.Generator().manual_seed(seed)
    scale = 0.01 + torch.rand(len(bits), generator=make)
    return scale, -torch.exp2(bits.float() - 1), torch.randn(len(bits), generator=make)


def _case(bits: Tensor, width: int, rows: int, dtype: torch.dtype = torch.float32, with_bias: bool = True) -> tuple:
    packed = case(bits, width)[1]
    scale, offset, bias = grid(bits)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return x, *packed.args[:3], scale, offset, bias.to(dtype) if with_bias else None, width


def cases() -> dict[str, tuple]:
    """All edges of packing, for one row of x and for several, and the dtypes."""
    found = {f"{name}-{rows}-rows": _case(*shape, rows) for name, shape in shapes().items() for rows in (1, 3, 17)}
    every = shapes()["every-width-one-past-a-group"]
    found["deployment-depth"] = _case(shapes()["every-width"][0], 4_096, 17)  # long sums must not drift
    found["no-rows-of-x"] = _case(*every, 0)
    found["no-bias"] = _case(*every, 2, with_bias=False)
    found["bfloat16"] = _case(*every, 5, torch.bfloat16)
    found["float16"] = _case(*every, 5, torch.float16)
    odd = _case(*every, 3)
    odd[0][0, 3], odd[0][1, 24], odd[0][2, 0] = float("nan"), float("inf"), -float("inf")
    found["nan-and-infinity"] = odd
    wide = _case(*shapes()["wider-than-a-block"], 4)
    found["x-not-contiguous"] = (wide[0].t().contiguous().t(), *wide[1:])
    return found


def bench_cases() -> dict[str, tuple]:
    """Deployment sizes at one width and at a mixed histogram."""
    mixed = torch.tensor([0, 2, 3, 3, 4, 4, 5, 8], dtype=torch.uint8)
    four = torch.tensor([4], dtype=torch.uint8)
    return {
        f"{n}x{n}-{name}-M{m}": _case(bits.repeat(n // len(bits)), n, m)
        for n in (512, 4096)
        for name, bits in (("4bit", four), ("mixed", mixed))
        for m in (1, 16, 128)
    }


OP = Op(
    name="packed_linear",
    schema="(Tensor x, Tensor data, Tensor bits, Tensor starts, Tensor scale, Tensor offset, Tensor? bias, int width)"
    " -> Tensor",
    reference=reference,
    fake=lambda x, data, bits, *_: x.new_empty(x.shape[0], bits.shape[0]),
    cases=cases,
    bench_cases=bench_cases,
    traffic=lambda x, data, bits, *_: data.numel() + x.element_size() * x.shape[0] * (x.shape[1] + bits.shape[0]),
    operations=lambda x, data, bits, *_: 2 * x.numel() * int((bits > 0).sum()),
)


def packed_linear(
    x: Tensor,
    data: Tensor,
    bits: Tensor,
    starts: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    width: int,
) -> Tensor:
    """`torch.nn.functional.linear` with packed weights; x is (..., K), the result (..., C).

    Raises:
        ValueError: If the last dimension of x is not K.
    """
    if x.shape[-1:] != (width,):
        raise ValueError(
            f"packed_linear: x has shape {tuple(x.shape)}; want (..., {width}), the layer's input features"
        )
    rows = prod(x.shape[:-1])
    bias = None if bias is None else bias.to(x.dtype)  # as under autocast
    return OP(x.reshape(rows, width), data, bits, starts, scale, offset, bias, width).reshape(
        *x.shape[:-1], bits.shape[0]
    )
