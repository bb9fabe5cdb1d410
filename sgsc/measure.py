"""Timing: medians of interleaved rounds, and what every operation reaches of the copy bandwidth of the same run."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .kernels import OPS, backend, op

MOST = 4  # times the budget, spent on a contender in the mean
CLAIM = {"claim", "target", "measured", "unit", "holds"}  # what a claim of a result file says, at least


def interleaved(runs: Mapping[str, Callable[[], Any]], budget: float = 0.2) -> dict[str, list[float]]:
    """Seconds of each call, taking turns, so that a noisy machine disturbs all alike.

    Args:
        runs: What to time, by name; each is run once untimed first.
        budget: Seconds to spend on each; on fast ones less where slow ones would take MOST times that in the mean. At
            least five rounds are run.

    Raises:
        ValueError: If the budget is not a finite number of seconds.
    """
    if not 0 <= budget < float("inf"):
        raise ValueError(f"budget={budget}: want a finite number of seconds, 0 or more")
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    rounds = 0
    while rounds < 5 or (min(spent.values()) < budget and sum(spent.values()) < MOST * budget * len(runs)):
        rounds += 1
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
            spent[name] += times[name][-1]
    return times


def medians(runs: Mapping[str, Callable[[], Any]], budget: float = 0.2) -> dict[str, float]:
    """Median seconds of each call; see `interleaved`."""
    return {name: statistics.median(t) for name, t in interleaved(runs, budget).items()}


def copy_bandwidth(budget: float = 0.3) -> float:
    """Bytes a second, read plus written, of copying 64 MiB with all of torch's threads."""
    source = torch.ones(2**24)
    target = torch.empty_like(source)
    seconds = medians({"copy": lambda: target.copy_(source)}, budget)["copy"]
    return 2 * 4 * source.numel() / seconds


def agrees(operation: op.Op, arguments: tuple) -> bool:
    """Whether the operation's result is the reference's, loosely: a speed is shown for nothing else."""
    got, want = operation(*arguments), operation.reference(*arguments)
    pairs = zip(*(x if isinstance(x, (list, tuple)) else [x] for x in (got, want)), strict=True)
    return all(_near(a.double(), b.double()) for a, b in pairs)


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    largest = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and math.isfinite(largest) and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * largest)


def measure_ops(only: str | None = None, budget: float = 0.2) -> list[dict[str, Any]]:
    """Median time and throughput of every operation on its bench cases, beside its plain PyTorch reference.

    Raises:
        ValueError: If `only` names no operation that has bench cases, or the result of one is wrong.
    """
    chosen = {name: o for name, o in OPS.items() if only in (None, name) and o.bench_cases()}
    if not chosen:
        named = ", ".join(name for name, o in OPS.items() if o.bench_cases())
        raise ValueError(f"no operation {only!r} to measure; there are {named}")
    copy = copy_bandwidth()
    rows = []
    for name, operation in chosen.items():
        for case, arguments in operation.bench_cases().items():
            if not agrees(operation, arguments):
                raise ValueError(f"{name}, case {case}: the result is not the reference's; no speed is shown for it")
            runs = {
                backend(operation): lambda a=arguments, o=operation: o(*a),
                "cpu: reference": lambda a=arguments, o=operation: o.reference(*a),
            }
            for where, seconds in medians(runs, budget).items():
                rows.append(
                    {
                        "op": name,
                        "case": case,
                        "backend": where,
                        "microseconds": seconds * 1e6,
                        "gigabytes_per_second": operation.traffic(*arguments) / seconds / 1e9,
                        "share_of_copy": operation.traffic(*arguments) / seconds / copy,
                        "gigaoperations_per_second": operation.operations(*arguments) / seconds / 1e9,
                    }
                )
    return rows


def broken_claims(folder: Path) -> list[dict[str, Any]]:
    """Every claim of the result files in `folder` that does not hold, each with its file.

    Raises:
        ValueError: If the folder holds no result file, or one that is not such a file.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"no result files in {folder}; run `make bench`, or name the folder with --results")
    broken = []
    for path in files:
        try:
            claims = [{"file": path.name, **claim} for claim in json.loads(path.read_text())["claims"]]
            odd = [claim for claim in claims if not claim.keys() >= CLAIM or type(claim["holds"]) is not bool]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no result file ({type(error).__name__}: {error})") from None
        if odd:
            raise ValueError(f"{path}: a claim needs {', '.join(sorted(CLAIM))}, holds true or false; got {odd[0]}")
        broken += [claim for claim in claims if not claim["holds"]]
    return broken
