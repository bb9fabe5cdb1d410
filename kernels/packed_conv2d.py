"""2-D convolution from tiles of packed rows; one row an output channel, the width differs from row to row.

    x       (B, I, H, W)  float32, bfloat16 or float16; zero padding
    lines, plan, grid    as in tiling.py: C rows of K = I / groups * kernel height * width levels,
            an area of height * width, tiles within groups; but where 1 to 3 channels make a group (depthwise), tiles
            as of a matrix: an area of 1, one group
    bias    (C,)  dtype of x, or None                 y   (B, C, H', W')  dtype of x
    input_grid  (3 + C,) float32 as in input_grid.py, or None

The numerics are those of packed_linear.py; int8 has one step an image, and depthwise layers, where it could gain
nothing, stay exact. With an input_grid padding is the code 0, and an image that holds NaN gives NaN. Sums are over the
K products of one output, in any order.
Floor: tiles plus x plus y once, 2 * B * H' * W' * C * K operations; no im2col matrix in memory.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .input_grid import WIDEST_STATIC, check_grid, codes_on, on_grid, with_sums
from .op import Op
from .packed_linear import FORMS, FOUR_BITS, SIGNED, SKEW, UNSIGNED, WIDEST, grid, quantize_tokens, static_grid
from .packing import PackedRows, case
from .run_form import TiledRows, tile_rows, tiled_weight
from .tiling import row_bits

Pair = list[int]


def slides(inputs: int, groups: int) -> bool:
    """Whether so few channels make a group that rows slide over their channels instead of being multiplied."""
    return groups > 1 and inputs // groups < 4


def tile_kernel(
    rows: PackedRows, scale: Tensor, offset: Tensor, *, inputs: int, kernel: Pair, groups: int
) -> TiledRows:
    """`tile_rows` for a convolution of `inputs` channels.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if slides(inputs, groups):
        return tile_rows(rows, scale, offset)
    return tile_rows(rows, scale, offset, area=prod(kernel), groups=groups)


def reference(
    x: Tensor,
    lines: Tensor,
    plan: Tensor,
    grid: Tensor,
    bias: Tensor | None,
    rows: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    int8: bool,
    input_grid: Tensor | None = None,
) -> Tensor:
    """The meaning: dequantize, then torch's own convolution."""
    check(x, rows, kernel, stride, padding, dilation, groups)
    check_grid("packed_conv2d", input_grid, rows)
    inputs, taps = x.shape[1] // groups, kernel[0] * kernel[1]
    sliding = slides(x.shape[1], groups)
    tiles = (lines, plan, grid, rows, inputs * taps, 1 if sliding else taps)
    int8 = int8 and not sliding and inputs * taps <= (WIDEST if input_grid is None else WIDEST_STATIC)
    weight, live = tiled_weight(*tiles, torch.float64 if int8 else x.dtype)
    weight = weight.view(rows, inputs, *kernel)
    if int8:
        image = (1, 2, 3)
        codes, step = quantize_tokens(x, image) if input_grid is None else codes_on(x, input_grid, image)
        y = F.conv2d(codes.double(), weight, None, stride, padding, dilation, groups) * step
        y = y.to(x.dtype) if bias is None else y.to(x.dtype) + bias[:, None, None]
    else:
        x = x if input_grid is None else on_grid(x, input_grid)
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    alone = torch.zeros_like(y) if bias is None else bias.to(y.dtype)[:, None, None]
    return torch.where(live[:, None, None], y, alone)  # also where x is not finite


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output positions along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def check(x: Tensor, rows: int, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> None:
    """What the C++ checks too, beside sizes that would overflow it.

    Raises:
        ValueError: If x is not (B, I, H, W), `groups` does not divide, a pair holds no sizes, or the kernel is larger
            than the padded input.
    """
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups or rows % groups:
        raise ValueError(
            f"packed_conv2d: x {tuple(x.shape)}, {rows} outputs, {groups} groups; "
            "want x (batch, channels, height, width), with groups dividing both numbers of channels"
        )
    pairs = {"kernel": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
    for name, (pair, least) in pairs.items():
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"packed_conv2d: {name} {pair}; want two numbers of at least {least}")
    for axis in (0, 1):
        if output_size(x.shape[2 + axis], kernel[axis], stride[axis], padding[axis], dilation[axis]) < 1:
            raise ValueError(
                f"packed_conv2d: kernel {kernel} with dilation {dilation} is larger than the input "
                f"{tuple(x.shape[2:])} with padding {padding}"
            )


def _fake(x, lines, plan, grid, bias, rows, kernel, stride, padding, dilation, groups, int8, input_grid=None):
    check(x, rows, kernel, stride, padding, dilation, groups)
    check_grid("packed_conv2d", input_grid, rows)
    height, width = (output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1))
    return x.new_empty(x.shape[0], rows, height, width)


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
    shift: float = 0.0,
    int8: bool = False,
    codes: tuple[int, int] | None = None,
) -> tuple:
    bits = (torch.arange(channels) * 5 % 9).to(torch.uint8)
    packed = case(bits, inputs // groups * kernel[0] * kernel[1])[1]
    scale, offset, bias = grid(bits)
    tiles = tile_kernel(packed, scale, offset + shift, inputs=inputs, kernel=list(kernel), groups=groups)
    x = torch.randn(batch, inputs, *size, generator=torch.Generator().manual_seed(channels)).to(dtype)
    bias = bias.to(dtype) if with_bias else None
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    static = with_sums(static_grid(codes), packed) if codes else None
    return x, *tiles[:3], bias, tiles.rows, *geometry, int8, static


def cases() -> dict[str, tuple]:
    """Geometries, named after the edge each presses on, in both numerics and on grids of x."""
    found = {}
    for form, (int8, codes) in FORMS.items():

        def of(int8: bool = int8, codes: tuple[int, int] | None = codes, **options) -> tuple:
            return _case(int8=int8, codes=codes, **options)

        wide, odd = of(size=(12, 11)), of()
        odd[0][0, 0, 3, 3], odd[0][1, 1, 0, 0] = float("nan"), float("inf")
        apart, alone = of(channels=9, inputs=12, groups=3, size=(4, 5)), of(channels=9, inputs=9, groups=9)
        for x in (apart[0], alone[0]):  # of one group, and no other's business
            x[0, 5, 3, 3], x[1, 0, 0, 0] = float("nan"), float("inf")  # the second where a row is removed
        one = {
            "three-by-three": of(),
            "one-by-one": of(kernel=(1, 1), padding=(0, 0)),
            "one-output-pixel": of(size=(3, 3), padding=(0, 0)),
            "one-input-pixel": of(size=(1, 1)),
            "many-pixels": of(size=(33, 31), batch=1),
            "rows-of-sixteen-pixels": of(size=(5, 16)),
            "rows-of-eight-pixels": of(size=(8, 8), inputs=5),
            "stride": of(stride=(2, 3)),
            "stride-of-two": of(size=(32, 32), stride=(2, 2), batch=1),
            "dilation": of(dilation=(2, 1), padding=(2, 1)),
            "uneven-kernel": of(kernel=(1, 5), padding=(0, 2)),
            "padding-wider-than-kernel": of(kernel=(1, 1), padding=(2, 3)),
            "groups": of(channels=12, inputs=12, groups=3),
            "groups-of-a-tile-and-one": of(channels=34, inputs=10, groups=2),
            "depthwise": of(channels=9, inputs=9, groups=9),
            "depthwise-stride": of(channels=9, inputs=9, groups=9, stride=(2, 2), size=(20, 37)),
            "depthwise-multiplier": of(channels=18, inputs=9, groups=9),
            "depthwise-wide": of(
                channels=40, inputs=20, groups=20, size=(4, 5), kernel=(5, 7), padding=(2, 6), dilation=(1, 2)
            ),
            "depthwise-deep": of(channels=3, inputs=3, groups=3, size=(12, 12), kernel=(10, 10)),
            "three-channels-a-group": of(channels=4, inputs=6, groups=2),
            "one-row-a-group": of(channels=3, inputs=12, size=(4, 5), groups=3, kernel=(1, 1), padding=(0, 0)),
            "groups-with-an-offset": of(channels=6, inputs=8, size=(4, 5), groups=2, shift=0.5),
            "depthwise-with-an-offset": of(channels=9, inputs=9, groups=9, shift=0.5),
            "sixteen-channels-a-group": of(channels=40, inputs=32, groups=2, size=(3, 4)),
            "more-rows-than-a-group-of-tiles": of(channels=150, inputs=16),
            "deeper-than-a-panel": of(channels=20, inputs=130, size=(6, 5)),
            "empty-batch": of(batch=0),
            "no-bias": of(with_bias=False),
            "bfloat16": of(dtype=torch.bfloat16),
            "float16": of(dtype=torch.float16),
            "nan-and-infinity": odd,
            "groups-nan-and-infinity": apart,
            "depthwise-nan-and-infinity": alone,
            "channels-last": (wide[0].to(memory_format=torch.channels_last), *wide[1:]),
        }
        found |= {f"{form}-{name}": arguments for name, arguments in one.items()}
    for name, codes in {"unsigned": UNSIGNED, "signed": SIGNED, "four-bits": FOUR_BITS}.items():
        found[f"static-{name}"] = _case(int8=True, codes=codes, inputs=6, groups=1)
    found["static-too-deep"] = _case(int8=True, codes=SKEW, inputs=1821, size=(2, 2), batch=1)
    found["static-exact"] = _case(codes=UNSIGNED)
    return found


def bench_cases() -> dict[str, tuple]:
    """Layers of a small ResNet and of a MobileNet, one image and a batch, in both numerics and on a grid."""
    layers = {
        "16x16x3x3-32px": {"channels": 16, "inputs": 16, "size": (32, 32)},
        "64x64x3x3-32px": {"channels": 64, "inputs": 64, "size": (32, 32)},
        "64x64x3x3-8px": {"channels": 64, "inputs": 64, "size": (8, 8)},
        "256x256x1x1-16px": {"channels": 256, "inputs": 256, "size": (16, 16), "kernel": (1, 1), "padding": (0, 0)},
        "64x64x3x3-32px-stride": {"channels": 64, "inputs": 64, "size": (32, 32), "stride": (2, 2)},
        "depthwise-64-32px": {"channels": 64, "inputs": 64, "size": (32, 32), "groups": 64},
    }
    return {
        f"{name}-B{batch}-{form}": _case(**layer, batch=batch, int8=int8, codes=codes and UNSIGNED)
        for name, layer in layers.items()
        for batch in (1, 32)
        for form, (int8, codes) in FORMS.items()
    }


OP = Op(
    name="packed_conv2d",
    schema="(Tensor x, Tensor lines, Tensor plan, Tensor grid, Tensor? bias,"
    " int rows, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, int groups, bool int8,"
    " Tensor? input_grid=None) -> Tensor",
    reference=reference,
    fake=_fake,
    cases=cases,
    bench_cases=bench_cases,
    traffic=lambda *a: a[1].numel() + a[0].element_size() * (a[0].numel() + _fake(*a).numel()),
    operations=lambda *a: (
        2
        * (_fake(*a).numel() // max(a[5], 1))
        * int((row_bits(a[2]) > 0).sum())
        * (a[0].shape[1] // a[10] * a[6][0] * a[6][1])
    ),
)


def packed_conv2d(
    x: Tensor,
    tiles: TiledRows,
    bias: Tensor | None,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    int8: bool = False,
    input_grid: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.conv2d` with packed weights, as `tile_kernel` made them; the rest as in `packed_linear`.

    Raises:
        ValueError: If x is not (B, I, H, W), `groups` does not divide, the kernel is larger than the padded input, or
            `input_grid` is none.
    """
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)  # as under autocast
    weights = (tiles.lines, tiles.plan, tiles.grid, bias, tiles.rows)
    return OP(x, *weights, kernel, stride, padding, dilation, groups, int8, input_grid)
