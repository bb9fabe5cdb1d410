"""2-D convolution from packed rows; one row an output channel, the width differs from row to row.

    x       (B, I, H, W)  float32, bfloat16 or float16; zero padding
    data, bits, starts    as in packing.py: C rows of K = I / groups * kernel height * kernel width levels
    scale, offset, bias   (C,) as in packed_linear.py
    y       (B, C, H', W')  dtype of x

Sums are float32 over the K products of one output, in any order: the bound of packed_linear.py.
Floor: packed bytes plus x plus y once, 2 * B * H' * W' * C * K operations; no im2col matrix in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .op import Op
from .packed_linear import grid
from .packing import case, dequantize

Pair = list[int]


def reference(
    x: Tensor,
    data: Tensor,
    bits: Tensor,
    starts: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """The meaning: dequantize, then torch's own convolution."""
    inputs = x.shape[1] // groups
    rows = dequantize(data, bits, starts, scale, offset, inputs * kernel[0] * kernel[1], x.dtype)
    y = F.conv2d(x, rows.view(-1, inputs, *kernel), bias, stride, padding, dilation, groups)
    alone = torch.zeros_like(y) if bias is None else bias.to(y.dtype)[:, None, None]
    return torch.where((bits > 0)[:, None, None], y, alone)  # also where x is not finite


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output positions along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _fake(x, data, bits, starts, scale, offset, bias, kernel, stride, padding, dilation, groups):
    height, width = (output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return x.new_empty(x.shape[0], bits.shape[0], height, width)


def _case(
    channels: int = 9,
    inputs: int = 4,
    size: tuple[int, int] = (7, 9),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    with_bias: bool = True,
) -> tuple:
    bits = (torch.arange(channels) % 9).to(torch.uint8)
    packed = case(bits, inputs // groups * kernel[0] * kernel[1])[1]
    scale, offset, bias = grid(bits)
    x = torch.randn(batch, inputs, *size, generator=torch.Generator().manual_seed(channels)).to(dtype)
    bias = bias.to(dtype) if with_bias else None
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    return x, *packed.args[:3], scale, offset, bias, *geometry


def cases() -> dict[str, tuple]:
    """Geometries, named after the edge each presses on."""
    wide, odd = _case(size=(12, 11)), _case()
    odd[0][0, 0, 3, 3], odd[0][1, 1, 0, 0] = float("nan"), float("inf")
    return {
        "three-by-three": _case(),
        "one-by-one": _case(kernel=(1, 1), padding=(0, 0)),
        "one-output-pixel": _case(size=(3, 3), padding=(0, 0)),
        "one-input-pixel": _case(size=(1, 1)),
        "many-pixels": _case(size=(33, 31), batch=1),
        "stride": _case(stride=(2, 3)),
        "dilation": _case(dilation=(2, 1), padding=(2, 1)),
        "uneven-kernel": _case(kernel=(1, 5), padding=(0, 2)),
        "padding-wider-than-kernel": _case(kernel=(1, 1), padding=(2, 3)),
        "groups": _case(channels=12, inputs=6, groups=3),
        "depthwise": _case(channels=9, inputs=9, groups=9),
        "depthwise-multiplier": _case(channels=18, inputs=9, groups=9),
        "more-rows-than-a-panel": _case(channels=130, inputs=16),
        "empty-batch": _case(batch=0),
        "no-bias": _case(with_bias=False),
        "bfloat16": _case(dtype=torch.bfloat16),
        "float16": _case(dtype=torch.float16),
        "nan-and-infinity": odd,
        "channels-last": (wide[0].to(memory_format=torch.channels_last), *wide[1:]),
    }


def bench_cases() -> dict[str, tuple]:
    """Layers of a small ResNet, batch 8."""
    return {
        f"{c}x{c}x3x3-{s}px": _case(channels=c, inputs=c, size=(s, s), batch=8)
        for c, s in ((16, 32), (64, 8), (128, 16))
    }


OP = Op(
    name="packed_conv2d",
    schema="(Tensor x, Tensor data, Tensor bits, Tensor starts, Tensor scale, Tensor offset, Tensor? bias,"
    " int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int groups) -> Tensor",
    reference=reference,
    fake=_fake,
    cases=cases,
    bench_cases=bench_cases,
    traffic=lambda *a: a[1].numel() + a[0].element_size() * (a[0].numel() + _fake(*a).numel()),
    operations=lambda *a: (
        2
        * _fake(*a).numel()
        // max(a[2].numel(), 1)
        * int((a[2] > 0).sum())
        * (a[0].shape[1] // a[11] * a[7][0] * a[7][1])
    ),
)


def packed_conv2d(
    x: Tensor,
    data: Tensor,
    bits: Tensor,
    starts: Tensor,
    scale: Tensor,
    offset: Tensor,
    bias: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """`torch.nn.functional.conv2d` with packed weights.

    Raises:
        ValueError: If x is not (B, I, H, W), `groups` does not divide, or the kernel is larger than the padded input.
    """
    if x.dim() != 4 or x.shape[1] % groups or bits.shape[0] % groups:
        raise ValueError(
            f"packed_conv2d: x {tuple(x.shape)}, {bits.shape[0]} outputs, {groups} groups; "
            "want x (batch, channels, height, width), with groups dividing both numbers of channels"
        )
    for axis in (0, 1):
        if output_size(x.shape[2 + axis], kernel[axis], stride[axis], padding[axis], dilation[axis]) < 1:
            raise ValueError(
                f"packed_conv2d: kernel {kernel} with dilation {dilation} is larger than the input "
                f"{tuple(x.shape[2:])} with padding {padding}"
            )
    bias = None if bias is None else bias.to(x.dtype)  # as under autocast
    return OP(x, data, bits, starts, scale, offset, bias, kernel, stride, padding, dilation, groups)
