"""Sensitivity against exact Hessians of tiny networks, its stopping rule, and what it refuses."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgsc.demos.models import CharLM
from sgsc.search.grids import best_steps, rounding_error
from sgsc.search.sensitivity import sensitivity, summary, worth


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    x, y = torch.randn(24, 1, 4, 4).double(), torch.randint(3, (24,))
    weights = {name: net.get_submodule(name).weight for name in ("0", "3", "5")}
    return net, weights, [(x[:12], y[:12]), (x[12:], y[12:])], (x, y)


def exact_trace(net, name, whole):
    def of(weight):
        return F.cross_entropy(torch.func.functional_call(net, {f"{name}.weight": weight}, whole[0]), whole[1])

    weight = net.get_submodule(name).weight
    return float(torch.autograd.functional.hessian(of, weight).reshape(weight.numel(), -1).trace())


def test_hutchinson_is_the_trace_of_the_exact_hessian(problem):
    net, weights, batches, whole = problem
    for name, weight in weights.items():
        found = sensitivity(net, {name: weight}, loss, batches, method="hutchinson", least=400, most=400)
        exact = exact_trace(net, name, whole)
        assert abs(found.trace[name] - exact) < 4 * found.error[name] * abs(found.trace[name])  # 4 sigma
        assert found.error[name] < 0.2


def test_other_layers_add_noise_and_no_bias(problem):
    net, weights, batches, whole = problem
    found = sensitivity(net, weights, loss, batches, method="hutchinson", least=400, most=1000, error=0.1)
    for name in weights:
        assert abs(found.trace[name] - exact_trace(net, name, whole)) < 4 * found.error[name] * abs(found.trace[name])


def test_fisher_is_the_mean_squared_norm_of_the_gradients(problem):
    net, weights, batches, (x, y) = problem
    found = sensitivity(net, weights, loss, batches, method="fisher", most=1000, error=0.0)
    assert (found.samples, found.converged) == (24, False)
    for name, weight in weights.items():
        exact = [
            torch.autograd.grad(loss(net, (x[i : i + 1], y[i : i + 1])), weight)[0].square().sum() for i in range(24)
        ]
        assert found.trace[name] == pytest.approx(float(sum(exact)) / 24)


def test_standard_errors_of_means_and_shares():
    means, errors, of_shares = summary([[1.0, 1.0], [1.0, 1.3]])
    assert means == [1.0, 1.15]
    assert errors[0] == 0.0  # two equal samples: hence the minimum of 20
    assert errors[1] == pytest.approx(0.15 / 1.15)
    assert of_shares[0] == pytest.approx(0.15 / 2.15)  # of 1 / 2.15, to first order
    assert summary([[1.0]])[1:] == ([math.inf], [math.inf])
    assert summary([[0.0, 1.0], [0.0, 2.0]])[2] == [0.0, 0.0]  # a layer without any gradient
    assert summary([[-1.0, 0.5], [-1.0, 0.5]])[2] == [math.inf, math.inf]  # no share of a negative sum


def test_shares_have_the_error_that_is_said():
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(0, 1, (400, 200, 1)) * rng.lognormal(0, 0.3, (400, 200, 3)) * [1.0, 3.0, 9.0]
    found = [summary(one) for one in drawn]
    shares = np.array([np.array(means) / np.sum(means) for means, _, _ in found])
    spread = shares.std(0) / shares.mean(0)
    np.testing.assert_allclose(np.mean([said for _, _, said in found], 0), spread, rtol=0.15)  # 400 repeats: 3.5 %


def test_one_sample_that_has_nearly_all_of_the_gradient_does_not_stop_it(problem):
    net, weights, batches, _ = problem
    calls = iter(range(10**6))

    def lucky(model, batch):  # the 10th sample makes every layer's share look exact
        return loss(model, batch) * (1e4 if next(calls) == 10 else 1.0)

    found = sensitivity(net, weights, lucky, batches, method="fisher", most=24)
    assert max(found.share_error.values()) < 0.05
    assert found.worth < 2
    assert (found.samples, found.converged) == (24, False)


def test_worth_is_a_number_of_equal_samples():
    assert worth([[1.0, 2.0]] * 7) == pytest.approx(7)
    assert worth([[1e6, 0.0]] + [[1.0, 0.0]] * 7) == pytest.approx(1, rel=1e-3)
    assert worth([[0.0]] * 3) == 3


def test_it_takes_the_least_samples_and_says_when_they_were_not_enough(problem):
    net, weights, batches, _ = problem
    few = sensitivity(net, weights, loss, batches, method="hutchinson", error=1e9)
    assert few.samples >= 20
    assert 20 <= few.worth < 21  # it stopped as soon as they were
    assert few.converged
    hard = sensitivity(net, weights, loss, batches, method="hutchinson", error=1e-9, most=30)
    assert (hard.samples, hard.converged) == (30, False)


@pytest.mark.parametrize("mends", [True, False])
def test_attention_has_second_derivatives_or_that_is_said(mends, monkeypatch):
    """Its fused kernels have none."""
    torch.manual_seed(0)
    model = CharLM(11, 8, 16, 1, 2).eval()
    x = torch.randint(11, (4, 8))
    weights = {"query": model.get_parameter("blocks.0.attention.q.weight")}
    loss_of = lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten())  # noqa: E731
    if mends:
        found = sensitivity(model, weights, loss_of, [(x, x)], method="hutchinson")
        assert found.trace["query"] != 0
        assert found.method == "hutchinson"
    else:
        monkeypatch.setattr("sgsc.search.sensitivity.sdpa_kernel", lambda _: nullcontext())
        with pytest.raises(ValueError, match=r"needs second derivatives, and torch lacks one here .*; take 'fisher'"):
            sensitivity(model, weights, loss_of, [(x, x)], method="hutchinson")


def test_the_model_is_left_as_it_was(problem):
    net, weights, batches, _ = problem
    net.train()
    weights["3"].requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sensitivity(net, weights, loss, batches, method="fisher")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert not weights["3"].requires_grad
    assert all(w.grad is None for w in weights.values())


def test_the_cost_is_told_first_and_seeds_decide(problem):
    net, weights, batches, _ = problem
    said = []
    a, b, c = (
        sensitivity(
            net, weights, loss, batches, method="hutchinson", seed=seed, most=20, progress=lambda *now: said.append(now)
        ).trace
        for seed in (0, 0, 1)
    )
    assert a == b != c
    phase, step, steps, values = said[0]
    assert (phase, step, steps) == ("sensitivity", 0, 20)
    assert values.keys() == {"seconds at most"}
    assert values["seconds at most"] > 0
    assert said[1][1] == 1


def test_a_layer_that_spoils_the_gradient_is_named(problem):
    net, weights, batches, _ = problem
    with torch.no_grad():
        weights["3"][0, 0] = float("nan")
    for method in ("hutchinson", "fisher"):
        with pytest.raises(ValueError, match=r"layer '0': its gradient on batch \d is not finite"):
            sensitivity(net, weights, loss, batches, method=method)


def test_wrong_arguments_are_named(problem):
    net, weights, batches, _ = problem
    with pytest.raises(ValueError, match="method='x': want hutchinson"):
        sensitivity(net, weights, loss, batches, method="x")
    with pytest.raises(ValueError, match="of 3 layers on 0 batches: want at least one"):
        sensitivity(net, weights, loss, [])
    with pytest.raises(ValueError, match="least=1, most=9: a standard error"):
        sensitivity(net, weights, loss, batches, least=1, most=9)


def test_omega_falls_with_bits_and_scales_with_the_trace(problem):
    net, weights, batches, _ = problem
    found = sensitivity(net, weights, loss, batches, method="fisher")
    rows = {name: w.detach().flatten(1) for name, w in weights.items()}
    omega = found.omega(rows, (2, 3, 4, 6, 8))
    for name in weights:
        by_bits = [omega[name][b] for b in (2, 3, 4, 6, 8)]
        assert by_bits == sorted(by_bits, reverse=True)
        mean = found.trace[name] / found.weights[name]
        assert omega[name][4] == pytest.approx(mean * rounding_error(rows[name], 4))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_best_steps_are_close_to_the_best_for_a_gaussian(bits):
    rows = torch.randn(4, 5000)
    # Max, IRE Trans. Inf. Theory 6, 1960, table 2 (uniform quantizers), 8 bits from the 6 dB rule of thumb for it
    best = {2: 0.1188, 3: 0.03744, 4: 0.01154, 6: 0.00104, 8: 0.0000849}[bits]
    error = rounding_error(rows, bits) / rows.numel()
    # ours have a level at 0 and none that mirrors the lowest one, which costs most at 2 bits
    assert 0.95 * best < error < (1.7 if bits == 2 else 1.4) * best
    assert best_steps(rows, bits).shape == (4,)


def test_a_row_of_zeros_has_a_step():
    assert (best_steps(torch.zeros(2, 5), 4) > 0).all()
    assert rounding_error(torch.zeros(2, 5), 4) == 0
