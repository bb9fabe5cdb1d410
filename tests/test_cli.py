"""The command line: exit codes, files of the run folder, one JSON document, and resuming, byte for byte."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sgsc
from sgsc import cli
from sgsc.artefact import load, read, save
from sgsc.checkpoint import load_checkpoint, save_checkpoint
from sgsc.cli import main
from sgsc.config import CompressionConfig, add_settings
from sgsc.demos import job, tasks
from sgsc.kernels import OPS, extension
from sgsc.packed import pack
from sgsc.preparation import prepare
from sgsc.quantizers import StaticInput
from sgsc.report import words

ROOT = Path(__file__).parents[1]
FILES = {
    *("model.sgsc", "report.json", "certificate.json", "report.html"),  # the interface
    *("float.safetensors", "preservation.safetensors"),  # what certifying again needs
}
FIELDS = {
    *("float_accuracy", "packed_accuracy", "float_bytes", "stored_bytes", "stored_ratio", "bits_per_weight"),
    *("channels_removed", "preservation", "guard", "tolerance_held", "target_held", "backend", "seed", "seconds"),
    *("commit", "versions"),
}
QUICK = ("--limit", "32", "--samples", "12", "--steps", "12", "--guard-every", "3", "--bit-rate", "1")
REACHED = (*QUICK, "--target-size", "0.22", "--shrink-share", "0.75", "--tolerance", "0.9")


def shortened(monkeypatch, **changes):
    """Tasks whose float training is short."""
    real = tasks.load
    changes = {"float_steps": 15, "batch_size": 16} | changes
    monkeypatch.setattr(tasks, "load", lambda *args: dataclasses.replace(real(*args), **changes))


def in_this_process(monkeypatch):
    """Certify without a process of its own, which takes seconds to start."""

    def certify(folder):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            main(["certify", str(folder), "--json"])
        return json.loads(out.getvalue())

    monkeypatch.setattr(cli, "_in_a_fresh_process", certify)


@pytest.fixture
def quick(monkeypatch):
    shortened(monkeypatch)
    in_this_process(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder that met its target, and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        shortened(patch)
        in_this_process(patch)
        code = main(["compress", "digits", *REACHED, "--out", str(folder), "--json"])
    assert code == 0
    return folder, out.getvalue()


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def document(text):
    """The one JSON document that a text is, and nothing else."""
    value, end = json.JSONDecoder().raw_decode(text)
    assert text[end:].strip() == ""
    return value


# compress


def test_a_run_writes_its_files_and_no_others(run):
    assert {path.name for path in run[0].iterdir()} == FILES


def test_a_report_holds_what_it_must(run):
    folder, out = run
    report = json.loads((folder / "report.json").read_text())
    assert report.keys() >= FIELDS
    for split, samples in (("preservation", 12), ("guard", 32)):
        assert report[split].keys() >= {"samples", "regressions", "upper_bound_95"}
        assert report[split]["samples"] == samples
        assert report[split]["regressions"] <= report[split]["samples"]
        assert report[split]["regressions"] / samples < report[split]["upper_bound_95"] <= 1
    assert report["stored_bytes"] == (folder / "model.sgsc").stat().st_size
    assert report["stored_ratio"] == report["stored_bytes"] / report["float_bytes"] <= 0.22
    assert 0 <= report["packed_accuracy"] <= 1
    assert 0 < report["bits_per_weight"] <= 8
    assert (report["seed"], report["tolerance_held"], report["target_held"], report["reason"]) == (0, True, True, "")
    assert report["backend"].startswith("cpu: ")
    assert report["versions"]["torch"] == torch.__version__
    assert 0 < sum(report["seconds_by_phase"].values()) <= report["seconds"]
    assert report["sha256"] == read(folder / "model.sgsc").manifest["sha256"]
    assert document(out) == report


def test_the_certificate_is_of_the_file_that_is_there(run):
    import hashlib

    certificate = json.loads((run[0] / "certificate.json").read_text())
    assert certificate["hashes"]["model.sgsc"] == hashlib.sha256((run[0] / "model.sgsc").read_bytes()).hexdigest()
    assert certificate["stored_bytes"] == (run[0] / "model.sgsc").stat().st_size


def test_a_run_in_a_process_of_its_own(tmp_path):
    """As a user types it, but for a shorter float training; certified in yet another."""
    command = ["compress", "digits", *REACHED, "--out", str(tmp_path), "--json"]
    start = "import runpy, sys; import sgsc.demos.tasks as tasks; tasks.SCHEDULES['digits'] |= "
    start += "{'float_steps': 15, 'batch_size': 16}; runpy.run_module('sgsc', run_name='__main__', alter_sys=True)"
    done = subprocess.run([sys.executable, "-c", start, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = document(done.stdout)
    assert done.stderr == ""  # --json is quiet
    assert report.keys() >= FIELDS
    assert report["target_held"]
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_without_json_a_table_is_printed_and_progress_goes_elsewhere(quick, tmp_path, capsys):
    assert main(["compress", "digits", *REACHED, "--out", str(tmp_path / "deep" / "run")]) == 0
    out, err = capsys.readouterr()
    for text in (
        "float",
        "packed",
        "test accuracy",
        "stored bytes",
        "channels by bits",
        "preservation",
        "guard",
        "wrote",
    ):
        assert text in out
    assert re.search(r"^float training 15/15 loss ", err, re.MULTILINE)
    assert re.search(r"^compression 12/12 size ", err, re.MULTILINE)
    assert "compression" not in out
    assert {path.name for path in (tmp_path / "deep" / "run").iterdir()} == FILES


def test_a_target_that_is_not_met_is_exit_code_1_with_the_reason(quick, tmp_path, capsys):
    code = main(["compress", "digits", *QUICK, "--target-size", "0.003", "--out", str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    report = document(out)
    assert code == 1
    assert not report["target_held"]
    assert re.search(r"sgsc compress: not held: .*of the float32 bytes, not 0.30%: raise the target", err)
    assert report["reason"] in err
    assert {path.name for path in tmp_path.iterdir()} == FILES  # also then


def test_selectors_and_their_shares_are_chosen_from_the_command_line(quick, tmp_path, capsys):
    assert (
        main(["compress", "digits", *REACHED, "--shares", "random=0.5,hard=0.5", "--out", str(tmp_path), "--json"]) == 0
    )
    report = document(capsys.readouterr().out)
    assert report["preservation"]["reasons"] == {"hard": 6, "random": 6}
    assert "--shares random=0.5,hard=0.5" in words.command(report)
    for wrong, said in (("nobody=1", "no selector nobody"), ("hard=0.2", "fractions of 0 or more that sum to 1")):
        assert main(["compress", "digits", *QUICK, "--shares", wrong, "--out", str(tmp_path)]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compress", "digits", "--shares", "hard"])
    assert "'hard': want selectors and shares, such as uncertain=0.5,hard=0.5" in capsys.readouterr().err


def test_a_target_that_no_network_reaches_is_refused_before_the_float_training(quick, tmp_path, capsys):
    assert main(["compress", "digits", *QUICK, "--target-size", "0.0005", "--out", str(tmp_path)]) == 2
    assert "target_size=0.0005: with no bit left in any channel" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tolerance_that_the_reloaded_network_breaks_is_exit_code_1(quick, tmp_path, capsys, monkeypatch):
    """The gate is on the file: whatever the run believed, the file's answers count."""

    def damaged(packed, path, **how):
        for module in packed.modules():
            if getattr(module, "type_name", "") == "Linear":
                module.bias += torch.linspace(0, 1e4, len(module.bias))  # one class for all
        return save(packed, path, **how)

    monkeypatch.setattr(job, "save", damaged)
    code = main(["compress", "digits", *REACHED, "--tolerance", "0", "--out", str(tmp_path), "--json"])
    out, err = capsys.readouterr()
    report = document(out)
    assert (code, report["tolerance_held"]) == (1, False)
    assert report["preservation"]["regressions"] > 0
    assert "the reloaded network regresses on more preservation samples" in report["reason"] + err


def test_the_same_command_gives_the_same_file(run, quick, tmp_path, capsys):
    assert main(["compress", "digits", *REACHED, "--out", str(tmp_path), "--json"]) == 0
    assert (tmp_path / "model.sgsc").read_bytes() == (run[0] / "model.sgsc").read_bytes()


def test_another_seed_gives_another_file(run, quick, tmp_path, capsys):
    main(["compress", "digits", *REACHED, "--seed", "1", "--out", str(tmp_path), "--json"])
    assert (tmp_path / "model.sgsc").read_bytes() != (run[0] / "model.sgsc").read_bytes()


def test_the_file_of_a_run_loads_by_its_architecture(run):
    packed = load(run[0] / "model.sgsc")
    assert packed(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_text_runs_too(quick, tmp_path, capsys):
    """Embeddings, attention and residuals, end to end."""
    tiny = ("--limit", "16", "--samples", "4", "--steps", "3", "--guard-every", "2", "--target-size", "0.5")
    code = main(["compress", "char-lm", *tiny, "--tolerance", "0.9", "--out", str(tmp_path), "--json"])
    report = document(capsys.readouterr().out)
    assert code == 0
    assert {row["type"] for row in report["layers"]} == {"Linear", "Embedding"}
    assert report["task"] == "char-lm"


def test_a_float_network_of_another_run_is_started_from(run, quick, tmp_path, capsys, monkeypatch):
    """The same file comes out as where it was trained: the float training shares nothing else with the compression."""
    monkeypatch.setattr(job, "train", lambda *a, **k: pytest.fail("trained"))
    start = ("--start", str(run[0] / "float.safetensors"))
    assert main(["compress", "digits", *REACHED, *start, "--out", str(tmp_path), "--json"]) == 0
    assert document(capsys.readouterr().out)["float_steps"] == 0
    assert (tmp_path / "model.sgsc").read_bytes() == (run[0] / "model.sgsc").read_bytes()


def test_float_steps_and_device_are_settings(quick, tmp_path, capsys):
    more = ("--float-steps", "3", "--device", "auto" if not torch.cuda.is_available() else "cpu")
    main(["compress", "digits", *REACHED, *more, "--out", str(tmp_path)])
    assert re.search(r"^float training 3/3 loss ", capsys.readouterr().err, re.MULTILINE)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["float_steps"], report["device"]) == (3, "cpu")


# wrong use


def bare(fields):
    """An operation that is not registered a second time."""
    made = object.__new__(type(OPS["pack"]))
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


BAD = {
    "no-command": ([], "required: command"),
    "unknown-command": (["squeeze"], "invalid choice: 'squeeze'"),
    "unknown-flag": (["compress", "digits", "--sice", "1"], "unrecognized arguments: --sice"),
    "no-task": (["compress"], "required: task"),
    "not-a-number": (
        ["compress", "digits", "--target-size", "small"],
        "'small': want a number, such as 0.05 or 5%",
    ),
    "unknown-task": (["compress", "digit"], "no task is called 'digit'; there are digits"),
    "target": (["compress", "digits", "--target-size", "5"], "target_size=5.0: want a share"),
    "target-nan": (["compress", "digits", "--target-size", "nan"], "target_size=nan"),
    "tolerance": (["compress", "digits", "--tolerance", "1"], "tolerance=1.0: want a share"),
    "steps": (["compress", "digits", "--steps", "0"], "steps=0: want at least 1"),
    "seed": (["compress", "digits", "--seed", "-1"], "seed=-1: want a whole number"),
    "seed-large": (["compress", "digits", "--seed", str(2**70)], "seed=1180591620717411303424: want"),
    "limit": (["compress", "digits", "--limit", "0"], "limit=0 leaves no sample"),
    "samples": (["compress", "digits", "--samples", "0"], "samples=0: want 1 to "),
    "samples-many": (["compress", "digits", "--limit", "64", "--samples", "65"], "samples=65: want 1 to 64"),
    "float-steps": (["compress", "digits", "--float-steps", "0"], "float_steps=0: want at least 1"),
    "start": (
        ["compress", "digits", "--start", "nowhere"],
        "start='nowhere' is not a file; name the float",
    ),
    "device": (["compress", "digits", "--device", "gpu"], "device 'gpu' cannot be used here"),
    "data-not-wanted": (["compress", "digits", "--data", "here"], "digits comes with scikit-learn"),
    "data-missing": (["compress", "mnist", "--data", "nowhere"], "mnist: no mnist.npz"),
    "data-not-given": (["compress", "mnist"], "mnist is not bundled"),
    "data-not-a-file": (["compress", "char-lm", "--data", "nowhere.txt"], "'nowhere.txt' is not a file"),
    "resume-nothing": (["compress", "digits", "--resume", "--out", "nothing"], "no checkpoint at nothing/checkpoint"),
    "out-is-a-file": (["compress", "digits", "--out", "a-file"], "a-file: File exists; name another path"),
    "certify-nothing": (["certify", "nowhere"], "nowhere is no run folder: it has no report.json; `sgsc compress TASK"),
    "report-nothing": (["report", "nowhere"], "nowhere is no run folder"),
    "inspect-nothing": (["inspect", "nowhere.sgsc"], "nowhere.sgsc: No such file or directory; name another path"),
    "verify-nothing": (["verify", "nowhere.sgsc"], "nowhere.sgsc: No such file or directory; name another path"),
    "verify-folder": (["verify", "."], "Is a directory"),
    "bench-claims-of-one": (["bench", "--claims", "--op", "pack"], "--op is of measuring, --claims measures nothing"),
    "bench-unknown": (["bench", "--op", "nope"], "no operation 'nope' to measure; there are "),
    "bench-budget": (["bench", "--op", "pack", "--budget", "inf"], "budget=inf: want a finite number"),
    "bench-no-results": (["bench", "--claims", "--results", "nowhere"], "no result files in nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_use_is_exit_code_2_with_a_message_and_nothing_on_stdout(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sgsc.measure.copy_bandwidth", lambda: 1e10)
    pack_case = vars(OPS["pack"]) | {"bench_cases": OPS["pack"].cases}
    monkeypatch.setattr("sgsc.measure.OPS", {"pack": bare(pack_case)})
    monkeypatch.setattr(job, "train", lambda *args, **how: pytest.fail("trained before it looked at the settings"))
    (tmp_path / "a-file").write_text("")
    arguments, message = BAD[name]
    try:
        code = main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_folder_that_was_made_for_nothing_is_gone(tmp_path, capsys):
    assert main(["compress", "digits", "--target-size", "0.0001", "--out", str(tmp_path / "new")]) == 2
    assert "raise the target size" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_instruction_set_that_is_not_there_is_named(capsys):
    environment = {**os.environ, "SGSC_ISA": "foo"}
    command = [sys.executable, "-m", "sgsc", "bench", "--op", "pack", "--budget", "0.001"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if extension.LOADED:
        assert done.returncode == 2
        assert done.stderr.startswith("sgsc bench: SGSC_ISA=foo: this machine runs scalar")


def test_a_share_may_be_typed_in_hundredths():
    parser = argparse.ArgumentParser()
    add_settings(parser, CompressionConfig)
    assert parser.parse_args(["--target-size", "5%"]).target_size == 0.05


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"sgsc {sgsc.__version__}\n"


def test_every_command_has_json_and_help(capsys):
    for command in ("compress", "certify", "inspect", "verify", "report", "bench"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([command, "--help"])
        assert "--json" in capsys.readouterr().out


# resume


class Stop:
    """Progress that ends the run, as Ctrl-C does, after a step of the compression."""

    def __init__(self, at):
        self.at = at

    def __call__(self, phase, step, steps, values):
        if phase == "compression" and step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [6, 11])
def test_an_interrupted_run_goes_on_to_the_same_file_byte_for_byte(at, run, quick, tmp_path, capsys, monkeypatch):
    """A checkpoint after 6 of 12 steps. Stopped right there, when widths still fall, and near the end."""
    command = ["compress", "digits", *REACHED, "--json", "--out"]
    whole, stopped = run[0], tmp_path / "stopped"
    report = json.loads((whole / "report.json").read_text())
    monkeypatch.setattr(job, "CHECKPOINT_EVERY", 2)
    with monkeypatch.context() as patch:
        patch.setattr(cli.Progress, "__call__", lambda self, *values: Stop(at)(*values))
        assert main([*command, str(stopped)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.name for path in stopped.iterdir()} == {
        *("checkpoint.safetensors", "float.safetensors", "preservation.safetensors")
    }
    torch.manual_seed(at)  # nothing may hang on the process's own generator
    monkeypatch.setattr(job, "train", lambda *args, **how: pytest.fail("trained the float network again"))
    assert main([*command, str(stopped), "--resume"]) == 0
    resumed = document(capsys.readouterr().out)
    for name in ("model.sgsc", "float.safetensors", "preservation.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in stopped.iterdir()} == FILES
    for key in ("history", "events", "layers", "packed_accuracy", "guard", "preservation"):
        assert resumed[key] == report[key], key
    judged = [row for row in report["history"] if "accuracy" in row]
    assert judged == [row for row in report["history"] if "loss" in row]  # of the validation split, not of a batch
    assert report["history"][-1] in judged
    assert "task_loss" in report["history"][-1]


def test_a_run_that_ends_while_it_certifies_goes_on_from_its_last_checkpoint(run, quick, tmp_path, capsys, monkeypatch):
    command = ["compress", "digits", *REACHED, "--json", "--out", str(tmp_path)]
    monkeypatch.setattr(job, "CHECKPOINT_EVERY", 2)

    def stops(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_in_a_fresh_process", stops)
        assert main(command) == 130
    assert (tmp_path / "checkpoint.safetensors").is_file()
    capsys.readouterr()
    monkeypatch.setattr(job, "train", lambda *args, **how: pytest.fail("trained the float network again"))
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "model.sgsc").read_bytes() == (run[0] / "model.sgsc").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    with pytest.MonkeyPatch.context() as patch:
        shortened(patch)
        patch.setattr(job, "CHECKPOINT_EVERY", 1)
        patch.setattr(cli.Progress, "__call__", lambda self, *values: Stop(4)(*values))
        assert main(["compress", "digits", *REACHED, "--out", str(folder)]) == 130
    return folder


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--seed", "1"), "is of a run with another config"),
        (("--target-size", "0.3"), "is of a run with another config"),
        (("--samples", "13"), "is of a run with another samples"),
        (("--limit", "31"), "is of a run with another data"),
    ],
)
def test_a_checkpoint_of_another_run_is_not_resumed(interrupted, more, message, quick, tmp_path, capsys):
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["compress", "digits", *REACHED, *more, "--out", str(folder), "--resume"]) == 2
    assert message in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-5])


def other_tree(folder):
    save_checkpoint(folder / "checkpoint.safetensors", [1, 2])


def no_settings(folder):
    tree = load_checkpoint(folder / "checkpoint.safetensors")
    save_checkpoint(folder / "checkpoint.safetensors", {k: v for k, v in tree.items() if k != "settings"})


def other_network(folder):
    network = tasks.load("digits").build()
    import safetensors.torch

    state = network.state_dict()
    del state["head.bias"]
    safetensors.torch.save_file(state, folder / "float.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("checkpoint.safetensors"), "checkpoint.safetensors is not a whole checkpoint"),
        (cut("preservation.safetensors"), "preservation.safetensors is not a whole checkpoint"),
        (cut("float.safetensors"), "float.safetensors does not hold the float network of digits"),
        (other_network, "float.safetensors does not hold the float network of digits"),
        (other_tree, "is of a run with another config, task, samples, data"),
        (no_settings, "is of a run with another config, task, samples, data"),
        (lambda folder: (folder / "preservation.safetensors").unlink(), "no checkpoint at"),
    ],
)
def test_a_damaged_run_folder_is_not_resumed(interrupted, damage, message, quick, tmp_path, capsys):
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    damage(folder)
    assert main(["compress", "digits", *REACHED, "--out", str(folder), "--resume"]) == 2
    assert message in capsys.readouterr().err


def test_a_new_run_in_an_old_folder_takes_nothing_from_it(run, interrupted, quick, tmp_path, capsys):
    folder = Path(shutil.copytree(interrupted, tmp_path / "run"))
    cut("float.safetensors")(folder)
    assert main(["compress", "digits", *REACHED, "--out", str(folder), "--json"]) == 0
    assert (folder / "model.sgsc").read_bytes() == (run[0] / "model.sgsc").read_bytes()


# certify and report


def test_certify_says_the_same_again(run, capsys):
    report = json.loads((run[0] / "report.json").read_text())
    assert main(["certify", str(run[0]), "--json"]) == 0
    said = document(capsys.readouterr().out)
    for key in ("packed_accuracy", "guard", "preservation", "sha256", "statement"):
        assert said[key] == report[key], key
    assert main(["certify", str(run[0])]) == 0
    assert capsys.readouterr().out.strip() == report["statement"]


@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (cut("model.sgsc"), 1, "model.sgsc: "),
        (cut("float.safetensors"), 2, "float.safetensors does not hold"),
        (cut("preservation.safetensors"), 2, "is not a whole checkpoint"),
        (cut("report.json"), 2, "report.json is no report: it is not JSON"),
        (lambda folder: (folder / "report.json").write_text("[]"), 2, "report.json is no report: it is not a JSON obj"),
        (lambda folder: (folder / "report.json").write_text('{"seed": 0}'), 2, "report.json lacks task, tolerance"),
        (lambda folder: (folder / "report.json").write_bytes(b"\xff"), 2, "report.json is no report"),
        (lambda folder: (folder / "model.sgsc").unlink(), 2, "No such file"),
    ],
)
def test_certify_refuses_a_damaged_folder(damage, code, message, copied, capsys):
    damage(copied)
    assert main(["certify", str(copied), "--json"]) == code
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""


@pytest.mark.parametrize(
    ("said", "told"), [("trace\nsgsc certify: why\n", "sgsc certify: why"), ("", "it printed nothing")]
)
def test_a_certification_that_fails_is_told(said, told, monkeypatch, tmp_path):
    monkeypatch.setattr(cli.subprocess, "run", lambda command, **how: subprocess.CompletedProcess(command, 2, "", said))
    with pytest.raises(OSError, match=f"could not be certified in a fresh process: {told}$"):
        cli._in_a_fresh_process(tmp_path)


def test_report_writes_the_page_again(copied, capsys):
    page = (copied / "report.html").read_bytes()
    (copied / "report.html").unlink()
    assert main(["report", str(copied), "--json"]) == 0
    assert document(capsys.readouterr().out) == {"file": str(copied / "report.html")}
    assert (copied / "report.html").read_bytes() == page
    assert main(["report", str(copied)]) == 0
    assert capsys.readouterr().out == f"wrote {copied / 'report.html'}\n"


# inspect and verify


def test_inspect_and_verify_a_whole_file(run, capsys):
    path, report = run[0] / "model.sgsc", json.loads((run[0] / "report.json").read_text())
    assert main(["verify", str(path), "--json"]) == 0
    size = path.stat().st_size
    said = document(capsys.readouterr().out)
    assert said == {"file": str(path), "ok": True, "bytes": size, "sha256": report["sha256"]}
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"model.sgsc: whole, {size:,} bytes, 6 packed layers\n"
    assert main(["inspect", str(path), "--json"]) == 0
    said = document(capsys.readouterr().out)
    assert said["bytes"] == size
    assert said["architecture"] == ["digits-cnn", {}]
    assert said["notes"]["task"] == "digits"
    assert [row["name"] for row in said["layers"]] == [row["name"] for row in report["layers"]]
    for row, reported in zip(said["layers"], report["layers"], strict=True):
        rows = sum(row["bits"].values())
        assert rows == row["shape"][0]
        assert row["mean_bits"] == pytest.approx(sum(int(b) * n for b, n in row["bits"].items()) / rows)
        assert rows + reported["removed"] - row["bits"].get("0", 0) == reported["channels"]
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(row["name"] in out for row in said["layers"])
    assert "digits-cnn" in out


def test_inspect_shows_the_grids_of_inputs(tmp_path, capsys):
    model = prepare(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))).model
    model[1].input_quantizer = StaticInput(0.0125, -37, 218)
    save(pack(model), tmp_path / "a.sgsc")
    assert main(["inspect", str(tmp_path / "a.sgsc"), "--json"]) == 0
    said = document(capsys.readouterr().out)
    assert said["format"] == 2
    scale = pytest.approx(0.0125)
    assert [row["input"] for row in said["layers"]] == [None, {"scale": scale, "code_min": -37, "code_max": 218}]
    assert main(["inspect", str(tmp_path / "a.sgsc")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "format 2" in out
    assert "-37..218" in out
    assert "float" in out


@pytest.mark.parametrize("command", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cut short"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "the file is damaged"),
        (lambda data: b"", "cut short"),
        (lambda data: b"\x80\x04" + data, "over the limit"),
    ],
)
def test_a_damaged_file_is_exit_code_1_with_the_part_named(command, damage, message, run, tmp_path, capsys):
    path = tmp_path / "bad.sgsc"
    path.write_bytes(damage((run[0] / "model.sgsc").read_bytes()))
    assert main([command, str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sgsc {command}: bad.sgsc: ")
    assert message in err
    assert main([command, str(path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert message in err
    if command == "verify":
        said = document(out)
        assert (said["ok"], said["file"]) == (False, str(path))
        assert message in said["reason"]
    else:
        assert out == ""


HOSTILE = "[/bold]\x1b[31m\ud800\r[link=file:///etc]x[/link]"


def test_names_and_notes_of_a_file_neither_steer_the_terminal_nor_stop_it(tmp_path, capsys):
    model = torch.nn.Sequential()
    model.add_module("[/bold]\x1b[31m\ud800", torch.nn.Linear(2, 2))
    path = tmp_path / "odd.sgsc"
    save(pack(prepare(model).model), path, architecture=(HOSTILE, {HOSTILE: 1}), notes={"a": HOSTILE})
    for command in ("inspect", "verify"):
        assert main([command, str(path)]) == 0
        out = capsys.readouterr().out
        assert "\x1b[31m" not in out
        assert "\r" not in out
        assert command == "verify" or "[/bold]" in out
        assert main([command, str(path), "--json"]) == 0
        said = document(capsys.readouterr().out)
    path.write_bytes(path.read_bytes().replace(b"Linear", b"Li[/b]"))
    assert main(["inspect", str(path)]) == 1
    assert "\x1b" not in capsys.readouterr().err
    assert said["ok"]


# bench

CLAIM = {"claim": "fast", "target": 2.0, "measured": 1.5, "unit": "x", "command": "c", "commit": "d"}


@pytest.mark.parametrize(("holds", "code"), [(True, 0), (False, 1)])
def test_claims_that_do_not_hold_are_printed_with_exit_code_1(holds, code, tmp_path, capsys):
    (tmp_path / "cpu_kernels.json").write_text(json.dumps({"rows": [], "claims": [CLAIM | {"holds": holds}]}))
    assert main(["bench", "--claims", "--results", str(tmp_path)]) == code
    assert capsys.readouterr().out == ("" if holds else "cpu_kernels.json: fast: 1.5 against 2.0 x\n")
    assert main(["bench", "--claims", "--results", str(tmp_path), "--json"]) == code
    said = document(capsys.readouterr().out)
    assert said == ([] if holds else [{"file": "cpu_kernels.json", **CLAIM, "holds": False}])


def test_a_malformed_result_file_is_exit_code_2(tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"claims": [{"holds": false}]}')
    assert main(["bench", "--claims", "--results", str(tmp_path)]) == 2
    assert "a.json: a claim needs" in capsys.readouterr().err


def test_bench_prints_a_table_or_rows(monkeypatch, capsys):
    rows = [
        {
            **{"op": "packed_linear", "case": "a", "backend": "cpu", "microseconds": 1.0, "gigabytes_per_second": 2.0},
            **{"share_of_copy": 0.5, "gigaoperations_per_second": 3.0},
        }
    ]
    monkeypatch.setattr("sgsc.measure.measure_ops", lambda only, budget: rows)
    assert main(["bench"]) == 0
    out = capsys.readouterr().out
    assert "packed_linear" in out
    assert "50%" in out
    assert main(["bench", "--json"]) == 0
    assert document(capsys.readouterr().out) == rows
