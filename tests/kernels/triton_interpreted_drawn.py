"""Checks of the Triton kernels over drawn shapes: nobody chose the edges. triton_interpreted.py runs them.

Draws are seeded and bounded in work, so that they take seconds in the interpreter; DRAWS=N draws N times as many. What
fails names its seed, and `linear(seed)` is the case once more.
"""

from __future__ import annotations

import os
import random
from unittest import mock

import torch

from sgsc.kernels import OPS, tile_rows
from sgsc.kernels import triton_fake_quantize as quantizers
from sgsc.kernels.fake_quantize import reference
from sgsc.kernels.packed_conv2d import output_size, tile_kernel
from sgsc.kernels.packed_linear import grid as grid_of
from sgsc.kernels.packing import case
from tests.checks import assert_agrees
from tests.kernels.triton_interpreted_packed import Ours, configured, with_settings

TIMES = int(os.environ.get("DRAWS", "1"))
LINEAR, CONV2D, ROWS = 96 * TIMES, 64 * TIMES, 40 * TIMES
ON_DEVICE = 5  # of each there, where every other variant takes the compiler ten seconds, as `configure` has them
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST = 1 << 22  # products of a draw, about


def widths(make: random.Random, rows: int) -> torch.Tensor:
    """(rows,) of 0 to 8 bits, in any order, of all or of few kinds."""
    kinds = make.sample(range(9), make.choice((1, 1, 2, 5, 9)))
    return torch.tensor([make.choice(kinds) for _ in range(rows)], dtype=torch.uint8)


def up_to(make: random.Random, most: int) -> int:
    """Small numbers as often as large ones, and often at or beside a power of two."""
    n = round(most ** make.random())
    return max(1, min(most, n if make.random() < 0.5 else (1 << n.bit_length() - 1) + make.choice((-1, 0, 1))))


def settings(make: random.Random, most: int = 32) -> tuple[dict, dict]:
    """Rows a tile, and a configuration that any product may run by."""
    chosen = {"order": make.choice(("wide", "narrow")), "parts": make.randint(1, 5), "blocks": make.choice((1, 2, 4))}
    if make.random() < 0.5:
        chosen["columns"] = make.choice([n for n in (8, 16, 32) if n <= most])
    return {"MANY": make.choice((10_000, 0)), "configure": configured(**chosen)}, chosen


def linear(seed: int):
    """Arguments of `packed_linear`, how it is to run, and both in words."""
    make = random.Random(seed)
    rows, tokens = up_to(make, 150), up_to(make, 40)
    width = up_to(make, min(1_500, MOST // (rows * tokens)))
    how, chosen = settings(make)
    dense = make.random() < 0.25
    int8 = dense and make.random() < 0.5  # of few tokens nothing is rounded
    with with_settings(MANY=how["MANY"]):
        packed = case(bits := widths(make, rows), width, seed)[1]
        scale, offset, bias = grid_of(bits, seed)
        tiles = tile_rows(packed, scale, offset + make.choice((0.0, 0.0, 0.5, 0.123)))
    dtype = make.choice(DTYPES)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = bias.to(dtype) if make.random() < 0.5 else None
    said = f"{rows} x {width}, {tokens} tokens, {dtype}, int8 {int8}, dense {dense}, {how['MANY']} many, {chosen}"
    return (x, *tiles[:3], bias, rows, width, int8), how | ({"DENSE": -1} if dense else {}), f"draw {seed}: {said}"


def conv2d(seed: int):
    """As `linear`, of `packed_conv2d`."""
    make = random.Random(seed)
    kernel, stride, padding, dilation = ([make.randint(low, 3) for _ in "hw"] for low in (1, 1, 0, 1))
    groups = make.choice((1, 1, 1, 2, 3, 7))
    inputs = groups * (1 if make.random() < 0.3 else make.choice((1, 2, 3, 5, 16, 17, 32)))
    rows = groups * up_to(make, max(1, 70 // groups))
    size = [
        make.randint(max(1, d * (k - 1) + 1 - 2 * p), 12) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    batch = make.randint(1, 3)
    how, chosen = settings(make, most=16)
    bits, dense = widths(make, rows), make.random() < 0.2
    with with_settings(MANY=how["MANY"]):
        packed = case(bits, inputs // groups * kernel[0] * kernel[1], seed)[1]
        scale, offset, bias = grid_of(bits, seed)
        offset = offset + make.choice((0.0, 0.0, 0.5, 0.123))
        tiles = tile_kernel(packed, scale, offset, inputs=inputs, kernel=kernel, groups=groups)
    dtype = make.choice(DTYPES)
    x = torch.randn(batch, inputs, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    last = make.random() < 0.5
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    bias = bias.to(dtype) if make.random() < 0.5 else None
    geometry = kernel, stride, padding, dilation, groups
    said = f"x {tuple(x.shape)} of {x.stride()}, {rows} rows, {geometry}, {dtype}, dense {dense}, {how['MANY']} many"
    arguments = (x, *tiles[:3], bias, rows, *geometry, False)
    return arguments, how | ({"DENSE_PIXELS": -1} if dense else {}), f"draw {seed}: {said}, {chosen}"


def quantized(seed: int):
    """Arguments of `fake_quantize_backward`, and which shape and dtype."""
    from tests.kernels.triton_interpreted import random_case

    make = random.Random(seed)
    channels = up_to(make, 300)
    width = up_to(make, min(40_000, 60_000 // channels))
    if make.random() < 0.2:  # long rows
        channels, width = make.randint(1, 3), make.randint(4_097, 20_000)
    dtype = make.choice(DTYPES)
    draw = torch.Generator().manual_seed(seed)
    arguments = random_case(channels, width, dtype, draw)
    said = f"draw {seed}: {channels} x {width} {dtype}"
    return (torch.randn(channels, width, generator=draw).to(dtype), *arguments), said


def check(count: int, draw, name: str, device: str) -> None:
    for seed in range(count if device == "cpu" else ON_DEVICE):
        arguments, how, said = draw(seed)
        if device != "cpu":
            del how["configure"]
        with with_settings(**how):
            assert_agrees(Ours(OPS[name], device), arguments, said)


def check_linear(device="cpu"):
    check(LINEAR, linear, "packed_linear", device)


def check_conv2d(device="cpu"):
    check(CONV2D, conv2d, "packed_conv2d", device)


def check_fake_quantize(device="cpu"):
    """By itself and among others; long rows are cut into parts for fewer columns than on a GPU, so that some are."""
    from tests.kernels.triton_interpreted import assert_same, assert_same_gradients

    every = [quantized(seed) for seed in range(ROWS if device == "cpu" else 2 * ON_DEVICE)]
    with mock.patch.object(quantizers, "_LONG", 4_096):
        cut = sum(quantizers.plan(*arguments[0].shape).parts > 1 for arguments, _ in every)
        assert cut >= 1, f"{cut} draws are cut into parts"
        for (_, *there), said in every:
            assert_same(quantizers.forward(*(t.to(device) for t in there)).cpu(), reference(*there), said)
        for arguments, said in every:
            found = quantizers.backward(*(t.to(device) for t in arguments))
            assert_same_gradients([t.cpu() for t in found], arguments, said)
        together = [arguments for arguments, _ in every if len(arguments[0]) < 60]
        lists = [[t.to(device) for t in kind] for kind in zip(*together, strict=True)]
        made, gradients = quantizers.forward_many(*lists[1:]), quantizers.backward_many(*lists)
    for i, arguments in enumerate(together):
        assert_same(made[i].cpu(), reference(*arguments[1:]), f"layer {i}")
        assert_same_gradients([t.cpu() for t in gradients[i :: len(together)]], arguments, f"layer {i}")


def check_that_draws_cover():
    """Every width, dtype, layout and route is among them; else a seed or a limit was changed for the worse."""
    drawn = [linear(seed) for seed in range(LINEAR)]
    assert {a[0].dtype for a, *_ in drawn} == set(DTYPES)
    assert {bool(how.get("DENSE")) for _, how, _ in drawn} == {a[7] for a, *_ in drawn} == {True, False}
    seen = set()
    for (_, _, plan, grid, *_), how, _ in drawn:
        tiles = len(plan) - grid.shape[1] >> 1
        seen |= {(bool(how["MANY"]), bits) for bits in plan[:tiles].tolist()}
    assert seen == {(many, bits) for many in (True, False) for bits in range(9)}
    drawn = [conv2d(seed) for seed in range(CONV2D)]
    shapes = [(a[0], a[10]) for a, *_ in drawn]
    assert {groups > 1 and x.shape[1] // groups < 4 for x, groups in shapes} == {True, False}
    assert {x.stride(1) == 1 and x.shape[1] % 16 == 0 for x, groups in shapes if groups == 1} == {True, False}
    for (x, *_, kernel, stride, padding, dilation, _, _), *_ in drawn:
        assert all(output_size(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) > 0 for i in (0, 1))


CHECKS = {
    "packed-drawn-linear": check_linear,
    "packed-drawn-conv2d": check_conv2d,
    "drawn-fake-quantize": check_fake_quantize,
    "drawn-cover": check_that_draws_cover,
}
