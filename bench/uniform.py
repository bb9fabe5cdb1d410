"""One point of uniform quantization-aware training, as JSON: what bench.sgsc runs in a process of its own.

python -m bench.uniform TASK --bits 4 --work float.safetensors [--seed 0] [--data PATH]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from torch import nn

from sgsc.demos.job import read_float
from sgsc.demos.qat import run
from sgsc.demos.task import Task
from sgsc.demos.tasks import load
from sgsc.demos.training import from_file, train, usable
from sgsc.files import write_atomically


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """What this and other comparisons at one width take."""
    parser.add_argument("task")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--work", type=Path, required=True, help="the float network, or where to put it")
    for name in ("seed", "limit", "steps", "float-steps"):
        parser.add_argument(f"--{name}", type=int, default=0 if name == "seed" else None)
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")


def task_of(chosen: argparse.Namespace) -> Task:
    """The task that the arguments name."""
    task = load(chosen.task, chosen.data, chosen.seed, chosen.limit)
    return from_file(task, None, chosen.float_steps, chosen.precision)


def float_network(task: Task, path: Path, seed: int, device: str) -> nn.Module:
    """The float network of a file; where there is none it is trained, or what the task starts from, and put there."""
    if not path.is_file():
        state = train(task.to(usable(device)), seed).state_dict() if task.start is None else task.start()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save({k: v.contiguous() for k, v in state.items()}))
    return read_float(task, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and print."""
    parser = argparse.ArgumentParser(description="One point of uniform quantization-aware training.")
    arguments_of(parser)
    chosen = parser.parse_args(arguments)
    task = task_of(chosen)
    network = float_network(task, chosen.work, chosen.seed, chosen.device)
    steps = task.compress_steps if chosen.steps is None else chosen.steps
    print(json.dumps(run(task, network, chosen.bits, steps, chosen.seed, usable(chosen.device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
