"""The search on a demo task: float network, study, winner packed and judged. The test split is read once, at the end.

The run folder holds model.sgsc, float.safetensors, winner.safetensors (the winner's weights before rounding, for
`sgsc compress --start`) and, unless the study lives elsewhere, study.db.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from sgsc.artefact import save
from sgsc.distillation import distilled
from sgsc.files import write_atomically
from sgsc.packed import pack
from sgsc.samples import evaluating
from sgsc.search.candidates import as_float
from sgsc.search.cost import Budget
from sgsc.search.problem import check_budget
from sgsc.search.sensitivity import Loss
from sgsc.search.storage import open_storage
from sgsc.search.study import check_settings, check_study, search_network
from sgsc.size import float_bytes

from .job import FLOAT, LOOK, MODEL, Progress, float_model
from .qat import tune
from .task import Task, data_hash
from .training import answered, evaluate, peak

STUDY, WINNER = "study.db", "winner.safetensors"
SENSITIVITY_SAMPLES, SENSITIVITY_BATCH = 1024, 64
JUDGED = 512  # validation samples at once
SHORT = 0.1  # of the task's compression steps, for a candidate
MIDDLE = 1 / 3  # of a candidate's steps, after which a hopeless one is stopped


@dataclass(frozen=True)
class Searched:
    """The report, and whether the budget holds for the file."""

    report: dict[str, Any]
    held: bool


@dataclass(frozen=True)
class Schedule:
    """How candidates of a task are trained and judged: all alike, from the same seed, on the float network's answers.

    In few steps these teach more than labels, also where the float network had few itself: MNIST at 8 % of the bytes
    after 100 steps has 98.9 to 99.2 % of the guard split right, and 98.6 by labels. They judge more evenly too: of 20
    random configurations of digits, two short trainings that differ in the seed have a rank correlation of 0.71, and of
    0.60 and 0.69 with a long one; by the cross entropy of the 179 labels it is -0.12, and 0.42 and 0.02.

    Attributes:
        task: Its splits are at `device`.
        device: Where candidates are trained.
        seed: Of the batches.
        steps: Optimiser steps of a candidate.
        finish_steps: Of the winner.
        teacher: The float network, at `device`, in evaluation mode.
    """

    task: Task
    device: str
    seed: int
    steps: int
    finish_steps: int
    teacher: nn.Module

    def short(self, model: nn.Module, report: Callable[[float], None]) -> None:
        """Train a candidate; part of the way its loss is reported."""

        def middle(done: int) -> None:
            if done == max(round(MIDDLE * self.steps), 1):
                report(self.loss(model))

        tune(self.task, model.to(self.device), self.steps, self.seed, middle, self.teacher)

    def long(self, model: nn.Module, report: Callable[[float], None]) -> None:
        """Train a winner."""
        tune(self.task, model.to(self.device), self.finish_steps, self.seed, teacher=self.teacher)

    @cached_property
    def wanted(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of validation inputs, and what the float network answers."""
        inputs = self.task.validation[:LOOK][0].split(JUDGED)
        return [(x, answered(self.teacher, x)) for x in inputs]

    def loss(self, model: nn.Module) -> float:
        """What candidates learn by, on validation samples."""
        with torch.no_grad(), evaluating(model):
            losses = [distilled(model(x), answers).item() for x, answers in self.wanted]
        return float(np.average(losses, weights=[len(x) for x, _ in self.wanted]))


def loss_of(task: Task) -> Loss:
    """The task's loss on a batch."""
    return lambda model, batch: task.loss(model(batch[0]), batch[1])


def parts_of(task: Task) -> list[tuple[Tensor, ...]]:
    """Batches of training samples, for the sensitivity."""
    samples = min(SENSITIVITY_SAMPLES, len(task.train))
    starts = range(0, samples, SENSITIVITY_BATCH)
    return [tuple(task.train[i : min(i + SENSITIVITY_BATCH, samples)]) for i in starts]


def parse_budget(text: str, floats: int) -> Budget:
    """A budget as it is typed: "4bits", "20%", "50kB", "40000B", "2.5MMAC", "3ms", or several with commas.

    `floats`: bytes of the float network, which a percentage is of.

    Raises:
        ValueError: If it is none of these.
    """
    units = {"%": ("bytes", floats / 100), "B": ("bytes", 1), "kB": ("bytes", 1e3), "MB": ("bytes", 1e6)}
    units |= {"bits": ("mean_bits", 1), "MAC": ("macs", 1), "kMAC": ("macs", 1e3), "MMAC": ("macs", 1e6)}
    units |= {"GMAC": ("macs", 1e9), "us": ("seconds", 1e-6), "ms": ("seconds", 1e-3), "s": ("seconds", 1)}
    limits: dict[str, float] = {}
    for part in text.split(","):
        digits = part.strip().rstrip("%abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = part.strip()[len(digits) :].strip()
        name, factor = units.get(unit, ("", math.nan))
        try:
            limit = float(digits) * factor
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise ValueError(
                f"budget {part.strip()!r}: want a number and a unit of {', '.join(units)}, such as 4bits, 10% (of the "
                "float32 bytes), 50kB, 2.5MMAC or 3ms; several with commas"
            )
        if name in limits:
            raise ValueError(f"budget {text!r} limits {name} twice; give one limit of each kind")
        limits[name] = limit
    return Budget(**limits)


def search(
    task: Task,
    budget: str,
    folder: Path,
    *,
    trials: int = 60,
    seed: int = 0,
    steps: int | None = None,
    finish_steps: int | None = None,
    storage: str | None = None,
    study: str | None = None,
    sampler: str = "kmeans-tpe",
    sensitivity: str = "auto",
    widths: bool = True,
    device: str = "cpu",
    progress: Progress = lambda phase, step, steps, values: None,
) -> Searched:
    """Search, train the winner, pack it, save it, and judge it on the test split.

    Args:
        task: Data, network and schedule.
        budget: See `parse_budget`.
        folder: The run folder; it exists.
        trials: Of the study, baselines included.
        seed: Of every random choice.
        steps: Optimiser steps of a candidate; a tenth of the task's compression if None.
        finish_steps: Of the winner; the task's compression if None.
        storage: URL or file of the study; study.db in the run folder if None.
        study: Its name; that of the task if None.
        sampler: A key of SAMPLERS.
        sensitivity: "hutchinson", "fisher", or "auto" by the size of the network.
        widths: Whether layer widths are searched too.
        device: Where candidates are trained.
        progress: Called as progress(phase, step, steps, values).

    Raises:
        ValueError: If an argument is out of range or the budget is too small.
    """
    started = time.perf_counter()
    steps = max(round(SHORT * task.compress_steps), 1) if steps is None else steps
    finish_steps = task.compress_steps if finish_steps is None else finish_steps
    file: dict[str, Any] = {"architecture": None, "notes": {"task": task.name, "seed": seed, "searched": True}}
    # what cannot be searched is refused before the float network is trained
    check_settings(trials, seed, sampler, sensitivity)
    if steps < 1 or finish_steps < 1:
        raise ValueError(f"steps={steps}, finish_steps={finish_steps}: a candidate that is not trained tells nothing")
    there = task.start is not None or (folder / FLOAT).is_file()  # it may have other channels than the task's own
    network = float_model(task.to(device), seed, folder, progress).cpu().eval() if there else None
    shape = task.build() if network is None else network
    floats = float_bytes(shape)
    limits = parse_budget(budget, floats)
    check_budget(shape, limits, task.train[:1][0], widths=widths, **file)
    opened = open_storage(folder / STUDY if storage is None else storage)
    name = study or task.name
    settings = {"task": task.name, "steps": steps, "widths": widths, "data": data_hash(task), "judged_by": "answers"}
    settings |= {"sensitivity": sensitivity, "weight_decay": task.weight_decay, "precision": task.precision}
    settings |= {"learning_rate": peak(task, steps, distilled=True)}
    check_study(opened, name, sampler, seed, limits, settings)
    if network is None:
        network = float_model(task.to(device), seed, folder, progress).cpu().eval()
    how = Schedule(task.to(device), device, seed, steps, finish_steps, copy.deepcopy(network).to(device))
    after = time.perf_counter() - started
    found = search_network(
        network,
        how.short,
        how.loss,
        limits,
        loss=loss_of(task),
        batches=parts_of(task),
        trials=trials,
        seed=seed,
        storage=opened,
        name=name,
        sampler=sampler,
        finish=how.long,
        settings=settings,
        widths=widths,
        method=sensitivity,
        latency=limits.seconds is not None,
        progress=progress,
        **file,
    )
    state = as_float(found.model.cpu()).state_dict()
    write_atomically(folder / WINNER, safetensors.torch.save({k: v.contiguous() for k, v in state.items()}))
    packed = pack(found.model, remove=False)
    size = save(packed, folder / MODEL, **file)
    test = task.test()
    before, after_test = evaluate(network, test), evaluate(packed, test)
    validation = {"float": evaluate(network, task.validation), "packed": evaluate(packed, task.validation)}
    report = {
        **{"kind": "search", "task": task.name, "sources": task.sources, "seed": seed, "device": device},
        **{"float_bytes": floats, "stored_bytes": size, "stored_ratio": size / floats, "trials_wanted": trials},
        **{f"float_{k}": v for k, v in before.items()},
        **{f"packed_{k}": v for k, v in after_test.items()},
        **{"validation": validation, "distilled": True, "judged_by": settings["judged_by"], "budget_text": budget},
        **{"steps": steps, "finish_steps": finish_steps},
        **found.report,
    }
    report["seconds_by_phase"] = {"float network": after, **found.report["seconds_by_phase"]}
    report["seconds"] = time.perf_counter() - started
    exact = {**found.cost, "bytes": size}
    return Searched(report, limits.holds(exact))
