"""The words that page and terminal share: a report's values as text, and what is absent or no number said so."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import Any, TypeGuard

import jinja2

SPLITS = ("preservation", "guard")
WIDTHS = range(9)  # bits a weight that a channel can have; 0 is a channel that is gone
MISSING, NOT_A_NUMBER = "not recorded", "not a number"


def rows(report: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The rows of a table that a report holds, without what is no row."""
    return [row for row in report.get(key) or [] if isinstance(row, Mapping)]


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def plain(value: Any) -> str:
    """Text without control characters, which could steer a terminal or break XML."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number; true and false are none, nor is an integer that no float holds."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1023)


def number(value: Any, pattern: str = "{:,}") -> str:
    """A value as text: a number by its pattern, else what it says, or that it is missing."""
    if value is None or isinstance(value, jinja2.Undefined):
        return MISSING
    if not is_number(value):
        return plain(value)
    return pattern.format(value) if math.isfinite(value) else NOT_A_NUMBER


def percent(value: Any) -> str:
    """A fraction of 1 in percent."""
    return number(100 * value if is_number(value) else value, "{:.2f} %")


def change(report: Mapping[str, Any]) -> str:
    """The change of the test accuracy, in points, beside its standard error."""
    before, after, error = map(report.get, ("float_accuracy", "packed_accuracy", "accuracy_standard_error"))
    if not (is_number(before) and is_number(after)):
        return ""
    beside = f", standard error {number(100 * error, '{:.2f}')}" if is_number(error) else ""
    return f"{number(100 * (after - before), '{:+.2f}')} points{beside}"


def verdict(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """(state, headline, why); state is held, missed or open."""
    promises = {"size target": report.get("target_held"), "preservation tolerance": report.get("tolerance_held")}
    missed = [name for name, held in promises.items() if held is False]
    if missed:
        return "missed", f"Not held: {' and '.join(missed)}", plain(report.get("reason") or "no reason was recorded")
    unknown = [name for name, held in promises.items() if held is not True]
    if unknown:
        return "open", "Not judged", f"whether the {' and the '.join(unknown)} was held is not recorded"
    return "held", "Held", "the file meets its size target and the answers stay within the preservation tolerance"


def layer_row(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Add to a layer its channels counted by width, their mean width, and the pieces of its bar in percent."""
    bits = layer.get("bits") or {}
    found = [bits.get(str(width), bits.get(width)) for width in WIDTHS]
    counts = [int(count) if is_number(count) and 0 < count < math.inf else 0 for count in found]
    total = sum(counts) or math.nan
    bar = [(w, count, 100 * sum(counts[:w]) / total, 100 * count / total) for w, count in enumerate(counts) if count]
    size, before = layer.get("bytes"), layer.get("float_bytes")
    ratio = size / before if is_number(size) and is_number(before) and before else None
    mean = sum(width * count for width, count in enumerate(counts)) / total if bar else None
    added = {"name": number(layer.get("name")), "counts": counts, "bar": bar, "mean": mean, "ratio": percent(ratio)}
    return {**layer, **added}


def command(report: Mapping[str, Any]) -> str:
    """Return the command that repeats the run, from the settings that were recorded."""
    words = ["sgsc", "compress", str(report.get("task"))]
    said = mapping(report.get("settings"))
    known = {key: report.get(key) for key in ("target_size", "tolerance", "seed")}
    known |= mapping(said.get("config"))
    known |= {key: said.get(key) for key in ("samples", "quantizer", "precision")}
    known |= {key: report.get(key) for key in ("limit", "data", "device", "start")}
    shares = mapping(said.get("shares"))
    known |= {"shares": ",".join(f"{name}={number(share, '{}')}" for name, share in shares.items()) or None}
    known |= {"float_steps": report.get("float_steps") or None}  # 0: weights were there
    for key, value in known.items():
        flag = str(key).replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", number(value, "{}")]
    return plain(shlex.join(words)) if report.get("task") else MISSING


def settings(report: Mapping[str, Any]) -> dict[str, str]:
    """Every setting that was recorded, by name, as text; those of the compression first."""
    said = dict(mapping(report.get("settings")))
    listed = {**mapping(said.pop("config", None)), **said}
    return {plain(key): number(value, "{}") for key, value in listed.items()}


def drawable(value: Any) -> float:
    """Return `value` where a plot can show it, else NaN, which leaves a gap."""
    return float(value) if is_number(value) and abs(value) < 1e12 else math.nan
