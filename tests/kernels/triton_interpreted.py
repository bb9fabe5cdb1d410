"""Checks of the Triton kernels, on any device; as a program, through Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_interpreted [CHECK ...]

It prints "CHECK holds" of each that does. The interpreter has to be chosen before triton is imported: hence a process
of its own.
"""

import ctypes
import mmap
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl

from sgsc.kernels import triton_fake_quantize as ours
from sgsc.kernels import triton_fake_quantize_kernels as programs
from sgsc.kernels.fake_quantize import backward_cases, cases, reference, reference_backward
from sgsc.kernels.triton_compat import narrow, rint
from tests.kernels import triton_interpreted_drawn as drawn
from tests.kernels import triton_interpreted_packed as packed

PROT_NONE = 0  # of mprotect(2)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- comparisons ----


def assert_same(actual, expected, what=""):
    """Bit for bit, the sign of zero too; any NaN equals any other."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    integer = INTEGERS[actual.element_size()]
    same = actual.contiguous().view(integer) == expected.contiguous().view(integer)
    wrong = ~(same | (actual.isnan() & expected.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(f"{what}: {actual[at].item()!r} at {at}, expected {expected[at].item()!r}")


def assert_as_good(actual, plain, terms, what=""):
    """Sums of the (C, K) terms, with at most twice the error of plain PyTorch, measured against float64.

    Errors are in units of the sum of the terms' sizes; two float32 steps of it are always allowed, as plain PyTorch
    may be right by luck.
    """
    exact, unit = terms.double().sum(1), terms.double().abs().sum(1).clamp_min(1e-30)
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error, theirs = (((t.double() - exact).abs() / unit).max().item() for t in (actual, plain))
    allowed = max(2 * theirs, 2.0**-22)
    assert error <= allowed, f"{what}: error {error:.2e} of the terms, allowed {allowed:.2e}"  # NaN <= x is False


def assert_same_gradients(actual, arguments, what=""):
    """The gradient of x bit for bit; the row sums against float64 sums of the terms, an element a row, in float32."""
    plain = reference_backward(*arguments)
    grad, x, *grid = arguments
    each = reference_backward(grad.reshape(-1, 1), x.reshape(-1, 1), *(v.repeat_interleave(x.shape[1]) for v in grid))
    assert_same(actual[0], plain[0], f"{what}, gradient of x")
    for name, a, p, terms in zip(("scale", "lo", "hi"), actual[1:], plain[1:], each[1:], strict=True):
        assert_as_good(a, p, terms.view(x.shape), f"{what}, gradient of {name}")


# ---- inputs ----


def random_case(channels, width, dtype, make):
    """Any mix of depths, removed rows, fractional ends and both kinds of grid; many values beyond the ends."""
    bits = 9 * torch.rand(channels, generator=make) - 1
    half = torch.where(bits > 0, torch.exp2(bits - 1), 0.0)
    half = torch.where(torch.rand(channels, generator=make) < 0.5, half.round(), half)
    shift = torch.randint(0, 2, (channels,), generator=make) / 2.0
    scale = torch.exp2(8 * torch.randn(channels, generator=make).clamp(-1, 1) - 4)
    x = (torch.randn(channels, width, generator=make) * half[:, None].clamp_min(1) * scale[:, None]).to(dtype)
    return x, scale, -half, (half - 1).clamp_min(-half), shift


def more_cases():
    """Around the edges of this implementation's tiles, by dtype."""
    make = torch.Generator().manual_seed(3)
    shapes = [(1, 2_047), (2, 2_048), (2, 2_049), (3, 4_097), (64, 16), (9, 1_024), (1, 16_384), (1, 16_385)]
    of = {torch.float32: shapes, torch.bfloat16: [(2, 2_049), (65, 17)], torch.float16: [(1, 16_385), (7, 129)]}
    for dtype, wanted in of.items():
        for shape in wanted:
            yield f"{shape} {dtype}", random_case(*shape, dtype, make)


def forward_cases():
    yield from cases().items()
    yield from more_cases()


def gradient_cases():
    yield from backward_cases().items()
    make = torch.Generator().manual_seed(4)
    for name, arguments in more_cases():
        yield name, (torch.randn(arguments[0].shape, generator=make).to(arguments[0].dtype), *arguments)
    x, *grid = random_case(4, 40, torch.float32, make)
    x[1, 3] = float("nan")
    yield "not-a-number", (torch.ones(4, 40), x, *grid)
    yield "expanded gradient", (torch.ones(1, 1).expand(4, 40), x.nan_to_num(), *grid)
    yield "scale of zero", (torch.ones(4, 40), x.nan_to_num(), torch.zeros(4), *grid[1:])
    yield "grid with steps", (torch.ones(4, 40), x.nan_to_num(), *(v.repeat_interleave(2)[::2] for v in grid))


# ---- checks ----


def check_forward(device="cpu"):
    for name, arguments in forward_cases():
        actual = ours.forward(*(t.to(device) for t in arguments)).cpu()
        assert_same(actual, reference(*arguments), name)


def check_backward(device="cpu"):
    for name, arguments in gradient_cases():
        there = [t.to(device) for t in arguments]
        actual = [t.cpu() for t in ours.backward(*there)]
        if name == "not-a-number":
            plain = reference_backward(*arguments)
            assert_same(actual[0], plain[0], name)
            assert all(torch.equal(a.isnan(), p.isnan()) for a, p in zip(actual, plain, strict=True)), name
        else:
            assert_same_gradients(actual, arguments, name)
        if device != "cpu":  # there programs run side by side
            again = [t.cpu() for t in ours.backward(*there)]
            for a, b in zip(actual, again, strict=True):
                assert_same(a, b, f"{name}, a second time")


def check_many(device="cpu"):
    every = [one for name, one in gradient_cases() if name != "not-a-number" and len(one[0]) < 60]  # a program a row
    make = torch.Generator().manual_seed(5)
    odd = torch.randn(4 * 64 + 1, generator=make)[1:].view(4, 64)  # K fits 128-bit loads, the address does not
    every.append((odd.clone(), odd, *random_case(4, 64, torch.float32, make)[1:]))
    every.append(tuple(t.double() for t in every[0]))  # not for the kernels
    lists = [[t.to(device) for t in kind] for kind in zip(*every, strict=True)]
    with mock.patch.object(ours, "_launch", mock.Mock(wraps=ours._launch)) as launches:
        forward = ours.forward_many(*lists[1:])
        gradients = ours.backward_many(*lists)
    assert launches.call_count == 6, f"{launches.call_count} launches, expected one each way for each of three dtypes"
    count = len(every)
    for i, arguments in enumerate(every):
        assert_same(forward[i].cpu(), reference(*arguments[1:]), f"layer {i}")
        assert_same_gradients([t.cpu() for t in gradients[i::count]], arguments, f"layer {i}")
    assert ours.forward_many([], [], [], [], []) == []
    assert ours.backward_many([], [], [], [], [], []) == []


@triton.jit
def _rint_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, rint(tl.load(x + i, mask=i < n)), mask=i < n)


@triton.jit
def _narrow_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, narrow(tl.load(x + i, mask=i < n), out.dtype.element_ty), mask=i < n)


def check_rounding(device="cpu"):
    """Of random bit patterns, of ties, of every bfloat16 and half way between each two."""
    make = torch.Generator().manual_seed(6)
    patterns = torch.randint(-(2**31), 2**31, (200_000,), generator=make, dtype=torch.int64).to(torch.int32)
    halves = (torch.arange(2**16, dtype=torch.int32) - 2**15) << 16
    ties = torch.arange(-600, 600) / 4.0
    large = torch.tensor([2.0**22 - 0.5, 2.0**22 + 0.5, 2.0**23 - 0.5, 2.0**23 + 1, 2.0**24, 0.0, -0.0, 0.49999997])
    x = torch.cat([patterns.view(torch.float32), halves.view(torch.float32), (halves | 0x8000).view(torch.float32)])
    x = torch.cat([x, ties, large, -large]).to(device)
    grid = (triton.cdiv(len(x), 4096),)
    out = torch.empty_like(x)
    _rint_kernel[grid](x, out, len(x), BLOCK=4096)
    assert_same(out.cpu(), x.cpu().round(), "rint")
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty_like(x, dtype=dtype)
        _narrow_kernel[grid](x, out, len(x), BLOCK=4096)
        assert_same(out.cpu(), x.cpu().to(dtype), f"narrow to {dtype}")


def check_removed_rows_are_not_read():
    """The middle row lies on a page that may not be touched: reading it ends the process."""
    page = mmap.PAGESIZE
    x, grad = (torch.frombuffer(mmap.mmap(-1, 3 * page), dtype=torch.float32).view(3, -1) for _ in range(2))
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(7)))
    grid = (torch.ones(3), torch.tensor([-8.0, 0, -8]), torch.tensor([7.0, 0, 7]), torch.zeros(3))
    kept = torch.tensor([0, 2])
    expected = reference(x[kept], *(v[kept] for v in grid))
    for t in (x, grad):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(t[1].data_ptr()), page, PROT_NONE) == 0
    actual = ours.forward(x, *grid)
    for q in (actual, *ours.forward_many([x], *([v] for v in grid))):
        assert_same(q[kept], expected)
        assert_same(q[1], torch.zeros_like(q[1]))
    for gradients in (ours.backward(grad, x, *grid), ours.backward_many([grad], [x], *([v] for v in grid))):
        assert all((t[1] == 0).all() for t in gradients), "a removed row has gradients"


@triton.jit
def _far_row_kernel(grad, x, out, grad_x, sums, scale, lo, hi, shift, row, K, BLOCK: tl.constexpr):
    rows = row + tl.arange(0, 1)
    programs._quantize_tile(x, out, scale, lo, hi, shift, rows, rows >= 0, K, 0, K, BLOCK)
    a, b, c = programs._backward_tile(grad, x, grad_x, scale, lo, hi, shift, rows, rows >= 0, K, 0, K, 1, BLOCK)
    tl.store(sums + tl.arange(0, 1), a)
    tl.store(sums + 1 + tl.arange(0, 1), b)
    tl.store(sums + 2 + tl.arange(0, 1), c)


def check_rows_beyond_32_bits():
    """An element 2.2 billion places from the first, in files that hold only what was written."""
    row, width = 1_100_000, 2_000
    make = torch.Generator().manual_seed(8)
    with tempfile.TemporaryDirectory() as folder:

        def sparse(name):
            size = (row + 1) * width
            return torch.from_file(str(Path(folder, name)), shared=True, size=size, dtype=torch.float32).view(-1, width)

        grad, x, out, grad_x = (sparse(name) for name in ("grad", "x", "out", "grad_x"))
        x[row], grad[row] = 5 * torch.randn(2, width, generator=make)
        grid = [torch.full((row + 1,), value) for value in (1.0, -8.0, 7.0, 0.0)]
        sums = torch.full((3,), float("nan"))
        _far_row_kernel[(1,)](grad, x, out, grad_x, sums, *grid, row, width, BLOCK=1024)
        one = (grad[row:], x[row:], *(v[row:] for v in grid))
        assert_same(out[row:], reference(*one[1:]))
        assert_same_gradients((grad_x[row:], *sums[:, None]), one)


CHECKS = {
    "forward": check_forward,
    "backward": check_backward,
    "many": check_many,
    "rounding": check_rounding,
    **packed.CHECKS,
    **drawn.CHECKS,
    "rows-beyond-32-bits": check_rows_beyond_32_bits,
    "removed-rows-are-not-read": check_removed_rows_are_not_read,  # last, since it ends the process where it fails
}

if __name__ == "__main__":
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 is not set: there would be nothing to run on"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # memory that no one has written reads as NaN
    for name in sys.argv[1:] or CHECKS:
        try:
            CHECKS[name]()
            print(f"{name} holds", flush=True)
        except Exception:
            traceback.print_exc()
