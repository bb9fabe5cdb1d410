"""bench.strategies: rows, claims and tables, with one shot of each section so that none can rot."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from bench import strategies, strategy_claims, strategy_networks, strategy_peers
from bench.strategy_claims import BEHIND
from sgsc.demos.task import SCHEDULES
from sgsc.strategies import fold_batch_norms


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
    assert strategies.main(["digits", "--settings", "W4A4,W3,W8A8", *how]) == 0
    found = json.loads((short / "strategies.json").read_text())
    methods = {(r.get("setting"), r["method"]) for r in found["rows"]}
    assert {(None, "float"), ("W4A4", "DQSS"), ("W4A4", "greedy"), ("W4A4", "random"), ("W3", "torchao")} <= methods
    (theirs,) = (r for r in found["rows"] if r["method"] == "torchao PT2E")
    reference = next(r for r in found["rows"] if r["method"] == "float")
    assert "missing" in theirs or theirs["accuracy"] > reference["accuracy"] - 0.2
    assert {m for s, m in methods if s == "W4A4" and m.startswith("uniform")} == {
        *("uniform max-abs + mse", "uniform mse + mse", "uniform mse + min-max")
    }
    ours = next(r for r in found["rows"] if (r.get("setting"), r["method"]) == ("W4A4", "DQSS"))
    assert ours["select_loss"] <= ours["greedy_loss"] <= ours["best_uniform_loss"]
    assert all(r["test_samples"] == 40 for r in found["rows"])
    for name in ("greedy", "best uniform"):
        beside = next(r for r in found["rows"] if (r.get("setting"), r["method"]) == ("W4A4", name))
        assert beside["ours_ahead"] == pytest.approx(ours["accuracy"] - beside["accuracy"])
        assert any(f"ahead of {name}" in c["claim"] for c in found["claims"])
        assert ours["select_loss"] <= beside["select_loss"]
        assert name != "greedy" or beside["select_loss"] == ours["greedy_loss"]
    table = strategy_claims.network_table(found["rows"])
    assert "W4A4: accuracy, %" in table
    assert "| DQSS |" in table
    assert "No torchao: ModuleNotFoundError" in table
    assert "stays float" not in table
    left = [row | {"left_float": ["emb"]} for row in found["rows"]]
    assert "In all methods emb stays float." in strategy_claims.network_table(left)
    other = [row | {"weights": "elsewhere"} for row in found["rows"]]  # of a float network that another machine trained
    assert [{row.get("weights") for row in group} for group in strategy_claims.grouped([*other, *found["rows"]])] == [
        *({"elsewhere"}, {reference["weights"]})
    ]


def test_some_methods_may_be_measured_alone(short):
    how = ["digits", "--settings", "W3", "--quick", "--samples", "32", "--test", "10", "--results", str(short)]
    assert strategies.main([*how, "--methods", "uniform mse,random"]) == 0
    rows = json.loads((short / "strategies.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["float", "uniform mse", "random"]
    with pytest.raises(SystemExit, match="no method is called 'hqqq'; there are DQSS, best uniform, brevitas"):
        strategies.main([*how, "--methods", "hqqq"])


def small_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return strategy_networks.Network(net.eval(), torch.rand(64, 1, 4, 4), lambda m: {}, samples=32)


@pytest.mark.filterwarnings("ignore")  # of another's code
def test_another_library_s_network_has_its_widths():
    pytest.importorskip("torchao")
    of = small_network()
    made, float_ = strategy_peers.exported(of, of.pool), of.model(of.pool)
    error = (made(of.pool) - float_).norm() / float_.norm()
    assert 1e-4 < error < 0.02  # 8 bits
    assert torch.allclose(made(of.pool[:1]), made(of.pool)[:1], atol=1e-5)  # batches of any size


@pytest.mark.filterwarnings("ignore")  # of another's code
@pytest.mark.parametrize("ending", strategy_peers.BREVITAS.values())
def test_each_layer_has_its_own_widths_in_another_library(ending):
    pytest.importorskip("brevitas")
    of = small_network()
    made = strategy_peers.calibrated(fold_batch_norms(of.model).model, of.pool, {"0": (8, 8), "4": (3, 4)}, ending)
    for name, (weight, given) in {"0": (255, 256), "4": (7, 16)}.items():  # codes; of weights the least is not used
        layer, shown = made.get_submodule(name), []
        layer.register_forward_pre_hook(lambda m, x, shown=shown: shown.append(m.input_quant(x[0])))
        made(of.pool)
        assert max(len(row.unique()) for row in layer.quant_weight().value.flatten(1)) <= weight
        assert given / 2 < len(shown[0][0].unique()) <= given
    error = (made(of.pool) - of.model(of.pool)).norm() / of.model(of.pool).norm()
    assert 1e-3 < error < 0.5


@pytest.mark.filterwarnings("ignore")  # of another's code
def test_another_library_s_text_may_be_shorter_than_what_calibrated_it():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net, text = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)).eval(), torch.randint(9, (8, 16))
    of = strategy_networks.Network(net, text, lambda m: {}, metric="loss", sign=-1)
    made = strategy_peers.exported(of, text)
    assert torch.allclose(made(text[:3, :-1]), net(text[:3, :-1]), atol=0.1)


def test_what_another_library_does_not_make_is_said():
    def absent():
        import no_such_library  # noqa: F401

    def judge(model):
        raise AssertionError("judged")

    assert strategy_peers.by_others(absent, judge) == {
        "missing": "ModuleNotFoundError: No module named 'no_such_library'"
    }
    with pytest.raises(AssertionError, match="judged"):  # an error of ours is none of theirs
        strategy_peers.by_others(nn.Identity, judge)


def row(method, accuracy, seed=0, **more):
    return {
        **{"task": "resnet20", "setting": "W8A8", "method": method, "seed": seed, "accuracy": accuracy},
        **{"metric": "accuracy", "samples": 64, "test_samples": 1000, **more},
    }


def of(*rows):
    reference = {"task": "resnet20", "method": "float", "accuracy": 0.88, "metric": "accuracy", "test_samples": 1000}
    other = {**reference, "accuracy": 0.99, "test_samples": 50}  # of another set of rows
    return {
        c["claim"].split(": ")[1].split(" (")[0]: c["holds"]
        for c in strategy_claims.network_claims([other, reference, *rows])
    }


def test_claims_can_fail():
    def drawn(*rows):
        return [{**row, "seed": seed} for row in rows for seed in range(3)]

    good = row("DQSS", 0.8795)
    uniform = row("best uniform", 0.8795, ours_ahead=-0.0019, ours_ahead_error=0.001)
    greedy = row("greedy", 0.8795, ours_ahead=0.01, ours_ahead_error=0.0)
    assert set(of(*drawn(good, uniform, greedy)).values()) == {True}
    assert len(of(*drawn(good, uniform, greedy))) == 3
    assert set(of(good, uniform, greedy).values()) == {False}  # one draw is too few
    assert of(*drawn(good, uniform), greedy) == {  # of either
        **{f"test accuracy ahead of best uniform, {BEHIND}": True, f"test accuracy ahead of greedy, {BEHIND}": False},
        "test accuracy lost against float": True,
    }
    assert not of(*drawn(row("DQSS", 0.8785), uniform))["test accuracy lost against float"]
    for name in ("best uniform", "greedy"):
        behind = row(name, 0.88, ours_ahead=-0.0021, ours_ahead_error=0.001)
        assert not of(*drawn(good, behind))[f"test accuracy ahead of {name}, {BEHIND}"]
    one = row("uniform mse + kl", 0.879, ours_ahead=0.01, ours_ahead_error=0.001)
    two = row("uniform kl + mse", 0.881, ours_ahead=-0.0021, ours_ahead_error=0.001)
    said = of(*drawn(good, one, two))
    assert said[f"test accuracy ahead of uniform kl + mse, the best by test of 2 such, {BEHIND}"] is False
    assert len(said) == 2
    few = [{**r, "test_samples": 50} for r in (good, uniform)]
    assert len(strategy_claims.network_claims([good, uniform, *few])) == 2  # nothing of one is told of the other


def test_a_mixture_s_cost_is_measured_and_claimed(short, monkeypatch):
    monkeypatch.setattr(strategies, "CANDIDATES", (2, 16))
    monkeypatch.setattr(
        strategies,
        "_mixture",
        lambda count, ours, learned: {
            "cpu_seconds": 1.0 if ours else 0.1 * count**2,
            "kept_bytes": 100,
        },
    )
    assert strategies.main(["mixture", "--results", str(short)]) == 0
    found = json.loads((short / "strategies.json").read_text())
    assert [c["holds"] for c in found["claims"]] == [True] * 5
    assert "2 candidates" in strategy_claims.mixture_table(found["rows"])
    flat = [{**r, "cpu_seconds": r["candidates"]} for r in found["rows"]]
    assert [c["holds"] for c in strategy_claims.mixture_claims(flat)][1] is False


def test_both_forms_of_a_mixture_are_timed():
    ours, learning, plain = (strategies._mixture(2, *how) for how in ((True, False), (True, True), (False, False)))
    assert 1.5 * ours["kept_bytes"] > learning["kept_bytes"] > ours["kept_bytes"]
    assert 3 * ours["kept_bytes"] > plain["kept_bytes"] > 1.5 * ours["kept_bytes"] > 0  # it rounds an input once, too
    assert ours["cpu_seconds"] > 0


def test_training_rows(monkeypatch, short):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = torch.rand(64, 1, 4, 4), torch.randint(3, (64,))
    of = strategy_networks.Network(
        net,
        x,
        lambda m: {"accuracy": (m(x).argmax(1) == y).float()},
        samples=32,
        train=torch.utils.data.TensorDataset(x, y),
        test_samples=64,
    )
    monkeypatch.setattr(strategies, "network", lambda *_: of)
    how = ["qat", "--steps", "5", "--draws", "1", "--results", str(short)]
    with pytest.raises(SystemExit, match="no method is called 'uniform'; there are DQSS, dorefa"):
        strategies.main([*how, "--methods", "uniform"])
    assert strategies.main([*how, "--methods", "DQSS"]) == 0
    assert [r["method"] for r in json.loads((short / "strategies.json").read_text())["rows"]] == ["float", "DQSS"]
    assert strategies.main(how) == 0
    rows = json.loads((short / "strategies.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["float", "DQSS", "lsq", "lsq+", "straight-through", "dorefa + pact"]
    assert all(0 <= r["accuracy"] <= 1 for r in rows)
    shown = strategy_claims.qat_table(rows)
    assert "| lsq | 5 | 0.001 | 64 | 1 |" in shown
    assert "| float | | | | 1 |" in shown.replace("  ", " ")
    assert len(strategy_claims.qat_claims(rows)) == 5


def test_claims_of_training_can_fail():
    reference = {"task": "resnet20", "method": "float", "accuracy": 0.88, "metric": "accuracy", "test_samples": 1000}

    def claims(ours, theirs):
        made = [row("DQSS", v, seed, steps=5, rate=0.1) for seed, v in enumerate(ours)]
        made += [row("lsq", v, seed, steps=5, rate=0.1) for seed, v in enumerate(theirs)]
        return [c["holds"] for c in strategy_claims.qat_claims([reference, *made])]

    assert claims([0.877] * 3, [0.877] * 3) == [True, True]
    assert claims([0.877] * 2, [0.877] * 3) == [False, False]  # two seeds of ours are too few
    assert claims([0.877] * 3, [0.877] * 2) == [True, False]  # and of theirs
    assert claims([0.874] * 3, [0.8745] * 3) == [False, False]
    assert claims([0.876, 0.878, 0.88], [0.878, 0.879, 0.879]) == [True, True]  # behind, within two standard errors
    shorter = [row("DQSS", 0.5, seed, steps=4, rate=0.1) for seed in range(3)]
    longer = [row("DQSS", 0.88, seed, steps=5, rate=0.1) for seed in range(3)]
    faster = [{**r, "rate": 0.2} for r in shorter]
    made = strategy_claims.qat_claims([reference, *shorter, *longer, *faster])
    assert [c["holds"] for c in made] == [False, True, False]
    assert len({c["claim"] for c in made}) == 3


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
