"""The networks of the demos, in plain torch: nothing here knows of compression, and torch.fx can trace all of it.

DigitsCNN   (N, 1, 8, 8)    float32 -> (N, 10)               residual, depthwise, batch norm
CharLM      (N, T)          int64   -> (N, T, vocabulary)    embeddings, attention, feed-forward
MnistCNN    (N, 1, 28, 28)  float32 -> (N, 10)               the CNN of SGSC, arXiv 2505.00350
NamesLM     (N, T)          int64   -> (N, T, 27)            the language model of the same paper
ResNet9     (N, 3, 32, 32)  float32 -> (N, 10)               the network of self-compression, arXiv 2301.13142
ResNet20    (N, 3, 32, 32)  float32 -> (N, 10)               arXiv 1512.03385, section 4.2, option A
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the image size, then batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class DigitsCNN(nn.Module):
    """For scikit-learn's digits: (N, 1, 8, 8) float32 in 0..1 -> (N, 10) logits; 196,074 parameters.

    The residual adds two convolution paths, so a channel of the sum goes only when both have lost it; the depthwise
    convolution after it ties each of its channels to one input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(1, 32, 3)
        self.first = _conv(32, 128, 3)
        self.second = _conv(128, 128, 3)
        self.shortcut = _conv(32, 128, 1)
        self.depthwise = _conv(128, 128, 3, groups=128)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(128 * 2 * 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> (N, 10)."""
        x = self.pool(F.relu(self.stem(x)))  # (N, 32, 4, 4)
        x = F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))  # (N, 128, 4, 4)
        x = self.pool(F.relu(self.depthwise(x)))  # (N, 128, 2, 2)
        return self.head(x.flatten(1))


class Attention(nn.Module):
    """Causal self-attention out of four Linears: (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width); a position sees itself and those before it."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, width / heads)
            for linear in (self.q, self.k, self.v)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One pre-norm layer of a transformer, feed-forward 4 x width with ReLU: (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.down(F.relu(self.up(self.feed_norm(x)))))


class CharLM(nn.Module):
    """A language model of characters: (N, T) int64, T at most `context` -> (N, T, vocabulary) logits.

    Raises:
        ValueError: If `width` is not a multiple of `heads`.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 64,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} does not divide into heads={heads}; choose a multiple of the heads")
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.token, self.position):  # torch's N(0, 1) would drown what the blocks add
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) int64 -> (N, T, vocabulary)."""
        place = torch.ones_like(tokens[:1]).cumsum(1) - 1  # (1, T); torch.arange(T) would stop a symbolic trace
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(place))))


class MnistCNN(nn.Module):
    """The CNN of SGSC's repository: (N, 1, 28, 28) float32 in 0..1 -> (N, 10); 81,696 convolution weights.

    No padding, no convolution bias, batch norm without scale and shift; the Linear (5,770 parameters) stays float
    in the published form.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 5, bias=False)
        self.conv2 = nn.Conv2d(32, 32, 5, bias=False)
        self.norm1 = nn.BatchNorm2d(32, affine=False)
        self.conv3 = nn.Conv2d(32, 64, 3, bias=False)
        self.conv4 = nn.Conv2d(64, 64, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(64, affine=False)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(576, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 28, 28) -> (N, 10)."""
        x = self.pool(self.norm1(F.relu(self.conv2(F.relu(self.conv1(x))))))  # (N, 32, 10, 10)
        x = self.pool(self.norm2(F.relu(self.conv4(F.relu(self.conv3(x))))))  # (N, 64, 3, 3)
        return self.head(x.flatten(1))


class NamesLM(CharLM):
    """The language model of SGSC's repository: (N, T) int64, T at most 32 -> (N, T, 27).

    198,336 weights are quantized: those of every Linear, 4 layers * 12 * 64 * 64 and the head's 27 * 64. Biases,
    norms and both embeddings stay float. Dropout is ours: there are fewer characters of training than weights.
    """

    def __init__(self) -> None:
        super().__init__(vocabulary=27, context=32, width=64, layers=4, heads=4, dropout=0.1)


class ConvNorm(nn.Module):
    """3x3 convolution without bias, batch norm and, unless `act` is False, ReLU: (N, I, H, W) -> (N, C, H', W')."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, C, H / stride, W / stride)."""
        x = self.norm(self.conv(x))
        return F.relu(x) if self.act else x


class ResNet9(nn.Module):
    """64-128-[128-128]-256-512-[512-512]-10: (N, 3, 32, 32) float32 -> (N, 10); 6,573,130 parameters.

    The network that arXiv 2301.13142 compresses; brackets are residual pairs of convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 64)
        self.second = ConvNorm(64, 128)
        self.pair128 = nn.Sequential(ConvNorm(128, 128), ConvNorm(128, 128))
        self.third = ConvNorm(128, 256)
        self.fourth = ConvNorm(256, 512)
        self.pair512 = nn.Sequential(ConvNorm(512, 512), ConvNorm(512, 512))
        self.pool, self.last_pool = nn.MaxPool2d(2), nn.MaxPool2d(4)
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, 10)."""
        x = self.pool(self.second(self.stem(x)))  # (N, 128, 16, 16)
        x = self.pool(self.third(x + self.pair128(x)))  # (N, 256, 8, 8)
        x = self.pool(self.fourth(x))  # (N, 512, 4, 4)
        x = x + self.pair512(x)
        return self.head(self.last_pool(x).flatten(1))


class Plain(nn.Module):
    """A residual block whose shortcut is the identity: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, channels)
        self.second = ConvNorm(channels, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)."""
        return F.relu(x + self.second(self.first(x)))


class Widening(nn.Module):
    """A residual block with the shortcut of option A, every other pixel and new channels of zeros: C -> 2 C channels.

    The channels that the shortcut reaches come first and have a convolution of their own, for a padded shortcut would
    hold all channels in place: here the reached ones go with those of the block before, and the others by themselves.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvNorm(channels, 2 * channels, stride=2)
        self.reached = ConvNorm(2 * channels, channels, act=False)
        self.others = ConvNorm(2 * channels, channels, act=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 2 C, H / 2, W / 2)."""
        y = self.first(x)
        shortcut = F.avg_pool2d(x, 1, 2)  # every other pixel, as it is
        return F.relu(torch.cat([shortcut + self.reached(y), self.others(y)], 1))


class ResNet20(nn.Module):
    """ResNet-20 with shortcuts of option A: (N, 3, 32, 32) float32 -> (N, 10); 269,722 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 16)
        self.blocks = nn.Sequential(
            *(Plain(16), Plain(16), Plain(16)),
            *(Widening(16), Plain(32), Plain(32)),
            *(Widening(32), Plain(64), Plain(64)),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> (N, 10)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsCNN,
    "char-lm": CharLM,
    "mnist-cnn": MnistCNN,
    "names-lm": NamesLM,
    "resnet9": ResNet9,
    "resnet20": ResNet20,
}
