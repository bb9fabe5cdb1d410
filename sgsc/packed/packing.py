"""From a trained model to a packed one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sgsc.kernels import pack as pack_rows
from sgsc.layers import QuantConv1d, QuantConv2d, QuantEmbedding, QuantLayer, QuantLinear
from sgsc.quantizers import InputQuantizer

from .base import PackedLayer, PackedProduct, input_grid
from .layers import PackedConv1d, PackedConv2d, PackedEmbedding, PackedLinear


def geometry(layer: QuantConv1d | QuantConv2d) -> dict[str, Any]:
    """Settings of a packed convolution, from a trained or a float one."""
    return {
        "kernel": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": [int(p) for p in layer._reversed_padding_repeated_twice],
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
    }


_KIND: dict[type[QuantLayer], tuple[type[PackedLayer], Callable[[Any], dict[str, Any]]]] = {
    QuantLinear: (PackedLinear, lambda layer: {}),
    QuantConv1d: (PackedConv1d, geometry),
    QuantConv2d: (PackedConv2d, geometry),
    QuantEmbedding: (PackedEmbedding, lambda layer: {"dtype": layer.weight.dtype}),
}


def pack_layer(layer: QuantLayer) -> PackedLayer:
    """The packed form of one trained layer; the layer is left as it is.

    Raises:
        ValueError: If the layer's type has no packed form, or its input's grid has none.
    """
    if type(layer) not in _KIND:
        raise ValueError(
            f"{type(layer).__name__} has no packed form; those that have are {[c.__name__ for c in _KIND]}"
        )
    cls, settings = _KIND[type(layer)]
    codes = layer.weight_quantizer.codes(layer.rows().detach())
    bias = None if layer.bias is None else layer.bias.detach().clone()
    options = settings(layer)
    if layer.input_quantizer is not None:
        options["input_grid"] = _input_grid(layer.input_quantizer, cls).to(codes.scale.device)
    return cls(pack_rows(codes.levels, codes.bits), codes.scale, codes.offset, bias, **options)


def _input_grid(quantizer: nn.Module, cls: type[PackedLayer]) -> Tensor:
    if not isinstance(quantizer, InputQuantizer) or not issubclass(cls, PackedProduct):
        raise ValueError(
            f"an input_quantizer of {type(quantizer).__name__} has no packed form on a {cls.type_name}; "
            "want an InputQuantizer, on a layer that multiplies, or None"
        )
    scale, low, high, shift = (float(value.detach()) for value in quantizer.grid())
    if shift:
        raise ValueError(f"the input's grid has a shift of {shift}; want 0, so that it holds 0")
    return input_grid(scale, low, high)


def pack(model: nn.Module, *, remove: bool = True) -> nn.Module:
    """A packed copy of a prepared, trained model, in eval mode; the model itself is left as it is.

    Args:
        model: A model that `prepare` returned.
        remove: Cut removed channels out of every layer where the model's graph proves that this changes nothing;
            elsewhere they keep their place, at no bytes for their weights.

    Raises:
        ValueError: If the model holds no quantized layer, or a layer cannot be packed (the message names it).
    """
    from sgsc.cutting import remove_channels  # only training has dead channels to cut; running must not need this

    model = copy.deepcopy(model).eval()
    if remove:
        remove_channels(model)
    return replace_layers(model, QuantLayer, pack_layer).requires_grad_(False)


def replace_layers(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """Replace every submodule of type `kind`, in place, once each; shared ones stay shared. Returns the model.

    Raises:
        ValueError: If there is none, or `make` refuses one (the message then begins with its name).
    """
    done: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, kind):
            continue
        if id(module) not in done:
            try:
                done[id(module)] = make(module)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
        if name == "":
            return done[id(module)]
        model.set_submodule(name, done[id(module)])
    if not done:
        raise ValueError(f"the model holds no {kind.__name__}; call prepare(model) first")
    return model
