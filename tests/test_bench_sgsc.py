"""The bench of real tasks, on next to nothing: what it runs, that it goes on, what it claims and how that is shown."""

import contextlib
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import claims, readme, record, runs, sgsc, sgsc_claims, sgsc_peers, sgsc_tables, uniform
from sgsc import cli, report
from sgsc.certificate import allowed
from sgsc.demos import job, jpeg, load
from sgsc.guard import Check
from tests.test_demos import write_mnist
from tests.test_demos_cifar import plays, write_cifar

SECTION = "<!-- tables: sgsc -->\n<!-- end -->\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tiny sets of every task."""
    folder = tmp_path_factory.mktemp("data")
    make = np.random.default_rng(0)
    names = "".join("".join(make.choice(list("abcdefgh"), 6)) + "\n" for _ in range(2500))
    (folder / "names.txt").write_text(names)
    (folder / "tinyshakespeare.txt").write_text(plays())
    write_cifar(folder)
    write_mnist(folder, x_train=make.integers(0, 256, (60_000, 28, 28), np.uint8))
    return folder


@pytest.fixture
def commit(monkeypatch):
    """Sets the commit that all of the bench believes to be at."""

    def at(name):
        for module in (runs, record):
            monkeypatch.setattr(module, "environment", lambda: {"machine": "here", "commit": name})

    at("abc")
    return at


@pytest.fixture
def bench(tmp_path, monkeypatch, data, commit):
    """Runs sections with processes replaced by calls; returns the commands that were called."""
    commands = []
    mains = {"sgsc": cli.main, "bench.uniform": uniform.main, "bench.sgsc_peers": sgsc_peers.main}
    monkeypatch.setattr(jpeg.tempfile, "tempdir", str(tmp_path))

    def call(command, seconds=None, codes=(0,)):
        commands.append(command)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = mains[command[2]](command[3:])
        assert code in codes, err.getvalue()
        return json.loads(out.getvalue())

    def certify(folder):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            cli.main(["certify", str(folder), "--json"])
        return json.loads(out.getvalue())

    monkeypatch.setattr(cli, "_in_a_fresh_process", certify)
    monkeypatch.setattr(report, "write_html", lambda *a: None)  # plots take longer than these runs
    for module in (runs, sgsc_peers):
        monkeypatch.setattr(module, "called", call)

    def run(*arguments):
        commands.clear()
        fixed = ("--quick", "--results", str(tmp_path), "--data", str(data), "--work", str(tmp_path / "work"))
        assert sgsc.main([*arguments, *fixed]) == 0
        return list(commands)

    run.folder, run.data = tmp_path, data
    return run


def rows_of(bench, section):
    return [row for row in record.read("sgsc", bench.folder)["rows"] if row["section"] == section]


# ---- sections ----


def test_targets_over_seeds_share_the_float_network_of_a_seed(bench):
    ran = bench("names", "--targets", "0.6,0.5", "--seeds", "2")
    assert [c[2:6] for c in ran] == [["sgsc", "compress", "names", "--target-size"]] * 4
    assert ["--start" in c for c in ran] == [False, False, True, True]
    rows = rows_of(bench, "names")
    assert [(r["method"], r["target_size"], r["seed"]) for r in rows] == [
        *(("sgsc", 0.6, 0), ("sgsc", 0.6, 1), ("sgsc", 0.5, 0), ("sgsc", 0.5, 1))
    ]
    for row in rows:
        assert (row["schedule"], row["steps"], row["task"], row["commit"]) == ("quick", 2, "names", "abc")
        assert row["stored_ratio"] == row["stored_bytes"] / row["float_bytes"]
        assert row["tail"].keys() >= {"samples", "share"}
        assert "device" not in row  # a CPU: the machine says it
    losses = {row["seed"]: set() for row in rows}
    for row in rows:
        losses[row["seed"]].add(row["float_loss"])
    assert [len(found) for found in losses.values()] == [1, 1]
    assert losses[0] != losses[1]
    assert list((bench.folder / "work").glob("names-*-abc.safetensors"))


def test_what_is_there_is_not_measured_again_unless_the_code_is_another(bench, commit):
    wanted = ("names", "--targets", "0.6")
    assert len(bench(*wanted)) == 1
    assert bench(*wanted) == []
    assert len(bench("names", "--targets", "0.6,0.5")) == 1
    commit("def")
    assert len(bench(*wanted)) == 1
    assert [(r["target_size"], r["commit"]) for r in rows_of(bench, "names")] == [(0.5, "abc"), (0.6, "def")]
    for unnamed in ("def-dirty", "def-dirty", "unknown", "unknown"):
        commit(unnamed)
        assert len(bench(*wanted)) == 1
        assert len(rows_of(bench, "names")) == 2
    assert not list((bench.folder / "work").glob("*dirty*")), "a float network of unnamed code is not kept"


def test_a_schedule_replaces_no_row_of_another(bench):
    bench("names", "--targets", "0.6")
    (row,) = rows_of(bench, "names")
    full = {**row, "schedule": "full", "packed_loss": 1.0}
    record.write("sgsc", "names", [full, {**row, "device": "a GPU"}], [], "x", bench.folder)
    assert len(bench("names", "--targets", "0.6")) == 1
    assert [r["schedule"] for r in rows_of(bench, "names")] == ["full", "quick", "quick"]
    assert [r.get("device") for r in rows_of(bench, "names")] == [None, "a GPU", None]


def test_a_section_that_was_cut_off_goes_on(bench, monkeypatch, capsys):
    real, left = runs.called, [2]

    def called(*arguments, **more):
        left[0] -= 1
        if left[0] < 0:
            raise runs.OutOfTime
        return real(*arguments, **more)

    monkeypatch.setattr(runs, "called", called)
    wanted = ("names", "cifar10", "--targets", "0.6", "--seeds", "3")
    bench(*wanted)
    assert "names: time is up with 2 rows measured; repeat the call to go on" in capsys.readouterr().err
    assert [row["seed"] for row in rows_of(bench, "names")] == [0, 1]
    assert rows_of(bench, "cifar10") == []
    monkeypatch.setattr(runs, "called", real)
    assert len(bench("names", "--targets", "0.6", "--seeds", "3")) == 1


def test_what_would_not_end_in_time_is_not_begun_unless_it_can_go_on_later(bench, monkeypatch, capsys):
    monkeypatch.setitem(sgsc.UNIFORM, "shakespeare", (3,))
    monkeypatch.setattr(sgsc_peers, "LIBRARIES", {})
    assert [c[2] for c in bench("shakespeare")] == ["bench.uniform", "sgsc"]
    point, mine = ({**row, "seconds": 1000.0} for row in rows_of(bench, "shakespeare"))
    record.write("sgsc", "shakespeare", [point, mine], [], "x", bench.folder)
    assert bench("shakespeare", "--seeds", "2", "--seconds", "500") == []  # uniform training cannot go on
    assert "time is up with 2 rows measured" in capsys.readouterr().err
    record.write("sgsc", "shakespeare", [point], [], "x", bench.folder)
    assert [c[2] for c in bench("shakespeare", "--seconds", "500")] == ["sgsc"]


def test_a_run_whose_time_is_up_goes_on_where_it_was(bench, monkeypatch):
    real, folders = runs.called, []

    def cut(command, *_, **__):
        folders.append(Path(command[command.index("--out") + 1]))
        folders[0].mkdir(parents=True, exist_ok=True)
        for name in (job.FLOAT, job.CHECKPOINT):
            (folders[0] / name).write_bytes(b"")
        raise runs.OutOfTime

    monkeypatch.setattr(runs, "called", cut)
    bench("names", "--targets", "0.6")
    assert rows_of(bench, "names") == []
    assert list((bench.folder / "work").glob("names-0-*.safetensors"))  # for the other runs of the seed

    def checked(command, seconds=None, codes=(0,)):
        assert command.pop() == "--resume"
        assert folders[0] == Path(command[command.index("--out") + 1])
        del command[command.index("--start") : command.index("--start") + 2]
        return real(command, seconds, codes)

    monkeypatch.setattr(runs, "called", checked)
    bench("names", "--targets", "0.6")
    (row,) = rows_of(bench, "names")
    assert row["resumed"]  # its seconds count for nothing
    assert not folders[0].exists()
    (line,) = (n for n in readme.filled(SECTION, bench.folder).splitlines() if n.startswith("| sgsc at 60 %"))
    assert line.endswith("|  |")


def test_what_a_call_is_too_short_for_is_named(bench, monkeypatch, capsys):
    def cut(command, *_, **__):
        raise runs.OutOfTime

    monkeypatch.setattr(runs, "called", cut)
    bench("shakespeare", "--seconds", "1000")
    said = capsys.readouterr().err
    assert re.search(r"shakespeare: shakespeare lsq4 0 did not end in (1000|999) s, and is lost; raise --seconds", said)
    assert "time is up" in said


def test_ours_gets_the_bytes_of_each_uniform_width(bench, monkeypatch):
    monkeypatch.setitem(sgsc.UNIFORM, "resnet20", (4, 3))
    ran = bench("resnet20", "--targets", "0.9")
    assert [c[2] for c in ran] == ["sgsc", *["bench.uniform", "sgsc"] * 2]
    rows = rows_of(bench, "resnet20")
    assert [row["method"] for row in rows] == ["sgsc", "lsq4", "sgsc", "lsq3", "sgsc"]
    for point, mine in zip(rows[1::2], rows[2::2], strict=True):
        assert mine["target_size"] == point["stored_ratio"]
        assert mine["against"] == point["method"]
        assert mine["float_accuracy"] == point["float_accuracy"]
        assert mine["steps"] == point["steps"] == 2
    assert rows[1]["stored_bytes"] > rows[3]["stored_bytes"]
    texts = [c["claim"] for c in record.read("sgsc", bench.folder)["claims"]]
    for bits in (4, 3):
        start = f"resnet20: ahead of uniform {bits}-bit training at no more bytes (quick schedule), mean of "
        assert any(text.startswith(start) for text in texts)
    assert any(text.startswith("resnet20, CIFAR-10 (JPEG q75), at 10 %: test accuracy lost") for text in texts)


def test_a_schedule_says_what_it_computes_in(bench, monkeypatch):
    monkeypatch.setattr(sgsc, "REDUCED", {"names": (1, 2, "bfloat16")})
    fixed = ("--reduced", "--results", str(bench.folder), "--data", str(bench.data), "--work", str(bench.folder / "w"))
    assert sgsc.main(["names", "--targets", "0.6", "--seeds", "1", *fixed]) == 0
    (row,) = rows_of(bench, "names")
    assert (row["schedule"], row["steps"], row["precision"]) == ("reduced", 2, "bfloat16")
    assert "| sgsc at 60 % | reduced, 2, bfloat16 | 1 |" in readme.filled(SECTION, bench.folder)


def test_shakespeare_runs(bench, monkeypatch):
    monkeypatch.setitem(sgsc.UNIFORM, "shakespeare", (3,))
    monkeypatch.setattr(sgsc_peers, "LIBRARIES", {})
    assert [c[2] for c in bench("shakespeare")] == ["bench.uniform", "sgsc"]
    assert [row["method"] for row in rows_of(bench, "shakespeare")] == ["lsq3", "sgsc"]


def test_more_and_fewer_steps_are_rows_of_their_own(bench, monkeypatch):
    monkeypatch.setattr(sgsc, "STEPS", (1, 2, 4))
    bench("steps", "--targets", "0.6")
    assert [(row["task"], row["steps"]) for row in rows_of(bench, "steps")] == [("digits", n) for n in (1, 2, 4)]
    *found, size = record.read("sgsc", bench.folder)["claims"]
    assert size["claim"].startswith("steps: stored size off its target, worst of 3 runs")
    assert [c["claim"].split(":")[1].split(",")[0] for c in found] == [
        *(f" test accuracy moved by {many} steps after {few}" for few, many in ((1, 2), (2, 4)))
    ]
    shown = readme.filled(SECTION, bench.folder)
    assert all(f"| sgsc at 60 % | quick, {n} |" in shown for n in (1, 2, 4))


def ablation_rows(fewer, seeds=5, **more):
    def row(method, seed, regressions):
        share = {"share": regressions / 1000}
        of = {"task": "mnist", "method": method, "seed": seed, "guard_regressions": regressions, "commit": "abc"}
        of |= {"tail": share, "worst_class": share, "target_size": 0.01, "schedule": "full", "stored_bytes": 1000}
        return {**of, **(more if method == "with" else {})}

    found = []
    for seed in range(seeds):
        found += [row("without", seed, 60 + seed % 2), row("with", seed, 60 - fewer)]
    return found


def test_the_set_must_buy_something_beyond_chance_at_equal_bytes():
    made = sgsc_claims.ablated(ablation_rows(9))
    assert [c["holds"] for c in made] == [True] * 3
    assert [c["measured"] for c in made] == pytest.approx([9.4, 0.0094, 0.0094])
    assert {c["commit"] for c in made} == {"abc"}
    for rows in (
        ablation_rows(0, guard_regressions=61),  # worse
        ablation_rows(9, seeds=4),
        ablation_rows(9, stored_bytes=1011),
        ablation_rows(9, commit="def")[:-1] + ablation_rows(9)[-1:],
        [row | {"guard_regressions": 60} for row in ablation_rows(9)],  # alike
        [
            row | {"guard_regressions": 60 - 40 * (row["seed"] == 1) * (row["method"] == "with")}
            for row in ablation_rows(9)
        ],
    ):
        assert not sgsc_claims.ablated(rows)[0]["holds"]


def test_a_chosen_set_must_buy_more_than_one_drawn_at_random():
    rows = ablation_rows(9)
    rows += [row | {"method": "random", "guard_regressions": 51} for row in rows if row["method"] == "with"]
    made = {c["claim"]: c["holds"] for c in sgsc_claims.ablated(rows)}
    assert len(made) == 6
    (text,) = (t for t in made if "guard regressions with a set drawn at random, less those with it" in t)
    assert made.pop(text) is False  # alike
    assert [held for text, held in made.items() if "without" in text] == [True] * 3


def test_a_size_off_its_target_counts_either_way_in_the_worst_run():
    def rows(*ratios, **more):
        return [{"schedule": "full", "target_size": 0.02, "stored_ratio": r, **more} for r in ratios]

    for ratios, held in (((0.02, 0.0199), True), ((0.02, 0.0203), False), ((0.0197, 0.02), False)):
        (claim,) = sgsc_claims.on_target(rows(*ratios), "x")
        assert claim["holds"] is held
    assert sgsc_claims.on_target(rows(0.01, against="lsq2"), "x") == []


def test_a_move_of_accuracy_counts_either_way():
    def rows(*accuracies):
        of = {"schedule": "full", "seed": 0, "target_size": 0.02, "accuracy_standard_error": 0.01}
        return [{**of, "steps": n, "packed_accuracy": a} for n, a in zip((1, 2), accuracies, strict=True)]

    for last, held in ((0.909, True), (0.891, True), (0.911, False), (0.889, False)):
        (claim,) = sgsc_claims.of_steps(rows(0.9, last), (1, 2), 1)
        assert claim["measured"] == pytest.approx(abs(last - 0.9))
        assert claim["holds"] is held
    (claim,) = sgsc_claims.of_steps(rows(0.9, 0.9), (1, 2), 2)
    assert not claim["holds"]  # one seed of two
    other = [row | {"target_size": 0.01} for row in rows(0.9, 0.8)]
    assert [c["holds"] for c in sgsc_claims.of_steps(rows(0.9, 0.9) + other, (1, 2), 1)] == [True, False]


def test_what_another_device_measured_is_claimed_apart():
    rows = [{"schedule": "full", "target_size": 0.02, "stored_ratio": 0.02}]
    rows += [{**rows[0], "stored_ratio": 0.03, "device": "a GPU"}]
    here, there = sgsc.of_devices("x", lambda own: [], rows)
    assert (here["measured"], here["claim"]) == (0, "x: stored size off its target, worst of 1 runs")
    assert there["claim"] == "x: stored size off its target, worst of 1 runs, on a GPU"


def test_each_form_of_the_grids_is_run_alike(bench, monkeypatch):
    ran = bench("quantizers", "--targets", "0.6")
    assert [c[c.index("--quantizer") + 1] for c in ran] == list(sgsc.FORMS)
    assert {row["target_size"] for row in rows_of(bench, "quantizers")} == {0.6}
    (first, *_) = (c["claim"] for c in record.read("sgsc", bench.folder)["claims"])
    assert first.startswith(f"digits at 60 %: ahead of {sgsc.FORMS[1]} grids")


def test_without_the_set_neither_loss_nor_guard_act_and_the_same_samples_are_compared(bench, monkeypatch):
    monkeypatch.setattr(sgsc, "ABLATED", {"names": 0.6})
    with_it, random, without = bench("ablation")
    at = random.index("--shares")
    assert random[at + 1] == "random=1"
    assert "--preservation-weight" not in random
    at = without.index("--preservation-weight")
    count = len(sgsc.WITHOUT)
    assert without[at : at + count] == list(sgsc.WITHOUT)
    assert not any(flag in with_it for flag in sgsc.WITHOUT[::2])
    others = without[:at] + without[at + count :]
    assert others[: others.index("--out")] == with_it[: with_it.index("--out")]
    assert others[others.index("--json") : -2] == with_it[with_it.index("--json") :]
    assert others[-2] == "--start"
    first, drawn, second = rows_of(bench, "ablation")
    methods = (first["method"], drawn["method"], second["method"])
    assert (*methods, second["tolerance"]) == ("with", "random", "without", 0.999)
    config = cli._parser().parse_args(without[3:])
    assert Check(9, allowed(config.tolerance, 10), 10, 0.99, config.margin_tolerance).held  # next to all may be lost
    for same in ("target_size", "steps", "seed", "preservation_samples", "guard_samples", "float_loss"):
        assert first[same] == second[same]


def test_libraries_that_are_not_there_are_named_and_ours_stays_below_the_others(bench, monkeypatch):
    def half(rows, bits, group):
        return rows.half().float(), 2 * rows.numel()

    def gone(rows, bits, group):
        import no_such_library  # noqa: F401

    libraries = {"half": (half, (0, 32)), "gone": (gone, (0,))}
    monkeypatch.setattr(sgsc_peers, "LIBRARIES", libraries)
    monkeypatch.setitem(sgsc.UNIFORM, "shakespeare", (3,))
    assert [c[2] for c in bench("shakespeare")] == ["bench.uniform", *["bench.sgsc_peers"] * 3, "sgsc"]
    point, row, group, missing, mine = rows_of(bench, "shakespeare")
    assert missing["missing"] == "ModuleNotFoundError: No module named 'no_such_library'"
    assert (row["group"], group["group"]) == (0, 32)
    assert row["stored_ratio"] == pytest.approx(0.5, abs=0.01)
    assert row["left_float"] == []
    assert abs(row["packed_loss"] - row["float_loss"]) < 1e-2
    assert mine["target_size"] == min(point["stored_ratio"], row["stored_ratio"])
    assert row["float_loss"] == point["float_loss"] == pytest.approx(mine["float_loss"])
    found = [c for c in record.read("sgsc", bench.folder)["claims"] if "ahead of" in c["claim"]]
    told = [c["claim"].partition(", at no more bytes")[0].removeprefix("shakespeare: ahead of ") for c in found]
    assert told[0].startswith("uniform 3-bit training at no more bytes")
    assert told[1:] == ["half, 3 bits, scale of a row", "half, 3 bits, scale of 32"]
    ours = {**mine, "stored_bytes": row["stored_bytes"]}
    for claim in sgsc_peers.peer_claims([row, group, missing, ours], 1):
        assert claim["measured"] == row["packed_loss"] - mine["packed_loss"]
    (first, _) = sgsc_peers.peer_claims([row, group, {**ours, "stored_bytes": row["stored_bytes"] + 1}], 1)
    assert first["measured"] is None  # more bytes are no lead
    assert [c[2:4] for c in bench("shakespeare")] == [["bench.sgsc_peers", "gone"]]  # it may be there by now
    shown = readme.filled(SECTION, bench.folder)
    assert "gone is missing: ModuleNotFoundError" in shown
    assert "| half, 3 bits, scale of 32 | quick | 1 |" in shown


def test_bytes_of_a_library_are_its_own_and_those_of_what_it_leaves():
    network = load("digits", limit=2).build()
    total = sum(4 * v.numel() for v in network.state_dict().values() if v.is_floating_point())
    weights = sum(m.weight.numel() for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))

    def refuses(rows, bits, group):
        if rows.shape[1] == 9:
            raise RuntimeError("no  rows\nof 9")
        seen.append((rows.shape[1], group))
        return 0 * rows, rows.numel() / 8 + 0.25

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sgsc_peers.LIBRARIES, "refuses", (refuses, (0,)))
        size, left = sgsc_peers.quantized(network, "refuses", 1, 32)
    assert left == ["stem.0: RuntimeError: no rows of 9", "depthwise.0: RuntimeError: no rows of 9"]
    served = weights - 9 * (32 + 128)
    assert size == -(-(total - 4 * served + served / 8 + 0.25 * 4) // 1)
    assert all(group == (32 if width % 32 == 0 else 0) for width, group in seen)
    assert (network.head.weight == 0).all()
    assert (network.stem[0].weight != 0).any()


# ---- processes ----


def test_a_process_is_ended_when_its_time_is_up_and_a_failed_one_is_shown(tmp_path):
    assert runs.called([sys.executable, "-c", "print('[1]')"]) == [1]
    with pytest.raises(runs.OutOfTime):
        runs.called([sys.executable, "-c", "import time; time.sleep(60)"], 0.5)
    pid = str(tmp_path / "pid")
    leaves = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({pid!r}, 'w').write(str(p.pid))"
    with pytest.raises(runs.OutOfTime):
        runs.called([sys.executable, "-c", f"{leaves}; p.wait()"], 5.0)

    def alive():
        try:
            return Path("/proc", Path(pid).read_text(), "stat").read_text().split()[2] != "Z"
        except OSError:  # it is gone
            return False

    deadline = time.monotonic() + 30  # a process that was killed still needs a moment of the machine to end
    while alive():
        assert time.monotonic() < deadline, "what it started is ended with it"
        time.sleep(0.05)
    with pytest.raises(SystemExit, match=r"failed: .*no such thing"):
        runs.called([sys.executable, "-c", "raise SystemExit('no such thing')"])


def test_a_run_in_a_process_of_its_own(data, tmp_path, commit):
    fixed = ("--quick", "--results", str(tmp_path), "--data", str(data), "--work", str(tmp_path / "work"))
    assert sgsc.main(["names", "--targets", "0.6", *fixed]) == 0
    (row,) = record.read("sgsc", tmp_path)["rows"]
    assert (row["method"], row["schedule"]) == ("sgsc", "quick")


def test_quick_and_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        sgsc.main(["mnist", "--quick"])
    assert "name another folder with --results" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        sgsc.main(["minst"])
    assert "no section is called 'minst'; there are mnist, names" in capsys.readouterr().err


# ---- claims ----


def made(task, seed=0, schedule="full", **more):
    row = {"task": task, "seed": seed, "schedule": schedule, "method": "sgsc", "steps": 3000, "target_size": 0.02}
    row |= {"stored_ratio": 0.0199, "float_accuracy": 0.9950, "packed_accuracy": 0.9945, "seconds": 90.0}
    row |= {"float_loss": 1.65, "packed_loss": 1.62, "accuracy_standard_error": 0.001, "stored_bytes": 100}
    row |= {"guard_regressions": 2, "guard_samples": 5000, "guard_upper_bound_95": 0.002}
    return row | {"preservation_regressions": 1, "float_seconds": 30.0} | more


def test_the_default_form_of_the_grids_may_be_behind_by_no_standard_error_at_any_size():
    def held(*leads):
        of = {"schedule": "full", "task": "digits", "commit": "abc", "accuracy_standard_error": 0.006}
        rows = []
        for size, by_seed in zip((0.02, 0.01), leads, strict=False):
            for seed, by in enumerate(by_seed):
                at = {**of, "target_size": size, "seed": seed}
                rows += [
                    {**at, "method": "b", "packed_accuracy": 0.98},
                    {**at, "method": "a", "packed_accuracy": 0.98 + by},
                ]
        return [claim["holds"] for claim in sgsc_claims.default_form(rows, ("a", "b"), 3)]

    assert held((0.01, 0.0, -0.02), (-0.02, -0.02, -0.02)) == [True, False]
    assert held((0.01, 0.02)) == [False]  # of three seeds


def test_a_mean_over_too_few_seeds_does_not_hold():
    rows = [made("mnist", seed) for seed in range(5)]
    two, one = sgsc_claims.mnist_claims(rows)
    assert (two["claim"], two["holds"]) == ("mnist at 2 %: test accuracy, mean of 5 seeds", True)
    assert (one["measured"], one["holds"]) == (None, False)
    few = sgsc_claims.mnist_claims(rows[:4])[0]
    assert (few["claim"], few["holds"]) == ("mnist at 2 %: test accuracy, mean of 4 of 5 seeds", False)
    rows[0]["packed_accuracy"] = 0.98
    assert not sgsc_claims.mnist_claims(rows)[0]["holds"]


def test_a_reduced_schedule_is_never_counted_with_the_full_one():
    rows = [made("mnist", seed, packed_accuracy=0.1) for seed in range(5)]
    rows += [made("mnist", seed, "reduced") for seed in range(5)]
    full, _, reduced, _ = sgsc_claims.mnist_claims(rows)
    assert (full["claim"], full["measured"]) == ("mnist at 2 %: test accuracy, mean of 5 seeds", pytest.approx(0.1))
    assert reduced["claim"] == "mnist at 2 %: test accuracy (reduced schedule), mean of 5 seeds"
    assert (full["holds"], reduced["holds"]) == (False, True)


def test_names_has_a_loss_to_reach_and_its_own_float_network():
    at_ten = [made("names", seed, target_size=0.1) for seed in range(5)]
    at_twenty = [made("names", seed, target_size=0.2, packed_loss=1.66) for seed in range(5)]
    reach, worse = sgsc_claims.loss_claims(at_ten + at_twenty)
    assert (reach["target"], reach["measured"], reach["holds"]) == (1.626, pytest.approx(1.62), True)
    assert (worse["measured"], worse["holds"]) == (pytest.approx(0.01), False)
    assert sgsc_claims.loss_claims([r | {"packed_loss": 1.65} for r in at_twenty])[1]["holds"]


def test_accuracy_may_be_lost_up_to_one_standard_error():
    rows = [made("cifar10", seed, target_size=0.025, packed_accuracy=0.9941) for seed in range(3)]
    (claim,) = sgsc_claims.near_float(rows, "cifar10", 0.025, 3)
    assert claim["claim"] == "cifar10, CIFAR-10 (JPEG q75), at 2.5 %: test accuracy lost, mean of 3 seeds"
    assert (claim["target"], claim["holds"]) == (0.001, True)
    (claim,) = sgsc_claims.near_float([r | {"packed_accuracy": 0.9939} for r in rows], "cifar10", 0.025, 3)
    assert not claim["holds"]


@pytest.mark.parametrize(
    ("task", "key", "better"), [("resnet20", "packed_accuracy", 1), ("shakespeare", "packed_loss", -1)]
)
def test_ahead_means_more_accuracy_or_less_loss_at_no_more_bytes(task, key, better):
    points = [made(task, seed, method="lsq3", **{key: 0.9}) for seed in range(3)]
    ours = [made(task, seed, against="lsq3", **{key: 0.9 + better * (0.009 + seed / 1000)}) for seed in range(3)]
    (claim,) = sgsc_claims.ahead(points + ours, 3)
    assert claim["measured"] == pytest.approx(0.01)
    assert claim["holds"]
    for leads in ((0.02, -0.01, -0.0099), (0.0, 0.0, 0.0)):  # by chance, or not at all
        lucky = [row | {key: 0.9 + better * of} for row, of in zip(ours, leads, strict=True)]
        assert not sgsc_claims.ahead(points + lucky, 3)[0]["holds"]
    behind = [row | {key: 0.9 - better * 0.01} for row in ours]
    assert not sgsc_claims.ahead(points + behind, 3)[0]["holds"]
    larger = [ours[0] | {"stored_bytes": 101}, *ours[1:]]
    (claim,) = sgsc_claims.ahead(points + larger, 3)
    assert (claim["holds"], claim["claim"].endswith("mean of 2 of 3 seeds")) == (False, True)


# ---- the README ----


def shown(tmp_path, section, rows):
    record.write("sgsc", section, rows, [], "x", tmp_path)
    return readme.filled(SECTION, tmp_path)


def test_schedules_have_lines_of_their_own_and_the_full_one_comes_first(tmp_path):
    rows = [made("mnist", 0, "reduced", steps=1000, packed_accuracy=0.98)]
    rows += [made("mnist", seed, packed_accuracy=0.994 + seed / 1000) for seed in range(2)]
    text = shown(tmp_path, "mnist", rows)
    end = "± 0.10 | 2 of 5000 | 0.2 | 60 |\n"
    full = f"| sgsc at 2 % | full, 3,000 | 2 | 1.99 | 99.50 | 99.45 (99.40 to 99.50) | -0.05 {end}"
    reduced = f"| sgsc at 2 % | reduced, 1,000 | 1 | 1.99 | 99.50 | 98.00 | -1.50 {end}"
    assert full in text
    assert reduced in text
    assert text.index(full) < text.index(reduced)


def test_text_is_judged_by_its_loss_and_uniform_training_has_no_certificate(tmp_path):
    point = {k: v for k, v in made("shakespeare", method="lsq3", packed_loss=1.7).items() if "guard" not in k}
    point = {k: v for k, v in point.items() if k not in ("accuracy_standard_error", "float_seconds")}
    ours = [made("shakespeare", seed, against="lsq3", target_size=0.1 + seed / 100) for seed in range(2)]
    text = shown(tmp_path, "shakespeare", [point, *ours])
    assert (
        "| method | schedule, steps | seeds | stored, % of float32 bytes | float test loss | stored test loss |" in text
    )
    assert "| uniform 3-bit training | full, 3,000 | 1 | 1.99 | 1.6500 | 1.7000 | +0.0500 |  |  | 90 |\n" in text
    line = "| sgsc, bytes of 3 bits | full, 3,000 | 2 | 1.99 | 1.6500 | 1.6200 | -0.0300 | 2 of 5000 | 0.2 | 60 |\n"
    assert line in text


def test_photographs_are_named_as_what_they_are(tmp_path):
    assert "CIFAR-10 (JPEG q75)." in shown(tmp_path, "cifar10", [made("cifar10")])


def test_the_ablation_shows_the_worst_class_and_the_hard_tail(tmp_path):
    rows = [made("mnist", method="with", tail={"share": 0.05}, worst_class={"name": "3", "share": 0.02})]
    rows += [made("mnist", method="without")]
    text = shown(tmp_path, "ablation", rows)
    start = "| mnist | with the set | full, 3,000 | 1 | 1.99 | -0.05 ± 0.10 | 2 of 5000 | 0.2 |"
    assert f"{start} 2.0 | 5.0 | 1 |\n" in text
    assert f"{start.replace('with', 'without')}  |  | 1 |\n" in text


def test_a_row_keeps_the_stamp_that_it_has(tmp_path, commit):
    record.write("sgsc", "a", [{"n": 1}], [], "x", tmp_path)
    commit("def")
    kept = record.read("sgsc", tmp_path)["rows"]
    record.write("sgsc", "a", [*kept, {"n": 2}], [record.claim("c", 1, 1, "s", holds=True)], "x", tmp_path)
    found = record.read("sgsc", tmp_path)
    assert [(row["n"], row["commit"]) for row in found["rows"]] == [(1, "abc"), (2, "def")]
    assert found["claims"][0]["commit"] == "def"
    assert claims.main(["--results", str(tmp_path)]) == 0


def test_a_network_that_learned_the_float_answers_is_said_to_be_distilled():
    row = {"schedule": "reduced", "steps": 500, "precision": "bfloat16", "distilled": True}
    assert sgsc_tables.steps([row]) == "reduced, 500, bfloat16, distilled"
    assert sgsc_tables.steps([{**row, "distilled": False}]) == "reduced, 500, bfloat16"


def test_what_learned_from_labels_is_no_match_for_what_was_distilled():
    mine, other = ({"seed": 0, "task": "resnet20", "packed_accuracy": 0.9, "distilled": d} for d in (True, None))
    assert sgsc_claims.lead("ahead", [(mine, other)], 1, 0.0)["measured"] is None
    assert sgsc_claims.lead("ahead", [(mine, {**other, "distilled": True})], 1, 0.0)["holds"]
