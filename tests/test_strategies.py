"""What every quantization strategy promises, over the registries, and what each one's formula says."""

import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from sgsc.kernels import fake_quantize
from sgsc.layers import quant_layers
from sgsc.strategies import INPUTS, WEIGHTS, InputStatistics, StrategyTraining, WeightStrategy
from sgsc.strategies.inputs import _divergence
from sgsc.strategies.registry import BITS, grid_between, strategies


def rows(channels=6, width=60, seed=0):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(channels, width, generator=make) * torch.exp(torch.randn(channels, 1, generator=make))


EDGES = {
    "many": rows(),
    "zeros-in-a-row": torch.where(torch.arange(6)[:, None] == 2, 0.0, rows()),
    "all-zeros": torch.zeros(3, 5),
    "one-element": torch.tensor([[-0.3]]),
    "one-column": rows(5, 1),
    "no-rows": torch.zeros(0, 4),
    "no-columns": torch.zeros(3, 0),
    "huge": rows() * 1e37,
    "tiny": rows() * 1e-33,
    "one-outlier": torch.cat([rows(), torch.full((6, 1), 1e4)], 1),
    "all-equal": torch.full((2, 9), 0.7),
}


def fitted(name, x, bits=4, per_channel=True):
    quantizer = WEIGHTS[name](len(x), bits, per_channel)
    quantizer.fit(x)
    return quantizer.eval()


def max_abs_error(x, bits, per_channel, power):
    most = 2 ** (bits - 1) - 1
    scale = x.abs().amax(1) if per_channel else x.abs().amax().expand(len(x))
    scale = (scale / most).bfloat16().float().clamp_min(1e-30)
    ends = torch.full_like(scale, -most - 1.0), torch.full_like(scale, float(most))
    error = (fake_quantize(x, scale, *ends) - x).abs().pow(power)
    return error.sum(1) if per_channel else error.sum()


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("name", sorted(WEIGHTS))
class TestEveryWeightStrategy:
    @pytest.mark.parametrize("edge", sorted(EDGES))
    def test_what_is_stored_is_what_is_answered_and_rounds_to_itself(self, name, per_channel, edge):
        x = EDGES[edge]
        for bits in BITS:
            quantizer = fitted(name, x, bits, per_channel)
            out = quantizer(x).detach()
            assert torch.isfinite(out).all()
            codes = quantizer.codes(x)
            assert torch.equal((codes.levels.float() + codes.offset[:, None]) * codes.scale[:, None], out), bits
            assert (codes.bits == bits).all()
            assert (codes.levels.int() < 2**bits).all()
            assert (codes.offset == codes.offset.round()).all()
            if name != "dorefa":  # rounds another weight, tanh of this one
                assert torch.equal(quantizer(out).detach(), out), bits

    def test_a_step_is_two_bytes_and_one_for_all_rows_where_it_is_per_tensor(self, name, per_channel):
        for bits in BITS:
            scale = fitted(name, rows(), bits, per_channel).grid()[0].detach()
            assert torch.equal(scale.bfloat16().float(), scale)
            assert len(scale.unique()) == (6 if per_channel else 1)

    @pytest.mark.parametrize("edge", ["huge", "tiny"])
    def test_the_unit_of_the_weights_does_not_matter(self, name, per_channel, edge):
        if name == "dorefa":
            pytest.skip("tanh has a unit")
        factor = 2.0**120 if edge == "huge" else 2.0**-100
        x = rows() / rows().abs().max()
        assert torch.equal(
            fitted(name, x * factor, 4, per_channel)(x * factor), fitted(name, x, 4, per_channel)(x) * factor
        )

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_not_finite_are_refused(self, name, per_channel, bad):
        x = rows()
        x[2, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinity and have no grid"):
            fitted(name, x, 4, per_channel)

    def test_more_bits_never_make_it_worse_by_much(self, name, per_channel):
        x = rows(4, 500)
        if name in ("dorefa", "lsq+"):
            pytest.skip("rounds another weight, or clips at three deviations whatever the bits")
        found = [(fitted(name, x, bits, per_channel)(x) - x).square().mean().item() for bits in BITS]
        assert all(after < 0.6 * before for before, after in itertools.pairwise(found))

    def test_only_marked_channels_are_fitted(self, name, per_channel):
        if not per_channel or name.startswith("lsq"):
            pytest.skip("there is one step, or it is learned")
        quantizer = fitted(name, rows())
        before = quantizer.grid()[0].clone()
        quantizer.fit(rows() * 4, torch.arange(6) == 3)
        assert (quantizer.grid()[0] != before).tolist() == [False, False, False, True, False, False]

    def test_bits_out_of_range_are_refused(self, name, per_channel):
        for bits in (1, 9):
            with pytest.raises(ValueError, match=f"bits={bits}: strategies serve 2 to 8"):
                WEIGHTS[name](3, bits, per_channel)


@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("name", sorted(name for name, cls in WEIGHTS.items() if cls.power is not None))
def test_no_worse_than_max_abs_in_what_it_minimises(name, per_channel):
    power = WEIGHTS[name].power
    for edge, x in EDGES.items():
        for bits in BITS if x.numel() else ():
            x = x / x.abs().max().clamp_min(1e-30)
            error = (fitted(name, x, bits, per_channel)(x) - x).abs().pow(power)
            error = error.sum(1) if per_channel else error.sum()
            assert (error <= max_abs_error(x, bits, per_channel, power) * (1 + 1e-5) + 1e-12).all(), (edge, bits)


def seen_of(*parts):
    seen = InputStatistics()
    for part in parts:
        seen.observe(part)
    return seen


def given(kind, n=4000):
    x = torch.randn(200, n // 200, generator=torch.Generator().manual_seed(1))
    return {
        "relu": x.relu(),
        "both-signs": x,
        "silu": torch.nn.functional.silu(x),
        "negative": -x.abs() - 0.1,
        "far-from-zero": 5 + 0.01 * x,
        "zeros": torch.zeros(4, 4),
        "constant": torch.full((70, 3), 2.5),
        "negative-constant": torch.full((70, 3), -2.5),
        "one-value": torch.tensor([0.3]),
        "huge": x * 1e37,
        "tiny": x * 1e-30,
        "outlier": torch.cat([x.flatten(), torch.tensor([1e4])]),
    }[kind]


KINDS = ["relu", "both-signs", "silu", "negative", "far-from-zero", "zeros", "constant", "negative-constant"]
KINDS += ["one-value", "huge", "tiny", "outlier"]


@pytest.mark.parametrize("name", sorted(INPUTS))
class TestEveryInputStrategy:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_grid_is_one_that_a_byte_holds(self, name, kind):
        x = given(kind)
        seen = seen_of(x)
        for bits in BITS:
            self.check(INPUTS[name].fitted(seen, bits).eval(), x, bits, kind)

    def check(self, quantizer, x, bits, kind):
        scale, low, high, shift = (v.item() for v in quantizer.grid())
        assert 0 < scale < math.inf
        assert shift == 0
        assert (low, high) == (round(low), round(high))
        assert low <= 0 <= high
        assert high - low <= 2**bits - 1
        out = quantizer(x).detach()
        assert out.shape == x.shape
        assert torch.isfinite(out).all()
        assert torch.equal(quantizer(out).detach(), out)
        assert (quantizer(torch.zeros(3)) == 0).all()
        if kind == "relu":
            assert low == 0

    @pytest.mark.parametrize("kind", ["zeros", "constant", "negative-constant", "one-value"])
    def test_a_constant_input_is_kept(self, name, kind):
        x = given(kind)
        out = INPUTS[name].fitted(seen_of(x), 8).eval()(x).detach()
        assert (out - x).abs().max() <= 0.03 * x.abs().max()

    @pytest.mark.parametrize("kind", ["relu", "both-signs", "silu", "negative"])
    def test_eight_bits_are_close(self, name, kind):
        x = given(kind)
        error = INPUTS[name].fitted(seen_of(x), 8).eval()(x).detach() - x
        assert error.square().mean() < 1.5e-3 * x.square().mean()

    def test_bits_out_of_range_are_refused(self, name):
        for bits in (1, 9):
            with pytest.raises(ValueError, match=f"bits={bits}: strategies serve 2 to 8"):
                INPUTS[name].fitted(seen_of(given("relu")), bits)


# ---- the formulas ----


def test_percentile_clips_an_eighth_of_a_level_s_share():
    x = torch.arange(1, 129.0).repeat(2, 1)
    assert fitted("percentile", x, 4).grid()[0].tolist() == pytest.approx([127 / 7] * 2, rel=2**-8)


def test_mse_is_the_best_of_its_hundred():
    x = rows(3, 200)
    scale = fitted("mse", x, 3).grid()[0]
    least = ((fitted("mse", x, 3)(x) - x) ** 2).sum(1)
    for part in range(1, 101):
        tried = WEIGHTS["max-abs"](3, 3)
        tried.scale.copy_(x.abs().amax(1) / 3 * part / 100)
        assert (((tried(x) - x) ** 2).sum(1) >= least * (1 - 1e-2)).all()
    assert (scale < x.abs().amax(1) / 3).all()


def test_alternation_ends_where_neither_codes_nor_step_move():
    x = rows(8, 300)
    quantizer = fitted("least-squares", x, 4)
    before = (quantizer(x) - x).square().sum(1)
    codes = (x / quantizer.scale[:, None]).clamp(-8, 7).round()
    quantizer.scale.copy_((x * codes).sum(1) / codes.square().sum(1))
    after = (quantizer(x) - x).square().sum(1)
    assert (after > 0.98 * before).all()
    assert (before < 0.9 * max_abs_error(x, 4, True, 2.0)).all()


def test_half_quadratic_makes_most_errors_small():
    x = rows(8, 300)
    power = WEIGHTS["half-quadratic"].power
    error = (fitted("half-quadratic", x, 4)(x) - x).abs().pow(power).sum()
    assert power == 0.7
    assert error < 0.95 * max_abs_error(x, 4, True, power).sum()


def test_lsq_starts_as_the_paper_says():
    x = rows(5, 90)
    for bits, most in ((2, 1), (4, 7), (8, 127)):
        expected = 2 * x.abs().mean(1) / math.sqrt(most)
        torch.testing.assert_close(fitted("lsq", x, bits).grid()[0].detach(), expected, rtol=2**-8, atol=0)


def test_lsq_plus_starts_at_three_deviations():
    x = rows(5, 90) + 0.2
    mean, deviation = x.mean(1), x.std(1, correction=0)
    expected = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 8
    torch.testing.assert_close(fitted("lsq+", x).grid()[0].detach(), expected, rtol=2**-8, atol=0)


def test_the_step_of_lsq_has_the_gradient_of_the_paper():
    x = torch.tensor([[0.3, -0.9, 2.0, -9.0, 9.0]])
    quantizer = fitted("lsq", x, 3)
    step = quantizer.grid()[0].item()
    quantizer(x).sum().backward()
    v = x / step
    slope = torch.where(v < -4, -4.0, torch.where(v > 3, 3.0, v.round() - v))
    expected = slope.sum() / math.sqrt(5 * 3)
    torch.testing.assert_close(quantizer.get_parameter("step").grad, expected[None])


def test_dorefa_rounds_tanh_and_keeps_the_largest():
    x = torch.tensor([[0.5, -1.0, 2.0]])
    out = fitted("dorefa", x, 8)(x)
    torch.testing.assert_close(out, x.tanh() / math.tanh(2.0) * 2.0, atol=0.02, rtol=0)
    assert out[0, 0] > 0.9  # well above 0.5


def test_straight_through_follows_the_weights_while_it_trains():
    quantizer = WEIGHTS["straight-through"](1, 4)
    quantizer.fit(torch.ones(1, 3))
    quantizer.train()
    quantizer(torch.full((1, 3), 7.0))
    assert quantizer.grid()[0].item() == 1.0
    quantizer.eval()
    quantizer(torch.full((1, 3), 70.0))
    assert quantizer.grid()[0].item() == 1.0


def test_the_clip_of_pact_learns_from_what_lies_beyond_alone():
    quantizer = INPUTS["pact"].fitted(seen_of(torch.linspace(0, 1.5, 1000)), 4)
    clip = quantizer.get_parameter("step").item() * 15
    x = torch.tensor([-1.0, 0.2, 0.7, clip + 0.1, clip + 5], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0, 0]
    assert quantizer.get_parameter("step").grad.item() == pytest.approx(2 * 15)  # of the step; 2 of the clip


def test_the_offset_of_lsq_plus_learns():
    quantizer = INPUTS["lsq+"].fitted(seen_of(torch.linspace(-1, 3, 1000)), 4)
    _, low, high, _ = (v.item() for v in quantizer.grid())
    x = torch.tensor([-9.0, 9.0, 9.0])
    quantizer(x).sum().backward()
    # d code_min = d code_max = d offset / step, and each of the three is clipped: dq = 3 d offset, made slow
    slow = quantizer.slowness.item()
    assert quantizer.get_parameter("offset").grad.item() == pytest.approx(3 * slow, rel=1e-5)
    with torch.no_grad():
        quantizer.get_parameter("offset").sub_(quantizer.get_parameter("step"))
    _, after, end, _ = (v.item() for v in quantizer.grid())
    assert (after, end) == (low - 1, high - 1)


def test_the_offset_of_lsq_plus_learns_for_an_input_that_is_nowhere_negative():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(64, 6)
    run = StrategyTraining(net, x, steps=20, weights=["lsq"], inputs=["lsq+"], edge_bits=None, rate=0.01)
    quantizer = quant_layers(run.model)["2"].input_quantizer
    assert quantizer.offset == 0
    while not run.done:
        run.step(run.model(x + 0.1 * torch.randn(64, 6)).square().mean())
    assert quantizer.offset.abs() > 0.01 * quantizer.step


def test_straight_through_follows_the_input_while_it_trains():
    quantizer = INPUTS["straight-through"].fitted(seen_of(torch.linspace(0, 1, 100)), 4).train()
    for _ in range(600):
        quantizer(torch.linspace(-1, 2, 50))
    scale, low, high, _ = (v.item() for v in quantizer.grid())
    assert (scale * low, scale * high) == (pytest.approx(-1, abs=0.1), pytest.approx(2, abs=0.1))
    assert (high - low) == 15


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 0.0), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0)])
def test_a_range_gets_all_codes_and_holds_zero(low, high):
    for bits in BITS:
        scale, first, last = grid_between(low, high, bits)
        assert last - first == 2**bits - 1
        assert first <= 0 <= last
        if low != high:
            assert scale * last >= high - scale * 0.51
            assert scale * first <= low + scale * 0.51


def test_the_divergence_is_none_where_every_bin_has_a_code_and_grows_with_clipping():
    values, counts = np.arange(1.0, 16.0), np.arange(15.0, 0.0, -1)
    assert _divergence(values, counts, 1.0, 0, 15) == pytest.approx(0)
    found = [_divergence(values, counts, scale, 0, 15) for scale in (0.8, 0.5, 0.25)]
    assert 0 < found[0] < found[1] < found[2]


def test_a_range_of_one_bin_is_not_taken_for_perfect():
    values, counts = np.array([0.01, 0.5, 1.0]), np.array([10.0, 500.0, 500.0])
    assert _divergence(values, counts, 0.01, 0, 15) > 4  # 1 % of the values are in the range
    few = seen_of(torch.tensor([0.0, 0.02, 0.5, 0.5, 0.51, 0.9, 1.0]).repeat(100, 1))
    assert INPUTS["kl"].fitted(few, 4)(torch.tensor([1.0])).item() > 0.8


# ---- statistics ----


def test_statistics_of_parts_are_those_of_the_whole():
    x = torch.randn(640, 30, generator=torch.Generator().manual_seed(0)).relu() * 3
    whole, parts = seen_of(x), seen_of(*x.split(64))
    assert (whole.least, whole.most, whole.count, whole.zeros) == (parts.least, parts.most, x.numel(), parts.zeros)
    assert whole.average == parts.average
    assert whole.zeros == int((x == 0).sum())
    assert torch.equal(whole.histogram, parts.histogram)
    assert whole.histogram.sum() + whole.zeros == x.numel()


@pytest.mark.parametrize("order", [1, -1])
def test_a_histogram_that_grows_loses_nothing(order):
    parts = [torch.rand(100, 10, generator=torch.Generator().manual_seed(i)) * 10.0**i - 0.3 * i for i in range(-4, 4)]
    seen, x = seen_of(*parts[::order]), torch.cat(parts)
    values, counts = seen.points()
    assert counts.sum() == (x != 0).sum()
    assert seen.reach == 1024.0
    for share in (0.01, 0.5, 0.9, 0.999):
        exact = x.flatten().sort().values[math.ceil(share * x.numel()) - 1].item()
        assert abs(seen.quantile(share) - exact) <= 1.01 * seen.reach / 4096
    assert (np.diff(values) > 0).all()


def test_memory_does_not_grow_with_the_data():
    seen = InputStatistics()
    sizes = set()
    for i in range(20):
        seen.observe(torch.randn(50, 100) * (i + 1))
        sizes.add(len(pickle.dumps(vars(seen))))
    assert max(sizes) - min(sizes) < 100  # an input has 20,000 bytes


def test_counts_go_on_where_single_precision_ends():
    seen, x = InputStatistics(), torch.zeros(2**24 + 1001)
    x[:1000] = 0.5
    seen.observe(x)
    seen.observe(torch.full((2**24 + 1,), 0.25))
    assert seen.zeros == 2**24 + 1
    assert seen.histogram.sum() == 2**24 + 1 + 1000


def test_what_is_no_number_is_refused():
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        seen_of(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="int64 has no grid"):
        seen_of(torch.tensor([1, 2]))
    assert seen_of(torch.zeros(0, 3)).count == 0


def test_half_precision_is_seen_as_it_is():
    x = torch.linspace(-2, 2, 100)
    assert seen_of(x.bfloat16()).most == 2.0


# ---- the registries ----


def test_a_strategy_is_one_class():
    class Half(WeightStrategy, name="half-of-it"):
        def steps(self, rows, most):
            return rows.abs().amax(1) / most / 2

    try:
        assert fitted("half-of-it", torch.ones(1, 2)).grid()[0].item() == pytest.approx(1 / 14, rel=2**-8)
        with pytest.raises(ValueError, match="two strategies are called 'half-of-it'"):
            type("Again", (Half,), {}, name="half-of-it")
    finally:
        del WEIGHTS["half-of-it"]


def test_names_are_checked():
    assert set(strategies(INPUTS)) >= {"min-max", "moving-average", "percentile", "kl", "mse", "least-squares"}
    assert set(strategies(WEIGHTS, trained=True)) >= {"lsq", "lsq+", "straight-through", "dorefa"}
    with pytest.raises(ValueError, match=r"'pact' is not known without training; choose of .*kl"):
        strategies(INPUTS, ["pact"])
    with pytest.raises(ValueError, match="no strategy is named"):
        strategies(INPUTS, [])
