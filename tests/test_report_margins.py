"""The page and the terminal on margins: by class, in the hard tail, and what the certificate says of them."""

import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from sgsc import cli
from sgsc.comparison import compare
from sgsc.config import CompressionConfig, from_arguments
from sgsc.report import margins, page
from sgsc.report.words import command
from tests.pages import HOSTILE, SVG, elements_of, full_report, printed, words_of

NAN, INF = float("nan"), float("inf")


def part(samples, regressions, before, after):
    return {
        **{"samples": samples, "regressions": regressions, "margin_float": before, "margin_packed": after},
        **{"share": regressions / samples if samples else 0.0, "margin_lost": 1 - after / before if before else 0.0},
    }


def split(**more):
    classes = {"3": part(27, 1, 0.9, 0.8), "8": part(26, 0, 0.8, 0.76), "9": part(0, 0, 0.0, 0.0)}
    return {
        **{"samples": 60, "float_right": 53, "regressions": 1, "margin_float": 0.85, "margin_packed": 0.78},
        **{"by_class": classes, "tail": part(6, 1, 0.5, 0.25), "worst_class": {"name": "3", **classes["3"]}},
        "regressions_by_class": {"3": 1, "8": 0, "9": 0},
        **more,
    }


@pytest.fixture
def render(monkeypatch):
    """Pages without the slow plots."""
    monkeypatch.setattr(page, "draw", lambda *_: {})
    return page.render


def rows_of(html, name="guard"):
    """The drawn rows of one split: label, centres of the marks by kind, their line."""
    figure = re.search(rf'<figure role="group" aria-label="Margins on the {name} split">.*?</figure>', html, re.DOTALL)
    assert figure is not None
    rows = []
    for text in SVG.findall(figure[0]):
        svg = ElementTree.fromstring(text)
        marks = {e.get("class"): float(e.get("cx").rstrip("%")) for e in svg if e.tag.endswith("circle")}
        moved = [(e.get("x1"), e.get("x2")) for e in svg if e.get("class") == "moved"]
        rails = [float(e.get("x1").rstrip("%")) for e in svg if e.get("class") == "rail"]
        rows.append((svg.get("aria-label"), marks, moved, rails))
    return rows


def test_each_part_is_drawn_and_said(render):
    html = render({"guard": split()})
    elements_of(html)
    words = words_of(html)
    for expected in (
        "all 0.850 → 0.780 1 of 53",
        "hard tail 0.500 → 0.250 1 of 6",
        "class 3 0.900 → 0.800 1 of 27",
        "class 8 0.800 → 0.760 0 of 26",
        "Mean margin from 0.25 to 1;",
        "Worst class: 3 , 1 of 27 regressed (3.70 %), 11.11 % of its margin lost.",
        "1 class left out: fared better, or float had none of it right.",
    ):
        assert expected in words
    assert "class 9" not in words  # float had none right
    assert "Margins on the preservation split" not in html
    assert "Regressions by class" not in words


def test_marks_stand_at_their_values_on_one_scale(render):
    html = render({"guard": split(), "preservation": split(tail=part(6, 0, 0.9, 0.6))})
    label, marks, moved, _ = rows_of(html)[1]
    assert label == "hard tail: mean margin, float 0.500, packed 0.250"

    def place(value):  # from 0.25 to 1
        return pytest.approx(2 + 96 * (value - 0.25) / 0.75, abs=0.006)

    assert marks == {"before": place(0.5), "after": place(0.25)}
    assert [float(x.rstrip("%")) for x in moved[0]] == [place(0.5), place(0.25)]
    assert rows_of(html, "preservation")[1][1] == {"before": place(0.9), "after": place(0.6)}


def test_margins_near_1_are_told_apart_and_negative_ones_have_a_zero(render):
    near = split(by_class={"0": part(3, 0, 0.99, 0.97)}, tail=part(1, 0, 0.97, 0.9))
    (_, marks, _, _), *_ = rows_of(render({"guard": near}))
    assert "from 0.75 to 1" in words_of(render({"guard": near}))
    assert marks["before"] - marks["after"] > 20
    beyond = rows_of(render({"guard": split(tail=part(1, 0, 5.0, -7.0))}))[1]
    assert beyond[1] == {"before": 98, "after": 2}
    below = split(tail=part(6, 4, 0.5, -0.3))
    html = render({"guard": below})
    assert "from -0.5 to 1" in words_of(html)
    _, marks, _, rails = rows_of(html)[1]
    assert marks["after"] < 2 + 96 * 0.5 / 1.5 == rails[1] < marks["before"]


def test_of_many_classes_the_worst_are_shown(render):
    classes = {str(i): part(10, int(i == 5), 0.9, 0.9 - 0.01 * i) for i in range(30)}
    html = render({"guard": split(by_class=classes)})
    shown = [label.split(":")[0] for label, *_ in rows_of(html)]
    assert shown == ["all", "hard tail", "class 5", *(f"class {i}" for i in range(29, 10, -1))]
    assert "10 classes left out: fared better" in words_of(html)
    few = {str(i): part(10, int(i == 19), 0.9, 0.8) for i in range(20)}
    assert [label.split(":")[0] for label, *_ in rows_of(render({"guard": split(by_class=few)}))][2] == "class 0"


def test_classes_have_names_where_they_were_recorded(render):
    report = {"guard": split(), "class_names": {"3": " ", "8": "cat"}}
    words = words_of(render(report))
    assert "class ␣" in words
    assert "class cat" in words
    assert "Worst class: ␣ ," in words
    assert "worst class, guard: ␣, 1 of 27 regressed" in printed(report, 80)


def test_what_compare_found_is_what_is_shown(render):
    torch.manual_seed(0)
    truth = torch.randint(4, (200,))
    before = 3 * torch.nn.functional.one_hot(truth, 4) + torch.randn(200, 4)
    found = compare(before, before + 0.8 * torch.randn(200, 4), truth)
    words = words_of(render({"guard": found.as_dict()}))
    assert found.regressions > 0
    for name, shown in {"all": found.whole, "hard tail": found.tail, "class 2": found.by_class["2"]}.items():
        arrow = f"{shown.margin_float:.3f} → {shown.margin_packed:.3f}"
        assert f"{name} {arrow} {shown.regressions} of {shown.samples}" in words
    assert f"Worst class: {found.worst_class} ," in words


def test_hostile_classes_stay_text(render):
    hostile = {HOSTILE: part(2, 1, 0.5, 0.2)}
    worst = {"name": HOSTILE, **hostile[HOSTILE]}
    report = {"guard": split(by_class=hostile, worst_class=worst), "class_names": {"3": HOSTILE}}
    for shown in (report, {"guard": split(), "class_names": {"3": HOSTILE}}):
        html = render(shown)
        assert "script" not in {tag for tag, _ in elements_of(html)}
        assert "<script" not in html
        assert not set("\x00\x1b\ud800") & set(html)
        for svg in SVG.findall(html):
            ElementTree.fromstring(svg)
        assert "\x1b" not in printed(shown, 120)
        assert words_of(html).count("alert(1)") == 2  # its row and the worst class


@pytest.mark.parametrize("bad", [None, NAN, INF, -INF, 1e308, 10**400, "many", True, [], {}], ids=repr)
def test_values_that_are_none_leave_a_gap(bad, render):
    broken = dict.fromkeys(("samples", "regressions", "margin_float", "margin_packed", "share", "margin_lost"), bad)
    html = render({"guard": split(by_class={"0": broken, **{str(i): broken for i in range(40)}}, tail=broken)})
    for svg in SVG.findall(html):
        assert not re.search(r"nan|inf%", ElementTree.fromstring(svg).get("viewBox", "") + svg)
    label, marks, moved, _ = rows_of(html)[1]
    assert (marks, moved) == ({}, [])
    assert label.startswith("hard tail: mean margin, float ")


@pytest.mark.parametrize("bad", [None, [], "x", 3, {"0": 1}, {"0": None}], ids=repr)
@pytest.mark.parametrize("key", ["by_class", "tail", "worst_class"])
def test_parts_of_another_shape_do_not_stop_a_page(key, bad, render):
    elements_of(render({"guard": split(**{key: bad})}))
    printed({"guard": split(**{key: bad})}, 80)


def test_an_older_report_keeps_its_table(render):
    html = render(full_report())
    assert "Margins, by class" not in words_of(html)
    assert "Regressions by class" in words_of(html)
    assert margins.figures(full_report(), {}) == {}


def test_the_cards_say_the_margins(render):
    words = words_of(render(full_report()))
    assert "at most 2.31 % of such samples. Mean margin 0.941, packed 0.913." in words
    assert "Tolerance: 0.00 %. Mean margin 0.623, packed 0.599." in words
    assert "Mean margin 0" not in words_of(render({"guard": {"samples": 3, "margin_float": 0.5}}))
    assert "Tolerance: 0.00 %; of the margin 5.00 % may be lost." in words_of(
        render(full_report() | {"margin_tolerance": 0.05})
    )


def test_the_terminal_says_how_much_is_lost():
    lines = [" ".join(line.split()) for line in printed({"guard": split()}, 80).splitlines()]
    assert next(line for line in lines if line.startswith("guard 60")).endswith("8.24 % 50.00 %")
    assert "worst class, guard: 3, 1 of 27 regressed" in lines
    calm = split(worst_class={"name": "3", **part(27, 0, 0.9, 0.8)})
    assert "worst class" not in printed({"guard": calm}, 80)


def test_the_statement_of_the_certificate_is_quoted(render):
    html = render({"statement": f"Of 3 samples {HOSTILE}."})
    assert "<blockquote>Of 3 samples &lt;script&gt;" in html
    assert "<blockquote>" not in render({})


@pytest.mark.parametrize("cut", [True, False])
def test_the_command_that_repeats_a_run_is_one(cut):
    config = CompressionConfig(target_size=0.05, steps=300, tolerance=0.01, cut=cut)
    report = {"task": "digits", "settings": {"config": config.as_dict(), "samples": 200, "quantizer": "half-steps"}}
    report["settings"] |= {"precision": "bfloat16", "weight_decay": 0.01}
    report |= {"limit": None, "data": "a b", "device": "cpu", "float_steps": 50}
    options = cli._parser().parse_args(shlex.split(command(report))[1:])
    assert from_arguments(CompressionConfig, options) == config
    assert (options.task, options.samples, options.quantizer, options.device) == ("digits", 200, "half-steps", "cpu")
    assert (options.data, options.limit, options.float_steps) == (Path("a b"), None, 50)
    assert (options.precision, options.start) == ("bfloat16", None)
    started = cli._parser().parse_args(shlex.split(command(report | {"float_steps": 0, "start": "x.safetensors"}))[1:])
    assert (started.float_steps, started.start) == (None, Path("x.safetensors"))


def test_settings_are_listed_and_repeated_by_the_command(render):
    settings = {"config": {"target_size": 0.05, "steps": 300, "seed": 7}, "task": "digits", "samples": 200, "x": "<b>"}
    report = {"task": "digits", "target_size": 0.05, "settings": settings, "limit": 64, "data": "a b"}
    words = words_of(render(report))
    wanted = "sgsc compress digits --target-size 0.05 --seed 7 --steps 300 --samples 200 --limit 64 --data 'a b'"
    assert wanted in words
    assert "Settings target_size 0.05 steps 300 seed 7 task digits samples 200 x <b>" in words
    assert "Settings" not in words_of(render({"settings": None}))
    assert "Settings" not in words_of(render({"settings": [1]}))
