"""Training with strategies: stages, two optimisers of one backward, and what is left at the end."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgsc import StrategyTraining
from sgsc.layers import quant_layers
from sgsc.strategies.mixture import MixedInput, MixedWeights, mixtures

from .test_strategies_search import data, network


def problem(seed=0):
    net, x = network(seed), data(256, seed)
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def run_of(net, x, **how):
    return StrategyTraining(net, x[:64], **{"steps": 20, "bits_weights": 3, "bits_activations": 3, **how})


def train(run, x, y):
    said = []
    while not run.done:
        place = torch.randint(len(x), (32,))
        said.append((run.stage, run.step(F.cross_entropy(run.model(x[place]), y[place]))))
    return said


def test_three_stages_follow_one_another():
    net, x, y = problem()
    run = run_of(net, x)
    assert all(isinstance(layer.weight_quantizer, MixedWeights) for layer in quant_layers(run.model).values())
    said = train(run, x, y)
    assert [stage for stage, _ in said] == ["warm-up"] * 2 + ["search"] * 6 + ["settled"] * 12
    assert not mixtures(run.model)
    assert set(run.choice) == set(quant_layers(run.model))
    rates = [values["learning_rate"] for _, values in said]
    assert max(rates[8:11]) > 3 * rates[7]  # it starts anew
    assert rates[-1] < 0.1 * max(rates)
    with pytest.raises(RuntimeError, match="all 20 steps are done"):
        run.step(torch.zeros(()))


def test_shares_stay_while_it_warms_up_and_move_in_the_same_backward_as_weights():
    net, x, y = problem()
    run = run_of(net, x)
    layer = quant_layers(run.model)["3"]
    for _ in range(2):
        run.step(F.cross_entropy(run.model(x), y))
        assert not layer.weight_quantizer.logits.any()
    before = layer.weight.detach().clone()
    run.step(F.cross_entropy(run.model(x), y))
    assert layer.weight_quantizer.logits.any()
    assert layer.input_quantizer.logits.any()
    assert not torch.equal(layer.weight, before)
    decays = {id(p): g["weight_decay"] for g in run.optimiser.param_groups for p in g["params"]}
    assert not {id(m.logits) for m in mixtures(run.model)} & decays.keys()
    steps = [p for name, p in run.model.named_parameters() if name.endswith("step") and p.requires_grad]
    assert {decays[id(p)] for p in steps} == {0}
    assert decays[id(layer.weight)] > 0
    assert {g["weight_decay"] for g in run.of_shares.param_groups} == {0}


def test_the_temperature_falls_while_it_searches():
    net, x, y = problem()
    run = run_of(net, x)
    seen = []
    while run.stage != "settled":
        run.step(F.cross_entropy(run.model(x), y))
        seen += [m.temperature for m in mixtures(run.model)][:1]
    assert seen == sorted(seen, reverse=True)
    assert seen[0] == 1.0 > seen[-1]


def test_training_wins_back_what_rounding_lost():
    x = torch.randn(512, 8)
    y = ((x[:, :4] * x[:, 4:]).sum(1) > 0).long()
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    run = run_of(net, x, steps=150, rate=1e-2, edge_bits=None, bits_weights=2, bits_activations=2)
    with torch.no_grad():
        start = F.cross_entropy(run.model.eval()(x), y).item()
    run.model.train()
    train(run, x, y)
    with torch.no_grad():
        assert F.cross_entropy(run.model.eval()(x), y).item() < 0.5 * start  # measured: 0.26


def test_what_is_trained_is_what_is_stored():
    net, x, y = problem()
    run = run_of(net, x, edge_bits=None)
    train(run, x, y)
    run.model.eval()
    for layer in quant_layers(run.model).values():
        rows = layer.rows().detach()
        codes = layer.weight_quantizer.codes(rows)
        stored = (codes.levels.float() + codes.offset[:, None]) * codes.scale[:, None]
        assert torch.equal(stored, layer.weight_quantizer(rows).detach())
        assert (codes.bits == 3).all()
        scale, low, high, shift = (v.item() for v in layer.input_quantizer.grid())
        assert (low, high, shift) == (round(low), round(high), 0)
        assert scale > 0
        assert low <= 0 <= high <= low + 255


def test_one_strategy_of_each_trains_without_a_search():
    net, x, _ = problem()
    run = run_of(net, x, weights=["lsq"], inputs=["pact"])
    assert run.stage == "settled"
    assert set(run.choice.values()) == {("lsq", "pact")}


def test_inputs_may_stay_float_and_norms_may_be_folded():
    net, x, y = problem()
    run = run_of(net, x, bits_activations=None, fold=True)
    assert not [m for m in run.model.modules() if isinstance(m, (nn.BatchNorm2d, MixedInput))]
    train(run, x, y)
    assert {given for _, given in run.choice.values()} == {None}


def test_norms_train_on_unless_they_are_folded():
    net, x, _ = problem()
    assert len([m for m in run_of(net, x).model.modules() if isinstance(m, nn.BatchNorm2d)]) == 2


def test_bad_input_is_refused():
    net, x, _ = problem()
    with pytest.raises(ValueError, match="steps=0: want 1 or more"):
        run_of(net, x, steps=0)
    with pytest.raises(
        ValueError, match=r"'mse' is not known to training; choose of lsq, lsq\+, pact, straight-through"
    ):
        run_of(net, x, inputs=["mse"])
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        run_of(net, x).step(torch.tensor(float("nan")))
