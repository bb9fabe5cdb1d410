"""What a search tells a person: its page, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .page import templates, write_page
from .search_plots import draw_search
from .words import mapping, number, percent, plain, rows

MOST_LAYERS = 40


def render_search(report: Mapping[str, Any]) -> str:
    """Return the page as text."""
    return (
        templates()
        .get_template("search.html")
        .render(
            r=report,
            plots=draw_search(report),
            layers=rows(report, "layers"),
            baselines=[t for t in rows(report, "trials") if t.get("baseline")],
        )
    )


def write_search_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of a search to `path`, whole or not at all."""
    write_page(render_search(report), path)


def search_summary(report: Mapping[str, Any]) -> RenderableType:
    """Return what the terminal prints: bits and channels a layer, the baselines, and what won."""
    layers = Table(box=None)
    for column in ("layer", "bits", "channels", "of", "bytes"):
        layers.add_column(column, justify="left" if column == "layer" else "right")
    for row in rows(report, "layers")[:MOST_LAYERS]:
        cells = (number(row.get(key), "{:,.0f}") for key in ("bits", "rows", "of_rows", "bytes"))
        layers.add_row(Text(plain(row.get("name"))), *cells)
    tried = Table(box=None)
    for column in ("baseline", "loss", "bytes"):
        tried.add_column(column, justify="left" if column == "baseline" else "right")
    for trial in rows(report, "trials"):
        if trial.get("baseline"):
            cells = number(trial.get("loss"), "{:.4f}"), number(mapping(trial.get("cost")).get("bytes"))
            tried.add_row(Text(plain(trial["baseline"])), *cells)
    result = mapping(report.get("result"))
    ends = Text(
        f"won by {plain(result.get('origin'))}: validation loss {number(result.get('loss'), '{:.4f}')}, "
        f"{number(report.get('stored_bytes'))} bytes, {percent(report.get('stored_ratio'))} of float, test accuracy "
        f"{percent(report.get('packed_accuracy'))} (float {percent(report.get('float_accuracy'))})"
    )
    return Group(layers, Text(""), tried, Text(""), ends)
