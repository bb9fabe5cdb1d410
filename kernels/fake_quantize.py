"""Round each row to its own grid, differentiably: the one primitive behind every quantizer of this project.

    v    = x / scale - shift
    code = round(clamp(v, lo, hi))            half to even
    q    = (code + shift) * scale             a row with hi <= lo has no grid and is all zeros

    x      (C, K)  float32, bfloat16, float16 or float64; one row a channel (C = 1 for a whole tensor)
    scale, lo, hi, shift  (C,)  float32 (float64 for a float64 x); lo and hi may be fractional while training
    q      (C, K)  dtype of x

`shift` is 0 for grids that hold zero and 1/2 for those that lie around it, such as {-1, +1} at one bit. Half to even
is part of the contract: at depth 0 the clamp of arXiv 2301.13142 leaves -0.5, which another rule would turn into -1.

Gradients (straight through the rounding), each row sum over its K elements; NaN counts as inside:

    dq/dx     = 1 inside, 0 outside
    dq/dscale = code - v inside, code + shift outside
    dq/dlo    = scale where v < lo            dq/dhi = scale where v > hi

The backward recomputes from x and keeps nothing else. Floor in float32: 8 bytes an element forward (read x, write q),
12 backward (read grad and x, write grad_x); at a few operations an element both are bound by memory. Measured at
4096 x 4096 on two cores with AVX-512: 1.3 times the time of copies of the same bytes past the caches, both together.
What is left is arithmetic, first of all the division: a product with 1 / scale would give other codes next to a tie.

Results of 256 KiB and more on the CPU lie in memory that is used again (csrc/memory.h): fresh pages cost several times
what the kernel does with them. Such a result behaves as any tensor, but its storage cannot grow (`resize_`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import extension
from .op import LIBRARY, Op


def reference(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """The meaning; see the module's docstring."""
    s, low, high, z = (t[:, None] for t in (scale, lo, hi, shift))
    code = torch.minimum(torch.maximum(x / s - z, low), high).round()
    return torch.where(high > low, (code + z) * s, 0.0).to(x.dtype)


def reference_backward(
    grad: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed forms of the module's docstring: gradients of x, scale, lo, hi."""
    s, low, high, z = (t[:, None] for t in (scale, lo, hi, shift))
    v = x / s - z
    code = torch.minimum(torch.maximum(v, low), high).round()
    alive = high > low
    below, above = (v < low) & alive, (v > high) & alive
    inside = alive & ~below & ~above
    g = grad.to(scale.dtype)
    slope = torch.where(inside, code - v, torch.where(below | above, code + z, 0.0))
    return (
        torch.where(inside, grad, 0.0).to(x.dtype),
        torch.where(alive, g * slope, 0.0).sum(1),
        torch.where(below, g * s, 0.0).sum(1),
        torch.where(above, g * s, 0.0).sum(1),
    )


def cases() -> dict[str, tuple[Tensor, ...]]:
    """Small inputs, named after the edge each presses on."""
    make = torch.Generator().manual_seed(0)

    def case(channels: int, width: int, lo: float = -8.0, hi: float = 7.0, shift: float = 0.0, dtype=torch.float32):
        x = torch.randn(channels, width, generator=make).to(dtype)
        vector = torch.ones(channels)
        return x, 0.05 + 0.3 * torch.rand(channels, generator=make), lo * vector, hi * vector, shift * vector

    ties = (torch.arange(-40, 40) / 2.0).repeat(3, 1)
    mixed = case(9, 65)
    mixed_bits = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 8])
    half = torch.where(mixed_bits > 0, torch.exp2(mixed_bits - 1), 0.0)
    odd = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-38, 3e38, 0.3]]).repeat(2, 1)
    columns = case(70, 33)
    return {
        "one-element": case(1, 1),
        "one-row-of-many": case(1, 70_001),
        "many-rows-of-one": case(1_025, 1),
        "one-before-a-vector": case(5, 7),
        "one-past-a-vector": case(5, 9),
        "one-before-a-block": case(3, 1_023),
        "one-past-a-block": case(3, 8_193),
        "no-rows": case(0, 5),
        "no-columns": case(5, 0),
        "pruned": case(4, 64, 0.0, 0.0),
        "negative-range": case(4, 64, 0.5, -1.5),
        "fractional-ends": case(4, 64, -(2.0**1.7), 2.0**1.7 - 1),
        "between-zero-and-one-bit": case(4, 64, -(2.0**-0.5), 2.0**-0.5 - 1),
        "one-bit-around-zero": case(4, 64, -1.0, 0.0, 0.5),
        "unsigned": case(4, 64, 0.0, 255.0),
        "every-value-a-tie": (ties, torch.ones(3), -15 * torch.ones(3), 15 * torch.ones(3), torch.zeros(3)),
        "every-width-at-once": (*mixed[:2], -half, (half - 1).clamp_min(0), mixed[4]),
        "nan-and-infinity": (odd, torch.ones(2), -8 * torch.ones(2), 7 * torch.ones(2), torch.zeros(2)),
        "not-contiguous": (columns[0].t()[:, ::2], *case(33, 1)[1:]),
        "bfloat16": case(6, 129, dtype=torch.bfloat16),
        "float16": case(6, 129, dtype=torch.float16),
    }


def backward_cases() -> dict[str, tuple[Tensor, ...]]:
    """The forward's cases with a random upstream gradient; infinite inputs are the forward's business."""
    return with_random_upstream({name: c for name, c in cases().items() if name != "nan-and-infinity"})


def with_random_upstream(of: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
    """Arguments of a backward from those of its forward, x first."""
    make = torch.Generator().manual_seed(1)
    return {name: (torch.randn(c[0].shape, generator=make).to(c[0].dtype), *c) for name, c in of.items()}


def with_upstream_of_ones(of: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
    """The same for benches, where values do not matter."""
    return {name: (torch.ones_like(c[0]), *c) for name, c in of.items()}


def bench_cases() -> dict[str, tuple[Tensor, ...]]:
    """Weights of deployment size, four bits."""
    make = torch.Generator().manual_seed(2)
    return {
        f"{c}x{k}": (
            torch.randn(c, k, generator=make),
            0.3 * torch.ones(c),
            -8 * torch.ones(c),
            7 * torch.ones(c),
            torch.zeros(c),
        )
        for c, k in ((64, 576), (512, 512), (1024, 4096), (4096, 4096))
    }


OP = Op(
    name="fake_quantize",
    schema="(Tensor x, Tensor scale, Tensor lo, Tensor hi, Tensor shift) -> Tensor",
    reference=reference,
    fake=lambda x, scale, lo, hi, shift: torch.empty_like(x, memory_format=torch.contiguous_format),
    cases=cases,
    bench_cases=bench_cases,
    traffic=lambda x, *_: 2 * x.numel() * x.element_size() + 16 * x.shape[0],
    operations=lambda x, *_: 6 * x.numel(),
)


def _fake_backward(grad: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor):
    rows = (torch.empty_like(scale), torch.empty_like(scale), torch.empty_like(scale))
    return torch.empty_like(x, memory_format=torch.contiguous_format), *rows


BACKWARD = Op(
    name="fake_quantize_backward",
    schema="(Tensor grad, Tensor x, Tensor scale, Tensor lo, Tensor hi, Tensor shift)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference_backward,
    fake=_fake_backward,
    cases=backward_cases,
    bench_cases=lambda: with_upstream_of_ones(bench_cases()),
    traffic=lambda grad, x, *_: 3 * x.numel() * x.element_size() + 28 * x.shape[0],
    operations=lambda grad, x, *_: 14 * x.numel(),
)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, lo, hi, shift):
        ctx.save_for_backward(x, scale, lo, hi, shift)
        return OP(x, scale, lo, hi, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *BACKWARD(grad, *ctx.saved_tensors), None


def fake_quantize(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor | None = None) -> Tensor:
    """Round each row of `x` to its grid; differentiable in all but `shift` (first order only).

    Args:
        x: (C, K) real values, any layout.
        scale: (C,) step of the grid, positive; real = (code + shift) * scale.
        lo: (C,) lowest code.
        hi: (C,) highest code; a row with hi <= lo is all zeros.
        shift: (C,) what a code of 0 stands for, in steps; zeros where absent.

    Returns:
        (C, K) in the dtype of `x`.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if shift is None:
        shift = torch.zeros_like(scale)
    _check(x, scale, lo, hi, shift)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, scale, lo, hi)):
        return _FakeQuantize.apply(x, scale, lo, hi, shift)
    return OP(x, scale, lo, hi, shift)


def _check(x: Tensor, *vectors: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"fake_quantize: x has shape {tuple(x.shape)}; want (channels, width): use x.flatten(1)")
    for name, v in zip(("scale", "lo", "hi", "shift"), vectors, strict=True):
        if v.dim() != 1 or v.shape[0] != x.shape[0]:
            raise ValueError(
                f"fake_quantize: {name} has shape {tuple(v.shape)}; want ({x.shape[0]},), one value a row of x"
            )


# ---- many tensors at once: every layer of a network in one call ----

Grid = tuple[Tensor, Tensor, Tensor, Tensor]


def _many_reference(x: list[Tensor], *vectors: list[Tensor]) -> list[Tensor]:
    return [OP(*one) for one in zip(x, *vectors, strict=True)]


def _many_reference_backward(*lists: list[Tensor]) -> list[Tensor]:
    each = [BACKWARD(*one) for one in zip(*lists, strict=True)]
    return [t for kind in zip(*each, strict=True) for t in kind]


def _many_cases(one: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[list[Tensor], ...]]:
    chosen = [one[k] for k in ("one-past-a-block", "pruned", "every-width-at-once", "one-element")]
    return {"several-shapes": tuple(map(list, zip(*chosen, strict=True))), "none": tuple([] for _ in chosen[0])}


MANY = Op(
    name="fake_quantize_many",
    schema="(Tensor[] x, Tensor[] scale, Tensor[] lo, Tensor[] hi, Tensor[] shift) -> Tensor[]",
    reference=_many_reference,
    fake=lambda x, *_: [torch.empty_like(t, memory_format=torch.contiguous_format) for t in x],
    cases=lambda: _many_cases(cases()),
    traffic=lambda *lists: sum(OP.traffic(*one) for one in zip(*lists, strict=True)),
    operations=lambda *lists: sum(OP.operations(*one) for one in zip(*lists, strict=True)),
)
MANY_BACKWARD = Op(
    name="fake_quantize_many_backward",
    schema="(Tensor[] grad, Tensor[] x, Tensor[] scale, Tensor[] lo, Tensor[] hi, Tensor[] shift) -> Tensor[]",
    reference=_many_reference_backward,
    fake=lambda grad, x, scale, lo, hi, shift: [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (*x, *scale, *scale, *scale)
    ],
    cases=lambda: _many_cases(backward_cases()),
    traffic=lambda *lists: sum(BACKWARD.traffic(*one) for one in zip(*lists, strict=True)),
    operations=lambda *lists: sum(BACKWARD.operations(*one) for one in zip(*lists, strict=True)),
)


class _FakeQuantizeMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *flat):
        ctx.count = count
        ctx.set_materialize_grads(False)  # a tensor without a use keeps no gradient, not one of zeros
        ctx.save_for_backward(*flat)
        return tuple(MANY(*_split(flat, count)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        used = [i for i, grad in enumerate(grads) if grad is not None]
        found = [None] * (5 * ctx.count)
        lists = [[tensors[i] for i in used] for tensors in (grads, *_split(ctx.saved_tensors, ctx.count))]
        for kind, gradients in enumerate(_split(MANY_BACKWARD(*lists), len(used)) if used else ()):
            for i, gradient in zip(used, gradients, strict=True):
                found[kind * ctx.count + i] = gradient
        return None, *found


def _split(flat: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    return [list(flat[i : i + count]) for i in range(0, len(flat), count)]


def fake_quantize_many(rows: Sequence[Tensor], grids: Sequence[Grid]) -> tuple[Tensor, ...]:
    """`fake_quantize` of several tensors in one call: `rows[i]` (C_i, K_i) on `grids[i]` = (scale, lo, hi, shift).

    Raises:
        ValueError: If the two sequences differ in length or a shape does not fit.
    """
    if len(rows) != len(grids):
        raise ValueError(f"fake_quantize_many: {len(rows)} tensors but {len(grids)} grids; want one grid a tensor")
    for x, grid in zip(rows, grids, strict=True):
        _check(x, *grid)
    if not rows:
        return ()
    flat = [*rows, *(vector for kind in zip(*grids, strict=True) for vector in kind)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in flat):
        return _FakeQuantizeMany.apply(len(rows), *flat)
    return tuple(MANY(*_split(flat, len(rows))))


# ---- memory of large results ----

LIBRARY.define("_held_memory() -> int[]")
LIBRARY.define("_release_memory() -> ()")
LIBRARY.define("_uninitialised(Tensor like) -> Tensor")  # for tests, as the next
LIBRARY.define("_set_stream_from(int bytes) -> int")
LIBRARY.define("_stream(Tensor a, Tensor? b, Tensor(z!) to) -> ()")  # to = a, or a + b: the floor, for benches


def held_memory() -> tuple[int, int]:
    """Bytes of large CPU results that are in use, and those kept to be used again; zeros without the extension."""
    if not extension.LOADED:
        return 0, 0
    used, free = torch.ops.sgsc._held_memory()
    return used, free


def release_memory() -> None:
    """Give back to the system what is kept to be used again, as after training or before a fork."""
    if extension.LOADED:
        torch.ops.sgsc._release_memory()
