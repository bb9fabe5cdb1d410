"""What was measured before the first trial, kept with the study: a search that goes on does not measure it again.

It also keeps one latency table for all workers of a study: tables of two moments differ, and so would what is within
the budget.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
import torch
from optuna.storages import BaseStorage
from optuna.study import Study
from torch import Tensor, nn

from .problem import Problem

PREPARED = "prepared"  # attribute of a study


def digest(network: nn.Module, batches: Sequence[Sequence[Tensor]], *more: Any) -> str:
    """Of weights, data and settings."""
    found = hashlib.sha256(repr(more).encode())
    for name, value in network.state_dict().items():
        found.update(f"{name} {tuple(value.shape)}".encode())
        found.update(bytes_of(value))
    for batch in batches:
        for part in batch:
            found.update(str(tuple(part.shape)).encode())
            found.update(bytes_of(part))
    return found.hexdigest()


def recall(storage: BaseStorage, name: str, key: str) -> Mapping[str, Any] | None:
    """What the study of that name keeps of the same weights, data and settings; None where it keeps nothing."""
    try:
        kept = optuna.load_study(study_name=name, storage=storage).user_attrs.get(PREPARED)
    except KeyError:  # there is no such study yet
        return None
    return kept if kept is not None and kept["key"] == key else None


def remember(study: Study, key: str, problem: Problem) -> None:
    """Keep what `prepare_search` takes as `known`, unless it is there."""
    if study.user_attrs.get(PREPARED, {}).get("key") != key:
        times = [[name, bits, seconds] for (name, bits), seconds in problem.cost.times.items()]
        study.set_user_attr(PREPARED, {"key": key, "sensitivity": asdict(problem.found), "times": times})


def bytes_of(value: Tensor) -> bytes:
    """As they lie in memory."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
