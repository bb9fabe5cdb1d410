"""Both sides of the choices that kernels/triton_packed.py makes by a number, and where the faster side changes.

    DENSE          tokens from which `packed_linear` goes through a dense copy of the weights
    DENSE_PIXELS   output pixels from which `packed_conv2d` does

EARLY is timed on both sides by gpu_chain.py. A row is one side at one number of columns; a crossover is the least
number of columns that was measured from which the dense side is the faster one, at that number and at all larger ones.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sgsc.kernels import OPS, packed_conv2d, packed_linear, triton_packed
from tests.checks import in_double

from .gpu_conv2d import GEOMETRY, tiles_of
from .gpu_device import Run, judge, race
from .gpu_linear import FEW_WIDTHS, JUDGED, SHAPES, copies_of, random_tiles, widths_of
from .record import claim

CROSSOVERS = "crossovers"  # the section of these
PACKED, DENSE = "ours, packed", "ours, dense"
SIDES = {PACKED: 2**62, DENSE: -1}  # the constant's value
SLOWER = 1.1  # times the time of the faster side: what the side that is chosen may take
TOKENS = (16, 64, 128, 256, 512, 1024, 2048)
LAYERS = {(64, 56): (1, 2, 4, 8), (256, 14): (4, 16, 32, 128), (512, 7): (16, 64, 128, 512)}  # channels, side: batches
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class Case(NamedTuple):
    """A product at one number of columns.

    Attributes:
        constant: Of triton_packed.py, that decides.
        case: The layer.
        columns: Tokens or output pixels.
        calls: One a copy of the weights.
        judged: The error of the first call's result, and what is wrong with it.
    """

    constant: str
    case: str
    columns: int
    calls: Sequence[Callable[[], Any]]
    judged: Callable[[Any], tuple[float, str]]


def forced(call: Callable[[], Any], **constants: int) -> Callable[[], Any]:
    """The call, while these constants of triton_packed.py have another value; in a graph that is captured so too."""

    def one() -> Any:
        before = {name: getattr(triton_packed, name) for name in constants}
        try:
            vars(triton_packed).update(constants)
            return call()
        finally:
            vars(triton_packed).update(before)

    return one


@torch.no_grad()
def measure(run: Run) -> None:
    """Write the section as it grows, and the crossovers beside it."""
    rows: list[dict[str, Any]] = []
    for case in (*linear_cases(run), *conv2d_cases(run)):
        if run.left() < 0:
            print(f"choices: no time left for {case().case} and what follows", file=sys.stderr)
            break
        rows += measure_case(run, case())
        run.put(rows, [])
        run.put(crossovers(rows), claims(rows), CROSSOVERS)


def linear_cases(run: Run) -> Iterator[Callable[[], Case]]:
    """Those of `packed_linear`, made when they are asked for."""
    shapes, counts = ({"32x256": (32, 256)}, (1, 17)) if run.quick else (SHAPES, TOKENS)
    for shape in shapes if run.quick else ("4096x4096", "8B gate_up"):
        for bits in FEW_WIDTHS[:1] if run.quick else FEW_WIDTHS:
            for tokens in counts:
                yield functools.partial(linear_case, run, shape, *shapes[shape], bits, tokens)


def linear_case(run: Run, shape: str, n: int, k: int, bits: int | str, tokens: int) -> Case:
    """A bfloat16 layer of random words."""
    make = torch.Generator(run.device.type).manual_seed(tokens)
    x = torch.randn(tokens, k, generator=make, device=run.device.type).to(torch.bfloat16)
    tiles = random_tiles(widths_of(n, bits), k, 1, run.device)
    sample = torch.linspace(0, tokens - 1, min(tokens, JUDGED), device=run.device.type).long()
    arguments = (x[sample], *tiles[:3], None, n, k, False)
    plain, exact = (OPS["packed_linear"].reference(*a) for a in (arguments, in_double(arguments)))
    calls = [functools.partial(packed_linear, x, t, None, k) for t in copies_of(tiles, run.device)]
    case = f"{shape}, {bits if bits == 'mixed' else f'{bits} bits'}"
    return Case("DENSE", case, tokens, calls, lambda y: judge(y[sample], plain, exact))


def conv2d_cases(run: Run) -> Iterator[Callable[[], Case]]:
    """Those of `packed_conv2d`, made when they are asked for."""
    for (channels, side), batches in ({(16, 5): (1,)} if run.quick else LAYERS).items():
        for layout in LAYOUTS:
            for batch in batches:
                yield functools.partial(conv2d_case, run, channels, side, batch, layout)


def conv2d_case(run: Run, channels: int, side: int, batch: int, layout: str) -> Case:
    """A 3x3 layer in float16, of 4 bits."""
    make = torch.Generator(run.device.type).manual_seed(channels + batch)
    x = torch.randn(batch, channels, side, side, generator=make, device=run.device.type).half()
    x, tiles = x.contiguous(memory_format=LAYOUTS[layout]), tiles_of(channels, 1, 4, run.device)
    arguments = (x, *tiles[:3], None, channels, *GEOMETRY, 1, False)
    plain, exact = (OPS["packed_conv2d"].reference(*a) for a in (arguments, in_double(arguments)))
    calls = [functools.partial(packed_conv2d, x, t, None, *GEOMETRY, 1) for t in copies_of(tiles, run.device)]
    case = f"3x3, {channels} channels, {side} px, {layout}"
    return Case("DENSE_PIXELS", case, batch * side * side, calls, lambda y: judge(y, plain, exact))


def measure_case(run: Run, case: Case) -> list[dict[str, Any]]:
    """A row a side; none where a result is wrong."""
    sides = {name: [forced(c, **{case.constant: value}) for c in case.calls] for name, value in SIDES.items()}
    errors = {}
    for name, (call, *_) in sides.items():
        errors[name], wrong = case.judged(call())
        if wrong:
            run.wrong.append(f"choices, {case.case}, {case.columns} columns, {name}: {wrong}")
            return []
    times, _ = race(run, sides)
    limit = getattr(triton_packed, case.constant)
    chosen, fastest = DENSE if case.columns > limit else PACKED, min(t.median for t in times.values())
    shown = ", ".join(f"{name} {t.median:,.1f} µs" for name, t in times.items())
    print(f"{case.case}, {case.columns} columns: {shown}", file=sys.stderr)
    return [
        {"constant": case.constant, "value": limit, "case": case.case, "columns": case.columns, "variant": name}
        | {"chosen": name == chosen, "microseconds": t.median, "eager_microseconds": t.eager, "graph": t.graph}
        | {"over_fastest": t.median / fastest, "error": errors[name], "rounds": t.rounds}
        for name, t in times.items()
    ]


def crossovers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a layer: from how many columns on the dense side is faster, None if it never is."""
    found = []
    for constant, value, case in dict.fromkeys((row["constant"], row["value"], row["case"]) for row in rows):
        over = {}  # how many times the packed side's time the dense one takes
        for row in (row for row in rows if row["case"] == case):
            over.setdefault(row["columns"], {})[row["variant"]] = row["microseconds"]
        ratios = {columns: sides[DENSE] / sides[PACKED] for columns, sides in sorted(over.items())}
        first = None
        for columns in reversed(ratios):
            if ratios[columns] >= 1:
                break
            first = columns
        found.append(
            {"constant": constant, "value": value, "case": case, "dense_from": first}
            | {"dense_over_packed": {str(columns): ratio for columns, ratio in ratios.items()}}
        )
    return found


def claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """That the chosen side of each constant is not much slower than the other, at worst."""
    found = []
    for constant in dict.fromkeys(row["constant"] for row in rows):
        chosen = [row for row in rows if row["constant"] == constant and row["chosen"]]
        worst = max(chosen, key=lambda row: row["over_fastest"])
        text = f"{constant} = {worst['value']}: the side that is chosen against the faster one"
        text += f"; worst: {worst['case']}, {worst['columns']} columns"
        found.append(claim(text, SLOWER, worst["over_fastest"], "times the time", at_most=SLOWER))
    return found
