"""How much the loss depends on each layer's weights, and from that which bits a layer can spare.

    trace      Tr H_l of the layer's block of the Hessian of the mean loss, by Hutchinson's estimator: the mean of
               v' H v over Rademacher v (HAWQ-V2, Dong et al., arXiv 1911.03852), each on one batch at random: for the
               time of all batches that gives as many probes instead, and the standard error sees both
    fisher     the trace of the empirical Fisher instead, the mean squared norm of a sample's gradient: one backward
               pass a sample, and no second derivative; what large networks get
    Omega_l(b) = Tr / n_l * ||Q_b(W_l) - W_l||²    for each width b

Both stop where the standard error of every layer's share of the sum is at most 5 % of that share, after at least 20
samples, or at a maximum that the result names. It is the shares that allocations and windows rest on. Of a trained
network a few samples have nearly all of the gradient, in every layer at once: one of them would make the shares look
exact, so the samples must also be worth 20 equal ones, (sum v)² / sum v². The usual rule, to stop where the running
mean hardly moves, stops by luck after two.
Omega ranks widths of a layer; of layer widths it says nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgsc.samples import evaluating

from .grids import rounding_error

Loss = Callable[[nn.Module, Any], Tensor]  # mean loss of a model on a batch
Progress = Callable[[str, int, int, dict[str, float]], None]

LEAST, MOST, ERROR = 20, 1000, 0.05
LARGE = 50_000  # weights from which on "auto" takes the Fisher: a second derivative of digits costs half a second


@dataclass(frozen=True)
class Sensitivity:
    """What was estimated, by layer.

    Attributes:
        method: "hutchinson" or "fisher".
        trace: Estimates; a Hessian's may be negative.
        error: Standard errors, relative to the estimates.
        share_error: Those of the layer's share of the sum, relative to the share.
        weights: n_l.
        samples: Probes, or samples of the data.
        worth: How many samples of equal weight they are worth.
        converged: Whether every share's error is small enough, and enough samples count; else `samples` is the maximum.
        seconds: That it took.
    """

    method: str
    trace: dict[str, float]
    error: dict[str, float]
    share_error: dict[str, float]
    weights: dict[str, int]
    samples: int
    worth: float
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

    Before it starts, `progress` is told, as step 0, the seconds that it will take at most, from one sample that is
    measured and not used.

    Args:
        model: In float; judged in evaluation mode, and its gradients are not touched.
        weights: Layer -> its weight.
        loss: Mean loss of the model on a batch.
        batches: Of about one size; Hutchinson's probes take one each. The Fisher reads them as single samples: tuples
            of tensors whose first axis counts samples.
        method: "hutchinson", "fisher", or "auto": Fisher from 50,000 weights on.
        seed: Of the probes.
        least: Samples at least, and equal samples that they are worth.
        most: Samples at most; the Fisher also ends where it has seen every sample of the data.
        error: Relative standard error of the shares at which to stop.
        progress: Called as progress(phase, step, steps, values).

    Raises:
        ValueError: If there is nothing to look at, the method is unknown, or a gradient is not finite, whose layer is
            named.
    """
    check_method(method)
    if not batches or not weights:
        raise ValueError(f"sensitivity of {len(weights)} layers on {len(batches)} batches: want at least one of both")
    if not 2 <= least <= most:
        raise ValueError(
            f"least={least}, most={most}: a standard error wants 2 samples at least, and no more than most"
        )
    count = {name: w.numel() for name, w in weights.items()}
    method = chosen(method, sum(count.values()))
    if method == "fisher":
        most = min(most, sum(len(batch[0]) for batch in batches))
    started = time.perf_counter()
    values = list(weights.values())
    held = [w.requires_grad for w in values]
    probe = _hutchinson if method == "hutchinson" else _fisher
    with evaluating(model):
        for w in values:
            w.requires_grad_(True)
        try:
            first = probe(model, dict(weights), loss, batches, torch.Generator().manual_seed(seed))
            next(first)  # what runs for the first time takes longer
            began = time.perf_counter()
            next(first, None)
            seconds = (time.perf_counter() - began) * most
            progress("sensitivity", 0, most, {"seconds at most": seconds})
            draw = probe(model, dict(weights), loss, batches, torch.Generator().manual_seed(seed))
            found: list[list[float]] = []
            converged = False
            while len(found) < most and not converged:
                found.append(next(draw))
                worst = max(summary(found)[2])
                progress("sensitivity", len(found), most, {"seconds at most": seconds, "error of a share": worst})
                converged = worth(found) >= least and worst <= error
        finally:
            for w, before in zip(values, held, strict=True):
                w.requires_grad_(before)
    means, errors, of_shares = (dict(zip(weights, values, strict=True)) for values in summary(found))
    seconds = time.perf_counter() - started
    return Sensitivity(method, means, errors, of_shares, count, len(found), worth(found), converged, seconds)


def check_method(method: str) -> None:
    """Refuse an unknown method.

    Raises:
        ValueError: If it is one.
    """
    if method not in ("auto", "hutchinson", "fisher"):
        raise ValueError(f"method={method!r}: want hutchinson, fisher or auto")


def chosen(method: str, weights: int) -> str:
    """What "auto" stands for where there are so many weights."""
    return method if method != "auto" else "fisher" if weights > LARGE else "hutchinson"


def summary(found: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Mean of each layer, and the relative standard errors of it and of its share of the sum; (samples, L) -> (L,).

    That of the share is the delta method's for a ratio of means (Cochran, Sampling Techniques, 1977, 6.3): the spread
    of v - share * sum. An error is infinite while there is one sample, or where nothing can be relative to the mean.
    """
    values = np.asarray(found, dtype=np.float64)
    count, means, total = len(values), values.mean(0), values.sum(1)

    def relative(rest: NDArray[np.float64]) -> list[float]:
        spread = np.sqrt((rest**2).sum(0) / max(count - 1, 1) / count)
        known = (count > 1) & ((means != 0) | (spread == 0))
        return np.where(known, spread / np.where(means == 0, 1, np.abs(means)), np.inf).tolist()

    if total.mean() > 0:
        of_shares = relative(values - means / total.mean() * total[:, None])
    else:
        of_shares = [math.inf if total.any() else 0.0] * len(means)
    return means.tolist(), relative(values - means), of_shares


def worth(found: Sequence[Sequence[float]]) -> float:
    """How many samples of equal sum (samples, L) are worth (Kish's effective size)."""
    total = np.asarray(found, dtype=np.float64).sum(1)
    squares = float((total**2).sum())
    return float(total.sum()) ** 2 / squares if squares else float(len(total))


def _hutchinson(model: nn.Module, weights: dict[str, nn.Parameter], loss: Loss, batches: Sequence[Any], generator):
    """Yield v_l' (H v)_l of each layer for one v over all of them: terms between layers have mean 0.

    Batches come in a random order, all of them before one comes again.

    Raises:
        ValueError: If torch has no second derivative of what the model computes, or one is not finite.
        RuntimeError: Of the model.
    """
    values = list(weights.values())
    while True:
        for number in torch.randperm(len(batches), generator=generator).tolist():
            probes = [(torch.randint(0, 2, w.shape, generator=generator) * 2 - 1).to(w) for w in values]
            try:
                with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no second derivative
                    gradients = torch.autograd.grad(
                        loss(model, batches[number]), values, create_graph=True, materialize_grads=True
                    )
                _check(weights, gradients, "gradient", number)
                inner = torch.stack([(g * v).sum() for g, v in zip(gradients, probes, strict=True)]).sum()
                products = (
                    torch.autograd.grad(inner, values, materialize_grads=True)
                    if inner.requires_grad
                    else [torch.zeros_like(w) for w in values]
                )
            except RuntimeError as error:
                if "derivative" not in str(error):
                    raise
                raise ValueError(
                    f"method='hutchinson' needs second derivatives, and torch lacks one here ({error}); take 'fisher'"
                ) from None
            _check(weights, products, "second derivative", number)
            yield [float((product * v).sum()) for product, v in zip(products, probes, strict=True)]


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
