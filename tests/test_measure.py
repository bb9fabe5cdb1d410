"""Timing: rounds are interleaved, speeds stand only beside right results, and broken claims are found."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from sgsc import measure
from sgsc.kernels import OPS
from sgsc.measure import agrees, broken_claims, copy_bandwidth, interleaved, measure_ops, medians


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the measured calls move."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    return now


def test_runs_take_turns_after_one_that_is_not_timed(clock):
    order = []

    def run(name, seconds):
        def call():
            order.append(name)
            clock[0] += seconds

        return call

    times = interleaved({"a": run("a", 1.0), "b": run("b", 3.0)}, budget=0.0)
    assert order == ["a", "b"] * 6
    assert times == {"a": [1.0] * 5, "b": [3.0] * 5}


def test_the_budget_is_spent_on_the_fastest(clock):
    def run(seconds):
        def call():
            clock[0] += seconds

        return call

    times = interleaved({"a": run(1.0), "b": run(2.0)}, budget=20.0)
    assert len(times["a"]) == len(times["b"]) == 20


def test_a_slow_contender_does_not_take_all_day(clock):
    def run(seconds):
        def call():
            clock[0] += seconds

        return call

    times = interleaved({"a": run(1.0), "b": run(9.0)}, budget=20.0)  # 4 * 20 * 2 = 160 seconds: 16 rounds of 10
    assert len(times["a"]) == len(times["b"]) == 16


def test_the_median_is_the_middle_of_what_was_timed(clock):
    lengths = itertools.chain([100.0], itertools.cycle([1.0, 50.0, 2.0, 3.0, 4.0]))  # the first is the untimed one

    def run():
        clock[0] += next(lengths)

    assert medians({"a": run}, budget=0.0) == {"a": 3.0}


@pytest.mark.parametrize("budget", [-1, math.nan, math.inf])
def test_a_budget_that_never_ends_is_refused(budget):
    with pytest.raises(ValueError, match=f"budget={budget}: want a finite number of seconds"):
        interleaved({"a": lambda: None}, budget)


def test_bandwidth_counts_reads_and_writes(monkeypatch):
    monkeypatch.setattr(measure, "medians", lambda runs, budget: [run() for run in runs.values()] and {"copy": 0.5})
    assert copy_bandwidth() == 2 * 2**26 / 0.5


def small(name, **changes):
    """The operation on one of its test cases as its only bench case."""
    o = OPS[name]
    case = dict(itertools.islice(o.cases().items(), 1))
    made = object.__new__(type(o))
    for field in dataclasses.fields(o):
        object.__setattr__(made, field.name, changes.get(field.name, getattr(o, field.name)))
    object.__setattr__(made, "bench_cases", lambda: case)
    return made


@pytest.mark.parametrize("name", [name for name, o in OPS.items() if o.bench_cases()])
def test_every_operation_with_bench_cases_gets_rows_with_its_numbers(name, monkeypatch):
    monkeypatch.setattr(measure, "OPS", {name: small(name)})
    monkeypatch.setattr(measure, "copy_bandwidth", lambda: 1e10)
    rows = measure_ops(name, budget=0.0)
    assert len(rows) == 2
    assert rows[-1]["backend"] == "cpu: reference"
    for row in rows:
        assert row["op"] == name
        seconds = row["microseconds"] / 1e6
        traffic = next(iter(small(name).bench_cases().values()))
        assert row["gigabytes_per_second"] == pytest.approx(OPS[name].traffic(*traffic) / seconds / 1e9)
        assert row["share_of_copy"] == pytest.approx(row["gigabytes_per_second"] / 10)
        assert row["gigaoperations_per_second"] == pytest.approx(OPS[name].operations(*traffic) / seconds / 1e9)


def test_no_speed_is_shown_for_a_wrong_result(monkeypatch):
    for wrong in (lambda x, *_: x + 0.1, lambda x, *_: x * float("nan"), lambda x, *_: torch.zeros_like(x)):
        monkeypatch.setattr(measure, "OPS", {"fake_quantize": small("fake_quantize", reference=wrong)})
        monkeypatch.setattr(measure, "copy_bandwidth", lambda: 1e10)
        with pytest.raises(ValueError, match=r"fake_quantize, case .*: the result is not the reference's"):
            measure_ops("fake_quantize", 0.0)


def test_a_result_agrees_with_itself_and_not_with_one_level_off():
    o = OPS["unpack"]
    arguments = o.cases()["every-width"]
    assert agrees(o, arguments)
    assert not agrees(small("unpack", reference=lambda *a: OPS["unpack"].reference(*a) ^ 1), arguments)
    removed = o.cases()["all-removed"]
    assert agrees(o, removed)
    assert not agrees(small("unpack", reference=lambda *a: torch.zeros(1, dtype=torch.uint8)), removed)  # broadcasts


def test_an_operation_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    monkeypatch.setattr(measure, "OPS", {"pack": OPS["pack"], "packed_linear": small("packed_linear")})
    with pytest.raises(ValueError, match=r"no operation 'nope' to measure; there are packed_linear$"):
        measure_ops("nope")


# claims

CLAIM = {"claim": "fast", "target": 2.0, "measured": 1.5, "unit": "x", "holds": False, "command": "c", "commit": "d"}


def results(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_only_claims_that_do_not_hold_are_listed_with_their_file(tmp_path):
    good = CLAIM | {"holds": True}
    folder = results(tmp_path, a={"rows": [], "claims": [good, CLAIM]}, b={"claims": [good]}, c={"claims": []})
    assert broken_claims(folder) == [{"file": "a.json", **CLAIM}]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", r"a.json is no result file \(JSONDecodeError"),
        ("[]", r"a.json is no result file \(TypeError"),
        ("{}", r"a.json is no result file \(KeyError: 'claims'"),
        ({"claims": 3}, r"a.json is no result file \(TypeError"),
        ({"claims": ["holds"]}, r"a.json is no result file \(TypeError"),
        ({"claims": [{}]}, "a.json: a claim needs claim, holds, measured, target, unit"),
        ({"claims": [{"holds": True}]}, "a.json: a claim needs"),
        ({"claims": [CLAIM | {"holds": "no"}]}, "a.json: a claim needs .* holds true or false"),
        ({"claims": [CLAIM | {"holds": None}]}, "a.json: a claim needs"),
    ],
)
def test_a_file_that_is_no_result_file_is_named(tmp_path, content, match):
    with pytest.raises(ValueError, match=match):
        broken_claims(results(tmp_path, a=content))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"a.json is no result file \(UnicodeDecodeError"):
        broken_claims(tmp_path)


def test_no_results_at_all_do_not_pass_for_claims_that_hold(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"no result files in .*; run `make bench`"):
            broken_claims(folder)
