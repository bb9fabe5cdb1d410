"""The other forms of a report: pictures, the file of the page, JSON, the terminal."""

from __future__ import annotations

import copy
import json

import pytest
from rich.console import Console

from sgsc.report import page as pages
from sgsc.report import pictures, summary, to_json, write_html
from tests.pages import INF, NAN, full_report, page_of, printed, rows_of, words_of

# ---- pictures


def pixels_of(uri):
    return [list(row) for row in rows_of(uri, colour=0, size=1)]


@pytest.mark.parametrize(
    ("picture", "pixels"),
    [
        ([[0.0, 0.5, 1.0]], [[0, 128, 255]]),
        ([[0, 16], [8, 4]], [[0, 255], [128, 64]]),
        ([[-1.0], [1.0]], [[0], [255]]),
        ([[7.0]], [[0]]),
        ([[NAN, 1.0, INF, 3.0, None]], [[0, 0, 0, 255, 0]]),
    ],
    ids=["grey", "integers", "negative", "one-value", "not-a-number"],
)
def test_a_picture_becomes_a_png(picture, pixels):
    assert pixels_of(pictures.png(picture)) == pixels


@pytest.mark.parametrize(
    "picture", [None, [], [[]], [[1.0], [1.0, 2.0]], "x", [1.0], [[NAN]], {"a": 1}, [["a"]]], ids=repr
)
def test_what_is_no_picture_is_said(picture, tmp_path):
    assert pictures.png(picture) is None
    report = {"changed": [{"split": "guard", "index": 1, "picture": picture}]}
    page = page_of(report, tmp_path)
    assert "<img" not in page
    assert "No picture or text was recorded." in words_of(page)


# ---- the file


def test_an_old_page_stays_when_rendering_fails(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    class Broken:
        def __format__(self, spec):
            raise RuntimeError("no text")

        __str__ = __repr__ = lambda self: self.__format__("")

    with pytest.raises(RuntimeError, match="no text"):
        write_html({"task": Broken()}, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_html(full_report(), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_page_replaces_the_old_one_after_it_is_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    seen = []
    monkeypatch.setattr(pages.os, "fsync", lambda descriptor: seen.append(path.read_text()))
    with path.open() as reader:
        write_html({}, path)
        assert reader.read() == "old"  # replaced by another file, not written over
    assert seen == ["old"]
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---- JSON


def test_json_is_strict_and_keeps_its_order():
    report = full_report() | {"float_loss": NAN, "packed_loss": -INF, "z": (1, 2), "a": {0: True}}
    text = to_json(report)

    def refuse(constant):
        raise AssertionError(constant)

    back = json.loads(text, parse_constant=refuse)
    assert list(back) == list(report)
    assert back["float_loss"] is None
    assert back["packed_loss"] is None
    assert back["z"] == [1, 2]
    assert back["a"] == {"0": True}
    assert back["history"] == report["history"]
    assert text.endswith("}\n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {1, 2}}, r"report\['a'\]: set cannot be written as JSON; allowed are"),
        ({"layers": [{"shape": b"x"}]}, r"report\['layers'\]\[0\]\['shape'\]: bytes cannot"),
        ({"a": {None: 1}}, r"report\['a'\]: dict cannot be written .* with text or integer keys"),
        ({"a": object()}, r"report\['a'\]: object cannot"),
    ],
    ids=["set", "bytes", "key", "object"],
)
def test_json_names_what_it_cannot_hold(value, message):
    with pytest.raises(ValueError, match=message):
        to_json(value)


def test_a_report_read_back_gives_the_same_page(tmp_path):
    report = full_report()
    assert page_of(json.loads(to_json(report)), tmp_path) == page_of(full_report(), tmp_path)


# ---- the terminal


@pytest.mark.parametrize("width", [80, 120])
def test_the_summary_holds_the_numbers(width):
    text = printed(full_report(), width)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= width
    assert "digits float packed" in lines
    whole = " ".join(lines)
    for expected in [
        "test accuracy 98.61 % 98.33 % -0.28 points, standard error 0.62",
        "test loss 0.0512 0.0634",
        "stored bytes 612,345 29,871 4.88 % of float (target 5.00 %)",
        "bits a weight 32 1.37",
        "channels 426 325 101 removed, 3 zeroed in place",
        "channels by bits 0 1 2 3 4 5 6 7 8 bytes of float",
        "conv1 2 . 4 14 9 2 . 1 . 214 18.58 %",
        "hidden 29 71 27 . . . 1 . . 9,731 3.71 %",
        "split samples regressions at most, 95 % same answer margin lost in tail",
        "preservation 200 0 1.49 % 99.50 % 3.92 %",
        "guard 270 2 2.31 % 98.77 % 2.93 %",
        "ran on cpu: C++ (avx2), 93.1 s in all",
        "Held: the file meets its size target",
    ]:
        assert expected in whole
    assert lines.index("conv1 2 . 4 14 9 2 . 1 . 214 18.58 %") < lines.index("guard 270 2 2.31 % 98.77 % 2.93 %")


@pytest.mark.parametrize("width", [74, 80])
def test_the_summary_survives_large_numbers_and_long_names(width):
    report = full_report()
    report["layers"][0] |= {"name": "transformer.blocks.11.attention.in_projection", "bytes": 123_456_789}
    report["layers"][0]["bits"] = {str(bits): 4096 for bits in range(9)}
    text = printed(report, width)
    assert text.count("4096") == 9
    assert "123,456,789" in text
    assert "…" not in text
    report["layers"][0]["name"] = "conv1"
    assert "123,456,789" in printed({"layers": report["layers"][:1]}, width)
    assert max(map(len, text.splitlines())) <= width


def test_the_summary_cuts_a_long_list_of_layers_and_says_so():
    report = full_report()
    report["layers"] = [copy.deepcopy(report["layers"][0]) | {"name": f"layer{i}"} for i in range(45)]
    text = printed(report, 80)
    assert "layer39" in text
    assert "layer40" not in text
    assert "... and 5 more" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_the_summary_prints_on_any_terminal(encoding, tmp_path):
    with (tmp_path / "out").open("w", encoding=encoding) as file:
        Console(file=file, width=80).print(summary(full_report()))
    assert "98.33 %" in (tmp_path / "out").read_text(encoding)
