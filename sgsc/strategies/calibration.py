"""Grids for the inputs of a model's layers, found in the order in which the network calls them.

Every layer is calibrated on what the layers before it, already quantized, give it: its grid then knows of their errors.
Data of one batch passes through once; each layer finds its grid as the batch arrives, and rounds it. Of several batches
all are needed for a layer before the next may look, so each pass stops at the layer in question: half a forward of all
data a layer on average, at no memory beyond that of one batch and the statistics of one layer. `room` says how many
samples a batch may have: most calibration data is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgsc.layers import QuantEmbedding, QuantLayer, quant_layers
from sgsc.quantizers import InputQuantizer
from sgsc.samples import evaluating, fed

from .statistics import InputStatistics

MOST_BYTES = 2**30  # of activations that are alive at once
ALIVE = 6  # tensors like the largest input of a layer: it, its rounding, outputs before and after a norm, a shortcut

Choose = Callable[[str, InputStatistics], InputQuantizer]


class Stop(Exception):
    """Ends a pass: what is behind the layer in question need not be computed."""


class Calls(NamedTuple):
    """Who is called when.

    Attributes:
        first: Layers in the order of their first calls.
        last: In the order of their last calls.
        counts: For each batch, layer -> number of its calls.
        never: Layers that are not called, or on nothing.
    """

    first: list[str]
    last: list[str]
    counts: list[dict[str, int]]
    never: list[str]

    def of_all(self) -> Calls:
        """These calls, if the data reaches all layers.

        Raises:
            ValueError: If a layer is never called.
        """
        if self.never:
            raise ValueError(
                f"layers never called on the calibration data: {', '.join(self.never)}; their inputs have no grid. "
                "Call the model as it will be used, or leave these layers float with skip=[...]"
            )
        return self


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Tensor], choose: Choose, calls: Calls | None = None) -> list[str]:
    """Give every quantized layer but embeddings an input quantizer, in place.

    A module that is called several times is calibrated on all its inputs, before its last call.

    Args:
        model: From `prepare`, weights quantized as they will be.
        batches: Inputs of the model.
        choose: (name of a layer, what was seen of its input) -> its input quantizer.
        calls: Of all layers, as `count_calls` says of the same batches, where that is known.

    Returns:
        Names of all quantized layers in the order of their last calls.

    Raises:
        ValueError: If there is no batch, a layer is never called, or an input holds NaN or infinity.
    """
    layers = quant_layers(model)
    calls = count_calls(model, layers, batches).of_all() if calls is None else calls
    wanted = [name for name in calls.last if not isinstance(layers[name], QuantEmbedding)]
    for name in wanted:
        layers[name].input_quantizer = None
    groups = [wanted] if len(batches) == 1 else [[name] for name in wanted]
    for group in groups:
        left = {name: sum(count.get(name, 0) for count in calls.counts) for name in group}
        seen = {name: InputStatistics() for name in group}
        for batch, count in zip(batches, calls.counts, strict=True):
            here = {name: layers[name] for name in group if name in count}
            _pass(model, here, batch, count, left, seen, choose, len(batches) > 1)
        for name in group:  # fewer calls than expected, where data decides and is rounded now
            if left[name] > 0 and seen[name].count:
                layers[name].input_quantizer = choose(name, seen[name]).to(layers[name].weight.device)
            elif left[name] > 0:
                raise ValueError(
                    f"layer {name!r} is called on the calibration data, but no more once the layers before it round "
                    "theirs; leave it float with skip, or give more bits"
                )
    return calls.last


@torch.no_grad()
def count_calls(model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> Calls:
    """Which layers the batches reach, and when.

    Raises:
        ValueError: If there is no batch.
    """
    if not len(batches):
        raise ValueError("no calibration data: want at least one batch of inputs")
    first: dict[str, None] = {}
    last: dict[str, None] = {}
    counts: list[dict[str, int]] = []
    reached = set()

    def count(args: tuple, kwargs: dict, name: str) -> None:
        if given(args, kwargs).numel():
            reached.add(name)
        first.setdefault(name)
        last.pop(name, None)
        last[name] = None
        counts[-1][name] = counts[-1].get(name, 0) + 1

    hooks = [
        m.register_forward_pre_hook(lambda _, a, k, name=name: count(a, k, name), with_kwargs=True)
        for name, m in layers.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                counts.append({})
                model(fed(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    return Calls(list(first), list(last), counts, [name for name in layers if name not in reached])


def given(args: tuple, kwargs: dict) -> Tensor:
    """The input among what a layer is called with."""
    return args[0] if args else kwargs["input"]


@torch.no_grad()
def room(model: nn.Module, layers: Mapping[str, nn.Module], batch: Tensor) -> int:
    """Samples like those of a batch that may pass through together, for activations of about MOST_BYTES."""
    largest, few = [1], batch[:2]  # of one sample some norms have no statistics

    def look(_module: nn.Module, args: tuple, output: Any) -> None:
        largest.extend(t.numel() * t.element_size() for t in (*args, output) if isinstance(t, Tensor))

    hooks = [m.register_forward_hook(look) for m in layers.values()]
    try:
        with evaluating(model):
            model(fed(model, few))
    finally:
        for hook in hooks:
            hook.remove()
    return max(MOST_BYTES * len(few) // (ALIVE * max(largest)), 1)


def _pass(
    model: nn.Module,
    layers: dict[str, QuantLayer],
    batch: Tensor,
    calls: Mapping[str, int],
    left: dict[str, int],
    seen: Mapping[str, InputStatistics],
    choose: Choose,
    stop: bool,
) -> None:
    """Show a batch to the statistics; `left` counts the calls until a layer may choose, `stop` ends at its last one."""
    times = dict.fromkeys(layers, 0)

    def look(layer: Any, args: tuple, kwargs: dict, name: str) -> None:
        try:
            seen[name].observe(given(args, kwargs))
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}; look for NaN in the data and in the model's weights") from None
        times[name] += 1
        left[name] -= 1
        if left[name] == 0:
            layer.input_quantizer = choose(name, seen[name]).to(layer.weight.device)
        if stop and times[name] == calls[name]:
            raise Stop

    hooks = [
        m.register_forward_pre_hook(lambda m, a, k, name=name: look(m, a, k, name), with_kwargs=True)
        for name, m in layers.items()
    ]
    try:
        with evaluating(model):
            model(fed(model, batch))
    except Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
