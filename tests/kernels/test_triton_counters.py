"""Whose counters a product in parts gets; that it sets them back is checked in triton_interpreted_packed.py."""

import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sgsc.kernels import triton_counters
from sgsc.kernels.triton_configuration import FILL, Gpu
from sgsc.kernels.triton_tables import MOST_PROGRAMS

H100 = Gpu("", 132, 232_448, 90)
MOST = 132 * MOST_PROGRAMS


class Cuda:
    """Two GPUs, whose tensors lie on the CPU: what is current, and in which threads blocks were made."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.threads, self.filled = 7, False, [], 0
        for name, empty in (("_kept", {}), ("_left", {}), ("_blocks", []), ("_low", set())):
            monkeypatch.setattr(triton_counters, name, empty)
        monkeypatch.setattr(triton_counters, "_make", self.make)
        monkeypatch.setattr(triton_counters, "gpu", lambda index: H100)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)
        kept = torch.zeros

        def zeros(*size, dtype, device=None):
            self.filled += 1
            return kept(*size, dtype=dtype)

        monkeypatch.setattr(torch, "zeros", zeros)

    def make(self, device):
        assert not self.capturing, "a capture allocates nothing that is kept"
        self.threads.append(threading.get_ident())
        return torch.empty(triton_counters.BLOCK, dtype=torch.int32).fill_(0)

    def zeros(self, count=8, index=0):
        return triton_counters.zeros(SimpleNamespace(device=torch.device("cuda", index)), count)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def overlap(some):
    """Whether two of these tensors share memory."""
    ends = sorted((t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in some)
    return any(end > begin for (_, end), (begin, _) in pairwise(ends))


def test_a_stream_keeps_its_counters(cuda):
    first = cuda.zeros()
    assert cuda.zeros(MOST) is first
    assert cuda.zeros(3) is first
    cuda.stream = 9
    second = cuda.zeros()
    third = cuda.zeros(index=1)
    assert not overlap([first, second, third])
    cuda.stream = 7
    assert cuda.zeros() is first
    assert len(triton_counters._kept) == 3
    assert len(cuda.threads) == 2, "a block for each GPU"
    assert cuda.filled == 0


def test_what_is_kept_is_made_by_another_thread(cuda):
    cuda.zeros()
    (thread,) = cuda.threads
    assert thread != threading.get_ident()


def test_every_captured_product_has_counters_of_its_own(cuda):
    """On one stream, on streams that fork from it, in another capture, beside eager calls: replays may overlap."""
    found = [cuda.zeros()]
    for _ in range(2):
        cuda.capturing = True
        for cuda.stream in (7, 9, 7, 11, 9):
            found += [cuda.zeros(5), cuda.zeros(64)]
        cuda.capturing = False
        cuda.stream = 11
        found.append(cuda.zeros())
        cuda.stream = 7
    found.pop()  # a stream's own are the same
    assert len(found) == 22
    assert not overlap(found)
    assert not any(t.any() for t in found)
    assert {len(t) for t in found[1:11]} == {5, 64}
    assert {t.data_ptr() % 16 for t in found} == {found[0].data_ptr() % 16}, "a launch asks for 16 bytes"
    assert cuda.filled == 0, "a launch more"
    assert len(triton_counters._kept) == 2


def test_a_capture_before_any_product_fills_its_own(cuda):
    cuda.capturing = True
    assert len(cuda.zeros()) == 8
    assert (cuda.filled, triton_counters._kept, triton_counters._blocks) == (1, {}, [])
    cuda.capturing = False
    cuda.zeros()
    cuda.capturing = True
    cuda.zeros()
    assert cuda.filled == 1


def test_captures_that_use_up_a_block_get_another(cuda):
    """By the next eager product; and what they have is not freed: only the block's own list keeps it."""
    count = triton_counters.BLOCK // 8
    first = cuda.zeros()
    for used in range(1, 20):
        cuda.capturing = True
        cuda.zeros(count)
        cuda.capturing = False
        assert cuda.zeros() is first
        assert len(triton_counters._blocks) == 1 + (used + 1) // 5  # half of the first is left after 4
    assert cuda.filled == 0
    cuda.capturing = True
    sizes = [len(cuda.zeros(count)) for _ in range(20)]
    assert set(sizes) == {count}
    assert cuda.filled > 0, "one capture of more than a block"


def test_more_counters_than_are_kept_are_made_for_a_call(cuda):
    kept = cuda.zeros()
    more = cuda.zeros(MOST + 1)
    assert len(more) == MOST + 1
    assert not more.any()
    assert cuda.zeros() is kept


def test_no_configuration_needs_more_than_are_kept(cuda):
    """K is split where programs are fewer than MOST_PROGRAMS a multiprocessor, of which each counter has two."""
    assert len(cuda.zeros()) == MOST >= 132 * FILL
    assert 100 * MOST < triton_counters.BLOCK, "streams use up a block"


def test_threads_that_begin_together_share(cuda):
    """The second finds that the first has stored its own meanwhile."""
    late = torch.zeros(32, dtype=torch.int32)

    def make(device):
        triton_counters._kept[0, 7] = late
        return cuda.make(device)

    triton_counters._make = make
    assert cuda.zeros() is late


def test_a_thread_that_fails_says_why(cuda):
    def make(device):
        raise RuntimeError("out of memory")

    triton_counters._make = make
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda.zeros()
    assert (triton_counters._kept, triton_counters._left) == ({}, {})
