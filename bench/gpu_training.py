"""The training quantizer on a GPU: its two passes beside their floor and its peers, and a training step with it.

Passes are float32, 4096 x 4096. Peers are the formula of kernels/fake_quantize.py in eager PyTorch (the backward in
closed form, which is less work than autograd's), the same by torch.compile, and torch's own learnable quantizer.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.demos.models import CharLM
from sgsc.kernels import OPS
from sgsc.measure import interleaved
from sgsc.preparation import prepare
from sgsc.together import quantize_together
from tests.checks import as_list, in_double

from . import kernels
from .gpu_device import Run, part_of_row, race
from .networks import ResNet20
from .record import claim
from .training import CLASSES, FLOAT, FUSED, TOGETHER, eager_formula, rows_of

SMALL = "one-past-a-block"  # the case of a quick run
SHARE = 0.9  # of the copy's bandwidth
MICROSECONDS = {"forward": 27.0, "backward": 52.0}
OVER_FLOAT = 1.05
PREPARED = (FUSED, TOGETHER)
STEP_SECONDS = 2.0  # that the fastest kind of step is measured for
SAME = 1e-2  # relative difference of gradients that the order of sums and TF32 may make


@torch.no_grad()
def measure_passes(run: Run) -> None:
    """Write the section of the passes."""
    op = OPS["fake_quantize"]
    case, cases = (SMALL, op.cases()) if run.quick else (kernels.LARGE, op.bench_cases())
    arguments = tuple(t.to(run.device.type) for t in cases[case])
    make = torch.Generator(run.device.type).manual_seed(3)
    upstream = torch.randn(arguments[0].shape, generator=make, device=run.device.type)
    rows: list[dict[str, Any]] = []
    with mock.patch.object(kernels, "COMPILER", run.device.compiler):
        for name, inputs, candidates in (
            ("forward", arguments, forward_peers(arguments)),
            ("backward", (upstream, *arguments), backward_peers(arguments)),
        ):
            rows += measure_pass(run, case, name, inputs, candidates)
            run.put(rows, pass_claims(rows))


def forward_peers(arguments: tuple[Tensor, ...]) -> dict[str, Callable]:
    """All take (x, scale, lo, hi, shift)."""
    found = kernels.peers(arguments)
    return {name: found[name] for name in (kernels.AUTOGRAD, kernels.COMPILED, kernels.LEARNABLE)}


def backward_peers(arguments: tuple[Tensor, ...]) -> dict[str, Callable]:
    """All take (grad, x, scale, lo, hi, shift)."""
    low, high = int(arguments[2][0]), int(arguments[3][0])
    reference = OPS["fake_quantize_backward"].reference

    def learnable(grad: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> tuple:
        op = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward
        return op(grad, x, scale, shift, 0, low, high, 1.0)[:2]

    return {
        kernels.BY_HAND: reference,
        kernels.COMPILED: torch.compile(reference, dynamic=False, fullgraph=True, backend=kernels.COMPILER),
        kernels.LEARNABLE: learnable,
    }


def measure_pass(run: Run, case: str, name: str, inputs: tuple, others: Mapping[str, Callable]) -> list[dict[str, Any]]:
    """A row; none where our result is wrong."""
    op = OPS["fake_quantize" if name == "forward" else "fake_quantize_backward"]
    candidates = {"ours": op, **others}
    exact = as_list(op.reference(*in_double(inputs)))
    exact_of = dict.fromkeys(candidates, exact)
    if name == "backward":
        exact_of[kernels.LEARNABLE] = list(kernels.learnable_gradients(*in_double(inputs[:5])))
    _, missing = kernels.admit(candidates, lambda quantize: as_list(quantize(*inputs)), exact_of)
    if "ours" in missing:
        run.wrong.append(f"fake_quantize, {name}: {missing['ours']}")
        return []
    moved = op.traffic(*inputs)
    turns = [inputs, *(tuple(t.clone() for t in inputs) for _ in range(max(2, run.device.copies(moved)) - 1))]
    contenders = {
        who: [functools.partial(quantize, *one) for one in turns]
        for who, quantize in candidates.items()
        if who not in missing
    }
    times, failed = race(run, contenders)
    ours = times.pop("ours")
    row = {"op": "fake_quantize", "case": case, "pass": name} | part_of_row(run, ours, moved, times, missing | failed)
    kernels.say(row)
    return [row]


def pass_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of both passes at the large shape."""
    at = {row["pass"]: row for row in rows if row["case"] == kernels.LARGE}
    found = []
    for name, most in MICROSECONDS.items():
        row = at.get(name, {})
        text = f"fake_quantize, {name} at {kernels.LARGE} in float32"
        found.append(claim(text, SHARE, row.get("share_of_copy"), "of the copy's bandwidth", at_least=SHARE))
        found.append(claim(text, most, row.get("microseconds"), "µs", at_most=most))
    return found


# ---- a training step ----


def networks(quick: bool) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Network, inputs and labels by name, on the CPU."""
    torch.manual_seed(0)
    images, texts, context, classes = (2, 2, 4, 4) if quick else (128, 32, 128, CLASSES)
    channels, blocks, width, layers = (2, 1, 4, 1) if quick else (16, 3, 256, 12)
    return {
        "ResNet-20": (
            ResNet20(channels, blocks, classes),
            torch.randn(images, 3, 32, 32),
            torch.randint(classes, (images,)),
        ),
        "transformer, 12 x 256": (
            CharLM(classes, context=context, width=width, layers=layers, heads=4),
            torch.randint(classes, (texts, context)),
            torch.randint(classes, (texts, context)),
        ),
    }


def measure_steps(run: Run) -> None:
    """Write the section of the steps, and the launches of each beside it."""
    rows: list[dict[str, Any]] = []
    launches: list[dict[str, Any]] = []
    for name, (network, x, y) in networks(run.quick).items():
        x, y = x.to(run.device.type), y.to(run.device.type)
        models = {FLOAT: network, **{variant: prepare(copy.deepcopy(network)).model for variant in PREPARED}}
        models = {variant: model.to(run.device.type) for variant, model in models.items()}
        quantize_together(models[TOGETHER])
        off = {variant: difference(models[variant], x, y) for variant in PREPARED}
        wrong = {variant: value for variant, value in off.items() if not value <= SAME}
        for variant, value in wrong.items():
            run.wrong.append(f"training, {name}, {variant}: gradients off by {value:.2g} from the eager formula's")
            del models[variant]
        steps = {variant: stepper(run, model, x, y) for variant, model in models.items()}
        times = interleaved(steps, STEP_SECONDS if run.seconds else 0.0)
        rows += rows_of(name, type(network).__name__, len(x), times)
        launches += [launches_of(run, name, variant, step) for variant, step in steps.items()]
        run.put(rows, step_claims(rows))
        run.put(launches, [], "launches of a training step")
        shown = ", ".join(f"{row['variant']} {row['milliseconds']:.2f} ms" for row in rows if row["task"] == name)
        print(f"{name}: {shown}", file=sys.stderr)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross entropy, whatever the rank of the logits."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def difference(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fused quantizer's gradients against the eager formula's: the largest relative difference of any parameter.

    Norms; a parameter whose gradient hardly counts is measured by a thousandth of the largest norm.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    model = model.eval()  # so that statistics of batches stay as they are
    fused = torch.autograd.grad(loss_of(model, x, y), parameters, allow_unused=True)
    with eager_formula():
        eager = torch.autograd.grad(loss_of(model, x, y), parameters, allow_unused=True)
    model.train()
    pairs = [(f, e) for f, e in zip(fused, eager, strict=True) if e is not None]
    largest = max(float(e.norm()) for _, e in pairs)
    return max(float((f - e).norm()) / max(float(e.norm()), 1e-3 * largest, 1e-30) for f, e in pairs)


def stepper(run: Run, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A call that makes one training step, as bench/training.py does, and waits for it."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)

    def step() -> None:
        loss = loss_of(model, x, y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        run.device.wait()

    return step


def launches_of(run: Run, name: str, variant: str, step: Callable[[], None]) -> dict[str, Any]:
    """Kernels and copies of a step, and among them the quantizer's own two passes."""
    found = run.device.kernels(step)
    every = None if found is None else sum(found.values())
    row = {"task": name, "variant": variant, "launches": every}
    for what in ("forward", "backward"):
        own = None if found is None else sum(n for k, n in found.items() if k.startswith((f"{what}_", f"many_{what}_")))
        row[f"of the quantizer's {what}"] = own
    return row


def step_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every network that was measured."""
    return [
        claim(
            f"{row['task']}: training step, {row['variant']}, against the float step",
            OVER_FLOAT,
            row["over_float"],
            "times the time",
            at_most=OVER_FLOAT,
        )
        for row in rows
        if row["variant"] in PREPARED
    ]
