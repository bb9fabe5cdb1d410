"""The README's tables of bench.sgsc: schedules never share a line, and each line says by which it was trained."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .cells import cell, spread, table
from .sgsc_claims import taught

Row = Mapping[str, Any]
LOSS = ("names", "shakespeare")  # tasks that are judged by nats a character; the others by accuracy
SEEDS_NOTE = "Mean over the seeds (least to most)."


def grouped(rows: Sequence[Row], *keys: str) -> list[list[Row]]:
    """Rows that agree in these entries, in the order in which they come; False is as if it were not there."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) or None for key in keys), []).append(row)
    return list(groups.values())


def steps(group: Sequence[Row]) -> str:
    """The schedule, steps if there are any, precision and device where not float32 on a CPU, whether distilled."""
    counts = sorted({row["steps"] for row in group if "steps" in row})
    said = [group[0]["schedule"], "/".join(f"{n:,}" for n in counts)]
    said += sorted({row.get("precision", "float32") for row in group} - {"float32"})
    said += ["distilled"] if taught(group[0]) else []
    said += sorted({row["device"] for row in group if "device" in row})
    return ", ".join(filter(None, said))


def quality(group: Sequence[Row]) -> list[str]:
    """Float, stored and the change: nats or accuracy, as the task is judged."""
    loss = group[0]["task"] in LOSS
    key, factor, form = ("loss", 1, ".4f") if loss else ("accuracy", 100, ".2f")
    before, after = ([factor * row[f"{part}_{key}"] for row in group] for part in ("float", "packed"))
    change = statistics.fmean(a - b for a, b in zip(after, before, strict=True))
    errors = [100 * row["accuracy_standard_error"] for row in group if "accuracy_standard_error" in row]
    error = f" ± {statistics.fmean(errors):.2f}" if errors and not loss else ""
    return [spread(before, form), spread(after, form), f"{change:+{form}}{error}"]


def harm(group: Sequence[Row]) -> list[str]:
    """Guard regressions and their bound; nothing where there is no certificate."""
    certified = [row for row in group if "guard_regressions" in row]
    if not certified:
        return ["", ""]
    samples = "/".join(f"{n}" for n in sorted({row["guard_samples"] for row in certified}))
    bound = spread([100 * row["guard_upper_bound_95"] for row in certified], ".1f")
    return [f"{spread([row['guard_regressions'] for row in certified], '.3g')} of {samples}", bound]


def seeds(group: Sequence[Row]) -> str:
    return str(len({row["seed"] for row in group}))


def stored(group: Sequence[Row]) -> str:
    return spread([100 * row["stored_ratio"] for row in group], ".2f")


def judged(rows: Sequence[Row]) -> list[str]:
    """Heads of `quality`."""
    unit = "test loss" if rows[0]["task"] in LOSS else "test accuracy, %"
    return [f"float {unit}", f"stored {unit}", "change"]


def curve(rows: Sequence[Row]) -> str:
    """Compression, and uniform training and other libraries where they were run: a target or a width a line."""
    there = [row for row in rows if "missing" not in row]
    ordered = [{**row, "named": _name(row)} for row in sorted(there, key=lambda row: row["schedule"] != "full")]
    lines = [
        [group[0]["named"], steps(group), seeds(group), stored(group), *quality(group), *harm(group), _seconds(group)]
        for group in grouped(ordered, "schedule", "device", "named", "steps", "precision", "distilled")
    ]
    head = ["method", "schedule, steps", "seeds", "stored, % of float32 bytes", *judged(rows)]
    head += ["guard regressions", "their 95 % bound, %", "seconds"]
    source = " CIFAR-10 (JPEG q75)." if rows[0]["task"] in ("cifar10", "resnet20") else ""
    note = f"{SEEDS_NOTE}{source} Seconds are those of one run without its float training."
    return f"{table(head, lines, text=2)}\n\n{note}{_of_peers(rows)}"


def _of_peers(rows: Sequence[Row]) -> str:
    """What a reader must know of other libraries' rows, if there are any."""
    if not any("group" in row for row in rows):
        return ""
    missing = {row["method"]: row["missing"] for row in rows if "missing" in row}
    left = {_name(row): name for row in rows for name in row.get("left_float", ())}
    note = " The libraries round the float network, without training it; bench/sgsc_peers.py counts their bytes."
    note += "".join(f" {library} is missing: {cell(why)}." for library, why in missing.items())
    return note + "".join(f" {where} left float: {cell(why)}." for where, why in left.items())


def _name(row: Row) -> str:
    method = str(row["method"])
    if method.startswith("lsq"):
        return f"uniform {method.removeprefix('lsq')}-bit training"
    if row.get("against"):
        return f"sgsc, bytes of {str(row['against']).removeprefix('lsq')} bits"
    if "group" in row:
        return f"{method}, {row['bits']} bits, scale of {row['group'] or 'a row'}"
    return f"{method}{'' if method == 'sgsc' else ' grids'} at {100 * row['target_size']:g} %"


def _seconds(group: Sequence[Row]) -> str:
    measured = [row for row in group if "seconds" in row and "resumed" not in row]
    whole = [row["seconds"] - row.get("float_seconds", 0.0) for row in measured]
    return spread(whole, ".0f") if whole else ""


SETS = {"with": "with the set", "random": "with one drawn at random", "without": "without the set"}


def ablation(rows: Sequence[Row]) -> str:
    """With and without the preservation set: what broke, in all, in the worst class and in the hard tail."""
    lines = []
    for group in grouped(rows, "schedule", "device", "task", "target_size", "method", "distilled"):
        first = group[0]
        kept = spread([row["preservation_regressions"] for row in group], ".3g")
        lines.append(
            [
                *(first["task"], SETS[first["method"]], steps(group), seeds(group), stored(group)),
                *(quality(group)[2], *harm(group)),
                *(_share(group, "worst_class"), _share(group, "tail"), kept),
            ]
        )
    head = ["task", "preservation", "schedule, steps", "seeds", "stored, % of float32 bytes", "change on test"]
    head += ["guard regressions", "their 95 % bound, %", "worst class, % regressed", "hard tail, % regressed"]
    head += ["regressions on the set"]
    note = "Without: no loss on the set and no guard that acts on it; it is compared all the same. Nats or points."
    return f"{table(head, lines, text=3)}\n\n{SEEDS_NOTE} {note}"


def _share(group: Sequence[Row], key: str) -> str:
    found = [100 * row[key]["share"] for row in group if isinstance(row.get(key), Mapping) and "share" in row[key]]
    return spread(found, ".1f") if found else ""


LAYOUTS: dict[str, Callable[[Sequence[Row]], str]] = {
    **dict.fromkeys(("mnist", "names", "cifar10", "resnet20", "shakespeare", "steps", "quantizers"), curve),
    "ablation": ablation,
}
