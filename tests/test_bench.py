"""The benches run, on next to nothing, and what they write is what the README and the claims are made from."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch

from bench import claims, headline, kernels, peers, readme, record, training
from sgsc.demos.tasks import load
from sgsc.kernels import OPS, Op, fake_quantize
from sgsc.layers import quant_layers
from sgsc.preparation import prepare

STAMP = {"section", "machine", "commit", "date"}
CLAIM = STAMP | {"claim", "target", "measured", "unit", "holds", "command"}
PEERS = {kernels.AUTOGRAD, kernels.BY_HAND, kernels.COMPILED, kernels.LEARNABLE}


# ---- the benches ----


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the result files of quick runs; inductor's minute is left out, its place is not."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "COMPILER", "aot_eager")
        assert kernels.main(["--quick", "--results", str(folder)]) == 0
        assert training.main(["--quick", "--results", str(folder)]) == 0
    return folder


def of_section(results, name, section):
    found = record.read(name, results)
    rows, claims = ([entry for entry in found[kind] if entry["section"] == section] for kind in ("rows", "claims"))
    assert rows
    assert claims
    assert all(row.keys() >= STAMP for row in rows)
    assert all(claim.keys() == CLAIM for claim in claims)
    return rows, {claim["claim"]: claim for claim in claims}


def test_the_quantizer_is_timed_against_every_peer(results):
    rows, found = of_section(results, "cpu_kernels", "fake_quantize")
    assert [row["pass"] for row in rows] == ["forward", "forward + backward"]
    elements, channels = 64 * 576, 64
    assert [row["bytes"] for row in rows] == [8 * elements + 16 * channels, 20 * elements + 44 * channels]
    for row in rows:
        assert row["missing"] == {}
        assert row["peer_microseconds"].keys() == row["ratio"].keys() == PEERS
        assert row["rounds"] >= 5
        consistent(row)
    against_eager, against_compile = found.values()
    assert (against_eager["target"], against_compile["target"]) == (3.0, 1.0)
    assert against_eager["measured"] == rows[1]["ratio"][kernels.AUTOGRAD]
    assert against_compile["measured"] == rows[1]["ratio"][kernels.COMPILED]
    for claim in found.values():
        assert claim["holds"] is (claim["measured"] >= claim["target"])
        assert claim["command"] == "python -m bench.kernels"


def consistent(row):
    for name, ratio in row["ratio"].items():
        assert ratio == pytest.approx(row["peer_microseconds"][name] / row["microseconds"])
    moved_a_second = row["bytes"] / (row["microseconds"] * 1e-6)
    assert row["share_of_copy"] == pytest.approx(moved_a_second / (row["copy_gigabytes_per_second"] * 1e9))
    assert 0 < row["fastest_microseconds"] <= row["microseconds"]


def test_every_other_operation_is_timed_too(results):
    rows, found = of_section(results, "cpu_kernels", "packed")
    assert {row["op"] for row in rows} == {name for name in OPS if not name.startswith("fake_quantize")}
    for row in rows:
        consistent(row)
        has_float = row["op"] in ("packed_linear", "packed_conv2d", "packed_embedding")
        assert row["ratio"].keys() == ({"float", "reference"} if has_float else {"reference"})
        assert (row["batch"] is not None) == row["op"].startswith("packed_")
    (every,) = (row for row in rows if (row["op"], row["case"]) == ("unpack", "every-width"))
    assert every["channels_by_bits"] == {str(b): 1 for b in range(9)}
    for op in ("packed_linear", "packed_conv2d", "packed_embedding"):
        (claim,) = (claim for text, claim in found.items() if text.startswith(f"{op},"))
        assert claim["measured"] == min(row["ratio"]["reference"] for row in rows if row["op"] == op)


def test_a_training_step_is_timed_in_seven_ways(results):
    rows, found = of_section(results, "main_job", "training")
    for task in training.TASKS:
        of = {row["variant"]: row for row in rows if row["task"] == task}
        ways = [training.FLOAT, training.FUSED, training.TOGETHER, training.EAGER, training.COMPRESSING]
        ways += [training.LEFT, training.CUT]
        assert list(of) == ways
        base = of[training.FLOAT]["milliseconds"]
        assert all(row["over_float"] == pytest.approx(row["milliseconds"] / base) for row in of.values())
        claims = [claim for text, claim in found.items() if text.startswith(f"{task}:")]
        pairs = (training.EAGER, training.FUSED), (training.LEFT, training.CUT)
        for claim, (slow, fast) in zip(claims, pairs, strict=True):
            assert claim["measured"] == pytest.approx(of[slow]["milliseconds"] / of[fast]["milliseconds"])
            assert claim["holds"] is (claim["measured"] >= 1)


def test_a_quick_run_cannot_overwrite_the_results(capsys):
    for bench in (kernels, training, peers):
        with pytest.raises(SystemExit, match="2"):
            bench.main(["--quick"])
        assert "name another folder with --results" in capsys.readouterr().err


# ---- who may be timed ----


def refuse(graph, inputs):
    raise RuntimeError("no compiler\nhere")


def test_a_peer_that_fails_is_missing_with_its_reason(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILER", refuse)
    rows, (against_eager, against_compile) = kernels.measure_fake_quantize(0.0, 1e10, True)
    for row in rows:
        assert "no compiler here" in row["missing"][kernels.COMPILED]
        assert row["ratio"][kernels.COMPILED] is row["peer_microseconds"][kernels.COMPILED] is None
        assert row["ratio"].keys() == PEERS
    assert against_eager["measured"] is not None
    assert (against_compile["measured"], against_compile["holds"]) == (None, False)


def test_everyone_admitted_is_timed_as_itself():
    exact = torch.ones(3, dtype=torch.float64)
    ran = []
    candidates = {name: lambda name=name: ran.append(name) or torch.ones(3) for name in ("a", "b", "c")}
    runs, missing = kernels.admit(candidates, lambda quantize: (quantize(),), {key: [exact] for key in candidates})
    assert missing == {}
    ran.clear()
    for run in runs.values():
        run()
    assert ran == list(runs) == ["a", "b", "c"]


def test_no_speed_for_a_wrong_quantizer(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILER", "aot_eager")
    monkeypatch.setattr(kernels, "fake_quantize", lambda x, s, lo, hi, z: fake_quantize(x, s, lo, hi + 1, z))
    with pytest.raises(ValueError, match=r"fake_quantize, 64x576, forward: the result differs from float64; no speed"):
        kernels.measure_fake_quantize(0.0, 1e10, True)


def test_a_wrong_peer_is_missing(monkeypatch):
    monkeypatch.setattr(kernels, "COMPILER", "aot_eager")
    monkeypatch.setattr(kernels._ByHand, "backward", lambda ctx, grad: (*(0 * t for t in ctx.saved_tensors[:4]), None))
    forward, both = kernels.measure_fake_quantize(0.0, 1e10, True)[0]
    assert forward["missing"] == {}
    assert both["missing"] == {kernels.BY_HAND: "the result differs from float64"}


@pytest.mark.parametrize(
    ("spoil", "right"),
    [
        (lambda t: t, True),
        (lambda t: torch.where(torch.arange(len(t)) == 7, t + 1, t), True),  # one element on a tie
        (lambda t: torch.where(torch.arange(len(t)) < 3, t + 1, t), False),
        (lambda t: torch.where(torch.arange(len(t)) < 3, float("nan"), t), False),
        (lambda t: 1.01 * t, False),
        (lambda t: 0 * t, False),
        (lambda t: t[:1], False),
    ],
)
def test_a_result_is_right_but_for_single_ties(spoil, right):
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kernels.same([spoil(exact).float()], [exact]) is right


def test_no_speed_for_a_wrong_packed_operation(monkeypatch):
    kept = Op.__call__
    monkeypatch.setattr(
        Op, "__call__", lambda self, *a: 1.1 * kept(self, *a) if "linear" in self.name else kept(self, *a)
    )
    with pytest.raises(AssertionError, match="packed_linear exact-one-weight-1-rows"):
        kernels.measure_packed(0.0, 1e10, True)


@pytest.mark.parametrize("name", ["packed_linear", "packed_conv2d", "packed_embedding"])
def test_torchs_own_operation_computes_the_same(name):
    for case, arguments in OPS[name].cases().items():
        rounded = case.startswith(("int8", "static"))
        if rounded or "nan-and-infinity" in case:  # there ours is the bias alone, torch's 0 * NaN
            continue
        run = kernels.float_form(name, arguments)
        assert run is not None
        torch.testing.assert_close(run(), OPS[name].reference(*arguments), msg=case)


def test_the_eager_formula_runs_while_it_lasts_and_no_longer(monkeypatch):
    layer = next(iter(quant_layers(prepare(torch.nn.Sequential(torch.nn.Linear(5, 4))).model).values()))
    ran = []
    kept = Op.__call__
    monkeypatch.setattr(Op, "__call__", lambda self, *a: ran.append(self.name) or kept(self, *a))
    x = torch.randn(3, 5)
    with training.eager_formula():
        eager = layer(x)
        eager.sum().backward()
    assert ran == []
    with pytest.raises(KeyError, match="left early"), training.eager_formula():
        raise KeyError("left early")
    fused = layer(x)
    fused.sum().backward()
    assert ran == ["fake_quantize", "fake_quantize_backward"]
    assert torch.equal(eager, fused)


def test_steps_that_differ_are_not_compared(monkeypatch):
    task = load("digits", limit=32)
    network = task.build()
    training.check(task, network)

    @contextlib.contextmanager
    def wrong():
        kept = Op.__call__
        with monkeypatch.context() as patch:
            patch.setattr(
                Op, "__call__", lambda self, *a: kept(self, *a) if "backward" in self.name else 1.1 * kept(self, *a)
            )
            yield

    monkeypatch.setattr(training, "eager_formula", wrong)
    with pytest.raises(ValueError, match="digits: fused and eager quantizer disagree on"):
        training.measure(task, 0.0, True)


# ---- result files ----


def test_a_section_replaces_itself_and_nothing_else(tmp_path):
    def put(section, *numbers):
        found = [record.claim(f"{section} {n}", 1, n, "one", holds=True) for n in numbers]
        return record.write("sgsc", section, [{"n": n} for n in numbers], found, f"python -m {section}", tmp_path)

    put("b", 1, 2)
    put("a", 3)
    path = put("b", 5, 4)
    said = json.loads(path.read_text())
    assert [(row["section"], row["n"]) for row in said["rows"]] == [("a", 3), ("b", 5), ("b", 4)]
    assert [claim["claim"] for claim in said["claims"]] == ["a 3", "b 5", "b 4"]
    assert all(row.keys() == STAMP | {"n"} for row in said["rows"])
    assert all(claim.keys() == CLAIM for claim in said["claims"])
    assert said["claims"][0]["command"] == "python -m a"
    before = path.read_bytes()
    put("a", 3)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["sgsc.json"]


def test_what_cannot_be_a_result_changes_nothing(tmp_path):
    path = record.write("search", "a", [{"n": 1}], [], "x", tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="results 'serch' are not known; choose one of main_job, cpu_kernels"):
        record.write("serch", "a", [], [], "x", tmp_path)
    with pytest.raises(ValueError, match=r"search, section a: .*finite numbers and null"):
        record.write("search", "a", [{"n": float("nan")}], [], "x", tmp_path)
    with pytest.raises(ValueError, match=r"claim .*: want claim, holds, measured, target, unit, holds true or false"):
        record.write("search", "a", [], [{"claim": "c", "holds": True}], "x", tmp_path)
    assert path.read_bytes() == before
    path.write_text('{"rows": [1]}')
    with pytest.raises(ValueError, match=r"search\.json is no result file .*; delete it, and run its benches again"):
        record.write("search", "a", [], [], "x", tmp_path)


@pytest.mark.parametrize(
    ("measured", "how", "holds"),
    [
        (3.0, {"at_least": 3.0}, True),
        (2.9, {"at_least": 3.0}, False),
        (3.0, {"at_most": 3.0}, True),
        (3.1, {"at_most": 3.0}, False),
        (3.1, {"holds": True}, True),
        (3.1, {"holds": False}, False),
        (None, {"at_least": 3.0}, False),
        (None, {"holds": True}, False),
    ],
)
def test_a_claim_holds_on_its_side_of_the_bound(measured, how, holds):
    assert record.claim("c", 3.0, measured, "s", **how)["holds"] is holds


@pytest.mark.parametrize("how", [{}, {"holds": True, "at_least": 1.0}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_claim_has_one_bound(how):
    with pytest.raises(ValueError, match="claim 'c': give one of holds="):
        record.claim("c", 3.0, 1.0, "s", **how)


def test_claims_that_do_not_hold_are_printed(tmp_path, capsys):
    arguments = ["--results", str(tmp_path)]
    assert claims.main(arguments) == 2
    assert "no result files in" in capsys.readouterr().err
    record.write("sgsc", "a", [], [record.claim("true enough", 1, 2, "s", at_least=1)], "x", tmp_path)
    assert claims.main(arguments) == 0
    assert capsys.readouterr().out == ""
    record.write("search", "a", [], [record.claim("too slow", 3, 2, "s", at_least=3)], "x", tmp_path)
    assert claims.main(arguments) == 1
    assert capsys.readouterr().out == "search.json: too slow: 2 against 3 s\n"
    assert claims.main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["claim"] == "too slow"


# ---- the README ----

PAGE = """# Title

<!-- tables: main_job -->
<!-- end -->

text

<!-- tables: cpu_kernels -->
old
<!-- end -->
end
"""


def digits(seed, packed, target=0.05):
    return {
        **{"task": "digits", "seed": seed, "target_size": target, "stored_ratio": 0.04 + seed / 1000, "seconds": 60.0},
        **{"float_accuracy": 0.98, "packed_accuracy": packed, "accuracy_standard_error": 0.005},
        **{"preservation_regressions": 0, "guard_regressions": 2 * seed, "guard_samples": 270},
        "guard_upper_bound_95": 0.02,
    }


def test_the_readme_is_what_the_results_say():
    assert readme.main(["--check"]) == 0


def test_tables_are_written_once_and_a_stale_page_is_noticed(results, tmp_path, capsys):
    folder = tmp_path / "results"
    shutil.copytree(results, folder)
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    arguments = ["--readme", str(page), "--results", str(folder)]
    assert readme.main(["--check", *arguments]) == 1
    assert "README.md is not what the results say; run python -m bench.readme" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert readme.main(arguments) == 0
    once = page.read_text()
    assert readme.main(["--check", *arguments]) == 0
    assert readme.main(arguments) == 0
    assert page.read_text() == once
    opening = "<details>\n<summary>The main job, the published form, the training step: "
    assert once.startswith(f"# Title\n\n<!-- tables: main_job -->\n\n{opening}")
    assert "claims hold</summary>\n\n**training**\n" in once
    assert once.count("<details>") == once.count("</details>") == 2
    assert "\nold\n" not in once
    assert once.endswith("<!-- end -->\nend\n")
    for name in ("main_job", "cpu_kernels"):
        for row in record.read(name, folder)["rows"]:
            assert row["machine"] in once
            assert row["commit"] in once
    record.write("main_job", "digits", [digits(0, 0.98)], [], "x", folder)
    assert readme.main(["--check", *arguments]) == 1


HEADLINE = "<!-- tables: headline -->\n<!-- end -->\n"


def test_the_headline_shows_what_does_not_hold_too(tmp_path, monkeypatch):
    shown = (("main_job", "digits*lost*", "accuracy lost"), ("main_job", "digits*seconds", "time"))
    monkeypatch.setattr(headline, "SHOWN", shown)
    said = [
        record.claim("digits at 5 %: lost, mean", 0.005, 0.00123, "share", at_most=0.005),
        record.claim("digits: seconds", 180, 200.5, "s", at_most=180),
    ]
    record.write("main_job", "digits", [], said, "x", tmp_path)
    page = readme.filled(HEADLINE, tmp_path)
    assert "| accuracy lost | 0.123 % | 0.5 % | yes |\n| time | 200.5 s | 180 s | **no** |\n" in page
    record.write(
        "main_job", "digits", [], [record.claim("digits: seconds", 180, None, "s", False), said[0]], "x", tmp_path
    )
    assert "| time |  | 180 s | **no** |\n" in readme.filled(HEADLINE, tmp_path)
    record.write("main_job", "digits", [], said[:1], "x", tmp_path)
    with pytest.raises(ValueError, match=r"main_job\.json has no claim like 'digits\*seconds'"):
        readme.filled(HEADLINE, tmp_path)


def test_without_results_nothing_is_said(tmp_path):
    assert readme.filled(PAGE, tmp_path) == PAGE.replace("old\n", "")


def test_seeds_of_a_target_share_a_line(tmp_path):
    rows = [digits(0, 0.98), digits(1, 0.97), digits(3, 0.90, 0.01)]
    record.write("main_job", "digits", rows, [record.claim("a | b", 0.5, 0.25, "s", at_least=0.5)], "x", tmp_path)
    shown = readme.filled(PAGE, tmp_path)
    five = "| digits | 5 % | 2 | 4.05 (4.00 to 4.10) | 98.00 | 97.50 (97.00 to 98.00) | -0.50 ± 0.50 | 0 |"
    assert f"{five} 1 (0 to 2) of 270 | 2.0 | 60 |\n" in shown
    assert "| digits | 1 % | 1 | 4.30 | 98.00 | 90.00 | -8.00 ± 0.50 | 0 | 6 of 270 | 2.0 | 60 |\n" in shown
    assert "| a \\| b | 0.5 | 0.25 | s | **no** |\n" in shown
    assert shown.count("Measured on") == 1


def test_a_loss_is_shown_in_bold(tmp_path):
    row = {
        **{"op": "packed_linear", "case": "big", "bytes": 2_000_000, "microseconds": 50.0, "share_of_copy": 0.5},
        **{"ratio": {"float": 0.25, "reference": 4.0, "torch.compile": None}, "missing": {"torch.compile": "no g++"}},
    }
    record.write("cpu_kernels", "packed", [row], [], "x", tmp_path)
    shown = readme.filled(PAGE, tmp_path)
    assert "| packed_linear big | 2.000 | 50.0 | 50% | **0.25×** | 4.00× | missing |\n" in shown
    assert "torch.compile is missing where it failed: no g++." in shown


DEPLOYMENT = "<!-- tables: deployment -->\n<!-- end -->\n"


def visits(case, **microseconds):
    """Rows of contenders; those without a time are missing."""
    return [
        {**case, "threads": 2, "by": by.replace("_", " "), "microseconds": t, "missing": None if t else "no | wheel"}
        for by, t in microseconds.items()
    ]


def test_contenders_of_a_case_share_a_line(tmp_path):
    """Exact results stand against exact ones alone; our slower width counts, and our faster form."""
    others = {"torch_float32": 10.0, "onnxruntime_float32": None, "onnxruntime_int8": 4.0}
    widths = visits({"case": "3x3", "batch": 8}, ours_a_exact=8.0, ours_b_exact=20.0, ours_b_int8=2.0, **others)
    forms = [*visits({"case": "net"}, ours_a_exact=8.0, ours_b_exact=2000.0, ours_a_int8=5.0, **others)]
    forms += visits({"case": "other"}, ours_a_int8=1.0, torch_float32=0.5)
    record.write("deployment", "convolution", widths, [], "x", tmp_path)
    record.write("deployment", "network", forms, [], "x", tmp_path)
    shown = readme.filled(DEPLOYMENT, tmp_path)
    assert "| 3x3, batch 8 | 2 | 8.0 | 20.0 | 2.0 | 10.0 | missing | 4.0 | **0.50×** | 2.00× |\n" in shown
    assert "| net | 2 | 8.0 | 2,000 | 5.0 | 10.0 | missing | 4.0 | 1.25× | **0.80×** |\n" in shown
    assert "| other | 2 |  |  | 1.0 | 0.5 |  |  |  | **0.50×** |\n" in shown
    assert shown.count("onnxruntime float32 is missing where it failed: no \\| wheel.") == 2
    assert "of our slower width: below 1" in shown
    assert "of our fastest form: below 1" in shown


def test_a_grid_known_beforehand_stands_beside_what_it_replaces(tmp_path):
    times = {"torch_float32": 10.0, "ours_exact": 8.0, "ours_int8": 2.0, "ours_static_int8": 4.0}
    record.write("deployment", "static", visits({"case": "3x3"}, **times), [], "x", tmp_path)
    shown = readme.filled(DEPLOYMENT, tmp_path)
    assert "| case | threads | torch float32 | ours exact | ours int8 | ours static int8 | int8 / static |" in shown
    assert "| 3x3 | 2 | 10.0 | 8.0 | 2.0 | 4.0 | **0.50×** | 2.00× |\n" in shown


def test_loading_is_a_table_and_its_memory_a_sentence(tmp_path):
    def row(what, threads, milliseconds, over):
        named = {"what": what, "threads": threads, "bytes": 2_000_000}
        return named | {"milliseconds": milliseconds, "over_reading": over}

    rows = [row("load_into", 1, 8.0, 4.0), row("read the file", 1, 2.0, 1.0), row("tile", 1, 3.0, None)]
    rows += [row("load_into", 2, 3.0, 1.5), row("read the file", 2, 2.0, 1.0), row("tile", 2, 2.0, None)]
    parts = {"file_bytes": 2_000_000, "run_form_bytes": 3_000_000, "layer_bytes": 1_500_000, "over_need": 1.2}
    rows.append({"what": "peak of resident memory", "threads": None, "bytes": 7_800_000} | parts)
    record.write("deployment", "load", rows, [], "x", tmp_path)
    shown = readme.filled(DEPLOYMENT, tmp_path)
    assert "| load_into | 2.0 | 8.0 | 3.0 | **4.00×** | 1.50× |\n" in shown
    assert "| read the file | 2.0 | 2.0 | 2.0 | 1.00× | 1.00× |\n| tile | 2.0 | 3.0 | 2.0 |  |  |\n" in shown
    assert "1.20 × that of the file (2.0), the run form (3.0) and one layer in both forms (1.5), in MB." in shown


def test_every_section_has_a_table(tmp_path):
    forms = [{"task": "cnn", "steps": 10_000, "measured_bits": 22.00651, "expected_bits": 22.0065}]
    record.write("main_job", "published", forms, [], "x", tmp_path)
    record.write("main_job", "another", [{"a": 1.23456, "b": None}, {"a": 2, "c": "z"}], [], "x", tmp_path)
    shown = readme.filled(PAGE, tmp_path)
    assert "| cnn | 10,000 | 22.0065 | 22.0065 |\n" in shown
    assert "**another**\n\n| a | b | c |\n| --- | ---: | ---: |\n| 1.235 |  |  |\n| 2 |  | z |\n" in shown
    assert shown.index("**published**") < shown.index("**another**")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- tables: main_job -->\n", "1 markers .* and 0 `<!-- end -->` make 0 pairs"),
        ("<!-- tables: main_job -->\n<!-- tables: sgsc -->\n<!-- end -->\n", "2 markers .* and 1 .* make 1 pairs"),
        ("<!-- tables: mainjob -->\n<!-- end -->\n", "results 'mainjob' are not known"),
    ],
)
def test_markers_that_do_not_pair_up_are_refused(page, said, tmp_path, capsys):
    with pytest.raises(ValueError, match=said):
        readme.filled(page, tmp_path)
    file = tmp_path / "README.md"
    file.write_text(page)
    assert readme.main(["--readme", str(file), "--results", str(tmp_path)]) == 2
    assert "bench.readme: " in capsys.readouterr().err
    assert file.read_text() == page
