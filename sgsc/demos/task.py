"""One demo task: data in four splits, the network for it, and how long to train.

`train` is what the weights and the preservation set are taken from, `validation` serves choices while training,
`guard` is held out for the certificate, and `test` is read once, at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sgsc.distillation import distilled

from .models import ARCHITECTURES

SPLITS = ("train", "validation", "guard", "test")
PRECISIONS = ("float32", "bfloat16")
# The next character is often a near tie, which any change flips, and so is the class of some photographs: these start
# with a tolerance, digits with none. Those of the last three are for a GPU. A set of many samples is not learned by
# heart: what it keeps right is right on samples like them too. Names are: the more steps, the more of them, unless
# weights decay (validation and guard, seed 0: float 1.694 nats with a decay of 0.01, 1.660 with 1). Distilled is what
# starts from weights trained to their end: a float network that has more to learn goes on better with labels.
COLUMNS = ("float_steps", "compress_steps", "batch_size", "learning_rate", "weight_decay", "tolerance", "samples")
SCHEDULES: dict[str, dict[str, Any]] = {
    name: dict(zip((*COLUMNS, "distilled"), row, strict=True))
    for name, row in {
        "digits": (500, 1000, 64, 3e-3, 0.01, 0.0, 200, False),
        "char-lm": (900, 900, 32, 3e-3, 0.01, 0.03, 200, False),
        "mnist": (1500, 3000, 128, 2e-3, 0.01, 0.01, 4000, False),
        "names": (3000, 4500, 64, 2e-3, 1.0, 0.03, 1000, False),
        "cifar10": (8000, 12000, 128, 2e-3, 0.01, 0.02, 1000, False),
        "resnet20": (16000, 12000, 128, 3e-3, 0.01, 0.02, 1000, True),
        "shakespeare": (2500, 4000, 32, 2e-3, 0.01, 0.03, 500, False),
    }.items()
}


@dataclass(frozen=True, eq=False)
class Task:
    """One demo: data, network and schedule.

    Attributes:
        name: Key in TASKS.
        architecture: Name in ARCHITECTURES and keyword arguments.
        train: Samples x and targets y, shaped as the head of tasks.py says; so are validation and guard.
        validation: For choices while training.
        guard: Held out, for the certificate.
        test: Returns the test split; a second call raises RuntimeError, for whoever looks twice is choosing by it.
        alphabet: The character of each number, or empty where samples are images.
        sources: What the data is, with licence or citation.
        float_steps: Optimiser steps of the float model.
        compress_steps: Optimiser steps suggested for the compression.
        batch_size: Samples a step.
        learning_rate: Peak of the schedule, for AdamW.
        weight_decay: Of AdamW, in all trainings.
        tolerance: Share of the preservation samples that may regress, unless the user says otherwise.
        samples: Size of the preservation set, the same.
        distilled: Whether the float network's answers teach a compression, in place of labels.
        mean: What was subtracted from each colour of 0..1; empty where images are grey, or samples are text.
        deviation: What each colour was then divided by.
        start: Returns the state dict of a float network that is trained already, where there is one.
        remark: What the certificate must say of the guard split.
        precision: Of PRECISIONS: what the forward passes that are trained on are computed in.
    """

    name: str
    architecture: tuple[str, dict]
    train: TensorDataset
    validation: TensorDataset
    guard: TensorDataset
    test: Callable[[], TensorDataset]
    alphabet: str
    sources: str
    float_steps: int
    compress_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    tolerance: float
    samples: int
    distilled: bool
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    start: Callable[[], Mapping[str, Tensor]] | None = None
    remark: str = ""
    precision: str = "float32"

    @property
    def text(self) -> bool:
        """Whether samples are text."""
        return bool(self.alphabet)

    @property
    def colour(self) -> bool:
        """Whether samples are images in colour."""
        return bool(self.mean)

    def build(self) -> nn.Module:
        """A network of this task's architecture, freshly initialised from torch's global generator."""
        name, arguments = self.architecture
        return ARCHITECTURES[name](**arguments)

    def loss(self, outputs: Tensor, targets: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats: (..., classes) float and (...) int64 -> a scalar; `distilled`, if wanted."""
        if wanted is not None:
            return distilled(outputs, wanted)
        return F.cross_entropy(outputs.flatten(0, -2).float(), targets.flatten())

    def autocast(self) -> torch.autocast:
        """Context of the forward passes that are trained on; weights stay float32, and so does all that judges."""
        kind = self.train.tensors[0].device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16")

    def show(self, x: Tensor) -> str | list[list[float]] | list[list[list[float]]]:
        """One sample for a reader: (T,) int64 -> a str, (1, H, W) -> H lists of W floats, colour of W [r, g, b]."""
        if self.text:
            return "".join(self.alphabet[i] for i in x.tolist())
        if not self.colour:
            return x[0].tolist()
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (self.mean, self.deviation))
        levels = ((x.cpu() * deviation + mean) * 255).round().clamp(0, 255).permute(1, 2, 0)  # those of the file
        return [[[round(v / 255, 3) for v in pixel] for pixel in row] for row in levels.tolist()]

    def to(self, device: torch.device | str) -> Task:
        """The same task with what is trained and judged on at `device`; the test split stays where it is."""
        if torch.device(device).type == "cpu":
            return self
        moved = (TensorDataset(*(t.to(device) for t in s.tensors)) for s in (self.train, self.validation, self.guard))
        return replace(self, **dict(zip(SPLITS, moved, strict=False)))


def make_task(
    name: str, architecture: tuple[str, dict], splits: Sequence[TensorDataset], limit: int | None, **more: Any
) -> Task:
    """A task whose test split is given out once."""
    train, validation, guard, last = (TensorDataset(*split[:limit]) for split in splits)
    left = [last]

    def test() -> TensorDataset:
        if not left:
            raise RuntimeError(f"the test split of {name} has been read once already; choose by validation or guard")
        return left.pop()

    return Task(name, architecture, train, validation, guard, test, **more, **SCHEDULES[name])  # pyright: ignore


def find(data: Path | None, names: Sequence[str], task: str) -> Path:
    """The file that `data` is, or the first of `names` in the folder that it is.

    Raises:
        ValueError: If there is none.
    """
    if data is None:
        raise ValueError(f"{task} is not bundled; name the folder that holds {names[0]}, or the file, with --data PATH")
    for path in (data, *(data / name for name in names)):
        if path.is_file():
            return path
    raise ValueError(f"{task}: no {' or '.join(names)} in {str(data)!r}; --data names the folder or the file itself")


def data_hash(task: Task) -> str:
    """sha256, in hex, of the splits that a run is trained and judged on; the test split is not read for it."""
    digest = hashlib.sha256()
    for split in (task.train, task.validation, task.guard):
        for tensor in split.tensors:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
