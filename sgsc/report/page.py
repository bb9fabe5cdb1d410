"""The page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .pictures import png
from .plots import draw
from .words import SPLITS, WIDTHS, change, command, layer_row, number, percent, rows, verdict

MOST_SAMPLES = 60  # changed samples in the page


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of `report` to `path`, whole or not at all: a page that was there stays until the new one is."""
    page = render(report).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def render(report: Mapping[str, Any]) -> str:
    """Return the page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sgsc", "report"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else number(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent}
    by_split = [(report.get(name) or {}).get("regressions_by_class") or {} for name in SPLITS]
    regressed = dict.fromkeys(key for split in by_split for key, count in split.items() if count)
    return environment.get_template("page.html").render(
        r=report,
        verdict=verdict(report),
        plots=draw(report),
        layers=[layer_row(layer) for layer in rows(report, "layers")],
        widths=WIDTHS,
        changed=[{**row, "png": png(row.get("picture"))} for row in rows(report, "changed")[:MOST_SAMPLES]],
        change=change(report),
        splits={name: report.get(name) for name in SPLITS},
        classes={key: [split.get(key) for split in by_split] for key in regressed},
        command=command(report),
    )
