"""A configuration as a network that can be trained: the parent's weights, other widths, LSQ at its bits."""

from __future__ import annotations

from torch import nn

from sgsc.layers import quant_layers
from sgsc.preparation import prepare

from .cost import Configuration
from .grids import attach
from .structure import Structure
from .widths import resized


def parent_of(network: nn.Module, skip: tuple[str, ...] = ()) -> nn.Module:
    """The prepared copy of a trained float network that all candidates are cut from."""
    return prepare(network, quantizer="lsq8", skip=skip).model


def build(parent: nn.Module, structure: Structure, of: Configuration, seed: int = 0) -> nn.Module:
    """The untrained candidate."""
    model = resized(parent, structure, {g: n for g, n in of.sizes.items() if n != structure.sizes[g]}, seed)
    for name, layer in quant_layers(model).items():
        attach(layer, of.bits[name])
    return model
