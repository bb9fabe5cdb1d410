"""Tables of sections of gpu_kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cells import cell, table, times
from .peer_problem import MIXED, WIDTHS

Row = Mapping[str, Any]


def checks(rows: Sequence[Row]) -> str:
    """How many hold; those that do not by name."""
    failed = [row for row in rows if not row["holds"]]
    said = "".join(f" {row['check']} does not: {cell(row['said'])}." for row in failed)
    return f"{len(rows) - len(failed)} of {len(rows)} checks of the kernels on the device hold.{said}"


def linear(rows: Sequence[Row]) -> str:
    """One token in every width; then the widths of which there are more tokens, against the best peer."""
    at = {(row["case"], row["tokens"], row["bits"]): row for row in rows}
    shapes = list(dict.fromkeys(row["case"] for row in rows))
    widths = [w for w in WIDTHS if any(row["bits"] == w for row in rows)]
    tokens = sorted({row["tokens"] for row in rows})
    alone = [[shape, *(share(at.get((shape, 1, w))) for w in widths)] for shape in shapes]
    against = [
        [shape, str(w), *(versus(at.get((shape, m, w))) for m in tokens), eager(at.get((shape, 1, w)))]
        for shape in shapes
        for w in widths
        if (shape, 1, w) in at
    ]
    names = [w if w == MIXED else f"{w} bits" for w in widths]
    columns = [*(f"M = {m}" for m in tokens), "eager call at M = 1"]
    missing = dict.fromkeys((name, why) for row in rows for name, why in row["missing"].items())
    notes = "".join(f" {name} is missing: {cell(why)}." for name, why in missing)
    if loose := dict.fromkeys(name for row in rows for name in row["without_graph"]):
        notes = f" No graph held {', '.join(loose)}.{notes}"
    return "\n\n".join(
        [
            "One token, µs and the share of a copy's bandwidth:",
            table(["N x K", *names], alone),
            "M tokens, µs and the best peer's time over ours: below 1 (bold) the peer is faster:",
            table(["N x K", "bits", *columns], against, text=2),
            "bfloat16. Times are those of calls within a CUDA graph, over copies of the weights that exceed twice the "
            f"L2 cache.{notes}",
        ]
    )


def choices(rows: Sequence[Row]) -> str:
    """Both sides of a choice, a line a case and number of columns; the side that is chosen in bold."""
    lines = []
    for constant, case, columns in dict.fromkeys((row["constant"], row["case"], row["columns"]) for row in rows):
        sides = [row for row in rows if (row["case"], row["columns"]) == (case, columns)]
        shown = [f"{row['microseconds']:,.1f}" for row in sides]
        shown = [f"**{t}**" if row["chosen"] else t for t, row in zip(shown, sides, strict=True)]
        lines.append([constant, case, f"{columns:,}", *shown])
    return table(["constant", "case", "columns", *(f"{row['variant']}, µs" for row in rows[:2])], lines, text=2)


def crossovers(rows: Sequence[Row]) -> str:
    """From how many columns on the dense side is faster, beside the number that decides."""
    lines = [
        [
            row["constant"],
            row["case"],
            f"{row['value']:,}",
            "never" if row["dense_from"] is None else f"{row['dense_from']:,}",
        ]
        for row in rows
    ]
    return table(["constant", "case", "value", "dense is faster from"], lines, text=2)


def share(row: Row | None) -> str:
    """Time and share of the copy's bandwidth."""
    return "" if row is None else f"{row['microseconds']:,.1f}, {row['share_of_copy']:.0%}"


def versus(row: Row | None) -> str:
    """Time, and the ratio to the best peer with its name."""
    if row is None:
        return ""
    timed = {name: ratio for name, ratio in row["ratio"].items() if ratio is not None}
    name = min(timed, key=lambda peer: timed[peer], default=None)
    return f"{row['microseconds']:,.1f}" + ("" if name is None else f", {times(timed[name])} {name}")


def eager(row: Row | None) -> str:
    """Time of a call outside a graph."""
    return "" if row is None else f"{row['eager_microseconds']:,.1f}"
