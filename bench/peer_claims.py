"""What bench/peers.py claims, from its rows alone; each claim names its worst case."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .peer_problem import EXACT, INT8, MIXED, READ, WIDTHS
from .record import claim

Row = Mapping[str, Any]
Width = int | str
SHARE = 0.85  # of the best read bandwidth


def widths(row: Row) -> set[Width]:
    """The widths that a candidate stands for: of its codes, and of its bytes where these round to another."""
    if row["bits"] not in WIDTHS:
        return set()
    if row["bits"] == MIXED or row["library"] == "ours":
        return {row["bits"]}
    return {row["bits"], round(row["stored_bits"])}


@dataclass(frozen=True)
class Line:
    """A demand: ours of `numerics` at each of `of` and `batches`, at least `target` times as fast as any of `peers`."""

    text: str
    target: float
    batches: Sequence[int] | None  # None: all
    numerics: str
    of: Sequence[Width]
    peers: Callable[[Row, Width], bool]
    cached: bool = False


def same(row: Row, width: Width) -> bool:
    return width in widths(row)


def same_exact(row: Row, width: Width) -> bool:
    return row["numerics"] == EXACT and width in widths(row)


def eight(row: Row, width: Width) -> bool:
    return 8 in widths(row)


def float32(row: Row, width: Width) -> bool:
    return row["bits"] == 32


AGAINST = {
    same: "the best peer of the width",
    same_exact: "the best exact peer of the width",
    eight: "the best 8-bit peer",
    float32: "the best float32 product",
}
WIDE = WIDTHS[1:]
ODD = [1, 3, 5, 6, 7, MIXED]
LINES = (
    Line("M = 1, int8, 2 to 8 bits and mixed", 1.0, [1], INT8, WIDE, same),
    Line("M = 1, int8, 1 bit", 2.5, [1], INT8, [1], same),
    Line("M = 1, exact, 2 to 8 bits", 2.0, [1], EXACT, range(2, 9), same_exact),
    Line("M = 4 and 16, int8, 1, 3, 5, 6, 7 bits and mixed", 1.3, [4, 16], INT8, ODD, same),
    Line("M = 4 and 16, int8, 2, 4 and 8 bits", 1.0, [4, 16], INT8, [2, 4, 8], same),
    Line("M = 4 and 16, int8, every width", 1.0, [4, 16], INT8, WIDTHS, eight),
    Line("M = 128 and 512, int8, every width", 1.0, [128, 512], INT8, WIDTHS, eight),
    Line("M = 128 and 512, int8, 4 bits", 1.6, [128, 512], INT8, [4], same),
    Line("M = 128 and 512, exact, every width", 0.95, [128, 512], EXACT, WIDTHS, float32),
    Line("small layers, int8, every width and M", 1.0, None, INT8, WIDTHS, same, cached=True),
    Line("small layers, exact, every width and M", 1.0, None, EXACT, WIDTHS, same_exact, cached=True),
)


def claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every claim that the timed rows of some sections can decide; what we did not compute does not hold."""
    found = [bandwidth(rows)]
    for line in LINES:
        cases = list(compare(rows, line))
        if cases:
            found.append(decide(f"{line.text}: against {AGAINST[line.peers]}", cases, line.target, "times as fast"))
    return [c for c in found if c is not None]


def bandwidth(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How near M = 1 comes to the fastest reading of memory that anyone showed, over packed bytes."""
    cases = []
    for where, m, group in groups(rows, [1], False):
        best = max(group, key=lambda r: r["gigabytes_per_second"])
        for width in WIDE:
            mine = ours(group, width, INT8)
            share = mine["gigabytes_per_second"] / best["gigabytes_per_second"] if mine else None
            cases.append((share, f"{where}, M = {m}, {width} bits, {name(best)}"))
    text = f"{LINES[0].text}: packed bytes a second against the best read bandwidth"
    return decide(text, cases, SHARE, "of it") if cases else None


def compare(rows: Sequence[Row], line: Line) -> Iterator[tuple[float | None, str]]:
    """(how many times as fast we are, the case) for each case of a line that has a peer."""
    for where, m, group in groups(rows, line.batches, line.cached):
        for width in line.of:
            best = fastest(group, width, line.peers)
            if best:
                mine = ours(group, width, line.numerics)
                ratio = best["microseconds"] / mine["microseconds"] if mine else None
                yield ratio, f"{where}, M = {m}, {width} bits, {name(best)}"


def decide(text: str, cases: Sequence[tuple[float | None, str]], target: float, unit: str) -> dict[str, Any]:
    """The claim, decided by the worst case; one that was not measured is the worst of all."""
    measured, where = min(cases, key=lambda c: -1.0 if c[0] is None else c[0])
    timed = [ratio for ratio, _ in cases if ratio is not None]
    reach = sum(ratio >= target for ratio in timed)
    middle = f", median {statistics.median(timed):.2f}" if timed else ""
    case = "not measured" if measured is None else "worst"
    text = f"{text}; {reach} of {len(cases)} cases reach it{middle}; {case}: {where}"
    return claim(text, target, measured, unit, at_least=target)


def groups(rows: Sequence[Row], batches: Sequence[int] | None, cached: bool) -> Iterator[tuple[str, int, list[Row]]]:
    """(section, rows of x, the rows that were measured against one another there)."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["cached"] == cached and (batches is None or row["rows"] in batches):
            found.setdefault((row["section"], row["rows"]), []).append(row)
    for (section, m), group in found.items():
        yield section, m, group


def ours(rows: Sequence[Row], width: Width, numerics: str) -> Row | None:
    """Our row at a width, if there is one."""
    found = (r for r in rows if r["library"] == "ours" and (r["bits"], r["numerics"]) == (width, numerics))
    return next(found, None)


def fastest(rows: Sequence[Row], width: Width, peers: Callable[[Row, Width], bool]) -> Row | None:
    """The fastest of the peers, if there is one."""
    others = [r for r in rows if r["library"] != "ours" and peers(r, width)]
    return min(others, key=lambda r: r["microseconds"], default=None)


def best_peer(rows: Sequence[Row], width: Width, numerics: str) -> Row | None:
    """The fastest peer of a width: an exact one where we are exact."""
    return fastest(rows, width, same_exact if numerics == EXACT else same)


def name(row: Row) -> str:
    """Who it is."""
    return row["candidate"] if row["bits"] == READ else f"{row['library']} {row['candidate']}"
