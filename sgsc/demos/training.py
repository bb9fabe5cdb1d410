"""Plain float training of a demo task, and the numbers that judge a model. Seeded; prints nothing.

On one machine and number of threads the same seed gives the same weights on the CPU, bit for bit: the initialisation is
drawn from torch's global generator inside a fork of it, and everything else (order of the samples, shifts) from a
generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .task import PRECISIONS, Task

LEAST = 0.25  # of the task's learning rate, in a short training on answers
Augment = Callable[[Tensor, torch.Generator], Tensor]
Progress = Callable[[int, int, dict[str, float]], None]


def usable(device: str) -> str:
    """The device of that name, or for "auto" a GPU where there is one.

    Raises:
        ValueError: If this machine, or this torch, does not have it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        said = str(error).splitlines()[0][:100]
        raise ValueError(f"device {device!r} cannot be used here ({said}); take cpu, cuda or auto") from None
    return device


def from_file(task: Task, weights: Path | None, float_steps: int | None, precision: str = "float32") -> Task:
    """The task with other float steps or precision, or with float weights to start from, as a run folder holds them.

    Raises:
        ValueError: If the steps are below 1, there is no such file, or the precision is not one of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: want {' or '.join(PRECISIONS)}")
    if float_steps is not None and float_steps < 1:
        raise ValueError(f"float_steps={float_steps}: want at least 1")
    if weights is not None and not weights.is_file():
        raise ValueError(f"start={str(weights)!r} is not a file; name the float.safetensors of a run of {task.name}")
    if float_steps is not None:
        task = replace(task, float_steps=float_steps)
    task = replace(task, precision=precision)
    return task if weights is None else replace(task, start=lambda: safetensors.torch.load_file(weights))


def train(task: Task, seed: int, steps: int | None = None, progress: Progress | None = None) -> nn.Module:
    """Train a fresh network of `task` with AdamW, warm-up and cosine; returned in eval mode.

    Args:
        task: Data, network and schedule.
        seed: Of the initialisation and of the order of the samples.
        steps: Optimiser steps; the task's own number if None.
        progress: Called after each step as progress(step from 1, steps, {"loss": nats, "learning_rate": …}).

    Raises:
        ValueError: If `steps` is below 1.
    """
    steps = task.float_steps if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps={steps} trains nothing; give 1 or more, or None for the task's {task.float_steps}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.build().train().to(task.train.tensors[0].device)
    optimiser = torch.optim.AdamW(decayed(model.parameters(), task.weight_decay))
    samples = samples_of(task, torch.Generator().manual_seed(seed))
    for step in range(steps):
        rate = task.learning_rate * _schedule(step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        x, y = next(samples)
        with drawn_by(seed, step, x.device), task.autocast():
            loss = task.loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if progress is not None:
            progress(step + 1, steps, {"loss": loss.item(), "learning_rate": rate})
    return model.eval()


@contextmanager
def drawn_by(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """What a step draws from torch's own generators, for dropout, depends on seed and step alone.

    A run that goes on from a checkpoint then draws what it would have drawn, and others' draws go on undisturbed.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + step) % 2**63)
        yield


def decayed(parameters: Iterable[nn.Parameter], decay: float, **more: Any) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices and filters decay; biases, norms, widths and ranges do not."""
    every = list(parameters)
    groups = ([p for p in every if p.ndim > 1], decay), ([p for p in every if p.ndim <= 1], 0.0)
    return [{"params": some, "weight_decay": of, **more} for some, of in groups]


@torch.no_grad()
def answered(network: nn.Module, x: Tensor) -> Tensor:
    """What a network in evaluation mode answers, to be learned from."""
    return network(x)


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear over the first tenth, then a cosine that would reach 0 after the last."""
    warm = max(steps // 10, 1)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(step - warm, 0) / (steps - warm + 1))))


def batches(
    dataset: TensorDataset, batch_size: int, generator: torch.Generator, augment: Augment | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (x, y), each drawn from the whole of `dataset` with replacement.

    No epochs, on purpose: the generator's state is then the whole state of the stream. Save it with
    `generator.get_state()` between two batches, and a new call on a generator set to it goes on as if nothing happened.

    Raises:
        ValueError: If `batch_size` is below 1 or the dataset is empty.
    """
    if batch_size < 1 or not len(dataset):
        raise ValueError(f"batch_size={batch_size} of {len(dataset)} samples; both must be 1 or more")
    return _draw(dataset, batch_size, generator, augment)


def _draw(
    dataset: TensorDataset, batch_size: int, generator: torch.Generator, augment: Augment | None
) -> Iterator[tuple[Tensor, Tensor]]:
    # apart from `batches`, so that its check runs at the call and not at the first batch
    while True:
        x, y = dataset[torch.randint(len(dataset), (batch_size,), generator=generator)]
        yield (x if augment is None else augment(x, generator)), y


def samples_of(task: Task, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """What a task trains on, as `batches`: images are shifted, those in colour also mirrored, text is cut anew."""
    if task.text:
        return crops(task.train, task.batch_size, generator)
    return batches(task.train, task.batch_size, generator, mirror_and_shift if task.colour else shift)


def crops(windows: TensorDataset, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of text that begin at any character, not only where a window does: else few are learned by heart.

    Args:
        windows: x and y, (N, T) int64, one window after the other in the text; y is the character after.
        batch_size: Samples a batch, (batch_size, T).
        generator: Of the places; its state is that of the stream.
    """
    x, y = windows.tensors
    text = torch.cat([x.flatten(), y[-1, -1:]])
    span = torch.arange(x.shape[1] + 1)
    while True:
        starts = torch.randint(len(text) - x.shape[1], (batch_size, 1), generator=generator)
        cut = text[(starts + span).to(text.device)]
        yield cut[:, :-1], cut[:, 1:]


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by -1, 0 (half of the time) or 1 pixel along each axis, zeros following.

    (N, C, H, W) -> (N, C, H, W).
    """
    return _moved(x, 1, (torch.randint(4, (2, len(x)), generator=generator) + 1) // 2)


def mirror_and_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images left to right, and move each by -4 to 4 pixels along each axis, zeros following.

    (N, C, H, W) -> (N, C, H, W).
    """
    mirrored = torch.randint(2, (len(x), 1, 1, 1), generator=generator).bool().to(x.device)
    return _moved(torch.where(mirrored, x.flip(3), x), 4, torch.randint(9, (2, len(x)), generator=generator))


def _moved(x: Tensor, most: int, by: Tensor) -> Tensor:
    """Each image cut out of itself in a frame of `most` zeros, at the row and column that `by`, (2, N), names."""
    height, width = x.shape[2:]
    patches = F.pad(x, (most,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, (N, C, places, places, H, W)
    return patches[torch.arange(len(x)), :, by[0], by[1]]


def evaluate(model: nn.Module, dataset: TensorDataset, batch_size: int = 512) -> dict[str, float]:
    """Judge `model` in eval mode, and leave it in the mode it was in.

    Returns:
        "loss", mean cross entropy in nats, and "accuracy", share of right answers: one a sample for outputs (N, C),
        one a position for outputs (N, T, V).

    Raises:
        ValueError: If the dataset is empty.
    """
    if not len(dataset):
        raise ValueError("evaluate: the dataset holds 0 samples; give at least 1")
    was_training, loss, right, count = model.training, 0.0, 0, 0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            x, y = dataset[start : start + batch_size]
            outputs, targets = model(x).flatten(0, -2), y.flatten()
            loss += F.cross_entropy(outputs, targets, reduction="sum").item()
            right += int((outputs.argmax(1) == targets).sum())
            count += len(targets)
    model.train(was_training)
    return {"loss": loss / count, "accuracy": right / count}


def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Share of right answers, as in `evaluate`."""
    return evaluate(model, dataset)["accuracy"]


def peak(task: Task, steps: int, distilled: bool) -> float:
    """Peak learning rate of a training that starts from a trained network.

    Where that network's answers teach, what is to be found lies near: in fewer steps than the task's own the rate is as
    much lower, down to a quarter, since few steps do not settle what a high one stirs up. ResNet-20 at 3 bits is 1.17,
    0.53 and 0.68 nats off its answers on validation samples after 20 steps at 3e-3, 1e-3 and 3e-4, and 0.51, 0.27 and
    0.30 after 80; digits at 2 bits 0.16, 0.08 and 0.08 after 40 steps at the task's rate, a third and a tenth.
    """
    return task.learning_rate * (max(LEAST, min(1.0, steps / task.compress_steps)) if distilled else 1.0)


def schedule(share: float) -> float:
    """Share of the peak learning rate: linear over the first tenth, then a cosine to 0."""
    return min((share + 0.01) / 0.1, 0.5 * (1 + math.cos(math.pi * max(share - 0.1, 0) / 0.9)))
