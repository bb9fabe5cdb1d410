"""Products launched once more by what Triton compiled for another: only where it would compile the same."""

from itertools import product

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from triton.compiler import CompiledKernel  # noqa: E402

from sgsc.kernels import fragments, triton_launch, triton_packed, triton_packed_kernels  # noqa: E402
from sgsc.kernels.triton_aot import _driver_of  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1: the interpreter compiles nothing"
)


class Compiled(CompiledKernel):
    """What a launch returns; it notes its own."""

    def __init__(self, specialised):
        self.specialised, self.launches = specialised, []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Kernel:
    """`linear_kernel`, which binds arguments as Triton does and compiles nothing."""

    def __init__(self):
        with _driver_of("sm_90"):
            *_, self.bind = triton_packed_kernels.linear_kernel.create_binder()
        self.linear_kernel, self.launches, self.compiled = self, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            bound, specialised, options = self.bind(*arguments, **named)
            self.launches.append((grid, tuple(bound.values())))
            self.compiled.append(Compiled(str((specialised, options))))
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel()
    monkeypatch.setattr(triton_packed, "_products", found)
    monkeypatch.setattr(triton_packed, "INTERPRETED", tl.constexpr(True))
    monkeypatch.setattr(triton_launch, "_compiled", {})
    return found


def arguments(rows=48, width=256, tokens=3, dtype=torch.bfloat16, bias=None, shifted=False, odd=""):
    """Of `linear`; the tensor named by `odd` lies one element further."""
    plan, planes = fragments.plan_tiles(torch.full((rows,), 4, dtype=torch.uint8), fragments.blocks_of(width))
    places = plan.numel() * fragments.tile_size(rows) // (fragments.tile_size(rows) + 2)
    made = {
        "x": torch.ones(tokens, width, dtype=dtype),
        "lines": torch.zeros(planes * fragments.WORDS, dtype=torch.int32),
        "plan": plan,
        "grid": torch.ones(2 if shifted else 1, places),
        "bias": None if bias is None else torch.ones(rows, dtype=bias),
    }
    if odd:
        t = made[odd]
        made[odd] = torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape)
    return *made.values(), rows, width, False


def test_the_second_call_launches_what_the_first_one_did(kernel):
    first, second = arguments(bias=torch.bfloat16), arguments(bias=torch.bfloat16, tokens=2, rows=80)
    triton_packed.linear(*first)
    triton_packed.linear(*second)
    (compiled,) = kernel.compiled
    ((grid, given),) = compiled.launches
    assert grid == (5, 1, 1)
    triton_launch._compiled.clear()
    triton_packed.linear(*second)
    (_, want) = kernel.launches[-1]
    assert len(given) == len(want) == len(triton_packed_kernels.linear_kernel.arg_names)
    for name, a, b in zip(triton_packed_kernels.linear_kernel.arg_names, given, want, strict=True):
        if name == "y":
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        else:
            assert a is b or a == b, name


def test_equal_keys_mean_that_the_same_is_compiled(kernel, monkeypatch):
    found = {}
    monkeypatch.setattr(triton_launch, "again", lambda *given: False)
    monkeypatch.setattr(
        triton_launch, "remember", lambda key, compiled, *rest: found.setdefault(key, set()).add(compiled.specialised)
    )
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    grids = {(rows, width) for rows in (48, 1_024) for width in (1, 24, 250, 256, 8_192)}
    for early in (True, False):
        monkeypatch.setattr(triton_packed, "starts_early", lambda c, here, early=early: early)
        for (rows, width), tokens, dtype in product(grids, (1, 2, 100), dtypes):
            for bias, shifted in ((None, False), (torch.float32, False), (dtype, False), (dtype, True)):
                triton_packed.linear(*arguments(rows, width, tokens, dtype, bias, shifted))
    assert len(found) > 100
    assert all(len(specialised) == 1 for specialised in found.values())
    assert len({one for (one,) in found.values()}) > len(found) / 2  # few keys are more than they need be


@pytest.mark.parametrize("early", [True, False])
def test_a_launch_starts_early_by_the_kernel_and_by_the_option(kernel, early, monkeypatch):
    """One without the other would wait for nothing, or read what is not there yet."""
    monkeypatch.setattr(triton_packed, "starts_early", lambda c, here: early)
    triton_packed.linear(*arguments())
    ((_, given),) = kernel.launches
    assert dict(zip(triton_packed_kernels.linear_kernel.arg_names, given, strict=True))["EARLY"] is early
    assert ("'launch_pdl': True" in kernel.compiled[0].specialised) is early


def test_other_types_are_not_taken_for_the_same(kernel):
    x, lines, plan, grid, *rest = arguments()
    for some in ((plan, grid), (plan.long(), grid), (plan, grid.double())):
        triton_packed.linear(x, lines, *some, *rest)
    assert len({one.specialised for one in kernel.compiled}) == len(kernel.compiled) == 3


@pytest.mark.parametrize("odd", ["x", "lines", "plan", "grid", "bias"])
def test_what_is_not_aligned_is_left_to_triton(kernel, odd):
    some = {"width": 256, "bias": torch.bfloat16}
    triton_packed.linear(*arguments(**some, odd=odd))
    assert triton_launch._compiled == {}
    triton_packed.linear(*arguments(**some))
    triton_packed.linear(*arguments(**some, odd=odd))
    assert [len(one.launches) for one in kernel.compiled] == [0, 0, 0]
    triton_packed.linear(*arguments(**some))
    assert [len(one.launches) for one in kernel.compiled] == [0, 1, 0]


def test_a_gpu_of_its_own(kernel, monkeypatch):
    """A kernel is loaded on one GPU."""
    keys = []
    monkeypatch.setattr(triton_launch, "remember", lambda key, *rest: keys.append(key))
    triton_packed.linear(*arguments())
    assert keys[0][0] is None  # the index of x's device


def test_the_interpreter_is_not_kept(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    triton_launch.remember("key", None, (), ())
    assert triton_launch._compiled == {}
