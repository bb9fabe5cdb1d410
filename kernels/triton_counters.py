"""Counters of the programs that share a tile's K: zeros before a launch, and set back to zero by it.

    eager       one tensor a stream, for good: its launches follow one another, whichever thread makes them, and each
                leaves zeros; what would not, a kernel that is aborted, leaves no context to launch in either. No
                configuration needs more of them, so none is ever replaced by a larger one
    a capture   zeros of its own, of the graph's memory: two graphs may be replayed side by side, and a stream beside
                them. Nothing allocated here is kept, since the graph's memory has other uses once it is captured

`torch.compile` also runs a function with a graph's memory before it captures it, and nothing tells; what was kept from
there would be overwritten. Only one thread's memory is so directed (`torch.cuda.use_mem_pool` says as much): another
makes what is kept.

A stream is known by its handle. Torch's own live as long as the process; CUDA frees that of another only when the work
on it is done.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from . import triton_early
from .triton_configuration import ceil_div, gpu
from .triton_tables import MOST_PROGRAMS

_kernels: Any = triton_early  # type checkers take a launch for a call of the Python function
_kept: dict[tuple[int | None, int], Tensor] = {}


def zeros(like: Tensor, count: int, early: bool) -> Tensor:
    """`count` counters, or more, for a launch on the current stream of the current device, which is that of `like`.

    Args:
        like: A tensor of the device.
        count: Counters.
        early: Whether the launch starts early: then what makes its zeros does too, or nothing would be gained.
    """
    device = like.device
    if device.index is None:
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return _by_kernel(device, count) if early else torch.zeros(count, dtype=torch.int32, device=device)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    kept = _kept.get((device.index, stream))
    if kept is None:
        with ThreadPoolExecutor(1) as another:
            made = another.submit(_make, device, device.index is not None and torch.cuda.current_stream()).result()
        kept = _kept.setdefault((device.index, stream), made)
    return kept if count <= kept.numel() else torch.zeros(count, dtype=torch.int32, device=device)


def _make(device: torch.device, stream: Any) -> Tensor:
    """As many zeros as any configuration needs, there before what `stream` is given next."""
    here = gpu(device.index)
    count = MOST_PROGRAMS * here.processors
    if device.index is None:
        return torch.zeros(count, dtype=torch.int32)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        # the kernel that a capture needs is loaded here: a capture may not load one
        early = here.capability >= triton_early.FROM
        made = _by_kernel(device, count) if early else torch.zeros(count, dtype=torch.int32, device=device)
        stream.wait_stream(torch.cuda.current_stream())
    return made


def _by_kernel(device: torch.device, count: int) -> Tensor:
    made = torch.empty(count, dtype=torch.int32, device=device)
    _kernels.zero_kernel[(ceil_div(count, 1_024),)](made, count, BLOCK=1_024, num_warps=4, launch_pdl=True)
    return made
