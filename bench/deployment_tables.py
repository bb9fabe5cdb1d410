"""How README.md shows the results of bench.deployment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .cells import cell, microseconds, table, times
from .deployment_memory import LOAD
from .deployment_static import FLOATS, MEASURED, STATIC
from .deployment_timing import OURS
from .peer_problem import EXACT, INT8

Row = Mapping[str, Any]
Rows = Sequence[Row]


def turns(rows: Rows, pick: Callable[[Iterable[float]], float], which: str) -> str:
    """Who took turns: a case and its threads a line, a contender a column, then our ratio to the best in each numerics.

    Args:
        rows: Of a section of bench.deployment.
        pick: Which of our times stands for ours: `max` or `min`.
        which: The same in words.
    """
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        case = f"{row['case']}, batch {row['batch']}" if "batch" in row else row["case"]
        cases.setdefault((case, str(row["threads"])), {})[row["by"]] = row
    names = list(dict.fromkeys(row["by"] for row in rows))
    lines = []
    for case, of in cases.items():
        timed = {by: row["microseconds"] for by, row in of.items() if not row["missing"]}
        shown = [microseconds(timed[by]) if by in timed else "missing" if by in of else "" for by in names]
        lines.append([*case, *shown, *(standing(timed, numerics, pick) for numerics in (EXACT, INT8))])
    missing = dict.fromkeys((row["by"], row["missing"]) for row in rows if row["missing"])
    notes = "".join(f" {by} is missing where it failed: {cell(why)}." for by, why in missing)
    head = ["case", "threads", *names, "best float32 / ours exact", "best / ours int8"]
    note = f"Microseconds, median. A ratio is that of {which}: below 1 (bold) the peer is faster."
    return f"{table(head, lines)}\n\n{note}{notes}"


def standing(timed: Mapping[str, float], numerics: str, pick: Callable[[Iterable[float]], float]) -> str:
    """The best peer's time over ours of these numerics; exact results are compared with exact ones alone."""
    mine = [t for by, t in timed.items() if by.startswith(OURS) and by.endswith(numerics)]
    others = [t for by, t in timed.items() if not by.startswith(OURS) and (numerics == INT8 or INT8 not in by)]
    return times(min(others) / pick(mine)) if mine and others else ""


def grids(rows: Rows) -> str:
    """A case and its threads a line: who took turns, and what a grid that is known beforehand is worth."""
    cases: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        cases.setdefault((row["case"], str(row["threads"])), {})[row["by"]] = row["microseconds"]
    names = list(dict.fromkeys(row["by"] for row in rows))
    lines = [
        [*case, *(microseconds(of[name]) for name in names), *(times(of[by] / of[STATIC]) for by in (MEASURED, FLOATS))]
        for case, of in cases.items()
    ]
    head = ["case", "threads", *names, "int8 / static", "exact / static"]
    return f"{table(head, lines)}\n\nMicroseconds, median; a ratio below 1 (bold): the grid is slower."


def loading(rows: Rows) -> str:
    """Seconds of loading: what is done a line; then the peak of memory."""
    of = {(row["what"], row["threads"]): row for row in rows if "milliseconds" in row}
    threads = sorted({t for _, t in of})
    lines = []
    for what in dict.fromkeys(what for what, _ in of):
        its = [of[what, t] for t in threads]
        ratios = [row["over_reading"] for row in its]
        shown = [times(r, lost=what == "load_into" and r > LOAD) if r else "" for r in ratios]
        milliseconds = [f"{row['milliseconds']:,.1f}" for row in its]
        lines.append([what, f"{its[0]['bytes'] / 1e6:,.1f}", *milliseconds, *shown])
    columns = [f"threads {t}, {unit}" for unit in ("ms", "× reading") for t in threads]
    notes = [f"A ratio is the time over that of reading the file; load_into's beyond {LOAD:g} is bold."]
    for row in rows:
        if "over_need" in row:
            size, form, one = (f"{row[f'{part}_bytes'] / 1e6:,.1f}" for part in ("file", "run_form", "layer"))
            need = f"the file ({size}), the run form ({form}) and one layer in both forms ({one})"
            notes.append(f"The peak of resident memory is {row['over_need']:.2f} × that of {need}, in MB.")
    return f"{table(['what', 'MB', *columns], lines)}\n\n{' '.join(notes)}"


LAYOUTS: dict[str, Callable[[Rows], str]] = {
    "convolution": functools.partial(turns, pick=max, which="our slower width"),
    "network": functools.partial(turns, pick=min, which="our fastest form"),
    "load": loading,
    "static": grids,
    "overhead": functools.partial(turns, pick=max, which="ours"),
}
