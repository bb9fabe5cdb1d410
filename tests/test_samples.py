"""`as_deployed`: what evaluation answers, with a gradient that batch norms' statistics follow."""

import copy

import pytest
import torch
from torch import nn

from sgsc.samples import as_deployed, evaluating


def network(affine: bool = True, spatial: bool = True) -> nn.Module:
    torch.manual_seed(0)
    if spatial:
        net = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6, affine=affine), nn.ReLU(), nn.Flatten(1))
    else:
        net = nn.Sequential(nn.Linear(50, 6, bias=False), nn.BatchNorm1d(6, affine=affine), nn.ReLU())
    for _ in range(5):
        net(x_of(spatial))
    if affine:
        with torch.no_grad():
            net[1].weight.uniform_(0.5, 2.0)
            net[1].bias.uniform_(-1.0, 1.0)
    return net


def x_of(spatial: bool, seed: int = 0, count: int = 16) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(count, *((2, 5, 5) if spatial else (50,)), generator=make) * 1.5 + 0.3


@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_outputs_are_those_of_evaluation(affine, spatial):
    net, x = network(affine, spatial), x_of(spatial, 1)
    with evaluating(net):
        want = net(x)
    before = copy.deepcopy(net.state_dict())
    with as_deployed(net):
        assert not net[1].training
        assert torch.allclose(net(x), want, atol=1e-5)
    assert net[1].training
    assert "forward" not in net[1].__dict__
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def radial(net: nn.Module, mode, x: torch.Tensor) -> float:
    """The gradient's part along the weight, over its length."""
    net.zero_grad()
    with mode(net):
        net(x).square().sum().backward()
    weight = net[0].weight
    return float((weight.grad * weight).sum().detach().abs() / (weight.grad.norm() * weight.norm().detach()))


@pytest.mark.parametrize("spatial", [True, False])
def test_weights_that_a_norm_frees_of_scale_are_not_stretched(spatial):
    net, x = network(spatial=spatial), x_of(spatial, 1)
    assert radial(net, evaluating, x) > 0.05
    assert radial(net, as_deployed, x) < 1e-3


def test_affine_gradients_are_those_of_evaluation():
    net, x = network(), x_of(True, 1)
    net[1].running_mean.add_(1.0)
    found = []
    for mode in (evaluating, as_deployed):
        net.zero_grad()
        with mode(net):
            net(x).square().sum().backward()
        found.append((net[1].bias.grad.clone(), net[1].weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4)


def test_a_frozen_norm_stays_a_constant():
    net, x = network(), x_of(True, 1)
    net[1].eval()
    found = []
    for mode in (evaluating, as_deployed):
        net.zero_grad()
        with mode(net):
            net(x).square().sum().backward()
        found.append(net[0].weight.grad.clone())
    assert torch.equal(*found)
    assert not net[1].training


def test_a_compiled_model_is_compiled_once_a_mode():
    net = network(spatial=False)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(net, backend=backend)
    for _ in range(4):
        compiled(x_of(False))
        with as_deployed(net):
            compiled(x_of(False))
    assert len(graphs) == 2


def test_one_value_a_channel_has_no_statistics_of_its_own():
    net, x = network(spatial=False), x_of(False, 1, count=1)
    with evaluating(net):
        want = net(x)
    with as_deployed(net):
        assert torch.equal(net(x), want)


def test_an_error_inside_leaves_nothing_behind():
    net = network()
    with pytest.raises(RuntimeError), as_deployed(net):
        net(torch.zeros(1, 3, 5, 5))
    assert net.training
    assert "forward" not in net[1].__dict__
