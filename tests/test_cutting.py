"""Channels that leave while a network trains: it goes on as if they had stayed, and can be put back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgsc import prepare
from sgsc.coupling import couple
from sgsc.cutting import cut_while_training, depthwise_layers, take_shapes
from sgsc.layers import quant_layers


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 16, 5)),
    )
    model = prepare(net).model
    with torch.no_grad():
        model[0].weight_quantizer.bit_depth[::3] = 0
        model[3].weight_quantizer.bit_depth[::3] = 0
        model[5].weight_quantizer.bit_depth[1::4] = 0
    couple(model).silence(model)
    return model


X = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(64) % 5


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    loss = F.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    for layer in quant_layers(model).values():  # the widths stay
        layer.weight_quantizer.bit_depth.grad = layer.weight_quantizer.range.grad = None
    optimizer.step()
    couple(model).silence(model)
    return loss


def cut(model: nn.Module, *optimizers, states=()) -> dict:
    coupling = couple(model)
    return cut_while_training(model, coupling, coupling.silent(model), optimizers, states)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_on_as_if_nothing_had_left(kind):
    whole = network()
    small = copy.deepcopy(whole)
    options = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizers = {m: kind(m.parameters(), **options) for m in (whole, small)}
    for model, optimizer in optimizers.items():
        for _ in range(3):
            held = step(model, optimizer)  # its graph, of the old shapes, stays alive
    parameters = list(small.parameters())
    left = cut(small, optimizers[small])
    assert small[0].weight.shape == (10, 2, 3, 3)
    assert small[3].groups == small[3].in_channels == 10
    assert small[5].weight.shape == (9, 10, 1, 1)
    assert left["0"].tolist() == [i % 3 != 0 for i in range(16)]
    assert all(a is b for a, b in zip(parameters, small.parameters(), strict=True))
    for model, optimizer in optimizers.items():
        for _ in range(5):
            held = step(model, optimizer)
    assert held.isfinite()
    assert torch.allclose(small[5].weight, whole[5].weight[left["5"]][:, left["3"]], atol=1e-5)
    assert torch.allclose(small.eval()(X), whole.eval()(X), atol=1e-4)


def test_a_state_beside_the_model_is_cut_with_it():
    model = network()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    cut(model, states=[state])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_takes_its_old_shapes_back():
    model = network().eval()
    want, state = model(X).detach(), {name: value.clone() for name, value in model.state_dict().items()}
    depthwise = depthwise_layers(model)
    assert depthwise == {"3"}
    cut(model)
    take_shapes(model, state, depthwise)
    model.load_state_dict(state)
    assert torch.equal(model(X), want)
    fresh, small = network(), {}
    cut(model)
    small = model.state_dict()
    take_shapes(fresh, small, depthwise_layers(fresh))
    fresh.load_state_dict(small)
    assert (fresh[3].groups, fresh[3].in_channels, fresh[5].out_channels, fresh[1].num_features) == (10, 10, 9, 10)
    assert torch.allclose(fresh.eval()(X), want, atol=1e-5)


def test_a_depthwise_layer_comes_back_from_its_last_channel():
    model = network().eval()
    want, state = model(X).detach(), {name: value.clone() for name, value in model.state_dict().items()}
    depthwise = depthwise_layers(model)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight_quantizer.bit_depth[1:] = 0
    couple(model).silence(model)
    cut(model)
    assert model[3].groups == model[3].in_channels == 1
    take_shapes(model, state, depthwise)
    model.load_state_dict(state)
    assert (model[3].groups, model[3].in_channels, model[0].out_channels) == (16, 16, 16)
    assert torch.equal(model(X), want)


def test_an_optimiser_whose_state_cannot_be_cut_is_refused_before_anything_is():
    model = network()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-3)
    step(model, optimizer)
    before = {name: value.shape for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var' .* leave `cut` off"):
        cut(model, optimizer)
    assert before == {name: value.shape for name, value in model.state_dict().items()}


def test_a_layer_that_is_called_twice_keeps_what_it_reads():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.s, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.s(self.s(self.a(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model = prepare(Twice()).model.eval()
    with torch.no_grad():
        model.a.weight_quantizer.bit_depth[:3] = 0
        model.s.weight_quantizer.bit_depth[2:4] = 0
    couple(model).silence(model)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    want = model(x).detach()
    cut(model)
    assert model.a.out_features == model.s.in_features == 6
    assert torch.equal(model(x), want)


def test_a_layer_that_is_all_dead_is_not_looked_at_again_and_again(monkeypatch):
    from sgsc import controller
    from sgsc.config import CompressionConfig

    model = network()
    with torch.no_grad():
        model[5].weight_quantizer.bit_depth[:] = 0
    couple(model).silence(model)
    control = controller.Controller(model, CompressionConfig(target_size=0.2), {}, lambda *_: None)
    looks = []
    monkeypatch.setattr(control, "look_anew", lambda: looks.append(1))
    control.cut([])
    control.cut([])
    assert len(looks) == 1
    type(control).look_anew(control)
    for _ in range(6):
        control.cut([])
    assert len(looks) == 1
