"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .beside import final
from .margins import called, figures, lost
from .pictures import parted, png, visible
from .plots import draw
from .words import SPLITS, WIDTHS, change, command, layer_row, mapping, number, percent, rows, settings, verdict

MOST_SAMPLES = 60  # changed samples in the page


def write_html(report: Mapping[str, Any], path: Path, others: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the page of `report` to `path`, whole or not at all: a page that was there stays until the new one is.

    `others`: what `runs_beside` found.
    """
    write_page(render(report, others), path)


def write_page(text: str, path: Path) -> None:
    """Write a page to `path`, whole or not at all."""
    page = text.encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the page as text."""
    environment = templates()
    names, runs = mapping(report.get("class_names")), final(report, others)
    by_split = [(report.get(name) or {}).get("regressions_by_class") or {} for name in SPLITS]
    regressed = dict.fromkeys(key for split in by_split for key, count in split.items() if count)
    return environment.get_template("page.html").render(
        r=report,
        verdict=verdict(report),
        plots=draw(report, runs),
        runs=runs,
        layers=[layer_row(layer) for layer in rows(report, "layers")],
        widths=WIDTHS,
        settings=settings(report),
        changed=[
            {**row, "png": png(row.get("picture")), "parts": parted(row)}
            for row in rows(report, "changed")[:MOST_SAMPLES]
        ],
        change=change(report),
        splits={name: report.get(name) for name in SPLITS},
        margins=figures(report, names),
        worst={name: _worst(report.get(name), names) for name in SPLITS},
        classes=[(called(key, names), [split.get(key) for split in by_split]) for key in regressed],
        command=command(report),
    )


def templates() -> jinja2.Environment:
    """The pages of this folder: all that is put into them is escaped, what is missing says so."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sgsc", "report"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else number(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "visible": visible, "lost": lost}
    return environment


def _worst(split: Any, names: Mapping[str, Any]) -> dict[str, Any] | None:
    worst = mapping(mapping(split).get("worst_class"))
    return {**worst, "name": called(worst.get("name"), names)} if worst else None
