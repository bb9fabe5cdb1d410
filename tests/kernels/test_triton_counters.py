"""Whose counters a product in parts gets; that it sets them back is checked in triton_interpreted_packed.py."""

import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sgsc.kernels import triton_counters
from sgsc.kernels.triton_configuration import Gpu


class Cuda:
    """Two GPUs, whose tensors lie on the CPU: what is current, what was made by a kernel, and in which thread."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.threads, self.by_kernel = 7, False, [], 0
        monkeypatch.setattr(triton_counters, "_kept", {})
        monkeypatch.setattr(triton_counters, "_make", self.make)
        monkeypatch.setattr(triton_counters, "_by_kernel", self.launch)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: f"stream {self.stream}")
        kept = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device=None: kept(*size, dtype=dtype))

    def make(self, device, stream):
        assert stream == f"stream {self.stream}"  # another thread's would be another
        self.threads.append(threading.get_ident())
        return torch.zeros(32, dtype=torch.int32)

    def launch(self, device, count):
        self.by_kernel += 1
        return torch.zeros(count, dtype=torch.int32)

    def zeros(self, count=8, early=True, index=0):
        return triton_counters.zeros(SimpleNamespace(device=torch.device("cuda", index)), count, early)


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_a_stream_keeps_its_counters(cuda):
    first = cuda.zeros()
    assert cuda.zeros(32) is first
    assert cuda.zeros(3, early=False) is first
    cuda.stream = 9
    second = cuda.zeros()
    assert second is not first
    assert cuda.zeros(index=1) is not second
    cuda.stream = 7
    assert cuda.zeros() is first
    assert len(cuda.threads) == len(triton_counters._kept) == 3
    assert cuda.by_kernel == 0


def test_what_is_kept_is_made_by_another_thread(cuda):
    cuda.zeros()
    assert cuda.threads != [threading.get_ident()]


def test_a_capture_has_counters_of_its_own_and_leaves_none(cuda):
    cuda.capturing = True
    made = [cuda.zeros(), cuda.zeros(), cuda.zeros(early=False)]
    assert [len(some) for some in made] == [8, 8, 8]
    assert len({some.data_ptr() for some in made}) == 3
    assert cuda.by_kernel == 2
    assert triton_counters._kept == {}
    cuda.capturing = False
    kept = cuda.zeros()
    cuda.capturing = True
    assert cuda.zeros() is not kept


def test_more_counters_than_are_kept_are_made_for_a_call(cuda):
    kept = cuda.zeros()
    more = cuda.zeros(33)
    assert len(more) == 33
    assert not more.any()
    assert cuda.zeros() is kept


def test_no_configuration_needs_more_than_are_kept(monkeypatch):
    """K is split where programs are fewer than MOST_PROGRAMS a multiprocessor, of which each counter has two."""
    monkeypatch.setattr(triton_counters, "gpu", lambda index: Gpu("", 132, 232_448, 90))
    assert len(triton_counters._make(torch.device("cpu"), None)) == 132 * triton_counters.MOST_PROGRAMS


def test_threads_that_begin_together_share(cuda):
    """The second finds that the first has stored its own meanwhile."""
    late = torch.zeros(32, dtype=torch.int32)

    def make(device, stream):
        triton_counters._kept[0, 7] = late
        return torch.zeros(32, dtype=torch.int32)

    cuda.make, triton_counters._make = make, make
    assert cuda.zeros() is late


def test_a_thread_that_fails_says_why(cuda):
    def make(device, stream):
        raise RuntimeError("out of memory")

    triton_counters._make = make
    with pytest.raises(RuntimeError, match="out of memory"):
        cuda.zeros()
    assert triton_counters._kept == {}
