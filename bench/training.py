"""Time of one training step: float, prepared, prepared with all layers together or with the eager formula, with
SelfCompression, and with what that leaves of the network, removed channels in their places or cut out.

Beside the tasks of the demos, two networks of usual size on random data: ResNet-20 on 32 x 32 images, and a transformer
of four layers, 256 wide. There quantizing must vanish in the step.

A step draws the batch, runs forward and backward, clips, and moves AdamW, as sgsc/demos/training.py does. They
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
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.compression import SelfCompression
from sgsc.demos.models import CharLM
from sgsc.demos.tasks import Task, load
from sgsc.demos.training import samples_of, train
from sgsc.kernels import Op
from sgsc.measure import interleaved
from sgsc.preparation import prepare
from sgsc.preservation import PreservationSet
from sgsc.together import quantize_together

from .networks import ResNet20
from .record import claim, options, write

TASKS = ("digits", "char-lm")
BUDGET = 3.0  # seconds that the fastest variant is measured for, at least
FLOAT, FUSED, EAGER, COMPRESSING = "float", "prepared, fused", "prepared, eager formula", "SelfCompression"
TOGETHER = "prepared, together"
LEFT, CUT = "SelfCompression, at 5 %", "SelfCompression, at 5 %, cut"
SETTLING = 200  # steps after which a network is at 5 %, for these two
OVER_FLOAT = 1.02  # of a prepared step of a network of usual size, at most
CLASSES = 64  # of the random labels, and tokens of the transformer
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
        text = f"{name}: training step at 5 % of the bytes, removed channels cut out, against those left in place"
        claims.append(claim(text, 1.0, times[LEFT] / times[CUT], "times as fast", at_least=1.0))
        shown = ", ".join(f"{variant} {t:.1f} ms" for variant, t in times.items())
        print(f"{name}: {shown}", file=sys.stderr)
    for name, (network, x, y) in usual_networks(2 if chosen.quick else None).items():
        found = measure_usual(name, network, x, y, 0.0 if chosen.quick else BUDGET)
        rows += found
        times = {row["variant"]: row["over_float"] for row in found}
        text = f"{name}: prepared training step with the fused quantizer, against the float step"
        claims.append(claim(text, OVER_FLOAT, times[FUSED], "times the time", at_most=OVER_FLOAT))
        print(f"{name}: {', '.join(f'{v} {t:.3f}' for v, t in times.items())} of float", file=sys.stderr)
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
    prepared = {
        name: prepare(copy.deepcopy(network)).model for name in (FUSED, TOGETHER, EAGER, COMPRESSING, LEFT, CUT)
    }
    quantize_together(prepared[TOGETHER])
    eager = stepper(task, prepared[EAGER])

    def eagerly() -> None:
        with eager_formula():
            eager()

    runs = {
        FLOAT: stepper(task, copy.deepcopy(network)),
        FUSED: stepper(task, prepared[FUSED]),
        TOGETHER: stepper(task, prepared[TOGETHER]),
        EAGER: eagerly,
        COMPRESSING: stepper(task, prepared[COMPRESSING], keep),
        **{name: settled(task, prepared[name], keep, name == CUT, 20 if quick else SETTLING) for name in (LEFT, CUT)},
    }
    return rows_of(task.name, task.architecture[0], task.batch_size, interleaved(runs, budget))


def rows_of(task: str, architecture: str, batch_size: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a variant, of the seconds of its steps."""
    median = {name: 1e3 * statistics.median(t) for name, t in times.items()}
    return [
        {
            "task": task,
            "architecture": architecture,
            "batch_size": batch_size,
            "variant": name,
            "milliseconds": median[name],
            "mean_milliseconds": 1e3 * statistics.fmean(times[name]),
            "rounds": len(times[name]),
            "over_float": median[name] / median[FLOAT],
        }
        for name in times
    ]


def settled(task: Task, model: nn.Module, keep: PreservationSet, cut: bool, steps: int) -> Callable[[], None]:
    """A call that makes one step of SelfCompression once its widths are settled; what it keeps right does not count."""
    how = {"steps": 2 * steps, "shrink_share": 0.3, "settle_share": 0.4, "guard_every": max(steps // 10, 1)}
    step = stepper(task, model, keep, target_size=0.05, tolerance=0.99, margin_tolerance=1.0, cut=cut, **how)
    for _ in range(steps):
        step()
    return step


def stepper(task: Task, model: nn.Module, keep: PreservationSet | None = None, **how: Any) -> Callable[[], None]:
    """A call that makes one training step; with `keep`, one of SelfCompression, with settings of its own."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.learning_rate / 10, weight_decay=0.01)
    how = {"steps": task.compress_steps, **how}
    run = None if keep is None else SelfCompression(model, keep, optimizer=optimiser, **how)
    data = samples_of(task, torch.Generator().manual_seed(0))

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
    """Fail unless the ways to quantize give one loss and gradients: else their times cannot be compared.

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
        others = {"eager": gradients()}
    quantize_together(model)
    others["together"] = gradients()
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for other, values in others.items():
        for name, f, v in zip(names, fused, values, strict=True):
            if not torch.allclose(f, v, rtol=1e-3, atol=1e-3 * float(v.abs().max())):
                raise ValueError(
                    f"{task.name}: fused and {other} quantizer disagree on {name}; no speed is written for them"
                )


# ---- networks of usual size, on random data ----


def usual_networks(batch: int | None) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Network, inputs and labels by name; `batch` samples in place of as many as is usual."""
    torch.manual_seed(0)
    images, texts = batch or 128, batch or 32
    return {
        "ResNet-20": (ResNet20(classes=CLASSES), torch.randn(images, 3, 32, 32), torch.randint(CLASSES, (images,))),
        "transformer, 4 x 256": (
            CharLM(CLASSES, context=128, width=256, layers=4, heads=4),
            torch.randint(CLASSES, (texts, 128)),
            torch.randint(CLASSES, (texts, 128)),
        ),
    }


def measure_usual(name: str, network: nn.Module, x: Tensor, y: Tensor, budget: float) -> list[dict[str, Any]]:
    """One row a variant; every layer with weights is quantized by the default quantizer."""

    def stepper_of(model: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)

        def step() -> None:
            loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

        return step

    eager = stepper_of(prepare(copy.deepcopy(network)).model)
    together = prepare(copy.deepcopy(network)).model
    quantize_together(together)

    def eagerly() -> None:
        with eager_formula():
            eager()

    runs = {
        FLOAT: stepper_of(copy.deepcopy(network)),
        FUSED: stepper_of(prepare(copy.deepcopy(network)).model),
        TOGETHER: stepper_of(together),
        EAGER: eagerly,
    }
    return rows_of(name, type(network).__name__, len(x), interleaved(runs, budget))


if __name__ == "__main__":
    sys.exit(main())
