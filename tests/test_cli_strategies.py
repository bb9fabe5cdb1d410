"""`sgsc strategies` from the command line: files, page, a network of one's own, errors."""

import json
import re
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from sgsc import load_into
from sgsc.cli import main
from sgsc.demos import strategies as demo
from sgsc.demos.strategies import answers_alike
from sgsc.demos.tasks import load
from sgsc.demos.training import evaluate
from sgsc.distillation import TEMPERATURE, distilled
from sgsc.report import strategies_summary
from sgsc.report.strategies_page import render_strategies
from sgsc.strategies import StrategyTraining

QUICK = ["--samples", "48", "--steps", "3", "--weights", "max-abs,mse", "--inputs", "min-max,mse,kl"]
TASK = ["strategies", "digits", "--limit", "64", "--float-steps", "20"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    how = ["--bits-weights", "3", "--bits-activations", "4", "--out", str(folder), "--json"]
    assert main([*TASK, *QUICK, *how]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_a_run_writes_its_files_and_reports_every_candidate_of_every_layer(run):
    folder, report = run
    files = {p.name for p in folder.iterdir()}
    assert {"derived.safetensors", "float.safetensors", "report.html", "report.json"} <= files
    assert "model.sgsc" in files
    assert report["not_packed"] == ""
    assert len(report["layers"]) == 6
    for row in report["layers"]:
        assert row["weight"] in row["weight_losses"].keys() == {"max-abs", "mse"}
        assert row["input"] in row["input_losses"].keys() == {"min-max", "mse", "kl"}
    assert report["layers"][0]["bits_input"] == report["layers"][-1]["bits_weight"] == 8
    assert report["samples_fit"] + report["samples_select"] == 48
    assert 0 <= report["derived_accuracy"] <= 1


def test_the_derived_state_holds_every_grid(run):
    state = safetensors.torch.load_file(run[0] / "derived.safetensors")
    assert state["first.0.weight_quantizer.bit_depth"].unique().tolist() == [3]
    assert state["first.0.input_quantizer.code_max"].item() - state["first.0.input_quantizer.code_min"].item() == 15


def test_the_page_shows_every_part_and_is_written_again(run, capsys):
    page = (run[0] / "report.html").read_text()
    for part in (
        "weights of 3 bits, activations of 4 bits",
        "Best uniform choice",
        "shortcut.0",
        "Uniform choices",
        "<b>",
    ):
        assert part in page
    assert page.count("<svg") == 2
    assert "$" not in re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL)  # formulas would be shown as written
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert main(["report", str(run[0]), "--json"]) == 0
    assert (run[0] / "report.html").read_text() == page


def test_the_page_escapes_and_survives_what_is_missing(run):
    assert "not recorded" in render_strategies({})
    hostile = {**run[1], "task": "<script>x</script>", "not_packed": "<b>"}
    assert "<script>" not in render_strategies(hostile)
    strategies_summary({})
    render_strategies({"layers": [{"name": "a"}], "uniform": [{}], "course": [{}]})
    assert "brings biases for 3 layers that have none" in render_strategies({"biases_added": 3})
    assert "brings biases" not in render_strategies({"biases_added": 0})


def test_the_terminal_shows_choices(run, tmp_path, capsys):
    start = ["--start", str(run[0] / "float.safetensors"), "--bits-activations", "0"]
    assert main([*TASK, *QUICK, *start, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "best uniform" in said.out
    assert "float" in said.out
    assert f"wrote {tmp_path}/: derived.safetensors, model.sgsc, report.json" in said.out
    assert "greedy pass from the mixture" in said.err


def test_a_task_is_trained_with_strategies_that_learn(tmp_path, capsys, monkeypatch):
    how = ["--train", "40", "--samples", "32", "--weights", "lsq,dorefa", "--inputs", "pact", "--bits-weights", "2"]
    how += ["--bits-activations", "3", "--edge-bits", "0", "--rate", "0.002"]
    seen = []
    monkeypatch.setattr(demo, "distilled", lambda *both: seen.append(both[0].dtype) or distilled(*both))
    assert main(["strategies", "digits", "--limit", "200", "--float-steps", "60", *how, "--out", str(tmp_path)]) == 0
    assert seen == [torch.float32] * 40
    said = capsys.readouterr()
    assert "training: search" in said.err
    assert "best uniform" not in said.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["trained_steps"], report["rate"]) == (len(report["course"]), 0.002) == (40, 0.002)
    assert [row["stage"] for row in report["course"]] == ["warm-up"] * 4 + ["search"] * 12 + ["settled"] * 24
    assert report["course"][5]["entropy"] > report["course"][15]["entropy"]
    for row in report["layers"]:
        assert row["weight"] == max(row["weight_shares"], key=row["weight_shares"].get)
        assert row["weight_shares"].keys() == {"lsq", "dorefa"}
        assert sum(row["weight_shares"].values()) == pytest.approx(1)
        assert row["input"] == "pact"
    page = (tmp_path / "report.html").read_text()
    assert "trained with its strategies for 40 steps" in page
    assert "Uniform choices" not in page
    assert page.count("<svg") == 1
    task = load("digits", limit=200)
    packed = load_into(task.build(), tmp_path / "model.sgsc")  # batch norms stay: it loads into the network itself
    assert evaluate(packed, task.test())["accuracy"] == pytest.approx(report["derived_accuracy"], abs=0.01)
    start = ["--start", str(tmp_path / "float.safetensors"), "--out", str(tmp_path / "untrained"), "--json"]
    how[1] = "1"  # a step
    assert main(["strategies", "digits", "--limit", "200", *how, "--precision", "bfloat16", *start]) == 0
    assert seen[40:] == [torch.bfloat16]
    untrained = json.loads((tmp_path / "untrained" / "report.json").read_text())
    losses = [r["validation"]["derived"]["loss"] for r in (report, untrained)]
    assert losses[0] < 0.7 * losses[1]


def test_a_training_learns_the_float_answers_and_needs_no_labels():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(16, 4)
    run = StrategyTraining(network, x, steps=2, weights=["lsq"], inputs=["lsq"])
    with torch.no_grad():
        outputs, wanted = run.model(x) / TEMPERATURE, network(x) / TEMPERATURE
    kl = (wanted.softmax(1) * (wanted.log_softmax(1) - outputs.log_softmax(1))).sum(1).mean()
    course = demo.learn(run, network, [(x,)] * 3)
    assert course[0]["loss"] == pytest.approx(TEMPERATURE**2 * kl.item(), rel=1e-5)
    assert len(course) == 2
    run = StrategyTraining(network, x, steps=2, weights=["lsq"], inputs=["lsq"])
    with pytest.raises(ValueError, match="ended after 1 of 2 steps; pass one that begins again"):
        demo.learn(run, network, [(x,)])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--train", "0"], "steps=0: want a whole number, 1 or more"),
        (["--train", "5", "--weights", "mse"], "'mse' is not known"),
        (["--train", "5", "--bits-weights", "9"], "--bits-weights 9: want 2 to 8"),
        (["--train", "5", "--samples", "0"], "samples=0 calibrates nothing"),
        (["--steps", "-1"], "steps=-1: want a whole number, 0 or more"),
        (["--bits-weights", "9"], "--bits-weights 9: want 2 to 8"),
        (["--inputs", "pact"], "'pact' is not known without training"),
        (["--samples", "0"], "samples=0 calibrates nothing"),
        (["--loss", "l3"], "loss='l3' is not known"),
    ],
)
def test_settings_that_are_wrong_are_refused_before_anything_is_trained(wrong, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "float_model", lambda *_: pytest.fail("trained"))
    assert main(["strategies", "digits", "--limit", "32", *wrong, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_network_of_one_s_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nimport torch\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Width:\n    of: int = 8\n"
        "def net():\n    torch.manual_seed(0)\n    twice = torch.nn.Linear(8, 8)\n"
        "    first, last = torch.nn.Linear(4, Width().of), torch.nn.Linear(8, 3)\n"
        "    return torch.nn.Sequential(first, torch.nn.ReLU(), twice, torch.nn.ReLU(), twice, last)\n"
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 4)).astype("float32"))
    how = ["--model", f"{tmp_path / 'mine.py'}:net", "--calibration", str(tmp_path / "x.npy"), "--out", str(tmp_path)]
    assert main(["strategies", *how, *QUICK, "--json"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in report["layers"]] == ["0", "2", "5"]
    assert "float_accuracy" not in report
    assert "Sequential" in (tmp_path / "report.html").read_text()


def test_a_network_of_one_s_own_imports_what_lies_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "parts_of_mine.py").write_text("import torch\nlayer = torch.nn.Linear(4, 3)\n")
    (tmp_path / "whole.py").write_text("from parts_of_mine import layer\n\n\ndef net():\n    return layer\n")
    (tmp_path / "torn.py").write_text("def net(:\n")
    (tmp_path / "fails.py").write_text("def net():\n    raise KeyError('weights')\n")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 4)).astype("float32"))
    how = ["--calibration", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), *QUICK]
    assert main(["strategies", "--model", f"{tmp_path / 'whole.py'}:net", *how]) == 0
    for name, said in (("torn", "SyntaxError: "), ("fails", "does not make a network: KeyError: 'weights'")):
        assert main(["strategies", "--model", f"{tmp_path / name}.py:net", *how]) == 2
        assert said in capsys.readouterr().err
    for flag, value in (("--start", "a"), ("--float-steps", "3"), ("--data", "b")):
        assert main(["strategies", "--model", f"{tmp_path / 'whole.py'}:net", *how, flag, value]) == 2
        assert f"{flag} is of a task" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.float32(3), "a batch is a single number; want tensors (samples, ...)"),
        (np.zeros((0, 4), "float32"), "no calibration data"),
        (np.where(np.arange(30)[:, None] == 17, np.nan, np.ones((30, 4))), "sample 17 holds NaN or infinity"),
    ],
)
def test_data_of_one_s_own_that_cannot_serve_is_answered(values, said, tmp_path, capsys):
    np.save(tmp_path / "x.npy", values)
    how = ["--model", "torch.nn:Identity", "--calibration", str(tmp_path / "x.npy"), "--out", str(tmp_path)]
    assert main(["strategies", *how]) == 2
    assert said in capsys.readouterr().err


def test_a_network_that_does_not_run_packed_gets_no_file_and_says_why(tmp_path, capsys):
    (tmp_path / "odd.py").write_text(
        "import torch\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        torch.manual_seed(0)\n"
        "        self.table, self.linear = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)\n"
        "    def forward(self, ids):\n"
        "        return self.linear(self.table(ids).to(self.linear.weight.dtype))\n"
    )
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(20, size=(40, 6)))
    (tmp_path / "model.sgsc").write_bytes(b"of an older run")
    how = [
        "--model",
        f"{tmp_path / 'odd.py'}:Odd",
        "--calibration",
        str(tmp_path / "ids.npy"),
        "--out",
        str(tmp_path),
    ]
    assert main(["strategies", *how, *QUICK]) == 0
    assert "no model.sgsc: packed, the network does not run (AttributeError: " in capsys.readouterr().err
    assert not (tmp_path / "model.sgsc").exists()
    assert main(["strategies", *how, *QUICK, "--skip", "linear"]) == 0
    assert (tmp_path / "model.sgsc").exists()


def test_a_packed_network_that_is_far_off_is_refused():
    net, x = nn.Linear(4, 3), torch.randn(8, 4)
    answers_alike(net, net, x)
    for other in (lambda x: 1.2 * net(x), lambda x: net(x) * torch.nan):
        with pytest.raises(ValueError, match=r"packed, the network is off by .* of the norm of its answers"):
            answers_alike(other, net, x)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "name a task, or --model with --calibration"),
        (["digits", "--model", "a:b", "--calibration", "x.npy"], "name a task, or --model"),
        (["--model", "a:b"], "name a task, or --model with --calibration"),
        (
            ["--model", "no_such_module:net", "--calibration", "x.npy"],
            "No module named 'no_such_module'; want module:name",
        ),
        (["--model", "torch:nothing", "--calibration", "x.npy"], "has no attribute 'nothing'"),
        (["--model", "torch.nn:Identity", "--calibration", "x.npy"], "No such file or directory: 'x.npy'"),
        (["--model", "os:getcwd", "--calibration", "x.npy"], "is a str; want an nn.Module"),
        (["--model", "torch.nn:Linear", "--calibration", "x.npy"], "missing a required argument: 'in_features'; want"),
        (["--model", "os:sep", "--calibration", "x.npy"], "is not a callable object; want an nn.Module, or a function"),
        (["nothing"], "no task is called 'nothing'"),
        (["digits", "--rate", "0.1"], "--rate is of a training; name its steps too"),
        (["digits", "--train", "5", "--integer-bias"], "--integer-bias is of the search without training"),
        (["digits", "--train", "5", "--loss", "kl"], "--loss is of the search without training"),
        (["digits", "--train", "5", "--steps", "9"], "--steps is of the search without training"),
        (["digits", "--train", "5", "--loss", "l1"], "--loss is of the search without training"),
        (["digits", "--train", "5", "--no-correct-bias"], "--no-correct-bias is of the search without training"),
        (
            ["--model", "torch.nn:Identity", "--calibration", "x.npy", "--train", "5"],
            "network by sgsc.StrategyTraining",
        ),
    ],
)
def test_wrong_use_is_answered(wrong, said, tmp_path, capsys):
    assert main(["strategies", *wrong, *(["--out", str(tmp_path)] if wrong else [])]) == 2
    assert said in capsys.readouterr().err
