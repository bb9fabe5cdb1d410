"""The demo task that a command works on: its flags, and the task that they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .demos.task import Task


def add_task(sub: argparse.ArgumentParser, **how: Any) -> None:
    """What task it is, and where its float network comes from; `how`: of the first argument. Commands add --seed."""
    sub.add_argument("task", help="digits, char-lm, mnist, names, cifar10, resnet20 or shakespeare", **how)
    sub.add_argument("--data", type=Path, default=None, help="file or folder of the data, where the task needs one")
    sub.add_argument("--limit", type=int, default=None, help="at most so many samples a split")
    sub.add_argument("--float-steps", type=int, default=None, help="steps of the float training (default: the task's)")
    sub.add_argument("--start", type=Path, default=None, help="float.safetensors of another run, instead of training")
    precision = "to train in: float32 (default), or bfloat16 by autocast, which a CPU without AVX-512 is slow at"
    sub.add_argument("--precision", default="float32", help=precision)


def add_device(sub: argparse.ArgumentParser) -> None:
    """Where to train."""
    sub.add_argument("--device", default="cpu", help="where to train: cpu (default), cuda, cuda:1, auto")


def shares(text: str) -> dict[str, float]:
    """Selectors and their shares of the preservation set, as they are typed: "uncertain=0.5,hard=0.5".

    Raises:
        ArgumentTypeError: If they are not.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {name.strip(): float(share) for name, _, share in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: want selectors and shares, such as uncertain=0.5,hard=0.5"
        ) from None


def task_of(options: argparse.Namespace) -> Task:
    """The task that the flags name; `options.device` is then one that can be used.

    Raises:
        ValueError: If a flag is out of range, the device cannot be used, or the data is missing or malformed.
    """
    from .demos.tasks import load
    from .demos.training import from_file, usable

    options.device = usable(options.device)  # before the data is read
    task = load(options.task, options.data, options.seed, options.limit)
    return from_file(task, options.start, options.float_steps, options.precision)
