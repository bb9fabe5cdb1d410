"""bench.strategies: rows, claims and tables, with one shot of each section so that none can rot."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bench import strategies, strategy_claims, strategy_networks
from sgsc.demos.task import SCHEDULES


@pytest.fixture
def short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # float networks lie in runs/
    monkeypatch.setitem(SCHEDULES, "digits", {**SCHEDULES["digits"], "float_steps": 20})
    monkeypatch.setattr("sgsc.strategies.search.LOOKS", 2)
    return tmp_path


def test_a_network_s_rows_and_claims(short, monkeypatch):
    for registry, kept in (("WEIGHTS", {"max-abs", "mse"}), ("INPUTS", {"min-max", "mse"})):
        for module in ("sgsc.strategies.problem", "bench.strategies"):
            whole = getattr(strategies, registry)
            monkeypatch.setattr(f"{module}.{registry}", {k: v for k, v in whole.items() if k in kept})
    how = ["--quick", "--samples", "64", "--test", "40", "--random", "2", "--results", str(short)]
    assert strategies.main(["digits", "--settings", "W4A4,W3", *how]) == 0
    found = json.loads((short / "strategies.json").read_text())
    methods = {(r.get("setting"), r["method"]) for r in found["rows"]}
    assert {(None, "float"), ("W4A4", "DQSS"), ("W4A4", "greedy"), ("W4A4", "random"), ("W3", "torchao")} <= methods
    assert {m for s, m in methods if s == "W4A4" and m.startswith("uniform")} == {
        *("uniform max-abs + mse", "uniform mse + mse", "uniform mse + min-max")
    }
    ours = next(r for r in found["rows"] if (r.get("setting"), r["method"]) == ("W4A4", "DQSS"))
    assert ours["select_loss"] <= ours["greedy_loss"] <= ours["best_uniform_loss"]
    assert all(r["test_samples"] == 40 for r in found["rows"])
    assert any("loss on the judging samples above that of greed alone" in c["claim"] for c in found["claims"])
    table = strategy_claims.network_table(found["rows"])
    assert "W4A4: accuracy, %" in table
    assert "| DQSS |" in table
    before = (short / "strategies.json").read_text()
    assert len(json.loads(before)["rows"]) == len(found["rows"])


def row(method, accuracy, seed=0, loss=0.1, **more):
    return {
        **{"task": "resnet20", "setting": "W8A8", "method": method, "seed": seed, "accuracy": accuracy},
        **{"select_loss": loss, "test_samples": 10**8, **more},
    }


def of(*rows):
    reference = {"task": "resnet20", "method": "float", "accuracy": 0.88, "test_samples": 10**8}
    return {
        c["claim"].split(": ")[1].split(" (")[0]: c["holds"] for c in strategy_claims.network_claims([reference, *rows])
    }


def test_claims_can_fail():
    good = row("DQSS", 0.8795, greedy_loss=0.1)
    uniform = row("uniform mse + mse", 0.879)
    assert set(of(good, uniform).values()) == {True}
    assert not of(row("DQSS", 0.8785, greedy_loss=0.1), uniform)["test accuracy lost against float"]
    assert not of(good, row("uniform mse + mse", 0.8799))["test accuracy ahead of the best by test of 1 uniform ones"]
    assert not of(row("DQSS", 0.88, greedy_loss=0.09), uniform)[
        "loss on the judging samples above that of greed alone, largest"
    ]
    assert of(good, row("uniform mse + mse", float("-inf"))) == of(good, uniform)


def test_a_mixture_s_cost_is_measured_and_claimed(short, monkeypatch):
    monkeypatch.setattr(strategies, "CANDIDATES", (2, 16))
    monkeypatch.setattr(
        strategies,
        "_mixture",
        lambda count, ours: {
            "cpu_seconds": 1.0 if ours else 0.1 * count**2,
            "kept_bytes": 100,
            "process_peak_kilobytes": 1,
        },
    )
    assert strategies.main(["mixture", "--results", str(short)]) == 0
    found = json.loads((short / "strategies.json").read_text())
    assert [c["holds"] for c in found["claims"]] == [True, True, True]
    assert "2 candidates" in strategy_claims.mixture_table(found["rows"])
    flat = [{**r, "cpu_seconds": r["candidates"]} for r in found["rows"]]
    assert [c["holds"] for c in strategy_claims.mixture_claims(flat)][1] is False


def test_both_forms_of_a_mixture_are_timed():
    ours, plain = (strategies._mixture(2, together) for together in (True, False))
    assert plain["kept_bytes"] > 1.5 * ours["kept_bytes"] > 0
    assert ours["cpu_seconds"] > 0


def test_training_rows(monkeypatch, short):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = torch.rand(64, 1, 4, 4), torch.randint(3, (64,))
    of = strategy_networks.Network(
        net,
        x,
        lambda m: {"accuracy": (m(x).argmax(1) == y).float().mean().item()},
        samples=32,
        train=torch.utils.data.TensorDataset(x, y),
        test_samples=64,
    )
    monkeypatch.setattr(strategies, "network", lambda *_: of)
    assert strategies.main(["qat", "--steps", "5", "--draws", "1", "--results", str(short)]) == 0
    rows = json.loads((short / "strategies.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["float", "DQSS", "lsq"]
    assert "| lsq | 5 | 1 |" in strategy_claims.qat_table(rows)
    assert len(strategy_claims.qat_claims(rows)) == 2


def test_similarity_of_images():
    make = np.random.default_rng(0)
    a = make.random((40, 40))
    assert strategy_networks.ssim(a, a) == pytest.approx(1)
    assert strategy_networks.ssim(a, 1 - a) < 0
    assert strategy_networks.psnr(a, a + 0.1) == pytest.approx(20)


def test_unknown_names_and_missing_data_are_said(capsys):
    with pytest.raises(SystemExit):
        strategies.main(["nothing"])
    assert "'nothing' is unknown; there are digits" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="vdsr needs --data"):
        strategies.main(["vdsr"])
