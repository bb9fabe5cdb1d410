from __future__ import annotations

import base64
import copy
import html.parser
import itertools
import json
import math
import random
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zlib

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from sgsc.report import page as pages
from sgsc.report import pictures, plots, summary, to_json, words, write_html

NAN, INF = float("nan"), float("inf")
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=https://example.org onerror=alert(2)>[/bold]{{ 7 * 7 }}$x^$\x1b[31m\0\ud800"
)
EIGHT = ["00155100", "08a33a80", "0a9009a0", "03c88c30", "06caac60", "0c3003c0", "0b6006b0", "02bccb20"]
SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)


def layer(name, kind, shape, counts, size):
    rows, width = shape[0], math.prod(shape[1:])
    return {
        "name": name,
        "type": kind,
        "shape": shape,
        "bits": {str(bits): count for bits, count in counts.items()},
        "channels": rows,
        "removed": counts.get(0, 0),
        "bytes": size,
        "float_bytes": 4 * rows * width,
    }


def full_report():
    """Return what a run on digits would write; the numbers are made up, their shape is not."""
    noise = random.Random(0)
    history = []
    for i in range(121):
        target = max(0.05, 0.27 * 0.974**i)
        dip = 0.012 * math.exp(-((i - 62) ** 2) / 40)
        history.append(
            {
                "step": 25 * i,
                "size": target * (1 + 0.06 * math.exp(-i / 30) + noise.uniform(-0.01, 0.01)) if i < 118 else 0.0488,
                "target": target,
                "accuracy": 0.985 - dip + noise.uniform(-0.002, 0.002),
                "loss": 0.08 + 0.5 * dip + noise.uniform(0, 0.01),
                "preservation_loss": 0.02 * (1 - math.exp(-i / 25)) + 2 * dip + noise.uniform(0, 0.002),
                "size_weight": 0.1 * i,
                "regressions": 2 if 60 <= i <= 63 else 0,
            }
        )
    picture = [[int(c, 16) / 13 for c in row] for row in EIGHT]
    return {
        "task": "digits",
        "sources": "scikit-learn 1.7.2 load_digits: 1,797 pictures of 8 × 8, split by seed",
        "seed": 0,
        "target_size": 0.05,
        "tolerance": 0.0,
        "float_accuracy": 0.9861,
        "packed_accuracy": 0.9833,
        "accuracy_standard_error": 0.0062,
        "float_loss": 0.0512,
        "packed_loss": 0.0634,
        "float_bytes": 612345,
        "stored_bytes": 29871,
        "stored_ratio": 0.04878,
        "nominal_bytes": 26127,
        "bits_per_weight": 1.37,
        "channels": 426,
        "channels_removed": 101,
        "channels_zeroed_in_place": 3,
        "preservation": {
            "samples": 200,
            "regressions": 0,
            "upper_bound_95": 0.014867,
            "agreement": 0.995,
            "margin_float": 0.6231,
            "margin_packed": 0.5987,
            "regressions_by_class": {},
            "reasons": {"hard": 50, "uncertain": 50, "salient": 50, "representative": 50},
        },
        "guard": {
            "samples": 270,
            "regressions": 2,
            "upper_bound_95": 0.023137,
            "agreement": 0.98765,
            "margin_float": 0.9411,
            "margin_packed": 0.9135,
            "regressions_by_class": {"0": 0, "3": 1, "8": {"samples": 27, "regressions": 1, "upper_bound_95": 0.16397}},
            "reasons": {},
        },
        "tolerance_held": True,
        "target_held": True,
        "reason": "",
        "backend": "cpu: C++ (avx2)",
        "backends": {
            "packed_linear": "cpu: C++ (avx2)",
            "packed_conv2d": "cpu: C++ (scalar)",
            "fake_quantize": "cpu: PyTorch (SGSC_NO_EXT=1)",
        },
        "seconds": 93.14,
        "seconds_by_phase": {"float training": 21.4, "selection": 1.2, "compression": 67.3, "certification": 3.24},
        "commit": "abc1234",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "sgsc": "0.1.0"},
        "machine": "Intel Xeon Platinum 8259CL, 2 cores, 7.6 GiB",
        "file": "model.sgsc",
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "layers": [
            layer("conv1", "QuantConv2d", [32, 1, 3, 3], {0: 2, 2: 4, 3: 14, 4: 9, 5: 2, 7: 1}, 214),
            layer("blocks.0.conv", "QuantConv2d", [64, 32, 3, 3], {0: 12, 1: 11, 2: 30, 3: 11}, 8123),
            layer("blocks.1.conv", "QuantConv2d", [64, 64, 3, 3], {0: 27, 1: 19, 2: 16, 3: 2}, 6871),
            layer("blocks.1.downsample.projection", "QuantConv2d", [128, 64, 1, 1], {0: 31, 1: 60, 2: 36, 3: 1}, 1934),
            layer("hidden", "QuantLinear", [128, 512], {0: 29, 1: 71, 2: 27, 6: 1}, 9731),
            layer("classify", "QuantLinear", [10, 128], {3: 1, 4: 6, 5: 2, 8: 1}, 688),
        ],
        "left_float": [
            {"name": "norm1", "why": "batch norm follows a residual sum and cannot be folded", "bytes": 512},
            {"name": "classify.bias", "why": "biases are stored as float32", "bytes": 40},
        ],
        "history": history,
        "events": [
            {"step": 1525, "what": "guard", "text": "2 regressions; gave 12 bits back to 7 channels"},
            {"step": 1600, "what": "guard", "text": "1 regression; revived channel 17 of hidden"},
            {"step": 2950, "what": "target", "text": "reached 5.00 % of the float bytes"},
        ],
        "changed": [
            {
                "split": "guard",
                "index": 17,
                "target": "8",
                "float_answer": "8",
                "packed_answer": "3",
                "picture": picture,
            },
            {
                "split": "guard",
                "index": 203,
                "target": "3",
                "float_answer": "3",
                "packed_answer": "8",
                "picture": [row[::-1] for row in picture[::-1]],
            },
            {
                "split": "test",
                "index": 91,
                "target": "e",
                "float_answer": "e",
                "packed_answer": "a",
                "text": "def read(self, size=-1):\n    if size is None or size < 0:\n        return self.r",
            },
        ],
    }


def page_of(report, tmp_path):
    path = tmp_path / "report.html"
    write_html(report, path)
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    return page_of(full_report(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def no_plots(monkeypatch):
    """Leave out the slow part of a page."""
    monkeypatch.setattr(pages, "draw", lambda *_: {})


def words_of(page):
    """Return what a person reads: the text of the body, whitespace collapsed."""
    collector = Reader()
    collector.feed(page)
    return " ".join(" ".join(collector.words).split())


class Reader(html.parser.HTMLParser):
    """Collects text and elements, and that every element is closed in order."""

    VOID = {"meta", "br", "img", "hr", "link", "input"}

    def __init__(self):
        super().__init__()
        self.words, self.elements, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data)


def elements_of(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader.elements


def printed(report, width):
    console = Console(width=width, file=None, record=True, quiet=False, color_system=None)
    with console.capture() as capture:
        console.print(summary(report))
    return capture.get()


def set_every_leaf(value, leaf):
    if isinstance(value, dict):
        return {key: set_every_leaf(v, leaf) for key, v in value.items()}
    if isinstance(value, list):
        return [set_every_leaf(v, leaf) for v in value]
    return leaf(value)


# ---- the page


def test_the_page_says_every_number(full_page):
    words = words_of(full_page)
    for expected in [
        "digits, at 4.88 % of its float size",
        "Held the file meets its size target",
        "98.33 %",
        "Float: 98.61 %; change -0.28 points, standard error 0.62.",
        "Loss: 0.0634, float 0.0512.",
        "29,871 bytes",
        "In float32: 612,345 bytes.",
        "The target was 5.00 %.",
        "1.37",
        "26,127 bytes (nominal size)",
        "101 Of 426 channels.",
        "needs the slot: 3.",
        "Of 270 samples never trained on",
        "at most 2.31 % of such samples",
        "Of 200 samples whose answers were to survive. Tolerance: 0.00 %.",
        "93.1 s",
        "conv1 QuantConv2d 32 × 1 × 3 × 3 32 2 3.22 214 1,152 18.58 %",
        "norm1 batch norm follows a residual sum and cannot be folded 512",
        "preservation 200 0 1.49 % 99.50 % 0.6231 0.5987",
        "guard 270 2 2.31 % 98.77 % 0.9411 0.9135",
        "Class preservation guard 3 0 1 8 0 1 of 27, at most 16.40 %",
        "hard 50, uncertain 50, salient 50, representative 50.",
        "1,525 guard 2 regressions; gave 12 bits back to 7 channels",
        "8 → 3 , right is 8 guard 17",
        "if size is None or size < 0",
        "packed_conv2d cpu: C++ (scalar)",
        "torch 2.13.0",
        "Time, compression 67.3 s",
        "sgsc compress digits --target-size 0.05 --tolerance 0.0 --seed 0",
        "Seed 0 Commit abc1234 File model.sgsc SHA-256 9f86d081",
    ]:
        assert expected in words
    assert "not recorded" not in words
    assert "not a number" not in words


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ((True, True), "Held"),
        ((False, True), "Not held: size target"),
        ((True, False), "Not held: preservation tolerance"),
        ((False, False), "Not held: size target and preservation tolerance"),
        ((None, True), "Not judged"),
        ((True, None), "Not judged"),
        ((None, False), "Not held: preservation tolerance"),
    ],
)
def test_the_verdict(held, expected, tmp_path, no_plots):
    report = full_report() | {"target_held": held[0], "tolerance_held": held[1], "reason": "stopped at 6.1 %"}
    page = page_of(report, tmp_path)
    banner = re.search(r'<div class="verdict (\w+)" role="status"><strong>(.*?)</strong><p>(.*?)</p>', page)
    assert banner is not None
    state, headline, why = banner.groups()
    assert headline == expected
    assert state == {"Held": "held", "Not judged": "open"}.get(expected, "missed")
    assert (why == "stopped at 6.1 %") == (state == "missed")
    assert f"{expected}: {why}"[:70] in printed(report, 200)


@pytest.mark.parametrize("report", [{}, {"task": "digits", "preservation": None, "guard": None, "history": None}])
def test_a_minimal_report(report, tmp_path):
    page = page_of(report, tmp_path)
    elements_of(page)
    words = words_of(page)
    assert "Not judged" in words
    assert "No history of steps was recorded." in words
    assert "No layers were recorded." in words
    assert "Of not recorded samples never trained on" in words
    assert "None" not in words.replace("None was recorded.", "")
    assert "not recorded" in printed(report, 80)
    assert json.loads(to_json(report)) == report


SCALARS = [key for key, value in full_report().items() if not isinstance(value, (dict, list))]
PARTS = [key for key in full_report() if key not in SCALARS]


@pytest.mark.parametrize("keys", [SCALARS, *([key] for key in PARTS)], ids=lambda keys: keys[0])
def test_any_key_may_be_missing(keys, no_plots):
    null = full_report() | dict.fromkeys(keys)
    absent = {key: value for key, value in full_report().items() if key not in keys}
    for report in (null, absent):
        elements_of(pages.render(report))
        printed(report, 80)
    assert pages.render(null) == pages.render(absent)


@pytest.mark.parametrize("part", PARTS)
def test_any_key_of_a_part_may_be_missing(part, no_plots):
    value = full_report()[part]
    elements_of(pages.render({part: [{}] if isinstance(value, list) else {}}))
    printed({part: [{}] if isinstance(value, list) else {}}, 80)


def test_the_page_asks_nothing_of_the_network(full_page):
    assert "//" not in full_page.replace("http://www.w3.org/2000/svg", "")
    tags = {tag for tag, _ in elements_of(full_page)}
    assert not tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "image",
        "foreignobject",
    }
    for _, attributes in elements_of(full_page):
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert attributes.get("xlink:href") is None
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"url\((?!#)|@import|image-set", full_page) == []
    policy = next(a["content"] for _, a in elements_of(full_page) if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.split("; ") == ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"]


def test_hostile_text_stays_text(tmp_path):
    report = set_every_leaf(full_report(), lambda value: HOSTILE if isinstance(value, str) else value)
    report["versions"] = {HOSTILE: HOSTILE}
    report["guard"]["regressions_by_class"] = {HOSTILE: 1}
    page = page_of(report, tmp_path)
    elements = elements_of(page)
    assert "script" not in {tag for tag, _ in elements}
    assert len([tag for tag, _ in elements if tag == "img"]) == 2
    assert all(name != "onerror" for _, attributes in elements for name in attributes)
    assert "<script" not in page
    assert "alert(1)" in words_of(page)
    assert "{{ 7 * 7 }}" in words_of(page)
    assert not set("\x00\x1b\ud800") & set(page)
    for svg in SVG.findall(page):
        ElementTree.fromstring(svg)
    text = "".join(printed(report, 120).split())
    assert "[/bold]" in text
    assert "\x1b" not in text
    assert json.loads(to_json(report))["task"] == HOSTILE


@pytest.mark.parametrize("bad", [NAN, -INF], ids=str)
def test_what_is_not_a_number_is_said(bad, tmp_path):
    report = set_every_leaf(full_report(), lambda value: bad if isinstance(value, float) else value)
    page = page_of(report, tmp_path)
    for svg in SVG.findall(page):
        ElementTree.fromstring(svg)
    assert not {"nan", "inf", "NaN"} & set(re.findall(r"[A-Za-z]+", page))
    assert "Test accuracy, packed not a number" in words_of(page)
    assert "not a number" in printed(report, 80)
    assert json.loads(to_json(report))["packed_accuracy"] is None


def line_of(report, plot="size"):
    svg = plots.draw(report)[plot]
    assert "nan" not in svg
    return max(re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--accent\)', svg), key=len)


@pytest.mark.parametrize("bad", [-INF, 1e308, "fast"], ids=str)
def test_a_gap_in_the_history_leaves_the_rest_of_the_line(bad):
    report = full_report()
    report["history"] = report["history"][:20]
    if bad == "fast":
        assert line_of(report).count("M") == 1
    report["history"][10] |= {"size": bad, "accuracy": bad, "preservation_loss": bad}
    assert line_of(report).count("M") == 2


def test_what_is_measured_at_some_checks_is_a_line_through_them():
    report = full_report()
    report["history"] = [row for row in report["history"] if "accuracy" in row][:20]
    for row in report["history"][1::2]:
        del row["accuracy"]
    assert (line_of(report, "quality").count("M"), line_of(report, "quality").count("L")) == (1, 9)


@pytest.mark.parametrize("losses", [(0.3, 0.8), (2.2, 3.0), (1e-5, 1.0)])
def test_a_logarithmic_axis_has_numbers(losses):
    figure = Figure()
    axes = figure.subplots()
    axes.plot(losses)
    plots.logarithmic(axes)
    figure.draw_without_rendering()
    labels = [t.get_text() for t in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))]
    low, high = axes.get_ylim()
    assert len([text for text in labels if text and low <= float(text) <= high]) >= 2


def test_without_a_target_a_step_the_final_one_is_drawn():
    report = full_report()
    constant = [row | {"target": report["target_size"]} for row in report["history"]]
    absent = [{key: value for key, value in row.items() if key != "target"} for row in constant]
    assert plots.draw(report | {"history": absent}) == plots.draw(report | {"history": constant})


def test_one_step_and_no_steps_are_plotted():
    report = full_report()
    report["history"] = report["history"][:1]
    assert set(plots.draw(report)) == {"size", "quality"}
    assert plots.draw(report | {"history": [{"step": NAN}, {}, "x"]}) == {}


def test_every_figure_is_there_and_parses(full_page):
    figures = re.findall(r"<figure.*?</figure>", full_page, re.DOTALL)
    assert len(figures) == 4 + 3  # size, quality, trade-off, bits; samples that changed
    assert all("<figcaption>" in figure for figure in figures)
    trees = [ElementTree.fromstring(svg) for svg in SVG.findall(full_page)]
    assert len(trees) == 3 + len(words.WIDTHS) + 6
    ids = [element.get("id") for tree in trees for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    pointed = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', full_page))
    assert {a or b for a, b in pointed} <= set(ids)
    text = ["".join(element.itertext()).strip() for element in trees[0].iter() if element.tag.endswith("text")]
    assert {"step", "share of the float size", "size", "target", "guard"} <= set(text)
    text = ["".join(element.itertext()).strip() for element in trees[1].iter() if element.tag.endswith("text")]
    assert {"step", "accuracy", "preservation loss"} <= set(text)


def test_plots_take_the_colours_of_the_page():
    for svg in plots.draw(full_report()).values():
        drawn = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg))
        assert drawn <= {"none", "currentColor", *plots.THEME.values()}
        assert not re.search(r"#0101", svg)
        assert "var(--" in svg


def test_guard_events_are_marked_and_others_are_not():
    report = full_report()
    with_guard, without = (plots.draw(report | {"events": e})["size"] for e in (report["events"], report["events"][2:]))
    marks = [len(re.findall(r"<use ", svg)) for svg in (with_guard, without)]
    assert marks[0] == marks[1] + 3  # two events and the legend


def test_the_bars_show_the_counts(full_page):
    bars = [ElementTree.fromstring(svg) for svg in SVG.findall(full_page) if 'role="img"' in svg]
    assert [bar.get("aria-label") for bar in bars][1] == (
        "blocks.0.conv: 12 channels at 0 bits, 11 channels at 1 bit, 30 channels at 2 bits, 11 channels at 3 bits"
    )
    for bar, row in zip(bars, full_report()["layers"], strict=True):
        pieces = [e for e in bar if e.tag.endswith("rect")]
        end = 0.0
        for piece in pieces:
            assert float(piece.get("x").rstrip("%")) == pytest.approx(end, abs=0.002)
            share = float(piece.get("width").rstrip("%"))
            width = piece.get("class").removeprefix("w")
            assert share == pytest.approx(100 * row["bits"][width] / row["channels"], abs=0.002)
            end += share
        assert end == pytest.approx(100, abs=0.01)


def test_the_same_report_gives_the_same_page(full_page, tmp_path):
    assert page_of(full_report(), tmp_path) == full_page


def test_rendering_leaves_the_report_and_the_style_of_the_caller(full_page, tmp_path, monkeypatch):
    monkeypatch.setitem(mpl.rcParams, "axes.titlecolor", "red")
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 30.0)
    before, report = dict(mpl.rcParams), full_report()
    page = page_of(report, tmp_path)
    assert dict(mpl.rcParams) == before
    assert report == full_report()
    monkeypatch.undo()
    assert page == full_page


def test_plotting_is_imported_only_to_plot():
    code = "import sys, sgsc.report as r; r.summary({}); r.page.render({}); print('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_markup_serves_screen_readers(full_page):
    elements = elements_of(full_page)
    assert ("html", {"lang": "en"}) in elements
    assert all(a.get("scope") in ("col", "row") for tag, a in elements if tag == "th")
    assert all(a.get("alt") for tag, a in elements if tag == "img")
    assert all(a.get("aria-hidden") or a.get("aria-label") for tag, a in elements if tag == "svg")
    levels = [int(tag[1]) for tag, _ in elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for tag, a in elements if tag == "section"} <= set(ids)


def test_answers_that_are_not_finite_are_told(tmp_path, no_plots):
    report = full_report()
    report["guard"]["non_finite"] = 4
    told = "4 samples of the guard split made the packed network return NaN or infinity;"
    assert told in words_of(page_of(report, tmp_path))
    report["guard"]["non_finite"] = 0
    assert "return NaN" not in words_of(page_of(report, tmp_path))


def test_only_so_many_samples_are_drawn(tmp_path, no_plots):
    report = full_report()
    report["changed"] = report["changed"][:1] * 75
    page = page_of(report, tmp_path)
    assert page.count("<img ") == 60
    assert "The first 60 of 75;" in words_of(page)


# ---- pictures


def pixels_of(uri):
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">2I5B", chunks[b"IHDR"])
    assert rest == [8, 0, 0, 0, 0]
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (width + 1)
    rows = [raw[i : i + width + 1] for i in range(0, len(raw), width + 1)]
    assert all(row[0] == 0 for row in rows)
    return [list(row[1:]) for row in rows]


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


def test_a_report_read_back_gives_the_same_page(full_page, tmp_path):
    report = full_report()
    assert page_of(json.loads(to_json(report)), tmp_path) == full_page


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
