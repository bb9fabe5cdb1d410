"""Layers that run from packed rows, and `pack`, which makes them from trained ones.

The packed model answers as the trained one: `pack` is lossless, and on the reference path a packed layer's forward
equals the fake-quantized one bit for bit in float32. Running needs no training code.
"""

from .base import PackedLayer, PackedProduct, input_grid
from .layers import PACKED, PackedConv1d, PackedConv2d, PackedEmbedding, PackedLinear, set_numerics
from .packing import geometry, pack, pack_layer, replace_layers

__all__ = [
    "PACKED",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLayer",
    "PackedLinear",
    "PackedProduct",
    "geometry",
    "input_grid",
    "pack",
    "pack_layer",
    "replace_layers",
    "set_numerics",
]
