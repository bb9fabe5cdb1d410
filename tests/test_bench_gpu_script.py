"""The checks on a device, sections that break or run out of time, and the script that calls them all."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there is nothing to bench on a GPU")

from bench import gpu, gpu_check, gpu_conv2d, gpu_device, gpu_linear, record
from tests.gpu_runs import a_run, of_section
from tests.kernels import test_gpu

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_every_check_of_the_device_is_a_job():
    jobs = gpu_check.jobs()
    for name in gpu_check.ON_DEVICE:
        own = [title for title in jobs if title.split(", part")[0] == name]
        assert len(own) in (1, gpu_check.PARTS)
    assert {"forward", "backward", "many", "rounding"} < set(gpu_check.ON_DEVICE)
    assert any("packed-linear, part 1 of" in title for title in jobs)
    assert "removed-rows-are-not-read" not in gpu_check.ON_DEVICE  # it would end the process
    assert [title for title in jobs if title.startswith("compile")]
    more = [title.split(", ")[1] for title in jobs if title.startswith("test_gpu.py")]
    assert more == [name for name in vars(test_gpu) if name.startswith("test_")]
    assert list(jobs).index(f"test_gpu.py, {more[-1]}") < list(jobs).index("compile a chain, 1 of 1")


def test_parts_of_a_check_are_the_whole(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu_check.packed, "assert_agrees", lambda op, arguments, name: seen.append(name))
    device = gpu_device.Interpreted()
    with contextlib.ExitStack() as after:
        after.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        gpu_check.CHECKS["packed-conv2d"]()
        whole, seen[:] = list(seen), []
        for part in range(3):
            gpu_check.run_one("packed-conv2d", part, 3, device)
    assert sorted(seen) == sorted(whole)
    assert len(set(whole)) == len(whole) > 5
    with pytest.raises(ValueError, match="no check 'other'; there are forward, backward"):
        gpu_check.run_one("other", 0, 1, device)


def test_checks_that_fail_or_do_not_end_do_not_hold():
    commands = {
        "good": [sys.executable, "-c", "print('fine')"],
        "bad": [sys.executable, "-c", "raise SystemExit('it\\nis wrong')"],
        "long": [sys.executable, "-c", "import time; time.sleep(60)"],
    }
    rows = gpu_check.run_all(commands, 5.0)
    assert [(row["check"], row["holds"]) for row in rows] == [("good", True), ("bad", False), ("long", False)]
    assert rows[0]["said"] == ""
    assert rows[1]["said"] == "it is wrong"
    assert rows[2]["said"].startswith("not done after")


@pytest.mark.parametrize("good", [True, False])
def test_a_check_that_fails_is_written_and_told(good, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "find", lambda quick: gpu_device.Interpreted())
    monkeypatch.setattr(
        gpu_check, "jobs", lambda: {"one": [sys.executable, "-c", f"raise SystemExit({int(not good)})"]}
    )
    assert gpu_check.main(["--results", str(tmp_path)]) == (0 if good else 1)
    rows, (claim,) = of_section(tmp_path, "checks")
    assert [row["holds"] for row in rows] == [claim["holds"]] == [good]
    assert ("one DOES NOT HOLD" in capsys.readouterr().err) is not good


@no_gpu
def test_a_check_runs_as_a_program():
    command = [sys.executable, "-m", "bench.gpu_check", "packed-large-floats"]
    everything = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=False, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr


def test_a_section_that_breaks_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    def breaks(run):
        run.put([{"n": 1}], [])
        raise RuntimeError("out of memory")

    def is_wrong(run):
        run.wrong.append("one")
        run.put([{"n": 2}], [])

    monkeypatch.setattr(gpu, "find", lambda quick: gpu_device.Interpreted())
    monkeypatch.setattr(
        gpu, "SECTIONS", {"a": (breaks, 1.0), "b": (is_wrong, 1.0), "c": (lambda run: run.put([{"n": 3}], []), 1.0)}
    )
    monkeypatch.setattr(gpu, "APART", {})
    arguments = ["--quick", "--results", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert [row["n"] for row in record.read("gpu_kernels", tmp_path)["rows"]] == [1, 2, 3]
    said = capsys.readouterr().err
    assert "a broke:" in said
    assert "WRONG, and not timed: one" in said
    assert gpu.main([*arguments, "--only", "c"]) == 0
    assert gpu.main([*arguments, "--only", "b"]) == 1


def test_a_section_ends_with_its_time(capsys):
    for measure in (gpu_linear.measure, gpu_conv2d.measure):
        written = []
        run = a_run()
        run.left, run.put = (lambda: -1.0), lambda *a, w=written: w.append(a)
        measure(run)
        assert written == []
    assert "linear: no time left for ('32x256', 1, (3, 4, 'mixed'))" in capsys.readouterr().err


# ---- the script ----


@pytest.mark.parametrize("out", [True, False])
def test_the_script_runs_everything_and_says_what_failed(out, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    fake = folder / "python3"
    fake.write_text(f'#!/bin/sh\necho "$PYTHONPATH $*" >>{log}\ncase "$*" in *training*) exit 3 ;; esac\n')
    fake.chmod(0o755)
    everything = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": "/site"}
    everything.pop("OUT", None)
    results = "bench/results"
    if out:
        results = everything["OUT"] = str(tmp_path / "out")
    command = ["bash", str(ROOT / "bench/gpu.sh")]
    assert subprocess.run(command, check=False, env=everything, cwd=tmp_path).returncode == 1
    expected = [f".:/site -m bench.gpu_check --results {results}"]
    expected += [f".:/site -m bench.gpu --only {section} --results {results}" for section in gpu.SECTIONS]
    assert log.read_text().splitlines() == expected
    log.unlink()
    assert subprocess.run([*command, "linear", "checks"], check=False, env=everything, cwd=tmp_path).returncode == 0
    assert log.read_text().splitlines() == [expected[2], expected[0]]


@pytest.fixture
def timeout(tmp_path):
    """The log of a program `timeout` that runs nothing, and an environment in which it is found first."""
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    fake = folder / "timeout"
    fake.write_text(f'#!/bin/sh\necho "$*" >>{log}\n')
    fake.chmod(0o755)
    return log, {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


def test_the_checks_alone_have_nearly_all_of_the_time(timeout, tmp_path):
    log, found = timeout[0], {**timeout[1], "OUT": "/o"}
    for sections, most in (["checks"], 530), (["checks", "linear"], 190):
        command = ["bash", str(ROOT / "bench/gpu.sh"), *sections]
        assert subprocess.run(command, check=False, env=found, cwd=tmp_path).returncode == 0
        first = log.read_text().splitlines()[-len(sections)].split()
        assert first[3:6] == ["python3", "-m", "bench.gpu_check"]
        assert most - 10 <= int(first[2]) <= most
        if len(sections) == 1:
            assert first[6] == "--seconds"
            assert int(first[7]) == int(first[2]) - 15
        else:
            assert first[6:] == ["--results", "/o"]


@pytest.mark.parametrize("section", ["cifar10", "resnet20", "strategies-vdsr", "strategies-qat", "search-resnet20"])
def test_a_task_is_a_call_of_its_own_with_nearly_all_of_the_time(section, tmp_path):
    """It is among no other call's sections, and ends itself before it would be ended."""
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    for name, said in (("python3", "$*"), ("timeout", "limit $3")):
        fake = folder / name
        fake.write_text(f'#!/bin/sh\necho "{said}" >>{log}\n[ "$0" = {folder}/python3 ] || {{ shift 3; exec "$@"; }}\n')
        fake.chmod(0o755)
    found = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(tmp_path / "out"), "DATA": "/d"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), section]
    assert subprocess.run(command, check=False, env=found, cwd=tmp_path).returncode == 0
    limit, called = log.read_text().splitlines()
    bench = section.split("-")[0] if "-" in section else "sgsc"
    told = re.fullmatch(
        rf"-m bench\.{bench} {section} --device cuda --seconds (\d+) --data /d --results {tmp_path}/out", called
    )
    assert told is not None
    assert 450 <= int(told[1]) <= int(limit.split()[1]) - 10 <= 530
    assert section not in (ROOT / "bench/gpu.sh").read_text().split("set -- ")[1].splitlines()[0]


def test_what_is_apart_has_a_call_of_its_own(timeout, tmp_path):
    log, found = timeout[0], {**timeout[1], "OUT": str(tmp_path / "out")}
    for section, (_, budget) in gpu.APART.items():
        command = ["bash", str(ROOT / "bench/gpu.sh"), section]
        assert subprocess.run(command, check=False, env=found, cwd=tmp_path).returncode == 0
        _, _, limit, *called = log.read_text().splitlines()[-1].split()
        assert called == f"python3 -m bench.gpu --only {section} --results {tmp_path / 'out'}".split()
        assert int(limit) >= budget + 20


def test_the_budgets_fit_into_nine_minutes():
    assert all(budget + 10.0 <= 530 for _, budget in gpu.APART.values())
    start = 10.0  # of a process, before its section begins
    budgets = [gpu_check.SECONDS, *(budget for _, budget in gpu.SECTIONS.values())]
    assert sum(budgets) + start * len(budgets) <= 540
    script = (ROOT / "bench/gpu.sh").read_text()
    limits = dict(re.findall(r"\b(all|each)=(\d+)", script))
    assert int(limits["all"]) <= 540
    assert max(budgets) < int(limits["each"])
