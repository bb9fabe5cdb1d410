"""What a compression run tells a person: strict JSON, tables for the terminal, one self-contained HTML page.

All three read one dictionary, the content of `report.json`. Every key is optional: what is absent or null reads "not
recorded", NaN and infinity read "not a number", and neither stops a report from being written. Sizes are bytes;
accuracies, shares, bounds and the tolerance are fractions of 1, shown in percent; times are seconds.

The page asks nothing of the network and runs no script, and its content-security policy forbids both. Everything in
the dictionary is untrusted text: escaped in the page, never markup in the terminal, stripped of control characters.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shlex
import struct
import zlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SPLITS = ("preservation", "guard")
WIDTHS = range(9)  # bits a weight that a channel can have; 0 is a channel that is gone
MOST_LAYERS, MOST_SAMPLES = 40, 60  # layers in the terminal, changed samples in the page
MISSING, NOT_A_NUMBER = "not recorded", "not a number"

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


def to_json(report: Mapping[str, Any]) -> str:
    """Write `report` as strict JSON, keys in their order; NaN and infinity, which JSON has not, become null.

    Raises:
        ValueError: If a value is of a type that JSON has not; the message names where.
    """
    return json.dumps(_strict(report, "report"), indent=2, allow_nan=False) + "\n"


def _strict(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_strict(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return {str(key): _strict(v, f"{where}[{str(key)!r}]") for key, v in value.items()}
    raise ValueError(
        f"{where}: {type(value).__name__} cannot be written as JSON; allowed are text, numbers, true, false, null, "
        "lists, and dictionaries with text or integer keys; use .tolist() on arrays and str() on paths"
    )


def write_html(report: Mapping[str, Any], path: Path) -> None:
    """Write the page of `report` to `path`, whole or not at all: a page that was there stays until the new one is."""
    page = _page(report).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _page(report: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else _number(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent}
    template = environment.from_string(resources.files("sgsc").joinpath("report.html").read_text("utf-8"))
    by_split = [(report.get(name) or {}).get("regressions_by_class") or {} for name in SPLITS]
    regressed = dict.fromkeys(key for split in by_split for key, count in split.items() if count)
    return template.render(
        r=report,
        verdict=_verdict(report),
        plots=_plots(report),
        layers=[_layer(layer) for layer in _rows(report, "layers")],
        widths=WIDTHS,
        changed=[{**row, "png": _png(row.get("picture"))} for row in _rows(report, "changed")[:MOST_SAMPLES]],
        change=_change(report),
        splits={name: report.get(name) for name in SPLITS},
        classes={key: [split.get(key) for split in by_split] for key in regressed},
        command=_command(report),
    )


def summary(report: Mapping[str, Any]) -> RenderableType:
    """Return what the terminal prints: float against packed, bits a layer, regressions, backend, verdict."""
    get = report.get
    before, gone = get("channels"), get("channels_removed")
    kept = before - gone if _is_number(before) and _is_number(gone) else None
    removed = f"{_number(gone)} removed, {_number(get('channels_zeroed_in_place'))} zeroed in place"
    ratio = f"{_percent(get('stored_ratio'))} of float (target {_percent(get('target_size'))})"
    result = [
        ["test accuracy", _percent(get("float_accuracy")), _percent(get("packed_accuracy")), _change(report)],
        ["test loss", *(_number(get(key), "{:.4f}") for key in ("float_loss", "packed_loss")), ""],
        ["stored bytes", _number(get("float_bytes")), _number(get("stored_bytes")), ratio],
        ["bits a weight", "32", _number(get("bits_per_weight"), "{:.2f}"), ""],
        ["channels", _number(get("channels")), _number(kept), removed],
    ]
    layers = [
        [layer["name"], *(str(count or ".") for count in layer["counts"]), _number(layer.get("bytes")), layer["ratio"]]
        for layer in (_layer(row) for row in _rows(report, "layers"))
    ]
    if len(layers) > MOST_LAYERS:
        layers[MOST_LAYERS:] = [[f"... and {len(layers) - MOST_LAYERS} more", *[""] * (len(WIDTHS) + 2)]]
    how = {"samples": _number, "regressions": _number, "upper_bound_95": _percent, "agreement": _percent}
    splits = [[name, *(show((get(name) or {}).get(key)) for key, show in how.items())] for name in SPLITS]
    state, verdict, why = _verdict(report)
    style = {"held": "bold green", "missed": "bold red", "open": "bold yellow"}[state]
    return Group(
        _table([_plain(get("task") or ""), "float", "packed", ""], result),
        _table(["\nchannels by bits", *map(str, WIDTHS), "bytes", "of float"], layers),
        _table(["\nsplit", "samples", "regressions", "at most, 95 %", "same answer"], splits),
        Text(f"\nran on {_number(get('backend'))}, {_number(get('seconds'), '{:,.1f}')} s in all"),
        Text.assemble((f"{verdict}: ", style), why),
    )


def _table(header: list[str], rows: list[list[str]]) -> Table:
    """Lay cells out as `Text`, never as markup: a layer may be called '[/bold]'."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(header):
        number = i > 0 and name != ""
        table.add_column(
            Text(name), justify="right" if number else "left", no_wrap=number, overflow="fold", vertical="bottom"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _rows(report: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [row for row in report.get(key) or [] if isinstance(row, Mapping)]


def _plain(value: Any) -> str:
    """Text without control characters, which could steer a terminal or break XML."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any, pattern: str = "{:,}") -> str:
    if value is None or isinstance(value, jinja2.Undefined):
        return MISSING
    if not _is_number(value):
        return _plain(value)
    return pattern.format(value) if math.isfinite(value) else NOT_A_NUMBER


def _percent(value: Any) -> str:
    return _number(value, "{:.2%}").replace("%", " %")


def _change(report: Mapping[str, Any]) -> str:
    before, after, error = map(report.get, ("float_accuracy", "packed_accuracy", "accuracy_standard_error"))
    if not (_is_number(before) and _is_number(after)):
        return ""
    beside = f", standard error {_number(100 * error, '{:.2f}')}" if _is_number(error) else ""
    return f"{_number(100 * (after - before), '{:+.2f}')} points{beside}"


def _verdict(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """(state, headline, why); state is held, missed or open."""
    promises = {"size target": report.get("target_held"), "preservation tolerance": report.get("tolerance_held")}
    missed = [name for name, held in promises.items() if held is False]
    if missed:
        return "missed", f"Not held: {' and '.join(missed)}", _plain(report.get("reason") or "no reason was recorded")
    unknown = [name for name, held in promises.items() if held is not True]
    if unknown:
        return "open", "Not judged", f"whether the {' and the '.join(unknown)} was held is not recorded"
    return "held", "Held", "the file meets its size target and the answers stay within the preservation tolerance"


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a layer its channels counted by width, their mean width, and the pieces of its bar in percent."""
    bits = layer.get("bits") or {}
    found = [bits.get(str(width), bits.get(width)) for width in WIDTHS]
    counts = [int(count) if _is_number(count) and 0 < count < math.inf else 0 for count in found]
    total = sum(counts) or math.nan
    bar = [(w, count, 100 * sum(counts[:w]) / total, 100 * count / total) for w, count in enumerate(counts) if count]
    size, before = layer.get("bytes"), layer.get("float_bytes")
    ratio = size / before if _is_number(size) and _is_number(before) and before else None
    mean = sum(width * count for width, count in enumerate(counts)) / total if bar else None
    added = {"name": _number(layer.get("name")), "counts": counts, "bar": bar, "mean": mean, "ratio": _percent(ratio)}
    return {**layer, **added}


def _command(report: Mapping[str, Any]) -> str:
    """Return the command that repeats the run, from the settings that were recorded."""
    words = ["sgsc", "compress", str(report.get("task"))]
    for key in ("target_size", "tolerance", "seed"):
        words += [f"--{key.replace('_', '-')}", _number(report[key], "{}")] if report.get(key) is not None else []
    return _plain(shlex.join(words)) if report.get("task") else MISSING


def _png(picture: Any) -> str | None:
    """Turn rows of numbers (H, W) into a data URI, 8-bit grey: black its smallest value, white its largest."""
    if not (isinstance(picture, list) and picture and all(isinstance(row, list) and row for row in picture)):
        return None
    rows = [[_drawable(value) for value in row] for row in picture]
    finite = [value for row in rows for value in row if not math.isnan(value)]
    if not finite or any(len(row) != len(rows[0]) for row in rows):
        return None
    low, span = min(finite), max(finite) - min(finite) or 1.0
    grey = [bytes(0 if math.isnan(value) else round(255 * (value - low) / span) for value in row) for row in rows]
    header = struct.pack(">2I5B", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"".join(b"\0" + row for row in grey)), b"IEND"]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(framed)).decode()


def _drawable(value: Any) -> float:
    """Return `value` where a plot can show it, else NaN, which leaves a gap."""
    return float(value) if _is_number(value) and abs(value) < 1e12 else math.nan


def _plots(report: Mapping[str, Any]) -> dict[str, Markup]:
    """Draw the plots over steps as <svg> elements, by name; none without a history."""
    history = [row for row in _rows(report, "history") if not math.isnan(_drawable(row.get("step")))]
    if not history:
        return {}
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    steps = [_drawable(row["step"]) for row in history]
    guard = [_drawable(event.get("step")) for event in _rows(report, "events") if event.get("what") == "guard"]
    dashed = {"color": INK, "linestyle": "--", "linewidth": 1.2}

    def draw(axes: Any, key: str, default: Any = None, **how: Any) -> None:
        axes.plot(
            steps, [_drawable(row.get(key, default)) for row in history], marker="." if len(steps) == 1 else "", **how
        )

    with matplotlib.style.context(["default", PLOT_STYLE]):  # whatever style the caller has set, and back to it
        size = Figure()
        axes = size.subplots()
        draw(axes, "size", color=MAIN, label="size")
        draw(axes, "target", report.get("target_size"), **dashed, label="target")
        if guard:
            axes.plot(guard, [0.03] * len(guard), "^", color=ALARM, transform=axes.get_xaxis_transform(), label="guard")
        axes.set(xlabel="step", ylabel="share of the float size", ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.legend()
        quality = Figure()
        above, below = quality.subplots(2, sharex=True)
        draw(above, "accuracy", color=MAIN)
        above.axhline(_drawable(report.get("float_accuracy")), **dashed)
        above.set_ylabel("accuracy")
        above.yaxis.set_major_formatter(PercentFormatter(1.0))
        draw(below, "preservation_loss", color=SECOND)
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
