"""Uniform quantization-aware training of a demo task: what learned widths must beat at equal bytes.

The same data, batches, augmentation, optimiser, learning rate, schedule, clipping and teacher as `job` gives the
compression, and the task's loss alone. Every layer has one fixed width, but the first and the last have 8 bits, as is
usual (arXiv 1902.08153, section 3): at 2 bits they would cost the baseline more accuracy than they save bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sgsc.artefact import stored_size
from sgsc.layers import quant_layers
from sgsc.packed import pack
from sgsc.preparation import prepare
from sgsc.size import float_bytes

from .task import Task
from .training import answered, decayed, drawn_by, evaluate, peak, samples_of, schedule

EDGES = 8  # bits of the first and the last layer


def uniform(network: nn.Module, bits: int, edges: int = EDGES) -> nn.Module:
    """A prepared copy of a float network: LSQ of `bits` in all layers, of `edges` in the first and the last."""
    model = prepare(network, quantizer=f"lsq{bits}").model
    layers = list(quant_layers(model).values())
    for layer in {id(layer): layer for layer in (layers[0], layers[-1])}.values():
        layer.attach(f"lsq{edges}")
    return model


def train_uniform(task: Task, network: nn.Module, bits: int, steps: int, seed: int, device: str = "cpu") -> nn.Module:
    """Train at one width from float weights; returns the packed network, on the CPU.

    Raises:
        ValueError: If `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} trains nothing; give 1 or more")
    task = task.to(device)
    network = network.to(device).eval()
    model = uniform(network, bits)
    tune(task, model, steps, seed, teacher=network if task.distilled else None)
    return pack(model.cpu())


def tune(
    task: Task,
    model: nn.Module,
    steps: int,
    seed: int,
    watch: Callable[[int], None] = lambda done: None,
    teacher: nn.Module | None = None,
) -> None:
    """Train a model of LSQ layers in place, where it is; `watch` is called with the number of steps done, after each.

    The answers of `teacher`, the float network in evaluation mode at the same place, are learned in place of labels.

    The steps of the quantizers learn at a rate relative to their start, without decay: an optimiser that normalises
    gradients would else move those of few bits and of many equally far.
    """
    quantizers = [layer.weight_quantizer for layer in quant_layers(model).values()]
    own = {id(p) for q in quantizers for p in q.parameters()}
    groups = decayed((p for p in model.parameters() if id(p) not in own), task.weight_decay, of=1.0)
    for step in (q.get_parameter("step") for q in quantizers):
        groups.append({"params": [step], "of": float(step.detach().mean()), "weight_decay": 0.0})
    highest = peak(task, steps, teacher is not None)
    optimiser = torch.optim.AdamW(groups, lr=highest)
    data = samples_of(task, torch.Generator().manual_seed(seed))
    for done in range(steps):
        model.train()
        rate = highest * schedule(done / steps)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["of"]
        x, y = next(data)
        with drawn_by(seed, done, x.device), task.autocast():
            loss = task.loss(model(x), y, None if teacher is None else answered(teacher, x))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        watch(done + 1)


def run(task: Task, network: nn.Module, bits: int, steps: int, seed: int, device: str = "cpu") -> dict[str, Any]:
    """One point of the baseline: stored bytes, and how float and packed network answer the test split, read once."""
    started = time.perf_counter()
    packed = train_uniform(task, network, bits, steps, seed, device)
    network = network.cpu().eval()
    total, size = float_bytes(network), stored_size(packed, architecture=task.architecture)
    validation = evaluate(packed, task.validation)
    test = task.test()
    before, after = evaluate(network, test), evaluate(packed, test)
    return {
        **{"task": task.name, "bits": bits, "seed": seed, "steps": steps},
        **{"device": device, "precision": task.precision, "distilled": task.distilled},
        **{"float_bytes": total, "stored_bytes": size, "stored_ratio": size / total},
        **{"float_accuracy": before["accuracy"], "packed_accuracy": after["accuracy"]},
        **{"float_loss": before["loss"], "packed_loss": after["loss"]},
        **{f"validation_{key}": value for key, value in validation.items()},
        "seconds": time.perf_counter() - started,
    }
