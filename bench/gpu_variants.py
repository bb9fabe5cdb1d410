"""What gpu_linear.py and gpu_conv2d.py leave out: int8 activations, other dtypes, convolutions that are not 3x3 by one.

int8       packed_linear with activations rounded to 8 bits a token, where many tokens bring it to the integer tensor
           cores; beside our own exact numerics, torch's product of int8 matrices alone, and F.linear in bfloat16
float16, float32    packed_linear, beside F.linear in that dtype (float32 without TF32: ours is exact)
1x1, stride         packed_conv2d, beside cuDNN in both layouts
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgsc.kernels import OPS, packed_linear
from sgsc.kernels.run_form import tiled_weight
from tests.checks import in_double

from . import gpu_conv2d
from .gpu_choices import forced
from .gpu_device import Run, judge, part_of_row, race, reason, size_of
from .gpu_linear import FEW_WIDTHS, JUDGED, SHAPES, copies_of, random_tiles, say, widths_of
from .peer_problem import MIXED

EXACT = "ours, exact"
PRODUCT = "torch._int_mm alone"  # of codes and levels that are there already
TOKENS = {"int8": (256, 1024, 4096), "float16": (1, 16, 256, 1024), "float32": (1, 16, 256, 1024)}
PLACES = ("4096x4096", "8B gate_up")
# channels, pixels a side, size of the kernel, stride: of a ResNet-50
CONVOLUTIONS = [(256, 56, 1, 1), (1024, 14, 1, 1), (128, 56, 3, 2), (256, 28, 3, 2), (512, 28, 1, 2)]


@torch.no_grad()
def measure(run: Run) -> None:
    """Write the section as it grows."""
    shapes = {"32x256": (32, 256)} if run.quick else {name: SHAPES[name] for name in PLACES}
    rows: list[dict[str, Any]] = []
    cases: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []
    for kind, counts in TOKENS.items():
        for shape, (n, k) in shapes.items():
            for tokens in (9,) if run.quick else counts:
                one = functools.partial(measure_linear, run, shape, n, k, kind, tokens)
                one = forced(one, DENSE=4) if run.quick and kind == "int8" else one  # 257 tokens take minutes
                cases.append((f"{shape}, {kind}, {tokens} tokens", one))
    for batch in (1,) if run.quick else gpu_conv2d.AHEAD:
        for channels, side, size, stride in [(16, 5, 1, 1), (16, 5, 3, 2)] if run.quick else CONVOLUTIONS:
            for bits in gpu_conv2d.BITS[:1] if run.quick else gpu_conv2d.BITS:
                layer = functools.partial(gpu_conv2d.measure_layer, run, channels, side, batch, bits)
                one = functools.partial(layer, size=size, stride=stride)
                cases.append((f"{size}x{size} by {stride}, {channels} channels, batch {batch}", one))
    for name, one in cases:
        if run.left() < 0:
            print(f"variants: no time left for {name} and what follows", file=sys.stderr)
            break
        rows += one()
        run.put(rows, [])
        gc.collect()  # captured graphs keep their memory until then


def measure_linear(run: Run, shape: str, n: int, k: int, kind: str, tokens: int) -> list[dict[str, Any]]:
    """A row a width whose result is right, in the numerics or the dtype `kind`."""
    int8, dtype = kind == "int8", torch.bfloat16 if kind == "int8" else getattr(torch, kind)
    make = torch.Generator(run.device.type).manual_seed(tokens)
    x = torch.randn(tokens, k, generator=make, device=run.device.type).to(dtype)
    sample = torch.linspace(0, tokens - 1, min(tokens, JUDGED), device=run.device.type).long()
    rows = []
    for bits in FEW_WIDTHS:
        tiles = random_tiles(widths_of(n, bits), k, 1, run.device)
        arguments = (x[sample], *tiles[:3], None, n, k, int8)
        plain, exact = (OPS["packed_linear"].reference(*a) for a in (arguments, in_double(arguments)))
        error, wrong = judge(packed_linear(x, tiles, None, k, int8)[sample], plain, exact)
        if wrong:
            run.wrong.append(f"linear {shape}, {kind}, {bits} bits, {tokens} tokens: {wrong}")
            continue
        copies = copies_of(tiles, run.device)
        contenders: dict[str, Sequence[Callable[[], Any]]] = {
            "ours": [functools.partial(packed_linear, x, t, None, k, int8) for t in copies]
        }
        missing: Mapping[str, str] = {}
        if int8:
            contenders[EXACT] = [functools.partial(packed_linear, x, t, None, k) for t in copies]
            alone, missing = integers(run, n, k, tokens)
            contenders |= alone
        weight = tiled_weight(*tiles, k, 1, dtype)[0]
        weights = [weight, *(weight.clone() for _ in range(run.device.copies(size_of(weight)) - 1))]
        contenders[f"F.linear {str(dtype).removeprefix('torch.')}"] = [
            functools.partial(F.linear, x, w) for w in weights
        ]
        times, failed = race(run, contenders)
        ours = times.pop("ours")
        moved = size_of(*tiles[:3], x) + x.element_size() * tokens * n
        row = {
            "op": "packed_linear",
            "case": f"{shape} {bits if bits == MIXED else f'{bits} bits'}, {kind}, M = {tokens}",
        }
        row |= {"shape": [n, k], "kind": kind, "bits": bits, "tokens": tokens, "error": error}
        row |= part_of_row(run, ours, moved, times, {**missing, **failed})
        row["teraflops"] = 2 * tokens * n * k / ours.median / 1e6
        say({**row, "case": f"{shape}, {kind}"}, ours)
        rows.append(row)
    return rows


def integers(run: Run, n: int, k: int, tokens: int) -> tuple[dict[str, list[Callable[[], Tensor]]], dict[str, str]]:
    """torch's product of int8 matrices as a contender, or why it is missing; no result of it is ours to judge."""
    codes, levels = (torch.ones(rows, k, dtype=torch.int8, device=run.device.type) for rows in (tokens, n))
    try:
        if not bool((torch._int_mm(codes, levels.t()) == k).all()):
            return {}, {PRODUCT: "the result is wrong"}
    except Exception as error:
        return {}, {PRODUCT: reason(error)}
    copies = [levels, *(levels.clone() for _ in range(run.device.copies(size_of(levels)) - 1))]
    return {PRODUCT: [functools.partial(torch._int_mm, codes, some.t()) for some in copies]}, {}
