"""PackedLinear against the matrix products that a user would take instead on a CPU, all measured in one run.

Each library lives in a process of its own, with its own threads; one that crashes or hangs is started again without the
call that did it. They are visited in shuffled order, round after round. Weights of large shapes come from memory:
before a visit other data is read through the caches, and copies of the weight take turns; small ones (CACHED) are
called many times and stay in the caches. A call that other processes delayed is left out. Nothing is timed whose result
is not right by its own weight.

A peer stands for the width of its codes and for that of its stored bytes, scales included, where these round to
another: a user of 3-bit weights may take either. Ratios are peer time over ours at that width, of the same numerics
where we have them; float peers are compared with our mixed widths.

    python -m bench.peers [--shapes 512x512,4096x4096] [--threads 1,2] [--batches 1,16] [--libraries ours,torch]

A section of the results is one shape and thread count, written whole; claims speak of all sections that are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .peer_claims import claims, widths
from .peer_libraries import LIBRARIES
from .peer_problem import EXACT, MIXED, READ, Problem
from .peer_workers import Worker
from .record import read, write

NAME = "cpu_peers"
SHAPES = ("512x512", "1024x1024", "4096x4096", "11008x4096", "4096x11008")
BATCHES = (1, 4, 16, 128, 512)
BUDGET = 12.0  # seconds for a number of rows of x, at least ROUNDS rounds
ROUNDS = 2
SLOW = 3.0  # times the fastest of its width and numerics: soon not visited again
LONGEST = 4.0, 0.2  # seconds of a call, and of one by the SLOW: what would take longer is left out
ENOUGH = 3  # undisturbed calls that a median may rest on; with fewer, all calls count
PAUSE = 0.004  # seconds between visits, for threads that spin after their work

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each shape and thread count, and write its section."""
    chosen = options(arguments)
    for shape in chosen.shapes:
        for threads in chosen.threads:
            rows = measure(shape, threads, chosen.batches, chosen.libraries, chosen.budget)
            command = f"python -m bench.peers --shapes {shape} --threads {threads}"
            torch.set_num_threads(threads)  # the machine of the rows
            write(NAME, f"{shape}, {threads} thread{'s' * (threads > 1)}", rows, [], command, chosen.results)
    found = claims([row for row in read(NAME, chosen.results)["rows"] if "missing" not in row])
    path = write(NAME, "claims", [], found, "python -m bench.peers", chosen.results)
    print(f"wrote {path}; {sum(not c['holds'] for c in found)} of {len(found)} claims do not hold", file=sys.stderr)
    return 0


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; --quick overrides the rest."""

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return sorted(int(n) for n in text.split(","))

    parser = argparse.ArgumentParser(description="PackedLinear against other libraries' products, on the CPU.")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, ours and torch; needs --results")
    parser.add_argument("--results", type=Path, default=None, help="folder of the results (default: bench/results)")
    parser.add_argument("--shapes", type=names, default=SHAPES, help="NxK,...")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--batches", type=numbers, default=BATCHES, help="rows of x")
    parser.add_argument("--libraries", type=names, default=list(LIBRARIES), help=",".join(LIBRARIES))
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for a number of rows, about")
    found = parser.parse_args(arguments)
    unknown = [name for name in found.libraries if name not in LIBRARIES]
    if unknown:
        parser.error(f"libraries {', '.join(unknown)} are not known; choose from {', '.join(LIBRARIES)}")
    if found.quick and found.results is None:
        parser.error("--quick measures too little for bench/results; name another folder with --results")
    if found.quick:
        found.shapes, found.threads, found.batches = ["64x128"], [1], [1, 4]
        found.libraries, found.budget = ["ours", "torch"], 0.0
    return found


def measure(shape: str, threads: int, batches: Sequence[int], libraries: Sequence[str], budget: float) -> list[Row]:
    """Rows of one shape and thread count; what was not timed has a row that says why."""
    n, k = (int(side) for side in shape.split("x"))
    cached = Problem.is_cached(n, k)
    budget /= 3 if cached else 1
    workers, known, rows = {}, {}, []
    try:
        for library in libraries:  # one after another: each may want all cores to pack
            workers[library] = Worker(library, n, k, threads, max(batches))
            seen, missing = workers[library].built()
            known |= {(library, name): it for name, it in seen.items()}
            rows += [{**said(library, name), "rows": None, "missing": why} for name, why in missing.items()]
            print(f"{shape}, {threads}: {library}, {len(seen)} ready, {len(missing)} missing", file=sys.stderr)
        last: dict[tuple[str, str], tuple[float, int]] = {}  # seconds of a call, and its m
        slower: dict[tuple[str, str], float] = {}
        for m in batches:
            start = time.perf_counter()
            errors, times, refused = {}, {}, {}
            for key, (bits, *_) in known.items():
                seconds, before = last.get(key, (0.0, 1))
                expected = (
                    seconds * m / before if before >= 16 else seconds
                )  # with few rows, weights are what takes time
                if bits == READ and m > 1:
                    continue
                if key[0] != "ours" and expected > LONGEST[slower.get(key, 1.0) > SLOW]:
                    many = f"{slower[key]:.0f} times the fastest of its width with fewer rows"
                    refused[key] = f"left out: about {expected:.1f} s a call, {many}"
                    continue
                errors[key], why = workers[key[0]].ask("check", key[1], m)
                if why is not None:
                    refused[key] = why
            for key in turns([key for key in errors if key not in refused], known, times, budget, m):
                samples, why = workers[key[0]].ask("visit", key[1], m)
                if why is None:
                    times.setdefault(key, []).extend(samples)
                else:
                    refused[key] = why
                time.sleep(PAUSE)
            timed = {key: t for key, t in times.items() if key not in refused}
            slower |= behind(timed, known)
            last |= {key: (min(seconds for seconds, _ in t), m) for key, t in timed.items()}
            made = [row(n * k, m, key, known[key], errors[key], t) for key in known if (t := timed.get(key))]
            rows += compared(made)
            rows += [{**said(*key), "rows": m, "missing": why} for key, why in refused.items()]
            print(
                f"{shape}, {threads} threads, M = {m}: {len(made)} in {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
            )
    finally:
        for worker in workers.values():
            worker.close()
    return [{"shape": shape, "threads": threads, "cached": cached, **r} for r in rows]


def turns(
    keys: Sequence[tuple[str, str]], known: Mapping[Any, Any], times: Mapping[Any, Any], budget: float, m: int
) -> Iterator[tuple[str, str]]:
    """Whom to visit next: all in shuffled order, round after round, the slowest of a width only in the first."""
    order, rng, start = list(keys), random.Random(0), time.perf_counter()
    rounds = 0
    while order and (rounds < ROUNDS or time.perf_counter() - start < budget):
        rng.shuffle(order)
        yield from order
        rounds += 1
        if rounds < ROUNDS and m <= 16:  # cheap enough to look twice
            continue
        times_of = {key: times[key] for key in order if key in times}
        order = [key for key, by in behind(times_of, known).items() if key[0] == "ours" or by <= SLOW]


def behind(times: Mapping[Any, Any], known: Mapping[Any, Any]) -> dict[tuple[str, str], float]:
    """How many times as long as the fastest of its width and numerics each takes."""
    best = {key: min(seconds for seconds, _ in samples) for key, samples in times.items()}
    fastest: dict[Any, float] = {}
    for key, seconds in best.items():
        fastest[known[key][:2]] = min(seconds, fastest.get(known[key][:2], seconds))
    return {key: seconds / fastest[known[key][:2]] for key, seconds in best.items()}


def said(library: str, name: str) -> Row:
    """Who it is, with the version."""
    try:
        version = importlib.metadata.version(LIBRARIES[library][1])
    except importlib.metadata.PackageNotFoundError:
        version = ""
    return {"library": library, "version": version, "candidate": name}


def row(
    weights: int,
    m: int,
    key: tuple[str, str],
    it: tuple[Any, str, int],
    error: float,
    samples: list[tuple[float, bool]],
) -> Row:
    """The measured part of a row."""
    clean = [seconds for seconds, undisturbed in samples if undisturbed]
    used = clean if len(clean) >= ENOUGH else [seconds for seconds, _ in samples]
    median = statistics.median(used)
    bits, numerics, size = it
    return {
        **said(*key),
        "rows": m,
        "bits": bits,
        "stored_bits": None if bits == READ else 8 * size / weights,
        "numerics": numerics,
        "error": error,
        "microseconds": median * 1e6,
        "minimum": min(used) * 1e6,
        "calls": len(samples),
        "undisturbed": len(clean),
        "gigabytes_per_second": size / median / 1e9,
    }


def compared(rows: list[Row]) -> list[Row]:
    """Rows of one number of rows of x, each with its time over ours; null where there is none of ours."""
    ours = {(r["bits"], r["numerics"]): r["microseconds"] for r in rows if r["library"] == "ours"}
    for r in rows:
        bits = r["bits"] if r["bits"] in widths(r) else MIXED
        mine = ours.get((bits, r["numerics"]), ours.get((bits, EXACT)))
        r["ratio"] = r["microseconds"] / mine if mine and r["bits"] != READ else None
    return rows


if __name__ == "__main__":
    sys.exit(main())
