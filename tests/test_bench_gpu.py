"""The GPU bench without a GPU: all of it runs through Triton's interpreter, and what only CUDA has is stood in for."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed: there is nothing to bench on a GPU")

from bench import (
    gpu,
    gpu_chain,
    gpu_check,
    gpu_choices,
    gpu_conv2d,
    gpu_device,
    gpu_linear,
    gpu_peers,
    gpu_training,
    gpu_variants,
    readme,
    record,
)
from bench.kernels import LARGE
from bench.peer_problem import MIXED, TRAINED
from bench.training import FLOAT
from sgsc.kernels import OPS, triton_packed
from sgsc.kernels.run_form import tiled_weight
from tests.kernels import test_gpu

ROOT = Path(__file__).resolve().parents[1]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder with the results of a quick run; Triton's interpreter is chosen before triton is imported."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which would be measured instead")
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench.gpu", "--quick", "--results", str(folder)]
    everything = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, check=False, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return folder


def of_section(folder, section):
    found = record.read("gpu_kernels", folder)
    return [[entry for entry in found[kind] if entry["section"] == section] for kind in ("rows", "claims")]


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


# ---- claims ----


def rows_of_linear(change=lambda row: None):
    """All rows of the plan, as fast as every claim wants; `change` may make one worse."""
    rows = []
    for shape, tokens, widths in gpu_linear.EVERYTHING.cases():
        for bits in widths:
            size = 1e6 * (3 if bits == MIXED else bits)
            row = {"case": shape, "tokens": tokens, "bits": bits, "bytes": size, "microseconds": size / 1e6}
            row |= {"share_of_copy": 0.86, "ratio": {gpu_peers.CUBLAS: 1.0, "torch int4": 1.5, "hqq 4 bits": None}}
            change(row)
            rows.append(row)
    return rows


def claims_that_fail(rows):
    return {claim["claim"]: claim for claim in gpu_linear.claims(rows, gpu_linear.EVERYTHING) if not claim["holds"]}


def worse(case, tokens, bits, **changes):
    def change(row):
        if (row["case"], row["tokens"], row["bits"]) == (case, tokens, bits):
            row.update(changes)

    return rows_of_linear(change)


def test_claims_of_linear_hold_where_all_is_well():
    assert claims_that_fail(rows_of_linear()) == {}


@pytest.mark.parametrize(
    ("where", "changes", "said"),
    [
        (("4096x4096", 1, 4), {"microseconds": 5.1, "bytes": 5.1e6}, "one token, 4 bits, 4096x4096"),
        (("8192x8192", 1, 4), {"microseconds": 12.1, "bytes": 12.1e6}, "one token, 4 bits, 8192x8192"),
        (("8B gate_up", 1, 4), {"share_of_copy": 0.84}, "one token, 4 bits, 8B gate_up"),
        (("8192x8192", 1, 3), {"microseconds": 3.5}, "one token, every width, 8192x8192: off .*; worst: 3 bits"),
        (("8B gate_up", 1, MIXED), {"microseconds": 2.5}, "one token, every width, 8B gate_up: off .*; worst: mixed"),
        (("4096x4096", 16, 4), {"ratio": {"a": 2.0, "torch int4": 0.9}}, "16 tokens.*4096x4096, 4 bits.*torch int4"),
        (("8B gate_up", 64, MIXED), {"ratio": {gpu_peers.CUBLAS: 0.99}}, "64 tokens.*8B gate_up, mixed.*F.linear"),
        (("4096x4096", 4096, 4), {"ratio": {gpu_peers.CUBLAS: 0.94}}, "1024 tokens and more.*4096 tokens"),
    ],
)
def test_each_claim_of_linear_can_fail(where, changes, said):
    (text,) = claims_that_fail(worse(*where, **changes))
    assert re.match(f"packed_linear, {said}", text), text


def test_a_claim_without_all_its_rows_does_not_hold():
    for case in [("4096x4096", 1, 4), ("8B gate_up", 1, 7), ("8192x8192", 16, 4), ("8B gate_up", 1024, MIXED)]:
        rows = [row for row in rows_of_linear() if (row["case"], row["tokens"], row["bits"]) != case]
        failed = claims_that_fail(rows)
        assert failed
        assert all(claim["measured"] is None for claim in failed.values())
    assert claims_that_fail(worse("4096x4096", 64, 4, ratio={"torch int4": None}))  # nobody to be ahead of
    failed = claims_that_fail([])
    assert len(failed) == len(gpu_linear.claims([], gpu_linear.EVERYTHING)) == 9


def test_claims_of_the_other_sections_can_fail():
    def passes(**changes):
        rows = [
            {"pass": "forward", "case": LARGE, "share_of_copy": 0.9, "microseconds": 27.0},
            {"pass": "backward", "case": LARGE, "share_of_copy": 0.9, "microseconds": 52.0},
        ]
        rows[1].update(changes)
        return [claim["holds"] for claim in gpu_training.pass_claims(rows)]

    assert passes() == [True, True, True, True]
    assert passes(share_of_copy=0.89) == [True, True, False, True]
    assert passes(microseconds=52.1) == [True, True, True, False]
    assert passes(case="64x576") == [True, True, False, False]

    ratios = dict(zip((FLOAT, *gpu_training.PREPARED), (1.0, 1.05, 1.06), strict=True))
    steps = [{"task": "t", "variant": variant, "over_float": ratio} for variant, ratio in ratios.items()]
    assert [claim["holds"] for claim in gpu_training.step_claims(steps)] == [True, False]

    def layers(batch, *ratios):
        rows = [{"case": str(i), "batch": batch, "ratio": {"a": r, "b": 2.0, "c": None}} for i, r in enumerate(ratios)]
        rows = [row | {"groups": 1} for row in rows] + [rows[0] | {"groups": 2, "case": "apart", "ratio": {"a": 0.1}}]
        return {claim["target"]: claim["holds"] for claim in gpu_conv2d.claims(rows, 1)}

    assert layers(1, 1.0, 1.1) == {1.0: True, 0.9: False}
    assert layers(1, 1.0, 0.99) == {1.0: False, 0.9: False}
    assert layers(32, 0.9, 1.1) == {1.0: False, 0.9: True}
    assert layers(32, 0.95) == {1.0: False, 0.9: False}  # a layer is missing


# ---- what is timed ----


def a_run(**changes):
    device = gpu_device.Interpreted()
    return gpu_device.Run(device, True, 0.0, lambda: 1.0, lambda *a: None, **{"copy": 1e9, **changes})


def by_reference(factor):
    def packed_linear(x, tiles, bias, width):
        return factor * OPS["packed_linear"].reference(x, *tiles[:3], bias, tiles.rows, width, False)

    return packed_linear


def measured(monkeypatch, factor, shape="16x128"):
    monkeypatch.setattr(gpu_linear, "packed_linear", by_reference(factor))
    gpu_linear.peers_of.cache_clear()
    run = a_run()
    rows = gpu_linear.measure_case(run, gpu_linear.LITTLE, (shape, 2, (4, MIXED)))
    gpu_linear.peers_of.cache_clear()
    return rows, run.wrong


def test_a_wrong_product_is_not_timed(monkeypatch):
    rows, wrong = measured(monkeypatch, 1.0)
    assert [row["bits"] for row in rows] == [4, MIXED]
    assert wrong == []
    rows, wrong = measured(monkeypatch, 1.1)
    assert rows == []
    assert [w.split(": error")[0] for w in wrong] == [f"linear 16x128, {b} bits, 2 tokens" for b in (4, MIXED)]
    rows, wrong = measured(monkeypatch, float("nan"))
    assert rows == []
    assert "NaN, expected 0" in wrong[0]


def a_chain(monkeypatch, product):
    monkeypatch.setattr(gpu_chain, "packed_linear", product)
    run = a_run()
    ((name, shapes),) = gpu_chain.LITTLE.items()
    return gpu_chain.measure_chain(run, name, shapes, 4), run.wrong


def test_a_wrong_chain_is_not_timed(monkeypatch):
    def wrong_when_off(*arguments):
        return by_reference(1.0 if triton_packed.EARLY else 1.1)(*arguments)

    rows, wrong = a_chain(monkeypatch, by_reference(1.0))
    assert len(rows) == 2
    assert wrong == []
    for product, variant in ((by_reference(1.1), "ours"), (wrong_when_off, "ours, PDL off")):
        rows, (what,) = a_chain(monkeypatch, product)
        assert rows == []
        assert what.startswith(f"a chain of layers, 4 bits, {variant}: error")
    assert triton_packed.EARLY > 0
    monkeypatch.setattr(gpu_device.Interpreted, "replayed", lambda self, call: 1.1 * call())
    rows, (what,) = a_chain(monkeypatch, by_reference(1.0))
    assert rows == []
    assert what.startswith("a chain of layers, 4 bits, ours, replayed: error")


def test_a_layer_of_a_chain_takes_the_one_before(monkeypatch):
    ((_, shapes),) = gpu_chain.LAYERS.items()
    widths = [k for _, k in shapes]
    seen = []

    def product(x, rows, bias, width):
        seen.append((x, width))
        return torch.full((1, rows), float(rows))

    last = gpu_chain.through(torch.zeros(1, widths[0]), [n for n, _ in shapes], widths, product)
    assert last.shape == (1, shapes[-1][0])
    assert [x.shape[1] for x, _ in seen] == [width for _, width in seen] == widths
    assert [float(x[0, -1]) for x, _ in seen] == [0, *(n for n, _ in shapes[:-1])]
    assert all(x.is_contiguous() for x, _ in seen)  # else each layer would copy it first


def test_a_wrong_convolution_is_not_timed(monkeypatch):
    def packed_conv2d(x, tiles, bias, *geometry):
        return factor * OPS["packed_conv2d"].reference(x, *tiles[:3], bias, tiles.rows, *geometry, False)

    monkeypatch.setattr(gpu_conv2d, "packed_conv2d", packed_conv2d)
    for factor, count in ((1.0, 1), (1.1, 0)):  # noqa: B007  packed_conv2d reads it
        run = a_run()
        assert len(gpu_conv2d.measure_layer(run, 16, 5, 1, 4)) == count
        assert len(run.wrong) == 1 - count


def test_a_wrong_quantizer_is_not_timed(monkeypatch):
    inputs = OPS["fake_quantize"].bench_cases()["64x576"]
    kept = OPS["fake_quantize"]

    class Scaled:
        reference, traffic = staticmethod(kept.reference), staticmethod(kept.traffic)

        def __init__(self, factor):
            self.factor = factor

        def __call__(self, *arguments):
            return self.factor * kept.reference(*arguments)

    for factor, count in ((1.0, 1), (1.1, 0)):
        monkeypatch.setitem(OPS, "fake_quantize", Scaled(factor))
        run = a_run()
        assert len(gpu_training.measure_pass(run, "64x576", "forward", inputs, {})) == count
        assert len(run.wrong) == 1 - count


def test_gradients_that_differ_are_noticed(monkeypatch):
    network, x, y = gpu_training.networks(quick=True)["ResNet-20"]
    model = gpu_training.prepare(network).model
    assert gpu_training.difference(model, x, y) < 1e-4

    @contextlib.contextmanager
    def other():
        with monkeypatch.context() as patch:
            patch.setattr(gpu_training, "loss_of", lambda *a, kept=gpu_training.loss_of: 1.1 * kept(*a))
            yield

    monkeypatch.setattr(gpu_training, "eager_formula", other)
    assert gpu_training.difference(model, x, y) > 0.05


def test_peers_that_fail_or_are_wrong_are_missing(monkeypatch):
    def broken(weight):
        raise RuntimeError("no\nkernel")

    def fails_when_called(weight):
        return lambda x: F.linear(x, weight[:, 1:])

    made = {
        **{gpu_peers.CUBLAS: (16, gpu_peers.cublas), "broken": (4, broken), "late": (4, fails_when_called)},
        **{
            "half": (16, lambda weight: gpu_peers.cublas(weight / 2)),
            "nan": (4, lambda w: gpu_peers.cublas(w * torch.nan)),
        },
    }
    monkeypatch.setattr(gpu_linear, "PEERS", made)
    rows, wrong = measured(monkeypatch, 1.0)
    assert wrong == []
    for row in rows:
        assert row["ratio"].keys() == made.keys()
        assert row["missing"].keys() == {"broken", "late", "half", "nan"}
        assert row["missing"]["broken"] == "RuntimeError: no kernel"
        assert row["missing"]["half"] == "the result is off by 0.5 of its size"


@pytest.mark.parametrize(("bits", "most"), [(4, 0.15), (8, 0.01)])
def test_levels_stand_for_the_weight(bits, most):
    weight = torch.randn(8, 256)
    levels, scale, low = gpu_peers.levels(weight, bits, 128)
    assert int(levels.max()) == 2**bits - 1
    back = (levels.unflatten(1, (2, 128)) * scale[..., None] + low[..., None]).flatten(1)
    assert float((back - weight).norm() / weight.norm()) < most


def test_copies_have_weights_of_their_own():
    weight = torch.randn(8, 128).to(torch.bfloat16)
    for make, held in ((gpu_peers.cublas, "weight"), (gpu_peers.torch_int8, "codes")):
        peer = make(weight)
        other = copy.deepcopy(peer)
        assert other.keywords[held].data_ptr() != peer.keywords[held].data_ptr()
        assert torch.equal(other(weight), peer(weight))
    device = gpu_device.Interpreted()
    layers = gpu_linear.copies_of(
        gpu_linear.random_tiles(torch.full((16,), 4, dtype=torch.uint8), 128, 1, device), device
    )
    assert len({layer.lines.data_ptr() for layer in layers}) == len(layers) == 2
    device.cache = 1 << 20
    assert gpu_device.Device.copies(device, 300_000) * 300_000 > 2 * device.cache
    assert gpu_device.Device.copies(device, 1) == gpu_device.MOST_COPIES


def test_random_words_are_layers_of_the_widths():
    widths = gpu_linear.widths_of(1000, MIXED)
    shares = torch.bincount(widths.long(), minlength=9)
    total = sum(TRAINED.values())
    assert all(abs(int(shares[b]) - 1000 * TRAINED.get(b, 0) / total) < 1.01 for b in range(9))
    device = gpu_device.Interpreted()
    for rows, width, area in ((1000, 128, 1), (48, 9 * 48, 9)):
        widths = gpu_linear.widths_of(rows, MIXED)
        weight, live = tiled_weight(*gpu_linear.random_tiles(widths, width, area, device), width, area, torch.float32)
        assert live.all()
        assert weight.shape == (rows, width)
        for b in (2, 3):
            distinct = [len(row.unique()) for row, own in zip(weight, widths, strict=True) if own == b]
            assert all(count > 1 for count in distinct)


# ---- how it is timed ----


def test_contenders_take_turns():
    order = []
    contenders = {name: [lambda name=name, i=i: order.append((name, i)) for i in (0, 1)] for name in ("ours", "a")}
    contenders["fails"] = [lambda: 1 / 0]
    run = a_run()
    run.device.least = 3
    times, missing = gpu_device.race(run, contenders)
    assert missing == {"fails": "ZeroDivisionError: division by zero"}
    assert {name: t.rounds for name, t in times.items()} == {"ours": 3, "a": 3}
    turns = [one for one in order if one[0] in ("ours", "a")][2:14]  # after a call of each for nothing
    assert turns == [("ours", 0), ("ours", 1), ("a", 0), ("a", 1)] * 3
    with pytest.raises(ZeroDivisionError):
        gpu_device.race(run, {"ours": contenders["fails"]})


class Clock:
    """CUDA's events and graphs, in which a call takes what it says, and a launch from Python ten times as long."""

    def __init__(self, monkeypatch):
        self.now, self.recorded, self.launched, self.mode = 0.0, None, 0, "default"
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                clock.now += sum(self.calls)

        @contextlib.contextmanager
        def capture(graph):
            clock.recorded = graph.calls = []
            yield
            clock.recorded = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(clock, "mode", mode))

    def call(self, seconds, waits=False):
        def launch():
            if waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            assert not (waits and self.recorded is not None), "waiting while a graph is captured"
            self.launched += 1
            if self.recorded is None:
                self.now += 10 * seconds
            else:
                self.recorded.append(seconds)

        return launch


def test_a_graph_is_timed_by_its_replays(monkeypatch):
    clock = Clock(monkeypatch)
    device = object.__new__(gpu_device.Gpu)
    for seconds, most in ((3e-6, 500), (1e-2, 8)):
        clock.launched = 0
        calls = [clock.call(seconds), clock.call(3 * seconds)]
        one, graph = device.rounds(calls)
        assert graph
        assert one() == pytest.approx(2 * seconds)
        launched = clock.launched
        assert launched <= most
        one()
        assert clock.launched == launched  # only replays
    one, graph = device.rounds([clock.call(1e-5, waits=True)])
    assert not graph
    assert one() == pytest.approx(1e-4)
    assert clock.mode == "default"


def test_a_graph_of_short_calls_is_long(monkeypatch):
    clock = Clock(monkeypatch)
    device = object.__new__(gpu_device.Gpu)
    one, _ = device.rounds([clock.call(1e-5)] * 3)
    before = clock.now
    one()
    assert clock.now - before >= gpu_device.REPLAY / 2


def test_kernels_are_counted(monkeypatch):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        *(SimpleNamespace(name=n, device_type=cuda) for n in ("forward_kernel", "many_forward_kernel", "copy")),
        SimpleNamespace(name="forward_kernel", device_type=cpu),
        SimpleNamespace(name="span", device_type=cuda, is_user_annotation=True),
    ]

    @contextlib.contextmanager
    def profile(activities):
        yield SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    device = object.__new__(gpu_device.Gpu)
    row = gpu_training.launches_of(SimpleNamespace(device=device), "t", "v", lambda: None)
    assert row["launches"] == 3
    assert row["of the quantizer's forward"] == 2
    assert row["of the quantizer's backward"] == 0
    events.clear()
    assert gpu_training.launches_of(SimpleNamespace(device=device), "t", "v", lambda: None)["launches"] is None


# ---- checks on the device ----


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
    everything = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    everything.pop("OUT", None)
    results = "bench/results"
    if out:
        results = everything["OUT"] = str(tmp_path / "out")
    command = ["bash", str(ROOT / "bench/gpu.sh")]
    assert subprocess.run(command, check=False, env=everything, cwd=tmp_path).returncode == 1
    expected = [f". -m bench.gpu_check --results {results}"]
    expected += [f". -m bench.gpu --only {section} --results {results}" for section in gpu.SECTIONS]
    assert log.read_text().splitlines() == expected
    log.unlink()
    assert subprocess.run([*command, "linear", "checks"], check=False, env=everything, cwd=tmp_path).returncode == 0
    assert log.read_text().splitlines() == [expected[2], expected[0]]


def test_the_checks_alone_have_nearly_all_of_the_time(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    fake = folder / "timeout"
    fake.write_text(f'#!/bin/sh\necho "$*" >>{log}\n')
    fake.chmod(0o755)
    found = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OUT": "/o"}
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


@pytest.mark.parametrize("section", ["cifar10", "resnet20", "shakespeare", "strategies-vdsr", "strategies-qat"])
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
    bench = "strategies" if section.startswith("strategies") else "sgsc"
    told = re.fullmatch(
        rf"-m bench\.{bench} {section} --device cuda --seconds (\d+) --data /d --results {tmp_path}/out", called
    )
    assert told is not None
    assert 450 <= int(told[1]) <= int(limit.split()[1]) - 10 <= 530
    assert section not in (ROOT / "bench/gpu.sh").read_text().split("set -- ")[1].splitlines()[0]


def test_what_is_apart_has_a_call_of_its_own(tmp_path):
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    fake = folder / "timeout"
    fake.write_text(f'#!/bin/sh\necho "$*" >>{log}\n')
    fake.chmod(0o755)
    found = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
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
