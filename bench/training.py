"""Time of one training step: float, prepared, prepared with the eager formula, and with SelfCompression.

A step draws the batch, runs forward and backward, clips, and moves AdamW, as sgsc/demos/training.py does. The four
take turns from the same trained float network. The step of SelfCompression adds the preservation loss on its own batch,
the size, and moving the widths; every `guard_every` steps it checks the guard, which the mean shows and the median not.

python -m bench.training [--quick --results FOLDER]
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sgsc.compression import SelfCompression
from sgsc.demos.tasks import Task, load
from sgsc.demos.training import augmentation, batches, train
from sgsc.kernels import Op
from sgsc.measure import interleaved
from sgsc.preparation import prepare
from sgsc.preservation import PreservationSet

from .record import claim, options, write

TASKS = ("digits", "char-lm")
BUDGET = 3.0  # seconds that the fastest variant is measured for, at least
FLOAT, FUSED, EAGER, COMPRESSING = "float", "prepared, fused", "prepared, eager formula", "SelfCompression"
SAMPLES = 200  # of the preservation set, as `sgsc compress` takes


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the section "training" of main_job.json."""
    chosen = options(arguments, "Time of one training step.")
    rows, claims = [], []
    for name in TASKS:
        found = measure(load(name, limit=32 if chosen.quick else None), 0.0 if chosen.quick else BUDGET, chosen.quick)
        rows += found
        times = {row["variant"]: row["milliseconds"] for row in found}
        text = f"{name}: prepared training step with the fused quantizer, against the eager formula"
        claims.append(claim(text, 1.0, times[EAGER] / times[FUSED], "times as fast", at_least=1.0))
        shown = ", ".join(f"{variant} {t:.1f} ms" for variant, t in times.items())
        print(f"{name}: {shown}", file=sys.stderr)
    path = write("main_job", "training", rows, claims, "python -m bench.training", chosen.results)
    print(f"wrote {len(rows)} rows and {len(claims)} claims of training to {path}", file=sys.stderr)
    return 0


@contextmanager
def eager_formula() -> Iterator[None]:
    """While it lasts the quantizer, forward and backward, runs as its reference in plain PyTorch."""
    fused = Op.__call__

    def call(self: Op, *args: Any) -> Any:
        return self.reference(*args) if self.name.startswith("fake_quantize") else fused(self, *args)

    Op.__call__ = call
    try:
        yield
    finally:
        Op.__call__ = fused


def measure(task: Task, budget: float, quick: bool) -> list[dict[str, Any]]:
    """One row a variant.

    Raises:
        ValueError: If the fused operator and the eager formula do not make the same step.
    """
    network = train(task, 0, steps=1 if quick else None)
    check(task, network)
    keep = PreservationSet.select(copy.deepcopy(network), task.train, min(SAMPLES, len(task.train) // 2))
    prepared = {name: prepare(copy.deepcopy(network)).model for name in (FUSED, EAGER, COMPRESSING)}
    eager = stepper(task, prepared[EAGER])

    def eagerly() -> None:
        with eager_formula():
            eager()

    runs = {
        FLOAT: stepper(task, copy.deepcopy(network)),
        FUSED: stepper(task, prepared[FUSED]),
        EAGER: eagerly,
        COMPRESSING: stepper(task, prepared[COMPRESSING], keep),
    }
    times = interleaved(runs, budget)
    median = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return [
        {
            "task": task.name,
            "architecture": task.architecture[0],
            "batch_size": task.batch_size,
            "variant": name,
            "milliseconds": median[name],
            "mean_milliseconds": 1e3 * statistics.fmean(times[name]),
            "rounds": len(times[name]),
            "over_float": median[name] / median[FLOAT],
        }
        for name in runs
    ]


def stepper(task: Task, model: nn.Module, keep: PreservationSet | None = None) -> Callable[[], None]:
    """A call that makes one training step; with `keep`, one of SelfCompression."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.learning_rate / 10, weight_decay=0.01)
    run = None if keep is None else SelfCompression(model, keep, optimizer=optimiser, steps=task.compress_steps)
    data = batches(task.train, task.batch_size, torch.Generator().manual_seed(0), augmentation(task))

    def step() -> None:
        model.train()
        x, y = next(data)
        loss = task.loss(model(x), y)
        if run is not None:
            loss = run.loss(loss)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if run is not None:
            run.step()

    return step


def check(task: Task, network: nn.Module) -> None:
    """Fail unless the eager formula gives the fused operator's loss and gradients: else the two cannot be compared.

    Raises:
        ValueError: If they differ.
    """
    model = prepare(copy.deepcopy(network)).model.eval()
    x, y = task.train[: task.batch_size]
    parameters = list(model.parameters())

    def gradients() -> list[torch.Tensor]:
        loss = task.loss(model(x), y)
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    fused = gradients()
    with eager_formula():
        eager = gradients()
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, f, e in zip(names, fused, eager, strict=True):
        if not torch.allclose(f, e, rtol=1e-3, atol=1e-3 * float(e.abs().max())):
            raise ValueError(f"{task.name}: fused and eager quantizer disagree on {name}; no speed is written for them")


if __name__ == "__main__":
    sys.exit(main())
