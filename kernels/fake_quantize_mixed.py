"""Round a tensor to several grids at once and add up what comes, weighed: what a mixture of candidates computes.

    q = sum_i share_i * fake_quantize(x, grid i)                   i = 0 .. N - 1, see fake_quantize.py

    x      (E,)  float32, bfloat16, float16 or float64; all is computed in float32 (float64), and rounded once
    share, scale, lo, hi, shift  (N,)  float32 (float64 for a float64 x); a grid with hi <= lo adds nothing
    q      (E,)  dtype of x

Gradients, with those of fake_quantize.py (q_i: x on grid i):

    dq/dx        = sum_i share_i * [x inside grid i]
    dq/dshare_i  = q_i, summed over E
    dq/dscale_i, dq/dlo_i, dq/dhi_i  = share_i times those of grid i

Floor in float32: 8 bytes an element forward, 12 backward, whatever N; a grid costs 8 operations an element forward, 18
backward, so that from some grids on it is arithmetic. The C++ kernel takes some hundred elements through all grids
before it goes on: they stay in the first cache; a result that fits no cache is not written past it. Backward rounds
once a grid: dq/dshare_i comes from the sums that dq/dscale_i needs, as q_i = scale_i * (code - v) + x inside.

Measured against one pass a grid (the reference, on the kernels of fake_quantize.py) at 7 grids, one thread with AVX2,
in two runs: float32 2.0 to 3.1 times as fast forward and 3.0 to 4.2 backward from 0.26 to 1.7 million elements, 9 to 22
times at 4,096, which is Python. bfloat16 1.5 to 3.3 and 2.5 to 4.1. float16, which is converted without the vector
unit, 0.8 to 1.7 and 1.4 to 2.1: its forward loses at 0.26 million.

On a GPU it has no kernel of its own: it is one launch of `fake_quantize` a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fake_quantize import BACKWARD, OP, cases, with_random_upstream, with_upstream_of_ones
from .op import Op


def reference(x: Tensor, share: Tensor, *grid: Tensor) -> Tensor:
    """The meaning; see the module's docstring."""
    total, wide = x.new_zeros(x.shape, dtype=share.dtype), x[None].to(share.dtype)
    for i, weight in enumerate(share.tolist()):
        total.add_(OP(wide, *(v[i : i + 1] for v in grid))[0], alpha=weight)
    return total.to(x.dtype)


def reference_backward(grad: Tensor, x: Tensor, share: Tensor, *grid: Tensor) -> tuple[Tensor, ...]:
    """The closed forms of the module's docstring: gradients of x, share, scale, lo, hi."""
    total, wide, upstream = x.new_zeros(x.shape, dtype=share.dtype), *(t[None].to(share.dtype) for t in (x, grad))
    of_share, of_grid = torch.zeros_like(share), [torch.zeros_like(v) for v in grid[:3]]
    for i, weight in enumerate(share.tolist()):
        one = [v[i : i + 1] for v in grid]
        of_share[i] = torch.dot(upstream[0], OP(wide, *one)[0])
        of_x, *rest = BACKWARD(upstream, wide, *one)
        total.add_(of_x[0], alpha=weight)
        for into, value in zip(of_grid, rest, strict=True):
            into[i] = weight * value[0]
    return total.to(x.dtype), of_share, *of_grid


def mixed_cases() -> dict[str, tuple[Tensor, ...]]:
    """One row on the grids of all rows of some of the primitive's cases, and a row that no grid is given for."""
    found = {}
    for name in (
        *("one-element", "one-past-a-vector", "one-past-a-block", "pruned", "fractional-ends", "one-bit-around-zero"),
        *("every-value-a-tie", "every-width-at-once", "not-contiguous", "bfloat16", "float16"),
    ):
        x, scale, *ends = cases()[name]
        scale = scale if len(scale) < 2 else scale * torch.linspace(0.5, 2, len(scale))
        found[name] = x[0], torch.linspace(-0.2, 0.8, len(scale)), scale, *ends
    x, share, scale, *ends = found["one-past-a-block"]
    found["no-elements"] = x[:0], share, scale, *ends
    found["no-grids"] = x, *(v[:0] for v in (share, scale, *ends))
    return found


def _bench_cases() -> dict[str, tuple[Tensor, ...]]:
    """An activation, and the grids that the strategies of an input find, about."""
    x, ones = torch.randn(16 * 64 * 32 * 32, generator=torch.Generator().manual_seed(2)), torch.ones(7)
    return {"7 grids, 16x64x32x32": (x, ones / 7, 0.02 * ones.cumsum(0), -128 * ones, 127 * ones, 0 * ones)}


MIXED = Op(
    name="fake_quantize_mixed",
    schema="(Tensor x, Tensor share, Tensor scale, Tensor lo, Tensor hi, Tensor shift) -> Tensor",
    reference=reference,
    fake=lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    cases=mixed_cases,
    bench_cases=_bench_cases,
    traffic=lambda x, share, *_: 2 * x.numel() * x.element_size() + 20 * share.numel(),
    operations=lambda x, share, *_: 8 * x.numel() * share.numel(),
)
MIXED_BACKWARD = Op(
    name="fake_quantize_mixed_backward",
    schema="(Tensor grad, Tensor x, Tensor share, Tensor scale, Tensor lo, Tensor hi, Tensor shift)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=lambda grad, x, share, *_: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *(torch.empty_like(share) for _ in range(4)),
    ),
    cases=lambda: with_random_upstream(mixed_cases()),
    bench_cases=lambda: with_upstream_of_ones(_bench_cases()),
    traffic=lambda grad, x, share, *_: 3 * x.numel() * x.element_size() + 36 * share.numel(),
    operations=lambda grad, x, share, *_: 18 * x.numel() * share.numel(),
)


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, share, *grid):
        ctx.save_for_backward(x, share, *grid)
        return MIXED(x.reshape(-1), share, *grid).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *rest = ctx.saved_tensors
        of_x, *others = MIXED_BACKWARD(grad.reshape(-1), x.reshape(-1), *rest)
        return of_x.view(x.shape), *others, None


def fake_quantize_mixed(x: Tensor, share: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """The sum of `x` on each of N grids, weighed; differentiable in all but `shift` (first order only).

    Args:
        x: Real values, any shape.
        share: (N,) weight of each grid.
        scale: (N,) steps, positive; lo, hi: (N,) lowest and highest codes; shift: (N,) what a code of 0 stands for, in
            steps. Of the dtype that `fake_quantize` wants.

    Returns:
        Of the shape and dtype of `x`.

    Raises:
        ValueError: If the vectors differ in length.
    """
    for name, v in (("scale", scale), ("lo", lo), ("hi", hi), ("shift", shift)):
        if v.shape != share.shape or v.dim() != 1:
            raise ValueError(
                f"fake_quantize_mixed: {name} has shape {tuple(v.shape)} and share {tuple(share.shape)}; want one "
                "value a grid in both"
            )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, share, scale, lo, hi)):
        return _Mixed.apply(x, share, scale, lo, hi, shift)
    return MIXED(x.reshape(-1), share, scale, lo, hi, shift).view(x.shape)
