"""How much the loss depends on each layer's weights, and from that which bits a layer can spare.

    trace      Tr H_l of the layer's block of the Hessian of the mean loss, by Hutchinson's estimator: the mean of
               v' H v over Rademacher v (HAWQ-V2, Dong et al., arXiv 1911.03852)
    fisher     the trace of the empirical Fisher instead, the mean squared norm of a sample's gradient: one backward
               pass a sample, and no second derivative; what large networks get
    Omega_l(b) = Tr / n_l * ||Q_b(W_l) - W_l||²    for each width b

Both stop where every layer's standard error is at most 5 % of its estimate, after at least 20 samples, or at a maximum
that the result names. The usual rule, to stop where the running mean hardly moves, stops by luck after two.
Omega ranks widths of a layer; of layer widths it says nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.samples import evaluating

from .grids import rounding_error

Loss = Callable[[nn.Module, Any], Tensor]  # mean loss of a model on a batch
Progress = Callable[[str, int, int, dict[str, float]], None]

LEAST, MOST, ERROR = 20, 200, 0.05
LARGE = 50_000  # weights from which on "auto" takes the Fisher: a second derivative of digits costs half a second


@dataclass(frozen=True)
class Sensitivity:
    """What was estimated, by layer.

    Attributes:
        method: "hutchinson" or "fisher".
        trace: Estimates; a Hessian's may be negative.
        error: Standard errors, relative to the estimates.
        weights: n_l.
        samples: Probes, or samples of the data.
        converged: Whether every error is small enough; else `samples` is the maximum.
        seconds: That it took.
    """

    method: str
    trace: dict[str, float]
    error: dict[str, float]
    weights: dict[str, int]
    samples: int
    converged: bool
    seconds: float

    def omega(self, rows: Mapping[str, Tensor], bits: Sequence[int]) -> dict[str, dict[int, float]]:
        """Layer -> width -> Omega, at least 0 and never less for fewer bits.

        `rows`: layer -> (C, K) weight.
        """
        found = {}
        for name, value in rows.items():
            mean = max(self.trace[name], 0.0) / max(self.weights[name], 1)
            errors = [mean * rounding_error(value.detach(), b) for b in sorted(bits, reverse=True)]
            for i in range(1, len(errors)):
                errors[i] = max(errors[i], errors[i - 1])
            found[name] = dict(zip(sorted(bits, reverse=True), errors, strict=True))
        return found


def sensitivity(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    loss: Loss,
    batches: Sequence[Any],
    *,
    method: str = "auto",
    seed: int = 0,
    least: int = LEAST,
    most: int = MOST,
    error: float = ERROR,
    progress: Progress = lambda phase, step, steps, values: None,
) -> Sensitivity:
    """Estimate the sensitivity of each layer of a trained float model.

    Before it starts, `progress` is told the seconds that it will take at most, from one measured gradient.

    Args:
        model: In float; judged in evaluation mode, and its gradients are not touched.
        weights: Layer -> its weight.
        loss: Mean loss of the model on a batch.
        batches: All are read for each probe of Hutchinson's; the Fisher reads them as single samples: tuples of tensors
            whose first axis counts samples.
        method: "hutchinson", "fisher", or "auto": Fisher from 50,000 weights on.
        seed: Of the probes.
        least: Samples at least.
        most: Samples at most.
        error: Relative standard error at which to stop.
        progress: Called as progress(phase, step, steps, values).

    Raises:
        ValueError: If there is nothing to look at, the method is unknown, or a gradient is not finite, whose layer is
            named.
    """
    if method not in ("auto", "hutchinson", "fisher"):
        raise ValueError(f"method={method!r}: want hutchinson, fisher or auto")
    if not batches or not weights:
        raise ValueError(f"sensitivity of {len(weights)} layers on {len(batches)} batches: want at least one of both")
    if not 2 <= least <= most:
        raise ValueError(
            f"least={least}, most={most}: a standard error wants 2 samples at least, and no more than most"
        )
    count = {name: w.numel() for name, w in weights.items()}
    if method == "auto":
        method = "fisher" if sum(count.values()) > LARGE else "hutchinson"
    started = time.perf_counter()
    values = list(weights.values())
    held = [w.requires_grad for w in values]
    probe = _hutchinson if method == "hutchinson" else _fisher
    with evaluating(model):
        for w in values:
            w.requires_grad_(True)
        try:
            draw = probe(model, dict(weights), loss, batches, torch.Generator().manual_seed(seed))
            found: list[list[float]] = []
            seconds = 0.0
            while len(found) < most:
                began = time.perf_counter()
                one = next(draw, None)
                if one is None:  # every sample of the data was seen
                    break
                found.append(one)
                if len(found) == 1:
                    seconds = (time.perf_counter() - began) * most
                means, errors = _summary(found)
                progress("sensitivity", len(found), most, {"seconds at most": seconds, "error": max(errors)})
                if len(found) >= least and max(errors) <= error:
                    break
        finally:
            for w, before in zip(values, held, strict=True):
                w.requires_grad_(before)
    means, errors = _summary(found)
    converged = len(found) >= least and max(errors) <= error
    return Sensitivity(
        *(method, dict(zip(weights, means, strict=True)), dict(zip(weights, errors, strict=True)), count),
        *(len(found), converged, time.perf_counter() - started),
    )


def _summary(found: list[list[float]]) -> tuple[list[float], list[float]]:
    """(mean, relative standard error) of each layer; an error is infinite while there is one sample."""
    means, errors = [], []
    for values in zip(*found, strict=True):
        n = len(values)
        mean = math.fsum(values) / n
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(n - 1, 1) / n)
        means.append(mean)
        errors.append(math.inf if n < 2 else spread / abs(mean) if mean else 0.0 if spread == 0 else math.inf)
    return means, errors


def _hutchinson(model: nn.Module, weights: dict[str, nn.Parameter], loss: Loss, batches: Sequence[Any], generator):
    """Yield v_l' (H v)_l of each layer for one v over all of them: terms between layers have mean 0."""
    values = list(weights.values())
    while True:
        probes = [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w) for w in values]
        sums = [0.0] * len(values)
        for number, batch in enumerate(batches):
            gradients = torch.autograd.grad(loss(model, batch), values, create_graph=True, materialize_grads=True)
            _check(weights, gradients, "gradient", number)
            inner = torch.stack([(g * v).sum() for g, v in zip(gradients, probes, strict=True)]).sum()
            products = (
                torch.autograd.grad(inner, values, materialize_grads=True)
                if inner.requires_grad
                else [torch.zeros_like(w) for w in values]
            )
            _check(weights, products, "second derivative", number)
            for i, (product, v) in enumerate(zip(products, probes, strict=True)):
                sums[i] += float((product * v).sum()) / len(batches)
        yield sums


def _fisher(model: nn.Module, weights: dict[str, nn.Parameter], loss: Loss, batches: Sequence[Any], generator):
    """Yield the squared norm of one sample's gradient, of each layer; samples come in a random order."""
    values = list(weights.values())
    places = [(b, i) for b, batch in enumerate(batches) for i in range(len(batch[0]))]
    for place in torch.randperm(len(places), generator=generator).tolist():
        b, i = places[place]
        one = tuple(t[i : i + 1] for t in batches[b])
        gradients = torch.autograd.grad(loss(model, one), values, materialize_grads=True)
        _check(weights, gradients, "gradient", b)
        yield [float(g.double().square().sum()) for g in gradients]


def _check(weights: Mapping[str, nn.Parameter], values: Sequence[Tensor], what: str, batch: int) -> None:
    for name, value in zip(weights, values, strict=True):
        if not torch.isfinite(value).all():
            raise ValueError(
                f"layer {name!r}: its {what} on batch {batch} is not finite, so that no sensitivity can be told; "
                "look for NaN in the data, or train the float network at a lower learning rate"
            )
