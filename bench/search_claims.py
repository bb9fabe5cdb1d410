"""What the search claims, from its rows, and the README's tables of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cells import spread, table
from .record import claim

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
OURS, THEIRS = "k-means TPE", ("TPE, multivariate", "TPE, independent")
FEWER, RANDOM_TRIALS, SAVED = 12, 1000, 0.20


def trials_of(rows: Rows, layers: int, method: str) -> dict[int, int]:
    """Seed -> trials."""
    return {r["seed"]: r["trials"] for r in rows if (r["layers"], r["method"]) == (layers, method)}


def surrogate_claims(rows: list[Row]) -> list[Row]:
    """At least 12 times fewer trials than random search, and fewer than either form of Optuna's TPE."""
    made = []
    for layers in sorted({r["layers"] for r in rows}):
        ours = trials_of(rows, layers, OURS)
        if not ours:
            continue
        what = f"{layers} layers: trials to reach what random reaches in {RANDOM_TRIALS:,}, against"
        ratio = RANDOM_TRIALS / statistics.median(ours.values())
        made.append(claim(f"{what} random, median of {len(ours)} seeds", FEWER, ratio, "times fewer", at_least=FEWER))
        for other in THEIRS:
            theirs = trials_of(rows, layers, other)
            both = sorted(ours.keys() & theirs.keys())
            if both:
                ratio = statistics.median(theirs[s] for s in both) / statistics.median(ours[s] for s in both)
                text = f"{what} Optuna's {other}, medians of {len(both)} seeds"
                made.append(claim(text, 1, ratio, "times fewer", at_least=1))
    return made


def proposal_claims(rows: list[Row]) -> list[Row]:
    """Under 50 ms."""
    ours = [r["milliseconds"] for r in rows if r["method"] == OURS]
    what = "a proposal at 60 parameters and 500 trials, slowest median of the seeds"
    return [claim(what, 50, max(ours), "ms", at_most=50)] if ours else []


def kill_claims(rows: list[Row]) -> list[Row]:
    """Nothing acknowledged is lost, nothing hangs, and opening is quick."""
    made = []
    for row in rows:
        what = f"{row['kills']} kill -9 at random moments"
        made += [
            claim(f"{what}: acknowledged trials lost", 0, row["lost"], f"of {row['acknowledged']}", at_most=0),
            claim(f"{what}: running trials of dead workers", 0, row["zombies"], "trials", at_most=0),
            claim(f"{what}: slowest opening", 5, row["slowest_opening_seconds"], "s", at_most=5),
        ]
    return made


def network_claims(rows: list[Row]) -> list[Row]:
    """20 % fewer bytes than the best baseline at its loss, and no worse than Optuna's TPE."""
    made = []
    for schedule in dict.fromkeys(r["schedule"] for r in rows):
        mine = [r for r in rows if r["schedule"] == schedule]
        ours = [r for r in mine if r["method"] == "kmeans-tpe" and r["best_baseline"]]
        if not ours:
            continue
        name = f"{ours[0]['task']}, {schedule}, {len(ours)} seeds"
        saved = [1 - (r["bytes_at_baseline_loss"] or r["best_baseline_bytes"]) / r["best_baseline_bytes"] for r in ours]
        text = f"{name}: fewer bytes than the best of uniform, greedy and integer program, at its validation loss"
        made.append(claim(text, SAVED, statistics.fmean(saved), "share", at_least=SAVED))
        for other in ("tpe", "random"):
            pairs = [
                (r["best_short_loss"], o["best_short_loss"])
                for r in ours
                for o in mine
                if o["method"] == other and o["seed"] == r["seed"] and o["best_short_loss"] is not None
            ]
            pairs = [(a, b) for a, b in pairs if a is not None]
            if pairs:
                ratio = statistics.fmean(b for _, b in pairs) / statistics.fmean(a for a, _ in pairs)
                made.append(
                    claim(f"{name}: best loss of {other} over ours, same trials", 1, ratio, "times", at_least=1)
                )
    return made


# ---- tables ----


def surrogate_table(rows: Rows) -> str:
    """A number of layers a line, a method a column: median trials and quartiles."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    lines = []
    for layers in sorted({r["layers"] for r in rows}):
        cells = []
        for method in methods:
            found = list(trials_of(rows, layers, method).values())
            most = max((r["most"] for r in rows if r["method"] == method), default=0)
            low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found * 3 or [0] * 3)
            shown = [f"over {most:,}" if v > most else f"{v:,.0f}" for v in (low, middle, high)]
            few = f", {len(found)} seeds" if len(found) != len(trials_of(rows, layers, methods[0])) else ""
            cells.append(f"{shown[1]} ({shown[0]} to {shown[2]}){few}" if found else "")
        lines.append([str(layers), str(len(trials_of(rows, layers, methods[0]))), *cells])
    note = (
        "Trials to reach what 1,000 random trials reach on surrogates of layers (bench/search_surrogates.py), median "
        "(quartiles). Configurations over the budget are not counted for any method."
    )
    return f"{table(['layers', 'seeds', *methods], lines)}\n\n{note}"


def proposal_table(rows: Rows) -> str:
    """Milliseconds, a method a line."""
    methods = dict.fromkeys(r["method"] for r in rows)
    lines = [[m, spread([r["milliseconds"] for r in rows if r["method"] == m], ".1f")] for m in methods]
    return f"{table(['sampler', 'ms a proposal'], lines)}\n\nAt 60 parameters and 500 trials, in memory."


def kill_table(rows: Rows) -> str:
    """One line a run."""
    head = ["kills", "acknowledged trials", "lost", "left running", "opening, median (slowest), s"]
    keys = ("kills", "acknowledged", "lost", "zombies")
    times = [f"{r['median_opening_seconds']:.2f} ({r['slowest_opening_seconds']:.2f})" for r in rows]
    return table(head, [[*(str(r[k]) for k in keys), time] for r, time in zip(rows, times, strict=True)], text=0)


def network_table(rows: Rows) -> str:
    """A sampler a line, over seeds."""
    lines = []
    for schedule, method in dict.fromkeys((r["schedule"], r["method"]) for r in rows):
        group = [r for r in rows if (r["schedule"], r["method"]) == (schedule, method)]

        def shown(key: str, form: str, factor: float = 1.0, group: Rows = group) -> str:
            found = [factor * r[key] for r in group if r[key] is not None]
            return spread(found, form) if found else ""

        lines.append(
            [
                *(method, schedule, group[0]["budget"], str(len({r["seed"] for r in group})), str(group[0]["trials"])),
                *(shown("best_short_loss", ".4f"), shown("best_baseline_short_loss", ".4f")),
                *(shown("bytes_at_baseline_loss", ",.0f"), shown("best_baseline_bytes", ",.0f")),
                *(shown("stored_ratio", ".2f", 100), shown("float_accuracy", ".2f", 100)),
                *(shown("packed_accuracy", ".2f", 100), shown("preparation_seconds", ".0f"), shown("seconds", ".0f")),
            ]
        )
    head = ["sampler", "schedule", "budget", "seeds", "trials", "best loss", "best baseline's", "bytes at that loss"]
    head += ["baseline's bytes", "stored, % of float32 bytes", "float accuracy, %", "packed accuracy, %"]
    head += ["preparation, s", "all, s"]
    note = (
        "Losses are those of the validation split after the short training of a trial; accuracies those of the test "
        "split after the last training. Mean over the seeds (least to most)."
    )
    return f"{table(head, lines, text=3)}\n\n{note}"


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    "surrogates": surrogate_table,
    "proposal": proposal_table,
    "kills": kill_table,
    "search-mnist": network_table,
    "search-resnet20": network_table,
}
