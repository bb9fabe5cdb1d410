"""`sgsc tune`: what it prints and stores, and what it refuses."""

import json

import pytest
import torch

from sgsc import tuning
from sgsc.artefact import save
from sgsc.cli import main
from sgsc.packed import pack
from sgsc.preparation import prepare

ROW = {
    **{"layers": ["a.sgsc: 0", "a.sgsc: [/b]\x1b[31m"], "dtype": "float16", "of": "tokens", "columns": 16},
    **{"heuristic_microseconds": 12.04, "microseconds": 9.96, "config": {"columns": 8}, "tried": 9, "failed": 0},
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of a Linear and a convolution, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(300, 24), "b": torch.nn.Conv2d(3, 8, 3)})
    save(pack(prepare(model).model, remove=False), tmp_path / "a.sgsc")
    return tmp_path / "a.sgsc"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_without_a_gpu_it_is_exit_code_2(file, more, capsys):
    pytest.importorskip("triton")
    assert main(["tune", str(file), *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "sgsc tune: tuning needs a GPU: there is none for 'cuda' here; run it on the one to tune for\n",
    )
    assert not (file.parent / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["tune"], 2, "required: FILE"),
        (["tune", "nowhere.sgsc"], 2, "nowhere.sgsc: No such file or directory; name another path"),
        (
            ["tune", "FILE", "--batches", "1,x"],
            2,
            "argument --batches: '1,x': want whole numbers with commas",
        ),
        (["tune", "FILE", "--batches", "0"], 2, "batches [0]: want numbers from 1 to 256"),
        (["tune", "FILE", "--pixels", "4097"], 2, "pixels [4097]: want numbers from 1 to 4096"),
        (["tune", "FILE", "--dtypes", "float64"], 2, "dtypes ['float64']: want some of float16, bfloat16, float32"),
        (["tune", "FILE", "damaged"], 1, "damaged: "),
    ],
)
def test_wrong_use_and_damaged_files(arguments, code, message, file, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.chdir(file.parent)
    (file.parent / "damaged").write_bytes(file.read_bytes()[:-1])
    try:
        found = main([file.name if a == "FILE" else a for a in arguments])
    except SystemExit as stop:  # argparse
        found = stop.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, "")
    assert message in err


def test_what_is_given_reaches_the_tuning(file, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(tuning, "tune", lambda layers, *given, **named: calls.append((layers, given, named)) or [])
    assert main(["tune", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    other = file.with_name("b.sgsc")
    other.write_bytes(file.read_bytes())
    assert main(["tune", str(file), str(other), "--batches", "2,3", "--pixels", "5", "--dtypes", "float16"]) == 0
    assert capsys.readouterr().out == ""
    (layers, given, named), (both, those, names) = calls
    assert list(layers) == [f"{file}: a", f"{file}: b"]
    assert [type(layer).__name__ for layer in layers.values()] == ["PackedLinear", "PackedConv2d"]
    assert list(both) == [f"{path}: {name}" for path in (file, other) for name in "ab"]
    assert (*given[0], *named["pixels"], *named["dtypes"]) == (*tuning.BATCHES, *tuning.PIXELS, *tuning.DTYPES)
    assert (those, names["pixels"], names["dtypes"]) == (([2, 3],), [5], ["float16"])


def test_a_line_a_product_or_one_document(file, monkeypatch, capsys):
    rows = [ROW, ROW | {"of": "pixels", "config": None}]
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: rows)
    assert main(["tune", str(file)]) == 0
    names = "a.sgsc: 0, a.sgsc: [/b]\N{REPLACEMENT CHARACTER}[31m"
    assert capsys.readouterr().out.splitlines() == [
        f"{names}, 16 tokens, float16: 12.0 -> 10.0 µs, {{'columns': 8}}",
        f"{names}, 16 pixels, float16: 12.0 -> 10.0 µs, the heuristic stays",
    ]
    assert main(["tune", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_a_file_is_tuned_without_its_network(file, monkeypatch, capsys):
    """From the file to the cache, with a clock for a GPU: later products find what was stored."""
    triton = pytest.importorskip("triton")
    from sgsc.kernels import run_form, triton_packed, triton_tables, triton_tuning
    from tests.kernels.test_tuning import Launches

    launches = Launches()
    monkeypatch.setattr(triton_packed, "_products", launches)
    monkeypatch.setattr(triton_packed, "INTERPRETED", triton.language.constexpr(True))
    monkeypatch.setitem(run_form.FORMS, "cpu", run_form.FRAGMENTS)
    monkeypatch.setattr(triton_tables, "_tables", {})
    monkeypatch.setattr(tuning, "_gpu", lambda device, interpreted: torch.device("cpu"))

    def replayed(run, words):
        run(words)
        return 1e-5 / launches.configs[-1].stages

    monkeypatch.setattr(triton_tuning, "replayed", replayed)
    assert main(["tune", str(file), "--batches", "1", "--pixels", "64", "--dtypes", "float16"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith(f"{file}: a, 1 tokens, float16: 3.3 -> 2.0 µs, {{'columns': ")
    assert second.startswith(f"{file}: b, 64 pixels, float16: 3.3 -> 2.0 µs, {{'columns': ")
    assert "tuning 2/2" in err
    here = triton_tables.gpu(None)
    table = triton_tables.read_table(triton_tables.cache_path(here), here)
    assert [key.x for key in table] == ["pixels", "tokens"]
    assert {config.stages for config in table.values()} == {5}
