"""Packed layers whose input has a grid that is known beforehand, beside steps measured anew and beside float inputs.

All are judged against float64: those on a grid by the product with the rounded input, the others with the input as it
is. Times are those that one thread computes (`time.thread_time`): what else runs on the machine does not count.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.packed import PackedProduct, input_grid

from .deployment_networks import MIXED, calling, compressed, exact_result, with_numerics
from .deployment_timing import OURS, Contender, Row, measured
from .record import claim

EXACT, INT8 = 1e-4, 5e-2  # relative errors that a result may have
ERROR = 1e-6  # the claim of a grid: it leaves nothing but the rounding of floats
NEARLY = 0.95  # and it divides, where a measured step multiplies, but looks at x once less
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
    torch.set_num_threads(1)
    rows = []
    for name, build in (SMALL if quick else CASES).items():
        layer, x = build()
        packed, plain = compressed(layer, MIXED)
        rows += measured({"case": name, "threads": 1}, contenders(packed, plain, x), budget, time.thread_time)
    return rows, static_claims(rows)


def contenders(packed: nn.Module, plain: nn.Module, x: Tensor) -> dict[str, Contender]:
    """Float inputs, steps measured anew and a grid, on the same weights; and torch on these as floats."""
    exact = exact_result(plain, x)
    found = {
        TORCH: Contender(lambda: calling(plain, x), exact, EXACT),
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


def static_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """That a grid costs next to nothing beside steps measured anew, gains beside floats, and errs as floats do."""
    found = []
    for other, them, target in ((MEASURED, "int8 whose steps are measured", NEARLY), (FLOATS, "exact numerics", 1.0)):
        worst, where = min(ratios(rows, other), key=lambda found: found[0])
        median = statistics.median(ratio for ratio, _ in ratios(rows, other))
        text = f"int8 on a grid known beforehand, against {them}, median; the worst, {worst:.2f}, is {where}"
        found.append(claim(text, target, median, "times as fast", at_least=target))
    error, where = max((row["error"], row["case"]) for row in rows if row["by"] == STATIC)
    text = f"int8 on a grid known beforehand, error against the product with the rounded input; the worst is {where}"
    return [*found, claim(text, ERROR, error, "of its norm", at_most=ERROR)]


def ratios(rows: Sequence[Row], other: str) -> list[tuple[float, str]]:
    """Time of another over that on a grid, and where."""
    of = {(row["case"], row["by"]): row["microseconds"] for row in rows}
    return [(of[case, other] / ours, case) for (case, by), ours in of.items() if by == STATIC]
