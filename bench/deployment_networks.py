"""Networks and layers of bench.deployment: random weights at mixed widths, and the float forms of the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from sgsc.demos.models import CharLM
from sgsc.layers import QuantLayer
from sgsc.packed import PackedLayer, pack, set_numerics
from sgsc.preparation import prepare

from .networks import ResNet20

MIXED = (2, 3, 3, 4, 4, 5, 5, 6)  # widths of a mixed layer's rows, in turn: 4 bits in the mean
EIGHT = (8,)

Network = TypeVar("Network", bound=nn.Module)


def compressed(network: Network, widths: tuple[int, ...]) -> tuple[nn.Module, Network]:
    """(packed network, float network of the very values that the packed one holds); the argument is spent."""
    quantized = prepare(network.eval()).model
    for layer in quantized.modules():
        if isinstance(layer, QuantLayer):
            rows = len(layer.weight)
            quantizer = layer.weight_quantizer
            quantizer.bit_depth.data = torch.tensor(widths, dtype=torch.float32).repeat(-(-rows // len(widths)))[:rows]
            quantizer.fit(layer.rows().detach())
    packed = pack(quantized)
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLayer):
            weight = network.get_parameter(f"{name}.weight")
            weight.data = layer.weight_rows().view(weight.shape)
    return packed, network.requires_grad_(False)


def convolution(widths: tuple[int, ...], channels: int, kernel: int, groups: int) -> tuple[nn.Module, nn.Conv2d]:
    """A convolution that keeps the image size, packed and float."""
    torch.manual_seed(0)
    return compressed(nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=groups), widths)


def _resnet(size: int, **options: int) -> tuple[nn.Module, Tensor]:
    network = ResNet20(**options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    network.train()(torch.randn(32, 3, size, size))  # activations of a trained network's size
    return network, torch.randn(1, 3, size, size)


def _language_model(tokens: int, width: int, layers: int, context: int = 128) -> tuple[nn.Module, Tensor]:
    network = CharLM(256, context=context, width=width, layers=layers)
    return network, torch.randint(256, (1, tokens))


Build = Callable[[], tuple[nn.Module, Tensor]]  # float network and its input

NETWORKS: dict[str, Build] = {
    "ResNet-20, 1 image": lambda: _resnet(32),
    "transformer 4x256, 1 token": lambda: _language_model(1, 256, 4),
    "transformer 4x256, 128 tokens": lambda: _language_model(128, 256, 4),
}
SMALL: dict[str, Build] = {
    "ResNet-8, 1 image": lambda: _resnet(8, width=4, blocks=1),
    "transformer 1x32, 3 tokens": lambda: _language_model(3, 32, 1, 8),
}


def exact_result(network: nn.Module, x: Tensor) -> Tensor:
    """The float network's result in float64."""
    with torch.no_grad():
        return copy.deepcopy(network).double()(x.double() if x.is_floating_point() else x)


def with_numerics(packed: nn.Module, numerics: str) -> nn.Module:
    """A copy of the packed network in these numerics."""
    return set_numerics(copy.deepcopy(packed), numerics)


def calling(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call of the network on x."""
    return lambda: network(x)
