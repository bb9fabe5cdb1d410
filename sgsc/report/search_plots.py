"""Plots of a search, as plots.py draws those of a compression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .plots import ALARM, DASHED, INK, LINE, MAIN, PLOT_STYLE, SECOND, STEPS, as_svg, front
from .words import drawable, is_number, mapping, plain, rows

MOST_LINES, MOST_AXES = 200, 24


def draw_search(report: Mapping[str, Any]) -> dict[str, Markup]:
    """Draw history, front, parallel coordinates, importance and layers, as far as there is something to draw."""
    judged = [t for t in rows(report, "trials") if not math.isnan(drawable(t.get("loss")))]
    found: dict[str, Any] = {}
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", PLOT_STYLE]):
        if judged:
            _history(found.setdefault("history", Figure()), judged)
            if any(drawable(mapping(t.get("cost")).get("bytes")) > 0 for t in judged):
                _front(found.setdefault("front", Figure()), judged, report)
            _parallel(found.setdefault("parallel", Figure(figsize=(9.6, 3.6))), judged)
        shares = {k: v for k, v in mapping(report.get("importance")).items() if is_number(v) and math.isfinite(v)}
        if shares:
            _importance(found.setdefault("importance", Figure(figsize=(9.6, 1 + 0.24 * min(len(shares), 15)))), shares)
        if rows(report, "layers"):
            _layers(found.setdefault("layers", Figure(figsize=(9.6, 3.2))), rows(report, "layers"))
        return {name: as_svg(figure, name) for name, figure in found.items()}


def _kinds(judged: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    given = [t for t in judged if t.get("baseline")]
    return [("trial", MAIN, [t for t in judged if not t.get("baseline")]), ("baseline", SECOND, given)]


def _history(figure: Any, judged: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots()
    for label, colour, some in _kinds(judged):
        if some:
            places = [drawable(t.get("number")) for t in some], [drawable(t["loss"]) for t in some]
            axes.plot(*places, "o", markersize=4, color=colour, alpha=0.6, label=label)
    best, least = [], math.inf
    for t in judged:
        least = min(least, drawable(t["loss"]))
        best.append((drawable(t.get("number")), least))
    axes.plot(*zip(*best, strict=True), color=MAIN, drawstyle="steps-post", linewidth=1.4, label="best")
    axes.set(xlabel="trial", ylabel="validation loss")
    axes.legend()


def _front(figure: Any, judged: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    axes, points = figure.subplots(), []
    for label, colour, some in _kinds(judged):
        places = [(drawable(mapping(t.get("cost")).get("bytes")) / 1e3, drawable(t["loss"])) for t in some]
        points += places
        if places:
            axes.plot(*zip(*places, strict=True), "o", markersize=4, color=colour, alpha=0.6, label=label)
    axes.plot(*zip(*front(points, -1), strict=True), "-", **STEPS, color=MAIN, label="front")
    limit = drawable(mapping(report.get("budget")).get("bytes"))
    if limit > 0:
        axes.axvline(limit / 1e3, **DASHED, label="budget")
    axes.set(xlabel="stored size, kB", ylabel="validation loss")
    axes.legend()


def _parallel(figure: Any, judged: Sequence[Mapping[str, Any]]) -> None:
    """A line a trial over its parameters, the better the darker; each axis from its least to its largest value."""
    axes = figure.subplots()
    names = list(mapping(judged[0].get("params")))[:MOST_AXES]
    ranked = sorted(judged, key=lambda t: drawable(t["loss"]), reverse=True)[-MOST_LINES:]
    values = {n: [drawable(mapping(t.get("params")).get(n)) for t in ranked] for n in names}
    names = [n for n in names if len(set(values[n])) > 1] or names
    spans = {n: (min(values[n]), max(values[n])) for n in names}
    for place, _ in enumerate(ranked):
        heights = [(values[n][place] - spans[n][0]) / ((spans[n][1] - spans[n][0]) or 1.0) for n in names]
        best = place == len(ranked) - 1
        share = (place + 1) / len(ranked)
        axes.plot(
            heights, color=ALARM if best else MAIN, linewidth=2 if best else 0.8, alpha=1 if best else 0.5 * share**2
        )
    axes.set_xticks(range(len(names)), [plain(n) for n in names], rotation=45, ha="right", fontsize=8)
    axes.set(yticks=(0, 1), yticklabels=("least", "most"), ylabel="bits, channels")


def _importance(figure: Any, shares: Mapping[str, float]) -> None:
    axes = figure.subplots()
    shown = sorted(shares.items(), key=lambda item: item[1])[-15:]
    axes.barh([plain(n) for n, _ in shown], [v for _, v in shown], color=MAIN)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="share of the variance of the loss")


def _layers(figure: Any, layers: Sequence[Mapping[str, Any]]) -> None:
    above, below = figure.subplots(2, sharex=True)
    places = range(len(layers))
    above.bar(places, [drawable(row.get("bits")) for row in layers], color=MAIN)
    above.set(ylabel="bits", ylim=(0, 8))
    share = [drawable(row.get("rows")) / max(drawable(row.get("of_rows")), 1) for row in layers]
    below.bar(places, share, color=SECOND)
    below.axhline(1, color=INK, linewidth=1)
    below.set(ylabel="channels, ×")
    below.grid(color=LINE)
    below.set_xticks(places, [plain(row.get("name")) for row in layers], rotation=45, ha="right", fontsize=8)
