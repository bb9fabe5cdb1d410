"""`packed_conv2d` on a GPU: 3x3 layers in float16, x in either layout, against cuDNN in either layout.

Those of a ResNet, of which claims are made; one of a ResNeXt (groups) and one of a MobileNet (depthwise).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from sgsc.kernels import OPS, packed_conv2d
from sgsc.kernels.packed_conv2d import slides
from sgsc.kernels.run_form import TiledRows, tiled_weight
from tests.checks import in_double

from .gpu_device import Device, Run, judge, part_of_row, race, size_of
from .gpu_linear import copies_of, random_tiles, widths_of
from .peer_problem import MIXED
from .record import claim

LAYERS = {64: 56, 128: 28, 256: 14, 512: 7}  # pixels a side by channels, in and out
GROUPED = [(512, 14, 32), (512, 14, 512)]  # channels, pixels a side, groups
AHEAD = {1: 1.0, 32: 0.9}  # of cuDNN's speed, at least, by batch
BITS = (4, MIXED)
VARIANTS = [(*layer, batch) for layer in [*((*one, 1) for one in LAYERS.items()), *GROUPED] for batch in AHEAD]
LAST = "ours channels_last"
LAYOUTS = {"cuDNN contiguous": torch.contiguous_format, "cuDNN channels_last": torch.channels_last}
ROUNDING = 0.02  # of the RMS: the largest error that float16 may bring cuDNN, whose sums may be Winograd's
GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1])  # kernel, stride, padding, dilation


def geometry_of(size: int, stride: int) -> tuple[list[int], ...]:
    """As GEOMETRY, of a square kernel that keeps the size where the stride is one."""
    return [size, size], [stride, stride], [size // 2, size // 2], [1, 1]


@torch.no_grad()
def measure(run: Run) -> None:
    """Write the section as it grows."""
    layers = [(16, 5, 1), (8, 3, 2), (8, 3, 8)] if run.quick else [*((*one, 1) for one in LAYERS.items()), *GROUPED]
    batches = (1, 2) if run.quick else tuple(AHEAD)
    rows: list[dict[str, Any]] = []
    order = [(batch, layer) for batch in batches for layer in layers]
    for batch, (channels, side, groups) in sorted(order, key=lambda one: one[1][2] > 1):  # what is claimed comes first
        if run.left() < 0:
            print(f"conv2d: no time left for batch {batch}, {channels} channels, {groups} groups", file=sys.stderr)
            continue
        rows += [row for bits in BITS for row in measure_layer(run, channels, side, batch, bits, groups)]
        run.put(rows, claims(rows, len(LAYERS)))


def tiles_of(channels: int, groups: int, bits: int | str, device: Device, taps: int = 9) -> TiledRows:
    """A layer of random words, as `tile_kernel` lays it out."""
    if slides(channels, groups):
        return random_tiles(widths_of(channels, bits), taps * channels // groups, 1, device)
    return random_tiles(widths_of(channels, bits), taps * channels // groups, taps, device, groups)


def measure_layer(
    run: Run, channels: int, side: int, batch: int, bits: int | str, groups: int = 1, size: int = 3, stride: int = 1
) -> list[dict[str, Any]]:
    """A row; none where a result of ours is wrong."""
    taps = size * size
    make = torch.Generator(run.device.type).manual_seed(channels + batch)
    x = torch.randn(batch, channels, side, side, generator=make, device=run.device.type).half()
    tiles, inputs = tiles_of(channels, groups, bits, run.device, taps), channels // groups
    geometry = (*geometry_of(size, stride), groups)
    kind = "" if groups == 1 else ", depthwise" if groups == channels else f", {groups} groups"
    kind += "" if stride == 1 else f", stride {stride}"
    wide = bits if bits == MIXED else f"{bits} bits"
    case = f"{size}x{size}, {channels} channels{kind}, {side} px, {wide}, batch {batch}"
    op, arguments = OPS["packed_conv2d"], (x, *tiles[:3], None, channels, *geometry, False)
    plain, exact = op.reference(*arguments), op.reference(*in_double(arguments))
    contenders, error = {}, 0.0
    for name, some in {"ours": x, LAST: x.contiguous(memory_format=torch.channels_last)}.items():
        off, wrong = judge(packed_conv2d(some, tiles, None, *geometry), plain, exact)
        if wrong:
            run.wrong.append(f"conv2d {case}, {name}: {wrong}")
            return []
        error = max(error, off)
        copies = copies_of(tiles, run.device)
        contenders[name] = [functools.partial(packed_conv2d, some, t, None, *geometry) for t in copies]
    weight = tiled_weight(*tiles, taps * inputs, 1 if slides(channels, groups) else taps, x.dtype)[0]
    weight = weight.view(channels, inputs, size, size)
    missing = {}
    for name, layout in LAYOUTS.items():
        there = x.contiguous(memory_format=layout)
        copies = [weight.clone(memory_format=layout) for _ in range(run.device.copies(size_of(weight)))]
        calls = [functools.partial(F.conv2d, there, w, None, *geometry[1:]) for w in copies]
        if judge(calls[0](), plain, exact)[0] <= ROUNDING:
            contenders[name] = calls
        else:
            missing[name] = "the result differs from float64"
    times, failed = race(run, contenders)
    ours, last = times.pop("ours"), times.pop(LAST)
    moved = size_of(*tiles[:3], x) + x.element_size() * exact.numel()
    row = {
        "op": "packed_conv2d",
        "case": case,
        "channels": channels,
        "batch": batch,
        "bits": bits,
        "error": error,
        "kernel": size,
        "stride": stride,
    }
    row |= part_of_row(run, ours, moved, times, missing | failed) | {"groups": groups}
    row |= {"channels_last_microseconds": last.median, "channels_last_eager_microseconds": last.eager}
    row["teraflops"] = 2 * exact.numel() * taps * inputs / ours.median / 1e6
    shown = ", ".join(f"{name} {t.median / ours.median:.2f}x" for name, t in {LAST: last, **times}.items())
    print(f"{case}: {ours.median:,.1f} µs ({ours.eager:,.1f} eager); {shown}", file=sys.stderr)
    return [row]


def compile_one(device: Device, index: int) -> None:
    """As in gpu_linear.py."""
    channels, side, groups, batch = VARIANTS[index]
    x = torch.ones(batch, channels, side, side, dtype=torch.float16, device=device.type)
    for some in (x, x.contiguous(memory_format=torch.channels_last)):
        packed_conv2d(some, tiles_of(channels, groups, 4, device), None, *GEOMETRY, groups)


def claims(rows: Sequence[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Against the better of cuDNN's layouts, the worst of `layers` layers of one group in both kinds of width."""
    found = []
    for batch, least in AHEAD.items():
        text = f"packed_conv2d, 3x3 in float16, batch {batch}, against cuDNN"
        ratios = {
            row["case"]: min(r for r in row["ratio"].values() if r is not None)
            for row in rows
            if row["batch"] == batch and row["groups"] == 1 and any(r is not None for r in row["ratio"].values())
        }
        measured = None
        if len(ratios) == layers * len(BITS):
            worst, measured = min(ratios.items(), key=lambda item: item[1])
            text += f"; worst: {worst}"
        found.append(claim(text, least, measured, "times as fast", at_least=least))
    return found
