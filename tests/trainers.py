"""Tiny models and data for the trainers of other libraries, which may be absent."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

TOKENS, LENGTH = 20, 6


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed (pip install 'sgsc[integrations]')")


class Tokens(Dataset):
    """Texts whose class is the token that occurs first; as the Trainer or as a preservation set takes them."""

    def __init__(self, named: bool) -> None:
        make = torch.Generator().manual_seed(0)
        self.ids = torch.randint(4, TOKENS, (96, LENGTH), generator=make)
        self.labels = torch.arange(96) % 3
        self.ids[:, 0] = self.labels + 1
        self.named = named

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i):
        if self.named:
            return {"input_ids": self.ids[i], "labels": self.labels[i]}
        return self.ids[i], self.labels[i]


def transformers_found():
    needs("transformers")
    if "kernels" not in sys.modules:
        sys.modules["kernels"] = None  # transformers looks for a package of this name, and finds this tree's folder
    import transformers

    return transformers


def bert_of(hf, steps: int = 30):
    """A tiny classifier, trained."""
    torch.manual_seed(0)
    config = hf.BertConfig(
        **{"vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": 8, "num_labels": 3},
    )
    net = hf.BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    data = Tokens(named=False)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(data.ids).logits, data.labels).backward()
        optimizer.step()
    return net.eval()


def lightning_found():
    needs("lightning")
    import lightning.pytorch as found

    return found


@pytest.fixture(scope="session")
def hf():
    return transformers_found()


@pytest.fixture(scope="session")
def bert(hf):
    return bert_of(hf)


@pytest.fixture(scope="session")
def lightning():
    return lightning_found()


def lit(lightning, net: nn.Module, manual: bool = False, named: bool = False, skips: int = -1):
    """A module that trains a network; the batch of that number is skipped."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.automatic_optimization = not manual

        def training_step(self, batch, index):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if index == skips:
                return None
            return {"loss": loss, "more": 1} if named else loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 3e-3)

    return Module()
