"""Plots as <svg> elements that follow the theme of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .words import drawable, rows

# Plots are drawn in stand-in colours, each then replaced by a colour of the page, so that they follow its theme.
INK, LINE, MAIN, SECOND, ALARM = "#010101", "#010102", "#010103", "#010104", "#010105"
THEME = {INK: "currentColor", LINE: "var(--line)", MAIN: "var(--accent)", SECOND: "var(--second)", ALARM: "var(--bad)"}
PLOT_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "sgsc",  # the same report gives the same bytes
    "figure.figsize": (4.7, 3.2),
    "font.size": 10.5,
    **dict.fromkeys(("figure.constrained_layout.use", "axes.grid"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("grid.color", "axes.edgecolor"), LINE),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def draw(report: Mapping[str, Any]) -> dict[str, Markup]:
    """Draw the plots over steps as <svg> elements, by name; none without a history."""
    history = [row for row in rows(report, "history") if not math.isnan(drawable(row.get("step")))]
    if not history:
        return {}
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    steps = [drawable(row["step"]) for row in history]
    guard = [drawable(event.get("step")) for event in rows(report, "events") if event.get("what") == "guard"]
    dashed = {"color": INK, "linestyle": "--", "linewidth": 1.2}

    def line(axes: Any, key: str, default: Any = None, **how: Any) -> None:
        axes.plot(
            steps, [drawable(row.get(key, default)) for row in history], marker="." if len(steps) == 1 else "", **how
        )

    with matplotlib.style.context(["default", PLOT_STYLE]):  # whatever style the caller has set, and back to it
        size = Figure()
        axes = size.subplots()
        line(axes, "size", color=MAIN, label="size")
        line(axes, "target", report.get("target_size"), **dashed, label="target")
        if guard:
            axes.plot(guard, [0.03] * len(guard), "^", color=ALARM, transform=axes.get_xaxis_transform(), label="guard")
        axes.set(xlabel="step", ylabel="share of the float size", ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend()
        quality = Figure()
        above, below = quality.subplots(2, sharex=True)
        line(above, "accuracy", color=MAIN)
        above.axhline(drawable(report.get("float_accuracy")), **dashed)
        above.set_ylabel("accuracy")
        above.yaxis.set_major_formatter(PercentFormatter(1.0))
        line(below, "preservation_loss", color=SECOND)
        below.set(xlabel="step", ylabel="preservation loss")
        return {"size": _svg(size, "size"), "quality": _svg(quality, "quality")}


def _svg(figure: Any, name: str) -> Markup:
    """Render as one <svg> element: colours of the page, ids of its own, no reference to anything outside."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    opening = r'<svg xmlns="http://www.w3.org/2000/svg" aria-hidden="true" viewBox="\1">'
    svg = re.sub(r'^.*?<svg [^>]*viewBox="([^"]*)"[^>]*>', opening, svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'\bid="|(?:xlink:)?href="#|url\(#', lambda found: found[0].replace("xlink:", "") + f"{name}-", svg)
    return Markup(re.sub("|".join(THEME), lambda found: THEME[found[0]], svg).strip())
