"""What formulas of inputs and schedules of searches say, each by a case in which another one would answer otherwise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sgsc import search_strategies
from sgsc.layers import quant_layers
from sgsc.strategies import INPUTS, InputStatistics, StrategySettings, make_problem, qat, search
from sgsc.strategies.inputs import KL, MSE, RATIOS, LeastSquares, MovingAverage, Percentile, _divergence
from sgsc.strategies.mixture import mixtures
from sgsc.strategies.problem import Problem
from sgsc.strategies.registry import grid_between

from .test_strategies_search import QUICK, data, network
from .test_strategies_training import problem as of_training
from .test_strategies_training import run_of


def seen_of(x):
    seen = InputStatistics()
    seen.observe(x)
    return seen


def tailed(seed=0):
    """Most values small, few large: what is best to clip is neither nothing nor nearly all."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    return x * x.abs()


def error(x, low, high, bits):
    scale, first, last = grid_between(low, high, bits)
    return (((x / scale).round().clamp(first, last) * scale - x).double() ** 2).mean().item()


# ---- inputs ----


@pytest.mark.parametrize(
    ("low", "high", "first", "last"), [(-1.0, 3.0, -4, 11), (-3.0, 1.0, -11, 4), (0.5, 3.0, 0, 15)]
)
def test_a_grid_has_its_codes_where_the_values_are(low, high, first, last):
    scale, *codes = grid_between(low, high, 4)
    assert codes == [first, last]
    assert scale == pytest.approx((high - min(low, 0.0)) / 15)


def test_a_moving_average_forgets_what_a_group_alone_had():
    parts = [torch.linspace(-1, 1, 64), torch.linspace(-1, 11, 64), torch.linspace(-3, 1, 64)]
    assert MovingAverage.ends(seen_of(torch.cat(parts)), 8) == (pytest.approx(-1.2), pytest.approx(1.9))


def test_a_percentile_clips_a_sixty_fourth_of_a_level_s_share():
    x = torch.arange(1, 1025.0)
    assert Percentile.ends(seen_of(x), 2) == (0.0, pytest.approx(1020, abs=0.5))  # 2^-8 of them lie above
    assert Percentile.ends(seen_of(x), 4) == (0.0, pytest.approx(1023, abs=0.5))
    both = Percentile.ends(seen_of(torch.cat([-x, x])), 2)  # half of that at each end, of twice as many
    assert both == (pytest.approx(-1021, abs=0.5), pytest.approx(1020, abs=0.5))


def test_mse_is_the_best_of_its_ranges():
    for x in (tailed().abs(), tailed()):
        least = min(error(x, x.min().item() * r, x.max().item() * r, 4) for r in RATIOS)
        found = error(x, *MSE.ends(seen_of(x), 4), 4)
        assert found < 1.01 * least
        assert found < 0.8 * error(x, x.min().item(), x.max().item(), 4)


def test_mse_clips_the_end_that_has_outliers():
    x = F.silu(2 * torch.randn(4000, generator=torch.Generator().manual_seed(0)))
    together = min(error(x, x.min().item() * r, x.max().item() * r, 4) for r in RATIOS)
    assert error(x, *MSE.ends(seen_of(x), 4), 4) < 0.8 * together


def test_least_squares_ends_where_neither_codes_nor_step_move():
    for x in (tailed().abs(), tailed()):
        low, high = LeastSquares.ends(seen_of(x), 4)
        scale, first, last = grid_between(low, high, 4)
        found = error(x, low, high, 4)
        codes = (x / scale).round().clamp(first, last)
        solved = ((x * codes).sum() / codes.square().sum()).item()
        assert found < 1.02 * error(x, solved * first, solved * last, 4)
        assert found < 0.8 * error(x, x.min().item(), x.max().item(), 4)


def test_kl_is_the_least_divergent_of_its_ranges():
    for x in (tailed().abs(), tailed()):
        seen = seen_of(x)
        low, high = KL.ends(seen, 4)
        found = [_divergence(*seen.points(), *grid_between(seen.least * r, seen.most * r, 4)) for r in RATIOS]
        assert _divergence(*seen.points(), *grid_between(low, high, 4)) == min(found) < 0.8 * found[-1]
        assert high < 0.6 * seen.most


def test_what_learns_starts_at_the_least_squared_error():
    x = tailed()
    for given, levels in ((x.abs(), 15), (x, 7)):
        low, high = MSE.ends(seen_of(given), 4)
        assert max(-low, high) < 0.8 * given.abs().max()
        clip = INPUTS["pact"].fitted(seen_of(given), 4).get_parameter("step").item() * levels
        assert clip == pytest.approx(max(-low, high))
        step = INPUTS["lsq"].fitted(seen_of(given), 4).get_parameter("step").item()
        assert step == pytest.approx(grid_between(low, high, 4)[0])


# ---- the search ----


def mixture(monkeypatch, steps=12, **constants):
    """(shares, course, temperatures) of a mixture of one good and one bad candidate of everything."""
    for name, value in constants.items():
        monkeypatch.setattr(search, name, value)
    how = StrategySettings(bits_weights=4, bits_activations=4, edge_bits=None)
    of, temperatures = make_problem(network(), data(96), how), []
    for name in of.layers:
        of.weights[name] = {key: of.weights[name][key] for key in ("max-abs", "mse")}
        of.inputs[name] = {key: of.inputs[name][key] for key in ("min-max", "mse")}
        of.weights[name]["max-abs"].scale.copy_(10 * of.weights[name]["mse"].scale)
        of.inputs[name]["min-max"].scale.copy_(10 * of.inputs[name]["mse"].scale)
    real = search.entropy
    monkeypatch.setattr(
        search, "entropy", lambda model: temperatures.append({m.temperature for m in mixtures(model)}) or real(model)
    )
    _, shares, course = search.train_mixture(of, steps, 0, lambda *_: None)
    monkeypatch.setattr(search, "entropy", real)
    return shares, course, temperatures


def test_shares_learn_which_candidate_is_better(monkeypatch):
    shares, course, temperatures = mixture(monkeypatch)
    for name, (of_weight, of_input) in shares.items():
        assert min(of_weight["mse"], of_input["mse"]) > 0.8, name
    assert np.mean([row["loss"] for row in course[-3:]]) < 0.5 * course[0]["loss"]
    assert temperatures == [{search.COLDEST ** (step / 11)} for step in range(12)]


def test_entropy_costs_in_the_search(monkeypatch):
    ends = [mixture(monkeypatch, COLDEST=1.0, SHARP=sharp)[1][-1]["entropy"] for sharp in (0.0, 100.0)]
    assert ends[1] < 0.9 * ends[0]


@pytest.mark.parametrize("better", [True, False])
def test_grids_behind_the_chosen_layers_are_taken_where_they_are_better(monkeypatch, better):
    real, real_judge, again = Problem.recalibrate, Problem.judge, []

    def grids(model):
        return torch.stack([torch.cat(layer.input_quantizer.grid()) for layer in quant_layers(model).values()])

    def anew(model):
        return any(torch.equal(grids(model), found) for found in again)

    def recalibrate(problem, choice):
        real(problem, choice)
        again.append(grids(problem.model))

    def judge(problem):
        return (0.0 if better else 99.0) if anew(problem.model) else real_judge(problem)

    monkeypatch.setattr(Problem, "recalibrate", recalibrate)
    monkeypatch.setattr(Problem, "judge", judge)
    found = search_strategies(network(), data(96), **QUICK)
    assert len(again) == 2  # behind either pass
    assert found.report["recalibrated"] is anew(found.model) is better
    assert found.loss == min(found.report["greedy_loss"], found.report["mixture_greedy_loss"])
    assert found.loss == 0.0 if better else 0 < found.loss < 99


# ---- training ----


def test_entropy_costs_in_training(monkeypatch):
    ends = []
    monkeypatch.setattr(qat, "COLDEST", 1.0)
    for sharp in (0.0, 100.0):
        monkeypatch.setattr(qat, "SHARP", sharp)
        net, x, y = of_training()
        run = run_of(net, x, steps=60)
        while run.stage != "settled":
            said = run.step(F.cross_entropy(run.model(x), y))
        ends.append(said["entropy"])
    assert ends[1] < 0.9 * ends[0]


def test_large_gradients_are_clipped():
    net, x, y = of_training()
    run = run_of(net, x)
    run.step(1e6 * F.cross_entropy(run.model(x), y))
    gradients = [p.grad for group in run.optimiser.param_groups for p in group["params"] if p.grad is not None]
    assert torch.stack([g.norm() for g in gradients]).norm() == pytest.approx(qat.CLIP, rel=1e-3)
