"""Size against quality: within a run, and among the runs beside it."""

import json
import math
import re

import pytest

from sgsc import cli
from sgsc.report import beside, page, plots, runs_beside, to_json, write_html
from tests.pages import HOSTILE, INF, NAN, SVG, elements_of, full_report, words_of


def run(**more):
    return {
        **{"task": "digits", "data": None, "limit": None, "float_bytes": 612345, "seed": 0, "target_size": 0.1},
        **{"stored_bytes": 60000, "stored_ratio": 0.098, "bits_per_weight": 2.5, "packed_accuracy": 0.985},
        **{"packed_loss": 0.06, "target_held": True, "tolerance_held": True, "guard": {"regressions": 1}},
        **more,
    }


def write(folder, report):
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report if isinstance(report, str) else to_json(report))
    return folder


@pytest.fixture
def render(monkeypatch):
    monkeypatch.setattr(page, "draw", lambda *_: {})
    return page.render


# the front


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([], []),
        ([(0.2, 0.9)], [(0.2, 0.9)]),
        ([(0.2, 0.9), (0.1, 0.8), (0.3, 0.9), (0.4, 0.95)], [(0.1, 0.8), (0.2, 0.9), (0.4, 0.95)]),
        ([(0.1, 0.9), (0.2, 0.8), (0.3, 0.7)], [(0.1, 0.9)]),
        ([(0.1, 0.7), (0.1, 0.9), (0.1, 0.8)], [(0.1, 0.9)]),
        ([(0.1, NAN), (0.2, 0.5)], [(0.2, 0.5)]),
    ],
    ids=["none", "one", "mixed", "smallest-wins", "same-size", "gap"],
)
def test_the_front_is_what_no_other_beats_in_both(points, best):
    assert plots.front(points, 1) == best
    assert plots.front([(x, -y) for x, y in points], -1) == [(x, -y) for x, y in best]


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def marks(svg, colour):
    """Markers drawn in a colour of the theme."""
    return len(re.findall(rf"<use [^>]*{re.escape(plots.THEME[colour])}", svg))


def test_every_check_is_a_point_of_the_trade_off():
    report = full_report()
    report["history"] = [
        {"step": i, "size": size, "accuracy": accuracy, "loss": loss}
        for i, (size, accuracy, loss) in enumerate(
            [(0.25, 0.99, 0.05), (0.1, 0.97, 0.08), (0.08, 0.98, 0.09), (0.05, None, 0.12), (0.0, 0.5, 0.5)]
        )
    ]
    svg = plots.draw(report)["tradeoff"]
    assert {"check", "front", "accuracy", "loss", "5%", "10%", "20%"} <= set(texts(svg))
    # accuracy: 3 checks, front of 2; loss: 4 and 4; the legend has one of each. A size of 0 is no file.
    assert marks(svg, plots.MAIN) == (3 + 2) + (4 + 4) + 2
    assert "nan" not in svg


@pytest.mark.parametrize("key", ["accuracy", "loss"])
def test_one_of_the_two_is_enough_for_a_trade_off(key):
    history = [{"step": i, "size": 0.2 - 0.05 * i, key: 0.5 + 0.1 * i} for i in range(3)]
    assert "tradeoff" in plots.draw({"history": history})
    assert "tradeoff" not in plots.draw({"history": history[:1]})
    assert "tradeoff" not in plots.draw({"history": [row | {"size": None} for row in history]})


def test_a_moment_of_collapse_does_not_flatten_the_rest():
    history = [{"step": i, "size": 0.2 - 0.01 * i, "loss": loss} for i, loss in enumerate([0.05, 0.06, 0.05, 400.0])]
    assert "400" not in texts(plots.draw({"history": history})["tradeoff"])
    assert {"0.1", "1", "10", "100"} <= set(texts(plots.draw({"history": history})["tradeoff"]))
    calm = [row | {"loss": 0.05 + 0.01 * row["step"]} for row in history]
    assert any(text.startswith("0.07") for text in texts(plots.draw({"history": calm})["tradeoff"]))


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.0501), (0.052, 0.068), (0.001, 0.9), (0.0123, 0.4), (1e-9, 1e3)])
def test_the_size_axis_always_has_numbers(low, high):
    history = [{"step": i, "size": size, "loss": 1.0 + i} for i, size in enumerate((low, high))]
    assert sum(text.endswith("%") for text in texts(plots.draw({"history": history})["tradeoff"])) >= 2


def test_guard_events_stand_under_the_accuracy_too():
    report = full_report()
    with_guard, without = (plots.draw(report | {"events": e})["quality"] for e in (report["events"], []))
    assert with_guard.count("<use ") == without.count("<use ") + 2
    assert "regressions" in texts(plots.draw(report)["size"])


# runs beside


def test_runs_of_the_same_task_are_found(tmp_path):
    mine = write(tmp_path / "here", run())
    write(tmp_path / "b", run(target_size=0.05, stored_ratio=0.049))
    write(tmp_path / "a", run(seed=1))
    write(tmp_path / "deep" / "c", run())
    found = runs_beside(mine, run())
    assert [row["run"] for row in found] == ["a", "b"]
    assert (found[1]["stored_ratio"], found[1]["guard"]) == (0.049, {"regressions": 1})
    assert "settings" not in found[0]


@pytest.mark.parametrize(
    "other",
    [
        run(task="mnist"),
        run(data="elsewhere"),
        run(limit=32),
        run(float_bytes=1),
        run(packed_accuracy=None),  # not finished
        run(stored_ratio="small"),
        "[]",
        "{",
        "",
        "[" * 100_000,
        '"x"',
    ],
    ids=["task", "data", "limit", "network", "unfinished", "text", "list", "cut", "empty", "deep", "string"],
)
def test_what_is_no_finished_run_of_the_task_is_passed_over(other, tmp_path):
    mine = write(tmp_path / "here", run())
    write(tmp_path / "other", other)
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "report.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder" / "report.json").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "report.json").symlink_to(tmp_path / "nowhere")
    assert runs_beside(mine, run()) == []


def test_a_run_is_not_beside_itself(tmp_path, monkeypatch):
    mine = write(tmp_path / "here", run())
    (tmp_path / "again").symlink_to(mine)
    assert runs_beside(mine, run()) == []
    write(tmp_path / "other", run())
    monkeypatch.chdir(mine)
    assert [row["run"] for row in runs_beside(type(mine)(), run())] == ["other"]  # the folder "."


def test_so_many_runs_and_no_larger_ones_are_read(tmp_path, monkeypatch):
    mine = write(tmp_path / "here", run())
    for i in range(4):
        write(tmp_path / f"r{i}", run())
    monkeypatch.setattr(beside, "MOST_RUNS", 3)
    assert [row["run"] for row in runs_beside(mine, run())] == ["r0", "r1", "r2"]
    monkeypatch.setattr(beside, "MOST_BYTES", 10)
    assert runs_beside(mine, run()) == []


def test_the_runs_are_plotted_and_listed(tmp_path):
    others = [
        {"run": "five", **run(target_size=0.04, stored_ratio=0.0398, packed_accuracy=0.97, stored_bytes=24000)},
        {"run": "missed", **run(target_size=0.01, target_held=False, stored_ratio=0.2)},
        {"run": "unknown", **run(target_held=None)},
        {"run": "ten", **run(stored_ratio=0.0999)},
    ]
    write_html(full_report(), tmp_path / "report.html", others)
    html = (tmp_path / "report.html").read_text()
    elements_of(html)
    words = words_of(html)
    assert "five held 4.00 % 3.98 % 24,000 2.50 97.00 % 0.0600 1 0" in words
    assert "this run held 5.00 % 4.88 % 29,871 1.37 98.33 % 0.0634 2 0" in words
    assert "missed not held 1.00 % 20.00 %" in words
    assert "unknown not judged 10.00 %" in words
    order = [words.index(name) for name in ("five held", "this run held", "unknown not", "missed not")]
    assert order == sorted(order)
    assert len(re.findall('<tr class="mine">', html)) == 1
    figure = re.search(r'<figure role="group" aria-label="Accuracy and loss on test data.*?</figure>', html, re.DOTALL)
    assert figure is not None
    (svg,) = SVG.findall(figure[0])
    assert {"held", "not held", "this run", "float", "mean of a target", "test accuracy", "test loss"} <= set(
        texts(svg)
    )
    assert marks(svg, plots.ALARM) == 2 * 2 + 1  # two panels, and the legend
    assert marks(svg, plots.MAIN) == 3 * 2 + 1


def test_without_others_there_is_no_table_of_runs(render):
    assert "this run" not in words_of(render(full_report()))
    assert set(plots.draw(full_report())) == {"size", "quality", "tradeoff"}


def test_only_runs_that_held_make_the_curve():
    mine = {"run": "this run", "mine": True, **run(target_size=0.05, stored_ratio=0.05)}
    held = {"run": "a", **run(target_size=0.1)}
    assert "mean of a target" in texts(plots.draw({}, [mine, held])["runs"])
    for other in (held | {"tolerance_held": False}, held | {"target_size": 0.05}, held | {"target_size": None}):
        assert "mean of a target" not in texts(plots.draw({}, [mine, other])["runs"])


@pytest.mark.parametrize("bad", [NAN, INF, -1.0, 0.0, 1e308, 10**400], ids=lambda bad: f"{str(bad)[:6]}")
def test_numbers_of_other_runs_are_not_trusted(bad, tmp_path):
    keys = ("stored_ratio", "packed_accuracy", "packed_loss", "target_size", "bits_per_weight", "stored_bytes", "seed")
    report = full_report() | {"history": []}  # the plots of this run are as they were
    for key in keys:
        write_html(report, tmp_path / "report.html", [{"run": "x", **run(**{key: bad})}])
        html = (tmp_path / "report.html").read_text()
        elements_of(html)
        assert not {"nan", "inf", "NaN"} & set(re.findall(r"[A-Za-z]+", html))


def test_words_of_other_runs_are_not_trusted(tmp_path):
    mine = write(tmp_path / "here", run())
    hostile = run(seed=HOSTILE, target_size=HOSTILE, packed_loss=HOSTILE, stored_bytes=[HOSTILE], target_held=HOSTILE)
    write(tmp_path / "<script>alert(1)<", json.dumps(hostile | {"guard": {"regressions": HOSTILE}}))
    found = runs_beside(mine, run())
    assert len(found) == 1
    write_html(run(), mine / "report.html", found)
    html = (mine / "report.html").read_text()
    assert "script" not in {tag for tag, _ in elements_of(html)}
    assert "<script" not in html
    assert not set("\x00\x1b\ud800") & set(html)


def test_the_report_command_looks_beside_the_run(tmp_path, capsys):
    mine = write(tmp_path / "here", run(target_size=0.05, stored_ratio=0.05))
    assert cli.main(["report", str(mine)]) == 0
    assert "this run" not in words_of((mine / "report.html").read_text())
    write(tmp_path / "larger", run(packed_accuracy=0.99))
    assert cli.main(["report", str(mine)]) == 0
    assert "larger held 10.00 % 9.80 %" in words_of((mine / "report.html").read_text())
    assert math.isclose(json.loads((mine / "report.json").read_text())["stored_ratio"], 0.05)
