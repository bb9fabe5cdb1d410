"""A configuration as a network that can be trained: the parent's weights, other widths, LSQ at its bits."""

from __future__ import annotations

import copy

import torch
from torch import nn

from sgsc.layers import QUANTIZED, QuantLayer, quant_layers
from sgsc.preparation import prepare
from sgsc.samples import refuse_doubles

from .cost import Configuration
from .grids import attach
from .structure import Structure
from .widths import resized

REVERSED = "_reversed_padding_repeated_twice"  # of a convolution, in a name that looks private


def parent_of(network: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    """The prepared copy of a trained float network that all candidates are cut from.

    Raises:
        ValueError: If the network is of float64, or `prepare` refuses it.
    """
    refuse_doubles(network)
    return prepare(network, quantizer="lsq8", skip=skip).model


def build(parent: nn.Module, structure: Structure, of: Configuration, seed: int = 0) -> nn.Module:
    """The untrained candidate."""
    model = resized(parent, structure, {g: n for g, n in of.sizes.items() if n != structure.sizes[g]}, seed)
    for name, layer in quant_layers(model).items():
        attach(layer, of.bits[name])
    return model


@torch.no_grad()
def as_float(model: nn.Module) -> nn.Module:
    """A float copy of a trained candidate, on its weights before rounding: what `prepare` for SGSC starts from."""
    model = copy.deepcopy(model)
    floats: dict[int, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):  # one in two places stays one
        if not isinstance(layer, QuantLayer):
            continue
        if id(layer) in floats:
            model.set_submodule(name, floats[id(layer)])
            continue
        base = next(b for b, quantized in QUANTIZED.items() if isinstance(layer, quantized))
        made = base.__new__(base)
        nn.Module.__init__(made)
        made.__dict__ |= {k: v for k, v in layer.__dict__.items() if not k.startswith("_") or k == REVERSED}
        for name_of in ("input_quantizer", "turned"):
            made.__dict__.pop(name_of, None)
        made._parameters |= layer._parameters
        made._buffers |= layer._buffers
        floats[id(layer)] = made
        model.set_submodule(name, made)
    return model.eval()
