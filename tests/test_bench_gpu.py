"""The GPU bench without a GPU: all of it runs through Triton's interpreter, and what only CUDA has is stood in for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: there is nothing to bench on a GPU")

from bench import (
    gpu,
    gpu_chain,
    gpu_choices,
    gpu_conv2d,
    gpu_linear,
    gpu_peers,
    gpu_training,
    gpu_variants,
    readme,
    record,
)
from bench.peer_problem import MIXED
from bench.training import FLOAT
from sgsc.kernels import triton_packed
from tests.gpu_runs import a_run, of_section

ROOT = Path(__file__).resolve().parents[1]
WAIT = 1_200  # seconds: the quick run takes two minutes of one core, which a busy machine shares
pytestmark = pytest.mark.timeout(WAIT + 100)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder with the results of a quick run; Triton's interpreter is chosen before triton is imported."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which would be measured instead")
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu", "--quick", "--results", str(folder)]
    everything = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, check=False, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=WAIT)
    assert run.returncode == 0, run.stderr
    return folder


def consistent(row):
    timed = {name: t for name, t in row["peer_microseconds"].items() if t is not None}
    assert row["ratio"].keys() == row["peer_microseconds"].keys() == timed.keys() | row["missing"].keys()
    assert not timed.keys() & row["missing"].keys()
    for name, t in timed.items():
        assert row["ratio"][name] == pytest.approx(t / row["microseconds"])
    moved = row["bytes"] / row["microseconds"] * 1e6
    assert row["share_of_copy"] == pytest.approx(moved / (row["copy_gigabytes_per_second"] * 1e9))
    assert 0 < row["fastest_microseconds"] <= row["microseconds"]
    assert row["eager_microseconds"] > 0
    assert row["without_graph"] == ["ours", *timed]
    assert row["device"] == "Triton's interpreter"


def test_every_section_is_written(quick):
    found = record.read("gpu_kernels", quick)
    more = {"launches of a training step", gpu_chain.SECTION, gpu_choices.CROSSOVERS}
    assert {row["section"] for row in found["rows"]} == {*gpu.SECTIONS, *gpu.APART, *more}
    (copied, product), _ = of_section(quick, "ceilings")
    assert copied["unit"] == "GB/s"
    assert product["unit"] == "TFLOP/s"
    for claim in found["claims"]:
        section = claim["section"].replace(gpu_choices.CROSSOVERS, "choices")
        assert claim["command"] == f"python -m bench.gpu --only {section}"
        assert claim["device"] == "Triton's interpreter"


def test_linear_is_measured_as_planned(quick):
    rows, _ = of_section(quick, "linear")
    planned = [(shape, bits, m) for shape, m, widths in gpu_linear.LITTLE.cases() for bits in widths]
    assert [(row["case"], row["bits"], row["tokens"]) for row in rows] == planned
    for row in rows:
        consistent(row)
        assert row["ratio"].keys() == gpu_peers.PEERS.keys()
        assert row["ratio"][gpu_peers.CUBLAS] is not None
        assert 0 < row["error"] < 0.05
        n, k = row["shape"]
        if row["bits"] != MIXED:
            assert row["bits_a_weight"] == row["bits"]
            plan, grid = 4 * (2 + 16) * n // 16, 4 * n
            assert row["bytes"] == n * k * row["bits"] // 8 + plan + grid + 2 * row["tokens"] * (n + k)
    assert "No module named" in rows[0]["missing"].get("gemlite 4 bits", "No module named")


def test_a_chain_is_measured_with_and_without_starting_early(quick):
    rows, _ = of_section(quick, gpu_chain.SECTION)
    expected = [(bits, variant) for bits in gpu_linear.FEW_WIDTHS for variant in ("ours", "ours, PDL off")]
    assert [(row["bits"], row["variant"]) for row in rows] == expected
    for with_it, off in (rows[:2], rows[2:]):
        assert with_it["starts_early"] is off["starts_early"] is False  # nothing does in the interpreter
        ratio = off["microseconds_a_layer"] / with_it["microseconds_a_layer"]
        assert with_it["over PDL off"] == pytest.approx(ratio)
        assert off["over PDL off"] == 1


def test_both_sides_of_a_choice_are_measured(quick):
    rows, _ = of_section(quick, "choices")
    layouts = [f"3x3, 16 channels, 5 px, {layout}" for layout in gpu_choices.LAYOUTS]
    cases = [("32x256, 4 bits", 1), ("32x256, 4 bits", 17), *((layout, 25) for layout in layouts)]
    expected = [(*case, side) for case in cases for side in gpu_choices.SIDES]
    assert [(row["case"], row["columns"], row["variant"]) for row in rows] == expected
    assert [row["chosen"] for row in rows] == 4 * [True, False]
    found, claims = of_section(quick, gpu_choices.CROSSOVERS)
    assert [(row["constant"], row["value"]) for row in found] == [("DENSE", 256), *2 * [("DENSE_PIXELS", 4096)]]
    assert [claim["claim"].split(" = ")[0] for claim in claims] == ["DENSE", "DENSE_PIXELS"]


def test_a_side_is_forced_while_its_call_lasts():
    """Were it not, both contenders would be the same."""
    seen, before = [], triton_packed.DENSE

    def call():
        seen.append(triton_packed.DENSE)
        if len(seen) == 3:
            raise RuntimeError("stopped")

    for value in gpu_choices.SIDES.values():
        gpu_choices.forced(call, DENSE=value)()
    with pytest.raises(RuntimeError, match="stopped"):
        gpu_choices.forced(call, DENSE=7)()
    assert seen == [*gpu_choices.SIDES.values(), 7]
    assert before == triton_packed.DENSE


def sides(**dense_over_packed):
    """Rows of one layer, whose packed side always takes 2 µs."""
    rows = []
    for columns, ratio in dense_over_packed.items():
        times = {gpu_choices.PACKED: 2.0, gpu_choices.DENSE: 2.0 * ratio}
        for side, t in times.items():
            row = {"constant": "DENSE", "value": 256, "case": "a", "columns": int(columns[1:]), "variant": side}
            chosen = (int(columns[1:]) > 256) is (side == gpu_choices.DENSE)
            rows.append(row | {"microseconds": t, "over_fastest": t / min(times.values()), "chosen": chosen})
    return rows


@pytest.mark.parametrize(
    ("ratios", "first"),
    [
        ({"m64": 2.0, "m256": 1.1, "m512": 0.9, "m1024": 0.8}, 512),
        ({"m64": 0.9, "m256": 1.1, "m512": 0.9}, 512),
        ({"m64": 0.9, "m256": 0.9}, 64),
        ({"m64": 0.9, "m256": 1.0}, None),
    ],
)
def test_a_crossover_is_where_the_faster_side_changes(ratios, first):
    (row,) = gpu_choices.crossovers(sides(**ratios))
    assert row["dense_from"] == first
    assert list(row["dense_over_packed"].values()) == list(ratios.values())


def test_a_choice_that_costs_much_does_not_hold():
    for ratios, worst in (({"m64": 2.0, "m512": 0.5}, 1.0), ({"m64": 0.8, "m512": 0.5}, 1.25), ({"m512": 1.2}, 1.2)):
        (claim,) = gpu_choices.claims(sides(**ratios))
        assert claim["measured"] == pytest.approx(worst)
        assert claim["holds"] is (worst <= gpu_choices.SLOWER)


def test_a_wrong_side_is_not_timed():
    for wrong_side in gpu_choices.SIDES.values():

        def call(wrong_side=wrong_side):
            return wrong_side == triton_packed.DENSE

        run = a_run()
        case = gpu_choices.Case("DENSE", "a", 3, [call], lambda wrong: (1.0, "error 1" if wrong else ""))
        assert gpu_choices.measure_case(run, case) == []
        assert len(run.wrong) == 1


def test_variants_are_measured(quick):
    rows, claims = of_section(quick, "variants")
    kinds = [row["kind"] for row in rows if row["op"] == "packed_linear"]
    assert kinds == [kind for kind in gpu_variants.TOKENS for _ in gpu_linear.FEW_WIDTHS]
    assert [(row["kernel"], row["stride"]) for row in rows if row["op"] == "packed_conv2d"] == [(1, 1), (3, 2)]
    assert claims == []
    for row in rows:
        consistent(row)
    assert list(rows[0]["ratio"]) == [gpu_variants.EXACT, gpu_variants.PRODUCT, "F.linear bfloat16"]
    assert rows[0]["error"] > 5e-3 > rows[-3]["error"], "int8 activations were not rounded"
    rows, claims = of_section(quick, "tokens")
    assert [(row["tokens"], row["bits"]) for row in rows] == [(1, 4), (1, MIXED), (2, 4)]
    assert claims == []


def test_a_wrong_variant_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu_variants, "packed_linear", lambda x, *rest: torch.zeros(len(x), 16))
    for kind in gpu_variants.TOKENS:
        run = a_run()
        assert gpu_variants.measure_linear(run, "16x128", 16, 128, kind, 2) == []
        assert len(run.wrong) == len(gpu_linear.FEW_WIDTHS)


def test_every_shape_has_every_number_of_tokens():
    """Between the section of the claims and the one apart."""
    cases = [*gpu_linear.EVERYTHING.cases(), *gpu_linear.REST.cases()]
    for shape in gpu_linear.SHAPES:
        for tokens in gpu_linear.TOKENS:
            widths = {width for name, m, some in cases if (name, m) == (shape, tokens) for width in some}
            assert widths >= set(gpu_linear.FEW_WIDTHS), (shape, tokens)


def test_other_sections_are_measured(quick):
    passes, _ = of_section(quick, "fake_quantize")
    assert [row["pass"] for row in passes] == ["forward", "backward"]
    for row in passes:
        consistent(row)
        assert row["missing"] == {}
        assert len(row["ratio"]) == 3
    layers, _ = of_section(quick, "conv2d")
    assert [(row["batch"], row["groups"], row["bits"]) for row in layers] == [
        (batch, groups, bits)
        for some in ((1,), (2, 8))  # what is claimed comes first
        for batch in (1, 2)
        for groups in some
        for bits in (4, MIXED)
    ]
    for row in layers:
        consistent(row)
        assert row["channels_last_microseconds"] > 0
        assert row["ratio"].keys() == gpu_conv2d.LAYOUTS.keys()
        assert row["missing"] == {}
    steps, claims = of_section(quick, "training")
    assert [row["variant"] for row in steps] == 2 * [FLOAT, *gpu_training.PREPARED]
    assert len(claims) == 2 * len(gpu_training.PREPARED)
    launches, _ = of_section(quick, "launches of a training step")
    assert len(launches) == len(steps)


def test_the_tables_show_it(quick, tmp_path):
    page = "<!-- tables: gpu_kernels -->\n<!-- end -->\n"
    shown = readme.filled(page, quick)
    assert "\n| N x K | 3 bits | 4 bits | mixed |\n" in shown
    assert "\n| N x K | bits | M = 1 | M = 17 | M = 257 | eager call at M = 1 |\n" in shown
    assert "\n| constant | case | columns | ours, packed, µs | ours, dense, µs |\n" in shown
    assert "\n| DENSE | 32x256, 4 bits | 256 |" in shown
    for case in ("packed_conv2d 3x3, 16 channels, 5 px, 4 bits, batch 1", "fake_quantize one-past-a-block backward"):
        assert f"\n| {case} |" in shown
    assert "Measured on Triton's interpreter, commit" in shown
    row = {
        **{"case": "8B", "bits": 4, "tokens": 1, "microseconds": 4.06, "share_of_copy": 0.871},
        **{"eager_microseconds": 31.0, "ratio": {"a": 1.5, "b": 0.5, "c": None}, "missing": {"c": "no | wheel"}},
        "without_graph": ["b"],
    }
    held = [{"check": "one", "holds": True, "said": ""}, {"check": "two", "holds": False, "said": "a\nb"}]
    record.write("gpu_kernels", "linear", [row], [], "x", tmp_path)
    record.write("gpu_kernels", "checks", held, [], "x", tmp_path)
    shown = readme.filled(page, tmp_path)
    assert "\n| 8B | 4.1, 87% |\n" in shown
    assert "\n| 8B | 4 | 4.1, **0.50×** b | 31.0 |\n" in shown
    assert " No graph held b. c is missing: no \\| wheel." in shown
    assert "1 of 2 checks of the kernels on the device hold. two does not: a b." in shown


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "SECTIONS", {})
    assert gpu.main(["--results", str(tmp_path)]) == 2
    assert "torch finds no GPU here; TRITON_INTERPRET=1 with --quick" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--quick"])
    assert "name another folder with --results" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
