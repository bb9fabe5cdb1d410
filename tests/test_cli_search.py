"""`sgsc search` from the command line: files, exit codes, errors, several workers on one study."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
import torch
from safetensors.torch import load_file as loaded
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from sgsc import load as load_model
from sgsc import load_into, prepare
from sgsc.artefact import ArtefactError
from sgsc.cli import main
from sgsc.demos import load, models
from sgsc.demos import search as search_demo
from sgsc.demos.search import Schedule, parse_budget
from sgsc.distillation import distilled
from sgsc.report import search_summary
from sgsc.report.search_page import render_search
from sgsc.search.candidates import as_float
from sgsc.search.storage import open_storage
from sgsc.search.structure import structure_of
from sgsc.search.widths import resized

QUICK = ["--limit", "64", "--float-steps", "20", "--steps", "2", "--finish-steps", "3", "--trials", "9"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main(["search", "digits", *QUICK, "--budget", "10%,5bits", "--out", str(folder), "--json"]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_a_run_writes_its_files(run):
    folder, report = run
    assert {p.name for p in folder.iterdir() if not p.name.startswith("study.db")} == {
        *("float.safetensors", "model.sgsc", "report.html", "report.json", "winner.safetensors")
    }
    assert (folder / "model.sgsc").stat().st_size == report["stored_bytes"] <= 0.1 * report["float_bytes"]
    assert report["budget_held"]
    assert report["result"]["cost"]["bytes"] == report["stored_bytes"]
    assert report["result"]["cost"]["mean_bits"] <= 5
    assert len([t for t in report["trials"] if t["loss"] is not None or t["state"] == "pruned"]) == 9


QUICK_COMPRESS = ["--limit", "64", "--samples", "4", "--steps", "2", "--json"]


def compressed(start, folder, capsys):
    """The code and what was said."""
    code = main(["compress", "digits", *QUICK_COMPRESS, "--start", str(start), "--out", str(folder)])
    return code, capsys.readouterr()


def test_the_winner_goes_on_into_compression_with_its_channels(tmp_path, capsys):
    search = [*QUICK[2:], "--budget", "5%", "--out", str(tmp_path / "search")]  # with all channels it is over that
    assert main(["search", "digits", "--limit", "64", "--json", *search]) == 0
    report = json.loads(capsys.readouterr().out)
    assert any(group["channels"] != group["of"] for group in report["groups"].values())
    start = tmp_path / "search/winner.safetensors"
    code, said = compressed(start, tmp_path / "compressed", capsys)
    assert code in (0, 1)
    made = json.loads(said.out)
    rows = {row["name"]: row["shape"][0] for row in made["layers"]}
    assert rows == {name: len(loaded(start)[f"{name}.weight"]) for name in rows}
    assert made["float_bytes"] < report["float_bytes"]


def test_a_winner_with_more_channels_is_certified_too(tmp_path, capsys):
    model = prepare(load("digits", limit=8).build(), quantizer="lsq8").model
    structure = structure_of(model)
    (group, ids) = max(structure.groups.items(), key=lambda item: len(item[1]))
    wider = as_float(resized(model, structure, {group: len(ids) + 32}))
    save_file({k: v.contiguous() for k, v in wider.state_dict().items()}, tmp_path / "winner.safetensors")
    code, said = compressed(tmp_path / "winner.safetensors", tmp_path / "run", capsys)
    assert code in (0, 1)
    made = json.loads(said.out)
    assert made["float_bytes"] > 4 * sum(p.numel() for p in model.parameters())
    assert load_into(wider, tmp_path / "run/model.sgsc")
    with pytest.raises(ArtefactError, match="architecture"):
        load_model(tmp_path / "run/model.sgsc")


@pytest.mark.parametrize(
    "broken",
    [
        *({}, {"more": torch.zeros(1)}, {"head.weight": torch.randn(12, 512)}, {"head.weight": torch.randn(10)}),
        *(
            {"stem.0.weight": torch.randn(32, 1, 1, 1)},
            {"stem.0.weight": torch.randn(32)},
            {"head.bias": torch.tensor(1.0)},
        ),
        {"stem.0.weight": torch.randn(0, 1, 3, 3)},
    ],
    ids=lambda broken: " ".join(f"{k} {tuple(v.shape)}" for k, v in broken.items()) or "empty",
)
def test_weights_of_another_network_are_refused(broken, tmp_path, capsys):
    state = {**load("digits", limit=8).build().state_dict(), **broken} if broken else {}
    save_file(state, tmp_path / "start.safetensors")
    code, said = compressed(tmp_path / "start.safetensors", tmp_path / "run", capsys)
    assert code == 2
    assert "the weights to start digits from are not of its network" in said.err


def test_the_page_shows_every_part(run):
    page = (run[0] / "report.html").read_text()
    for part in ("History", "Front", "Parallel coordinates", "Bits and channels of each layer", "uniform 2"):
        assert part in page
    assert page.count("<svg") >= 4
    assert page.count('class="wide"') == 3  # on a phone they scroll: text would be too small to read
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert main(["report", str(run[0]), "--json"]) == 0
    assert (run[0] / "report.html").read_text() == page


def test_the_page_escapes_and_survives_what_is_missing(run):
    assert "not recorded" in render_search({})
    hostile = {**run[1], "task": "<script>x</script>", "reason": "<b>"}
    assert "<script>" not in render_search(hostile)
    search_summary({})


def test_resumed_trials_are_not_run_again(run, tmp_path, capsys):
    more = ["--start", str(run[0] / "float.safetensors"), "--storage", str(tmp_path / "s.db"), "--out", str(tmp_path)]
    for trials in ("3", "9"):
        assert main(["search", "digits", *QUICK[:-1], trials, "--budget", "10%,5bits", *more, "--json"]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert [(t["params"], t["loss"]) for t in again["trials"]] == [(t["params"], t["loss"]) for t in run[1]["trials"]]


def test_two_workers_share_a_study(tmp_path, run):
    def worker(name):
        command = [sys.executable, "-m", "sgsc", "search", "digits", *QUICK, "--budget", "10%", "--json"]
        command += ["--start", str(run[0] / "float.safetensors"), "--storage", str(tmp_path / "s.db")]
        return subprocess.Popen(
            [*command, "--study", "both", "--out", str(tmp_path / name)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    workers = [worker("a"), worker("b")]
    ends = [(w.communicate()[1][-500:], w.returncode) for w in workers]
    assert [code for _, code in ends] == [0, 0], ends
    study = optuna.load_study(study_name="both", storage=f"sqlite:///{tmp_path / 's.db'}")
    ended = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == 9
    assert len({json.dumps(t.params) for t in ended}) == len(ended)
    assert len({t.user_attrs["worker"]["pid"] for t in ended}) == 2
    assert not [t for t in study.trials if t.state.name == "RUNNING"]
    study._storage._backend.engine.dispose()


def test_without_changed_channels_the_file_loads_into_the_task_s_network(tmp_path, capsys):
    how = [*QUICK[:-1], "4", "--bits-only", "--budget", "8%", "--out", str(tmp_path)]
    assert main(["search", "digits", *how]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"won by .*: validation loss [\d.]+, [\d,]+ bytes", " ".join(out.split()))
    assert "search 4/4" in err
    assert load_into(models.DigitsCNN(), tmp_path / "model.sgsc")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "budget": (["--budget", "small"], r"budget 'small': want a number and a unit of %, B, kB"),
        "too-small": (["--budget", "5kB"], r"the budget is below the smallest network .*bytes 5,000 <"),
        "sensitivity": (["--budget", "8%", "--sensitivity", "x"], "method='x': want hutchinson, fisher or auto"),
        "seed": (["--budget", "8%", "--seed", "-1"], "seed=-1: a seed is a whole number, 0 or more"),
        "trials": (["--budget", "8%", "--trials", "0"], "trials=0: want a whole number of trials, 1 or more"),
        "precision": (["--budget", "8%", "--precision", "int8"], "precision='int8': want float32 or bfloat16"),
        "steps": (["--budget", "8%", "--steps", "0"], "steps=0, finish_steps=3: a candidate that is not trained"),
        "sampler": (["--budget", "8%", "--sampler", "x"], "sampler='x' is not known"),
        "storage": (["--budget", "8%", "--storage", "nonsense://x"], "the storage nonsense://x cannot be opened"),
    }.values(),
    ids=("budget", "too-small", "sensitivity", "seed", "trials", "precision", "steps", "sampler", "storage"),
)
def test_wrong_use_is_exit_code_2_and_says_why_before_anything_is_trained(
    arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(search_demo, "float_model", lambda *_: pytest.fail("the float network is trained first"))
    assert main(["search", "digits", *QUICK, "--out", str(tmp_path), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_study_of_other_settings_is_refused_before_anything_is_trained(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search_demo, "float_model", lambda *_: pytest.fail("the float network is trained first"))
    there = ["search", "digits", *QUICK, "--out", str(tmp_path), "--storage", str(run[0] / "study.db")]
    for other, named in (
        (["--budget", "10%,5bits", "--steps", "4"], "steps"),
        (["--budget", "9%", "--seed", "1"], "budget, data, seed"),
        (["--budget", "10%,5bits", "--precision", "bfloat16"], "precision"),
    ):
        assert main([*there, *other]) == 2
        assert f"study 'digits' is of another {named}: " in capsys.readouterr().err


def test_a_study_that_was_judged_by_labels_is_refused(run, tmp_path, capsys):
    shutil.copy(run[0] / "study.db", tmp_path / "old.db")
    storage = open_storage(tmp_path / "old.db")
    study = optuna.load_study(study_name="digits", storage=storage)
    old = {key: value for key, value in study.user_attrs["settings"].items() if key != "judged_by"}
    study.set_user_attr("settings", old | {"distilled": True})
    storage.engine.dispose()
    there = ["search", "digits", *QUICK, "--out", str(tmp_path), "--storage", str(tmp_path / "old.db")]
    assert main([*there, "--budget", "10%,5bits"]) == 2
    said = capsys.readouterr().err
    assert "study 'digits' is of another judged_by: {'judged_by': None}" in said
    assert "or another name with --study" in said


def test_another_host_s_file_is_refused_before_anything_is_trained_whatever_the_study(
    run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(search_demo, "float_model", lambda *_: pytest.fail("the float network is trained first"))
    monkeypatch.setattr("sgsc.search.storage.socket.gethostname", lambda: "other")
    there = ["--budget", "10%", "--out", str(tmp_path), "--storage", str(run[0] / "study.db")]
    for name in ("digits", "new"):
        assert main(["search", "digits", *QUICK, *there, "--study", name]) == 2
        assert "and this is 'other': SQLite does not serve several hosts" in capsys.readouterr().err


def test_a_budget_that_is_too_fast_is_named_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search_demo, "float_model", lambda *_: pytest.fail("the float network is trained first"))
    assert main(["search", "digits", *QUICK, "--out", str(tmp_path), "--budget", "0.001us"]) == 2
    assert re.search(r"the budget is below the smallest network .*seconds 1e-09 <", capsys.readouterr().err)


def test_a_search_from_a_winner_counts_the_channels_that_it_has(run, tmp_path):
    network = load("digits", limit=64).build()
    model = prepare(network, quantizer="lsq8").model
    structure = structure_of(model)
    half = as_float(resized(model, structure, {g: n // 2 for g, n in structure.sizes.items()}, 0))
    save_file(half.state_dict(), tmp_path / "half.safetensors")
    total = 4 * sum(p.numel() for p in half.state_dict().values() if p.is_floating_point())
    start = ["--start", str(tmp_path / "half.safetensors"), "--out", str(tmp_path)]
    assert main(["search", "digits", *QUICK, *start, "--budget", "20000B"]) == 0  # below the smallest of a whole one
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["float_bytes"] < run[1]["float_bytes"] / 3
    assert abs(report["float_bytes"] - total) < 0.02 * total


def test_a_layer_s_name_may_hold_what_formulas_are_written_with(run):
    renamed = json.loads(json.dumps(run[1]).replace("stem.0", "$\\\\foo$"))
    assert "foo$" in render_search(renamed)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("10%,5kB", "limits bytes twice; give one"),
        ("3ms,4bits,1s", "limits seconds twice"),
        ("1e999B", "budget '1e999B': want a number and a unit"),
        ("nanB", "want a number"),
    ],
)
def test_a_budget_that_says_two_things_or_nothing_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_budget(text, 1000)


def test_budgets_are_read_with_their_units():
    found = parse_budget("10%, 4.5bits,2.5MMAC,3ms", 1000)
    assert found.limits() == {"bytes": 100, "mean_bits": 4.5, "macs": 2.5e6, "seconds": pytest.approx(3e-3)}
    assert parse_budget("50kB", 1).bytes == 50_000
    assert parse_budget("1e5B", 1).bytes == 100_000


def test_candidates_are_judged_by_what_they_answer_and_not_by_labels(monkeypatch):
    monkeypatch.setattr(search_demo, "JUDGED", 5)  # the last batch is smaller
    monkeypatch.setattr(search_demo, "LOOK", 12)
    task = load("digits", limit=64)
    teacher, model = task.build().eval(), task.build().train()
    x, y = (part[:12] for part in task.validation.tensors)
    assert len(task.validation) > 12
    how = Schedule(task, "cpu", 0, 1, 1, teacher)
    with torch.no_grad():
        wanted = distilled(model.eval()(x), teacher(x)).item()
    assert how.loss(model.train()) == pytest.approx(wanted, rel=1e-5)
    assert model.training  # a candidate is looked at on its way
    assert how.loss(teacher) == pytest.approx(0, abs=1e-6)
    others = replace(how, task=replace(task, validation=TensorDataset(x, (y + 1) % 10)))
    assert others.loss(model) == how.loss(model)
