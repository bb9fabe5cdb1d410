"""Where the GPU bench runs, and how it times there.

    Gpu            calls replayed from a CUDA graph, as deployed networks are; timed by the GPU's own events
    Interpreted    the CPU through Triton's interpreter (TRITON_INTERPRET=1), timed by the clock: it proves that the
                   bench runs where there is no GPU, and its numbers mean nothing

A contender brings one call for each copy of its weights. They take turns, so that weights come from memory as in a
network of many layers: together the copies are larger than twice the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from sgsc.kernels import Op, run_form
from tests.checks import OTHER_ORDER, relative_error

MOST_COPIES = 64  # of small weights: their plan and grid stay in the cache, which a network's own would too
REPLAY = 2e-3  # seconds of a graph, beside which its start does not count
MOST_CALLS = 400  # of a graph
EAGER = 0.02  # seconds of a round of eager calls
MEBI = 1 << 20

Call = Callable[[], Any]


class Device:
    """What both have; abstract."""

    type: str
    name: str
    cache: int  # bytes of the L2 cache
    compiler: str  # of torch.compile
    least: int  # rounds of a contender

    def copies(self, size: int) -> int:
        """How many copies of `size` bytes take turns."""
        return min(MOST_COPIES, 2 * self.cache // max(size, 1) + 1)

    def wait(self) -> None:
        """Until all that was launched has run."""

    def rounds(self, calls: Sequence[Call]) -> tuple[Callable[[], float], bool]:
        """What runs all calls, once or several times, and says how many seconds one took; and whether by graph."""
        raise NotImplementedError

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """The result of a call as `rounds` runs it: by graph, where there are graphs."""
        return call()

    def kernels(self, call: Call) -> Counter[str] | None:
        """How often each kernel ran in a call; None where that is not known."""
        raise NotImplementedError

    def eager(self, calls: Sequence[Call], seconds: float) -> float:
        """Seconds a call by the clock, launched one by one, waited for once: the longer of Python's and the GPU's."""

        def once(count: int) -> float:
            start = time.perf_counter()
            for i in range(count):
                calls[i % len(calls)]()
            self.wait()
            return (time.perf_counter() - start) / count

        self.wait()
        first = once(1)
        count = min(1000, int(seconds / max(first, 1e-6)))
        return statistics.median(once(count) for _ in range(3)) if count else first


class Gpu(Device):
    """The first CUDA device."""

    type, compiler, least = "cuda", "inductor", 5

    def __init__(self) -> None:
        import triton

        found = torch.cuda.get_device_properties(0)
        self.cache = found.L2_cache_size
        self.name = f"{found.name}, torch {torch.__version__}, triton {triton.__version__}"

    def wait(self) -> None:
        """Until all that was launched has run."""
        torch.cuda.synchronize()

    def rounds(self, calls: Sequence[Call]) -> tuple[Callable[[], float], bool]:
        """Replays of a graph that lasts about REPLAY; of calls that wait for the GPU, one by one, as no graph holds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed(run: Call, count: int) -> float:
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / count

        def all_calls(times: int = 1) -> None:
            for _ in range(times):
                for call in calls:
                    call()

        all_calls()  # compiles, tunes, takes memory
        if waits(calls[0]):
            return lambda: timed(all_calls, len(calls)), False
        times, most = 1, -(-MOST_CALLS // len(calls))
        while True:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                all_calls(times)
            captured.replay()  # the first brings the graph to the GPU
            each = timed(captured.replay, times)
            if times * each >= REPLAY / 2 or times == most:
                break
            times = min(most, int(REPLAY / each) + 1)
        return lambda: timed(captured.replay, times * len(calls)), True

    def replayed(self, call: Callable[[], Tensor]) -> Tensor:
        """The result of a graph's third replay, which finds what the others left behind."""
        call()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = call()
        for _ in range(3):
            found.fill_(float("nan"))
            captured.replay()
        return found.clone()

    def kernels(self, call: Call) -> Counter[str] | None:
        """As the profiler counts them; None where it sees none."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        call()
        self.wait()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            call()
            self.wait()
        on_gpu = [e for e in found.events() if e.device_type == DeviceType.CUDA]
        return Counter(e.name for e in on_gpu if not getattr(e, "is_user_annotation", False)) or None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Nothing to prepare but cuDNN's choice among its algorithms."""
        torch.backends.cudnn.benchmark = True
        yield


def waits(call: Call) -> bool:
    """Whether a call waits for the GPU. To find out by a capture that fails would leave torch in the middle of it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


class Interpreted(Device):
    """The CPU in the GPU's place."""

    type, name, compiler, least = "cpu", "Triton's interpreter", "aot_eager", 1
    cache = 1 << 13

    def copies(self, size: int) -> int:
        """Two at most: what is to be seen is that they take turns."""
        return min(2, super().copies(size))

    def rounds(self, calls: Sequence[Call]) -> tuple[Callable[[], float], bool]:
        """All calls by the clock."""
        calls[0]()

        def one() -> float:
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)

        return one, False

    def kernels(self, call: Call) -> Counter[str] | None:
        """Not known: nothing is launched."""
        call()
        return None

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, operations on CPU tensors are those of the GPU, and layers are laid out for it."""
        from sgsc.kernels import triton_fake_quantize, triton_packed

        ours = {**triton_packed.IMPLEMENTATIONS, **triton_fake_quantize.IMPLEMENTATIONS}
        kept = Op.__call__

        def call(self: Op, *args: Any) -> Any:
            return ours[self.name](*args) if self.name in ours else kept(self, *args)

        with mock.patch.dict(run_form.FORMS, cpu=run_form.FRAGMENTS), mock.patch.object(Op, "__call__", call):
            yield


def find(quick: bool) -> Gpu | Interpreted:
    """The GPU; without one, for a quick run, the interpreter.

    Raises:
        ValueError: If there is neither.
    """
    if torch.cuda.is_available():
        return Gpu()
    from sgsc.kernels.triton_compat import INTERPRETED

    if not quick or not INTERPRETED.value:
        raise ValueError(
            "torch finds no GPU here; TRITON_INTERPRET=1 with --quick runs the bench without, for its test"
        )
    return Interpreted()


@dataclass
class Run:
    """What a section is given.

    Attributes:
        device: Where to measure.
        quick: One small case of each, once.
        seconds: To time a contender for, at least.
        left: Seconds of the section's budget that are left.
        put: Writes rows and claims, of the section or of the one that is named; again and again as they grow.
        copy: Bytes a second, read plus written, of a large copy in this process.
        wrong: What gave a wrong result; it is not timed, and a section adds to it.
    """

    device: Gpu | Interpreted
    quick: bool
    seconds: float
    left: Callable[[], float]
    put: Callable[..., None]
    copy: float = float("nan")
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Time:
    """Of one call, in microseconds."""

    median: float
    fastest: float
    rounds: int
    eager: float
    graph: bool


def race(run: Run, contenders: Mapping[str, Sequence[Call]]) -> tuple[dict[str, Time], dict[str, str]]:
    """Time contenders, taking turns.

    Args:
        run: What the section is given.
        contenders: The calls of each, one a copy of its weights.

    Returns:
        The times, and why the others are missing.

    Raises:
        Exception: What "ours" raises; others may fail in any way.
    """
    rounds, graph, missing = {}, {}, {}
    for name, calls in contenders.items():
        try:
            rounds[name], graph[name] = run.device.rounds(calls)
        except Exception as error:
            if name.startswith("ours"):
                raise
            missing[name] = reason(error)
    seconds: dict[str, list[float]] = {name: [] for name in rounds}
    until = time.perf_counter() + run.seconds * len(rounds)
    while any(len(found) < run.device.least for found in seconds.values()) or time.perf_counter() < until:
        for name, one in rounds.items():
            seconds[name].append(one())
    eager = {name: run.device.eager(contenders[name], EAGER if run.seconds else 0.0) for name in rounds}
    return {
        name: Time(1e6 * statistics.median(found), 1e6 * min(found), len(found), 1e6 * eager[name], graph[name])
        for name, found in seconds.items()
    }, missing


def judge(found: Tensor, plain: Tensor, exact: Tensor) -> tuple[float, str]:
    """The largest error of a result relative to the RMS; and what is wrong with it, "" if nothing.

    As in tests/checks.py: twice the error of plain PyTorch in the same dtype is allowed, judged in float64.
    """
    try:
        error = relative_error(found, exact)
    except AssertionError as wrong:  # another shape, or NaN
        return float("inf"), reason(wrong)
    allowed = 2 * relative_error(plain, exact) + OTHER_ORDER
    return error, "" if error <= allowed else f"error {error:.2g} of the RMS, allowed {allowed:.2g}"


def part_of_row(run: Run, ours: Time, traffic: int, others: Mapping[str, Time], missing: Mapping[str, str]) -> dict:
    """What every row says of a time: the traffic, the share of the copy's bandwidth, and the peers."""
    return {
        "bytes": traffic,
        "microseconds": ours.median,
        "fastest_microseconds": ours.fastest,
        "rounds": ours.rounds,
        "eager_microseconds": ours.eager,
        "share_of_copy": traffic / (ours.median * 1e-6) / run.copy,
        "copy_gigabytes_per_second": run.copy / 1e9,
        "peer_microseconds": {name: t.median for name, t in others.items()} | dict.fromkeys(missing),
        "peer_eager_microseconds": {name: t.eager for name, t in others.items()} | dict.fromkeys(missing),
        "ratio": {name: t.median / ours.median for name, t in others.items()} | dict.fromkeys(missing),
        "without_graph": [name for name, t in {"ours": ours, **others}.items() if not t.graph],
        "missing": dict(missing),
    }


def copy_bandwidth(device: Device, quick: bool) -> float:
    """Bytes a second, read plus written, of copying 1 GiB."""
    source = torch.ones(MEBI // 4 if quick else 256 * MEBI, device=device.type)
    target = torch.empty_like(source)
    one, _ = device.rounds([lambda: target.copy_(source)])
    return 2 * source.numel() * source.element_size() / statistics.median(one() for _ in range(20))


def reason(error: BaseException) -> str:
    """Why something is missing, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def size_of(*tensors: Tensor) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)
