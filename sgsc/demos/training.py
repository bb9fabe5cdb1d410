"""Plain float training of a demo task, and the numbers that judge a model. Seeded; prints nothing.

On one machine and number of threads the same seed gives the same weights on the CPU, bit for bit: the initialisation is
drawn from torch's global generator inside a fork of it, and everything else (order of the samples, shifts) from a
generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .tasks import Task

Augment = Callable[[Tensor, torch.Generator], Tensor]
Progress = Callable[[int, int, dict[str, float]], None]


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
        model = task.build().train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=0.01)
    samples = batches(task.train, task.batch_size, torch.Generator().manual_seed(seed), augmentation(task))
    for step in range(steps):
        rate = task.learning_rate * _schedule(step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        x, y = next(samples)
        loss = task.loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if progress is not None:
            progress(step + 1, steps, {"loss": loss.item(), "learning_rate": rate})
    return model.eval()


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


def augmentation(task: Task) -> Augment | None:
    """What training does to a batch of this task: images are shifted, text is left as it is."""
    return None if task.text else shift


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by -1, 0 (half of the time) or 1 pixel along each axis, zeros following.

    (N, C, H, W) -> (N, C, H, W).
    """
    count, _, height, width = x.shape
    down, right = (torch.randint(4, (2, count), generator=generator) + 1) // 2
    patches = F.pad(x, (1, 1, 1, 1)).unfold(2, height, 1).unfold(3, width, 1)  # (N, C, 3, 3, H, W)
    return patches[torch.arange(count), :, down, right]


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
