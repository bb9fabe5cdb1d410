"""Who may be timed, and how: contenders are judged first, then visited in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAUSE = 0.004  # seconds before a visit, for threads that spin after their work
VISIT = 0.01  # seconds that a visit lasts, about
FEWEST = 5  # visits
LONGEST_REASON = 200  # characters of why one is missing
OURS = "ours"  # how the names of our own contenders begin

Row = dict[str, Any]


class Contender(NamedTuple):
    """One way to compute a result.

    Attributes:
        make: Returns what to call; whatever it raises is the reason why a peer is missing.
        exact: The result in float64.
        allowed: Relative error that the result may have, Frobenius norm.
    """

    make: Callable[[], Callable[[], Any]]
    exact: Tensor
    allowed: float


def admit(contenders: Mapping[str, Contender], what: str) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
    """What to call, and the error, of those whose results are right; and of the other peers, why not.

    Raises:
        ValueError: If one of ours fails, or its result is wrong: no speed is written beside it.
    """
    runs, errors, missing = {}, {}, {}
    for name, (make, exact, allowed) in contenders.items():
        try:
            run = make()
            error = relative_error(run(), exact)
        except Exception as problem:  # whatever a library may raise
            missing[name] = f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:LONGEST_REASON]
            if name.startswith(OURS):
                raise ValueError(f"{what}, {name}: {missing[name]}; no speed is written without it") from problem
            continue
        if error <= allowed:  # NaN is wrong
            runs[name], errors[name] = run, error
        elif name.startswith(OURS):
            raise ValueError(f"{what}, {name}: error {error:.2g}, may have {allowed:g}; no speed is written for it")
        else:
            missing[name] = f"wrong: error {error:.2g}, may have {allowed:g}"
    return runs, errors, missing


def relative_error(found: Any, exact: Tensor) -> float:
    """Of a result, Frobenius norm; NaN where its shape is wrong."""
    found = torch.as_tensor(found).double()
    return float((found - exact).norm() / exact.norm()) if found.shape == exact.shape else float("nan")


def visited(
    runs: Mapping[str, Callable[[], Any]], budget: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds a call, one number a visit: all take turns, each after a pause and a call that warms the caches.

    Args:
        runs: What to time, by name.
        budget: Seconds of visits to each, at least; FEWEST visits are made.
        clock: What tells the seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, min(1000, int(VISIT / (clock() - start))))
    left = list(runs)
    while left:
        for name in left:
            time.sleep(PAUSE)
            runs[name]()
            start = clock()
            for _ in range(repeats[name]):
                runs[name]()
            times[name].append((clock() - start) / repeats[name])
        left = [name for name in left if len(times[name]) < FEWEST or sum(times[name]) * repeats[name] < budget]
    return times


def measured(
    case: Row, contenders: Mapping[str, Contender], budget: float, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """A row a contender: medians and minima by that clock, or why there is none."""
    what = ", ".join(map(str, case.values()))
    with torch.inference_mode():
        runs, errors, missing = admit(contenders, what)
        times = visited(runs, budget, clock)
    rows = []
    for name in contenders:
        seconds = times.get(name)
        rows.append(
            {
                **case,
                "by": name,
                "microseconds": statistics.median(seconds) * 1e6 if seconds else None,
                "fastest_microseconds": min(seconds) * 1e6 if seconds else None,
                "error": errors.get(name),
                "missing": missing.get(name),
            }
        )
    shown = ", ".join(f"{row['by']} {row['microseconds']:.0f}" for row in rows if not row["missing"])
    print(f"{what}: {shown} µs; {len(missing)} missing", file=sys.stderr)
    return rows
