"""The page of a report."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from sgsc.report import page as pages
from sgsc.report import plots, to_json, words
from tests.pages import HOSTILE, INF, NAN, SVG, elements_of, full_report, page_of, printed, words_of


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    return page_of(full_report(), tmp_path_factory.mktemp("report"))


@pytest.fixture
def no_plots(monkeypatch):
    """Leave out the slow part of a page."""
    monkeypatch.setattr(pages, "draw", lambda *_: {})


def set_every_leaf(value, leaf):
    if isinstance(value, dict):
        return {key: set_every_leaf(v, leaf) for key, v in value.items()}
    if isinstance(value, list):
        return [set_every_leaf(v, leaf) for v in value]
    return leaf(value)


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
