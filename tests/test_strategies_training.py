"""Training with strategies: stages, two optimisers of one backward, and what is left at the end."""

import copy
import json

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from sgsc import (
    StrategyTraining,
    load_checkpoint,
    load_derived,
    save_checkpoint,
    save_derived,
    search_strategies,
)
from sgsc.layers import quant_layers
from sgsc.strategies import INPUTS, WEIGHTS
from sgsc.strategies.mixture import MixedInput, MixedWeights, mixtures
from sgsc.strategies.registry import strategies

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
    with pytest.raises(ValueError, match="steps=0: want a whole number, 1 or more"):
        run_of(net, x, steps=0)
    with pytest.raises(
        ValueError, match=r"'mse' is not known to training; choose of lsq, lsq\+, pact, straight-through"
    ):
        run_of(net, x, inputs=["mse"])
    with pytest.raises(ValueError, match="the loss is nan at step 0"):
        run_of(net, x).step(torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="the loss is a float; want a tensor of one number"):
        run_of(net, x).step(1.0)
    with pytest.raises(ValueError, match=r"the loss has shape \(2,\); want a tensor of one number"):
        run_of(net, x).step(torch.ones(2))


class Twice(nn.Module):
    """Calls a layer two times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()).relu())


@pytest.mark.parametrize("weights", strategies(WEIGHTS, None, True))
@pytest.mark.parametrize("inputs", strategies(INPUTS, None, True))
def test_a_layer_is_called_twice_before_a_backward_by_any_strategy(weights, inputs):
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    run = StrategyTraining(Twice(), x, steps=6, weights=[weights], inputs=[inputs])
    while not run.done:
        run.step(F.cross_entropy(run.model(x), y) + F.cross_entropy(run.model(x + 0.1), y))  # and two forwards


def test_a_layer_is_called_twice_before_a_backward_of_a_mixture():
    x, y = torch.randn(32, 8), torch.randint(4, (32,))
    run = StrategyTraining(Twice(), x, steps=10)
    while not run.done:
        run.step(F.cross_entropy(run.model(x), y) + F.cross_entropy(run.model(x + 0.1), y))


@pytest.mark.parametrize("done", [1, 5, 12])
def test_a_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(done, tmp_path):
    net, x, y = problem()

    def steps(run, count):
        for _ in range(count):
            run.step(F.cross_entropy(run.model(x), y))

    whole, before, after = (run_of(net, x) for _ in range(3))
    steps(whole, 20)
    steps(before, done)
    save_checkpoint(tmp_path / "checkpoint", before.state_dict())
    after.load_state_dict(load_checkpoint(tmp_path / "checkpoint"))
    steps(after, 20 - done)
    assert (after.choice, after.shares, after.stage) == (whole.choice, whole.shares, "settled")
    state = after.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    with pytest.raises(ValueError, match="20 steps are done; make a new StrategyTraining, then load"):
        after.load_state_dict(before.state_dict())
    for other, said in (
        ({"steps": 21}, "steps=20 there, 21 here"),
        ({"bits_weights": 4}, "bits_weights=3 there, 4 here"),
    ):
        with pytest.raises(ValueError, match=f"of a training with other arguments .*{said}"):
            run_of(net, x, **other).load_state_dict(before.state_dict())


def gradients(model, x):
    """Of all that learns in the grids."""
    model.zero_grad()
    model(x).square().sum().backward()
    learned = {n: p.grad for n, p in model.named_parameters() if "quantizer" in n and p.grad is not None}
    return {name: gradient.tolist() for name, gradient in learned.items()}


@pytest.mark.parametrize("fold", [False, True])
def test_the_file_of_a_trained_network_is_that_network(fold, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x, y = torch.randn(32, 1, 5, 5), torch.randint(3, (32,))
    for names in zip(*(strategies(registry, None, True) for registry in (WEIGHTS, INPUTS)), strict=False):
        run = StrategyTraining(net, x, steps=4, fold=fold, weights=[names[0]], inputs=[names[1]])
        while not run.done:
            run.step(F.cross_entropy(run.model(x), y))
        save_derived(run.model, tmp_path / "derived")
        again = load_derived(net, tmp_path / "derived")
        assert torch.equal(again(x), run.model.eval()(x))
        assert gradients(again, x) == gradients(run.model, x)  # learned steps are as slow as they were
    with pytest.raises(ValueError, match="holds no strategy, or a mixture of several"):
        save_derived(StrategyTraining(net, x, steps=4).model, tmp_path / "other")


def test_a_file_that_is_none_of_a_derived_network_or_of_another_is_refused(tmp_path):
    net, x, _ = problem()
    found = search_strategies(net, x, steps=2, skip=["3"])
    save_derived(found.model, tmp_path / "derived")
    assert torch.equal(load_derived(net, tmp_path / "derived")(x), found.model(x))
    with pytest.raises(ValueError, match="does not fit the network: "):
        load_derived(nn.Sequential(nn.Linear(3, 4)), tmp_path / "derived")
    with pytest.raises(ValueError, match="is not the file of a derived network"):
        load_derived(net, tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk" * 9)
    with pytest.raises(ValueError, match="is not the file of a derived network"):
        load_derived(net, tmp_path / "junk")
    for changes in ({"scale": float("nan")}, {"bit_depth": 30.0}):
        spoilt = copy.deepcopy(found.model)
        for name, value in changes.items():
            quant_layers(spoilt)["0"].weight_quantizer.get_buffer(name).fill_(value)
        state = safetensors.torch.save(
            spoilt.state_dict(), metadata={"layers": json.dumps({"0": ["mse", True, 8, None]})}
        )
        (tmp_path / "spoilt").write_bytes(state)
        with pytest.raises(ValueError, match="does not fit the network: "):
            load_derived(net, tmp_path / "spoilt")
    (tmp_path / "deep").write_bytes(safetensors.torch.save({}, metadata={"layers": "[" * 100000}))
    with pytest.raises(ValueError, match="is not the file of a derived network"):
        load_derived(net, tmp_path / "deep")
