"""Models, data and evidence that tests of the preservation set plant."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sgsc.selectors import Evidence, gather, probing, projection


def logits_are_inputs(classes: int) -> nn.Linear:
    """A model that returns its inputs, so that a test plants logits by planting inputs; features are the inputs too."""
    model = nn.Linear(classes, classes, bias=False)
    nn.init.eye_(model.weight)
    return model


def confident(samples: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits clearly in favour of their labels, and the labels, in turn."""
    make = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    return 6 * F.one_hot(labels, classes).float() + torch.rand(samples, classes, generator=make), labels


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(96, 5),
    )


def pictures(samples: int = 90, seed: int = 3) -> TensorDataset:
    make = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (samples,), generator=make)
    return TensorDataset(torch.randn(samples, 1, 6, 6, generator=make), labels)


class Recurrent(nn.Module):
    """A sequence model: token ids (N, T) -> logits (N, T, 7)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(7, 8)
        self.middle = nn.Linear(8, 8)
        self.last = nn.Linear(8, 7)

    def forward(self, tokens):
        return self.last(self.middle(self.embedding(tokens)).cumsum(1).tanh())


def text(samples: int = 40) -> TensorDataset:
    tokens = torch.randint(0, 7, (samples, 6), generator=torch.Generator().manual_seed(5))
    return TensorDataset(tokens[:, :-1], tokens[:, 1:])


def evidence_of(model: nn.Module, data: TensorDataset, batch_size: int = 16) -> Evidence:
    x, y = data.tensors
    with probing(model) as probe:
        return gather(
            probe, zip(x.split(batch_size), y.split(batch_size), strict=True), projection(probe, x.split(batch_size))
        )


def only(name: str) -> dict[str, float]:
    return {name: 1.0}
