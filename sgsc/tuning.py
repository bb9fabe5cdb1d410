"""Tuning the products of packed layers on this machine's GPU.

What is found goes to the cache of kernels/triton_tables.py, where products of this and later processes look it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .files import write_atomically
from .kernels import PackedRows, TiledRows, tile_kernel, tile_rows
from .kernels.packed_conv2d import slides
from .packed import PackedConv2d, PackedProduct

if TYPE_CHECKING:
    from .kernels.triton_configuration import Config, Gpu
    from .kernels.triton_tables import Key

BATCHES = (1, 16, 64)
PIXELS = (16, 64, 256, 1_024, 4_096)  # all that the look-up tells apart
DTYPES = ("float16", "bfloat16", "float32")


def tune(
    model: nn.Module | Mapping[str, nn.Module],
    batches: Sequence[int] = BATCHES,
    device: torch.device | str = "cuda",
    *,
    pixels: Sequence[int] = PIXELS,
    dtypes: Sequence[str] = DTYPES,
    seconds: Callable[[Callable[[Tensor], Tensor], Tensor], float] | None = None,
    progress: Callable[[str, int, int, dict[str, float]], None] | None = None,
) -> list[dict[str, Any]]:
    """Find and store the fastest configurations of a packed model's products; the model is left as it is.

    Each is stored as soon as it is found: a run that is stopped has tuned what it got to.

    Args:
        model: A packed model, or modules by name.
        batches: Tokens of a call, for every Linear.
        device: The GPU.
        pixels: Output pixels of a call, those of all images together, for every convolution.
        dtypes: Of activations.
        seconds: Times a product of given words; None replays CUDA graphs, see kernels/triton_tuning.py.
        progress: Called with a name, how many products are done, of how many, and nothing else.

    Returns:
        A record of each product; layers of one shape and size share it.

    Raises:
        ValueError: If there is no GPU, no Triton or nothing to tune, or a number or dtype is none that can be tuned.
    """
    if find_spec("triton") is None:
        raise ValueError("tuning needs Triton, which is not installed; `pip install sgsc[triton]` installs it")
    from .kernels import triton_packed, triton_tables, triton_tuning

    _check("batches", batches, triton_packed.DENSE)
    _check("pixels", pixels, triton_packed.DENSE_PIXELS)
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ValueError(f"dtypes {list(dtypes)}: want some of {', '.join(DTYPES)}")
    at = _gpu(torch.device(device), bool(triton_packed.INTERPRETED.value))
    here = triton_tables.gpu(at.index)
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else model
    products = {name: m for name, m in modules.items() if isinstance(m, PackedProduct)}
    layers = {name: m for name, m in products.items() if not _slides(m)}  # others have nothing to choose
    numbers = {name: pixels if isinstance(layer, PackedConv2d) else batches for name, layer in layers.items()}
    records: dict[Key, dict[str, Any]] = {}
    done = 0
    for name, layer in layers.items():
        tiles = _tiles(layer, at)
        for dtype, columns in ((dtype, columns) for dtype in dtypes for columns in numbers[name]):
            run = _product(layer, tiles, columns, getattr(torch, dtype), at)
            key = triton_tuning.key_of(run, tiles.lines)
            if key and key in records:
                records[key]["layers"] += [name] * (name not in records[key]["layers"])  # 5 tokens count as 8
            elif key and (found := triton_tuning.tune_product(run, tiles.lines, columns, seconds)):
                store({key: found.config}, here)
                records[key] = {
                    "layers": [name],
                    "dtype": dtype,
                    "of": "tokens" if key.x == "tokens" else "pixels",
                    "columns": columns,
                    "heuristic_microseconds": 1e6 * found.heuristic,
                    "microseconds": 1e6 * found.seconds,
                    "config": None if found.config is None else found.config._asdict(),
                    "tried": found.tried,
                    "failed": found.failed,
                }
            done += 1
            if progress:
                progress("tuning", done, len(dtypes) * sum(map(len, numbers.values())), {})
    if not records:
        raise ValueError(
            f"nothing to tune in {len(modules)} modules; want packed Linears, or convolutions that are not depthwise, "
            "with bits"
        )
    return list(records.values())


def store(found: Mapping[Key, Config | None], here: Gpu) -> Path:
    """Add configurations to the cache's file for a GPU, losing nothing that other processes add; None takes one away.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written.
    """
    import fcntl  # where Triton runs, it exists

    from .kernels import triton_tables

    path = triton_tables.cache_path(here)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            table: dict[Key, Config] = triton_tables.read_table(path, here)
        except ValueError:  # no table: the new one takes its place
            table = {}
        both: dict[Key, Config | None] = {**table, **found}
        table = {key: config for key, config in both.items() if config is not None}
        if table or path.exists():
            write_atomically(path, triton_tables.write_table(table, here))
    triton_tables.forget()
    return path


def _check(name: str, numbers: Sequence[int], most: int) -> None:
    if not numbers or not all(1 <= n <= most for n in numbers):
        raise ValueError(
            f"{name} {list(numbers)}: want numbers from 1 to {most}; more go through a dense copy of the weights, "
            "which has nothing to tune"
        )


def _gpu(device: torch.device, interpreted: bool) -> torch.device:
    if device.type == "cpu" and interpreted:
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"tuning needs a GPU: there is none for {str(device)!r} here; run it on the one to tune for")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _tiles(layer: PackedProduct, at: torch.device) -> TiledRows:
    rows = PackedRows(layer.data.to(at), layer.bits.to(at), layer.width)
    scale, offset = layer.scale.to(at), layer.offset.to(at)
    if not isinstance(layer, PackedConv2d):
        return tile_rows(rows, scale, offset)
    inputs = layer.weight_shape()[1] * layer.groups
    return tile_kernel(rows, scale, offset, inputs=inputs, kernel=layer.kernel, groups=layer.groups)


def _slides(layer: PackedProduct) -> bool:
    return isinstance(layer, PackedConv2d) and slides(layer.weight_shape()[1] * layer.groups, layer.groups)


def _product(
    layer: PackedProduct, tiles: TiledRows, columns: int, dtype: torch.dtype, at: torch.device
) -> Callable[[Tensor], Tensor]:
    """A layer's product of given words with random x, without the padding and the bias."""
    from .kernels.triton_packed import convolution, linear

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(at, dtype)

    _, plan, grid, rows = tiles
    if not isinstance(layer, PackedConv2d):
        x = random(columns, layer.width)
        return lambda words: linear(x, words, plan, grid, None, rows, layer.width, False)
    kernel, stride, dilation = (
        [*[1] * (2 - len(one)), *one] for one in (layer.kernel, layer.stride, layer.dilation)
    )  # Conv1d is of height one
    down = 1 if len(layer.kernel) == 1 else max(n for n in range(1, math.isqrt(columns) + 1) if columns % n == 0)
    size = [
        (n - 1) * s + d * (k - 1) + 1
        for n, s, d, k in zip((down, columns // down), stride, dilation, kernel, strict=True)
    ]
    x = random(1, layer.weight_shape()[1] * layer.groups, *size)
    how = kernel, stride, [0, 0], dilation, layer.groups, False
    return lambda words: convolution(x, words, plan, grid, None, rows, *how)
