"""What the terminal prints of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .margins import called, lost
from .words import SPLITS, WIDTHS, change, is_number, layer_row, mapping, number, percent, plain, rows, verdict

MOST_LAYERS = 40


def summary(report: Mapping[str, Any]) -> RenderableType:
    """Return what the terminal prints: float against packed, bits a layer, regressions, backend, verdict."""
    get = report.get
    before, gone = get("channels"), get("channels_removed")
    kept = before - gone if is_number(before) and is_number(gone) else None
    removed = f"{number(gone)} removed, {number(get('channels_zeroed_in_place'))} zeroed in place"
    ratio = f"{percent(get('stored_ratio'))} of float (target {percent(get('target_size'))})"
    result = [
        ["test accuracy", percent(get("float_accuracy")), percent(get("packed_accuracy")), change(report)],
        ["test loss", *(number(get(key), "{:.4f}") for key in ("float_loss", "packed_loss")), ""],
        ["stored bytes", number(get("float_bytes")), number(get("stored_bytes")), ratio],
        ["bits a weight", "32", number(get("bits_per_weight"), "{:.2f}"), ""],
        ["channels", number(get("channels")), number(kept), removed],
    ]
    layers = [
        [layer["name"], *(str(count or ".") for count in layer["counts"]), number(layer.get("bytes")), layer["ratio"]]
        for layer in (layer_row(row) for row in rows(report, "layers"))
    ]
    if len(layers) > MOST_LAYERS:
        layers[MOST_LAYERS:] = [[f"... and {len(layers) - MOST_LAYERS} more", *[""] * (len(WIDTHS) + 2)]]
    splits = [[name, *_split(mapping(get(name)))] for name in SPLITS]
    state, headline, why = verdict(report)
    style = {"held": "bold green", "missed": "bold red", "open": "bold yellow"}[state]
    return Group(
        _table([plain(get("task") or ""), "float", "packed", ""], result),
        _table(["\nchannels by bits", *map(str, WIDTHS), "bytes", "of float"], layers),
        _table(["\nsplit", "samples", "regressions", "at most, 95 %", "same answer", "margin lost", "in tail"], splits),
        Text(f"{_worst(report)}\nran on {number(get('backend'))}, {number(get('seconds'), '{:,.1f}')} s in all"),
        Text.assemble((f"{headline}: ", style), why),
    )


def _split(split: Mapping[str, Any]) -> list[str]:
    how = {"samples": number, "regressions": number, "upper_bound_95": percent, "agreement": percent}
    shrunk = [lost(split), lost(split.get("tail"))]
    return [*(show(split.get(key)) for key, show in how.items()), *("" if x is None else percent(x) for x in shrunk)]


def _worst(report: Mapping[str, Any]) -> str:
    """A line for each split in which a class regressed."""
    names, lines = mapping(report.get("class_names")), ""
    for split in SPLITS:
        worst = mapping(mapping(report.get(split)).get("worst_class"))
        if worst.get("regressions"):
            of = f"{number(worst['regressions'])} of {number(worst.get('samples'))} regressed"
            lines += f"\nworst class, {split}: {called(worst.get('name'), names)}, {of}"
    return lines


def _table(header: list[str], cells: list[list[str]]) -> Table:
    """Lay cells out as `Text`, never as markup: a layer may be called '[/bold]'."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(header):
        right = i > 0 and name != ""
        table.add_column(
            Text(name), justify="right" if right else "left", no_wrap=right, overflow="fold", vertical="bottom"
        )
    for row in cells:
        table.add_row(*map(Text, row))
    return table
