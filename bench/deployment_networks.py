"""Networks and layers of bench.deployment: random weights at mixed widths, and the float forms of the same values."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.demos.models import CharLM
from sgsc.layers import QuantLayer
from sgsc.packed import PackedLayer, pack, set_numerics
from sgsc.preparation import prepare

MIXED = (2, 3, 3, 4, 4, 5, 5, 6)  # widths of a mixed layer's rows, in turn: 4 bits in the mean
EIGHT = (8,)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, with 1x1 convolutions as shortcuts: (B, 3, H, W) -> (B, 10)."""

    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        layers, inputs = [], width
        for stage in range(3):
            for block in range(blocks):
                outputs = width << stage
                layers.append(_Residual(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
        self.blocks, self.head = nn.Sequential(*layers), nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 10)."""
        return self.head(self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3)))


def compressed(network: nn.Module, widths: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
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
            weight = network.get_submodule(name).weight
            weight.data = layer.weight_rows().view(weight.shape)
    return packed, network.requires_grad_(False)


def convolution(widths: tuple[int, ...], channels: int, kernel: int, groups: int) -> tuple[nn.Module, nn.Module]:
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
