"""What every quantizer promises, and what each one's formula says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgsc.kernels import fake_quantize
from sgsc.quantizers import LSQ, QUANTIZERS, PublishedSelfCompressing, SelfCompressing, make_quantizer
from tests.checks import assert_same


def rows_and(name: str, channels: int = 12, width: int = 40, seed: int = 0):
    make = torch.Generator().manual_seed(seed)
    rows = torch.randn(channels, width, generator=make)
    quantizer = make_quantizer(name, channels).eval()  # as it will be stored
    with torch.no_grad():
        quantizer.get_parameter("bit_depth").copy_(torch.rand(channels, generator=make) * 9 - 0.5)
    if name == "published":
        with torch.no_grad():
            quantizer.get_parameter("bit_depth").clamp_(max=8)
            quantizer.get_parameter("exponent").fill_(-2.0)
    quantizer.fit(rows)
    return rows, quantizer


def real(codes):
    values = (codes.levels.float() + codes.offset[:, None]) * codes.scale[:, None]
    return torch.where(codes.bits[:, None] > 0, values, 0.0)


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
class TestEveryQuantizer:
    @pytest.mark.parametrize("seed", range(5))
    def test_what_is_stored_is_what_was_trained(self, name, seed):
        rows, quantizer = rows_and(name, seed=seed)
        assert torch.equal(real(quantizer.codes(rows)), quantizer(rows).detach())

    def test_levels_fit_their_width(self, name):
        rows, quantizer = rows_and(name, channels=40)
        codes = quantizer.codes(rows * 100)
        assert (codes.levels.int() < (1 << codes.bits.int())[:, None]).all()

    def test_rounding_twice_changes_nothing(self, name):
        rows, quantizer = rows_and(name)
        once = quantizer(rows).detach()
        assert torch.equal(quantizer(once).detach(), once)

    def test_a_channel_without_depth_is_zero(self, name):
        rows, quantizer = rows_and(name)
        with torch.no_grad():
            quantizer.get_parameter("bit_depth").fill_(-0.3)
        assert (quantizer(rows) == 0).all()
        assert (quantizer.bits() == 0).all()
        assert (quantizer.bit_cost() == 0).all()

    def test_more_depth_never_costs_less(self, name):
        _, quantizer = rows_and(name)
        with torch.no_grad():
            quantizer.get_parameter("bit_depth").copy_(torch.linspace(-1, 8, 12))
        assert (quantizer.bit_cost().diff() >= 0).all()
        assert (quantizer.bits().int().diff() >= 0).all()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite_are_refused(self, name, bad):
        rows, quantizer = rows_and(name)
        rows[3, 4] = bad
        with pytest.raises(ValueError, match="NaN or infinity"):
            quantizer.codes(rows)

    def test_a_scale_that_is_not_finite_is_refused(self, name):
        rows, quantizer = rows_and(name)
        with torch.no_grad():
            quantizer.get_parameter("bit_depth").fill_(4.0)
            next(p for n, p in quantizer.named_parameters() if n != "bit_depth")[2] = float("nan")
        with pytest.raises(ValueError, match="scale is not positive and finite"):
            quantizer.codes(rows)


def test_a_name_that_is_not_known_is_refused():
    with pytest.raises(
        ValueError, match=r"quantizer .int4. is not known; choose one of half-steps, integer, .*lsq8, published"
    ):
        make_quantizer("int4", 3)


def test_over_eight_bits_cannot_be_packed():
    with pytest.raises(ValueError, match=r"needs 9 bits; packing holds at most 8"):
        PublishedSelfCompressing(2, bit_depth=8.5).codes(torch.zeros(2, 3))


# ---- the corrected form ----


@settings(max_examples=60, deadline=None, derandomize=True)
@given(depth=st.floats(-1, 9), seed=st.integers(0, 100))
def test_the_width_that_is_charged_is_the_width_that_is_stored(depth, seed):
    quantizer = SelfCompressing(4)
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        quantizer.bit_depth.fill_(depth)
    quantizer.fit(rows)
    assert torch.equal(quantizer.bit_cost().detach(), quantizer.bits().float())


def test_its_scale_is_two_bytes():
    _, quantizer = rows_and("integer", channels=200)
    scale = quantizer.grid()[0].detach()
    assert torch.equal(scale.bfloat16().float(), scale)


def test_one_bit_is_a_sign_and_not_a_hole():
    rows, quantizer = rows_and("integer")
    with torch.no_grad():
        quantizer.bit_depth.fill_(1.0)
    quantizer.fit(rows)
    out = quantizer(rows).detach()
    assert torch.equal(out.sign(), rows.sign())
    assert (out.abs() == out.abs()[:, :1]).all()
    best = rows.abs().mean(1)  # the least-squares magnitude of a sign grid
    assert ((out.abs()[:, 0] / best - 1).abs() < 0.05).all()


def test_eight_bits_start_close_to_the_data():
    rows = torch.randn(16, 500, generator=torch.Generator().manual_seed(0))
    quantizer = SelfCompressing(16)
    quantizer.fit(rows)
    error = (quantizer(rows).detach() - rows).square().mean().sqrt()
    assert 0.003 < error < 0.012  # a step of 2 * 3.3 / 256 has an error of step / sqrt(12) = 0.0075


def test_fit_is_the_best_of_its_ranges_and_touches_only_its_channels():
    rows, quantizer = rows_and("integer")
    with torch.no_grad():
        quantizer.bit_depth.fill_(3.0)
    quantizer.fit(rows)
    best = (quantizer(rows).detach() - rows).square().sum(1)
    fitted = quantizer.range.detach().clone()
    for step in (-0.25, 0.125):
        with torch.no_grad():
            quantizer.range.copy_(fitted + step)
        tried = (quantizer(rows).detach() - rows).square().sum(1)
        inside = fitted + step <= rows.abs().amax(1).log2()  # ranges beyond the largest magnitude are not tried
        assert (tried >= best * (1 - 1e-6))[inside].all()
    where = torch.zeros(12, dtype=torch.bool)
    where[5] = True
    quantizer.fit(rows, where)
    moved = quantizer.range.detach() != fitted + 0.125
    assert moved.tolist() == where.tolist()


def test_a_bit_less_halves_the_resolution_and_keeps_the_range():
    _, quantizer = rows_and("integer")
    with torch.no_grad():
        quantizer.bit_depth.fill_(5.0)
    wide = quantizer.grid()
    with torch.no_grad():
        quantizer.bit_depth.fill_(4.0)
    narrow = quantizer.grid()
    assert torch.allclose(narrow[0], 2 * wide[0])
    assert torch.allclose(narrow[0] * narrow[1], wide[0] * wide[1])


def test_the_depth_has_a_gradient_that_asks_for_less_error():
    rows, quantizer = rows_and("integer", width=400)
    with torch.no_grad():
        quantizer.bit_depth.fill_(3.0)
    quantizer.fit(rows)
    (quantizer(rows) - rows).square().sum().backward()
    assert (quantizer.bit_depth.grad < 0).all()


# ---- uniform quantization-aware training: arXiv 1902.08153 ----


def test_a_step_starts_as_the_paper_says_and_fits_two_bytes():
    rows = torch.randn(5, 90, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    for bits, most in ((2, 1), (3, 3), (4, 7), (8, 127)):
        quantizer = make_quantizer(f"lsq{bits}", 5)
        quantizer.fit(rows)
        expected = 2 * rows.abs().mean(1) / math.sqrt(most)
        torch.testing.assert_close(quantizer.step.detach(), expected.clamp_min(1e-12))
        scale, lo, hi, shift = (t.detach() for t in quantizer.grid())
        assert torch.equal(scale.bfloat16().float(), scale)
        torch.testing.assert_close(scale, quantizer.step.detach(), rtol=2**-8, atol=0)
        assert (lo.unique().item(), hi.unique().item(), shift.any().item()) == (-most - 1, most, False)
        assert quantizer.bits().tolist() == [bits] * 5
        assert (quantizer(rows)[3] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_of_a_step_is_that_of_the_paper(sign):
    """Equation 3 summed over the row, times 1 / sqrt(K Q_P); a step that crossed 0 is pushed the other way."""
    rows = torch.tensor([[0.3, -0.9, 2.0, -9.0, 9.0]], dtype=torch.float64)
    quantizer = make_quantizer("lsq3", 1).double()
    assert isinstance(quantizer, LSQ)
    quantizer.fit(rows)
    with torch.no_grad():
        quantizer.step.fill_(0.5 * sign)
    up = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    quantizer(rows).backward(up)
    v = rows[0] / 0.5
    by_step = torch.where(v <= -4, -4.0, torch.where(v >= 3, 3.0, v.round() - v))
    expected = sign * (by_step * up[0]).sum() / math.sqrt(5 * 3)
    assert quantizer.step.grad is not None
    assert quantizer.step.grad.item() == pytest.approx(expected.item(), rel=1e-12)
    assert quantizer.bit_depth.grad is None


def test_a_step_is_fitted_where_it_is_asked_and_only_there():
    quantizer = make_quantizer("lsq4", 3)
    rows = torch.rand(3, 8) + 1
    quantizer.fit(rows)
    before = quantizer.step.detach().clone()
    quantizer.fit(2 * rows, torch.tensor([False, True, False]))
    assert torch.equal(quantizer.step.detach(), before * torch.tensor([1.0, 2.0, 1.0]))


# ---- the published form: table of ALGORITHMS 1.2, arXiv 2301.13142 ----


def published_gradients(depth: float, x: float) -> tuple[float, float, float, float]:
    quantizer = PublishedSelfCompressing(1, exponent=-2.0).double()
    with torch.no_grad():
        quantizer.bit_depth.fill_(depth)
    value = torch.tensor([[x]], dtype=torch.float64, requires_grad=True)
    out = quantizer(value)
    out.sum().backward()
    gradient = (value.grad, quantizer.bit_depth.grad, quantizer.exponent.grad)
    return out.item(), *(0.0 if g is None else g.sum().item() for g in gradient)


LN2 = math.log(2)


@pytest.mark.parametrize("depth", [0.5, 1.0, 1.7, 2.0, 3.3, 8.0])
def test_published_gradients_follow_the_closed_forms(depth):
    low, high = -(2.0 ** (depth - 1)) / 4, (2.0 ** (depth - 1) - 1) / 4
    inside = (low + high) / 2 + 0.01
    out, dx, db, de = published_gradients(depth, inside)
    assert (dx, db) == (1.0, 0.0)
    assert de == pytest.approx(LN2 * (out - inside), abs=1e-12)
    for x, sign in ((high + 1, 1), (low - 1, -1)):
        out, dx, db, de = published_gradients(depth, x)
        assert dx == 0.0
        assert db == pytest.approx(sign * LN2 * 2.0 ** (-2 + depth - 1), rel=1e-12)
        assert de == pytest.approx(LN2 * out, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("depth", [0.0, -0.7])
def test_published_form_is_dead_at_no_depth(depth):
    assert published_gradients(depth, 0.6) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("depth", "levels"), [(0.5, 2), (1.0, 2), (math.log2(3), 3), (2.0, 4), (math.log2(5), 5)])
def test_what_fractional_depths_really_hold(depth, levels):
    quantizer = PublishedSelfCompressing(1, bit_depth=depth, exponent=0.0)
    grid = quantizer(torch.linspace(-9, 9, 2001)[None]).unique()
    assert len(grid) == levels or len(grid) == levels - (levels % 2 == 1 and depth > 2)
    low, high = quantizer.code_range()
    assert quantizer.bits().item() == math.ceil(math.log2(high.item() - low.item() + 1))


def test_quantizers_are_formulas_on_the_one_primitive():
    for name in QUANTIZERS:
        rows, quantizer = rows_and(name)
        assert torch.equal(quantizer(rows), fake_quantize(rows, *quantizer.grid()))


DEPTHS = [-1.0, 0.0, 0.4, 0.5, 0.6, 1.0, 1.5, 1.7, 2.5, 3.3, 7.9, 8.0, 8.4, 9.0, float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_integer_form_is_differentiated_as_its_formula(dtype):
    """Autograd on `grid` is the judge of what is written by hand for speed."""
    make = torch.Generator().manual_seed(0)
    quantizer = SelfCompressing(len(DEPTHS))
    rows = torch.randn(len(DEPTHS), 70, generator=make).to(dtype).requires_grad_()
    with torch.no_grad():
        quantizer.bit_depth.copy_(torch.tensor(DEPTHS))
        quantizer.range.copy_(torch.randn(len(DEPTHS), generator=make))
        quantizer.range[3] = float("nan")
    if dtype == torch.float64:
        quantizer = quantizer.double()
    up = torch.randn(rows.shape, generator=make).to(dtype)
    leaves = (rows, quantizer.bit_depth, quantizer.range)
    fast, plain = quantizer(rows), fake_quantize(rows, *quantizer.grid())
    assert_same(fast.detach(), plain.detach())
    for f, p in zip(torch.autograd.grad(fast, leaves, up), torch.autograd.grad(plain, leaves, up), strict=True):
        assert f.dtype == p.dtype
        assert torch.allclose(f, p, rtol=1e-6, atol=1e-6, equal_nan=True)
    with torch.no_grad():
        assert_same(quantizer(rows), plain.detach())


def test_the_table_of_widths_is_the_formula():
    quantizer = SelfCompressing(9)
    with torch.no_grad():
        quantizer.bit_depth.copy_(torch.arange(9.0))
    for found, expected in zip(quantizer.by_width[:3], quantizer.grid()[1:], strict=True):
        assert_same(found, expected.detach())
    assert "by_width" not in quantizer.state_dict()


# ---- variants of learned widths ----


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("integer", {1: [-0.5, 0.5], 2: [-2, -1, 0, 1]}),
        ("half-steps", {1: [-0.5, 0.5], 2: [-1.5, -0.5, 0.5, 1.5], 3: [-4, -3, -2, -1, 0, 1, 2, 3]}),
        ("ternary", {1: [-0.5, 0.5], 2: [-1, 0, 1], 3: [-3, -2, -1, 0, 1, 2, 3]}),
    ],
)
def test_levels_of_narrow_widths(name, levels):
    for bits, want in levels.items():
        quantizer = make_quantizer(name, 1)
        with torch.no_grad():
            quantizer.bit_depth.fill_(bits)
            quantizer.range.fill_(bits - 1)  # a step of 1
        rows = torch.linspace(-20, 20, 4001)[None]
        assert quantizer(rows).unique().tolist() == want
        assert int(quantizer.bits()) == bits


def test_interpolated_rows_lie_between_the_neighbouring_widths():
    rows, quantizer = rows_and("interpolated", channels=2)
    whole = make_quantizer("integer", 2)
    with torch.no_grad():
        quantizer.bit_depth.copy_(torch.tensor([2.25, 3.0]))
        whole.range.copy_(quantizer.range)
    at = {}
    for bits in (2.0, 3.0):
        whole.bit_depth.data.fill_(bits)
        at[bits] = whole(rows).detach()
    assert torch.equal(quantizer(rows)[0], at[2.0][0])  # in evaluation what will be stored
    made = quantizer.train()(rows)
    assert torch.allclose(made[0], 0.75 * at[2.0][0] + 0.25 * at[3.0][0])
    assert torch.equal(made[1], at[3.0][1])
    towards = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    (made * towards).sum().backward()
    change = (towards * (at[3.0] - at[2.0]))[0].sum()  # of the loss, from two bits to three
    assert torch.allclose(quantizer.bit_depth.grad[0], change, rtol=1e-4)
