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


class _Mean:
    """Of each channel, over all answers of a layer that are added."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(()), 0

    def add(self, layer: QuantLayer, output: Tensor) -> None:
        rows = output.movedim(-1 - _places(layer), -1).reshape(-1, layer.weight.shape[0])
        self.total = self.total.to(rows.device) + rows.sum(0, dtype=torch.float64)
        self.count += len(rows)


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
    with _watched(model, layers, lambda name, layer, output: seen[name].add(layer, output)):
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

        def correct(name: str, layer: QuantLayer, output: Tensor) -> Tensor:
            seen = _Mean()
            seen.add(layer, output)
            return output + _shift(layer, wanted[name], seen).view(-1, *[1] * _places(layer))

        with _watched(model, {name: layers[name] for name in names}, correct):
            model(batches[0])
        return
    for name in names:
        seen = _Mean()
        for batch, count in zip(batches, calls.counts, strict=True):
            left = [count.get(name, 0)]

            def look(_name: str, layer: QuantLayer, output: Tensor, seen: _Mean = seen, left: list[int] = left) -> None:
                seen.add(layer, output)
                left[0] -= 1
                if not left[0]:
                    raise Stop

            if left[0]:
                with suppress(Stop), _watched(model, {name: layers[name]}, look):
                    model(batch)
        _shift(layers[name], wanted[name], seen)


@torch.no_grad()
def inputs_of(model: nn.Module, layer: QuantLayer, batches: Sequence[Tensor]) -> list[Tensor]:
    """What a layer is called with, before rounding."""
    found: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(given(args, kwargs).clone()), with_kwargs=True
    )
    try:
        with evaluating(model):
            for batch in batches:
                model(batch)
    finally:
        handle.remove()
    return found


@torch.no_grad()
def correct_bias(layer: QuantLayer, wanted: Tensor, inputs: Sequence[Tensor]) -> None:
    """Change a bias in place, so that the layer's mean answer to these inputs is the one that is wanted."""
    seen = _Mean()
    for x in inputs:
        seen.add(layer, layer(x))
    _shift(layer, wanted, seen)


def _shift(layer: QuantLayer, wanted: Tensor, seen: _Mean) -> Tensor:
    """Correct a bias; returns by how much, (C,): nothing where rounding led all samples past the layer."""
    bias = layer.bias
    assert bias is not None  # its mean would not be wanted
    before = bias.clone()
    if seen.count:
        bias.add_((wanted - seen.total / seen.count).to(bias.dtype))
    return bias - before


@contextmanager
def _watched(
    model: nn.Module, layers: Mapping[str, QuantLayer], look: Callable[[str, QuantLayer, Tensor], Tensor | None]
) -> Iterator[None]:
    """In evaluation mode, with `look` at every answer of these layers; what it returns takes the answer's place."""

    def hook(name: str) -> Callable[[Any, Any, Tensor], Tensor | None]:
        return lambda layer, _args, output: look(name, layer, output)

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in hooks:
            handle.remove()
