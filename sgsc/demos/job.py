"""The main job on a demo task: train in float, choose, compress, pack, save; then, in a fresh process, certify.

The run folder holds, beside the reports that the command line writes:

    model.sgsc                 the packed network
    float.safetensors          the float network that it came from
    preservation.safetensors   the preservation set, as a checkpoint
    checkpoint.safetensors     the state of the compression some steps ago; gone once the run is certified
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sgsc.artefact import save
from sgsc.checkpoint import load_checkpoint, save_checkpoint
from sgsc.compression import Outcome, SelfCompression
from sgsc.config import CompressionConfig
from sgsc.coupling import NORMS
from sgsc.cutting import CONVOLUTIONS, depthwise_layers, take_shapes
from sgsc.files import write_atomically
from sgsc.packed import PackedLayer, pack
from sgsc.preparation import prepare
from sgsc.preservation import PreservationSet, quotas
from sgsc.size import float_bytes, nominal_bits

from .task import Task, data_hash
from .training import answered, decayed, drawn_by, evaluate, peak, samples_of, schedule, train

MODEL, FLOAT, KEPT, CHECKPOINT = "model.sgsc", "float.safetensors", "preservation.safetensors", "checkpoint.safetensors"
REPORTS = ("report.json", "certificate.json", "report.html")  # written last: those of an older run must not stay
LEARNED = ("integer", "half-steps", "ternary", "interpolated", "published")  # quantizers whose widths a run can learn
CHECKPOINT_EVERY = 4  # checks of the guard
LOOK_EVERY = 4  # the same: each point of the curve over steps costs a pass over LOOK samples
CANDIDATES = 5000  # training samples that the preservation set is chosen from, at most: each costs a backward pass
LOOK = 2000  # validation samples that the curve over steps is measured on, at most

NOT_ITS_OWN = (safetensors.SafetensorError, RuntimeError, AttributeError)  # what loading foreign weights raises

Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Compressed:
    """What `compress` made: the outcome of the run, the report's part that training knows, and the file."""

    outcome: Outcome
    report: dict[str, Any]


def float_model(task: Task, seed: int, folder: Path, progress: Progress) -> nn.Module:
    """The float network: from the run folder where it is there and fits, else trained and written there.

    A task that starts from trained weights has nothing to train.

    Raises:
        ValueError: If the weights that the task starts from are of another network.
    """
    path = folder / FLOAT
    if path.is_file():
        return read_float(task, path)
    if task.start is not None:
        try:
            model = _loaded(task, task.start())
        except NOT_ITS_OWN as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"the weights to start {task.name} from are not of its network: {said}") from None
    else:
        model = train(task, seed, progress=lambda step, steps, values: progress("float training", step, steps, values))
    write_atomically(path, safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()}))
    return model


def read_float(task: Task, path: Path) -> nn.Module:
    """The float network that a file holds.

    Raises:
        ValueError: If the file is damaged, or of another network.
    """
    try:
        return _loaded(task, safetensors.torch.load_file(path))
    except NOT_ITS_OWN as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold the float network of {task.name}: {said}; compress anew") from None


@torch.no_grad()
def _loaded(task: Task, state: Mapping[str, Tensor]) -> nn.Module:
    """The task's network with the weights of a state dict, and with the channels it has there: a search changes them.

    Raises:
        RuntimeError: If these are not weights of the network; or another of NOT_ITS_OWN.
    """
    model = task.build().eval()
    x = task.train.tensors[0][:1].cpu()
    wanted = model(x).shape
    for name, own in model.state_dict().items():
        of = model.get_submodule(name.rpartition(".")[0])
        other = state[name].shape if name in state else own.shape  # what is missing is named by load_state_dict
        resizes = isinstance(of, (nn.Linear, *CONVOLUTIONS, *NORMS)) and len(other) == own.dim()
        if other != own.shape and not (resizes and other[2:] == own.shape[2:] and min(other) > 0):
            raise RuntimeError(f"{name} has shape {tuple(other)}, want {tuple(own.shape)} or other channels")
    take_shapes(model, dict(state), depthwise_layers(model))
    model.load_state_dict(state)
    if model(x).shape != wanted:
        raise RuntimeError(f"outputs {tuple(model(x).shape)}, want {tuple(wanted)}")
    return model


def compress(
    task: Task,
    config: CompressionConfig,
    folder: Path,
    *,
    samples: int | None = None,
    resume: bool = False,
    quantizer: str = "integer",
    shares: Mapping[str, float] | None = None,
    device: str = "cpu",
    progress: Progress = lambda phase, step, steps, values: None,
) -> Compressed:
    """Train, select, compress, pack and save; everything but the certificate.

    Args:
        task: Data, network and schedule.
        config: Of the compression; its seed seeds all.
        folder: The run folder; it exists.
        samples: Size of the preservation set; the task's own if None.
        resume: Go on from the folder's checkpoint.
        quantizer: One whose widths are learned; see `prepare`.
        shares: Of the selectors of the preservation set; see `PreservationSet.select`.
        device: Where to train; the splits are drawn on the CPU, whichever it is.
        progress: Called as progress(phase, step, steps, values).

    Raises:
        ValueError: If there are not so many samples, the quantizer is not one of LEARNED, or `resume` finds a
            checkpoint of other settings or data.
        FileNotFoundError: If `resume` finds no checkpoint.
    """
    clock = _Clock()
    samples = min(task.samples, len(task.train)) if samples is None else samples
    if not 1 <= samples <= len(task.train):  # before the float training, not after it
        raise ValueError(f"samples={samples}: want 1 to {len(task.train)}, the number of training samples")
    quotas(samples, shares)
    if quantizer not in LEARNED:
        raise ValueError(f"quantizer={quantizer!r}: want one whose widths are learned: {', '.join(LEARNED)}")
    settings = {"config": config.as_dict(), "task": task.name, "samples": samples, "data": data_hash(task)}
    settings |= {"quantizer": quantizer, "shares": shares}
    settings |= {"precision": task.precision, "weight_decay": task.weight_decay, "distilled": task.distilled}
    settings |= {"learning_rate": peak(task, config.steps, task.distilled)}
    saved = load_checkpoint(folder / CHECKPOINT) if resume else None
    found = _settings(saved)
    if saved is not None and {name: found.get(name) for name in settings} != settings:
        other = ", ".join(k for k in settings if found.get(k) != settings[k])
        raise ValueError(
            f"{folder / CHECKPOINT} is of a run with another {other}: {found}; want {settings}. "
            "Give the settings of that run, or start anew without --resume"
        )
    if saved is None:
        if task.start is None:  # a target that cannot be reached is refused before the float training
            with torch.random.fork_rng(devices=[]):
                built = task.build()
                _run_of(task, config, prepare(built, quantizer=quantizer).model, None, _file(task, config.seed, built))
        for name in (FLOAT, KEPT, CHECKPOINT, MODEL, *REPORTS):
            (folder / name).unlink(missing_ok=True)
    there = task.to(device)
    network = float_model(there, config.seed, folder, progress).to(device)
    clock.lap("float training")
    if saved is None:
        progress("selection", 0, 1, {})
        keep = _select(task, network, samples, shares, config.seed)
        save_checkpoint(folder / KEPT, keep.state())
    else:
        keep = PreservationSet.from_state(*load_checkpoint(folder / KEPT)).to(device)
    clock.lap("selection")
    model = prepare(network, quantizer=quantizer).model
    file = _file(task, config.seed, network)
    run, outcome = _train_compressed(
        there, config, network.eval(), model, keep, folder, settings, saved, progress, file
    )
    clock.lap("compression")
    packed = pack(model.cpu())
    size = save(packed, folder / MODEL, **file)
    clock.lap("packing")
    report = {
        "task": task.name,
        "sources": task.sources,
        "seed": config.seed,
        "settings": settings,
        "target_size": config.target_size,
        "tolerance": config.tolerance,
        "margin_tolerance": config.margin_tolerance,
        "float_bytes": float_bytes(network),
        "stored_bytes": size,
        "stored_ratio": size / float_bytes(network),
        "nominal_bytes": math.ceil(float(nominal_bits(model, run.control.coupling).detach()) / 8),
        **_layers(network, packed),
        "target_held": size <= config.target_size * float_bytes(network),
        "reason": outcome.reason,
        "history": run.history,
        "events": run.events,
        "seconds_by_phase": clock.laps,
    }
    return Compressed(outcome, report)


def _file(task: Task, seed: int, network: nn.Module) -> dict[str, Any]:
    """What the file says beside its weights."""
    with torch.device("meta"):
        usual = task.build()
    shapes, own = ([v.shape for v in of.state_dict().values()] for of in (usual, network))
    # with other channels, those of a search, no architecture names what the file is of
    notes = {"task": task.name, "seed": seed, "float_bytes": float_bytes(network)}
    return {"architecture": task.architecture if shapes == own else None, "notes": notes}


def _settings(saved: Any) -> dict[str, Any]:
    settings = saved.get("settings") if isinstance(saved, dict) else None
    return settings if isinstance(settings, dict) else {}


def _run_of(
    task: Task, config: CompressionConfig, model: nn.Module, keep: PreservationSet | None, file: dict[str, Any]
) -> SelfCompression:
    optimiser = torch.optim.AdamW(
        decayed(model.parameters(), task.weight_decay), lr=peak(task, config.steps, task.distilled)
    )
    return SelfCompression(model, keep, optimizer=optimiser, file=file, **config.as_dict())


def _train_compressed(
    task: Task,
    config: CompressionConfig,
    network: nn.Module,
    model: nn.Module,
    keep: PreservationSet,
    folder: Path,
    settings: dict[str, Any],
    saved: dict[str, Any] | None,
    progress: Progress,
    file: dict[str, Any],
) -> tuple[SelfCompression, Outcome]:
    run = _run_of(task, config, model, keep, file)
    (optimiser,) = run.optimizers
    order = torch.Generator().manual_seed(config.seed)
    if saved is not None:
        run.load_state_dict(saved["run"])
        optimiser.load_state_dict(saved["optimiser"])
        order.set_state(saved["order"])
    data = samples_of(task, order)
    look = TensorDataset(*task.validation[:LOOK])
    highest = peak(task, config.steps, task.distilled)
    while run.steps < config.steps:
        rate = highest * schedule(run.steps / config.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        model.train()
        x, y = next(data)
        with drawn_by(config.seed, run.steps, x.device), task.autocast():
            loss = run.loss(task.loss(model(x), y, answered(network, x) if task.distilled else None))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        run.step()
        if run.steps % (LOOK_EVERY * config.guard_every) == 0 or run.steps == config.steps:
            run.history[-1] |= evaluate(model, look)
        if run.steps % (CHECKPOINT_EVERY * config.guard_every) == 0 and run.steps < config.steps:
            state = {"settings": settings, "run": run.state_dict(), "optimiser": optimiser.state_dict()}
            save_checkpoint(folder / CHECKPOINT, state | {"order": order.get_state()})
        shown = {k: v for k, v in run.history[-1].items() if k in ("size", "regressions", "accuracy", "task_loss")}
        progress("compression", run.steps, config.steps, shown)
    outcome = run.finish()
    return run, outcome


def _select(
    task: Task, network: nn.Module, samples: int, shares: Mapping[str, float] | None, seed: int
) -> PreservationSet:
    """The preservation set, from a random part of a large training split; indices are of the whole split."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))
    part = order[: max(CANDIDATES, samples)].sort().values
    keep = PreservationSet.select(network, TensorDataset(*task.train[part]), samples, shares=shares, seed=seed)
    return replace(keep, indices=part.to(keep.indices.device)[keep.indices])


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
            left_here = packed.get_submodule(name)
            values = [*left_here.parameters(recurse=False), *left_here.buffers(recurse=False)]
            size = 4 * sum(v.numel() for v in values if v.is_floating_point())
            left.append({"name": name, "why": f"{type(original).__name__} stays float32", "bytes": size})
    return {
        "bits_per_weight": total_bits / total_weights,
        "channels": sum(r["channels"] for r in rows),
        "channels_removed": cut + zeroed,
        "channels_zeroed_in_place": zeroed,
        "layers": rows,
        "left_float": left,
    }


class _Clock:
    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now
