"""Packed layers whose input has a grid that is known beforehand, beside steps measured anew and beside float inputs.

All are judged against float64: those on a grid by the product with the rounded input, the others with the input as it
is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.packed import PackedProduct, input_grid

from .deployment_networks import MIXED, calling, compressed, exact_result, with_numerics
from .deployment_timing import OURS, Contender, Row, measured
from .record import claim

THREADS = (1, 2)
EXACT, INT8 = 1e-4, 5e-2  # relative errors that a result may have; a grid leaves nothing but the rounding of floats
MEASURED, STATIC, FLOATS, TORCH = f"{OURS} int8", f"{OURS} static int8", f"{OURS} exact", "torch float32"
CODES = (0, 255)  # as after a ReLU
SHARE = 2.5 / 255  # of a step of the grid that these codes take, in standard deviations

Case = tuple[nn.Module, Tensor]
Build = Callable[[], Case]


def _linear(size: int, tokens: int) -> Case:
    torch.manual_seed(0)
    return nn.Linear(size, size), torch.randn(tokens, size).relu()


def _convolution(channels: int, size: int, stride: int, batch: int) -> Case:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels // stride, channels, 3, stride=stride, padding=1, bias=False)
    return layer, torch.randn(batch, channels // stride, size * stride, size * stride).relu()


CASES: dict[str, Build] = {
    **{f"Linear {n}x{n}, {m} tokens": lambda n=n, m=m: _linear(n, m) for n in (512, 4096) for m in (1, 16, 128)},
    **{
        f"ResNet-20 3x3 {inputs}-{c} to {s}x{s}, batch {b}": lambda c=c, s=s, inputs=inputs, b=b: _convolution(
            c, s, c // inputs, b
        )
        for inputs, c, s in ((16, 16, 32), (16, 32, 16), (32, 32, 16), (32, 64, 8), (64, 64, 8))
        for b in (1, 32)
    },
}
SMALL: dict[str, Build] = {
    "Linear 32x32, 3 tokens": lambda: _linear(32, 3),
    "3x3 4-8 to 4x4, batch 2": lambda: _convolution(8, 4, 2, 2),
}


def measure_static(budget: float, quick: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows and claims of the section "static"."""
    rows = []
    for name, build in (SMALL if quick else CASES).items():
        layer, x = build()
        packed, plain = compressed(layer, MIXED)
        for threads in THREADS[:1] if quick else THREADS:
            torch.set_num_threads(threads)
            rows += measured({"case": name, "threads": threads}, contenders(packed, plain, x), budget)
    return rows, static_claims(rows)


def contenders(packed: nn.Module, plain: nn.Module, x: Tensor) -> dict[str, Contender]:
    """Float inputs, steps measured anew and a grid, on the same weights; and torch on these as floats."""
    exact = exact_result(plain, x)
    found = {
        TORCH: Contender(lambda: as_torch(plain, x), exact, EXACT),
        FLOATS: Contender(lambda: calling(with_numerics(packed, "exact"), x), exact, EXACT),
        MEASURED: Contender(lambda: calling(with_numerics(packed, "int8"), x), exact, INT8),
    }
    fixed = on_grid(packed)
    assert isinstance(fixed, PackedProduct)
    scale, low, high = fixed.get_buffer("input_grid").tolist()
    q = (x / scale).clamp(low, high).round() * scale
    rounded = exact_result(plain, q)
    return found | {STATIC: Contender(lambda: calling(with_numerics(fixed, "int8"), x), rounded, EXACT)}


def on_grid(packed: nn.Module) -> nn.Module:
    """A copy whose input has a grid."""
    fixed = copy.deepcopy(packed)
    assert isinstance(fixed, PackedProduct)
    fixed.input_grid = input_grid(SHARE, *CODES)
    fixed.lay_out()
    return fixed


def as_torch(plain: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """torch's own product."""
    if isinstance(plain, nn.Linear):
        return lambda: F.linear(x, plain.weight, plain.bias)
    return calling(plain, x)


def static_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """That a grid costs nothing beside steps measured anew, gains beside floats, and errs as floats do."""
    found = []
    for other, them in ((MEASURED, "int8 whose steps are measured anew"), (FLOATS, "exact numerics")):
        worst, where = min(ratios(rows, other), key=lambda found: found[0])
        text = f"int8 on a grid known beforehand, against {them}; the worst is {where}"
        found.append(claim(text, 1.0, worst, "times as fast", at_least=1.0))
    error, where = max((row["error"], place(row)) for row in rows if row["by"] == STATIC)
    text = f"int8 on a grid known beforehand, error against the product with the rounded input; the worst is {where}"
    return [*found, claim(text, 1e-6, error, "of its norm", at_most=1e-6)]


def ratios(rows: Sequence[Row], other: str) -> list[tuple[float, str]]:
    """Time of another over that on a grid, and where."""
    times = {(place(row), row["by"]): row["microseconds"] for row in rows}
    return [(times[at, other] / time, at) for (at, by), time in times.items() if by == STATIC]


def place(row: Row) -> str:
    """The case of a row in words."""
    return f"{row['case']}, threads {row['threads']}"
