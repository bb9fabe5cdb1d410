"""Biases that make up for what rounding does to the mean of a layer's answers.

    b'_c = b_c + mean(float answer of channel c) - mean(quantized answer of channel c)

The empirical form of bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2, equation 17, after a layer and
not its activation): means are over samples, places and calls, of the float network and of the quantized one, in which
the layers before are corrected already. A layer without a bias is given one, and files say so: they load into the
network that they are of, which has none. One that shares its bias stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.layers import QuantEmbedding, QuantLayer, quant_layers
from sgsc.preparation import alike, unrounded
from sgsc.quantizers import InputQuantizer
from sgsc.samples import evaluating, fed

from .calibration import Stop, given

Sum = tuple[Tensor, int]  # float64, and of how many
Answers = dict[str, list[Sum]]  # to one batch: layer -> for each of its calls, (C,) over samples and places


def mean(sums: Sequence[Sum]) -> Tensor | None:
    """Of all together; None of nothing."""
    count = sum(count for _, count in sums)
    return torch.stack([total for total, _ in sums]).sum(0) / count if count else None


def give_biases(layers: Mapping[str, QuantLayer]) -> list[str]:
    """Give layers that multiply and have no bias one of zeros, frozen; their names. See `take_back`."""
    bare = [n for n, layer in layers.items() if layer.bias is None and not isinstance(layer, QuantEmbedding)]
    for name in bare:
        weight = layers[name].weight
        layers[name].bias = nn.Parameter(weight.new_zeros(len(weight)), requires_grad=False)
    return bare


@torch.no_grad()
def give_unseen(model: nn.Module, layers: Mapping[str, QuantLayer], x: Tensor, wanted: Tensor) -> list[str]:
    """`give_biases`, but none where the model looks whether its layers have one, and then answers otherwise.

    Args:
        model: From `prepare`, in evaluation mode.
        layers: All of its quantized layers.
        x: A batch of inputs.
        wanted: What the float network answers to it.
    """
    added = give_biases(layers)
    try:
        with unrounded(layers.values()):
            same = not added or alike(model(fed(model, x)), wanted)
    except Exception:  # of a forward that asserts that there is none
        same = False
    return added if same else take_back(layers, added)


def take_back(layers: Mapping[str, QuantLayer], names: Sequence[str]) -> list[str]:
    """Take the biases of those names away again that are zeros still; the names of the others."""
    for name in names:
        if not layers[name].bias.any():  # pyright: ignore  it was given one
            layers[name].bias = None
    return [name for name in names if layers[name].bias is not None]


def own_biases(model: nn.Module, layers: Mapping[str, QuantLayer]) -> list[str]:
    """Names of the layers with a bias that no other module holds."""
    held = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    return [name for name, layer in layers.items() if held.count(id(layer._parameters.get("bias"))) == 1]


@torch.no_grad()
def float_answers(
    model: nn.Module, layers: Mapping[str, QuantLayer], names: Sequence[str], batches: Sequence[Tensor]
) -> list[Answers]:
    """What the network answers whose inputs and weights are not rounded yet, for each batch.

    Args:
        model: From `prepare`, no input quantized.
        layers: All of its quantized layers.
        names: Of those that are asked for.
        batches: Inputs of the model.
    """
    found: list[Answers] = []
    with unrounded(layers.values()):
        for batch in batches:
            answers: Answers = {name: [] for name in names}
            found.append(answers)
            with _watched(
                model,
                {name: layers[name] for name in names},
                lambda name, layer, _x, y, answers=answers: answers[name].append(_summed(layer, y)),
            ):
                model(fed(model, batch))
    return found


@torch.no_grad()
def correct_biases(
    model: nn.Module, layers: Mapping[str, QuantLayer], wanted: Sequence[Answers], batches: Sequence[Tensor]
) -> None:
    """Change biases in place, in one pass, until mean answers are those that are wanted.

    Every answer of a call is moved on its way to the mean that the float network has there, so that later layers are
    given what corrected ones give; a bias then moves by the mean over all calls of all batches. Of a layer that is
    called once, on one batch, that makes the means equal; of others it does so to first order.

    Args:
        model: From `prepare`, weights and inputs quantized as they will be.
        layers: Of the model, by name.
        wanted: For each batch, the float network's answers; layers that are not among them keep their bias.
        batches: Inputs of the model.
    """
    shifts: dict[str, list[Sum]] = {}
    for batch, answers in zip(batches, wanted, strict=True):
        calls = {name: iter(sums) for name, sums in answers.items()}

        def correct(
            name: str, layer: QuantLayer, _x: Tensor, y: Tensor, calls: dict[str, Iterator[Sum]] = calls
        ) -> Tensor | None:
            of_float, (total, count) = next(calls[name], None), _summed(layer, y)
            if of_float is None or not of_float[1] or not count:  # rounding led samples another way
                return None
            shift = of_float[0] / of_float[1] - total / count
            shifts.setdefault(name, []).append((shift * count, count))
            return y + shift.to(y.dtype).view(-1, *[1] * _places(layer))

        with _watched(model, {name: layers[name] for name in answers}, correct):
            model(fed(model, batch))
    for name, of in shifts.items():
        _bias(layers[name]).add_(mean(of))  # pyright: ignore  there is one, of some answers


@torch.no_grad()
def mean_inputs(
    model: nn.Module,
    name: str,
    layer: QuantLayer,
    quantizers: Mapping[Any, nn.Module | None],
    batches: Sequence[Tensor],
    counts: Sequence[Mapping[str, int]],
) -> dict[Any, Tensor | None]:
    """What a row of a layer's weight is multiplied with on average, rounded by each of these quantizers, or as it is.

    A layer is linear in its input: of its mean answer it needs to know no more, whatever weight it will have. Of a
    convolution this is the mean patch, (I, *kernel), edges and padding among them; of a Linear (K,). None where the
    layer is called on nothing.
    """
    sums: dict[Any, list[Sum]] = {key: [] for key in quantizers}

    for batch, count in zip(batches, counts, strict=True):
        left = [count.get(name, 0)]

        def look(_name: str, layer: QuantLayer, x: Tensor, _y: Tensor, left: list[int] = left) -> None:
            for key, quantizer in quantizers.items() if x.numel() else ():
                sums[key].append(_patches(layer, x if quantizer is None else quantizer(x)))
            left[0] -= 1
            if not left[0]:
                raise Stop

        if left[0]:
            with suppress(Stop), _watched(model, {name: layer}, look):
                model(fed(model, batch))
    return {key: mean(of) for key, of in sums.items()}


@torch.no_grad()
def correct_bias(layer: QuantLayer, wanted: Tensor, given: Tensor | None) -> None:
    """Set a bias, so that the layer's mean answer is the one that is wanted.

    Args:
        layer: Its weight quantized as it will be.
        wanted: (C,) float64.
        given: Of `mean_inputs`, rounded as the layer's inputs will be; with None the bias stays.
    """
    if given is None:
        return
    groups = getattr(layer, "groups", 1)
    weight = layer.quantized_weight().double()
    answers = weight.view(groups, len(weight) // groups, -1) @ given.view(groups, -1, 1)
    _bias(layer).copy_(wanted - answers.flatten())


@torch.no_grad()
def round_biases(model: nn.Module, added: Collection[str] = ()) -> int:
    """Round biases to what integer kernels add: whole steps of scale_w * scale_x in int32, in place.

    Ours add a float bias to the scaled sum, which is exact: this is for networks that will run on kernels which
    accumulate codes with the bias among them. The error is at most half such a step. A bias of more than 2^31 steps
    stays as it is: such are those of rows of zeros. So does one whose dtype cannot hold whole steps, to a hundredth or
    as far as float32 can, or that several layers share. Of layers that had no bias, the names in `added`, what would
    stay as it is goes: without it they were right for such kernels.

    Returns:
        How many biases were left; of those that are shared once a layer.
    """
    kept, layers = 0, quant_layers(model)
    own = own_biases(model, layers)
    for name, layer in layers.items():
        if layer.bias is None or not isinstance(layer.input_quantizer, InputQuantizer):
            continue
        step = layer.weight_quantizer.grid()[0].double() * layer.input_quantizer.grid()[0].double()
        code = (layer.bias.double() / step).round()
        fits = (code >= -(2.0**31)) & (code <= 2.0**31 - 1)
        rounded = (code * step).to(layer.bias.dtype)
        fits &= (rounded.double() / step - code).abs() <= 0.01 + code.abs() * 2.0**-23  # as float32 holds them
        fits &= name in own
        kept += 0 if name in added else int((~fits).sum())
        layer.bias.copy_(torch.where(fits, rounded, 0.0 if name in added else layer.bias))
    return kept


def _bias(layer: QuantLayer) -> Tensor:
    bias = layer.bias
    assert bias is not None  # its means would not be wanted
    return bias


def _places(layer: nn.Module) -> int:
    """Axes of an answer behind that of its channels."""
    return len(getattr(layer, "kernel_size", ()))


def _summed(layer: QuantLayer, output: Tensor) -> Sum:
    """(C,) over samples and places."""
    rows = output.movedim(-1 - _places(layer), -1)
    rows = rows.flatten(1, -2) if rows.dim() > 2 else rows.reshape(1, -1, rows.shape[-1])
    of_samples = rows.sum(1, dtype=torch.float32)  # several times as fast as float64, and cascaded
    return of_samples.sum(0, dtype=torch.float64), rows.shape[:2].numel()


def _patches(layer: Any, x: Tensor) -> Sum:
    """What the rows of a layer's weight are multiplied with, over samples and places: (I, *kernel), or (K,)."""
    places = _places(layer)
    x = x.reshape(-1, *x.shape[-1 - places :])
    total, count = x.sum(0, dtype=torch.float32), len(x)
    if not places:
        return total.double(), count
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    total = F.pad(total[None], layer._reversed_padding_repeated_twice, mode=mode)[0].double()
    for axis, (size, stride, step) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 1):
        total = total.unfold(axis, step * (size - 1) + 1, stride)[..., ::step]
    return total.sum(tuple(range(1, places + 1))), count * total.shape[1 : places + 1].numel()


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
