"""Folding of batch norms, and calibration in the order of the network."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sgsc import load_into, pack, save
from sgsc.demos.models import DigitsCNN
from sgsc.layers import quant_layers
from sgsc.preparation import prepare
from sgsc.strategies import INPUTS, WEIGHTS, StrategySettings, calibrate, calibration, fold_batch_norms, make_problem
from sgsc.strategies.biases import round_biases


def with_statistics(model, x):
    """Batch norms that have seen data and have shifts of their own."""
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.bias)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


# ---- folding ----


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_model_answers_as_before(bias):
    x = torch.randn(20, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
    net = with_statistics(nn.Sequential(*net, nn.Linear(216, 5, bias=bias), nn.BatchNorm1d(5)), x)
    folded = fold_batch_norms(net)
    assert folded.folded == ("1", "5")
    assert not folded.left
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-4, atol=1e-5)
    assert not [m for m in folded.model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert isinstance(net[1], nn.BatchNorm2d)  # the original is left


def test_all_norms_of_a_residual_network_fold():
    x = torch.rand(8, 1, 8, 8)
    net = with_statistics(DigitsCNN(), x)
    folded = fold_batch_norms(net)
    assert len(folded.folded) == 5
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.other = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
        if kind == "shared weight":
            self.other.weight = self.conv.weight

    def forward(self, x):
        if self.kind == "read by others":
            y = self.conv(x)
            return self.norm(y) + y
        if self.kind == "called twice":
            return self.norm(self.conv(self.norm(self.conv(x))))
        if self.kind == "not right before":
            return self.norm(F.relu(self.conv(x)))
        if self.kind == "untraceable" and x.sum() > 0:
            return self.conv(x)
        return self.norm(self.conv(x)) + self.other(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("read by others", "conv is read by others too"),
        ("called twice", "it is called 2 times"),
        ("not right before", "no layer is right before it"),
        ("untraceable", "the model cannot be traced"),
        ("shared weight", "conv shares its weight"),
    ],
)
def test_a_norm_that_cannot_be_folded_stays_and_says_why(kind, why):
    x = torch.randn(4, 2, 3, 3)
    net = Branching(kind)
    if kind != "untraceable":
        with_statistics(net, x)
    folded = fold_batch_norms(net)
    assert why in folded.left["norm"]
    assert torch.equal(folded.model(x), net.eval()(x))


# ---- calibration ----


def chain():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    return prepare(net, quantizer="lsq4").model.eval()


def watch(name):
    """A choice of that strategy at 4 bits, and what it was shown."""
    shown = {}

    def choose(layer, seen):
        shown[layer] = seen
        return INPUTS[name].fitted(seen, 4)

    return choose, shown


def test_layers_are_calibrated_in_order_on_quantized_inputs():
    model, x = chain(), torch.randn(100, 4)
    choose, shown = watch("min-max")
    assert calibrate(model, [x], choose) == ["0", "2", "4"]
    layers = quant_layers(model)
    assert (shown["0"].least, shown["0"].most) == (x.min().item(), x.max().item())
    with torch.no_grad():
        second = F.relu(layers["0"](x))  # with the input quantizer that it got
        third = F.relu(layers["2"](second))
    assert shown["2"].most == second.max().item()
    assert shown["4"].most == third.max().item()
    layers["0"].input_quantizer = None
    with torch.no_grad():
        assert shown["2"].most != F.relu(layers["0"](x)).max().item()  # the check above can fail


def test_several_batches_give_what_one_gives():
    x = torch.randn(256, 4)
    one, many = chain(), chain()
    many.load_state_dict(one.state_dict())
    calibrate(one, [x], watch("mse")[0])
    calibrate(many, list(x.split(64)), watch("mse")[0])
    for a, b in zip(quant_layers(one).values(), quant_layers(many).values(), strict=True):
        for u, v in zip(a.input_quantizer.grid(), b.input_quantizer.grid(), strict=True):
            torch.testing.assert_close(u, v, rtol=2e-3, atol=0)  # a histogram's bins may lie elsewhere


def test_a_pass_of_several_batches_stops_at_the_layer():
    model, x, runs = chain(), torch.randn(30, 4), []
    model[4].register_forward_hook(lambda *_: runs.append(1))
    calibrate(model, list(x.split(10)), watch("min-max")[0])
    assert len(runs) == 3  # the count of the calls


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.between, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.first(self.between(self.first(x)) + 9)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_layer_called_twice_is_calibrated_on_both_inputs(parts):
    net = Twice()
    del net.unused
    model, x = prepare(net, quantizer="lsq8").model.eval(), torch.randn(30, 3)
    choose, shown = watch("min-max")
    assert calibrate(model, list(x.chunk(parts)), choose) == ["between", "first"]
    assert shown["first"].count == 2 * x.numel()
    assert shown["first"].most > 5 > x.max().item()
    assert shown["first"].least == x.min().item()
    scale, _, last, _ = (v.item() for v in quant_layers(model)["first"].input_quantizer.grid())
    assert scale * last > shown["first"].most - scale  # chosen when both had been seen


def test_a_layer_never_called_is_named():
    model = prepare(Twice(), quantizer="lsq8").model
    with pytest.raises(ValueError, match=r"never called on the calibration data: unused; .* skip=\[...\]"):
        calibrate(model, [torch.randn(3, 3)], watch("mse")[0])


def test_no_data_and_nan_inside_the_network_are_named():
    with pytest.raises(ValueError, match="no calibration data"):
        calibrate(chain(), [], watch("mse")[0])
    model = chain()
    with torch.no_grad():
        model[0].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"layer '2': an input holds NaN or infinity; look for NaN"):
        calibrate(model, [torch.randn(3, 4)], watch("mse")[0])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_modes_and_hooks_are_left_as_they_were():
    model = chain().train()
    calibrate(model, [torch.randn(9, 4)], watch("mse")[0])
    assert all(m.training for m in model.modules() if isinstance(m, nn.Linear))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_embedding_is_weights_only():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2))
    model = prepare(net, quantizer="lsq4").model
    assert calibrate(model, [torch.randint(7, (5, 3))], watch("mse")[0]) == ["0", "1"]
    assert model[0].input_quantizer is None
    assert model[1].input_quantizer is not None


def test_integer_biases_are_whole_steps_of_the_sum():
    model, x = chain(), torch.randn(50, 4)
    for layer in quant_layers(model).values():
        layer.weight_quantizer = WEIGHTS["max-abs"](len(layer.weight), 8)
        layer.weight_quantizer.fit(layer.rows())
    calibrate(model, [x], lambda name, seen: INPUTS["min-max"].fitted(seen, 8))
    before = {name: layer.bias.detach().clone() for name, layer in quant_layers(model).items()}
    assert round_biases(model) == 0
    for name, layer in quant_layers(model).items():
        step = layer.weight_quantizer.grid()[0] * layer.input_quantizer.grid()[0]
        code = layer.bias.detach() / step
        torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-3)
        assert ((layer.bias.detach() - before[name]).abs() <= 0.501 * step).all()
        assert not torch.equal(layer.bias.detach(), before[name])


def test_a_bias_beyond_int32_is_left_and_counted():
    model = chain()
    calibrate(model, [torch.randn(50, 4)], watch("min-max")[0])
    with torch.no_grad():
        model[0].bias[0] = 1e12
    assert round_biases(model) == 1
    assert model[0].bias[0] == 1e12


def test_the_bias_of_a_row_of_zeros_is_left():
    model = chain()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 2.0
    for layer in quant_layers(model).values():
        layer.weight_quantizer = WEIGHTS["max-abs"](len(layer.weight), 8)
        layer.weight_quantizer.fit(layer.rows())
    calibrate(model, [torch.randn(50, 4)], watch("min-max")[0])
    assert round_biases(model) == 1
    assert model[0].bias[1] == 2.0


def test_a_layer_that_only_later_batches_reach_is_calibrated():
    net = nn.ModuleDict({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})
    net.forward = lambda x: net["two"](net["one"](x)) if len(x) > 2 else net["one"](x)
    model = prepare(net, quantizer="lsq8").model
    model.forward = lambda x: model["two"](model["one"](x)) if len(x) > 2 else model["one"](x)
    choose, shown = watch("min-max")
    assert calibrate(model, [torch.randn(2, 3), torch.randn(5, 3)], choose) == ["one", "two"]
    assert (shown["one"].count, shown["two"].count) == (21, 15)


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)
        self.both = nn.Sequential(self.conv, self.norm)

    def forward(self, x):
        return self.both(x)


def normed(layer, norm):
    return nn.Sequential(OrderedDict(layer=layer, norm=norm))


class ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x)) + F.linear(x, self.linear.weight)


@pytest.mark.parametrize(
    ("make", "shape", "folds"),
    [
        (Aliased, (4, 2, 6), True),
        (ReadsWeight, (8, 4), False),
        (lambda: normed(nn.Linear(4, 6), nn.BatchNorm1d(3)), (8, 3, 4), False),
        (lambda: normed(weight_norm(nn.Conv1d(2, 3, 1)), nn.BatchNorm1d(3)), (4, 2, 6), False),
    ],
)
def test_what_folds_answers_as_before_and_the_rest_stays(make, shape, folds):
    torch.manual_seed(0)
    net, x = make(), torch.randn(shape)
    for _ in range(3):
        net(2 * x + 1)
    with torch.no_grad():
        net.norm.weight.mul_(3)
    net.eval()
    done = fold_batch_norms(net)
    assert bool(done.folded) is folds
    with torch.no_grad():
        torch.testing.assert_close(done.model(x), net(x))


def test_a_norm_of_another_axis_is_found_out_by_the_data(tmp_path):
    torch.manual_seed(0)
    net, x = normed(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(40, 7, 5)
    for _ in range(3):
        net(2 * x + 1)
    net.eval()
    problem = make_problem(net, x, StrategySettings(bits_weights=8, bits_activations=None))
    assert problem.left["norm"] == "folded, the network answers otherwise"
    assert isinstance(problem.model.norm, nn.BatchNorm1d)
    problem.set(problem.uniform("mse", None))
    with torch.no_grad():
        torch.testing.assert_close(problem.model(x), net(x), rtol=0.1, atol=0.1)
        packed = pack(problem.model)
        save(packed, tmp_path / "m.sgsc")
        torch.testing.assert_close(load_into(net, tmp_path / "m.sgsc")(x), packed(x))  # as README.md says


def test_as_many_samples_pass_together_as_there_is_room_for(monkeypatch):
    model, x = chain(), torch.randn(9, 4)
    layers = quant_layers(model)
    monkeypatch.setattr(calibration, "MOST_BYTES", 1000)
    widest = max(max(layer.weight.shape) for layer in layers.values())
    assert calibration.room(model, layers, x) == 1000 // (calibration.ALIVE * 4 * widest)
    monkeypatch.setattr(calibration, "MOST_BYTES", 1)
    assert calibration.room(model, layers, x) == 1
