"""Packed layers and networks against what a user would run instead on a CPU: in one process, taking turns.

    convolution   packed convolutions against torch in float32 and onnxruntime in float32 and int8
    network       ResNet-20, and a transformer of 4 layers of width 256 without a cache of keys and values (all tokens
                  of the input go through all layers and the head), against torch and onnxruntime, float and int8;
                  ours and float torch eager, by torch.compile, and exported ahead of time by AOTInductor
    load          seconds and peak memory of loading 64 MiB of packed weights, and the repacking alone
    overhead      microseconds of a call where there is next to nothing to compute
    static        inputs on a grid that is known beforehand, beside int8 whose steps are measured and exact numerics

Everyone computes with the same weights, those that the packed layers hold, and a row is written only for a result that
was judged against float64 in the same run. Int8 of others has weights of 8 bits, ours 4 in the mean. Ratios are peer
time over ours: below 1 the peer is faster. Activations come from the caches, as between the layers of a network. A peer
that is not here, fails or is wrong is named with its reason, in its row and in the claims; one of ours ends the bench.

python -m bench.deployment [--quick --results FOLDER] [section ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import deployment_peers as peers
from .deployment_memory import measure_load, measure_overhead
from .deployment_networks import (
    EIGHT,
    MIXED,
    NETWORKS,
    SMALL,
    calling,
    compressed,
    convolution,
    exact_result,
    with_numerics,
)
from .deployment_static import measure_static
from .deployment_timing import OURS, Contender, Row, measured
from .record import claim, write

NAME = "deployment"
BUDGET = 0.3  # seconds of visits to each contender of a case
THREADS = (1, 2)
NUMERICS = ("exact", "int8")
# Relative errors that a result may have. A layer: float sums, int8 activations. A network: errors of its layers add up;
# twice the largest of ours in int8, which over random inputs is 0.018 (ResNet-20; the transformers 0.015).
EXACT, INT8, NETWORK_EXACT, NETWORK_INT8 = 1e-4, 5e-2, 1e-3, 4e-2

LAYERS = {  # channels, kernel, groups, image
    "3x3 64-64 at 32x32": (64, 3, 1, 32),
    "1x1 256-256 at 16x16": (256, 1, 1, 16),
    "depthwise 3x3 64 at 32x32": (64, 3, 64, 32),
}
FLOAT, QUANTIZED = "F.conv2d float32", "onnxruntime int8"

Measured = tuple[list[Row], list[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the chosen sections and write each."""
    chosen = options(arguments)
    before = torch.get_num_threads()
    try:
        for section in chosen.sections:
            rows, claims = SECTIONS[section](0.0 if chosen.quick else BUDGET, chosen.quick)
            torch.set_num_threads(max(THREADS))  # what the stamp says; rows say theirs
            path = write(NAME, section, rows, claims, f"python -m bench.deployment {section}", chosen.results)
            lost = sum(not c["holds"] for c in claims)
            print(f"{section}: {len(rows)} rows, {lost} of {len(claims)} claims do not hold; {path}", file=sys.stderr)
    finally:
        torch.set_num_threads(before)
    return 0


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Packed layers and networks against what else runs on a CPU.")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, once; needs --results")
    parser.add_argument("--results", type=Path, default=None, help="folder of the results (default: bench/results)")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"sections {', '.join(unknown)} are not known; choose from {', '.join(SECTIONS)}")
    if found.quick and found.results is None:
        parser.error("--quick measures too little for bench/results; name another folder with --results")
    found.sections = found.sections or list(SECTIONS)
    return found


# ---- convolution ----


def measure_convolution(budget: float, quick: bool) -> Measured:
    """Rows and claims of the section "convolution"."""
    rows = []
    layers = {"3x3 8-8 at 6x6": (8, 3, 1, 6), "depthwise 3x3 8 at 6x6": (8, 3, 8, 6)} if quick else LAYERS
    for name, (channels, kernel, groups, size) in layers.items():
        packed, plain = convolution(MIXED, channels, kernel, groups)
        packed8, plain8 = convolution(EIGHT, channels, kernel, groups)
        for batch in (1, 2) if quick else (1, 32):
            x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))
            for threads in THREADS[:1] if quick else THREADS:
                torch.set_num_threads(threads)
                case = {"case": name, "batch": batch, "threads": threads}
                rows += measured(case, contending_layers(packed, plain, packed8, plain8, x, threads), budget)
    return rows, convolution_claims(rows)


def contending_layers(
    packed: nn.Module, plain: nn.Conv2d, packed8: nn.Module, plain8: nn.Conv2d, x: Tensor, threads: int
) -> dict[str, Contender]:
    """Ours at mixed widths and at 8 bits; the others on the weights of the mixed layer."""
    exact = exact_result(plain, x)
    found = {}
    for widths, layer, its in (("mixed", packed, exact), ("8 bits", packed8, exact_result(plain8, x))):
        for numerics, allowed in zip(NUMERICS, (EXACT, INT8), strict=True):
            make = lambda layer=layer, numerics=numerics: calling(with_numerics(layer, numerics), x)  # noqa: E731
            found[f"{OURS} {widths} {numerics}"] = Contender(make, its, allowed)

    def float32() -> peers.Run:
        geometry = (plain.stride, plain.padding, plain.dilation, plain.groups)
        return lambda: F.conv2d(x, plain.weight, plain.bias, *geometry)

    found[FLOAT] = Contender(float32, exact, EXACT)
    found["onnxruntime float32"] = Contender(lambda: peers.onnx_conv(plain, x, threads), exact, EXACT)
    for name, make in (("ConvInteger", peers.onnx_conv_integer), ("QLinearConv", peers.onnx_qlinear_conv)):
        found[f"{QUANTIZED} {name}"] = Contender(lambda make=make: make(plain, x, threads), exact, INT8)
    return found


def convolution_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Our slowest width of each numerics against torch, and of int8 against the best int8 of onnxruntime."""
    pairs = [(numerics, "F.conv2d in float32", FLOAT) for numerics in NUMERICS]
    pairs.append(("int8", "the best int8 of onnxruntime", QUANTIZED))
    return [
        ahead(f"convolution, {numerics}, against {them}", rows, numerics, max, theirs)
        for numerics, them, theirs in pairs
    ]


# ---- network ----


def measure_network(budget: float, quick: bool) -> Measured:
    """Rows and claims of the section "network"."""
    rows = []
    for name, build in (SMALL if quick else NETWORKS).items():
        torch.manual_seed(0)
        network, x = build()
        packed, plain = compressed(network, MIXED)
        graphs = peers.Exported(plain, x)
        for threads in THREADS[:1] if quick else THREADS:
            torch.set_num_threads(threads)
            contenders = contending_networks(packed, plain, graphs, x, threads)
            rows += measured({"case": name, "threads": threads}, contenders, budget)
    return rows, network_claims(rows)


def contending_networks(
    packed: nn.Module, plain: nn.Module, graphs: peers.Exported, x: Tensor, threads: int
) -> dict[str, Contender]:
    """Ours in both numerics; the others on the same values."""
    exact = exact_result(plain, x)
    forms = {"eager": calling, "compiled": peers.compiled, "exported": peers.exported}
    found = {}
    for numerics, allowed in zip(NUMERICS, (NETWORK_EXACT, NETWORK_INT8), strict=True):
        for form, run in forms.items():
            make = lambda run=run, numerics=numerics: run(with_numerics(packed, numerics), x)  # noqa: E731
            found[f"{OURS} {form} {numerics}"] = Contender(make, exact, allowed)
    others: dict[str, tuple[Callable[[], peers.Run], float]] = {
        **{f"torch float32 {form}": (lambda run=run: run(plain, x), NETWORK_EXACT) for form, run in forms.items()},
        "torch int8 dynamic": (lambda: peers.torch_dynamic(plain, x), NETWORK_INT8),
        "torch int8 static": (lambda: peers.torch_static(plain, x), NETWORK_INT8),
    }
    for form, allowed in (("float32", NETWORK_EXACT), ("dynamic", NETWORK_INT8), ("static", NETWORK_INT8)):
        name = "onnxruntime float32" if form == "float32" else f"{QUANTIZED} {form}"
        others[name] = (lambda form=form: peers.session(graphs.graph(form), x, threads), allowed)
    return found | {name: Contender(make, exact, allowed) for name, (make, allowed) in others.items()}


def network_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each network, our best form in either numerics; exact also against float32 alone."""
    pairs = [("int8", "everyone else", ""), ("exact", "everyone else", ""), ("exact", "float32 of others", "float32")]
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        its = [row for row in rows if row["case"] == case]
        for numerics, them, theirs in pairs:
            text = f"{case}, {numerics}, against {them}"
            found.append(ahead(text, its, numerics, min, theirs))
    return found


def ahead(
    text: str, rows: Sequence[Row], numerics: str, pick: Callable[[list[float]], float], theirs: str
) -> dict[str, Any]:
    """That ours is at least as fast as each of theirs, in the worst case, which is named, as are those who are missing.

    Args:
        text: What is claimed.
        rows: Of several cases; one that none of theirs was timed in is the worst of all.
        numerics: Of ours.
        pick: Which of our times of a case stands for ours: `max` or `min`.
        theirs: What the names of the others contain.

    Raises:
        ValueError: If ours was not timed in a case.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        case = [row["case"], *([f"batch {row['batch']}"] if "batch" in row else []), f"threads {row['threads']}"]
        cases.setdefault(", ".join(case), []).append(row)
    found: list[tuple[float | None, str]] = []
    missing: dict[str, list[str]] = {}
    for case, its in cases.items():
        ours = [row["microseconds"] for row in its if row["by"].startswith(OURS) and row["by"].endswith(numerics)]
        others = [row for row in its if not row["by"].startswith(OURS) and theirs in row["by"]]
        if not ours or None in ours:
            raise ValueError(f"{text}: {case} lacks a time of ours in {numerics} numerics; nothing can be claimed")
        for row in others:
            if row["missing"]:
                missing.setdefault(row["by"], []).append(row["missing"])
        timed = [row for row in others if not row["missing"]]
        best = min(timed, key=lambda row: row["microseconds"], default=None)
        found.append((best["microseconds"] / pick(ours), f"{case}, {best['by']}") if best else (None, case))
    ratio, where = min(found, key=lambda f: -1.0 if f[0] is None else f[0])
    said = f"{text}; {'not measured' if ratio is None else 'the worst is'} {where}"
    if missing:
        said += f"; without {', '.join(absent(by, reasons, len(cases)) for by, reasons in missing.items())}"
    return claim(said, 1.0, ratio, "times as fast", at_least=1.0)


def absent(by: str, reasons: Sequence[str], cases: int) -> str:
    """Who is missing, where not everywhere in how many cases, and the first reason."""
    some = "" if len(reasons) == cases else f" in {len(reasons)} of {cases} cases"
    return f"{by}{some} ({reasons[0]})"


SECTIONS: dict[str, Callable[[float, bool], Measured]] = {
    "convolution": measure_convolution,
    "network": measure_network,
    "load": measure_load,
    "overhead": measure_overhead,
    "static": measure_static,
}

if __name__ == "__main__":
    sys.exit(main())
