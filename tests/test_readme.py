"""The README's examples run as they stand, and the first is short."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


TRAINING, EXPORT = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_example_has_at_most_twenty_lines():
    assert len(TRAINING.strip().splitlines()) <= 20


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of torch's own pickling
def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = torch.eye(3)[y].repeat(1, 8) + 0.4 * torch.randn(600, 24, generator=make)
    net = nn.Sequential(nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x[:400]), y[:400]).backward()
        optimizer.step()
    picks = [torch.randint(400, (64,), generator=make) for _ in range(300)]
    names = {
        **{"torch": torch, "F": F, "net": net.eval(), "batches": [(x[p], y[p]) for p in picks]},
        **{"train_set": TensorDataset(x[:400], y[:400]), "guard_set": TensorDataset(x[400:], y[400:])},
    }
    exec(compile(TRAINING, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert "target_held=True, tolerance_held=True" in said
    assert (tmp_path / "model.sgsc").stat().st_size <= 0.12 * 4 * sum(p.numel() for p in net.parameters())
    assert torch.equal(names["again"](x), names["packed"](x))
    assert "regress" in said
    if shutil.which("g++"):
        exec(compile(EXPORT, "README.md", "exec"), names)
        assert torch.equal(names["run"](names["x"]), names["packed"](names["x"]))
