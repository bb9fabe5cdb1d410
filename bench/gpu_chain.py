"""One token through four layers of Llama 3, each of which needs the one before: with and without starting early.

What triton_early.py is for shows only here, where the next layer's words can come while the last programs of a layer
still run. Between layers stands nothing that a network has beside them: what it takes of a result is its beginning.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sgsc.kernels import OPS, TiledRows, packed_linear, triton_packed
from sgsc.kernels.triton_configuration import configure, gpu
from tests.checks import in_double

from .gpu_choices import forced
from .gpu_device import Device, Run, judge, race, size_of
from .gpu_linear import FEW_WIDTHS, random_tiles, widths_of

# rows and width of each layer; no result is shorter than the next one's x
LAYERS = {"8B qkv, o, gate_up, down": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))}
LITTLE = {"64x256, 32x64": ((64, 256), (32, 64))}
SECTION = "a chain of layers"
OFF = "PDL off"


@torch.no_grad()
def measure(run: Run) -> None:
    """Write the section."""
    ((name, shapes),) = (LITTLE if run.quick else LAYERS).items()
    run.put([row for bits in FEW_WIDTHS for row in measure_chain(run, name, shapes, bits)], [], SECTION)


def chains_of(shapes: Sequence[tuple[int, int]], bits: int | str, device: Device) -> list[list[TiledRows]]:
    """The layers, of random words, and their copies, which take turns."""
    layers = [random_tiles(widths_of(n, bits), k, 1, device) for n, k in shapes]
    count = device.copies(sum(size_of(t.lines) for t in layers))
    return [layers, *([t._replace(lines=t.lines.clone()) for t in layers] for _ in range(count - 1))]


def through(x: Tensor, layers: Sequence[TiledRows], widths: Sequence[int], product: Callable[..., Tensor]) -> Tensor:
    """The last layer's result; each takes what it needs of the one before."""
    for tiles, width in zip(layers, widths, strict=True):
        x = product(x[:, :width], tiles, None, width)
    return x


def reference(x: Tensor, tiles: TiledRows, bias: None, width: int) -> Tensor:
    """The layer in plain PyTorch, in the dtype of x."""
    arguments = (x, *tiles[:3], bias, tiles.rows, width, False)
    return OPS["packed_linear"].reference(*(in_double(arguments) if x.dtype == torch.float64 else arguments))


def measure_chain(run: Run, name: str, shapes: Sequence[tuple[int, int]], bits: int | str) -> list[dict[str, Any]]:
    """A row each way, of one layer of the chain on average; none where a result is wrong."""
    widths = [k for _, k in shapes]
    make = torch.Generator(run.device.type).manual_seed(1)
    x = torch.randn(1, widths[0], generator=make, device=run.device.type).to(torch.bfloat16)
    chains = chains_of(shapes, bits, run.device)
    plain, exact = (through(start, chains[0], widths, reference) for start in (x, x.double()))
    calls = [functools.partial(through, x, layers, widths, packed_linear) for layers in chains]
    contenders = {"ours": calls, f"ours, {OFF}": [forced(call, EARLY=0) for call in calls]}
    for variant, (call, *_) in contenders.items():
        for how, y in (("", call()), (", replayed", run.device.replayed(call))):
            _, wrong = judge(y, plain, exact)
            if wrong:
                run.wrong.append(f"{SECTION}, {bits} bits, {variant}{how}: {wrong}")
                return []
    times, _ = race(run, contenders)
    here, rows = gpu(x.device.index), []
    early = triton_packed.starts_early(configure(x.dtype, 1, 1, 64, 1, here), here)
    for variant, t in times.items():
        rows.append(
            {"op": "packed_linear", "case": name, "layers": len(shapes), "bits": bits, "tokens": 1, "variant": variant}
            | {"starts_early": early and variant == "ours", "graph": t.graph, "rounds": t.rounds}
            | {"microseconds_a_layer": t.median / len(shapes), "eager_microseconds_a_layer": t.eager / len(shapes)}
            | {f"over {OFF}": times[f"ours, {OFF}"].median / t.median}
        )
        print(f"{name} {bits} bits, {variant}: {t.median / len(shapes):,.2f} µs a layer", file=sys.stderr)
    return rows


def compile_one(device: Device, index: int) -> None:
    """Run the chain that does not start early once; the other's kernel is one of gpu_linear.py's."""
    ((_, shapes),) = LAYERS.items()
    n, k = shapes[1]
    x = torch.ones(1, k, dtype=torch.bfloat16, device=device.type)
    layer = random_tiles(widths_of(n, 4), k, 1, device)
    forced(functools.partial(packed_linear, x, layer, None, k), EARLY=0)()
