"""Plots as <svg> elements that follow the theme of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .words import drawable, rows

# Plots are drawn in stand-in colours, each then replaced by a colour of the page, so that they follow its theme.
INK, LINE, MAIN, SECOND, ALARM = "#010101", "#010102", "#010103", "#010104", "#010105"
THEME = {INK: "currentColor", LINE: "var(--line)", MAIN: "var(--accent)", SECOND: "var(--second)", ALARM: "var(--bad)"}
PLOT_STYLE = {
    "text.parse_math": False,  # names may hold a $
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "sgsc",  # the same report gives the same bytes
    "figure.figsize": (4.7, 3.2),
    "font.size": 10.5,
    **dict.fromkeys(("figure.constrained_layout.use", "axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("grid.color", "axes.edgecolor"), LINE),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
DASHED = {"color": INK, "linestyle": "--", "linewidth": 1.2}
STEPS = {
    "drawstyle": "steps-post",
    "markersize": 4.5,
    "linewidth": 1.4,
}  # the front between its points is the smaller one
FAR = 30  # a loss so many times the best one is far off
SENSE = {"accuracy": 1, "loss": -1}  # what is measured while compressing, and whether more of it is better


def draw(report: Mapping[str, Any], runs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Markup]:
    """Draw what there is to draw as <svg> elements, by name.

    Args:
        report: Its history gives "size" and "quality", over steps, and "tradeoff", accuracy and loss over size.
        runs: This run among others of the same task, for "runs": what each came to.
    """
    history = [row for row in rows(report, "history") if not math.isnan(drawable(row.get("step")))]
    found = {}
    if not history and not runs:
        return {}
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", PLOT_STYLE]):  # whatever style the caller has set, and back to it
        if history:
            _size(found.setdefault("size", Figure()), report, history)
            _quality(found.setdefault("quality", Figure()), report, history)
        measured = [row for row in history if drawable(row.get("size")) > 0]
        points = {key: [(drawable(row["size"]), drawable(row.get(key))) for row in measured] for key in SENSE}
        points = {key: pairs for key, pairs in points.items() if sum(not math.isnan(y) for _, y in pairs) > 1}
        if points:
            _tradeoff(found.setdefault("tradeoff", Figure()), points)
        if runs:
            _runs(found.setdefault("runs", Figure()), report, runs)
        return {name: as_svg(figure, name) for name, figure in found.items()}


def _line(axes: Any, history: Sequence[Mapping[str, Any]], key: str, default: Any = None, **how: Any) -> None:
    """Through the rows that have the key: what is measured at every fourth check is a line too."""
    told = [row for row in history if key in row or default is not None]
    points = [(drawable(row["step"]), drawable(row.get(key, default))) for row in told]
    marker = "." if len(points) == 1 else ""
    axes.plot(*(zip(*points, strict=True) if points else ((), ())), marker=marker, **how)


def _guards(axes: Any, report: Mapping[str, Any], **how: Any) -> None:
    steps = [drawable(event.get("step")) for event in rows(report, "events") if event.get("what") == "guard"]
    if steps:
        axes.plot(steps, [0.03] * len(steps), "^", color=ALARM, transform=axes.get_xaxis_transform(), **how)


def _size(figure: Any, report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    _line(axes[0], history, "size", color=MAIN, label="size")
    _line(axes[0], history, "target", report.get("target_size"), **DASHED, label="target")
    _guards(axes[0], report, label="guard")
    axes[0].set(ylabel="share of the float size", ylim=(0, None))
    _in_percent(axes[0].yaxis)
    axes[0].legend()
    _line(axes[1], history, "regressions", color=ALARM)
    axes[1].set(xlabel="step", ylabel="regressions", ylim=(0, max(1, axes[1].get_ylim()[1])))
    axes[1].yaxis.set_major_locator(MaxNLocator(2, integer=True))
    figure.align_ylabels()


def _quality(figure: Any, report: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
    above, below = figure.subplots(2, sharex=True)
    _line(above, history, "accuracy", color=MAIN)
    above.axhline(drawable(report.get("float_accuracy")), **DASHED)
    above.set_ylabel("accuracy")
    _in_percent(above.yaxis)
    _guards(above, report)
    _line(below, history, "preservation_loss", color=SECOND)
    below.set(xlabel="step", ylabel="preservation loss")
    figure.align_ylabels()


def _tradeoff(figure: Any, points: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    panels = figure.subplots(len(points), sharex=True, squeeze=False)[:, 0]
    for axes, (key, pairs) in zip(panels, points.items(), strict=True):
        axes.plot(*zip(*pairs, strict=True), ".", color=MAIN, alpha=0.45, label="check")
        best = front(pairs, SENSE[key])
        axes.plot(*(zip(*best, strict=True) if best else ((), ())), "-o", **STEPS, color=MAIN, label="front")
        axes.set_ylabel(key)
        if key == "accuracy":
            _in_percent(axes.yaxis)
        seen = [y for _, y in pairs if not math.isnan(y)]
        if key == "loss" and 0 < FAR * min(seen) < max(seen):  # a moment of collapse would flatten all others
            logarithmic(axes)
    _over_size(figure, [x for pairs in points.values() for x, y in pairs if not math.isnan(y)])
    legend(figure)


def _runs(figure: Any, report: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    sizes = [drawable(run.get("stored_ratio")) for run in runs]
    for axes, key in zip(figure.subplots(len(SENSE), sharex=True), SENSE, strict=True):
        ends = [(x, drawable(run.get(f"packed_{key}"))) for x, run in zip(sizes, runs, strict=True)]
        by_target: dict[float, list[tuple[float, float]]] = {}
        for end, run in zip(ends, runs, strict=True):
            if _held(run) and not any(map(math.isnan, (*end, drawable(run.get("target_size"))))):
                by_target.setdefault(drawable(run["target_size"]), []).append(end)
        means = [tuple(sum(v) / len(v) for v in zip(*by_target[target], strict=True)) for target in sorted(by_target)]
        if len(means) > 1:
            axes.plot(*zip(*means, strict=True), color=MAIN, linewidth=1.2, label="mean of a target")
        for label, marker, colour in (("held", "o", MAIN), ("not held", "X", ALARM)):
            chosen = [end for end, run in zip(ends, runs, strict=True) if _held(run) is (label == "held")]
            if chosen:
                axes.plot(*zip(*chosen, strict=True), marker, color=colour, linestyle="", label=label)
        mine = [end for end, run in zip(ends, runs, strict=True) if run.get("mine")]
        ring = {"markersize": 13, "markerfacecolor": "none", "markeredgewidth": 1.6}
        axes.plot(*zip(*mine, strict=True), "o", color=SECOND, **ring, label="this run")
        axes.axhline(drawable(report.get(f"float_{key}")), **DASHED, label="float")
        axes.set_ylabel(f"test {key}")
    _in_percent(figure.axes[0].yaxis)
    _over_size(figure, [x for x in sizes if x > 0])
    legend(figure)


def _held(run: Mapping[str, Any]) -> bool:
    return run.get("target_held") is True and run.get("tolerance_held") is True


def front(points: Sequence[tuple[float, float]], sense: int) -> list[tuple[float, float]]:
    """The points than which none is both as small and as good, from the smallest on.

    points: (size, value); `sense` is 1 where a larger value is better, -1 where a smaller one is.
    """
    best: list[tuple[float, float]] = []
    for size, value in sorted((x, -sense * y) for x, y in points if not math.isnan(y)):
        if not best or value < best[-1][1]:
            best.append((size, value))
    return [(size, -sense * value) for size, value in best]


def _over_size(figure: Any, sizes: Sequence[float]) -> None:
    """Share of the float size along the bottom, a logarithmic scale with numbers that a person would choose."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    low, high = (min(sizes), max(sizes)) if sizes else (0.01, 1.0)
    low, high = low / 1.12, high * 1.12
    figure.align_ylabels()
    ticks = [m * 10.0**e for e in range(-12, 13) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    for axes in figure.axes:
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.margins(y=0.15)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.3g}%")
        axes.tick_params(labelbottom=axes is figure.axes[-1])
    figure.axes[-1].set_xlabel("stored size, share of the float size")


def logarithmic(axes: Any) -> None:
    """The vertical axis; its numbers without formulas, which would be shown as they are written."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")

    def between(y: float, _: object) -> str:  # where no power of ten may be in sight
        low, high = axes.get_ylim()
        return f"{y:.3g}" if high < 10 * low else ""

    axes.yaxis.set_minor_formatter(between)


def legend(figure: Any) -> None:
    """Above the axes: points may lie anywhere in them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 3), fontsize=9.5)


def _in_percent(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def as_svg(figure: Any, name: str) -> Markup:
    """Render as one <svg> element: colours of the page, ids of its own, no reference to anything outside."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    opening = r'<svg xmlns="http://www.w3.org/2000/svg" aria-hidden="true" viewBox="\1">'
    svg = re.sub(r'^.*?<svg [^>]*viewBox="([^"]*)"[^>]*>', opening, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\bid="|(?:xlink:)?href="#|url\(#', lambda found: found[0].replace("xlink:", "") + f"{name}-", svg)
    return Markup(re.sub("|".join(THEME), lambda found: THEME[found[0]], svg).strip())
