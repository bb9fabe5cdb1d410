"""Checks of the packed products in Triton, on any device; triton_interpreted.py runs them."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from sgsc.kernels import OPS, fragments, run_form, triton_counters, triton_depthwise_kernels, triton_early
from sgsc.kernels import triton_packed as ours
from sgsc.kernels.packed_conv2d import _case as conv2d_case
from sgsc.kernels.triton_configuration import Sliding
from tests.checks import assert_agrees, assert_same

LINEAR, CONV2D = OPS["packed_linear"], OPS["packed_conv2d"]


class Ours:
    """An operation as `assert_agrees` takes it, run by these kernels."""

    exact = False

    def __init__(self, op, device):
        self.name, self.reference, self.device = op.name, op.reference, device

    def __call__(self, *arguments):
        there = [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        if there[0].dim() == 4:  # .to() may keep strides or not; what matters here is that they are kept
            there[0] = self.moved(arguments[0])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the reference's error is float32's
            return ours.IMPLEMENTATIONS[self.name](*there).cpu()

    def moved(self, x):
        if not x.data_ptr() % 16:
            return x.to(self.device, memory_format=torch.preserve_format)
        room = 2 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        there = torch.zeros(room, dtype=x.dtype, device=self.device)  # a copy would lie at a multiple of 16 bytes
        return there.as_strided(x.shape, x.stride(), 1).copy_(x)


@contextmanager
def with_settings(**settings):
    """Fragments as the form of every device, and some constants of the dispatch replaced."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(run_form.FORMS, cpu=run_form.FRAGMENTS))
        if "MANY" in settings:
            stack.enter_context(mock.patch.object(fragments, "MANY", settings.pop("MANY")))
        for name, value in settings.items():
            stack.enter_context(mock.patch.object(ours, name, value))
        yield


def configured(**changes):
    """`configure` with some of its answer replaced; never more parts than there are steps."""
    choose = ours.configure

    def configure(dtype, columns, tiles, size, across, *rest):
        c = choose(dtype, columns, tiles, size, across, *rest)._replace(**changes)
        return c._replace(parts=max(1, min(c.parts, -(-across // c.blocks))))

    return configure


def check_all(op, cases, device, only=lambda name: True):
    for name, arguments in cases.items():
        if only(name):
            assert_agrees(Ours(op, device), arguments, name)


def exact(cases):
    """int8 numerics that round nothing are exact ones, which are compared already."""
    return {name: arguments for name, arguments in cases.items() if name.startswith("exact")}


def check_linear(device="cpu"):
    for many in (10_000, 0):  # rows a tile: 16, 64
        with with_settings(MANY=many):
            check_all(LINEAR, exact(LINEAR.cases()), device)


def check_linear_in_parts(device="cpu"):
    for order, parts, blocks in (("wide", 3, 1), ("narrow", 2, 2), ("wide", 9, 4)):
        with with_settings(configure=configured(order=order, parts=parts, blocks=blocks), MANY=0):
            few = {n: c for n, c in exact(LINEAR.cases()).items() if "wider" in n or "deployment" in n}
            assert len(few) >= 4
            check_all(LINEAR, few, device)


def check_counters(device="cpu"):
    """Products with K in parts leave their counters as they found them, and the next ones, of other sizes, use them."""
    make = torch.Generator().manual_seed(2)

    def product(rows, width, tokens):
        plan, planes = fragments.plan_tiles(
            torch.randint(0, 9, (rows,), generator=make, dtype=torch.uint8), width // 128
        )
        words = torch.randint(-(2**31), 2**31, (planes * fragments.WORDS,), generator=make, dtype=torch.int32)
        x, grid = torch.randn(tokens, width, generator=make), torch.ones(1, 16 * (len(plan) // 18))
        return x, words, plan, grid, None, rows, width, False

    products = [product(48, 512, 3), product(16, 1024, 1), product(96, 512, 20)]
    none = mock.patch.dict(triton_counters._kept, clear=True)
    with with_settings(configure=configured(parts=2, blocks=2, columns=8)), none:
        first = [Ours(LINEAR, device)(*some) for some in products]
        kept = dict(triton_counters._kept)
        assert len(kept) == 1, f"counters of {len(kept)} streams, expected one"
        for some, y in zip(products, first, strict=True):
            assert_agrees(Ours(LINEAR, device), some)
            assert_same(Ours(LINEAR, device)(*some), y)
            assert not any(counters.any() for counters in kept.values()), "a counter is not zero"
        assert triton_counters._kept == kept


@triton.jit
def _shares_kernel(first, count, planes):
    mine, some = triton_early.share_of(planes)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(first + place, mine)
    tl.store(count + place, some)


def check_shares(device="cpu"):
    """What programs fetch before they may read lies within the words, and is all of them unless there are many."""
    for programs, planes in ((1, 1), (7, 3), (7, 7), (7, 20), (16, 128), (3, 400), (4, 512)):
        first, count = torch.full((2, 2, programs), -1, dtype=torch.int32, device=device)
        _shares_kernel[(programs, 2)](first, count, planes)
        found = [(a, a + n) for a, n in zip(first[0].tolist(), count[0].tolist(), strict=True) if n > 0]
        assert found == sorted(found, reverse=True), "the last planes are not the first programs'"
        fetched = [plane for begin, end in found for plane in range(begin, end)]
        assert len(set(fetched)) == len(fetched) == min(planes, programs * 128)
        assert set(fetched) <= set(range(planes)), f"{programs} programs fetch beyond {planes} planes"
        assert not count[1].any(), "two groups of columns fetch the same"


def check_many_tokens(device="cpu"):
    """The dense path, in both numerics."""
    with with_settings(DENSE=-1):
        # on a grid either numerics are the exact ones here: see `check_static`
        cases = {name: case for name, case in LINEAR.cases().items() if not name.startswith("static")}
        if device == "cpu":  # by one matmul whatever the width; the widest take the interpreter half a minute
            check_all(LINEAR, cases, device, lambda name: "too-wide" not in name and "at-its-end" not in name)
        else:  # cuBLAS takes more than 16 rows
            check_all(LINEAR, cases, device, lambda name: "17-rows" in name or "exact" in name)


STATIC_HALVES = ("static-bfloat16", "static-float16")


def check_static(device="cpu"):
    """A grid of x is applied first; few columns and many, in either numerics."""
    for op, few, many in ((LINEAR, "-17-rows", "DENSE"), (CONV2D, "", "DENSE_PIXELS")):
        for settings in ({}, {many: -1}):
            with with_settings(linear_reference=refused, conv2d_reference=refused, **settings):
                cases = {name: case for name, case in op.cases().items() if name.startswith("static")}
                slow = "nan", *(["many-pixels"] if device == "cpu" else [])  # see `check_conv2d` for many
                some = [name for name in cases if few in name and not any(word in name for word in slow)][:8]
                some += [name for name in cases if name.startswith("static-exact")]
                assert len(some) >= 9
                check_all(op, {name: cases[name] for name in some}, device)
    halves = {name: LINEAR.cases()[name] for name in STATIC_HALVES}
    for settings in ({}, {"DENSE": -1}):
        with with_settings(**settings):
            check_all(LINEAR, {name: (*case[:7], False, *case[8:]) for name, case in halves.items()}, device)


def refused(*_, **__):
    raise AssertionError("left to the reference, or to a dense copy of the weights")


def check_conv2d(device="cpu"):
    """By the kernels alone, groups and depthwise layers too, but for one of more levels than they read."""
    for many in (10_000, 0):  # rows a tile: 16, 64
        with with_settings(conv2d_reference=refused, dense=refused, MANY=many):
            few = {name: case for name, case in exact(CONV2D.cases()).items() if "depthwise-deep" not in name}
            if not many:
                some = ("exact-groups-of-a-tile-and-one", "exact-depthwise-multiplier")
                few = {f"{name}, 64 rows a tile": few[name] for name in some}
            assert sum(case[10] > 1 for case in few.values()) >= (12 if many else 2)
            check_all(CONV2D, few, device)


def check_channels_in_runs(device="cpu"):
    """Channels last, 16 neighbours read together; one element further they are not aligned, and are read one by one."""
    with with_settings(MANY=0):
        for order, parts in (("wide", 1), ("narrow", 2)):
            with mock.patch.object(ours, "configure", configured(order=order, parts=parts)):
                for groups in (1, 2):
                    x, *rest = conv2d_case(channels=20, inputs=32, size=(5, 7), stride=(2, 1), groups=groups)
                    odd = torch.zeros(x.numel() + 1).as_strided(x.shape, (1120, 1, 224, 32), 1).copy_(x)
                    for some in (x.to(memory_format=torch.channels_last), odd):
                        assert some.stride(1) == 1
                        what = f"{order}, {groups} groups, from {some.data_ptr() % 16}"
                        assert_agrees(Ours(CONV2D, device), (some, *rest), what)


def check_many_pixels(device="cpu"):
    """Torch's own convolution of x as it lies, by weights that lie so too: it converts x where weights ask for it."""

    def conv2d(x, weight, *rest):
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        assert weight.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        layouts.add(last)
        return F.conv2d(x, weight, *rest)

    layouts = set()
    with with_settings(DENSE_PIXELS=-1, F=SimpleNamespace(conv2d=conv2d)):
        check_all(CONV2D, exact(CONV2D.cases()), device)
        some = conv2d_case(channels=20, inputs=32, size=(5, 7), groups=2)
        assert_agrees(Ours(CONV2D, device), (some[0].to(memory_format=torch.channels_last), *some[1:]), "in runs")
    assert layouts == {True, False}


def check_every_level(device="cpu"):
    """A row of x with one value selects one weight: nothing is rounded, so it shows each level bit for bit."""
    make = torch.Generator().manual_seed(1)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for bits in range(1, 9):
            levels = torch.randint(0, 1 << bits, (16, 256), generator=make, dtype=torch.uint8)
            levels[0, :128] = torch.arange(128) % (1 << bits)
            levels[1, :128] = (255 - torch.arange(128)) % (1 << bits)
            widths = torch.full((16,), bits, dtype=torch.uint8)
            centre = 2.0 ** (bits - 1)
            plan, planes = fragments.plan_tiles(widths, 2)
            words = fragments.fragment(levels, plan, 16, 256, 1, planes)
            grid, rows = torch.ones(1, 16), fragments.parts_of(plan, torch.ones(1, 16))[2]
            assert sorted(rows.tolist()) == list(range(16))
            half = device == "cpu" and dtype != torch.float32  # the interpreter takes its time: all levels, once
            for order in ("wide",) if half else ("wide", "narrow"):
                with with_settings(configure=configured(order=order)):
                    x = torch.eye(256, dtype=dtype)[: 128 if half else 256]
                    y = Ours(LINEAR, device)(x, words, plan, grid, None, 16, 256, False)
                    right = (levels[:, : len(x)].float() - centre).to(dtype).t().contiguous()
                    assert_same(y + 0.0, right + 0.0, f"{bits}, {order}")
            with with_settings(DENSE=-1):
                y = Ours(LINEAR, device)(x, words, plan, grid, None, 16, 256, False)
                assert_same(y + 0.0, right + 0.0, f"{bits}, dense")


def check_every_depthwise_level(device="cpu"):
    """Sums of integers, which are exact, under a kernel of as many places as are read from words."""
    down, across = 8, 12
    assert down * across == triton_depthwise_kernels.MOST
    make = torch.Generator().manual_seed(2)
    x = torch.randint(-8, 9, (4, 16, down, across), generator=make).float()
    for bits in range(1, 9):
        levels = torch.randint(0, 1 << bits, (16, down * across), generator=make, dtype=torch.uint8)
        levels[0], levels[1] = 0, (1 << bits) - 1
        plan, planes = fragments.plan_tiles(torch.full((16,), bits, dtype=torch.uint8), 1)
        words = fragments.fragment(levels, plan, 16, down * across, 1, planes)
        for offset in (-(2.0 ** (bits - 1)), 0.25)[: 1 + (bits == 5)]:
            grid = torch.ones(1, 16) if offset < 0 else torch.stack([torch.ones(16), torch.full((16,), offset)])
            geometry = ([down, across], [1, 1], [0, 0], [1, 1], 16)
            one = Sliding(32, 16, across // 2, 1)  # program, as they take turns here
            with with_settings(conv2d_reference=refused, dense=refused, sliding=lambda *_, one=one: one):
                y = Ours(CONV2D, device)(x, words, plan, grid, None, 16, *geometry, False)
            expected = ((levels.float() + offset) * x.flatten(2)).sum(2)
            assert_same(y.flatten(1) + 0.0, expected + 0.0, f"{bits} bits, {offset}")


def check_large_floats(device="cpu"):
    """float32 that bfloat16 would round to infinity, and values whose low bits only the last part holds."""
    x = torch.tensor([[3.4e38, 0, 0], [1 + 2.0**-23, 0, 0], [-(1 - 2.0**-24), 2.0**-100, 0], [1e-38, 0, 3e-39]])
    widths = torch.full((3,), 8, dtype=torch.uint8)
    levels = torch.tensor([[129, 128, 128], [128, 129, 128], [128, 128, 129]], dtype=torch.uint8)
    plan, planes = fragments.plan_tiles(widths, 1)
    words = fragments.fragment(levels, plan, 16, 3, 1, planes)
    y = Ours(LINEAR, device)(x, words, plan, torch.ones(1, 16), None, 3, 3, False)
    expected = x if device == "cpu" else torch.where(x.abs() < 1.2e-38, y, x)  # tensor cores may flush these
    assert_same(y, expected)


CHECKS = {
    "packed-linear": check_linear,
    "packed-linear-in-parts": check_linear_in_parts,
    "packed-counters": check_counters,
    "packed-shares": check_shares,
    "packed-linear-of-many-tokens": check_many_tokens,
    "packed-static": check_static,
    "packed-conv2d": check_conv2d,
    "packed-conv2d-channels-in-runs": check_channels_in_runs,
    "packed-conv2d-of-many-pixels": check_many_pixels,
    "packed-every-level": check_every_level,
    "packed-every-depthwise-level": check_every_depthwise_level,
    "packed-large-floats": check_large_floats,
}
