"""Bias correction: means are those of the float network, and no network that is derived is worse for it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from sgsc import ArtefactError, fold_batch_norms, load_derived, load_into, pack, save, save_derived, search_strategies
from sgsc.cli import main
from sgsc.layers import quant_layers
from sgsc.preparation import prepare
from sgsc.quantizers import StaticInput
from sgsc.strategies import LOSSES, StrategySettings, make_problem
from sgsc.strategies.biases import correct_bias, correct_biases, float_answers, mean_inputs, own_biases
from sgsc.strategies.calibration import count_calls
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
    """Means of before, of batches that are those of the problem cut or joined otherwise."""
    problem.set(problem.uniform("max-abs", "min-max"))
    before = answers(problem.model, problem.layers, problem.fit)
    wanted = problem.answers
    if batches is not None:
        fresh = make_problem(network(), data(), replace(SETTINGS, bits_activations=None))
        wanted = float_answers(fresh.model, fresh.layers, list(fresh.biases), batches)
    correct_biases(problem.model, problem.layers, wanted, batches or problem.fit)
    return before


@pytest.mark.parametrize(("parts", "close"), [(1, 0.01), (3, 0.2)])
def test_mean_answers_are_those_of_the_float_network(parts, close):
    """In one pass: of several batches to first order."""
    problem = make_problem(network(), data(), SETTINGS)
    before = corrected(problem, list(torch.cat(problem.fit[:]).chunk(parts)))
    after = answers(problem.model, problem.layers, problem.fit)
    wanted = answers(fold_batch_norms(network()).model, problem.layers, problem.fit)
    for name in problem.layers:
        off = (before[name].mean(0) - wanted[name].mean(0)).abs().max()
        left = (after[name].mean(0) - wanted[name].mean(0)).abs().max()
        assert left < close * off, name
        if parts == 1:
            assert left < 1e-5 * wanted[name].abs().max(), name


def test_a_layer_called_twice_gets_the_mean_of_all_calls():
    problem = make_problem(Twice(), torch.randn(80, 5), SETTINGS)
    before = corrected(problem)
    after = answers(problem.model, problem.layers, problem.fit)
    wanted = answers(Twice(), problem.layers, problem.fit)
    assert len(wanted["shared"]) == 2 * len(wanted["head"])
    for name in ("shared", "head"):
        off = (before[name].mean(0) - wanted[name].mean(0)).abs().max()
        assert off > 1e-3
        assert (after[name].mean(0) - wanted[name].mean(0)).abs().max() < 0.3 * off, name


def test_one_pass_serves_whatever_the_number_of_layers(monkeypatch):
    """Of two image sizes, so that there are two batches: the cost must not grow with the square of the depth."""
    problem = make_problem(
        nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(6))),
        [torch.randn(6, 2, n, n) for n in (5, 8)],
        replace(SETTINGS, loss="l1"),
    )
    calls = []
    problem.model.register_forward_hook(lambda *_: calls.append(1))
    correct_biases(problem.model, problem.layers, problem.answers, problem.fit)
    assert len(calls) == len(problem.fit) == 2


@pytest.mark.parametrize("make", [lambda: (Loops(), [torch.randn(8, n, 3) for n in (2, 4)]), lambda: (Expert(True), X)])
def test_networks_that_call_layers_as_data_says_are_served(make):
    net, x = make()
    found = search_strategies(net, x, **QUICK)
    assert found.loss <= found.report["best_uniform_loss"]
    assert all(torch.isfinite(layer.bias).all() for layer in quant_layers(found.model).values())


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 2


LAYERS = {
    "linear": (nn.Linear(6, 4), [(5, 6), (3, 6)]),
    "linear on sequences": (nn.Linear(6, 4), [(5, 7, 6), (2, 3, 6)]),
    "linear on one": (nn.Linear(6, 4), [(6,), (9, 6)]),
    "padding": (nn.Conv2d(4, 6, 3, padding=(2, 1)), [(5, 4, 7, 6), (2, 4, 4, 9)]),
    "stride": (nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=1), [(5, 4, 7, 6), (2, 4, 8, 9)]),
    "groups and dilation": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=1), [(5, 4, 7, 8), (2, 4, 6, 9)]),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), [(5, 4, 7, 6)]),
    "reflection": (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), [(5, 4, 7, 6), (2, 4, 4, 9)]),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same"), [(5, 4, 7, 6)]),
    "signal": (nn.Conv1d(4, 6, 3, padding=2, stride=2), [(5, 4, 9), (7, 4, 6)]),
    "unbatched": (nn.Conv2d(4, 6, 3), [(4, 7, 6), (4, 5, 5)]),
}


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_candidate_s_bias_is_found_without_its_answers(name, rounded):
    layer, shapes = LAYERS[name]
    model = nn.Sequential(prepare(layer, quantizer="lsq3").model).eval()
    torch.manual_seed(0)
    batches = [torch.randn(shape) + 0.3 for shape in shapes]
    quantizers = {"coarse": StaticInput(0.7, -2, 3), "fine": StaticInput(0.1, -4, 200)} if rounded else {None: None}
    calls = count_calls(model, {"0": model[0]}, batches)
    wanted = torch.randn(len(layer.weight), dtype=torch.float64)
    given = mean_inputs(model, "0", model[0], quantizers, batches, calls.counts)
    for key, quantizer in quantizers.items():
        model[0].input_quantizer = quantizer
        correct_bias(model[0], wanted, given[key])
        assert model[0].input_quantizer is quantizer
        with torch.no_grad():
            rows = [model(x).movedim(-1 if "linear" in name else -2 if "signal" in name else -3, 0) for x in batches]
        means = torch.cat([row.reshape(len(row), -1) for row in rows], 1).double().mean(1)
        torch.testing.assert_close(means, wanted, rtol=0, atol=1e-5)


def test_a_candidate_s_bias_is_that_of_all_calls():
    problem = make_problem(Twice(), torch.randn(80, 5), SETTINGS)
    for choice in (("max-abs", "min-max"), ("mse", "mse")):
        problem.set(problem.uniform("mse", "mse"))
        given = problem.given_to("shared")
        before = answers(problem.model, ["shared"], problem.fit)["shared"].mean(0)
        problem.correct("shared", ("mse", "mse"), given)
        shift = problem.bias("shared") - problem.biases["shared"]
        wanted = answers(Twice(), ["shared"], problem.fit)["shared"].mean(0)
        torch.testing.assert_close(shift.double(), wanted - before, rtol=0, atol=1e-5)
        problem.set({"shared": choice})
        assert torch.equal(problem.bias("shared"), problem.biases["shared"])


def test_a_layer_that_is_called_on_nothing_keeps_its_bias():
    layer = prepare(nn.Linear(3, 2), quantizer="lsq3").model
    before = layer.bias.clone()
    calls = count_calls(nn.Sequential(layer), {"0": layer}, [torch.zeros(0, 3)])
    given = mean_inputs(nn.Sequential(layer), "0", layer, {None: None}, [torch.zeros(0, 3)], calls.counts)
    assert given == {None: None}
    correct_bias(layer, torch.ones(2, dtype=torch.float64), given[None])
    assert torch.equal(layer.bias, before)


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


def test_layers_that_share_a_bias_stay_and_one_without_is_given_one():
    problem = make_problem(Odd(), torch.arange(72).view(24, 3) % 9, SETTINGS)
    assert own_biases(problem.model, problem.layers) == ["bare", "head"] == list(problem.biases)
    assert problem.added == ["bare"]
    before = problem.layers["one"].bias.clone()
    assert not problem.layers["bare"].bias.any()
    corrected(problem)
    assert torch.equal(problem.layers["one"].bias, before)
    assert problem.layers["bare"].bias.any()


def bare_network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.Flatten()),
        nn.Linear(32, 3, bias=False),
    ).eval()


@pytest.mark.parametrize("integer_bias", [False, True])
def test_biases_that_a_network_lacks_come_with_its_files(tmp_path, integer_bias):
    x = data(80, 3)[..., :6, :6]
    how = {"bits_weights": 3, "edge_bits": None, "integer_bias": integer_bias}
    found = search_strategies(bare_network(), x, **{**QUICK, **how})
    given = {name: layer.bias for name, layer in quant_layers(found.model).items()}
    assert found.report["biases_added"] == sum(bias is not None for bias in given.values()) > 0
    assert all(bias is None or bias.any() for bias in given.values())
    plain = search_strategies(bare_network(), x, **{**QUICK, **how}, correct_bias=False)
    assert plain.report["biases_added"] == 0
    assert all(layer.bias is None for layer in quant_layers(plain.model).values())
    assert integer_bias or found.loss < plain.loss
    save(pack(found.model), tmp_path / "m.sgsc")
    save_derived(found.model, tmp_path / "derived.safetensors")
    packed, derived = (
        load(bare_network(), tmp_path / name)
        for load, name in ((load_into, "m.sgsc"), (load_derived, "derived.safetensors"))
    )
    for name, bias in given.items():
        for other in (packed, derived):
            assert (other.get_submodule(name).bias is None) == (bias is None)
            assert bias is None or torch.equal(other.get_submodule(name).bias, bias)
    with torch.no_grad():
        assert torch.equal(derived(x), found.model(x))
        torch.testing.assert_close(packed(x), found.model(x), rtol=1e-4, atol=1e-4)


def test_an_added_bias_that_helps_nothing_is_taken_back(monkeypatch):
    monkeypatch.setattr("sgsc.strategies.problem.correct_biases", lambda *_: None)
    monkeypatch.setattr("sgsc.strategies.problem.correct_bias", lambda *_: None)
    found = search_strategies(bare_network(), data(80, 3)[..., :6, :6], **QUICK)
    assert (found.report["biases_added"], found.report["biases_corrected"]) == (0, False)
    assert all(layer.bias is None for layer in quant_layers(found.model).values())


class Looks(nn.Module):
    """Answers otherwise, or fails, where a layer has a bias."""

    def __init__(self, fails):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.fails = nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False), fails

    def forward(self, x):
        assert not self.fails or self.body.bias is None
        y = self.body(x)
        return self.head(y.relu() if self.body.bias is None else y)


@pytest.mark.parametrize("fails", [True, False])
def test_a_network_that_looks_for_biases_is_given_none(fails):
    x = torch.randn(80, 6)
    found = search_strategies(Looks(fails), x, **QUICK)
    assert found.report["biases_added"] == 0
    assert all(layer.bias is None for layer in quant_layers(found.model).values())
    problem = make_problem(Looks(fails), x, SETTINGS)
    assert (problem.added, problem.biases) == ([], {})


NETWORKS = {
    "one layer": (lambda: nn.Linear(6, 3, bias=False), (6,)),
    "attention": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, bias=False), nn.Linear(8, 3, bias=False)
        ),
        (5, 8),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_of_all_kinds_of_layers_bring_their_biases(name, dtype, tmp_path):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    network, x = make().to(dtype).eval(), (torch.rand(80, *shape) + 0.3).to(dtype)
    problem = make_problem(network, x, StrategySettings(bits_weights=2, edge_bits=None, batch_size=32))
    problem.set(problem.uniform("max-abs", "min-max"))
    correct_biases(problem.model, problem.layers, problem.answers, problem.fit)
    assert problem.added == list(problem.layers)
    assert all(layer.bias.any() for layer in problem.layers.values())
    save(pack(problem.model), tmp_path / "m.sgsc")
    save_derived(problem.model, tmp_path / "d")
    with torch.no_grad():
        wanted = problem.model(x)
        assert torch.equal(load_derived(network, tmp_path / "d")(x), wanted)
        close = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(load_into(network, tmp_path / "m.sgsc")(x), wanted, rtol=close, atol=close)


@pytest.mark.parametrize("bad", [torch.full((3,), torch.nan), torch.ones(3).double(), torch.ones(4), torch.ones(3, 1)])
def test_a_bias_that_no_search_gives_is_refused(bad, tmp_path):
    problem = make_problem(nn.Linear(6, 3, bias=False), torch.randn(80, 6), SETTINGS)
    problem.set(problem.uniform("mse", "mse"))
    problem.model.bias = nn.Parameter(bad)
    save_derived(problem.model, tmp_path / "d")
    with pytest.raises(ValueError, match=r"does not fit the network: .*bias"):
        load_derived(nn.Linear(6, 3, bias=False), tmp_path / "d")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_added_biases_of_halves_are_whole_steps_or_none(dtype):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16, bias=False), nn.ReLU(), nn.Linear(16, 3, bias=False)).to(dtype).eval()
    how = {**QUICK, "bits_weights": 2, "edge_bits": None, "integer_bias": True}
    found = search_strategies(network, torch.rand(80, 6).to(dtype), **how)
    assert found.report["biases_left"] == 0
    for layer in quant_layers(found.model).values():
        step = layer.weight_quantizer.grid()[0].double() * layer.input_quantizer.grid()[0].double()
        codes = torch.zeros(()) if layer.bias is None else layer.bias.double() / step
        assert ((codes - codes.round()).abs() <= 0.01 + codes.abs() * 2.0**-23).all()


@pytest.mark.parametrize("name", ["l1", "l2"])
def test_small_differences_of_halves_are_told(name):
    a, b = torch.full((4, 3), 0.02, dtype=torch.float16), torch.full((4, 3), 0.0201, dtype=torch.float16)
    assert 0 < LOSSES[name](a, b).mean() < 1e-3
    assert (
        LOSSES[name](300 * torch.ones(2).half(), -300 * torch.ones(2).half()) == (600 if name == "l1" else 360000)
    ).all()


def test_a_bias_of_a_table_is_refused(tmp_path):
    torch.manual_seed(0)
    made = pack(prepare(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3))).model)
    made[0].bias = torch.ones(9)
    save(made, tmp_path / "m.sgsc")
    with pytest.raises(ArtefactError, match=r"layer '0': its bias .* want None"):
        load_into(nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)), tmp_path / "m.sgsc")


@pytest.mark.parametrize("better", [True, False])
def test_a_correction_is_taken_where_the_loss_is_less(monkeypatch, better):
    problem = make_problem(network(), data(), SETTINGS)
    real, now = Problem.judge, {}
    choice = problem.uniform("max-abs", "min-max")

    def judge(p):
        is_corrected = any(not torch.equal(p.bias(name), p.biases[name]) for name in p.biases)
        now.setdefault(is_corrected, []).append(real(p))
        return 0.5 if is_corrected == better else 1.0

    monkeypatch.setattr(Problem, "judge", judge)
    derived = problem.derive(choice)
    assert {key: len(losses) for key, losses in now.items()} == {False: 2, True: 2}
    assert derived.loss == 0.5
    assert any(not torch.equal(problem.bias(name), problem.biases[name]) for name in problem.biases) is better
    problem.set(choice)
    assert all(torch.equal(problem.bias(name), bias) for name, bias in problem.biases.items())


@pytest.mark.parametrize("choice", [("max-abs", "min-max"), ("mse", "mse"), ("percentile", "kl")])
def test_no_derived_network_is_worse_than_without(choice):
    losses = []
    for corrects in (True, False):
        problem = make_problem(network(), data(), replace(SETTINGS, correct_bias=corrects))
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
