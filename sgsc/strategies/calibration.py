"""Grids for the inputs of a model's layers, found in the order in which the network calls them.

Every layer is calibrated on what the layers before it, already quantized, give it: its grid then knows of their errors.
Data of one batch passes through once; each layer finds its grid as the batch arrives, and rounds it. Of several batches
all are needed for a layer before the next may look, so each pass stops at the layer in question: half a forward of all
data a layer on average, at no memory beyond that of one batch and the statistics of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.layers import QuantEmbedding, QuantLayer, quant_layers
from sgsc.quantizers import InputQuantizer
from sgsc.samples import evaluating

from .statistics import InputStatistics

Choose = Callable[[str, InputStatistics], InputQuantizer]


class _Stop(Exception):
    pass


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Tensor], choose: Choose, observe: bool = True) -> list[str]:
    """Give every quantized layer but embeddings an input quantizer, in place.

    A module that is called several times is calibrated on all its inputs, before its last call.

    Args:
        model: From `prepare`, weights quantized as they will be.
        batches: Inputs of the model.
        choose: (name of a layer, what was seen of its input) -> its input quantizer.
        observe: Without, nothing is set, and the layers are named only.

    Returns:
        Names of all quantized layers in the order of their last calls.

    Raises:
        ValueError: If there is no batch, a layer is never called, or an input holds NaN or infinity.
    """
    if not len(batches):
        raise ValueError("no calibration data: want at least one batch of inputs")
    layers = quant_layers(model)
    calls = count_calls(model, layers, batches[0])
    never = [name for name in layers if name not in calls]
    if never:
        raise ValueError(
            f"layers never called on the calibration data: {', '.join(never)}; their inputs have no grid. Call the "
            "model as it will be used, or leave these layers float with skip=[...]"
        )
    if not observe:
        return list(calls)
    wanted = [name for name in calls if not isinstance(layers[name], QuantEmbedding)]
    for name in wanted:
        layers[name].input_quantizer = None
    groups = [wanted] if len(batches) == 1 else [[name] for name in wanted]
    for group in groups:
        seen = {name: (InputStatistics(), [0]) for name in group}
        for batch in batches:
            _pass(model, {name: layers[name] for name in group}, calls, batch, seen, choose, len(batches))
    return list(calls)


@torch.no_grad()
def count_calls(model: nn.Module, layers: dict[str, QuantLayer], batch: Tensor) -> dict[str, int]:
    """Layer -> number of its calls for one batch, in the order of the last ones."""
    found: dict[str, int] = {}

    def count(name: str) -> None:
        found[name] = found.pop(name, 0) + 1

    hooks = [m.register_forward_pre_hook(lambda *_, name=name: count(name)) for name, m in layers.items()]
    try:
        with evaluating(model):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _pass(
    model: nn.Module,
    layers: dict[str, QuantLayer],
    calls: dict[str, int],
    batch: Tensor,
    seen: dict[str, tuple[InputStatistics, list[int]]],
    choose: Choose,
    batches: int,
) -> None:
    def look(layer: Any, args: tuple, kwargs: dict, name: str) -> None:
        statistics, times = seen[name]
        try:
            statistics.observe(args[0] if args else kwargs["input"])
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}; look for NaN in the data and in the model's weights") from None
        times[0] += 1
        if times[0] == calls[name] * batches:
            layer.input_quantizer = choose(name, statistics).to(layer.weight.device)
        if batches > 1 and times[0] % calls[name] == 0:
            raise _Stop

    hooks = [
        m.register_forward_pre_hook(lambda m, a, k, name=name: look(m, a, k, name), with_kwargs=True)
        for name, m in layers.items()
    ]
    try:
        with evaluating(model):
            model(batch)
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def round_biases(model: nn.Module) -> int:
    """Round biases to what integer kernels add: whole steps of scale_w * scale_x in int32, in place.

    Ours add a float bias to the scaled sum, which is exact: this is for networks that will run on kernels which
    accumulate codes with the bias among them. The error is at most half such a step, unless 2^31 of them are too few.

    Returns:
        How many biases do not fit int32 and were cut to its ends.
    """
    cut = 0
    for layer in quant_layers(model).values():
        if layer.bias is None or not isinstance(layer.input_quantizer, InputQuantizer):
            continue
        step = layer.weight_quantizer.grid()[0].double() * layer.input_quantizer.grid()[0].double()
        code = (layer.bias.double() / step).round()
        cut += int(((code < -(2.0**31)) | (code > 2.0**31 - 1)).sum())
        layer.bias.copy_((code.clamp(-(2.0**31), 2.0**31 - 1) * step).to(layer.bias.dtype))
    return cut
