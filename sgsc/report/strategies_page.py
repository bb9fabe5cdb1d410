"""What a strategy search tells a person: its page, and its table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .page import templates, write_page
from .plots import ALARM, DASHED, MAIN, PLOT_STYLE, SECOND, as_svg, legend, logarithmic
from .words import drawable, is_number, mapping, number, percent, plain, rows

MOST_LAYERS = 60


def render_strategies(report: Mapping[str, Any]) -> str:
    """Return the page as text."""
    of = "shares" if report.get("trained_steps") else "losses"
    names = {side: _names(report, f"{side}_{of}") for side in ("weight", "input")}
    return (
        templates()
        .get_template("strategies.html")
        .render(
            r=report,
            plots=draw_strategies(report),
            layers=rows(report, "layers"),
            names=names,
            of=of,
            uniform=sorted(rows(report, "uniform"), key=lambda row: _or_infinity(row.get("loss"))),
        )
    )


def write_strategies_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of a strategy search to `path`, whole or not at all."""
    write_page(render_strategies(report), path)


def strategies_summary(report: Mapping[str, Any]) -> RenderableType:
    """Return what the terminal prints: the strategies of each layer, and what they were compared with."""
    layers = Table(box=None)
    for column in ("layer", "weight", "bits", "input", "bits"):
        layers.add_column(column, justify="right" if column == "bits" else "left")
    for row in rows(report, "layers")[:MOST_LAYERS]:
        cells = Text(plain(row.get("name"))), Text(plain(row.get("weight"))), number(row.get("bits_weight"), "{:.0f}")
        given = Text(plain(row["input"]) if row.get("input") else "float")
        layers.add_row(*cells, given, number(row["bits_input"], "{:.0f}") if row.get("bits_input") else "")
    compared = Table(box=None)
    for column in ("choice", "loss"):
        compared.add_column(column, justify="left" if column == "choice" else "right")
    best = report.get("best_uniform")
    named = " + ".join(plain(name) for name in best if name) if isinstance(best, (list, tuple)) else "not recorded"
    for name, key in ((f"best uniform ({named})", "best_uniform_loss"), ("greedy alone", "greedy_loss")):
        compared.add_row(Text(name), number(report.get(key), "{:.3g}"))
    compared.add_row("result", number(report.get("loss"), "{:.3g}"))
    ends = []
    if report.get("derived_accuracy") is not None:
        accuracies = percent(report.get("derived_accuracy")), percent(report.get("float_accuracy"))
        ends = [Text(""), Text("test accuracy {} (float {})".format(*accuracies))]
        if report.get("packed_exact_accuracy") is not None:
            both = [percent(v) for n in ("exact", "int8") if (v := report.get(f"packed_{n}_accuracy")) is not None]
            ends += [Text(f"packed {', in int8 numerics '.join(both)}")]
    return Group(layers, *(() if report.get("trained_steps") else (Text(""), compared)), *ends)


def draw_strategies(report: Mapping[str, Any]) -> dict[str, Markup]:
    """Draw the losses of uniform choices and the course of a mixture or training, as far as there is something."""
    found: dict[str, Any] = {}
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", PLOT_STYLE]):
        uniform = [row for row in rows(report, "uniform") if drawable(row.get("loss")) > 0]
        if uniform:
            _uniform(found.setdefault("uniform", Figure()), uniform, report)
        course = rows(report, "course")
        if course:
            axes = found.setdefault("course", Figure()).subplots()
            steps = [drawable(row.get("step")) for row in course]
            axes.plot(steps, [drawable(row.get("loss")) for row in course], color=MAIN, linewidth=1, label="loss")
            if any("entropy" in row for row in course):
                axes.plot(steps, [drawable(row.get("entropy")) for row in course], color=SECOND, label="entropy")
            for before, row in pairwise(course):  # stages of a training
                if row.get("stage") != before.get("stage"):
                    axes.axvline(drawable(row.get("step")), **{**DASHED, "color": ALARM})
            of = "training" if report.get("trained_steps") else "mixture"
            axes.set(xlabel="step", ylabel=f"of the {of}")
            logarithmic(axes)
            legend(axes.figure)
        return {name: as_svg(figure, name) for name, figure in found.items()}


def _uniform(figure: Any, uniform: list[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    axes.plot(
        range(len(uniform)),
        sorted(drawable(row["loss"]) for row in uniform),
        "o",
        markersize=4,
        color=MAIN,
        label="a choice",
    )
    for key, colour, text in (("greedy_loss", SECOND, "greedy alone"), ("loss", ALARM, "result")):
        if drawable(report.get(key)) > 0:
            axes.axhline(drawable(report.get(key)), **{**DASHED, "color": colour}, label=text)
    axes.set(xlabel="uniform choices, best first", ylabel="loss")
    logarithmic(axes)
    legend(figure)


def _names(report: Mapping[str, Any], key: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows(report, "layers") for name in mapping(row.get(key))))


def _or_infinity(value: Any) -> float:
    return float(value) if is_number(value) else math.inf
