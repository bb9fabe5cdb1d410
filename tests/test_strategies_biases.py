"""Bias correction: means are those of the float network, and no network that is derived is worse for it."""

import pytest
import torch
from torch import nn

from sgsc import fold_batch_norms, load_into, pack, save, search_strategies
from sgsc.cli import main
from sgsc.layers import quant_layers
from sgsc.strategies import StrategySettings, make_problem
from sgsc.strategies.biases import correct_biases, own_biases
from sgsc.strategies.problem import Problem

from .test_strategies_search import QUICK, SETTINGS, Expert, Loops, Twice, data, network


def answers(model, names, batches):
    """Layer -> (N, C): all that it answers, one row a place."""
    found = {name: [] for name in names}

    def keep(name):
        return lambda _m, _a, y: found[name].append((y if y.dim() < 4 else y.permute(0, 2, 3, 1)).flatten(0, -2))

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def corrected(problem, batches=None):
    problem.set(problem.uniform("max-abs", "min-max"))
    before = answers(problem.model, problem.layers, problem.fit)
    calls = problem.calls
    if batches is not None:
        calls = calls._replace(counts=[calls.counts[0] for _ in batches])
    correct_biases(problem.model, problem.layers, problem.means, batches or problem.together, calls)
    return before


@pytest.mark.parametrize("parts", [1, 3])
def test_mean_answers_are_those_of_the_float_network(parts):
    problem = make_problem(network(), data(), SETTINGS)
    assert len(problem.together) == 1
    batches = [batch.contiguous() for batch in problem.together[0].chunk(parts)]
    before = corrected(problem, batches)
    after = answers(problem.model, problem.layers, problem.fit)
    wanted = answers(fold_batch_norms(network()).model, problem.layers, problem.fit)
    for name in problem.layers:
        off = (before[name].mean(0) - wanted[name].mean(0)).abs().max()
        left = (after[name].mean(0) - wanted[name].mean(0)).abs().max()
        assert left < 1e-5 * wanted[name].abs().max(), name
        assert off > 100 * left, name


def test_a_layer_called_twice_gets_the_mean_of_all_calls():
    problem = make_problem(Twice(), torch.randn(80, 5), SETTINGS)
    before = {name: layer.bias.clone() for name, layer in problem.layers.items()}
    corrected(problem)
    layers, wanted = problem.layers, answers(Twice(), problem.layers, problem.fit)
    assert len(wanted["shared"]) == 2 * len(wanted["head"])
    # nothing comes after the head; of the shared one, the answers with the bias that it had when it was its turn
    head = answers(problem.model, ["head"], problem.fit)["head"]
    torch.testing.assert_close(head.mean(0), wanted["head"].mean(0), rtol=0, atol=1e-5)
    shift = layers["shared"].bias - before["shared"]
    layers["shared"].bias.copy_(before["shared"])
    seen = answers(problem.model, ["shared"], problem.fit)["shared"]
    torch.testing.assert_close(shift.double(), wanted["shared"].mean(0) - seen.mean(0), rtol=0, atol=1e-5)
    assert shift.abs().max() > 1e-3


@pytest.mark.parametrize("make", [lambda: (Loops(), [torch.randn(8, n, 3) for n in (2, 4)]), lambda: (Expert(True), X)])
def test_networks_that_call_layers_as_data_says_are_served(make):
    net, x = make()
    found = search_strategies(net, x, **QUICK)
    assert found.loss <= found.report["best_uniform_loss"]
    assert all(torch.isfinite(layer.bias).all() for layer in quant_layers(found.model).values())


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 2


def test_a_candidate_comes_with_the_bias_of_its_own_error():
    problem = make_problem(network(), data(), SETTINGS)
    problem.set(problem.uniform("mse", "mse"))
    given = problem.given_to("7")
    problem.set({"7": ("max-abs", "min-max")})
    before = answers(problem.model, ["7"], problem.fit)["7"].mean(0)
    problem.correct("7", ("max-abs", "min-max"), given)
    after = answers(problem.model, ["7"], problem.fit)["7"].mean(0)
    torch.testing.assert_close(after, problem.means["7"], rtol=1e-4, atol=1e-5)
    assert (before - after).abs().max() > 1e-2
    problem.set({"7": ("mse", "mse")})
    assert torch.equal(problem.bias("7"), problem.biases["7"])


class Odd(nn.Module):
    """An embedding, a layer without bias, and two that share theirs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bare = nn.Embedding(9, 6), nn.Linear(6, 6, bias=False)
        self.one, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.other.bias = self.one.bias

    def forward(self, ids):
        return self.head(self.other(self.one(self.bare(self.table(ids)).relu()).relu()))


def test_layers_without_a_bias_of_their_own_stay():
    problem = make_problem(Odd(), torch.arange(72).view(24, 3) % 9, SETTINGS)
    assert own_biases(problem.model, problem.layers) == ["head"] == list(problem.means)
    before = problem.layers["one"].bias.clone()
    corrected(problem)
    assert torch.equal(problem.layers["one"].bias, before)
    assert problem.layers["bare"].bias is None


@pytest.mark.parametrize("better", [True, False])
def test_a_correction_is_taken_where_the_loss_is_less(monkeypatch, better):
    problem = make_problem(network(), data(), SETTINGS)
    real, now = Problem.judge, {}
    choice = problem.uniform("max-abs", "min-max")

    def judge(p):
        is_corrected = any(not torch.equal(p.bias(name), p.biases[name]) for name in p.means)
        now.setdefault(is_corrected, []).append(real(p))
        return 0.5 if is_corrected == better else 1.0

    monkeypatch.setattr(Problem, "judge", judge)
    derived = problem.derive(choice)
    assert {key: len(losses) for key, losses in now.items()} == {False: 2, True: 2}
    assert derived.loss == 0.5
    assert any(not torch.equal(problem.bias(name), problem.biases[name]) for name in problem.means) is better
    problem.set(choice)
    assert all(torch.equal(problem.bias(name), bias) for name, bias in problem.biases.items())


@pytest.mark.parametrize("choice", [("max-abs", "min-max"), ("mse", "mse"), ("percentile", "kl")])
def test_no_derived_network_is_worse_than_without(choice):
    losses = []
    for correct_bias in (True, False):
        settings = StrategySettings(bits_weights=3, bits_activations=4, edge_bits=None, correct_bias=correct_bias)
        problem = make_problem(network(), data(), settings)
        losses.append(problem.derive(problem.uniform(*choice)).loss)
        assert problem.judge() == losses[-1]
    assert losses[0] <= losses[1]


def test_the_network_of_the_file_has_the_biases_of_the_derived_one(tmp_path):
    found = search_strategies(network(), data(), **QUICK)
    assert found.report["biases_corrected"]
    assert found.report["correct_bias"]
    folded, x = fold_batch_norms(network()).model, data(20, 5)
    assert not torch.equal(quant_layers(found.model)["3"].bias, folded[3].bias)
    save(pack(found.model), tmp_path / "m.sgsc")
    again = load_into(folded, tmp_path / "m.sgsc")
    with torch.no_grad():
        torch.testing.assert_close(again(x), found.model(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again[3].bias, quant_layers(found.model)["3"].bias)


def test_weights_alone_are_corrected_too():
    found = search_strategies(network(), data(), **{**QUICK, "bits_activations": None})
    assert found.report["biases_corrected"]
    assert not found.report["recalibrated"]


def test_biases_are_those_of_the_float_network_where_it_is_asked_for():
    found = search_strategies(network(), data(), **QUICK, correct_bias=False)
    folded = fold_batch_norms(network()).model
    assert all(torch.equal(layer.bias, folded[int(name)].bias) for name, layer in quant_layers(found.model).items())
    assert (found.report["correct_bias"], found.report["biases_corrected"]) == (False, False)


def test_the_command_has_a_switch(monkeypatch, tmp_path):
    import sgsc.demos.strategies as demo

    asked = []
    monkeypatch.setattr(demo, "search", lambda *_, **how: asked.append(how["correct_bias"]) or 1 / 0)
    for more in ([], ["--no-correct-bias"]):
        with pytest.raises(ZeroDivisionError):
            main(["strategies", "digits", "--out", str(tmp_path), *more])
    assert asked == [True, False]
