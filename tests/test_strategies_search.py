"""`search_strategies`: never worse than what it compares with, right on odd networks, clear about bad input."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgsc import fold_batch_norms, load_into, pack, save, search_strategies
from sgsc.distillation import distilled, divergence
from sgsc.layers import quant_layers
from sgsc.quantizers import StaticInput
from sgsc.strategies import INPUTS, WEIGHTS, StrategySettings, make_problem
from sgsc.strategies.search import ahead, greedy
from sgsc.strategies.settings import mean_of
from sgsc.strategies.settled import Settled


def network(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 9, 10), nn.SiLU(), nn.Linear(10, 4)),
    )
    with torch.no_grad():
        net(torch.randn(64, 1, 6, 6))
        net[0].weight[2, 0, 1, 1] = 9.0  # outliers, so that strategies differ
        net[7].weight[:, 5] *= 12
        for layer in (net[0], net[3], net[7], net[9]):
            layer.weight.mul_(2)
    return net.eval()


def data(n=160, seed=1):
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).abs() ** 1.5


SETTINGS = StrategySettings(bits_weights=3, bits_activations=4, edge_bits=None, select_share=0.25)
QUICK = {
    "steps": 8,
    "batch_size": 32,
    "bits_weights": 3,
    "bits_activations": 4,
    "edge_bits": None,
    "select_share": 0.25,
}


@pytest.fixture(scope="module")
def found():
    return search_strategies(network(), data(), **QUICK)


def test_the_result_is_no_worse_than_any_uniform_choice_and_than_greed_alone(found):
    report = found.report
    losses = [row["loss"] for row in report["uniform"]]
    assert len(losses) == len(report["layers"][0]["weight_losses"]) * len(report["layers"][0]["input_losses"])
    assert found.loss <= report["greedy_loss"] <= min(losses) == report["best_uniform_loss"]
    assert found.loss < 0.95 * min(losses)  # there is something to choose
    assert max(losses) > 2 * min(losses)
    assert report["mixture_greedy_loss"] <= report["mixture_argmax_loss"]


def test_every_layer_reports_its_choice_and_each_candidate_s_loss(found):
    assert [row["name"] for row in found.report["layers"]] == ["0", "3", "7", "9"] == list(found.choice)
    for row in found.report["layers"]:
        assert (
            set(row["weight_losses"])
            == set(row["weight_shares"])
            == {name for name, cls in WEIGHTS.items() if not cls.trained}
        )
        untrained = {name for name, cls in INPUTS.items() if not cls.trained}
        assert set(row["input_losses"]) == set(row["input_shares"]) == untrained
        assert sum(row["input_shares"].values()) == pytest.approx(1)
        for side in ("weight", "input"):
            assert row[f"{side}_losses"][row[side]] < statistics.median(row[f"{side}_losses"].values())
        assert (row["bits_weight"], row["bits_input"]) == (3, 4)


def test_the_derived_model_is_what_was_judged_and_can_be_packed(found):
    net, x = network(), data()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    select = x[order[:40]]
    with torch.no_grad():
        assert divergence(found.model(select), net(select)).item() == pytest.approx(found.loss, rel=1e-3)
    for name, layer in quant_layers(found.model).items():
        assert isinstance(layer.input_quantizer, StaticInput), name
        codes = layer.weight_quantizer.codes(layer.rows())
        assert (codes.bits == 3).all()
        assert codes.levels.max() < 8
    assert not [m for m in found.model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_what_runs_from_the_file_is_the_derived_model(found, tmp_path):
    packed, x = pack(found.model), data(20, 5)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), found.model(x), rtol=1e-4, atol=1e-4)
        save(packed, tmp_path / "m.sgsc")
        again = load_into(fold_batch_norms(network()).model, tmp_path / "m.sgsc")  # the file has no norms
        torch.testing.assert_close(again(x), packed(x), rtol=1e-6, atol=1e-6)


def test_weights_alone_run_from_the_file(tmp_path):
    found = search_strategies(network(), data(), **{**QUICK, "bits_activations": None, "edge_bits": 8})
    x = data(20, 5)
    packed = pack(found.model)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), found.model(x), rtol=1e-5, atol=1e-5)
    assert [row["bits_weight"] for row in found.report["layers"]] == [8, 3, 3, 8]
    assert {row["input"] for row in found.report["layers"]} == {None}
    assert save(packed, tmp_path / "m.sgsc") > 0


def test_the_same_seed_gives_the_same_network(found):
    again = search_strategies(network(), data(), **QUICK)
    assert (again.choice, again.loss) == (found.choice, found.loss)
    other = search_strategies(network(), data(), **QUICK, seed=3)
    assert other.loss != found.loss


def test_the_float_model_is_left_as_it_is():
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    search_strategies(net, data(), **QUICK)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert net.training


def test_one_strategy_of_each_is_taken_everywhere():
    found = search_strategies(network(), data(), **QUICK, weights=["max-abs"], inputs=["kl"])
    assert set(found.choice.values()) == {("max-abs", "kl")}


def test_images_are_judged_by_distance_and_may_differ_in_size():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    images = [torch.rand(2, 1, 5 + i % 3, 6) for i in range(8)]
    found = search_strategies(net, images, loss="l1", steps=4, bits_weights=4, bits_activations=4, seed=1)
    with torch.no_grad():
        assert (found.model(images[0]) - net(images[0])).abs().mean() < 0.1


def test_integer_biases_are_asked_for():
    found = search_strategies(network(), data(), **QUICK, integer_bias=True)
    layer = quant_layers(found.model)["7"]
    code = layer.bias / (layer.weight_quantizer.grid()[0] * layer.input_quantizer.grid()[0])
    torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-3)
    assert found.report["biases_left"] == 0


def test_one_pass_starts_from_the_best_uniform_choice_and_one_from_the_mixture(monkeypatch):
    starts = []
    monkeypatch.setattr(
        "sgsc.strategies.search.greedy", lambda p, start, *rest: starts.append(start) or greedy(p, start, *rest)
    )
    found = search_strategies(network(), data(), **QUICK)
    assert set(starts[0].values()) == {found.uniform} == {tuple(found.report["best_uniform"])}
    assert len(set(starts[1].values())) > 1


# ---- the pass ----


def test_a_lead_counts_beyond_one_standard_error_of_the_same_samples():
    best = torch.arange(5.0).double()
    around = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double()  # standard error of the mean: sqrt(2.5 / 5)
    assert not ahead(best, best)
    assert ahead(best - 1e-9, best)  # the same lead on each sample, however small
    assert not ahead(best + 1e-9, best)
    assert ahead(best - 0.708 + around, best)
    assert not ahead(best - 0.706 + around, best)
    assert ahead(torch.zeros(1).double(), torch.ones(1).double())  # nothing is known of its error
    assert not ahead(torch.ones(1).double(), torch.zeros(1).double())


@pytest.mark.parametrize(
    ("losses", "best", "better"),
    [
        ([1.0, math.nan], [1.0, 2.0], False),
        ([1.0, math.inf], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, math.nan], True),
        ([1.0, 2.0], [1.0, math.inf], True),
        ([1.0, -math.inf], [1.0, 2.0], True),
        ([-math.inf, -math.inf], [-math.inf, 2.0], False),  # both are the best there is
    ],
)
def test_losses_that_are_not_finite_are_compared_too(losses, best, better):
    assert ahead(torch.tensor(losses).double(), torch.tensor(best).double()) is better


def test_a_pass_takes_what_counts_as_a_lead_and_nothing_else(monkeypatch):
    ends = {}
    for name, takes in {
        "none": lambda losses, best: False,
        "every": lambda losses, best: bool(losses.mean() < best.mean()),
        "beyond chance": ahead,
    }.items():
        monkeypatch.setattr("sgsc.strategies.search.ahead", takes)
        problem = make_problem(network(), data(), SETTINGS)
        start = problem.uniform("mse", "mse")
        ends[name] = greedy(problem, start, lambda *_: None, "")
        problem.take(ends[name].network)
        assert problem.judge() == ends[name].loss
    assert ends["none"].choice == start
    assert ends["every"].loss < ends["beyond chance"].loss < ends["none"].loss <= ends["none"].start


@pytest.mark.parametrize(
    "loss",
    [
        "kl",
        "l1",
        "l2",
        lambda got, wanted: (got - wanted).abs().mean(),
        lambda got, wanted: (got - wanted).norm()[None],
    ],
)
def test_each_sample_is_judged_by_itself(loss):
    problem = make_problem(network(), data(), replace(SETTINGS, batch_size=32, loss=loss))
    problem.set(problem.uniform("mse", "mse"))
    net, samples, one = network(), torch.cat(list(problem.select)), mean_of(loss)
    with torch.no_grad():
        own = [one(problem.model(x[None]), net(x[None])).item() for x in samples]
    assert len(own) == 40  # of two batches
    torch.testing.assert_close(problem.losses(), torch.tensor(own).double(), rtol=1e-3, atol=1e-6)
    assert problem.judge() == pytest.approx(statistics.fmean(own), rel=1e-3)


def noise_ratio(got, wanted):
    """-PSNR: infinite between equal answers."""
    return 10 * (got - wanted).square().mean().log10()


def relative(got, wanted):
    """0/0 between answers of zeros."""
    return (got - wanted).norm() / wanted.norm()


def contrast(got, wanted):
    """Of a batch, each answer should be nearer to its own wanted one than to the others': of one sample it is 0."""
    return F.cross_entropy(got.flatten(1) @ wanted.flatten(1).T, torch.arange(len(got)))


def of_two(got, wanted):
    """Raises for one sample."""
    if len(got) < 2:
        raise ValueError("need two samples")
    return (got - wanted).abs().mean()


def a_number_a_pixel(got, wanted):
    """Of a batch one number, of a sample some."""
    return (got - wanted).abs().mean() if len(got) > 1 else (got - wanted).abs().mean((0, 1))


@pytest.mark.parametrize("loss", [noise_ratio, relative, contrast, of_two, a_number_a_pixel])
def test_a_function_that_says_nothing_of_one_sample_judges_batches(loss):
    net = nn.Sequential(*list(network())[:6])  # images of 8 channels; without biases zeros stay zeros
    for layer in (net[0], net[3]):
        layer.bias = None
    for norm in (net[1], net[4]):
        norm.bias, norm.running_mean = None, torch.zeros_like(norm.running_mean)
    samples = data()
    samples[::4] = 0
    found = make_problem(net, samples, replace(SETTINGS, batch_size=32, loss=loss, correct_bias=False))
    found.set(found.uniform("mse", "mse"))
    assert any((x.flatten(1) == 0).all(1).any() for x in found.select)
    wanted = [(loss(y, answers).item(), count) for y, answers, count in found.looks()]
    assert len(wanted) == 2
    torch.testing.assert_close(found.losses(), torch.tensor([v for v, n in wanted for _ in range(n)]).double())
    searched = search_strategies(net, samples, **QUICK, loss=loss)
    assert math.isfinite(searched.loss)
    assert not searched.report["beyond_chance"]


def test_judging_keeps_no_graph_of_a_loss_with_parameters():
    features = nn.Linear(4, 4)
    loss = lambda got, wanted: (features(got) - features(wanted)).square().mean()  # noqa: E731
    problem = make_problem(network(), data(), replace(SETTINGS, loss=loss))
    with torch.enable_grad():
        assert not problem.losses().requires_grad


class Total(nn.Module):
    """Answers of no sample by itself."""

    def __init__(self, reduce):
        super().__init__()
        self.net, self.reduce = network(), reduce

    def forward(self, x):
        return self.reduce(self.net(x))


@pytest.mark.parametrize("reduce", [torch.sum, lambda y: y.sum(0), lambda y: y.sum(0, keepdim=True)])
@pytest.mark.parametrize("loss", ["l1", lambda got, wanted: (got - wanted).abs().mean()])
def test_answers_of_a_whole_batch_are_judged_as_one(reduce, loss):
    model = Total(reduce).eval()
    problem = make_problem(model, data(), replace(SETTINGS, batch_size=32, loss=loss))
    problem.set(problem.uniform("mse", "mse"))
    with torch.no_grad():
        batches = [((problem.model(x) - model(x)).abs().mean().item(), len(x)) for x in problem.select]
    assert [n for _, n in batches] == [20, 20]
    wanted = [loss for loss, n in batches for _ in range(n)]
    torch.testing.assert_close(problem.losses(), torch.tensor(wanted).double(), rtol=1e-3, atol=1e-6)


def test_answers_from_memory_change_nothing(monkeypatch):
    ends = []
    for most in (2**30, 0):
        problem = make_problem(network(), data(), SETTINGS)
        monkeypatch.setattr("sgsc.strategies.search.Settled", lambda p, most=most: Settled(p, most))
        ends.append(greedy(problem, problem.uniform("mse", "mse"), lambda *_: None, ""))
    assert ends[0] == ends[1]
    assert not any("forward" in vars(m) for m in problem.model.modules())


class InPlace(nn.Module):
    """A shortcut that is added in place to what a layer, and no norm any more, has answered."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.Linear(36, 4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        out += x
        return self.head(out.flatten(1))


def test_a_network_that_goes_on_in_place_does_not_change_what_is_remembered():
    ends = []
    for most in (2**30, 0):
        problem = make_problem(InPlace().eval(), data(), SETTINGS)
        choice = problem.uniform("mse", "mse")
        problem.set(choice)
        with Settled(problem, most) as settled:
            settled.add("conv")
            assert bool(settled.added) == bool(most)
            ends.append([problem.judge() for _ in range(3)])
    assert ends[0] == ends[1]
    assert len(set(ends[0])) == 1


class Twice(nn.Module):
    """A layer that is called twice, with another in between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.between, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.shared(F.relu(self.between(self.shared(x)))))


def test_a_module_called_twice_has_one_strategy_and_the_right_loss():
    net, x = Twice(), torch.randn(80, 5)
    found = search_strategies(net, x, **QUICK)
    assert set(found.choice) == {"shared", "between", "head"}
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    select = x[order[:20]]
    with torch.no_grad():
        assert divergence(found.model(select), net(select)).item() == pytest.approx(found.loss, rel=1e-2, abs=1e-6)


def test_edges_are_the_first_and_the_last_of_the_network():
    problem = make_problem(Twice(), torch.randn(40, 5), StrategySettings(bits_weights=3, bits_activations=4))
    assert problem.bits == {"between": (3, 4), "shared": (8, 8), "head": (8, 8)}


def test_batches_are_split_by_samples():
    x = data(40)
    whole, parts = (make_problem(network(), given, SETTINGS) for given in (x, [x[:10], x[10:]]))
    for a, b in zip((*whole.fit, *whole.select), (*parts.fit, *parts.select), strict=True):
        assert torch.equal(a, b)
    one = make_problem(network(), [x[:4]], StrategySettings(select_share=0.9))
    assert [len(batch) for batch in (*one.fit, *one.select)] == [1, 3]


class Loops(nn.Module):
    """A cell that is called once a step of a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, x):
        state = x[:, 0]
        for t in range(x.shape[1]):
            state = torch.tanh(self.cell(state + x[:, t]))
        return self.head(state)


@pytest.mark.parametrize("lengths", [(4, 2, 2), (2, 4, 4)])
def test_a_layer_called_as_often_as_the_data_says_has_seen_all_of_it(lengths):
    make = torch.Generator().manual_seed(0)
    batches = [torch.randn(8, length, 3, generator=make) for length in lengths]
    problem = make_problem(Loops(), batches, SETTINGS)
    assert problem.inputs["cell"].keys() == problem.input_strategies.keys()
    found = search_strategies(Loops(), batches, **QUICK)
    assert isinstance(quant_layers(found.model)["cell"].input_quantizer, StaticInput)


# ---- bad input ----


@pytest.mark.parametrize(("outputs", "shape"), [(1, (4, 1)), (None, (4,))])
def test_answers_among_one_class_are_refused(outputs, shape):
    net = nn.Sequential(nn.Linear(3, outputs or 1), nn.Identity() if outputs else nn.Flatten(0))
    with pytest.raises(ValueError, match=r"loss='kl' compares answers among classes.*take loss='l1'"):
        search_strategies(net, torch.randn(16, 3), steps=2)
    x = torch.randn(16, 3)
    losses = [search_strategies(net, x, steps=2, loss=name).loss for name in ("l1", "l2")]
    assert 0 < losses[1] < losses[0] < 1  # errors below 1 are smaller still, squared


def test_data_that_the_network_does_not_take_is_named():
    with pytest.raises(ValueError, match=r"does not take the calibration data, torch.uint8 of shape \(\d+, 1, 6, 6\)"):
        search_strategies(network(), torch.zeros(20, 1, 6, 6, dtype=torch.uint8), **QUICK)


def test_answers_whose_classes_may_lie_on_another_axis_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))
    with pytest.raises(
        ValueError, match=r"loss='kl' .*\(samples, places, classes\), and the .* \(\d+, 5, 4, 4\); take"
    ):
        search_strategies(net, data(16), steps=2)
    pixels = lambda got, of: divergence(got.movedim(1, -1), of.movedim(1, -1))  # noqa: E731
    assert search_strategies(net, data(16), steps=2, loss=pixels).loss > 0


@pytest.mark.parametrize("nothing", [torch.zeros(0, 1, 6, 6), [], [torch.zeros(0, 1, 6, 6)]])
def test_no_calibration_data_is_refused(nothing):
    with pytest.raises(ValueError, match="no calibration data: want a tensor"):
        search_strategies(network(), nothing, **QUICK)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_calibration_data_that_is_not_finite_is_named(bad):
    x = data(20)
    x[7, 0, 2, 2] = bad
    with pytest.raises(ValueError, match="sample 7 holds NaN or infinity"):
        search_strategies(network(), x, **QUICK)
    with pytest.raises(ValueError, match="sample 7 holds NaN or infinity"):
        search_strategies(network(), list(x.split(2)), **QUICK)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"is torch.float64, which has no quantized form; .*\.float\(\)"):
        search_strategies(network().double(), data(40).double(), **QUICK)
    with pytest.raises(ValueError, match=r"calibration data is torch.float64, the model torch.float32; convert it"):
        search_strategies(network(), data().double(), **QUICK)


def test_data_on_another_device_is_moved():
    with pytest.raises(RuntimeError, match="on meta tensors"):  # a device that every machine has: data was moved there
        search_strategies(network().to("meta"), data(), **QUICK)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([(data(4).numpy(), torch.zeros(4))], "a batch is a tuple; want tensors"),
        (None, "a batch is a NoneType; want tensors"),
        ([data(4).numpy()], "a batch is a ndarray; want tensors"),
        (torch.tensor(1.0), "a batch is a single number; want tensors"),
        (data(4).numpy(), r"is a ndarray; want a tensor .*torch.from_numpy"),
        ({"ids": data(4)}, "is a dict; want a tensor .*a wrapper that takes one tensor"),
    ],
)
def test_data_that_is_no_batch_of_tensors_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        search_strategies(network(), given, **QUICK)


def test_constant_activations_give_the_right_answers():
    net = network()
    for x in (torch.zeros(12, 1, 6, 6), torch.full((12, 1, 6, 6), 0.7)):
        found = search_strategies(net, x, **{**QUICK, "bits_weights": 8, "bits_activations": 8})
        with torch.no_grad():
            torch.testing.assert_close(found.model(x), net(x), rtol=0.1, atol=0.1)


def test_a_single_sample_serves():
    assert search_strategies(network(), data(1), **QUICK).report["samples_fit"] == 1


def test_a_layer_never_called_is_named_and_may_be_skipped():
    net = Twice()
    net.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="never called on the calibration data: unused"):
        search_strategies(net, torch.randn(20, 5), **QUICK)
    assert "unused" not in search_strategies(net, torch.randn(20, 5), **QUICK, skip=["unused"]).choice


class Expert(nn.Module):
    """A layer for samples of a large first value alone."""

    def __init__(self, asked):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.asked = asked  # whether it is called where there is no such sample

    def forward(self, x):
        y, large = self.first(x), x[:, 0] > 2
        if self.asked or large.any():
            y = y.masked_scatter(large[:, None], self.rare(y[large]))
        return self.head(y)


@pytest.mark.parametrize("asked", [True, False])
def test_a_layer_that_no_selecting_sample_reaches_is_served(asked):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    x[order[-1], 0] = 3.0  # the samples that come first select
    found = search_strategies(Expert(asked), x, **QUICK)
    assert isinstance(quant_layers(found.model)["rare"].input_quantizer, StaticInput)
    large = x[order[-1:]]
    with torch.no_grad():
        torch.testing.assert_close(found.model(large), Expert(asked)(large), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("bits", [4, None])
def test_a_layer_called_on_nothing_alone_is_never_called(bits):
    with pytest.raises(ValueError, match="never called on the calibration data: rare"):
        search_strategies(Expert(True), torch.zeros(20, 4), **{**QUICK, "bits_activations": bits})


def test_two_modules_of_one_weight_are_refused_by_name():
    net = Twice()
    net.between.weight = net.shared.weight
    with pytest.raises(ValueError, match="'shared' and 'between' share one weight"):
        search_strategies(net, torch.randn(20, 5), **QUICK)


def test_a_network_that_has_diverged_is_refused():
    net = network()
    with torch.no_grad():
        net[9].bias[0] = math.nan
    with pytest.raises(ValueError, match="the float model answers NaN or infinity"):
        search_strategies(net, data(), **QUICK)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bits_weights": 1}, "bits=1: strategies serve 2 to 8"),
        ({"bits_activations": 9}, "bits=9: strategies serve 2 to 8"),
        ({"edge_bits": 12}, "bits=12: strategies serve 2 to 8"),
        ({"loss": "l3"}, r"loss='l3' is not known; choose one of kl, l1, l2"),
        ({"steps": -1}, "steps=-1: want a whole number, 0 or more"),
        ({"steps": 1.5}, "steps=1.5: want a whole number"),
        ({"batch_size": 1.5}, "batch_size=1.5: want a whole number"),
        ({"seed": "a"}, "seed='a': want a whole number"),
        ({"loss": 3}, "loss=3 is not known"),
        ({"foo": 1}, "foo=1: there is no such setting; there are bits_weights"),
        ({"select_share": 1.0}, "select_share=1.0"),
        ({"weights": ["lsq"]}, "'lsq' is not known without training"),
        ({"inputs": []}, "no strategy is named"),
        ({"inputs": iter([])}, "no strategy is named"),
        ({"weights": "mse"}, r"weights='mse': want several names, such as \['mse'\]"),
    ],
)
def test_arguments_are_checked(wrong, said):
    with pytest.raises(ValueError, match=said):
        search_strategies(network(), data(20), **{**QUICK, **wrong})


def test_progress_is_told():
    phases = {}
    search_strategies(
        network(), data(40), **QUICK, progress=lambda phase, step, steps, values: phases.update({phase: (step, steps)})
    )
    assert list(phases) == [
        *("uniform strategies", "mixture", "greedy pass from the best uniform", "greedy pass from the mixture")
    ]
    assert all(step == steps for step, steps in phases.values())


def test_the_divergence_is_that_of_the_answers():
    a, b = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    p, q = b.softmax(-1), a.softmax(-1)
    assert divergence(a, b).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    assert divergence(a, a).item() == pytest.approx(0, abs=1e-6)


def test_attention_and_half_precision_are_served():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.bfloat16).eval()
    net, x = nn.Sequential(layer, nn.Linear(8, 3, dtype=torch.bfloat16)), torch.randn(24, 5, 8).bfloat16()
    found = search_strategies(net, x, bits_weights=8, bits_activations=8, steps=3)
    assert {"0.self_attn.q_proj", "0.self_attn.out_proj", "0.linear1", "1"} <= found.choice.keys()
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), net(x), rtol=0.1, atol=0.1)
    assert found.model(x).dtype == torch.bfloat16


def test_a_network_is_distilled_at_a_temperature():
    a, b = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for temperature in (1.0, 3.0):
        p, q = (t.div(temperature).softmax(-1).double() for t in (b, a))
        wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean().item()
        assert distilled(a, b, temperature).item() == pytest.approx(wanted, rel=1e-4)
    assert distilled(a, b).item() == distilled(a, b, 4.0).item()
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="want a finite number above 0"):
            distilled(a, b, wrong)
