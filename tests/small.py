"""The smallest problem that a compression can be tried on: four overlapping classes, float64, less than a second."""

import functools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from sgsc import PreservationSet, SelfCompression, prepare

STEPS = 60
SETTINGS = {
    **{"target_size": 0.25, "steps": STEPS, "tolerance": 0.05, "bit_rate": 0.4, "guard_every": 10},
    **{"preservation_batch": 15, "sparsity_weight": 0.1},  # 15 is 8 and 7: ranks share it unevenly
}


def blobs(
    count: int = 240, noise: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.double
) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around corners of a cube, overlapping a little."""
    make = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    corners = torch.tensor([[1, 1, 0], [-1, 1, 0], [0, -1, 1], [0, -1, -1]]).to(dtype)
    return corners[y].repeat(1, 4) + noise * torch.randn(count, 12, generator=make, dtype=dtype), y


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(32)] if norm else []
    return nn.Sequential(nn.Linear(12, 32), *middle, nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = blobs()
    pick = torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(step))
    return x[pick], y[pick]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


@functools.cache
def trained(norm: bool = False) -> tuple[nn.Module, PreservationSet]:
    net = network(norm)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(40):
        x, y = batch(1000 + step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net.eval()
    return net, PreservationSet.select(net, TensorDataset(*blobs()), 40, seed=0)


def start(norm: bool = False, elsewhere: float = 0.0, dtype: torch.dtype = torch.double, **settings) -> SelfCompression:
    """A run; `elsewhere` moves the start of the first layer."""
    net, keep = trained(norm)
    model = prepare(net).model.to(dtype)
    with torch.no_grad():
        model[0].weight.add_(elsewhere)
        model[0].weight_quantizer.bit_depth.sub_(elsewhere)
    keep = replace(keep, inputs=keep.inputs.to(dtype))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    return SelfCompression(model, keep, optimizer=optimizer, **SETTINGS | settings)


def assert_same_model(a: dict, b: dict, tolerance: float) -> None:
    """State dicts: widths alike, all else within `tolerance`."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if name.endswith("bit_depth"):
            assert torch.equal(value.round(), b[name].round()), name
        assert torch.allclose(value, b[name], rtol=0, atol=tolerance), (name, (value - b[name]).abs().max())
