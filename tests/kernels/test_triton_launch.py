"""Products launched once more by what Triton compiled for another: only where it would compile the same."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language

from triton.compiler import CompiledKernel  # noqa: E402

from sgsc.kernels import fragments, run_form, triton_launch, triton_packed, triton_packed_kernels  # noqa: E402
from sgsc.kernels import triton_depthwise_kernels as depthwise  # noqa: E402
from sgsc.kernels.packed_conv2d import _case as conv2d_case  # noqa: E402
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
    """A kernel that binds arguments as Triton does and compiles nothing; those of a layer have their notes together."""

    def __init__(self, kernel, notes=None):
        with _driver_of("sm_90"):
            *_, self.bind = kernel.create_binder()
        self.arg_names, notes = kernel.arg_names, notes or self
        if notes is self:
            self.launches, self.compiled = [], []
        else:
            self.launches, self.compiled = notes.launches, notes.compiled

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            bound, specialised, options = self.bind(*arguments, **named)
            assert tuple(named)[: len(bound) - len(arguments)] == tuple(self.arg_names[len(arguments) :])
            self.launches.append((grid, tuple(bound.values())))
            self.compiled.append(Compiled(str((self.arg_names, specialised, options))))
            return self.compiled[-1]

        return launch


@pytest.fixture
def kernel(monkeypatch):
    found = Kernel(triton_packed_kernels.linear_kernel)
    conv2d = Kernel(triton_packed_kernels.conv2d_kernel, found)
    slides = SimpleNamespace(depthwise_kernel=Kernel(depthwise.depthwise_kernel, found))
    monkeypatch.setattr(triton_packed, "_products", SimpleNamespace(linear_kernel=found, conv2d_kernel=conv2d))
    monkeypatch.setattr(triton_packed, "_slides", slides)
    monkeypatch.setattr(triton_packed, "INTERPRETED", tl.constexpr(True))
    monkeypatch.setattr(triton_launch, "_compiled", {})
    monkeypatch.setitem(run_form.FORMS, "cpu", run_form.FRAGMENTS)
    return found


def specialisations(kernel, monkeypatch):
    """What a launch was compiled for, by its key; every launch is a first one."""
    found, first = {}, triton_launch.first

    def note(key, *rest):
        first(key, *rest)
        found.setdefault(key, set()).add(kernel.compiled[-1].specialised)

    monkeypatch.setattr(triton_launch, "again", lambda *given: False)
    monkeypatch.setattr(triton_launch, "first", note)
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
    found = specialisations(kernel, monkeypatch)
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


CONVOLUTIONS = [
    {"inputs": 5}, {"inputs": 16}, {"inputs": 16, "channels": 150, "size": (33, 16), "stride": (2, 1)},
    {"inputs": 16, "kernel": (1, 1), "padding": (0, 0), "size": (1, 1)}, {"inputs": 8, "groups": 2, "channels": 20},
    {"inputs": 9, "groups": 9}, {"inputs": 9, "groups": 9, "size": (64, 16), "dilation": (16, 1), "batch": 16},
    {"inputs": 9, "groups": 9, "dilation": (1, 2)}, {"inputs": 6, "channels": 6, "groups": 2, "kernel": (3, 5)},
]  # fmt: skip


def test_equal_keys_of_convolutions_mean_that_the_same_is_compiled(kernel, monkeypatch):
    found = specialisations(kernel, monkeypatch)
    for shape, dtype in product(CONVOLUTIONS, (torch.float32, torch.float16, torch.bfloat16)):
        for with_bias, shift in ((True, 0.0), (False, 0.0), (True, 0.5)):
            triton_packed.convolution(*conv2d_case(**shape, dtype=dtype, with_bias=with_bias, shift=shift))
    assert len(kernel.launches) == 9 * len(CONVOLUTIONS)
    assert len(found) > 40
    assert all(len(specialised) == 1 for specialised in found.values())
    assert len({one for (one,) in found.values()}) > len(found) / 2


@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=lambda shape: "-".join(map(str, shape.values())))
def test_the_second_convolution_launches_what_the_first_one_did(kernel, shape):
    given = conv2d_case(**shape)
    triton_packed.convolution(*given)
    triton_packed.convolution(*given)
    (compiled,), ((_, want),) = kernel.compiled, kernel.launches
    ((_, again),) = compiled.launches
    assert len(again) == len(want)
    for a, b in zip(again, want, strict=True):  # y is another tensor, x where it was not as the kernel reads it
        assert a is b or (a.shape, a.dtype) == (b.shape, b.dtype) if isinstance(a, torch.Tensor) else a == b


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
    monkeypatch.setattr(triton_launch, "first", lambda key, *rest: keys.append(key))
    triton_packed.linear(*arguments())
    assert keys[0][0] is None  # the index of x's device


def test_the_interpreter_is_not_kept(monkeypatch):
    monkeypatch.setattr(triton_launch, "_compiled", {})
    triton_launch.first("key", {(1, 1, 1): lambda *given, **named: None}, (1, 1, 1), (), (), {}, {})
    assert triton_launch._compiled == {}
