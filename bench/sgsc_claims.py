"""What bench.sgsc claims of its rows.

A claim is made for each schedule that has rows, and names it unless it is the full one. It holds only where there are
as many seeds as it asks for: the others count as not yet measured.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import scipy.stats

from .record import claim
from .runs import Row

OFF_TARGET = 0.01  # of the target, that a stored size may be away from it
ACCURACY = {0.02: 0.994, 0.01: 0.985}  # MNIST: stored share -> to reach
LOSS = (0.10, 1.626)  # names: stored share, to reach
NO_WORSE = 0.20  # names: stored share at which the loss is to be no worse than the float network's
CHANCE = 0.05  # that a difference of means may come by chance


def schedules(rows: Iterable[Row]) -> list[str]:
    """Those of the rows, the full one first."""
    return sorted({row["schedule"] for row in rows}, key=lambda name: (name != "full", name))


def says(schedule: str) -> str:
    """What a claim adds about its schedule."""
    return "" if schedule == "full" else f" ({schedule} schedule)"


def pick(rows: Iterable[Row], **of: object) -> list[Row]:
    """The rows with these entries."""
    return [row for row in rows if all(row.get(key) == value for key, value in of.items())]


def over_seeds(
    text: str,
    rows: Sequence[Row],
    value: Callable[[Row], float],
    need: int,
    target: float,
    unit: str,
    least: bool,
    sure: bool = False,
) -> Row:
    """A claim on the mean over seeds: at least `target`, or else at most; `sure`: beyond chance, too.

    Chance is a t-test of the seeds, one-sided at 5 %. Rows of several commits are no one sample: the claim does not
    hold then, and says so.
    """
    seeds, commits = len({row["seed"] for row in rows}), {row.get("commit") for row in rows}
    found = [value(row) for row in rows]
    measured = statistics.fmean(found) if rows else None
    reached = measured is not None and (measured >= target if least else measured <= target)
    if reached and sure:
        side = "greater" if least else "less"
        spread = len(set(found)) > 1  # without any, chance cannot be told
        reached = spread and bool(scipy.stats.ttest_1samp(found, target, alternative=side).pvalue < CHANCE)
    count = f"mean of {seeds} seeds" if seeds >= need else f"mean of {seeds} of {need} seeds"
    count += f" at {len(commits)} commits" if len(commits) > 1 else ""
    made = claim(f"{text}, {count}", target, measured, unit, reached and seeds >= need and len(commits) <= 1)
    return made | _commit(commits)


def _commit(commits: set[str | None]) -> Row:
    """What the stamp of a claim takes from its rows: their commit, where they have one."""
    (only,) = commits if len(commits) == 1 else (None,)
    return {} if only is None else {"commit": only}


def on_target(rows: list[Row], section: str) -> list[Row]:
    """How far the stored size lies from its target, in the worst of all runs."""
    found = []
    for schedule in schedules(rows):
        off = [
            abs(row["stored_ratio"] / row["target_size"] - 1)
            for row in pick(rows, schedule=schedule)
            if "target_size" in row and "against" not in row  # else the target is another's bytes, and a limit
        ]
        if off:
            text = f"{section}: stored size off its target, worst of {len(off)} runs{says(schedule)}"
            made = claim(text, OFF_TARGET, max(off), "of it", max(off) <= OFF_TARGET)
            found.append(made | _commit({row.get("commit") for row in pick(rows, schedule=schedule)}))
    return found


def mnist_claims(rows: list[Row]) -> list[Row]:
    """Accuracy at each target."""
    return [
        over_seeds(
            f"mnist at {100 * size:g} %: test accuracy{says(schedule)}",
            *(pick(rows, schedule=schedule, target_size=size), lambda row: row["packed_accuracy"]),
            *(5, target, "share", True),
        )
        for schedule in schedules(rows)
        for size, target in ACCURACY.items()
    ]


def loss_claims(rows: list[Row]) -> list[Row]:
    """Loss at the target, and against the float network where twice the bytes are stored."""
    found = []
    for schedule in schedules(rows):
        size, target = LOSS
        at = pick(rows, schedule=schedule, target_size=size)
        text = f"names at {100 * size:g} %: test loss{says(schedule)}"
        found.append(over_seeds(text, at, lambda row: row["packed_loss"], 5, target, "nats", False))
        at = pick(rows, schedule=schedule, target_size=NO_WORSE)
        text = f"names at {100 * NO_WORSE:g} %: test loss over that of the float network{says(schedule)}"
        found.append(over_seeds(text, at, lambda row: row["packed_loss"] - row["float_loss"], 5, 0.0, "nats", False))
    return found


def near_float(rows: list[Row], task: str, size: float, need: int) -> list[Row]:
    """Accuracy lost at a target: at most one standard error of a single run."""
    found = []
    for schedule in schedules(rows):
        at = pick(rows, schedule=schedule, target_size=size, method="sgsc")
        error = statistics.fmean(row["accuracy_standard_error"] for row in at) if at else 0.0
        text = f"{task}, CIFAR-10 (JPEG q75), at {100 * size:g} %: test accuracy lost{says(schedule)}"
        lost = lambda row: row["float_accuracy"] - row["packed_accuracy"]  # noqa: E731
        found.append(over_seeds(text, at, lost, need, error, "share", False))
    return found


def ahead(rows: list[Row], need: int) -> list[Row]:
    """How far we lead each uniform width at equal bytes, seed by seed."""
    found = []
    for schedule in schedules(rows):
        of = pick(rows, schedule=schedule)
        widths = sorted({row["method"] for row in of if row["method"].startswith("lsq")})
        for method in widths:
            pairs = []
            for point in pick(of, method=method):
                mine = pick(of, method="sgsc", seed=point["seed"], against=method)
                pairs += [(m, point) for m in mine if m["stored_bytes"] <= point["stored_bytes"]]
            text = f"{of[0]['task']}: ahead of uniform {method.removeprefix('lsq')}-bit training at no more bytes"
            found.append(lead(f"{text}{says(schedule)}", pairs, need))
    return found


def taught(row: Row) -> bool:
    """Whether it learned the float network's answers."""
    return bool(row.get("distilled"))


def lead(text: str, pairs: Sequence[tuple[Row, Row]], need: int, target: float | None = None) -> Row:
    """A claim on how far the first of each pair is ahead of the second: beyond chance, or at least `target`.

    In nats where text is judged, else accuracy. One that learned from labels is no match for one that was distilled.
    """
    pairs = [(mine, point) for mine, point in pairs if taught(mine) == taught(point)]
    loss = any("packed_loss" in mine and mine["task"] in ("names", "shakespeare") for mine, _ in pairs)
    key, sign, unit = ("packed_loss", -1, "nats") if loss else ("packed_accuracy", 1, "share")
    leads = [
        {"seed": mine["seed"], "commit": mine.get("commit"), "lead": sign * (mine[key] - point[key])}
        for mine, point in pairs
    ]
    return over_seeds(text, leads, lambda row: row["lead"], need, target or 0.0, unit, True, sure=target is None)


def default_form(rows: list[Row], forms: Sequence[str], need: int) -> list[Row]:
    """How far the default form of the grids leads each other one at each size: behind by no standard error of a run."""
    found = []
    for schedule in schedules(rows):
        of = pick(rows, schedule=schedule)
        error = statistics.fmean(row["accuracy_standard_error"] for row in of)
        for form in forms[1:]:
            for size in sorted({row["target_size"] for row in of}, reverse=True):
                pairs = [
                    (mine, row)
                    for row in pick(of, method=form, target_size=size)
                    for mine in pick(of, method=forms[0], target_size=size, seed=row["seed"])
                ]
                text = f"digits at {100 * size:g} %: ahead of {form} grids{says(schedule)}"
                found.append(lead(text, pairs, need, -error))
    return found


def of_steps(rows: list[Row], counts: Sequence[int], need: int) -> list[Row]:
    """How much accuracy moves from one number of steps to the next, twice as many: at most one standard error."""
    found = []
    for schedule in schedules(rows):
        of = pick(rows, schedule=schedule)
        error = statistics.fmean(row["accuracy_standard_error"] for row in of)
        sizes = sorted({row["target_size"] for row in of}, reverse=True)
        for size, (few, many) in itertools.product(sizes, itertools.pairwise(counts)):
            pairs = [
                {
                    "seed": row["seed"],
                    "commit": row.get("commit"),
                    "change": other["packed_accuracy"] - row["packed_accuracy"],
                }
                for row in pick(of, steps=few, target_size=size)
                for other in pick(of, steps=many, target_size=size, seed=row["seed"])
            ]
            change = statistics.fmean(pair["change"] for pair in pairs) if pairs else None
            text = f"digits at {100 * size:g} %: test accuracy moved by {many:,} steps after {few:,}, either way"
            sign = -1 if change is not None and change < 0 else 1
            found.append(
                over_seeds(
                    *(f"{text}{says(schedule)}", pairs, lambda pair, sign=sign: sign * pair["change"]),
                    *(need, error, "share", False),
                )
            )
    return found


def ablated(rows: list[Row]) -> list[Row]:
    """Held-out regressions with the preservation set, against those without it and with a random one, alike otherwise.

    In all, in the class that suffers most and in the hard tail. A difference that chance may have made is none. What
    the loss on a set buys is one thing, what its choice does another.
    """
    found = []
    for schedule in schedules(rows):
        for task, size in dict.fromkeys((row["task"], row["target_size"]) for row in pick(rows, schedule=schedule)):
            of = pick(rows, schedule=schedule, task=task, target_size=size)
            for other, words in OTHERS.items():
                if other == "random" and not pick(of, method=other):  # rows from before there was one
                    continue
                pairs = [
                    (row, mine)
                    for row in pick(of, method=other)
                    for mine in pick(of, method="with", seed=row["seed"])
                    if abs(mine["stored_bytes"] / row["stored_bytes"] - 1) <= OFF_TARGET and taught(mine) == taught(row)
                ]
                for what, unit, value in SUFFERED:
                    leads = [
                        {"seed": row["seed"], "commit": mine.get("commit"), "fewer": value(row) - value(mine)}
                        for row, mine in pairs
                        if value(row) is not None and value(mine) is not None
                    ]
                    text = f"{task} at {100 * size:g} %: {what} {words}, less those with it{says(schedule)}"
                    found.append(over_seeds(text, leads, lambda row: row["fewer"], 5, 0.0, unit, True, sure=True))
    return found


OTHERS = {"without": "without the preservation set", "random": "with a set drawn at random"}


def _share(row: Row, part: str) -> float | None:
    return row[part]["share"] if part in row else None


SUFFERED: tuple[tuple[str, str, Callable[[Row], Any]], ...] = (
    ("guard regressions", "samples", lambda row: row["guard_regressions"]),
    ("regressions in the worst class", "share", lambda row: _share(row, "worst_class")),
    ("regressions in the hard tail", "share", lambda row: _share(row, "tail")),
)
