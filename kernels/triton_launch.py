"""Launching a kernel once more, without Triton's search for it.

`kernel[grid](...)` asks every argument what a kernel may be specialised on, and looks that up as a string: most of the
Python of a small product. What it returns is the compiled kernel, which takes the same arguments (Triton's tutorial on
softmax launches so): it is kept here by a key that says the same for less. Settings of Triton's that change what is
compiled (`knobs`) count when a kernel is first launched.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def again(key: Hashable, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple[int, ...]) -> bool:
    """Launch on the current device and stream what `first` compiled; False if there is nothing, or it does not fit.

    Args:
        key: All that decides what is compiled, but for the addresses' alignment: the device, types, constants, options.
        grid: Programs.
        tensors, numbers: The arguments before the constants, in the kernel's order.
    """
    found = _compiled.get(key)
    if found is None or not _aligned(tensors):
        return False
    kernel, constants = found
    kernel[grid](*tensors, *numbers, *constants)
    return True


def first(
    key: Hashable,
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Launch by Triton, and keep what it compiled for `again`; not where the interpreter runs.

    Not on AMD's GPUs either, where Triton also specialises on storages below 2 GiB.

    Args:
        key, grid, tensors, numbers: As of `again`.
        kernel: The function that Triton compiles.
        constants: By name, all of them, in the kernel's order.
        options: Of the launch.
    """
    compiled = kernel[grid](*tensors, *numbers, **constants, **options)
    known = isinstance(compiled, CompiledKernel) and not torch.version.hip  # the interpreter returns nothing
    if known and _aligned(tensors):
        _compiled[key] = compiled, tuple(constants.values())


def _aligned(tensors: tuple[Tensor, ...]) -> bool:
    """Whether all lie at multiples of 16 bytes, which Triton specialises on."""
    low = 0
    for t in tensors:
        low |= t.data_ptr()
    return not low & 15
