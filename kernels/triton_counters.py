"""Counters of the programs that share a tile's K: zeros before a launch, and set back to zero by it.

    eager       a stream's own, for good: its launches follow one another, whichever thread makes them, and each leaves
                zeros; what would not, a kernel that is aborted, leaves no context to launch in either. No configuration
                needs more of them, so none is ever replaced by a larger one
    a capture   each product's own, for good: graphs may be replayed side by side, forks of one graph run so, and a
                stream beside them. CUDA lets no graph overlap with itself: a replay finds the zeros of the one before

Both are cut from blocks of zeros that are never freed, so that neither launches anything to make them. A block is the
process's own, of no graph's memory, which has other uses once it is captured; a capture allocates nothing, so what it
cuts from was made by a product before it, as its kernels were compiled. Where too little is left (more than eight
thousand products of a layer of 4,096 rows in one capture) it fills zeros of its own, a launch more. What that costs is
4 bytes a tile and captured product, which the end of a graph does not give back.

`torch.compile` also runs a function with a graph's memory before it captures it, and nothing tells; what was kept from
there would be overwritten. Only one thread's memory is so directed (`torch.cuda.use_mem_pool` says as much): another
makes what is kept.

A stream is known by its handle. Torch's own live as long as the process; CUDA frees that of another only when the work
on it is done.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

from .triton_configuration import ceil_div, gpu
from .triton_tables import MOST_PROGRAMS

BLOCK = 2**20  # counters: 4 MiB
_ALIGNED = 4  # counters in 16 bytes, which a launch by triton_launch.py asks of every address

_kept: dict[tuple[int | None, int], Tensor] = {}  # by device and stream
_left: dict[int | None, Tensor] = {}  # by device: of its newest block what nobody has
_blocks: list[Tensor] = []  # a graph holds an address, no tensor
_low: set[int | None] = set()  # devices whose next eager product makes a block
_lock = Lock()


def zeros(like: Tensor, count: int) -> Tensor:
    """`count` counters, or more, for a launch on the current stream of the current device, which is that of `like`."""
    device = like.device
    index = device.index
    if index is None:
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        found = _cut(index, count)
        return torch.zeros(count, dtype=torch.int32, device=device) if found is None else found
    else:
        stream = torch._C._cuda_getCurrentRawStream(index)
    kept = _kept.get((index, stream))
    if kept is None or index in _low:
        kept = _keep(device, stream)
    return kept if count <= kept.numel() else torch.zeros(count, dtype=torch.int32, device=device)


def _cut(index: int | None, count: int) -> Tensor | None:
    """Counters that nobody else has or will have; None where too few are left."""
    size = ceil_div(count, _ALIGNED) * _ALIGNED
    with _lock:
        left = _left.get(index)
        if left is None or size > left.numel():
            _low.add(index)
            return None
        found, _left[index] = left[:count], left[size:]
        if left.numel() - size < BLOCK // 2:
            _low.add(index)
    return found


def _keep(device: torch.device, stream: int) -> Tensor:
    """The stream's counters, and enough left for a capture."""
    index = device.index
    if index not in _left or index in _low:
        with ThreadPoolExecutor(1) as another:
            made = another.submit(_make, device).result()
        with _lock:
            _blocks.append(made)
            _left[index] = made
            _low.discard(index)
    kept = _kept.get((index, stream))
    if kept is None:
        mine = _cut(index, MOST_PROGRAMS * gpu(index).processors)  # what any configuration needs
        assert mine is not None, "a block holds many times that"
        kept = _kept.setdefault((index, stream), mine)
    return kept


def _make(device: torch.device) -> Tensor:
    """A block of zeros, which are there: nothing orders a graph's first replay behind their making but waiting."""
    if device.index is None:
        return torch.zeros(BLOCK, dtype=torch.int32)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        made = torch.zeros(BLOCK, dtype=torch.int32, device=device)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
    return made
