"""Costs that are known before training, against the file, the layers and the clock."""

import pytest
import torch
from torch import nn

from sgsc import pack, prepare, stored_size
from sgsc.demos import models
from sgsc.layers import quant_layers
from sgsc.search import cost as cost_module
from sgsc.search.candidates import build, parent_of
from sgsc.search.cost import BANDWIDTH, PEAK, Budget, Configuration, CostModel
from sgsc.search.structure import structure_of

NETWORKS = {
    "digits-cnn": (models.DigitsCNN, torch.zeros(1, 1, 8, 8)),
    "resnet20": (models.ResNet20, torch.zeros(1, 3, 32, 32)),
    "mnist-cnn": (models.MnistCNN, torch.zeros(1, 1, 28, 28)),
    "char-lm": (lambda: models.CharLM(30, 8, 32, 2, 4), torch.zeros(1, 8, dtype=torch.long)),
}


@pytest.fixture(params=NETWORKS, scope="module")
def problem(request):
    make, example = NETWORKS[request.param]
    model = prepare(make(), quantizer="lsq8").model
    structure = structure_of(model)
    kept = {"architecture": (request.param, {"a": 1}), "notes": {"said": 'a "quote" and ü'}}
    return model, structure, CostModel(model, structure, example, **kept), kept


def random_configuration(structure, make):
    def pick(choices):
        return choices[int(torch.randint(len(choices), (1,), generator=make))]

    sizes = {g: pick(range(1, 2 * n + 1)) for g, n in structure.sizes.items()}
    return Configuration({name: pick((2, 3, 4, 6, 8)) for name in structure.layers}, sizes)


def test_bytes_are_those_of_the_file(problem):
    model, structure, cost, kept = problem
    make = torch.Generator().manual_seed(0)
    for _ in range(6):
        chosen = random_configuration(structure, make)
        built = build(model, structure, chosen)
        assert cost(chosen)["bytes"] == stored_size(pack(built, remove=False), **kept)


@pytest.mark.parametrize("note", range(8))
def test_bytes_are_exact_at_every_alignment_of_the_header(note):
    """A digit more, of a depthwise layer's groups too, is seen at one of eight lengths alone."""
    model = nn.Sequential(
        *(nn.Conv2d(1, 60, 3), nn.ReLU(), nn.Conv2d(60, 60, 3, groups=60), nn.ReLU(), nn.Conv2d(60, 4, 1)),
        *(nn.Flatten(), nn.Linear(64, 3)),
    )
    model.register_buffer("table", torch.zeros(5, dtype=torch.int8))
    model.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
    model = prepare(model, quantizer="lsq8").model
    structure, kept = structure_of(model), {"notes": {"said": "x" * note}}
    cost = CostModel(model, structure, torch.zeros(1, 1, 8, 8), **kept)
    (group,) = [g for g, n in structure.sizes.items() if n == 60]
    for channels in (1, 9, 10, 60, 99, 100):
        chosen = Configuration(dict.fromkeys(structure.layers, 3), {group: channels})
        built = build(model, structure, chosen)
        assert built[2].groups == channels
        assert cost(chosen)["bytes"] == stored_size(pack(built, remove=False), **kept)


def test_a_shared_layer_takes_its_time_at_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x):
            return self.one(self.one(x))

    model = prepare(Twice(), quantizer="lsq8").model
    cost = CostModel(model, structure_of(model), torch.zeros(1, 4))
    cost.times["one", 4] = 0.5
    assert cost(Configuration({"one": 4}), ["seconds"]) == {"seconds": 1.0}


def test_costs_that_are_not_named_are_not_counted(problem, monkeypatch):
    _, structure, cost, _ = problem
    chosen = Configuration(dict.fromkeys(structure.layers, 4))
    every = cost(chosen)
    assert {name: cost(chosen, [name]) for name in every} == {name: {name: n} for name, n in every.items()}
    monkeypatch.setattr(cost_module.json, "dumps", lambda *_, **__: pytest.fail("a header is made"))
    assert cost(chosen, Budget(mean_bits=4).limits()) == {"mean_bits": 4}


def test_mean_bits_and_macs_are_those_of_the_layers(problem):
    model, structure, cost, _ = problem
    chosen = random_configuration(structure, torch.Generator().manual_seed(1))
    layers = quant_layers(build(model, structure, chosen))
    weights = {name: layer.weight.numel() for name, layer in layers.items()}
    found = cost(chosen)
    assert found["mean_bits"] == pytest.approx(
        sum(n * chosen.bits[name] for name, n in weights.items()) / sum(weights.values())
    )
    assert found["macs"] == sum(n * cost.places[name] for name, n in weights.items())


def test_places_are_pixels_and_positions():
    model = prepare(models.ResNet20(), quantizer="lsq8").model
    cost = CostModel(model, structure_of(model), torch.zeros(2, 3, 32, 32))
    assert cost.places["stem.conv"] == 1024
    assert cost.places["blocks.8.second.conv"] == 64
    assert cost.places["head"] == 1
    chosen = Configuration(dict.fromkeys(cost.shapes, 4))
    assert cost(chosen)["macs"] == 40_551_040  # arXiv 1512.03385 has 41 million


def test_latency_is_the_roofline_until_it_was_measured():
    model = prepare(models.DigitsCNN(), quantizer="lsq8").model
    example = torch.rand(1, 1, 8, 8)
    cost = CostModel(model, structure_of(model), example)
    assert cost.seconds("head", 8, 10, 512) == max(5120 / PEAK, 5120 / BANDWIDTH)
    assert cost.seconds("first.0", 8, 128, 288) == 16 * 128 * 288 / PEAK
    cost.measure(model, example, (4, 8), repeats=3)
    assert set(cost.times) == {(name, bits) for name in cost.shapes for bits in (4, 8)}
    measured = cost.times["first.0", 4]
    assert cost.seconds("first.0", 4, 128, 288) == pytest.approx(measured)
    assert cost.seconds("first.0", 4, 64, 288) == pytest.approx(measured / 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_as_it_stands_takes_the_times_that_were_measured(name):
    make, example = NETWORKS[name]
    model = prepare(make(), quantizer="lsq8").model
    structure = structure_of(model)
    cost = CostModel(model, structure, example)
    cost.measure(model, example, (4,), repeats=1)
    assert set(cost.times) == {(name, 4) for name in structure.layers}
    found = cost(Configuration(dict.fromkeys(structure.layers, 4)))["seconds"]
    assert found == pytest.approx(sum(cost.times.values()))  # tables too, which multiply nothing


def test_more_bits_never_count_as_faster(monkeypatch):
    model = prepare(models.DigitsCNN(), quantizer="lsq8").model
    example = torch.rand(1, 1, 8, 8)
    cost = CostModel(model, structure_of(model), example)
    clock = iter([t for seconds in (5.0, 3.0, 4.0, 6.0) * 6 for t in (0.0, seconds) * 2])  # of 2, 3, 4 and 8 bits
    monkeypatch.setattr(cost_module.time, "perf_counter", lambda: next(clock))
    cost.measure(model, example, (8, 4, 3, 2), repeats=1)
    assert [cost.times["head", bits] for bits in (2, 3, 4, 8)] == [5.0, 5.0, 5.0, 6.0]


def test_a_budget_wants_a_positive_limit():
    with pytest.raises(ValueError, match="no budget was given; want at least one of bytes, mean_bits"):
        Budget()
    with pytest.raises(ValueError, match=r"budget mean_bits=-1\.0: want more than 0"):
        Budget(mean_bits=-1)
    both = Budget(bytes=100, mean_bits=4)
    assert both.holds({"bytes": 100, "mean_bits": 4, "macs": 1e9, "seconds": 1})
    assert not both.holds({"bytes": 101, "mean_bits": 4})


class TimeFirst(nn.Module):
    """Samples first outside, places first inside."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.inner(x.transpose(0, 1)).mean(0))


def test_multiplications_are_those_of_one_sample_wherever_its_axis_is():
    parent = parent_of(TimeFirst())
    cost = CostModel(parent, structure_of(parent), torch.randn(3, 50, 8))
    assert cost.places == {"inner": 50, "out": 1}
    bits = dict.fromkeys(quant_layers(parent), 8)
    assert cost(Configuration(bits))["macs"] == 50 * 8 * 16 + 16 * 4
