"""Biases that make up for what rounding does to the mean of a layer's answers.

    b'_c = b_c + mean(float answer of channel c) - mean(quantized answer of channel c)

The empirical form of bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2, equation 17, after a layer and
not its activation): means are over samples, places and calls, of the float network and of the quantized one, in which
the layers before are corrected already. A layer without a bias stays as it is, for a file with one more would no longer
load into the network that it is of; and so does one that shares its bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.layers import QuantLayer
from sgsc.samples import evaluating

from .calibration import Calls, Stop, given

MeanInput = list[tuple[Tensor, int]]  # (1, ...) and how many samples it is the mean of, for each shape that there is


class _Mean:
    """Of each channel, over all answers of a layer that are added."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def add(self, layer: QuantLayer, output: Tensor, times: int = 1) -> None:
        rows = output.movedim(-1 - _places(layer), -1)
        rows = rows.flatten(1, -2) if rows.dim() > 2 else rows.reshape(1, -1, rows.shape[-1])
        of_samples = rows.sum(1, dtype=torch.float32)  # few enough for it, and several times as fast
        self.total = self.total.to(rows.device) + times * of_samples.sum(0, dtype=torch.float64)
        self.count += times * rows.shape[:2].numel()


def _places(layer: nn.Module) -> int:
    """Axes of an answer behind that of its channels."""
    return len(getattr(layer, "kernel_size", ()))


def own_biases(model: nn.Module, layers: Mapping[str, QuantLayer]) -> list[str]:
    """Names of the layers with a bias that no other module holds."""
    held = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    return [name for name, layer in layers.items() if held.count(id(layer._parameters.get("bias"))) == 1]


@torch.no_grad()
def float_means(
    model: nn.Module, layers: Mapping[str, QuantLayer], names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Layer -> (C,) mean answers, float64, of the network whose inputs and weights are not rounded yet.

    Args:
        model: From `prepare`, no input quantized.
        layers: All of its quantized layers.
        names: Of those that are asked for.
        batches: Inputs of the model.
    """
    for layer in layers.values():
        layer.__dict__["handed"] = lambda layer: layer.weight  # in place of a quantized one
    try:
        return means(model, {name: layers[name] for name in names}, batches)
    finally:
        for layer in layers.values():
            layer.__dict__.pop("handed")


@torch.no_grad()
def means(model: nn.Module, layers: Mapping[str, QuantLayer], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Layer -> (C,) mean answers, float64, of the network as it stands; of layers that are called on something."""
    seen = {name: _Mean() for name in layers}
    with _watched(model, layers, lambda name, layer, _x, y: seen[name].add(layer, y)):
        for batch in batches:
            model(batch)
    return {name: mean.total / mean.count for name, mean in seen.items() if mean.count}


@torch.no_grad()
def correct_biases(
    model: nn.Module,
    layers: Mapping[str, QuantLayer],
    wanted: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    calls: Calls,
) -> None:
    """Change biases in place, in the order of last calls, until mean answers are those that are wanted.

    One pass where all data is one batch and layers are called once; else one a layer, which ends at its last call. Of
    a layer whose answers come back to it as input, the mean moves on with the bias and is then near what is wanted.

    Args:
        model: From `prepare`, weights and inputs quantized as they will be.
        layers: Of the model, by name.
        wanted: Layer -> (C,) mean of the float network's answers; other layers keep their bias.
        batches: Inputs of the model.
        calls: Of the layers, for each of these batches.
    """
    names = [name for name in calls.last if name in wanted]
    if len(batches) == 1 and all(calls.counts[0].get(name) == 1 for name in names):

        def correct(name: str, layer: QuantLayer, _x: Tensor, y: Tensor) -> Tensor:
            seen = _Mean()
            seen.add(layer, y)
            return y + _shift(layer, wanted[name], seen).view(-1, *[1] * _places(layer))

        with _watched(model, {name: layers[name] for name in names}, correct):
            model(batches[0])
        return
    for name in names:
        seen = _Mean()
        _until_last_call(model, name, layers[name], batches, calls, lambda layer, _x, y, seen=seen: seen.add(layer, y))
        _shift(layers[name], wanted[name], seen)


@torch.no_grad()
def mean_inputs(
    model: nn.Module,
    name: str,
    layer: QuantLayer,
    quantizers: Mapping[Any, nn.Module | None],
    batches: Sequence[Tensor],
    calls: Calls,
) -> dict[Any, MeanInput]:
    """What a layer is called with on average, rounded by each of these quantizers, or as it is.

    A layer is linear in its input: its answer to the mean is its mean answer, and no candidate has to see the samples.
    Of a convolution the mean is over samples alone, for edges of an image are not like its middle.
    """
    totals: dict[Any, dict[Any, tuple[Tensor, int]]] = {key: {} for key in quantizers}

    def look(layer: QuantLayer, x: Tensor, _y: Tensor) -> None:
        x = x.reshape(-1, *x.shape[-1 - _places(layer) :])
        for key, quantizer in quantizers.items() if len(x) else ():
            rounded = x if quantizer is None else quantizer(x)
            total, count = totals[key].get(x.shape[1:], (0.0, 0))
            totals[key][x.shape[1:]] = total + rounded.sum(0, dtype=torch.float32).double(), count + len(x)

    _until_last_call(model, name, layer, batches, calls, look)
    return {
        key: [((total / count).to(layer.weight.dtype)[None], count) for total, count in of.values()]
        for key, of in totals.items()
    }


@torch.no_grad()
def correct_bias(layer: QuantLayer, wanted: Tensor, inputs: MeanInput) -> None:
    """Change a bias in place, so that the layer's mean answer is the one that is wanted; its inputs are rounded."""
    quantizer, layer.input_quantizer = layer.input_quantizer, None
    seen = _Mean()
    for x, count in inputs:
        seen.add(layer, layer(x), count)
    layer.input_quantizer = quantizer
    _shift(layer, wanted, seen)


def _shift(layer: QuantLayer, wanted: Tensor, seen: _Mean) -> Tensor:
    """Correct a bias; returns by how much, (C,): nothing where rounding led all samples past the layer."""
    bias = layer.bias
    assert bias is not None  # its mean would not be wanted
    before = bias.clone()
    if seen.count:
        bias.add_((wanted - seen.total / seen.count).to(bias.dtype))
    return bias - before


def _until_last_call(
    model: nn.Module,
    name: str,
    layer: QuantLayer,
    batches: Sequence[Tensor],
    calls: Calls,
    look: Callable[[QuantLayer, Tensor, Tensor], None],
) -> None:
    """Show `look` all that one layer is given and answers; each pass ends behind its last call."""
    for batch, count in zip(batches, calls.counts, strict=True):
        left = [count.get(name, 0)]

        def counted(_name: str, layer: QuantLayer, x: Tensor, y: Tensor, left: list[int] = left) -> None:
            look(layer, x, y)
            left[0] -= 1
            if not left[0]:
                raise Stop

        if left[0]:
            with suppress(Stop), _watched(model, {name: layer}, counted):
                model(batch)


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, QuantLayer], look: Callable[[str, QuantLayer, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """In evaluation mode, with `look` at all that layers are given and answer; what it returns is answered instead."""

    def hook(name: str) -> Callable[[Any, tuple, dict, Tensor], Tensor | None]:
        return lambda layer, args, kwargs, output: look(name, layer, given(args, kwargs), output)

    hooks = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in hooks:
            handle.remove()
