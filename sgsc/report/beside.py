"""Other runs of the same task in the folders beside a run: together they are the curve over target sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .words import is_number, mapping

FILE = "report.json"
SAME = ("task", "data", "limit", "float_bytes")  # runs that differ here are of other data or another network
KEPT = (
    *("seed", "target_size", "stored_bytes", "stored_ratio", "bits_per_weight", "packed_accuracy", "packed_loss"),
    *("target_held", "tolerance_held"),
)
MOST_RUNS, MOST_BYTES = 100, 64 * 2**20


def runs_beside(folder: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the runs beside `folder` came to, by the name of their folder; whatever is no finished run is passed over.

    Args:
        folder: The run folder; it is not among the runs itself.
        report: Its report.
    """
    here, found = folder.resolve(), []
    for path in sorted(here.parent.glob(f"*/{FILE}")):
        said = {} if path.parent.resolve() == here else _read(path)
        if not all(said.get(key) == report.get(key) for key in SAME):
            continue
        if is_number(said.get("stored_ratio")) and is_number(said.get("packed_accuracy")):
            guard = {"regressions": mapping(said.get("guard")).get("regressions")}
            found.append({"run": path.parent.name, **{key: said.get(key) for key in KEPT}, "guard": guard})
        if len(found) == MOST_RUNS:
            break
    return found


def final(report: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """This run among the others, smallest first; nothing where there are no others."""
    if not others:
        return []
    mine = {"run": "this run", "mine": True, **{key: report.get(key) for key in KEPT}, "guard": report.get("guard")}
    return sorted([mine, *others], key=lambda run: run["stored_ratio"] if is_number(run["stored_ratio"]) else 2.0)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            return {}
        return mapping(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
