"""The bench against other libraries: who is timed, what is refused, and that each of its claims can be lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench import peer_workers, peers, readme, record
from bench.peer_claims import LINES, claims, widths
from bench.peer_problem import EXACT, INT8, MIXED, READ, TRAINED, WIDTHS, Problem, ours


def test_libraries_are_timed_in_processes_of_their_own(tmp_path):
    assert peers.main(["--quick", "--results", str(tmp_path)]) == 0
    found = record.read("cpu_peers", tmp_path)
    timed = [row for row in found["rows"] if "missing" not in row]
    assert {row["section"] for row in found["rows"]} == {"64x128, 1 thread"}
    assert {(row["library"], row["rows"]) for row in timed} == {(n, m) for n in ("ours", "torch") for m in (1, 4)}
    for m in (1, 4):
        of = {(row["bits"], row["numerics"]): row for row in timed if (row["library"], row["rows"]) == ("ours", m)}
        assert {bits for bits, numerics in of if numerics == EXACT} == set(WIDTHS)
        for row in (row for row in timed if row["rows"] == m and row["bits"] != READ):
            mine = of[row["bits"] if row["bits"] in WIDTHS else MIXED, EXACT]
            if row["numerics"] == EXACT:
                assert row["ratio"] == pytest.approx(row["microseconds"] / mine["microseconds"])
            assert 0 < row["minimum"] <= row["microseconds"]
            assert 0 < row["error"] < {EXACT: 1e-4, INT8: 3e-2}.get(row["numerics"], 1e-2)
            size = row["stored_bits"] / 8 * 64 * 128
            assert row["gigabytes_per_second"] == pytest.approx(size / row["microseconds"] / 1e3)
    assert [c["claim"].split(":")[0] for c in found["claims"]] == [
        f"small layers, {numerics}, every width and M" for numerics in (INT8, EXACT)
    ]


def refuse():
    raise RuntimeError("not on\nthis machine")


def exactly_four_bits():
    problem = Problem(64, 128, 1, 4)
    return problem, dict(ours(problem))["4 exact"]()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda y: 1.001 * y, "wrong: error 0.001, exact may have 0.0001"),
        (lambda y: y.roll(1, 1), "wrong: error 1.4, exact"),
        (lambda y: float("nan") * y, "wrong: error nan, exact"),
        (lambda y: y[:, 1:], r"wrong: a result of shape \(4, 63\) for \(4, 64\)"),
    ],
)
def test_a_wrong_library_is_not_timed(spoil, said):
    problem, right = exactly_four_bits()
    assert peer_workers.check(right, problem, 4) < 1e-6
    wrong = dataclasses.replace(right, call=lambda copy, m: spoil(right.call(copy, m)))
    with pytest.raises(ValueError, match=said):
        peer_workers.check(wrong, problem, 4)


def test_a_candidate_that_fails_is_named_and_the_others_stay(monkeypatch):
    problem, right = exactly_four_bits()
    offered = {"right": lambda: right, "broken": refuse}
    monkeypatch.setitem(peer_workers.LIBRARIES, "some", (lambda problem: iter(offered.items()), "some"))
    assert peer_workers.build("some", problem) == ({"right": right}, {"broken": "RuntimeError: not on this machine"})


def test_a_library_that_is_not_there_is_named_and_one_that_dies_is_started_again():
    absent, dying = (peer_workers.Worker(name, 64, 128, 1, 4) for name in ("absent", "torch"))
    try:
        assert absent.built() == ({}, {"": "KeyError: 'absent'"})
        found, missing = dying.built()
        assert found["F.linear float32"] == (32, EXACT, 4 * 64 * 128)
        assert missing == {}
        assert dying.ask("check", "F.linear float32", 4)[1] is None
        dying.process.kill()
        assert dying.ask("check", "F.linear float32", 4) == (None, "its process ended with code -9")
        assert dying.ask("check", "F.linear float32", 4)[1] is None
    finally:
        absent.close()
        dying.close()


def test_trained_widths_come_in_a_trained_networks_shares():
    problem = Problem(512, 8, 1, 1)
    mixed = problem.widths(MIXED)
    counts = torch.bincount(mixed.long(), minlength=9)
    share = torch.tensor([TRAINED.get(b, 0) / sum(TRAINED.values()) for b in range(9)])
    assert counts.sum() == 512
    assert (counts - 512 * share).abs().max() <= 1
    assert not torch.equal(mixed, mixed.sort().values)
    assert torch.equal(mixed, Problem(512, 8, 1, 1).widths(MIXED))


def test_the_slow_are_visited_less_and_ours_always():
    keys = [("a", "fast"), ("a", "slow"), ("ours", "slower"), ("b", "other width")]
    known = dict.fromkeys(keys, (4, INT8, 1)) | {keys[3]: (8, INT8, 1)}
    times = {key: [(seconds, True)] for key, seconds in zip(keys, (1.0, 3.1, 9.0, 9.0), strict=True)}
    rounds = list(peers.turns(keys, known, times, 0.0, 512))
    assert sorted(rounds[:4]) == sorted(keys)
    assert sorted(rounds[4:]) == sorted([keys[0], *keys[2:]])


class Scripted:
    """A library whose answers are known: (bits, numerics, bytes, seconds a row of x) of each candidate."""

    offers = {
        "ours": {"4": (4, INT8, 8, 0.09), "4 exact": (4, EXACT, 8, 0.5), "read": (READ, READ, 8, 0.001)},
        "torch": {"fast": (4, INT8, 8, 0.004), "slow": (4, INT8, 8, 0.02), "dies": (4, INT8, 8, 0.001)},
    }

    def __init__(self, library, *_):
        self.offered = self.offers[library]

    def built(self):
        return {name: it[:3] for name, it in self.offered.items()}, {"broken": "why"}

    def ask(self, what, name, m):
        if name == "dies":
            return None, "its process ended"
        return (0.001 if what == "check" else [(self.offered[name][3] * m, True)]), None

    def close(self):
        pass


def test_what_takes_too_long_is_left_out_with_its_reason_and_ours_never(monkeypatch):
    monkeypatch.setattr(peers, "Worker", Scripted)
    rows = peers.measure("4096x4096", 1, [1, 16, 64], ["ours", "torch"], 0.0)
    timed = {(r["candidate"], r["rows"]): r for r in rows if "missing" not in r}
    always = {(name, m) for name in ("4", "4 exact", "fast") for m in (1, 16, 64)}
    assert timed.keys() == always | {("read", 1), ("slow", 1), ("slow", 16)}
    assert timed["slow", 1]["ratio"] == pytest.approx(0.02 / 0.09)
    assert timed["read", 1]["ratio"] is None
    assert {(r["library"], r["candidate"], r["rows"]): r["missing"] for r in rows if "missing" in r} == {
        ("ours", "broken", None): "why",
        ("torch", "broken", None): "why",
        ("torch", "dies", 1): "its process ended",
        ("torch", "dies", 16): "its process ended",
        ("torch", "dies", 64): "its process ended",
        ("torch", "slow", 64): "left out: about 1.3 s a call, 5 times the fastest of its width with fewer rows",
    }


@pytest.mark.parametrize(
    ("bits", "stored", "library", "stands_for"),
    [
        (4, 4.25, "ggml", {4}),
        (4, 5.0, "ggml", {4, 5}),
        (6, 6.5625, "ggml", {6, 7}),
        (2, 3.0, "ours", {2}),
        (MIXED, 3.1, "auto_round", {MIXED}),
        (32, 32.0, "torch", set()),
        (READ, None, "ours", set()),
    ],
)
def test_a_peer_stands_for_its_codes_and_for_its_bytes(bits, stored, library, stands_for):
    assert widths({"bits": bits, "stored_bits": stored, "library": library}) == stands_for


PEERS = {INT8: 100.0, EXACT: 120.0, "float32": 50.0}  # microseconds


def measured():
    """Rows by which every claim holds: ours is some ten times as fast as the peers, at the speed of memory."""
    rows = []
    for shape, cached in (("4096x4096", False), ("512x512", True)):
        for m in peers.BATCHES:
            place = {"section": f"{shape}, 2 threads", "rows": m, "cached": cached, "candidate": "c"}

            def put(library, bits, numerics, t, speed, place=place):
                said = {"library": library, "bits": bits, "stored_bits": bits, "numerics": numerics}
                rows.append({**place, **said, "microseconds": t, "gigabytes_per_second": speed})

            for numerics in (INT8, EXACT):
                for width in WIDTHS:
                    put("ours", width, numerics, 10.0, 100.0)
                    put("a", width, numerics, PEERS[numerics], 10.0)
            put("b", 32, EXACT, PEERS["float32"], 10.0)
            put("ours", READ, READ, 1.0, 100.0)
    return rows


REGIMES = [
    ("M = 1, int8, 2 to 8 bits and mixed: packed bytes", 0.85, 1, 3, INT8, False),
    ("M = 1, int8, 2 to 8 bits and mixed: against the best peer", 1.0, 1, MIXED, INT8, False),
    ("M = 1, int8, 1 bit:", 2.5, 1, 1, INT8, False),
    ("M = 1, exact, 2 to 8 bits:", 2.0, 1, 8, EXACT, False),
    ("M = 4 and 16, int8, 1, 3, 5, 6, 7 bits and mixed:", 1.3, 16, 5, INT8, False),
    ("M = 4 and 16, int8, 2, 4 and 8 bits:", 1.0, 4, 8, INT8, False),
    ("M = 4 and 16, int8, every width:", 1.0, 4, 2, INT8, False),
    ("M = 128 and 512, int8, every width:", 1.0, 512, MIXED, INT8, False),
    ("M = 128 and 512, int8, 4 bits:", 1.6, 128, 4, INT8, False),
    ("M = 128 and 512, exact, every width:", 0.95, 512, 7, EXACT, False),
    ("small layers, int8, every width and M:", 1.0, 128, 6, INT8, True),
    ("small layers, exact, every width and M:", 1.0, 4, 1, EXACT, True),
]


@pytest.mark.parametrize(("text", "target", "m", "width", "numerics", "cached"), REGIMES)
def test_each_claim_about_libraries_is_lost_by_one_slow_row(text, target, m, width, numerics, cached):
    assert len(REGIMES) == len(claims(measured())) == len(LINES) + 1
    for factor, holds in ((1.01, True), (0.99, False)):
        rows = measured()
        (row,) = (
            row
            for row in rows
            if (row["library"], row["rows"], row["bits"], row["numerics"], row["cached"])
            == ("ours", m, width, numerics, cached)
        )
        against = "float32" if "exact, every width:" in text else numerics
        row["microseconds"] = PEERS[against] / (target * factor)
        row["gigabytes_per_second"] = 100.0 * target * factor if "packed bytes" in text else 100.0
        (found,) = (c for c in claims(rows) if c["claim"].startswith(text))
        assert found["holds"] is holds
        assert found["measured"] == pytest.approx(target * factor)
        assert f"{row['section']}, M = {m}, {width} bits" in found["claim"]
    rows.remove(row)
    (found,) = (c for c in claims(rows) if c["claim"].startswith(text))
    assert (found["measured"], found["holds"]) == (None, False)
    assert "not measured" in found["claim"]


def test_only_the_fastest_peer_counts_and_only_where_it_was_measured():
    rows = measured()
    assert all(c["holds"] for c in claims(rows))
    rows.append({**next(r for r in rows if r["bits"] == 3 and r["rows"] == 4), "library": "z", "microseconds": 5.0})
    lost = [c["claim"] for c in claims(rows) if not c["holds"]]
    assert len(lost) == 1
    assert "3, 5, 6, 7" in lost[0]
    assert "z c" in lost[0]
    assert claims([row for row in rows if row["library"] == "ours" and row["rows"] == 16]) == []


def test_losses_to_a_library_are_bold_and_missing_ones_are_named(tmp_path):
    rows = measured()
    next(r for r in rows if r["library"] == "a" and r["bits"] == 3 and r["rows"] == 4)["microseconds"] = 5.0
    by_section = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
    gone = {"library": "ggml", "candidate": "", "missing": "No module named 'llama_cpp'"}
    for section, found in by_section.items():
        record.write("cpu_peers", section, [*found, gone], [], "x", tmp_path)
    shown = readme.filled("<!-- tables: cpu_peers -->\n<!-- end -->\n", tmp_path)
    ten, twelve = "10, 10.00× a", "10, 12.00× a"
    assert f"| 3 | int8 | {ten} | 10, **0.50×** a | {ten} | {ten} | {ten} |\n" in shown
    assert f"| mixed | exact | {twelve} | {twelve} | {twelve} | {twelve} | {twelve} |\n" in shown
    assert f"| 4096x4096, 2 threads | int8 | {ten} | 10, **0.50×** a |" in shown
    assert f"| 512x512, 2 threads | exact | {twelve} |" in shown
    assert "ggml is missing: No module named 'llama_cpp'." in shown
