"""Decision margins: of each sample, by class, in the hard tail, and as a gate."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sgsc.certificate import Certificate, certify, compare, margins
from sgsc.cli import main
from sgsc.comparison import Part
from sgsc.demos import certification
from sgsc.preservation import PreservationSet

from .test_cli import REACHED, document, in_this_process, shortened


def logits(*rows):
    """Outputs whose probabilities are the given rows."""
    return torch.tensor(rows).log()


def ramp(*own):
    """Two classes; sample i answers class 0 with probability own[i], so that its margin for class 0 is 2 own[i] - 1."""
    return logits(*((p, 1 - p) for p in own))


def zeros(count):
    return torch.zeros(count, dtype=torch.long)


class TestMargins:
    def test_right_is_the_top_2_margin_and_wrong_is_negative(self):
        outputs = logits((0.6, 0.3, 0.1), (0.6, 0.3, 0.1), (0.6, 0.3, 0.1))
        assert margins(outputs, torch.tensor([0, 1, 2])).tolist() == pytest.approx([0.3, -0.3, -0.5], abs=1e-7)

    def test_a_sequence_has_one_at_its_last_position(self):
        outputs = torch.stack([ramp(0.9, 0.2), ramp(0.1, 0.7)])
        targets = torch.tensor([[0, 0], [1, 0]])
        assert margins(outputs, targets).tolist() == pytest.approx([-0.6, 0.4], abs=1e-7)
        assert margins(outputs, targets[:, -1]).tolist() == margins(outputs, targets).tolist()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_what_is_not_finite_has_the_least(self, bad):
        outputs = torch.stack([ramp(0.9, 0.9), ramp(0.9, 0.9)])
        outputs[0, 0, 1] = bad  # not at the position that decides
        assert margins(outputs, zeros(2)).tolist() == pytest.approx([-1, 0.8])

    def test_a_tie_has_none(self):
        assert margins(ramp(0.5), zeros(1)).tolist() == [0]

    def test_half_precision_and_large_logits(self):
        outputs = torch.tensor([[30_000.0, -30_000.0], [0.0, 8.0]], dtype=torch.float16)
        low = math.exp(-8)
        assert margins(outputs, torch.tensor([0, 1])).tolist() == pytest.approx([1, (1 - low) / (1 + low)], rel=1e-9)

    def test_they_can_be_trained_on(self):
        outputs = ramp(0.6, 0.3).requires_grad_()
        margins(outputs, zeros(2)).sum().backward()
        assert outputs.grad is not None
        assert (outputs.grad[:, 0] > 0).all()


class TestParts:
    def test_by_class_over_the_samples_that_float_had_right(self):
        truth = torch.tensor([0, 0, 0, 1, 1, 2])
        before = logits(
            *((0.8, 0.1, 0.1), (0.6, 0.2, 0.2), (0.1, 0.8, 0.1)),  # the last one is wrong and in no part
            *((0.1, 0.9, 0.0 + 1e-9), (0.2, 0.6, 0.2), (0.9, 0.05, 0.05)),
        )
        after = logits(
            *((0.7, 0.2, 0.1), (0.3, 0.5, 0.2), (0.8, 0.1, 0.1)),
            *((0.2, 0.7, 0.1), (0.3, 0.6, 0.1), (0.9, 0.05, 0.05)),
        )
        found = compare(before, after, truth)
        assert list(found.by_class) == ["0", "1", "2"]
        zero, one, two = found.by_class.values()
        assert (zero.samples, zero.regressions, zero.share) == (2, 1, 0.5)
        assert (zero.margin_float, zero.margin_packed) == pytest.approx(((0.7 + 0.4) / 2, (0.5 - 0.2) / 2))
        assert zero.margin_lost == pytest.approx(1 - 0.15 / 0.55)
        assert (one.samples, one.regressions, one.share) == (2, 0, 0)
        assert (one.margin_float, one.margin_packed) == pytest.approx(((0.8 + 0.4) / 2, (0.5 + 0.3) / 2))
        assert two == Part(0, 0, 0.0, 0.0)
        assert (two.share, two.margin_lost) == (0, 0)
        assert found.regressions_by_class == {"0": 1, "1": 0, "2": 0}
        assert found.worst_class == "0"
        assert sum(p.samples for p in found.by_class.values()) == found.whole.samples == found.float_right == 4
        assert sum(p.regressions for p in found.by_class.values()) == found.whole.regressions == found.regressions
        total = sum(p.samples * p.margin_packed for p in found.by_class.values())
        assert found.margin_packed == pytest.approx(total / 4)
        assert found.margin_lost == pytest.approx(1 - found.margin_packed / found.margin_float)

    def test_the_worst_class_is_by_share_then_by_margin_then_by_position(self):
        truth = torch.tensor([0, 0, 0, 0, 1, 2, 2])

        def worst(*after):
            return compare(*(logits(*((p, *[(1 - p) / 2] * 2) for p in own)).gather(1, roll) for own in after), truth)

        roll = (torch.arange(3)[None] - truth[:, None]) % 3  # the own class first
        whole = [0.8] * 7
        # two of four against one of one
        assert worst(whole, [0.1, 0.1, 0.8, 0.8, 0.1, 0.8, 0.8]).worst_class == "1"
        # nothing regressed: the margin tells
        assert worst(whole, [0.8, 0.8, 0.8, 0.8, 0.79, 0.8, 0.6]).worst_class == "2"
        assert worst(whole, whole).worst_class == "0"
        assert compare(ramp(0.2), ramp(0.2), zeros(1)).worst_class is None

    @pytest.mark.parametrize(("right", "hard"), [(1, 1), (9, 1), (10, 1), (11, 2), (40, 4), (41, 5)])
    def test_the_tail_is_the_tenth_of_the_right_ones_rounded_up(self, right, hard):
        wrong = [0.1] * 30  # what float had wrong does not count
        own = wrong + torch.linspace(0.95, 0.55, right).tolist()
        found = compare(ramp(*own), ramp(*own), zeros(right + 30))
        assert found.tail.samples == hard
        assert found.tail.margin_float == pytest.approx(sum(2 * p - 1 for p in own[-hard:]) / hard)
        assert found.tail.margin_lost == 0

    def test_the_tail_is_chosen_by_float_alone(self):
        own = [0.6 + 0.01 * i for i in range(20)]
        found = compare(ramp(*own), ramp(*own[2:], 0.2, 0.2), zeros(20))  # packed is worst where float was surest
        assert (found.tail.samples, found.tail.regressions, found.regressions) == (2, 0, 2)
        assert found.tail.margin_float == pytest.approx(0.21)
        assert found.tail.margin_packed == pytest.approx(0.25)
        assert found.tail.margin_lost == pytest.approx(1 - 0.25 / 0.21)  # it grew

    def test_ties_in_the_tail_go_by_position(self):
        found = compare(ramp(*[0.75] * 15), ramp(*[0.2] * 2, *[0.75] * 13), zeros(15))
        assert (found.tail.samples, found.tail.regressions) == (2, 2)

    def test_nothing_was_right_before(self):
        found = compare(ramp(0.1), ramp(0.9), zeros(1))
        assert found.tail == found.whole == Part(0, 0, 0.0, 0.0)
        assert found.as_dict()["worst_class"] is None

    def test_they_are_json(self):
        found = compare(ramp(0.9, 0.8), ramp(0.9, 0.3), zeros(2)).as_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        keys = {"samples", "regressions", "margin_float", "margin_packed", "share", "margin_lost"}
        assert found["tail"].keys() == found["by_class"]["0"].keys() == keys
        assert found["worst_class"] == {"name": "0"} | found["by_class"]["0"]
        assert found["worst_class"]["share"] == 0.5
        assert found["regressions_by_class"] == {"0": 1}


class TestGate:
    def certificate(self, before, after, tolerance=0.0, **more):
        kept = compare(ramp(*before), ramp(*after), zeros(len(before)))
        return Certificate(kept, kept, tolerance, {}, {}, 1, **more)

    @pytest.mark.parametrize(
        ("after", "margin_tolerance", "margin_held"),
        [
            (0.9, None, None),
            (0.6, None, None),
            (0.9, 0.0, True),
            (0.899, 0.0, False),
            (0.86, 0.1, True),  # exactly a tenth
            (0.859, 0.1, False),
            (0.95, 0.0, True),
            (0.5001, 1.0, True),
        ],
    )
    def test_the_margin_may_shrink_so_far(self, after, margin_tolerance, margin_held):
        found = self.certificate([0.9], [after], margin_tolerance=margin_tolerance)
        assert found.answers_held
        assert found.margin_held is margin_held
        assert found.held is (margin_held is not False)
        assert found.as_dict()["margin_held"] is margin_held
        assert found.as_dict()["margin_tolerance"] == margin_tolerance

    def test_rounding_does_not_miss_the_margin(self):
        found = self.certificate([0.9], [0.9])
        exact = dataclasses.replace(found.guard, margin_float=0.1, margin_packed=0.09)  # 0.9 * 0.1 > 0.09 in floats
        assert dataclasses.replace(found, preservation=exact, margin_tolerance=0.1).margin_held

    def test_a_held_margin_saves_no_answer(self):
        found = self.certificate([0.6, 0.9], [0.4, 0.99], margin_tolerance=0.5)
        assert (found.answers_held, found.margin_held, found.held) == (False, True, False)
        assert "is NOT held; their mean margin" in found.statement()
        assert "50 % may be lost, which is held" in found.statement()
        assert found.reason == "the reloaded network regresses on more preservation samples than the tolerance allows"

    def test_the_reason_names_each_gate_that_failed(self):
        assert self.certificate([0.9], [0.6], margin_tolerance=0.5).reason == (
            "more of the margin on the preservation samples is lost than the margin tolerance allows"
        )
        both = self.certificate([0.9], [0.1], margin_tolerance=0.5).reason
        assert both.count("allows") == 2
        assert self.certificate([0.9], [0.9], margin_tolerance=0.5).reason == ""

    def test_the_statement_says_it(self):
        held = self.certificate([0.9], [0.88], margin_tolerance=0.1).statement()
        assert "their mean margin went from 0.8000 to 0.7600 where 10 % may be lost, which is held" in held
        missed = self.certificate([0.9], [0.8], margin_tolerance=0.125).statement()
        assert "from 0.8000 to 0.6000 where 12.5 % may be lost, which is NOT held" in missed
        assert "1 preservation samples 0 regressed where the tolerance allows 0, which is held" in missed
        assert "margin" not in self.certificate([0.9], [0.8]).statement()

    def test_certify_judges_the_preservation_set(self):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        x = torch.randn(60, 4)
        data = TensorDataset(x, model(x).argmax(1))
        keep = PreservationSet.select(model, data, 20)
        flat = nn.Linear(4, 3)
        with torch.no_grad():
            flat.weight.copy_(model.weight / 2)
            flat.bias.copy_(model.bias / 2)
        arguments = {"tolerance": 0.0, "stored_bytes": 1}
        found = certify(model, flat, data, keep, **arguments, margin_tolerance=0.1)
        assert (found.answers_held, found.margin_held, found.held) == (True, False, False)
        assert certify(model, flat, data, keep, **arguments).held is True
        assert certify(model, model, data, keep, **arguments, margin_tolerance=0.0).held is True
        without = certify(model, flat, data, **arguments, margin_tolerance=0.1)
        assert (without.margin_held, without.held, without.reason) == (None, None, "")

    @pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
    def test_what_it_refuses(self, bad):
        model, data = nn.Linear(4, 3), TensorDataset(torch.zeros(2, 4), zeros(2))
        with pytest.raises(ValueError, match=r"margin_tolerance=.*: want a share .*, 0 to 1, or None"):
            certify(model, model, data, tolerance=0.0, stored_bytes=1, margin_tolerance=bad)


def test_a_run_is_judged_by_the_margin_tolerance_of_its_report(tmp_path, monkeypatch, capsys):
    class Flat(nn.Module):  # the same answers, with hardly a margin
        def __init__(self, packed):
            super().__init__()
            self.packed = packed

        def forward(self, x):
            return self.packed(x) / 100

    load = certification.load_artefact
    monkeypatch.setattr(certification, "load_artefact", lambda path: Flat(load(path)))
    shortened(monkeypatch)
    in_this_process(monkeypatch)
    all_of_it = ("--margin-tolerance", "1")
    assert main(["compress", "digits", *REACHED, *all_of_it, "--out", str(tmp_path), "--json"]) == 0
    report = document(capsys.readouterr().out)
    assert report["margin_tolerance"] == 1
    assert report["class_names"] == {}
    lost = report["preservation"]["margin_lost"]
    assert 0 < lost < 1
    for allowed, held in ((lost / 2, False), ((1 + lost) / 2, True)):
        (tmp_path / "report.json").write_text(json.dumps(report | {"margin_tolerance": allowed}))
        assert main(["certify", str(tmp_path), "--json"]) == 1 - held
        said = document(capsys.readouterr().out)
        assert (said["tolerance_held"], said["margin_tolerance"]) == (held, allowed)
        assert said["certificate"]["answers_held"]
        assert ("more of the margin" in said["certificate"]["reason"]) is not held
        assert f"may be lost, which is {'held' if held else 'NOT held'}" in said["statement"]
