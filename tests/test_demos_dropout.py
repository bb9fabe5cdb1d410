"""A network with dropout: what training draws depends on its seed and step alone, so that runs repeat and go on."""

import numpy as np
import pytest
import torch

from sgsc.config import CompressionConfig
from sgsc.demos import job, load, train
from sgsc.demos.qat import tune, uniform
from sgsc.demos.strategies import train as train_strategies
from sgsc.demos.tasks import NAME_LETTERS


@pytest.fixture
def task(tmp_path):
    letters = np.random.default_rng(0).integers(1, 27, 10000)
    text = "\n".join("".join(NAME_LETTERS[i] for i in row) for row in letters.reshape(-1, 5))
    (tmp_path / "names.txt").write_text(f"{text}\n")
    return load("names", tmp_path, limit=24)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def trained(task, how):
    if how == "float":
        return train(task, 0, steps=3)
    model = uniform(train(task, 0, steps=1), 4)
    tune(task, model, 3, 0)
    return model


@pytest.mark.parametrize("how", ["float", "uniform"])
def test_the_process_s_own_generator_neither_decides_nor_moves(task, how):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(trained(task, how))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*found)


def test_steps_draw_differently(task, monkeypatch):
    real = trained(task, "float")
    monkeypatch.setattr("sgsc.demos.models.nn.Dropout.forward", lambda _self, x: x)
    assert not same(trained(task, "float"), real)
    drawn = []
    monkeypatch.setattr(
        "sgsc.demos.models.nn.Dropout.forward", lambda self, x: drawn.append(torch.rand(3)) or x if self.training else x
    )
    trained(task, "float")
    assert len({tuple(draw.tolist()) for draw in drawn}) == len(drawn) == 3 * 8  # of 4 blocks, twice each


def test_an_interrupted_compression_goes_on_to_the_same_file(task, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "CHECKPOINT_EVERY", 2)
    config = CompressionConfig(target_size=0.5, tolerance=0.99, steps=8, guard_every=2, preservation_batch=8)
    task = job.replace(task, float_steps=2)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    job.compress(task, config, tmp_path / "whole", samples=4)

    def stop(phase, step, _steps, _values):
        if phase == "compression" and step == 5:
            raise KeyboardInterrupt

    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        job.compress(task, config, tmp_path / "stopped", samples=4, progress=stop)
    job.compress(task, config, tmp_path / "stopped", samples=4, resume=True)
    files = [(tmp_path / name / "model.sgsc").read_bytes() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_a_training_with_strategies_repeats(task, tmp_path):
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh = load("names", tmp_path, limit=24)
        how = {"steps": 4, "samples": 8, "weights": ["lsq"], "inputs": ["lsq"]}
        train_strategies(job.replace(fresh, float_steps=2), tmp_path, **how)
        files.append((tmp_path / "model.sgsc").read_bytes())
    assert files[0] == files[1]
