"""Markdown tables and what stands in their cells."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], lines: Iterable[Sequence[str]], text: int = 1) -> str:
    """A Markdown table whose first `text` columns hold text; the others are aligned to the right."""
    rule = ["---"] * text + ["---:"] * (len(head) - text)
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in (head, rule, *lines))


def cell(value: str) -> str:
    """Text that stays within its cell."""
    return " ".join(value.replace("|", "\\|").split())


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the least and the most where they differ."""
    low, mean, high = (f"{v:{form}}" for v in (min(values), statistics.fmean(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def plain(value: Any) -> str:
    """A value as text: numbers with four digits, None as nothing."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def times(value: float, lost: bool | None = None) -> str:
    """A ratio, bold where we lose: below 1, if nothing else is said."""
    return f"**{value:.2f}×**" if (value < 1 if lost is None else lost) else f"{value:.2f}×"


def microseconds(value: float) -> str:
    """A time with the digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:,.1f}"
