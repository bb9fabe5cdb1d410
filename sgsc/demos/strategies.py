"""Strategies on a demo task, or on any network: search or train, pack, judge. The test split is read once, at the end.

The run folder holds derived.safetensors, the state of the derived network with all grids, and model.sgsc, the file that
runs, unless the network cannot be packed; then the report says why.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.artefact import save
from sgsc.distillation import distilled
from sgsc.layers import quant_layers
from sgsc.packed import pack, set_numerics
from sgsc.packed.layers import NUMERICS, PackedProduct
from sgsc.samples import device_of
from sgsc.size import float_bytes
from sgsc.strategies.data import samples_of
from sgsc.strategies.derived import save_derived
from sgsc.strategies.qat import StrategyTraining
from sgsc.strategies.search import KEPT, layer_rows, search_strategies
from sgsc.strategies.settings import check_steps, settings_of

from .job import MODEL, Progress, float_model
from .task import Task
from .training import answered, drawn_by, evaluate
from .training import samples_of as batches_of

DERIVED = "derived.safetensors"
SAMPLES = 1024  # of calibration
CHECKED = 16  # of these, that the packed network has to answer as the derived one does
FAR = 0.1  # of the norm of the answers: sums in another order may round some input to its other neighbour


def draw(data: Tensor, samples: int, seed: int) -> Tensor:
    """Some of the samples, (N, ...), at random.

    Raises:
        ValueError: If `samples` is below 1, there is none, or one holds NaN or infinity.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} calibrates nothing; give 1 or more")
    samples_of(data)  # here it still is known which one it is that cannot be taken
    return data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples]]


def search(
    task: Task,
    folder: Path,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
    steps: int = 100,
    integer_bias: bool = False,
    progress: Progress = lambda phase, step, steps, values: None,
    **settings: Any,
) -> dict[str, Any]:
    """Float network, calibration on training data, search, files, test split; returns the report.

    Args:
        task: Data, network and schedule.
        folder: The run folder; it exists.
        samples: Of calibration, drawn from the training split.
        seed: Of every random choice.
        steps: Of the mixture.
        integer_bias: As `search_strategies` takes it.
        progress: Called as progress(phase, step, steps, values).
        **settings: Fields of StrategySettings.

    Raises:
        ValueError: Before anything is trained, if a setting is out of its range.
    """
    started = time.perf_counter()
    check_steps(steps, 0)
    settings_of(False, {"seed": seed, **settings})
    inputs = draw(task.train.tensors[0], samples, seed)
    network = float_model(task, seed, folder, progress).eval()
    how = {"steps": steps, "integer_bias": integer_bias, "seed": seed, "progress": progress}
    found = search_strategies(network, inputs, **how, **settings)
    report = _report(task, network, found.model, inputs, folder)
    return {**report, **found.report, "seconds": time.perf_counter() - started}


def train(
    task: Task,
    folder: Path,
    *,
    steps: int,
    rate: float | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress = lambda phase, step, steps, values: None,
    **settings: Any,
) -> dict[str, Any]:
    """The same by `StrategyTraining`, of `steps` steps on the training split, batch norms in place.

    Args:
        task: Data, network, batch size and precision.
        folder: The run folder; it exists.
        steps: Of the training.
        rate: Peak of the learning rate; the task's own if None.
        samples: That learned grids start from, drawn from the training split.
        seed: Of every random choice.
        progress: Called as progress(phase, step, steps, values).
        **settings: Fields of StrategySettings, as `StrategyTraining` takes them.

    Raises:
        ValueError: Before anything is trained, if a setting is out of its range.
    """
    started = time.perf_counter()
    check_steps(steps, 1)
    settings_of(True, {"seed": seed, **settings})
    inputs = draw(task.train.tensors[0], samples, seed)
    network = float_model(task, seed, folder, progress).eval()
    rate = task.learning_rate if rate is None else rate
    run = StrategyTraining(network, inputs, steps=steps, rate=rate, seed=seed, **settings)
    data = batches_of(task, torch.Generator().manual_seed(seed))
    course = learn(run, network, data, seed=seed, autocast=task.autocast, progress=progress)
    report = _report(task, network, run.model.eval(), inputs, folder)
    return report | {
        **{key: getattr(run.settings, key) for key in KEPT},
        **{"trained_steps": steps, "rate": rate, "left": run.left, "course": course},
        "layers": layer_rows(quant_layers(run.model), run.choice, run.bits, run.shares),
        "seconds": time.perf_counter() - started,
    }


def learn(
    run: StrategyTraining,
    network: nn.Module,
    data: Iterable[tuple[Tensor, ...]],
    *,
    seed: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    progress: Progress = lambda phase, step, steps, values: None,
) -> list[dict[str, Any]]:
    """All steps of a training; returns what each was made of.

    It learns the answers of the float network.

    Args:
        run: The training.
        network: The float network, in evaluation mode.
        data: Batches, inputs first, as many as there are steps or more; targets are not needed.
        seed: Of dropout.
        autocast: Context of the forward passes.
        progress: Called as progress(phase, step, steps, values).

    Raises:
        ValueError: If the data ends before the training.
    """
    course: list[dict[str, Any]] = []
    for x, *_ in data:
        with drawn_by(seed, len(course), x.device), autocast():
            value = distilled(run.model(x), answered(network, x))
        stage = run.stage
        said = run.step(value)
        course.append({"step": len(course), "stage": stage, **said})
        progress(f"training: {stage}", len(course), run.steps, said)
        if run.done:
            return course
    raise ValueError(f"the data ended after {len(course)} of {run.steps} steps; pass one that begins again")


def _report(task: Task, network: nn.Module, derived: nn.Module, inputs: Tensor, folder: Path) -> dict[str, Any]:
    """What both ways have to say; writes the files, and reads the test split for all that are there to answer it."""
    stored, packed = store(derived, inputs, folder, {"task": task.name})
    report = {
        **{"kind": "strategies", "task": task.name, "sources": task.sources, "samples": len(inputs)},
        **{"float_bytes": float_bytes(network), **stored},
        "validation": {"float": evaluate(network, task.validation), "derived": evaluate(derived, task.validation)},
    }
    test = task.test()
    for name, model in (("float", network), ("derived", derived)):
        report |= {f"{name}_{key}": value for key, value in evaluate(model, test).items()}
    if packed is not None:
        for numerics, model in in_numerics(packed):
            report |= {f"packed_{numerics}_{key}": value for key, value in evaluate(model, test).items()}
    return report


def search_any(
    network: nn.Module,
    calibration: Tensor,
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress = lambda phase, step, steps, values: None,
    **settings: Any,
) -> dict[str, Any]:
    """The same for a network and data of the user's own, without labels; returns the report."""
    found = search_strategies(network, calibration, seed=seed, progress=progress, **settings)
    kept = {"kind": "strategies", "task": type(network).__name__, "samples": len(calibration)}
    stored, _ = store(found.model, calibration, folder, {})
    return {**kept, "float_bytes": float_bytes(network), **found.report, **stored}


def store(
    derived: nn.Module, inputs: Tensor, folder: Path, notes: dict[str, Any]
) -> tuple[dict[str, Any], nn.Module | None]:
    """Write the derived network; returns what the report says of its files, and the packed network if there is one."""
    save_derived(derived, folder / DERIVED)
    try:
        packed = pack(derived, remove=False)
        inputs = inputs[:CHECKED].to(device_of(derived))
        off = {f"packed_{n}_off": answers_alike(by, derived, inputs) for n, by in in_numerics(packed)}
        size = save(packed, folder / MODEL, notes={**notes, "strategies": True})
    except ValueError as error:
        (folder / MODEL).unlink(missing_ok=True)  # that of an older run must not stay
        return {"stored_bytes": None, "not_packed": str(error)}, None
    return {"stored_bytes": size, "not_packed": "", **off}, packed


def in_numerics(packed: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A packed network in each numerics, the last of them exact; one that does not multiply has only that."""
    products = any(isinstance(m, PackedProduct) for m in packed.modules())
    for numerics in reversed(NUMERICS) if products else NUMERICS[:1]:
        yield numerics, set_numerics(packed, numerics) if products else packed


@torch.no_grad()
def answers_alike(packed: nn.Module, derived: nn.Module, inputs: Tensor) -> float:
    """How far the answers of a packed network are off those of the derived one, as a share of their norm.

    Raises:
        ValueError: If it does not run, as where the network reads a layer's weight beside calling it, or is far off.
    """
    wanted = derived(inputs).float()
    try:
        answers = packed(inputs).float()
    except Exception as error:  # of the network's own code, which may look for anything that a packed layer has not
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ValueError(
            f"packed, the network does not run ({said}); leave the layers it means float, by skip"
        ) from None
    off = (answers - wanted).norm() / wanted.norm().clamp_min(1e-30)
    if not off <= FAR:
        raise ValueError(
            f"packed, the network is off by {off:.2g} of the norm of its answers; leave layers float, by skip"
        )
    return off.item()
