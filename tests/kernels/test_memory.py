"""Large results of the quantizer: past the caches, in memory that is used again."""

from __future__ import annotations

import copy
import itertools
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sgsc.kernels import OPS, extension, fake_quantize
from sgsc.kernels.fake_quantize import held_memory, release_memory
from tests.checks import assert_same

needs_extension = pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")
LARGE = 1 << 18  # bytes of a result from which its memory is used again


@pytest.fixture
def streaming() -> Iterator[None]:
    """Every result goes past the caches, however small."""
    before = torch.ops.sgsc._set_stream_from(0)
    yield
    torch.ops.sgsc._set_stream_from(before)


@needs_extension
@pytest.mark.skipif(not Path("/sys/devices/system/cpu/cpu0/cache").exists(), reason="the kernel names no caches")
def test_a_result_is_large_where_it_exceeds_the_last_cache_of_one_core():
    """Not the sum over a package, as which glibc gives it: then nothing would be streamed."""
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    print_it = "import torch, sgsc.kernels; print(torch.ops.sgsc._set_stream_from(0))"
    done = subprocess.run([sys.executable, "-c", print_it], capture_output=True, text=True, check=True)
    assert int(done.stdout) == max(1024 * int(size.strip().rstrip("K")) for size in sizes)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 5, 31, 64, 333, 1_000, 40_003])
def test_what_is_streamed_is_the_references(dtype, width, streaming, level):
    """Rows of odd widths start anywhere in a cache line."""
    make = torch.Generator().manual_seed(width)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad = (torch.randn(7, width, generator=make, dtype=torch.float64).to(dtype) for _ in range(2))
    rows = (0.02 + torch.rand(7, generator=make).to(real), *(torch.full((7,), v, dtype=real) for v in (-9, 8.5, 0.5)))
    assert_same(OPS["fake_quantize"](x, *rows), OPS["fake_quantize"].reference(x, *rows))
    found = OPS["fake_quantize_backward"](grad, x, *rows)
    expected = OPS["fake_quantize_backward"].reference(grad, x, *rows)
    assert_same(found[0], expected[0])
    exact = OPS["fake_quantize_backward"].reference(*(t.double() for t in (grad, x, *rows)))
    for f, e, exactly in zip(found[1:], expected[1:], exact[1:], strict=True):
        assert (f - exactly).abs().max() <= 2 * (e - exactly).abs().max() + 2**-16 * exactly.abs().max()


@needs_extension
@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 40_007])
def test_the_floor_of_the_benches_copies_and_adds(n, level):
    a, b = torch.randn(n + 1)[1:], torch.randn(n)
    for second, expected in ((None, a), (b, a + b)):
        to = torch.empty(n)
        torch.ops.sgsc._stream(a, second, to)
        assert_same(to, expected)


def on_unit_grid(x: Tensor) -> Tensor:
    one = torch.ones(len(x))
    return fake_quantize(x, one, -8 * one, 7 * one)


def held_since() -> Callable[[], tuple[int, int]]:
    """Bytes used and free beyond what other tests keep alive."""
    release_memory()
    others = held_memory()[0]
    return lambda: (held_memory()[0] - others, held_memory()[1])


@needs_extension
def test_memory_of_large_results_is_used_again():
    held = held_since()
    x = torch.randn(64, LARGE // 64)
    first = on_unit_grid(x)
    where = first.data_ptr()
    assert held() == (first.nbytes, 0)
    view = first[1:].detach()
    del first
    assert held() == (x.nbytes, 0)  # a view still looks at it
    assert on_unit_grid(x).data_ptr() != where
    del view
    assert held() == (0, 2 * x.nbytes)
    assert on_unit_grid(x).data_ptr() == where  # the latest to come back is the first to go
    release_memory()
    assert held() == (0, 0)


@needs_extension
def test_memory_is_never_handed_out_twice_and_never_more_than_was_once_in_use():
    """Against a model: what lives, by its addresses and its contents."""
    held = held_since()
    draw = random.Random(0)
    live: list[tuple[Tensor, Tensor]] = []
    peak, seen, again = 0, set(), 0
    for step in range(400):
        if live and (len(live) > 6 or draw.random() < 0.5):
            q, expected = live.pop(draw.randrange(len(live)))
            assert_same(q, expected)
            del q
        else:
            x = torch.full(
                (draw.choice((4, 5, 16)), draw.choice((LARGE // 16, LARGE // 8, LARGE // 16 + 1))), step % 7.0
            )
            q = on_unit_grid(x)
            again += q.data_ptr() in seen
            seen.add(q.data_ptr())
            live.append((q, x))
        spans = sorted((q.data_ptr(), q.data_ptr() + q.nbytes) for q, _ in live)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(begin % 64 == 0 for begin, _ in spans)
        used, free = held()
        assert sum(q.nbytes for q, _ in live) <= used <= 1.3 * sum(q.nbytes for q, _ in live) + 4096
        peak = max(peak, used)
        assert used + free <= peak
    assert again > 50
    live.clear()
    release_memory()
    assert held() == (0, 0)


@needs_extension
def test_many_threads_share_the_memory():
    held = held_since()

    def work(seed: int) -> None:
        kept = []
        for i in range(30):
            x = torch.full((4, LARGE // 8), float((seed + i) % 7))
            kept.append((on_unit_grid(x), x))
            if i % 3 == 2:
                for q, expected in kept:
                    assert_same(q, expected)
                kept.clear()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert held()[0] == 0


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_memory_that_nobody_has_written_is_nan_here(dtype):
    """conftest.py asks torch for it: a kernel that leaves out an element of a large result is then found."""
    like = torch.zeros(512, 512, dtype=dtype)
    for _ in range(2):
        found = torch.ops.sgsc._uninitialised(like)
        assert found.isnan().all()
        found.zero_()
        del found


@needs_extension
def test_large_results_are_tensors_like_any_other():
    x = 5 * torch.randn(64, LARGE // 64)
    expected = OPS["fake_quantize"].reference(x, *(v * torch.ones(64) for v in (1, -8, 7, 0)))
    q = on_unit_grid(x)
    twin = copy.deepcopy(q)
    assert_same(q.add_(1).mul_(2).sub_(2).div_(2), expected)
    assert_same(twin, expected)
    assert_same(ForkingPickler.loads(ForkingPickler.dumps(q)), expected)  # as to another process: moves the storage
    shared = on_unit_grid(x).share_memory_()
    assert shared.is_shared()
    assert_same(shared, expected)
    assert_same(q.resize_(64, 8), expected.flatten()[:512].view(64, 8))
    with pytest.raises(RuntimeError, match="not resizable"):
        q.resize_(64, LARGE)


@needs_extension
def test_gradients_taken_twice_are_the_same():
    x = torch.randn(64, LARGE // 64, requires_grad=True)
    y = (on_unit_grid(x) * x.detach()).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    second = torch.autograd.grad(y, x)[0]
    assert first.data_ptr() != second.data_ptr()
    assert_same(first, second)


@needs_extension
@pytest.mark.parametrize(
    "end",
    [
        "import atexit; atexit.register(lambda: print(float(q.sum())))",  # after the interpreter has cleaned up
        "import builtins; builtins.kept = q",
        "import threading; threading.Thread(target=lambda: (__import__('time').sleep(0.3), q.sum())).start()",
        "import os\npid = os.fork()\nif pid == 0:\n    r = make(); del r; os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0",
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_results_may_outlive_the_interpreter_and_processes_may_fork(end):
    program = (
        "import torch; torch.set_num_threads(1); from sgsc.kernels import fake_quantize\n"
        "make = lambda: fake_quantize(torch.ones(64, 8192), *(v * torch.ones(64) for v in (1, -8, 7)))\n"
        f"q = make()\n{end}\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")
