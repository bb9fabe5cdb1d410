"""How a packed product falls to programs: what is chosen from shapes and the GPU alone, where nothing was tuned.

A first call compiles, but tunes nothing; one of each shape before a capture, and a CUDA graph may hold the rest.
triton_tables.py has what was measured. The limits follow
from machine code compiled for sm_80 and sm_90 (tests/kernels/test_triton_packed.py): beyond them registers spill.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .fragments import SPAN, UNIT

COLUMNS = (8, 16, 32, 64, 128)
FILL = 4  # programs a multiprocessor that keep its memory busy
LEAST = 2  # steps of K a part: fewer are all start-up
STAGES = 3


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; on the host, as `tl.cdiv` is in kernels."""
    return -(-a // b)


class Config(NamedTuple):
    """A configuration.

    Attributes:
        columns: Tokens or pixels of a program.
        blocks: Blocks of 128 levels a step.
        parts: Programs that share a tile's K.
        order: Of K, see `order` in triton_unpack.py: "wide" where wgmma takes 64 rows, else "narrow".
        warps, stages: Of a program; stages are loads in flight.
    """

    columns: int
    blocks: int
    parts: int
    order: str
    warps: int
    stages: int


class Gpu(NamedTuple):
    """What a GPU is called and has.

    Attributes:
        name: As its driver says.
        processors: Multiprocessors.
        shared: Bytes that a program may share.
        capability: 90 is NVIDIA's 9.0; 0 of another maker's.
    """

    name: str
    processors: int
    shared: int
    capability: int


@lru_cache
def gpu(index: int | None) -> Gpu:
    """The GPU of an index; None is the interpreter."""
    if index is None:
        return Gpu("interpreter", 2, 232_448, 90)
    found = torch.cuda.get_device_properties(index)
    capability = 0 if torch.version.hip else 10 * found.major + found.minor
    shared = getattr(found, "shared_memory_per_block_optin", 65_536 if torch.version.hip else 101_376)
    return Gpu(found.name, found.multi_processor_count, shared, capability)


def warps_of(size: int) -> int:
    """Warps of a program of `size` rows."""
    return 1 if size == UNIT else 4


def most_columns(dtype: torch.dtype, size: int, here: Gpu, x: str) -> int:
    """Columns that a program of `size` rows has registers for; float32 x is three operands.

    Of `warps_of` warps; tuning keeps to it too where x is "pixels", in proportion to its warps.
    """
    if x == "pixels":
        return 16 if size > UNIT or not here.capability else 8  # AMD's matrix cores take no fewer
    if dtype == torch.float32:
        return 16
    if size == UNIT:
        return 32  # one warp
    return 128 if here.capability == 90 else 64


@lru_cache(4_096)
def configure(
    dtype: torch.dtype, columns: int, tiles: int, size: int, across: int, here: Gpu, x: str = "tokens"
) -> Config:
    """The configuration of a product where none is tuned.

    Args:
        dtype: Of x.
        columns: Tokens, or output pixels.
        tiles: Tiles of the layer.
        size: Rows of a tile.
        across: Blocks of K.
        here: The GPU.
        x: How x lies: "tokens", "runs" of channels of a convolution, or "pixels", each value by itself.
    """
    least = 8 if here.capability else 16  # AMD's matrix cores take 16
    some = next(c for c in COLUMNS if c >= max(least, min(columns, most_columns(dtype, size, here, x))))
    wide = x == "tokens" or (x == "runs" and here.capability == 90)
    blocks = 2 if wide and some <= 16 and dtype != torch.float32 else 1
    order = "wide" if here.capability == 90 and size > UNIT and some >= 16 else "narrow"
    programs, steps = tiles * ceil_div(columns, some), ceil_div(across, blocks)
    parts = max(1, min(FILL * here.processors // max(programs, 1), steps // LEAST))
    each = max(1, ceil_div(steps, parts))  # no part without a step
    c = Config(some, blocks, max(1, ceil_div(steps, each)), order, warps_of(size), STAGES)
    while c.stages > 1 and shared(dtype, size, c) > here.shared:
        c = c._replace(stages=c.stages - 1)
    return c


class Sliding(NamedTuple):
    """A configuration of a depthwise product.

    Attributes:
        columns: Output pixels of a program; two a thread share the work of unpacking.
        each: Rows of a program.
        across: Places of the kernel side by side whose loads are in flight together.
        warps: Of a program.
    """

    columns: int
    each: int
    across: int
    warps: int


@lru_cache(4_096)
def sliding(columns: int, places: int, kernel_width: int, here: Gpu) -> Sliding:
    """The configuration of a depthwise product of `columns` output pixels and `places` for rows.

    Programs are small where there would be too few to fill the GPU.
    """
    across = next(n for n in range(7, 0, -1) if kernel_width % n == 0)
    each = 8 if across <= 3 else 4
    programs = places // each
    some = next((n for n in (256, 128, 64) if programs * ceil_div(columns, n) >= FILL * here.processors), 32)
    return Sliding(some, each, across, max(1, some // 64))


def shared(dtype: torch.dtype, size: int, config: Config) -> int:
    """Bytes that a program shares at most, of what the compiler took for sm_80 and sm_90."""
    x = config.blocks * SPAN * config.columns * dtype.itemsize
    words = config.blocks * SPAN * size  # of 8 bits
    found = (x + words) * (config.stages - 1)  # in flight
    found += 2 * words  # weights, where a product takes them in another order than they are unpacked in
    if dtype == torch.float32:
        return found + x // 2 + 4_096  # a part of x in bfloat16
    return found + (x if config.order == "wide" else 0)  # which wgmma is still reading
