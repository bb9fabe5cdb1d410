"""What the search claims, from its rows, and the README's tables of them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, wilcoxon

from .cells import spread, table
from .record import claim
from .sgsc_claims import CHANCE

Row = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]
OURS, THEIRS = "k-means TPE", ("TPE, multivariate", "TPE, independent")
FEWER, RANDOM_TRIALS, SAVED = 12, 1000, 0.20
REFERENCES, SEARCHES = ("uniform", "integer program"), ("kmeans-tpe", "tpe")  # methods on real networks
OTHERS = {
    "uniform": "the best uniform width",
    "integer program": "the integer program on sensitivities",
    "tpe": "what Optuna's TPE ends with in the same time",
}


def trials_of(rows: Rows, layers: int, method: str) -> dict[int, int]:
    """Seed -> trials."""
    return {r["seed"]: r["trials"] for r in rows if (r["layers"], r["method"]) == (layers, method)}


def named(rows: Rows, layers: int) -> str:
    """A surrogate in words; one that was measured has rows that say how well it agrees with the network."""
    measured = any("agreement" in r for r in rows if r["layers"] == layers)
    return f"{layers} layers, measured" if measured else f"{layers} layers"


def surrogate_claims(rows: list[Row]) -> list[Row]:
    """At least 12 times fewer trials than random search, and fewer than either form of Optuna's TPE, beyond chance.

    Chance is Wilcoxon's signed-rank test of the seeds, one-sided: a problem is the same for all methods.
    """
    made = []
    for layers in sorted({r["layers"] for r in rows}):
        ours = trials_of(rows, layers, OURS)
        if not ours:
            continue
        what = f"{named(rows, layers)}: trials to reach what random reaches in {RANDOM_TRIALS:,}, against"
        for other, least in (("random", FEWER), *((tpe, 1) for tpe in THEIRS)):
            theirs = trials_of(rows, layers, other)
            both = sorted(ours.keys() & theirs.keys())
            if not both:
                continue
            mine, other_ones = [ours[s] for s in both], [theirs[s] for s in both]
            ratio = statistics.median(other_ones) / statistics.median(mine)
            scaled = [least * trials for trials in mine]
            chance = float(wilcoxon(scaled, other_ones, alternative="less").pvalue) if scaled != other_ones else 1.0
            name = other if other == "random" else f"Optuna's {other}"
            text = f"{what} {name}, medians of {len(both)} seeds (p = {chance:.2g})"
            made.append(claim(text, least, ratio, "times fewer", ratio >= least and chance < CHANCE))
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
        what = f"{row['method']}, {row['kills']} kill -9 at random moments"
        made += [
            claim(f"{what}: acknowledged trials lost", 0, row["lost"], f"of {row['acknowledged']}", at_most=0),
            claim(f"{what}: running trials of dead workers", 0, row["zombies"], "trials", at_most=0),
            claim(f"{what}: slowest opening", 5, row["slowest_opening_seconds"], "s", at_most=5),
        ]
    return made


def network_claims(rows: list[Row]) -> list[Row]:
    """As accurate as uniform widths and the integer program with 20 % fewer bytes, and no worse than Optuna's TPE.

    As accurate: less is lost than one standard error of the difference, on the same samples. Of Optuna's TPE, which has
    the same budget in bytes and in time, both what it ends with and the best of its short trials are compared.
    """
    made = []
    for task, schedule, within in dict.fromkeys((r["task"], trained(r), r["within"]) for r in rows):
        alike = [r for r in rows if (r["task"], trained(r), r["within"]) == (task, schedule, within)]
        of = {(r["method"], r["seed"]): r for r in alike}
        ours = [row for (method, _), row in of.items() if method == "kmeans-tpe"]
        for other in OTHERS:
            pairs = paired(ours, of, other)
            if pairs:
                points = 100 * statistics.fmean(a["validation_accuracy"] - b["validation_accuracy"] for a, b in pairs)
                error = 100 * difference_error(pairs)
                what = f"{task}, {schedule}, {len(pairs)} seeds: against {OTHERS[other]} within {within}"
                if other in REFERENCES:
                    saved = min((b["stored_bytes"] - a["stored_bytes"]) / b["stored_bytes"] for a, b in pairs)
                    text = f"{what}, share of bytes saved, least"
                    made.append(claim(text, SAVED, saved, "of theirs", at_least=SAVED))
                text = f"{what}, validation accuracy, mean"
                made.append(claim(text, -error, points, "points more", at_least=-error))
        if pairs := paired(ours, of, "tpe"):
            mine, theirs = (statistics.fmean(one["short_loss"] for one in ones) for ones in zip(*pairs, strict=True))
            what = f"{task}, {schedule}, {len(pairs)} seeds: best loss of the trials of Optuna's TPE in the same time"
            made.append(claim(f"{what}, beside {within}", 1, theirs / mine, "times ours", at_least=1))
    return made


def paired(ours: Rows, of: Mapping[tuple[str, int], Row], other: str) -> list[tuple[Row, Row]]:
    """Rows of ours with those of another method, same seed, that learned from and were judged by the same."""
    pairs = [(dict(row), of[other, row["seed"]]) for row in ours if (other, row["seed"]) in of]
    return [(a, b) for a, b in pairs if taught(a) == taught(b)]


def trained(row: Mapping[str, Any]) -> str:
    """By which schedule, in which precision and on what, where that is no CPU: means are of one."""
    precision = None if row["precision"] == "float32" else row["precision"]
    return ", ".join(filter(None, (row["schedule"], precision, row.get("device"))))


def taught(row: Mapping[str, Any]) -> str:
    """What candidates learned."""
    judged = ", which judged too" if row.get("judged_by") == "answers" else ""
    return f"the float network's answers{judged}" if row.get("distilled") else "labels"


def difference_error(pairs: Sequence[tuple[Row, Row]]) -> float:
    """Standard error of the mean difference of accuracies; those of a pair are of the same samples."""
    variance = 0.0
    for ours, theirs in pairs:
        count = ours["validation_samples"]
        differ = len(set(ours["validation_wrong"]) ^ set(theirs["validation_wrong"])) / count
        variance += (differ - (ours["validation_accuracy"] - theirs["validation_accuracy"]) ** 2) / count
    return math.sqrt(max(variance, 0.0)) / len(pairs)


def rank_interval(correlations: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """95 % interval of the rank correlation that several samples of `counts` pairs show together.

    By Fisher's transformation, variance 1.06 / (count - 3) (Fieller, Hartley & Pearson, Biometrika 44, 1957).
    """
    weights = np.maximum(np.array(counts) - 3, 1)
    middle = float(np.average(np.arctanh(np.clip(correlations, -0.999, 0.999)), weights=weights))
    away = float(norm.ppf(0.975)) * math.sqrt(1.06 / weights.sum())
    return math.tanh(middle - away), math.tanh(middle + away)


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
        lines.append([named(rows, layers), str(len(trials_of(rows, layers, methods[0]))), *cells])
    note = (
        "Trials to reach what 1,000 random trials reach on surrogates of layers (bench/search_surrogates.py), median "
        "(quartiles); on seeds that no constant was chosen on. Configurations over the budget are not counted for any "
        "method. Ours is told that more bits are no worse, and proposes at the edge of the budget; the others are not."
    )
    for agreement in {r["agreement"] for r in rows if "agreement" in r}:
        note += (
            " The measured one adds what layers and pairs of layers of ResNet-20 cost; its rank correlation with the "
            f"network on configurations that it was not made of is {agreement:.2f}."
        )
    return f"{table(['surrogate', 'seeds', *methods], lines)}\n\n{note}"


def proposal_table(rows: Rows) -> str:
    """Milliseconds, a method a line."""
    methods = dict.fromkeys(r["method"] for r in rows)
    lines = [[m, spread([r["milliseconds"] for r in rows if r["method"] == m], ".1f")] for m in methods]
    return f"{table(['sampler', 'ms a proposal'], lines)}\n\nAt 60 parameters and 500 trials, in memory."


def kill_table(rows: Rows) -> str:
    """One line a run."""
    head = ["study in", "kills", "acknowledged trials", "lost", "left running", "opening, median (slowest), s"]
    keys = ("method", "kills", "acknowledged", "lost", "zombies")
    times = [f"{r['median_opening_seconds']:.2f} ({r['slowest_opening_seconds']:.2f})" for r in rows]
    return table(head, [[*(str(r[k]) for k in keys), time] for r, time in zip(rows, times, strict=True)])


def network_table(rows: Rows) -> str:
    """A method a line, over seeds; then what the short training of a trial says of the long one."""
    lines, said = [], []
    for within, schedule, method in dict.fromkeys((r["within"], trained(r), r["method"]) for r in rows):
        group = [r for r in rows if (r["within"], trained(r), r["method"]) == (within, schedule, method)]
        if method == "proxy":
            first, found = group[0], spread([r["spearman"] for r in group], ".2f")
            steps = f"{first['steps']} and {first['finish_steps']} steps"
            low, high = rank_interval([r["spearman"] for r in group], [r["configurations"] for r in group])
            said.append(
                f"Rank correlation (Spearman) of the validation losses of {first['configurations']} random "
                f"configurations after {steps} ({schedule}, beside {within}, seeds: {len(group)}): {found}; 95 % "
                f"interval of all seeds {low:.2f} to {high:.2f}."
            )
            continue

        def shown(key: str, form: str, factor: float = 1.0, group: Rows = group) -> str:
            whole = [r for r in group if key != "processor_seconds" or "resumed" not in r]  # else of the last part
            found = [factor * r[key] for r in whole if key in r]
            return spread(found, form) if found else ""

        lines.append(
            [
                *(method, within, schedule, str(len(group))),
                *(shown("stored_bytes", ",.0f"), shown("stored_ratio", ".2f", 100)),
                *(shown("validation_loss", ".4f"), shown("validation_accuracy", ".2f", 100)),
                *(shown("packed_accuracy", ".2f", 100), shown("float_accuracy", ".2f", 100)),
                *(shown("trials", ".0f"), shown("processor_seconds", ".0f")),
            ]
        )
    head = [
        "method",
        "references within",
        "schedule",
        "seeds",
        "stored bytes",
        "of float32, %",
        "validation loss",
        "validation accuracy, %",
    ]
    head += ["test accuracy, %", "float's, %", "trials", "processor, s"]
    every = ", ".join(dict.fromkeys(f"{r['steps']} and {r['finish_steps']} ({trained(r)})" for r in rows))
    note = (
        "Mean over the seeds (least to most). Chosen by validation samples; the test split answers once. Steps of a "
        f"trial and of the last training: {every}. The searches had 80 % of the bytes of the smaller of the other two "
        "(bench/search_networks.py). "
    )
    kinds = Counter(map(taught, rows))
    learned = (kind if len(kinds) == 1 else f"{kind} ({count} of {len(rows)} rows)" for kind, count in kinds.items())
    note += f"Learned {'; '.join(learned)}."
    return "\n\n".join([table(head, lines, text=3), note, *said])


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    "surrogates": surrogate_table,
    "proposal": proposal_table,
    "kills": kill_table,
    **{f"search-{task}": network_table for task in ("digits", "mnist", "resnet20")},
}
