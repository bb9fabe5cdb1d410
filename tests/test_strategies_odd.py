"""Networks, losses and strategies that do what few do: right results, or errors that name what is wrong."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgsc import StrategyTraining, load_into, pack, prepare, save, search_strategies
from sgsc.distillation import divergence
from sgsc.layers import quant_layers
from sgsc.quantizers import StaticInput
from sgsc.samples import outputs
from sgsc.strategies import INPUTS, WEIGHTS, StrategySettings, make_problem
from sgsc.strategies import problem as problem_module
from sgsc.strategies.biases import round_biases
from sgsc.strategies.calibration import calibrate
from sgsc.strategies.registry import RangeStrategy, WeightStrategy
from sgsc.strategies.settled import Settled

QUICK = {"steps": 4, "batch_size": 16}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def data(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1)) + 0.5


class Last(nn.Module):
    """Answers a view of all that it is given, as language models do."""

    def forward(self, x):
        return x[:, -1]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return self.body(x.sub_(0.5))


def test_a_network_that_changes_its_input_in_place_is_judged_on_what_was_given():
    x = data()
    found = search_strategies(InPlace(), x, bits_weights=4, bits_activations=4, **QUICK)
    apart = search_strategies(net(), x - 0.5, bits_weights=4, bits_activations=4, **QUICK)
    assert torch.equal(x, data())
    assert found.loss == apart.loss
    assert {n.removeprefix("body."): c for n, c in found.choice.items()} == apart.choice
    assert torch.equal(outputs(found.model, x), outputs(apart.model, x - 0.5))
    assert torch.equal(x, data())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_search_where_gradients_are_off_finds_the_same(around):
    with around():
        found = search_strategies(net(), data(), **QUICK)
    assert found.loss == search_strategies(net(), data(), **QUICK).loss


def test_a_loss_that_is_not_finite_is_worse_than_any():
    best = search_strategies(net(), data(), **QUICK).uniform
    settings = {name: value for name, value in QUICK.items() if name != "steps"}
    problem = make_problem(net(), data(), StrategySettings(**settings))
    problem.derive(problem.uniform(*best), recalibrate=False)
    most = 1.001 * problem.losses().max()

    def loss(got, wanted):  # one sample is enough
        found = divergence(got, wanted)
        return found * (float("nan") if found > most else 1.0)

    found = search_strategies(net(), data(), loss=loss, **QUICK)
    finite = [math.isfinite(row["loss"]) for row in found.report["uniform"]]
    assert 0 < sum(finite) < len(finite)
    assert 0 <= found.loss <= found.report["best_uniform_loss"] < float("inf")


def test_a_loss_that_is_never_finite_is_refused():
    def loss(got, wanted):
        return (got - wanted).abs().mean() * (float("inf") if not torch.equal(got, wanted) else 1.0)

    with pytest.raises(ValueError, match=r"with none of \d+ pairs of strategies the loss is finite; give more bits"):
        search_strategies(net(), data(), loss=loss, **QUICK)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda a, b: 0.5, "0.5"),
        (lambda a, b: (a - b).abs().mean(1), r"\(16,\)"),
        (lambda a, b: a.mean() * torch.nan, "nan"),
    ],
)
def test_what_is_no_loss_is_refused(loss, said):
    with pytest.raises(
        ValueError, match=rf"loss of the model's answers with themselves is .*{said}.*; want a tensor of one number"
    ):
        search_strategies(net(), data(), loss=loss, **QUICK)


def test_probabilities_are_no_logits():
    with pytest.raises(ValueError, match=r"loss='kl' takes logits, and the model's outputs are probabilities"):
        search_strategies(nn.Sequential(net(), nn.Softmax(-1)), data(), **QUICK)
    assert search_strategies(nn.Sequential(net(), nn.Softmax(-1)), data(), loss="l1", **QUICK).loss < 0.1


def test_answers_to_what_mixtures_learn_from_are_kept_as_far_as_there_is_room(monkeypatch):
    of = StrategySettings(batch_size=8)
    one = net()(data()[:8]).nbytes
    for room, kept in ((2**28, 4), (2.5 * one, 2), (0, 0)):
        monkeypatch.setattr(problem_module, "MOST_BYTES", room)
        problem = make_problem(net(), data(), of)
        assert len(problem.fit) == 4
        assert sum(map(len, problem.wanted)) == sum(map(len, problem.select)) == 32
        assert list(problem.answered) == list(range(kept))
        for place, x in enumerate(problem.fit):
            assert torch.equal(problem.answer(place, x), net()(x).detach())
            assert (problem.answer(place, x) is problem.answered.get(place)) == (place < kept)
    monkeypatch.setattr(problem_module, "MOST_BYTES", 2**28)
    assert not make_problem(net(), data(), replace(of, trained=True)).answered
    last = nn.Sequential(nn.Linear(6, 4), nn.Flatten(0, 1), nn.Unflatten(0, (-1, 5)), Last())
    answered = make_problem(last, torch.randn(32, 5, 6), of).answered
    assert len(answered) == 2
    assert all(kept.untyped_storage().nbytes() == kept.nbytes for kept in answered.values())


def test_a_strategy_of_training_is_none_of_a_search():
    with pytest.raises(ValueError, match="'lsq' is not known without training; choose of max-abs, percentile"):
        search_strategies(net(), data(), weights=["lsq"], **QUICK)
    with pytest.raises(ValueError, match="trained=True: there is no such setting; there are bits_weights"):
        search_strategies(net(), data(), trained=True, **QUICK)


def test_a_training_with_nothing_to_train_says_so():
    run = StrategyTraining(
        net().requires_grad_(False), data(), steps=4, weights=["straight-through"], inputs=["straight-through"]
    )
    with pytest.raises(ValueError, match="all weights are frozen, and no strategy learns its grid"):
        run.step(run.model(data()).mean())


def test_frozen_attention_stays_frozen():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn.requires_grad_(False)
    model = nn.Sequential(layer, nn.Linear(8, 3))
    prepared = prepare(model).model
    run = StrategyTraining(model, torch.randn(16, 5, 8), steps=4)
    for of in (prepared, run.model):
        flags = {n: p.requires_grad for n, p in of.named_parameters() if "quantizer" not in n}
        assert {n for n, learns in flags.items() if not learns} == {n for n in flags if "self_attn" in n}
        assert len(flags) > 12


class Order(nn.Module):
    """Calls its layers in one order or the other, as its input is shaped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        first, second = (self.a, self.b) if x.dim() == 2 else (self.b, self.a)
        y = second(F.gelu(first(x)))
        return y if x.dim() == 2 else y.mean(1)


def test_nothing_is_settled_where_batches_call_layers_in_other_orders():
    draws = [torch.randn(12, 6), torch.randn(12, 3, 6)]
    problem = make_problem(Order(), draws, StrategySettings(edge_bits=None, bits_weights=2, select_share=0.5))
    assert len(problem.select) == 2
    assert not Settled(problem).left
    problem.select = [x for x in problem.select if x.dim() == 2]  # of one order now, a before b
    for order, kept in (("ab", True), ("ba", False)):  # in which layers get their turns
        problem.layers = {name: problem.model.get_submodule(name) for name in order}
        assert (Settled(problem).left > 0) is kept


@pytest.mark.parametrize("frozen", [False, True])
def test_what_folding_makes_learns_as_the_norm_did_and_what_is_the_model_s_own_too(frozen):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
            self.vector_quantizer = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)
            self.norm.requires_grad_(not frozen)

        def forward(self, x):
            return self.head(self.vector_quantizer(self.norm(self.conv(x)).relu().mean((2, 3))))

    run = StrategyTraining(Own(), torch.randn(16, 3, 6, 6), steps=4, fold=True)
    flags = {n: p.requires_grad for n, p in run.model.named_parameters() if "_quantizer.candidates" not in n}
    assert flags["vector_quantizer.weight"]
    assert flags["conv.weight"]
    assert flags["conv.bias"] is not frozen


def test_a_step_of_the_mixture_that_is_not_finite_teaches_nothing():
    def loss(got, wanted):
        return divergence(got, wanted) * (float("nan") if got.requires_grad and len(seen) in (0, 2) else 1.0) + (
            seen.append(1) or 0.0 if got.requires_grad else 0.0
        )

    seen = []
    found = search_strategies(net(), data(), loss=loss, steps=6, batch_size=16)
    assert [torch.tensor(step["loss"]).isnan().item() for step in found.report["course"]] == [1, 0, 1, 0, 0, 0]
    shares = [v for row in found.report["layers"] for v in row["weight_shares"].values()]
    assert torch.tensor(shares).isfinite().all()


def test_a_loss_may_be_without_a_least_value():
    def psnr(got, wanted):
        return 10 * (got - wanted).square().mean().log10()

    assert search_strategies(net(), data(), loss=psnr, **QUICK).loss < 0


def test_equal_answers_are_best_where_that_is_minus_infinity():
    def psnr(got, wanted):
        return 10 * (got - wanted).square().mean().log10()

    still = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    assert search_strategies(still, torch.zeros(16, 6), loss=psnr, **QUICK).loss == -torch.inf


def test_a_mixture_closes_alike_whatever_the_sign_of_the_loss():
    def of(offset):
        def loss(got, wanted):
            return (got - wanted).square().mean() + offset

        found = search_strategies(net(), data(), loss=loss, steps=40, batch_size=16, bits_weights=3)
        return [step["entropy"] for step in found.report["course"]]

    below, above = of(-10.0), of(10.0)
    half = len(above) // 2  # later a tie of two candidates stays or breaks by how sums are rounded
    assert below[:half] == pytest.approx(above[:half], rel=0.05)
    assert max(below[-1], above[-1]) < 0.2 < below[0]


def test_the_data_lies_where_its_user_has_it():
    x = [data(30), data(34)]
    problem = make_problem(net(), x, StrategySettings(batch_size=16))
    places = {
        part.untyped_storage().data_ptr() for parts in (problem.fit, problem.select) for p in parts.parts for part in p
    }
    assert places == {one.untyped_storage().data_ptr() for one in x}
    assert [len(batch) for batch in problem.fit] == [16, 16]
    assert sum(map(len, problem.select)) == 32
    rows = {tuple(row) for batch in (*problem.fit[:], *problem.select[:]) for row in batch.tolist()}
    assert rows == {tuple(row) for row in torch.cat(x).tolist()}


class Until(nn.Module):
    """Goes on until its values are small: rounded they are smaller sooner."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x)
        if x.abs().sum() > 1:
            x = self.again(x)
        return self.last(x)


def test_a_layer_that_is_not_called_any_more_once_inputs_are_rounded_is_named():
    model = prepare(Until(), quantizer="lsq8").model.eval()
    coarse = StaticInput(1e6, 0, 1)  # all of the first layer's input is rounded to 0
    with torch.no_grad():
        model.first.bias.zero_()
    with pytest.raises(ValueError, match="layer 'again' is called on the calibration data, but no more once"):
        calibrate(model, [data(8), data(8)], lambda name, seen: copy.deepcopy(coarse))


def test_an_input_strategy_without_a_grid_is_named():
    class Nowhere(RangeStrategy, name="nowhere"):
        @classmethod
        def ends(cls, seen, bits):
            return 0.0, float("nan")

    try:
        with pytest.raises(ValueError, match="strategy 'nowhere' finds no grid for the input of layer '0'"):
            search_strategies(net(), data(), inputs=["nowhere"], **QUICK)
    finally:
        del INPUTS["nowhere"]


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda rows: torch.full((len(rows),), float("nan")), r"gives \(16,\) numbers, the least nan"),
        (lambda rows: -rows.abs().amax(1), r"gives \(16,\) numbers, the least -"),
        (lambda rows: rows.abs().amax(), r"gives \(\) numbers"),
    ],
)
def test_a_weight_strategy_that_breaks_its_promise_is_named(gives, said):
    class Broken(WeightStrategy, name="broken"):
        def steps(self, rows, most):
            return gives(rows)

    try:
        with pytest.raises(ValueError, match=f"layer '0': Broken.steps {said}"):
            search_strategies(net(), data(), weights=["broken"], **QUICK)
    finally:
        del WEIGHTS["broken"]


@pytest.mark.parametrize("ends", [(1.0, -1.0), (float("nan"), 1.0)])
def test_an_input_strategy_whose_ends_are_in_no_order_is_named(ends):
    class Swapped(RangeStrategy, name="swapped"):
        @classmethod
        def ends(cls, seen, bits):
            return ends

    try:
        with pytest.raises(
            ValueError, match=r"strategy 'swapped' finds no grid for the input of layer '0': Swapped\.ends"
        ):
            search_strategies(net(), data(), inputs=["swapped"], **QUICK)
    finally:
        del INPUTS["swapped"]


class Tied(nn.Module):
    """An embedding that its output reads by itself."""

    def __init__(self):
        super().__init__()
        self.table, self.body = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, ids):
        return F.linear(self.body(self.table(ids)), self.table.weight)


def test_a_layer_whose_weight_is_read_beside_calling_it_stays_float():
    torch.manual_seed(0)
    tied, ids = Tied().eval(), torch.randint(12, (40, 5))
    found = search_strategies(tied, ids, **QUICK)
    assert "its weight is read beside calling it" in found.report["left"]["table"]
    assert list(found.choice) == ["body"]
    assert torch.allclose(pack(found.model)(ids), outputs(found.model, ids), atol=1e-5)


class Fast(nn.Module):
    """An encoder, whose fast path calls no layer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


def test_an_encoder_whose_attention_stays_float_is_rounded_all_the_same(tmp_path):
    torch.manual_seed(0)
    fast, x = Fast().eval(), torch.randn(40, 5, 16)
    how = {"bits_weights": 2, "bits_activations": 2, "edge_bits": None, "skip": [r".*self_attn"], **QUICK}
    found = search_strategies(fast, x, **how)
    assert found.loss > 1e-3
    off = (outputs(found.model, x) - outputs(fast, x)).abs().max()
    assert off > 1e-2
    save(pack(found.model), tmp_path / "model.sgsc")
    packed = load_into(fast, tmp_path / "model.sgsc")
    assert torch.allclose(outputs(packed, x), outputs(found.model, x), atol=1e-5)


class More(nn.Linear):
    """A layer that does more than its type."""

    def twice(self, x):
        return self(self(x))


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = More(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body.twice(x))


def test_a_layer_that_is_used_for_more_than_its_forward_is_an_error_with_a_way_out():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"no attribute 'twice'.*leave that layer float, by skip"):
        search_strategies(Uses(), data(), **QUICK)
    assert list(search_strategies(Uses(), data(), skip=["body"], **QUICK).choice) == ["head"]


class Random(nn.Module):
    """Answers differently each time."""

    def __init__(self, noise):
        super().__init__()
        self.body, self.noise = net(), noise

    def forward(self, x):
        return self.body(x + 0.1 * self.noise(x))


RNG = np.random.default_rng(0)


@pytest.mark.parametrize("noise", [torch.randn_like, lambda x: torch.from_numpy(RNG.normal(size=x.shape)).float()])
def test_a_network_that_draws_at_random_is_served(noise):
    assert set(search_strategies(Random(noise), data(), **QUICK).choice) == {"body.0", "body.2", "body.4"}


class Counts(nn.Module):
    """Knows how often it was called."""

    def __init__(self):
        super().__init__()
        self.body = net()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.body(x)


def test_a_network_that_counts_its_calls_is_left_as_it_is():
    counts = Counts()
    search_strategies(counts, data(), **QUICK)
    StrategyTraining(counts, data(), steps=2)
    assert counts.calls == 0


class Class(nn.Module):
    """Answers with the number of a class."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        return self.body(x).argmax(1)


def test_answers_that_are_numbers_of_classes_are_served():
    differ = lambda got, wanted: (got != wanted).float().mean()  # noqa: E731
    found = search_strategies(Class(), data(), loss=differ, bits_weights=8, **(QUICK | {"steps": 0}))
    assert found.loss < 0.2


class Padded(nn.Module):
    """An encoder of samples of several lengths: 0 is padding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 1)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        empty = ids == 0
        y = self.encoder(self.table(ids), src_key_padding_mask=empty).masked_fill(empty[..., None], 0.0)
        return self.head(y.mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("skip", [(), [".*self_attn"]])
def test_an_encoder_that_is_told_of_padding_is_served(skip):
    torch.manual_seed(0)
    padded, ids = Padded().eval(), torch.randint(1, 9, (40, 6))
    ids[::2, 4:] = 0
    found = search_strategies(padded, ids, bits_weights=8, skip=skip, **QUICK)
    with torch.no_grad():
        wanted = padded(ids)
        assert (found.model(ids) - wanted).norm() < 0.05 * wanted.norm()
        assert torch.allclose(pack(found.model)(ids), found.model(ids), atol=1e-5)


def test_norms_that_need_their_batch_are_never_given_one_sample():
    torch.manual_seed(0)
    batch = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4))
    for count in (34, 66):  # 17 = 16 + 1 and 33 = 32 + 1 to fit to
        assert search_strategies(batch, data(count), **QUICK).report["samples_fit"] % 16 == 1


def test_pairs_of_inputs_and_targets_are_read_as_a_loader_gives_them():
    pairs = DataLoader(TensorDataset(data(), torch.zeros(64)), batch_size=8)
    assert search_strategies(net(), pairs, **QUICK).loss == search_strategies(net(), data(), **QUICK).loss


def test_biases_that_cannot_be_whole_steps_are_left_and_counted():
    shared = net()
    shared[2].bias = shared[4].bias = nn.Parameter(torch.randn(16))
    shared[4] = nn.Linear(16, 16, bias=False)
    shared[4].bias = shared[2].bias
    found = search_strategies(shared, data(), integer_bias=True, **QUICK)
    assert found.report["biases_left"] == 32
    layers = quant_layers(found.model)
    assert torch.equal(layers["2"].bias, shared[2].bias)
    step = layers["0"].weight_quantizer.grid()[0] * layers["0"].input_quantizer.grid()[0]
    codes = layers["0"].bias.double() / step.double()
    assert (codes - codes.round()).abs().max() < 0.01
    half = search_strategies(net().bfloat16(), data().bfloat16(), integer_bias=True, **QUICK)
    before = {name: layer.bias.clone() for name, layer in quant_layers(half.model).items()}
    assert half.report["biases_left"] > 0
    assert round_biases(half.model) == half.report["biases_left"]
    assert all(torch.equal(layer.bias, before[name]) for name, layer in quant_layers(half.model).items())
