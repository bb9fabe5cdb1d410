"""Strict JSON, which other programs read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


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
