"""The bench of whole networks, loading and calls: it runs on next to nothing, refuses what is wrong, and can lose."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

from bench import (
    deployment,
    deployment_memory,
    deployment_networks,
    deployment_peers,
    deployment_static,
    deployment_timing,
    record,
)
from bench.deployment_timing import Contender
from sgsc.kernels import Op

OTHERS = {
    "convolution": {"F.conv2d float32", "onnxruntime float32", "onnxruntime int8 ConvInteger"}
    | {"onnxruntime int8 QLinearConv"},
    "network": {"torch float32 eager", "torch float32 compiled", "torch float32 exported"}
    | {
        "torch int8 dynamic",
        "torch int8 static",
        "onnxruntime float32",
        "onnxruntime int8 dynamic",
        "onnxruntime int8 static",
    },
    "overhead": {"torch"},
    "static": {"torch float32"},
}
OURS = {
    "convolution": {f"ours {widths} {numerics}" for widths in ("mixed", "8 bits") for numerics in deployment.NUMERICS},
    "network": {
        f"ours {form} {numerics}" for form in ("eager", "compiled", "exported") for numerics in deployment.NUMERICS
    },
    "overhead": {f"ours {numerics}" for numerics in deployment.NUMERICS},
    "static": {"ours exact", "ours int8", "ours static int8"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Result file of a quick run; inductor's minute is left out, its place is not."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment_peers, "COMPILER", "aot_eager")
        patch.setattr(deployment_peers, "packaged", lambda program, path: program.module())
        patch.setattr(deployment_timing, "VISIT", 1e-4)
        assert deployment.main(["--quick", "--results", str(folder)]) == 0
    return record.read("deployment", folder)


def rows_of(found, section):
    return [row for row in found["rows"] if row["section"] == section]


@pytest.mark.parametrize("section", list(OTHERS))
def test_everyone_is_timed_or_named_as_missing(results, section):
    rows = rows_of(results, section)
    key = lambda row: (row["case"], row.get("batch"), row["threads"])  # noqa: E731
    for _, its in itertools.groupby(rows, key):
        of = {row["by"]: row for row in its}
        assert {name for name in of if not name.startswith("ours")} == OTHERS[section]
        assert {name for name in of if name.startswith("ours")} == OURS[section]
        for name, row in of.items():
            if row["missing"]:
                assert "onnx" in name or (name, row["missing"][:5]) == ("torch int8 static", "wrong")
                assert row["microseconds"] is row["error"] is None
            else:
                assert 0 < row["fastest_microseconds"] <= row["microseconds"]
                assert 0 <= row["error"] < (0.05 if "int8" in name else 1e-3)


def test_loading_is_measured_in_time_and_memory(results):
    rows = {(row["what"], row["threads"]): row for row in rows_of(results, "load")}
    for threads in (1, 2):
        load, read = rows["load_into", threads], rows["read the file", threads]
        assert load["bytes"] == read["bytes"] > 2 * 64 * 64 // 2  # two layers of 4 bits
        assert load["over_reading"] == pytest.approx(load["milliseconds"] / read["milliseconds"])
        assert rows["tile", threads]["bytes"] == 2 * 64 * 64 // 2 == rows["copy of a layer's bytes", threads]["bytes"]
    peak = rows["peak of resident memory", None]
    assert peak["run_form_bytes"] == 2 * 64 * 64 // 2
    assert peak["bytes"] >= 0


def test_the_peak_of_memory_is_that_of_the_load(tmp_path):
    model = deployment_memory.packed_model(2, 2048)
    path = tmp_path / "model.sgsc"
    size = deployment_memory.save(model, path)
    peak = deployment_memory._peak(path, 2, 2048, size, model)
    both_forms = 2 * 2 * 2048 * 2048 // 2
    assert peak["layer_bytes"] == both_forms // 2
    # some pages lay free before the load; a float32 layer would be four times its packed forms
    assert 0.9 * both_forms < peak["bytes"] < 5 * both_forms


def test_claims_are_written_with_their_command(results):
    counts = {"convolution": 3, "network": 3 * len(deployment_networks.SMALL), "load": 3, "overhead": 2, "static": 3}
    for section, count in counts.items():
        found = [claim for claim in results["claims"] if claim["section"] == section]
        assert len(found) == count
        assert {claim["command"] for claim in found} == {f"python -m bench.deployment {section}"}


# ---- networks ----


@pytest.mark.parametrize("name", list(deployment_networks.SMALL))
def test_the_float_network_holds_the_packed_values(name):
    torch.manual_seed(0)
    network, x = deployment_networks.SMALL[name]()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    packed, plain = deployment_networks.compressed(network, deployment_networks.MIXED)
    torch.testing.assert_close(packed(x), plain(x))
    assert any(not torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    widths = torch.cat([m.bits for m in packed.modules() if isinstance(m, deployment_networks.PackedLayer)])
    assert set(widths.tolist()) == set(deployment_networks.MIXED)
    assert 3.5 < widths.float().mean() < 4.5


def test_numerics_are_those_asked_for():
    packed, _ = deployment_networks.convolution((4,), 16, 3, 1)
    x = torch.randn(1, 16, 5, 5)
    by = {n: deployment_networks.with_numerics(packed, n)(x) for n in ("exact", "int8")}
    assert torch.equal(by["exact"], packed(x))
    assert not torch.equal(by["exact"], by["int8"])


def test_resnet_20_has_its_layers():
    network, x = deployment_networks.NETWORKS["ResNet-20, 1 image"]()
    assert network(x).shape == (1, 10)
    threes = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(threes) == 19
    assert sum(m.weight.numel() for m in threes) == 267_696


# ---- who may be timed ----


def contender(found, allowed=1e-4):
    return Contender(lambda: lambda: found, torch.ones(3, dtype=torch.float64), allowed)


def refuse():
    raise ImportError("No module\nnamed 'x'")


def test_a_wrong_or_absent_contender_is_named_and_not_timed():
    runs = {
        **{"right": contender(torch.ones(3)), "wrong": contender(1.1 * torch.ones(3))},
        **{"nan": contender(torch.full((3,), torch.nan)), "shape": contender(torch.ones(1, 3))},
        "absent": Contender(refuse, torch.ones(3), 1.0),
    }
    rows = {row["by"]: row for row in deployment_timing.measured({"case": "c"}, runs, 0.0)}
    assert list(rows) == list(runs)
    assert rows["right"]["missing"] is None
    assert rows["right"]["microseconds"] > 0
    assert rows["wrong"]["missing"] == "wrong: error 0.1, may have 0.0001"
    assert rows["absent"]["missing"] == "ImportError: No module named 'x'"
    assert "wrong" in rows["nan"]["missing"]
    assert "wrong" in rows["shape"]["missing"]
    assert all(row["microseconds"] is None for by, row in rows.items() if by != "right")


def test_one_of_ours_that_fails_ends_the_bench():
    runs = {"right": contender(torch.ones(3)), "ours int8": Contender(refuse, torch.ones(3), 1.0)}
    with pytest.raises(ValueError, match=r"c, ours int8: ImportError: No module named 'x'; no speed is written"):
        deployment_timing.measured({"case": "c"}, runs, 0.0)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_an_exported_network_answers_from_its_package():
    network, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    with torch.inference_mode():
        torch.testing.assert_close(deployment_peers.exported(network, x)(), network(x))


@pytest.mark.parametrize("section", ["convolution", "network", "overhead"])
def test_no_speed_for_a_wrong_result_of_ours(section, monkeypatch):
    monkeypatch.setattr(deployment_peers, "COMPILER", "aot_eager")
    kept = Op.__call__
    monkeypatch.setattr(
        Op, "__call__", lambda self, *a: 2 * kept(self, *a) if "packed" in self.name else kept(self, *a)
    )
    with pytest.raises(ValueError, match=r"ours .*: error .*; no speed is written for it"):
        deployment.SECTIONS[section](0.0, True)


def test_no_speed_for_a_file_that_comes_back_as_another(monkeypatch):
    other = deployment_memory.packed_model(2, 64)
    other[1].data[5] ^= 1
    monkeypatch.setattr(deployment_memory, "load_into", lambda model, path: other)
    with pytest.raises(ValueError, match="load: what was loaded is not what was saved"):
        deployment_memory.measure_load(0.0, True)


def test_everyone_admitted_is_visited_as_itself():
    ran = []
    runs = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = deployment_timing.visited(runs, 0.0)
    assert {name: len(t) for name, t in times.items()} == dict.fromkeys("abc", deployment_timing.FEWEST)
    assert [name for name, _ in itertools.groupby(ran)] == list("abc") * (1 + deployment_timing.FEWEST)
    assert ran.count("a") > 2 * deployment_timing.FEWEST


# ---- claims ----


def row(case, by, microseconds, **more):
    return {
        "case": case,
        "threads": 1,
        "by": by,
        "microseconds": microseconds,
        "fastest_microseconds": microseconds,
        "missing": None if microseconds else "wrong: error 0.5, may have 0.04",
    } | more


def layer_rows(**changed):
    times = {"ours mixed exact": 8.0, "ours 8 bits exact": 9.0, "ours mixed int8": 4.0, "ours 8 bits int8": 4.5}
    times |= {"F.conv2d float32": 10.0, "onnxruntime float32": 3.0}
    times |= {"onnxruntime int8 ConvInteger": 9.0, "onnxruntime int8 QLinearConv": 5.0}
    return [row("a", by, t, batch=1) for by, t in times.items()] + [
        row("b", by, changed.get(by, t), batch=32) for by, t in times.items()
    ]


@pytest.mark.parametrize(
    ("by", "microseconds", "lost", "named"),
    [
        ("ours 8 bits exact", 10.1, 0, "F.conv2d float32"),
        ("ours mixed int8", 10.1, 1, "F.conv2d float32"),
        ("onnxruntime int8 ConvInteger", 4.4, 2, "ConvInteger"),
        ("onnxruntime int8 QLinearConv", 4.4, 2, "QLinearConv"),
    ],
)
def test_each_claim_about_layers_can_be_lost(by, microseconds, lost, named):
    assert all(claim["holds"] for claim in deployment.convolution_claims(layer_rows()))
    claims = deployment.convolution_claims(layer_rows(**{by: microseconds}))
    assert not claims[lost]["holds"]
    assert f"the worst is b, batch 32, threads 1, {'F' if lost < 2 else 'onnxruntime'}" in claims[lost]["claim"]
    assert claims[lost]["claim"].endswith(named)


def network_rows(**changed):
    times = {"ours eager exact": 9.0, "ours compiled exact": 8.5, "ours exported exact": 7.0}
    times |= {"ours eager int8": 4.0, "ours compiled int8": 6.0, "ours exported int8": 5.0}
    times |= {"torch float32 compiled": 8.0, "onnxruntime int8 static": 7.5, "torch int8 static": 9.0}
    return [row("a", by, changed.get(by, t)) for by, t in times.items()] + [row("b", by, t) for by, t in times.items()]


def test_each_claim_about_networks_can_be_lost():
    int8, exact, exact_to_float, *others = deployment.network_claims(network_rows())
    assert int8["measured"] == pytest.approx(7.5 / 4)
    assert exact["measured"] == pytest.approx(7.5 / 7)
    assert exact_to_float["measured"] == pytest.approx(8 / 7)
    assert len(others) == 3
    for by, microseconds, holds in (
        ("torch float32 compiled", 5.0, [True, False, False]),
        ("torch int8 static", 5.0, [True, False, True]),
        ("torch int8 static", 3.0, [False, False, True]),
    ):
        claims = deployment.network_claims(network_rows(**{by: microseconds}))
        assert [claim["holds"] for claim in claims] == [*holds, True, True, True]
        assert all(
            claim["claim"].endswith(f"the worst is a, threads 1, {by}") for claim in claims if not claim["holds"]
        )


def test_what_was_not_measured_is_not_claimed():
    """Not even where other cases were measured."""
    for cases in ("a", "b", "ab"):
        rows = [r for r in layer_rows() if not (r["case"] in cases and r["by"].startswith("onnxruntime int8"))]
        *others, against = deployment.convolution_claims(rows)
        assert (against["measured"], against["holds"]) == (None, False)
        assert f"; not measured {cases[0]}, batch" in against["claim"]
        assert all(claim["holds"] for claim in others)


def test_claims_name_who_is_missing():
    int8, exact, float32, *_ = deployment.network_claims(network_rows(**{"torch int8 static": None}))
    for claim in (int8, exact):
        assert claim["claim"].endswith(
            "; the worst is a, threads 1, onnxruntime int8 static; "
            "without torch int8 static (wrong: error 0.5, may have 0.04)"
        )
    assert "without" not in float32["claim"]
    rows = layer_rows(**{"onnxruntime int8 ConvInteger": None})
    (*_, layers) = deployment.convolution_claims(rows)
    assert "; without onnxruntime int8 ConvInteger in 1 of 2 cases (wrong: error" in layers["claim"]


def test_without_a_time_of_ours_nothing_is_claimed():
    rows = layer_rows()
    for changed in (
        [r for r in rows if not (r["case"] == "b" and r["by"].startswith("ours") and r["by"].endswith("int8"))],
        layer_rows(**{"ours mixed int8": None}),
    ):
        with pytest.raises(ValueError, match=r"int8, against .*: b, batch 32, threads 1 lacks a time of ours in int8"):
            deployment.convolution_claims(changed)


@pytest.mark.parametrize(("ratio", "need", "holds"), [(1.9, 1.0, [True, True]), (2.1, 1.2, [False, False])])
def test_claims_about_loading_can_be_lost(ratio, need, holds):
    rows = [{"what": "load_into", "threads": 1, "over_reading": ratio}, {"what": "peak of", "over_need": need}]
    assert [claim["holds"] for claim in deployment_memory.load_claims(rows)] == holds


def test_claims_about_calls_take_the_median_of_the_slower_numerics():
    times = {"torch": 9.0, "ours exact": 5.9, "ours int8": 4.0}
    rows = [row(case, by, t, fastest_microseconds=1.0) for case in ("Linear", "Conv2d") for by, t in times.items()]
    assert [claim["holds"] for claim in deployment_memory.overhead_claims(rows)] == [True, True]
    for i, holds in ((2, [False, True]), (4, [True, False])):
        changed = [r | {"microseconds": 6.1} if r is rows[i] else r for r in rows]
        claims = deployment_memory.overhead_claims(changed)
        assert [claim["holds"] for claim in claims] == holds
        assert [claim["claim"].split("packed ")[1].split(",")[0] for claim in claims] == ["Linear", "Conv2d"]


@pytest.mark.parametrize(
    ("changed", "holds"),
    [({}, [True, True, True]), ({"ours int8": 2.0}, [False, True, True]), ({"ours exact": 0.9}, [True, False, True])],
)
def test_claims_about_grids_take_the_median_name_the_worst_and_can_be_lost(changed, holds):
    times = {"torch float32": 1.0, "ours exact": 5.0, "ours int8": 3.0, "ours static int8": 3.0}
    rows = [row("a", by, t, error=1e-7) for by, t in times.items()]
    rows += [row("b", by, t, error=2e-7) for by, t in (times | changed).items()]
    claims = deployment_static.static_claims(rows)
    assert [claim["holds"] for claim in claims] == holds
    assert all(claim["claim"].endswith("is b") for claim, held in zip(claims, holds, strict=True) if not held)
    rows[-1]["error"] = 2e-6
    assert not deployment_static.static_claims(rows)[-1]["holds"]
    assert deployment_static.static_claims(rows)[-1]["measured"] == 2e-6


def test_a_grid_is_judged_by_the_rounded_input():
    layer, x = deployment_static.SMALL["Linear 32x32, 3 tokens"]()
    packed, plain = deployment_networks.compressed(layer, deployment_networks.MIXED)
    found = deployment_static.contenders(packed, plain, x)
    static, measured_anew = (found[name] for name in ("ours static int8", "ours int8"))
    assert deployment_timing.relative_error(static.make()(), static.exact) < 1e-6
    assert deployment_timing.relative_error(static.make()(), measured_anew.exact) > 1e-4
    assert deployment_timing.relative_error(measured_anew.make()(), static.exact) > static.allowed


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    for arguments, said in (
        (["--quick"], "name another folder with --results"),
        (["lode"], "sections lode are not known"),
    ):
        with pytest.raises(SystemExit, match="2"):
            deployment.main(arguments)
        assert said in capsys.readouterr().err
