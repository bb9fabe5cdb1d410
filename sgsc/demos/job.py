"""The main job on a demo task: train in float, choose, compress, pack, save; then, in a fresh process, certify.

The run folder holds, beside the reports that the command line writes:

    model.sgsc                 the packed network
    float.safetensors          the float network that it came from
    preservation.safetensors   the preservation set, as a checkpoint
    checkpoint.safetensors     the state of an unfinished compression; gone when it is done
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sgsc import __version__
from sgsc.artefact import ARCHITECTURES, read, save
from sgsc.artefact import load as load_artefact
from sgsc.certificate import answers, certify, compare, outputs
from sgsc.checkpoint import load_checkpoint, save_checkpoint
from sgsc.compression import Outcome, SelfCompression
from sgsc.config import CompressionConfig
from sgsc.files import write_atomically
from sgsc.kernels import OPS, backend
from sgsc.packed import PackedLayer, pack
from sgsc.preparation import prepare
from sgsc.preservation import PreservationSet
from sgsc.size import float_bytes, nominal_bits

from . import models
from .tasks import Task
from .training import augmentation, batches, evaluate, train

MODEL, FLOAT, KEPT, CHECKPOINT = "model.sgsc", "float.safetensors", "preservation.safetensors", "checkpoint.safetensors"
TUNING = 1 / 3  # peak learning rate of the compression, over that of the float training: it starts from a good network
CHECKPOINT_EVERY = 4  # checks of the guard
CANDIDATES = 5000  # training samples that the preservation set is chosen from, at most: each costs a backward pass
SHOWN = 24  # changed samples that the report shows, at most
LOOK = 2000  # validation samples that the curve over steps is measured on, at most

ARCHITECTURES.update(models.ARCHITECTURES)  # so that `load` can build them
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Compressed:
    """What `compress` made: the outcome of the run, the report's part that training knows, and the file."""

    outcome: Outcome
    report: dict[str, Any]


def float_model(task: Task, seed: int, folder: Path, progress: Progress) -> nn.Module:
    """The float network: from the run folder where it is there and fits, else trained and written there."""
    path = folder / FLOAT
    if path.is_file():
        return _read_float(task, path)
    model = train(task, seed, progress=lambda step, steps, values: progress("float training", step, steps, values))
    write_atomically(path, safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()}))
    return model


def _read_float(task: Task, path: Path) -> nn.Module:
    """The float network that a file holds.

    Raises:
        ValueError: If the file is damaged, or of another network.
    """
    model = task.build()
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, RuntimeError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold the float network of {task.name}: {said}; compress anew") from None
    return model.eval()


def compress(
    task: Task,
    config: CompressionConfig,
    folder: Path,
    *,
    samples: int = 200,
    resume: bool = False,
    progress: Progress = lambda phase, step, steps, values: None,
) -> Compressed:
    """Train, select, compress, pack and save; everything but the certificate.

    Args:
        task: Data, network and schedule.
        config: Of the compression; its seed seeds all.
        folder: The run folder; it exists.
        samples: Size of the preservation set.
        resume: Go on from the folder's checkpoint.
        progress: Called as progress(phase, step, steps, values).

    Raises:
        ValueError: If there are not so many samples, or `resume` finds a checkpoint of other settings or data.
        FileNotFoundError: If `resume` finds no checkpoint.
    """
    clock = _Clock()
    if not 1 <= samples <= len(task.train):  # before the float training, not after it
        raise ValueError(f"samples={samples}: want 1 to {len(task.train)}, the number of training samples")
    settings = {"config": config.as_dict(), "task": task.name, "samples": samples, "data": _data_hash(task)}
    saved = load_checkpoint(folder / CHECKPOINT) if resume else None
    if saved is not None and (found := _settings(saved)) != settings:
        other = ", ".join(k for k in settings if found.get(k) != settings[k])
        raise ValueError(
            f"{folder / CHECKPOINT} is of a run with another {other}: {found}; want {settings}. "
            "Give the settings of that run, or start anew without --resume"
        )
    if saved is None:
        for name in (FLOAT, KEPT, CHECKPOINT, MODEL):
            (folder / name).unlink(missing_ok=True)
    network = float_model(task, config.seed, folder, progress)
    clock.lap("float training")
    if saved is None:
        progress("selection", 0, 1, {})
        keep = _select(task, network, samples, config.seed)
        save_checkpoint(folder / KEPT, keep.state())
    else:
        keep = PreservationSet.from_state(*load_checkpoint(folder / KEPT))
    clock.lap("selection")
    model = prepare(network).model
    file: dict[str, Any] = {"architecture": task.architecture}
    file["notes"] = {"task": task.name, "seed": config.seed, "float_bytes": float_bytes(network)}
    run, outcome = _train_compressed(task, config, model, keep, folder, settings, saved, progress, file)
    clock.lap("compression")
    packed = pack(model)
    size = save(packed, folder / MODEL, **file)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    clock.lap("packing")
    report = {
        "task": task.name,
        "sources": task.sources,
        "seed": config.seed,
        "settings": settings,
        "target_size": config.target_size,
        "tolerance": config.tolerance,
        "float_bytes": float_bytes(network),
        "stored_bytes": size,
        "stored_ratio": size / float_bytes(network),
        "nominal_bytes": math.ceil(float(nominal_bits(model, run.coupling).detach()) / 8),
        **_layers(network, packed),
        "target_held": size <= config.target_size * float_bytes(network),
        "reason": outcome.reason,
        "history": run.history,
        "events": run.events,
        "seconds_by_phase": clock.laps,
    }
    return Compressed(outcome, report)


def _settings(saved: Any) -> dict[str, Any]:
    settings = saved.get("settings") if isinstance(saved, dict) else None
    return settings if isinstance(settings, dict) else {}


def _data_hash(task: Task) -> str:
    """sha256, in hex, of what a run is trained and judged on; the test split is not read for it."""
    digest = hashlib.sha256()
    for split in (task.train, task.validation, task.guard):
        for tensor in split.tensors:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _train_compressed(
    task: Task,
    config: CompressionConfig,
    model: nn.Module,
    keep: PreservationSet,
    folder: Path,
    settings: dict[str, Any],
    saved: dict[str, Any] | None,
    progress: Progress,
    file: dict[str, Any],
) -> tuple[SelfCompression, Outcome]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.learning_rate, weight_decay=0.01)
    run = SelfCompression(model, keep, optimizer=optimiser, file=file, **config.as_dict())
    order = torch.Generator().manual_seed(config.seed)
    if saved is not None:
        run.load_state_dict(saved["run"])
        optimiser.load_state_dict(saved["optimiser"])
        order.set_state(saved["order"])
    data = batches(task.train, task.batch_size, order, augmentation(task))
    look = TensorDataset(*task.validation[:LOOK])
    while run.steps < config.steps:
        rate = TUNING * task.learning_rate * _schedule(run.steps / config.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        model.train()
        x, y = next(data)
        loss = run.loss(task.loss(model(x), y))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        run.step()
        if run.steps % config.guard_every == 0:
            run.history[-1] |= evaluate(model, look)
            if run.steps % (CHECKPOINT_EVERY * config.guard_every) == 0 and run.steps < config.steps:
                state = {"settings": settings, "run": run.state_dict(), "optimiser": optimiser.state_dict()}
                save_checkpoint(folder / CHECKPOINT, state | {"order": order.get_state()})
        shown = {k: v for k, v in run.history[-1].items() if k in ("size", "regressions", "accuracy", "loss")}
        progress("compression", run.steps, config.steps, shown)
    outcome = run.finish()
    return run, outcome


def _select(task: Task, network: nn.Module, samples: int, seed: int) -> PreservationSet:
    """The preservation set, from a random part of a large training split; indices are of the whole split."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
    part = order[: max(CANDIDATES, samples)].sort().values
    keep = PreservationSet.select(network, TensorDataset(*task.train[part]), samples, seed=seed)
    return replace(keep, indices=part[keep.indices])


def _schedule(share: float) -> float:
    """Share of the peak learning rate: linear over the first tenth, then a cosine to 0."""
    return min((share + 0.01) / 0.1, 0.5 * (1 + math.cos(math.pi * max(share - 0.1, 0) / 0.9)))


def _layers(network: nn.Module, packed: nn.Module) -> dict[str, Any]:
    """The report's part on layers: what each kept, against the float network."""
    rows, left = [], []
    total_bits = total_weights = cut = zeroed = 0
    names = {name for name, m in packed.named_modules() if isinstance(m, PackedLayer)}
    for name, original in network.named_modules():
        if name in names:
            layer = packed.get_submodule(name)
            assert isinstance(layer, PackedLayer)
            weight = original.get_parameter("weight")
            channels = weight.shape[0]
            gone = channels - len(layer.bits)
            counts = torch.bincount(layer.bits.long(), minlength=9).tolist()
            live = int((layer.bits > 0).sum())
            counts[0] += gone
            total_bits += int(layer.bits.long().sum()) * layer.width
            total_weights += weight.numel()
            cut, zeroed = cut + gone, zeroed + len(layer.bits) - live
            bias = 0 if layer.bias is None else 4 * len(layer.bias)
            rows.append(
                {
                    "name": name,
                    "type": layer.type_name,
                    "shape": list(weight.shape),
                    "bits": {str(width): count for width, count in enumerate(counts) if count},
                    "channels": channels,
                    "removed": counts[0],
                    "bytes": layer.data.numel() + 2 * live + (len(layer.bits) + 1) // 2 + bias,
                    "float_bytes": 4 * sum(p.numel() for p in original.parameters(recurse=False)),
                }
            )
        elif any(True for _ in original.parameters(recurse=False)):
            size = 4 * sum(p.numel() for p in packed.get_submodule(name).parameters(recurse=False))
            left.append({"name": name, "why": f"{type(original).__name__} stays float32", "bytes": size})
    return {
        "bits_per_weight": total_bits / total_weights,
        "channels": sum(r["channels"] for r in rows),
        "channels_removed": cut + zeroed,
        "channels_zeroed_in_place": zeroed,
        "layers": rows,
        "left_float": left,
    }


def certify_run(task: Task, folder: Path, seed: int, tolerance: float) -> dict[str, Any]:
    """Load the file as a user would and compare it with the float network; reads the test split, once.

    Meant to run in a process that has not trained: what it sees is what the file holds.
    """
    started = time.perf_counter()
    artefact = read(folder / MODEL)
    packed = load_artefact(folder / MODEL)
    network = _read_float(task, folder / FLOAT)
    keep = PreservationSet.from_state(*load_checkpoint(folder / KEPT))
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (MODEL, FLOAT)}
    certificate = certify(
        network,
        packed,
        task.guard,
        keep,
        tolerance=tolerance,
        seeds={"run": seed},
        hashes={**hashes, "training data": keep.data_hash},
        stored_bytes=artefact.size,
    )
    test = task.test()
    x, y = test.tensors
    on_test = compare(outputs(network, x), outputs(packed, x), y)
    changed = _changed(task, "guard", task.guard.tensors, (network, packed), certificate.guard.changed)
    if certificate.preservation is not None:
        reasons, pair = list(keep.reasons), (keep.inputs, keep.targets)
        kept = _changed(task, "preservation", pair, (network, packed), certificate.preservation.changed)
        changed += [entry | {"reason": reasons[entry["index"]]} for entry in kept]
    counts = {reason: keep.reasons.count(reason) for reason in dict.fromkeys(keep.reasons)}
    values = certificate.as_dict()
    return {
        "certificate": values,
        "statement": certificate.statement(),
        "preservation": (values["preservation"] or {}) | {"reasons": counts},
        "guard": values["guard"],
        "tolerance_held": bool(certificate.held),
        "float_accuracy": on_test.float_accuracy,
        "packed_accuracy": on_test.packed_accuracy,
        "accuracy_standard_error": on_test.standard_error,
        "test": on_test.as_dict(),
        "float_loss": evaluate(network, test)["loss"],
        "packed_loss": evaluate(packed, test)["loss"],
        "changed": changed[:SHOWN],
        "backend": backend(OPS["packed_linear"]),
        "backends": {name: backend(op) for name, op in OPS.items() if name.startswith("packed")},
        "sha256": artefact.manifest["sha256"],
        "file": MODEL,
        "certify_seconds": time.perf_counter() - started,
    }


def _changed(
    task: Task, split: str, pair: tuple[Tensor, ...], models: tuple[nn.Module, nn.Module], which: Iterable[int]
) -> list[dict[str, Any]]:
    which = list(which)[:SHOWN]
    if not which:
        return []
    x, y = pair
    before, after = (answers(outputs(model, x[which])) for model in models)
    shown = []
    for n, i in enumerate(which):
        target = y[i] if y.dim() == 1 else y[i, -1]
        say = [task.alphabet[int(v)] if task.text else str(int(v)) for v in (target, before[n], after[n])]
        picture = task.show(x[i])
        entry = {"split": split, "index": int(i), "target": say[0], "float_answer": say[1], "packed_answer": say[2]}
        shown.append(entry | ({"text": picture} if task.text else {"picture": picture}))
    return shown


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for reports and bench results."""
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sgsc": __version__},
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {platform.system()}",
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _commit() -> str:
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return os.environ.get("SGSC_COMMIT", "unknown")
    try:
        described = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now
