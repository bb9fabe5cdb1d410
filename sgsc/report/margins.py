"""Margins before and after, of all samples, the hard tail and each class, as the page draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .pictures import visible
from .words import SPLITS, drawable, is_number, mapping, plain

MOST_CLASSES = 20


def figures(report: Mapping[str, Any], names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of each split that recorded parts, with the places of their two marks in percent of one common scale.

    Args:
        report: Comparisons by the name of their split.
        names: What the classes are called, where they have names.
    """
    shown = {name: listed for name in SPLITS if (listed := _listed(mapping(report.get(name)), names))}
    rows = [part for listed, _ in shown.values() for _, part in listed]
    found = [_value(part.get(key)) for part in rows for key in ("margin_float", "margin_packed")]
    low = min([0.75, *(math.floor(4 * value) / 4 for value in found if not math.isnan(value))])  # a round number
    return {
        name: {
            "rows": [_row(called, part, low) for called, part in listed],
            "left_out": left_out,
            "low": low,
            "zero": _place(max(0.0, low), low),
        }
        for name, (listed, left_out) in shown.items()
    }


def _listed(
    split: Mapping[str, Any], names: Mapping[str, Any]
) -> tuple[list[tuple[str, Mapping[str, Any]]], int] | None:
    """All, hard tail and classes of a split, and how many classes are left out; None where it recorded no parts."""
    parts = {str(key): part for key, part in mapping(split.get("by_class")).items() if isinstance(part, Mapping)}
    tail = split.get("tail")
    if not parts and not isinstance(tail, Mapping):
        return None
    whole = {"samples": split.get("float_right")}
    whole |= {key: split.get(key) for key in ("regressions", "margin_float", "margin_packed")}
    shown = {key: part for key, part in parts.items() if part.get("samples") != 0}
    if len(shown) > MOST_CLASSES:
        worst = sorted(shown, key=lambda key: _harm(shown[key]), reverse=True)[:MOST_CLASSES]
        shown = {key: shown[key] for key in worst}
    listed: list[tuple[str, Mapping[str, Any]]] = [("all", whole), ("hard tail", mapping(tail))]
    return listed + [(f"class {called(key, names)}", part) for key, part in shown.items()], len(parts) - len(shown)


def called(key: Any, names: Mapping[str, Any]) -> str:
    """What a class is called: its name where it has one, white space made visible, else its number."""
    name = names.get(str(key))
    return plain(key if name is None else visible(str(name)))


def lost(part: Any) -> float | None:
    """Share of the float margin that is gone, also where an older report did not record it."""
    part = mapping(part)
    before, after = part.get("margin_float"), part.get("margin_packed")
    if is_number(part.get("margin_lost")):
        return part["margin_lost"]
    return 1 - after / before if is_number(before) and is_number(after) and before else None


def _row(name: str, part: Mapping[str, Any], low: float) -> dict[str, Any]:
    places = {key: _place(_value(part.get(f"margin_{key}")), low) for key in ("float", "packed")}
    return {**part, "name": name, "places": places, "lost": lost(part)}


def _harm(part: Mapping[str, Any]) -> tuple[float, float]:
    samples, gone = part.get("samples"), part.get("regressions")
    share = gone / samples if is_number(gone) and is_number(samples) and samples else 0.0
    shrunk = drawable(lost(part))
    return (share, -math.inf if math.isnan(shrunk) else shrunk)


def _value(value: Any) -> float:
    return max(-1.0, min(1.0, drawable(value))) if not math.isnan(drawable(value)) else math.nan


def _place(value: float, low: float) -> float | None:
    """Percent of the width; a mark at either end stays whole."""
    return None if math.isnan(value) else 2 + 96 * (value - low) / (1 - low)
