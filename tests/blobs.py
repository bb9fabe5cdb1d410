"""Four classes of points, a network that tells them apart, and a run that compresses it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from sgsc import PreservationSet, SelfCompression, prepare
from tests import small


def blobs(count: int = 400, seed: int = 0) -> TensorDataset:
    return TensorDataset(*small.blobs(count, 0.5, seed, torch.float32))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4)
    )


def train(model: nn.Module, data: TensorDataset, steps: int, run: SelfCompression | None = None, start: int = 0):
    """A user's own loop; `run.optimizers[0]` when there is a run."""
    optimizer = run.optimizers[0] if run is not None else torch.optim.Adam(model.parameters(), 1e-2)
    x, y = data.tensors
    for step in range(start, start + steps):
        pick = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        model.train()
        loss = F.cross_entropy(model(x[pick]), y[pick])
        loss = loss if run is None else run.loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run is not None:
            run.step()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    net = network()
    train(net, blobs(), 150)
    return net.eval()


@pytest.fixture(scope="module")
def keep(trained) -> PreservationSet:
    return PreservationSet.select(trained, blobs(), 60, seed=0)


def started(trained, keep, **settings) -> SelfCompression:
    model = prepare(trained).model
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    settings = {"target_size": 0.15, "steps": 240, "tolerance": 0.05, "bit_rate": 0.1, "guard_every": 20} | settings
    return SelfCompression(model, keep, optimizer=optimizer, **settings)
