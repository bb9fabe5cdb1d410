"""The quantizer primitive: its values bit for bit, its gradients against the formula, alone, in lists and compiled."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config as inductor

from sgsc.kernels import OPS, fake_quantize, fake_quantize_many
from tests.checks import as_list, assert_close_to, assert_same


def near_ties(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Values on, just below and just above every tie of some awkward grids."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([0.1, 1 / 3, 0.3, 1.0, 7e-3, 1e-30, 3.3e30], dtype=real)
    tie = ((torch.arange(-20, 20) + 0.5).to(real) * scale[:, None]).to(dtype)
    up, down = torch.full((), float("inf"), dtype=dtype), torch.full((), -float("inf"), dtype=dtype)
    x = torch.cat([tie, torch.nextafter(tie, up), torch.nextafter(tie, down)], 1)
    ends = torch.ones(len(scale), dtype=real)
    return x, scale, -15.5 * ends, 15.25 * ends, torch.tensor([0, 0.5, 0, 0, 0.5, 0, 0], dtype=real)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_next_to_a_tie_are_the_references(dtype, level):
    x, *rest = near_ties(dtype)
    rows = x.isfinite().all(1) & (x != 0).any(1)  # a scale may lie outside the range of the dtype
    x, *rest = (t[rows] for t in (x, *rest))
    assert len(x) >= 4
    assert_same(OPS["fake_quantize"](x, *rest), OPS["fake_quantize"].reference(x, *rest))


@pytest.mark.parametrize("name", ["fake_quantize", "fake_quantize_many"])
def test_values_of_all_cases_are_the_references(name, level):
    for case, arguments in OPS[name].cases().items():
        for f, p in zip(as_list(OPS[name](*arguments)), as_list(OPS[name].reference(*arguments)), strict=True):
            assert_same(f, p, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_goes_in_and_out_like_torchs(dtype, level):
    """All 65,536, on grids where results round, fall on ties, underflow and overflow."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).repeat(7, 1)
    scale = torch.tensor([1.0, 3.3e-8, 1e-3, 1 + 2.0**-8, 1 + 2.0**-11, 1.1e4, 1e-41])
    end = torch.full((7,), 2.0**22)
    arguments = (x, scale, -end, end, torch.zeros(7))
    assert_same(OPS["fake_quantize"](*arguments), OPS["fake_quantize"].reference(*arguments))
    gradient = OPS["fake_quantize_backward"](x, *arguments)[0]
    assert_same(gradient, OPS["fake_quantize_backward"].reference(x, *arguments)[0])


def test_a_row_without_a_grid_is_zeros_whatever_it_holds(level):
    odd = torch.tensor([[float("nan"), float("inf"), 1.0] * 5] * 4)
    lo = torch.tensor([0.0, 1.0, float("nan"), 0.0])
    hi = torch.tensor([0.0, -1.0, 1.0, float("nan")])
    grid_of = (torch.tensor([1.0, 0.0, 1.0, float("nan")]), lo, hi, torch.zeros(4))
    for result in (OPS["fake_quantize"](odd, *grid_of), *OPS["fake_quantize_backward"](odd, odd, *grid_of)):
        assert_same(result, torch.zeros_like(result))


def test_nan_and_infinity_in_gradients_are_the_references(level):
    x = torch.tensor([[0.3, float("nan"), float("inf"), -float("inf"), 0.2, 9.0, -9.0, 0.1, 0.4]])
    one = torch.ones(1)
    for bad in (0, 1, 2, 5):
        for value in (float("nan"), float("inf"), 1.0):
            grad = torch.ones(1, 9)
            grad[0, bad] = value
            clean = x.nan_to_num(0.0, 50.0, -50.0)
            for rows in (x, clean):
                arguments = (grad, rows, 0.5 * one, -2 * one, one, 0 * one)
                found = OPS["fake_quantize_backward"](*arguments)
                for f, e in zip(found, OPS["fake_quantize_backward"].reference(*arguments), strict=True):
                    assert torch.allclose(f, e, equal_nan=True)


@pytest.mark.parametrize("width", [1, 7, 8, 9, 300])
def test_a_step_of_zero_puts_all_outside(width, level):
    """0 / 0 is NaN: what fills up the last vector may not reach the sums."""
    x, one = torch.linspace(-3, 5, width)[None] + 0.01, torch.ones(1)
    arguments = (torch.ones(1, width), x, 0 * one, -2 * one, one, 0 * one)
    found = OPS["fake_quantize_backward"](*arguments)
    for f, e in zip(found, OPS["fake_quantize_backward"].reference(*arguments), strict=True):
        assert f.isfinite().all()
        assert_same(f, e)


def rows_in_double(seed: int = 0) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(5, 37, generator=make, dtype=torch.float64)
    scale = 0.2 + torch.rand(5, generator=make, dtype=torch.float64)
    lo = torch.tensor([-4.0, -3.3, -1.0, 0.0, 2.0], dtype=torch.float64)
    hi = torch.tensor([3.0, 2.6, 0.0, 7.0, 1.0], dtype=torch.float64)
    return x, scale, lo, hi, torch.tensor([0, 0, 0.5, 0, 0], dtype=torch.float64)


def test_gradients_are_the_closed_forms(level):
    """Written out once more, element by element in Python's own numbers."""
    x, scale, lo, hi, shift = rows_in_double()
    grad = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = [torch.zeros_like(t) for t in (x, scale, lo, hi)]
    for c, k in itertools.product(range(x.shape[0]), range(x.shape[1])):
        s, low, high, z, g = (float(t[c]) for t in (scale, lo, hi, shift, grad[:, k]))
        if high <= low:
            continue
        v = float(x[c, k]) / s - z
        if v < low:
            expected[1][c] += g * (round(low) + z)
            expected[2][c] += g * s
        elif v > high:
            expected[1][c] += g * (round(high) + z)
            expected[3][c] += g * s
        else:
            expected[0][c, k] = g
            expected[1][c] += g * (round(v) - v)
    found = OPS["fake_quantize_backward"](grad, x, scale, lo, hi, shift)
    for f, e in zip(found, expected, strict=True):
        assert_close_to(f, e, 1e-13, dtype=torch.float64)


def surrogate(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """The same values, with a rounding that autograd passes straight through."""
    s, low, high, z = (t[:, None] for t in (scale, lo, hi, shift))
    code = torch.minimum(torch.maximum(x / s - z, low), high)
    code = code + (code.round() - code).detach()
    return torch.where(high > low, (code + z) * s, 0.0)


def test_gradients_are_those_of_a_straight_through_surrogate(level):
    leaves = [t.requires_grad_() for t in rows_in_double()]
    up = torch.randn(leaves[0].shape, dtype=torch.float64)
    found = torch.autograd.grad(fake_quantize(*leaves), leaves[:4], up)
    for f, e in zip(found, torch.autograd.grad(surrogate(*leaves), leaves[:4], up), strict=True):
        assert_close_to(f, e, 1e-13, dtype=torch.float64)


def test_gradcheck_outside_the_range(level):
    """There the function is smooth in x, where it is flat, and in scale."""
    x, scale, lo, hi, shift = rows_in_double()
    far = torch.where(x > 0, 20.0, -20.0) + x
    ends = (lo.round(), hi.round(), shift)
    assert torch.autograd.gradcheck(
        lambda a, b: fake_quantize(a, b, *ends), (far.requires_grad_(), scale.requires_grad_())
    )


def test_many_is_each_by_itself(level):
    make = torch.Generator().manual_seed(3)
    shapes = [(4, 9), (1, 20_000), (0, 3), (7, 0), (130, 1)]
    rows = [torch.randn(shape, generator=make).requires_grad_() for shape in shapes]
    grids = [
        tuple(v.requires_grad_(i < 3) for i, v in enumerate((0.3 * one, -2 * one, 1.5 * one, 0 * one)))
        for one in (torch.ones(c) for c, _ in shapes)
    ]
    leaves = [*rows, *(v for g in grids for v in g[:3])]
    together, apart = fake_quantize_many(rows, grids), [fake_quantize(x, *g) for x, g in zip(rows, grids, strict=True)]
    ups = [torch.randn(shape, generator=make) for shape in shapes]
    for t, a in zip(together, apart, strict=True):
        assert_same(t, a)
    grads = [torch.autograd.grad([y for y, up in zip(ys, ups, strict=True)], leaves, ups) for ys in (together, apart)]
    for t, a in zip(*grads, strict=True):
        assert_same(t, a)


def test_what_is_not_used_gets_no_gradient():
    rows = [torch.randn(3, 5).requires_grad_() for _ in range(3)]
    grid = (torch.ones(3).requires_grad_(), *(v * torch.ones(3) for v in (-2.0, 1.0, 0.0)))
    first, _, last = fake_quantize_many(rows, [grid, grid, grid])
    (first.sum() + 2 * last.sum()).backward()
    assert rows[1].grad is None
    want = [torch.autograd.grad(c * fake_quantize(rows[i], *grid).sum(), rows[i])[0] for i, c in ((0, 1), (2, 2))]
    assert_same(rows[0].grad, want[0])
    assert_same(rows[2].grad, want[1])


def training_step(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    one = fake_quantize(x * 1.5, scale, lo, hi)
    first, second = fake_quantize_many(
        [x, x.t()[:3]], [(scale, lo, hi, 0 * lo), (scale[:3], lo[:3], hi[:3], 0.5 + 0 * lo[:3])]
    )
    return one.square().sum() + (first * x.detach()).sum() + second.sin().sum()


# dynamo itself does what this warning is about
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_training_step_is_the_eager_one(compiler):
    torch._dynamo.reset()
    x, scale, lo, hi = (t.float().requires_grad_() for t in rows_in_double()[:4])
    compiled = torch.compile(training_step, fullgraph=True, backend=compiler)
    results = []
    # caches outlive a change of our fakes
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        for step in (training_step, compiled):
            loss = step(x, scale, lo, hi)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, scale, lo, hi))))
    for e, f in zip(*results, strict=True):
        assert_close_to(f, e.double(), 1e-6)
