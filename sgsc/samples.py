"""Reading samples, running a model on them, and refusing outputs and targets of shapes that nothing here can judge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode, and give each submodule the mode back that it had."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def as_deployed(model: nn.Module) -> Iterator[None]:
    """`evaluating`, for outputs that shall be trained on: batch norms give what their running statistics make of x,
    with the gradient of the statistics of x.

    Plain evaluation mode takes running statistics for constants. Weights that a norm makes free of scale then have a
    gradient along their own direction, the statistics follow some steps later, and the two may chase one another until
    the network is lost. The correction is that of Batch Renormalization (Ioffe 2017, arXiv 1702.03275, equation 1).
    """
    # a norm in evaluation mode is frozen: its statistics do not follow
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    with evaluating(model):
        for norm in norms:
            norm.__dict__["forward"] = MethodType(_renormalized, norm)
        try:
            yield
        finally:
            for norm in norms:
                norm.__dict__.pop("forward", None)


def _renormalized(norm: _BatchNorm, x: Tensor) -> Tensor:
    mean, var, eps = norm.running_mean, norm.running_var, norm.eps
    if x.numel() == x.shape[1] or mean is None or var is None:  # one value a channel has no statistics
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, False, 0.0, eps)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    with torch.no_grad():
        var_here, mean_here = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
        step = (var + eps).rsqrt()
        scale, shift = (var_here + eps).sqrt() * step, (mean_here - mean) * step
    shift = shift if norm.weight is None else shift * norm.weight
    y = F.batch_norm(x, None, None, norm.weight, None, True, 0.0, eps) * scale.to(x.dtype).view(shape)
    return y + (shift if norm.bias is None else shift + norm.bias).to(x.dtype).view(shape)


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter, or of the first buffer of a model without parameters, or the CPU."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def taking(inputs: Tensor, what: str) -> Iterator[None]:
    """Name the inputs, as `what` they are, that a model does not take.

    Raises:
        ValueError: In place of what the model raised within.
    """
    try:
        yield
    except (RuntimeError, TypeError, IndexError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(
            f"the model does not take {what}, {inputs.dtype} of shape {tuple(inputs.shape)}: {said}"
        ) from None


def refuse_doubles(model: nn.Module) -> None:
    """Refuse a model of float64, all of it or in part: its layers have no form that is stored.

    Raises:
        ValueError: If a parameter is; the message names it.
    """
    double = next((name for name, p in model.named_parameters() if p.dtype == torch.float64), None)
    if double is not None:
        raise ValueError(
            f"the model's {double} is torch.float64, which has no quantized form; convert model and data by .float()"
        )


def fed(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs on a model's device, and a copy: one that begins with an in-place activation changes what it is given."""
    return inputs.to(device_of(model), copy=True)


def fetch(data: Dataset, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
    """Stack samples of a map-style dataset: inputs (n, ...), targets (n, ...).

    Raises:
        ValueError: If a sample is not a pair of tensors (or numbers), or samples differ in shape.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for index in indices:
        sample: Any = data[int(index)]
        try:
            x, y = (torch.as_tensor(value) for value in sample)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"data[{index}] is a {type(sample).__name__} that does not split into two tensors; wrap the data in a "
                "Dataset that returns (input, target) pairs of tensors or numbers"
            ) from None
        if pairs and (x.shape != pairs[0][0].shape or y.shape != pairs[0][1].shape):
            raise ValueError(
                f"data[{index}] has shapes {tuple(x.shape)} and {tuple(y.shape)}, samples before it "
                f"{tuple(pairs[0][0].shape)} and {tuple(pairs[0][1].shape)}; crop or pad the samples to one shape"
            )
        pairs.append((x, y))
    if not pairs:
        raise ValueError("no samples to fetch; pass data with at least one")
    return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def check_outputs(outputs: Any) -> None:
    """Refuse outputs that are neither those of a classifier nor those of a sequence model.

    Raises:
        ValueError: Unless `outputs` is a tensor (N, classes) or (N, T, vocabulary) with two classes or more.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() not in (2, 3) or outputs.shape[-1] < 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"model outputs: got {got}, want a tensor (N, classes) of a classifier or (N, T, vocabulary) of a sequence "
            "model, with at least two classes; wrap the model so that it returns its logits"
        )


def check_targets(targets: Tensor, outputs: Tensor) -> None:
    """Refuse targets that do not name one class an output row.

    Raises:
        ValueError: Unless `targets` are integers of shape (N,) or (N, T), those of `outputs`, and in range.
    """
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        nan = " with NaN" if targets.isnan().any() else ""
        raise ValueError(f"targets: got {targets.dtype}{nan}, want integers: class ids, or token ids of a sequence")
    if targets.shape != outputs.shape[:-1]:
        raise ValueError(
            f"targets: got {tuple(targets.shape)}, but outputs {tuple(outputs.shape)} need {tuple(outputs.shape[:-1])}"
        )
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[-1]):
        raise ValueError(
            f"targets run from {int(targets.min())} to {int(targets.max())}, but the outputs have {outputs.shape[-1]} "
            f"classes: allowed are 0 to {outputs.shape[-1] - 1}"
        )


def outputs(model: nn.Module, inputs: Tensor, batch_size: int = 256) -> Tensor:
    """Outputs of `model` for `inputs` (N, ...), in evaluation mode, without gradients, on the device of the inputs.

    Raises:
        ValueError: If the model does not return logits (N, classes) or (N, T, vocabulary).
    """
    parts = []
    with evaluating(model), torch.no_grad():
        for batch in inputs.split(max(batch_size, 1)):
            part = model(fed(model, batch))
            check_outputs(part)
            parts.append(part.to(inputs.device))
    return torch.cat(parts)
