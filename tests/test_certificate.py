import copy
import json
import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from sgsc.certificate import Certificate, answers, certify, compare, outputs, upper_bound
from sgsc.preservation import PreservationSet


def saying(*classes: int, of: int = 3) -> torch.Tensor:
    """Outputs that answer the given classes, with logits 2 and 0."""
    return 2 * nn.functional.one_hot(torch.tensor(classes), of).float()


def trained() -> tuple[nn.Sequential, TensorDataset, TensorDataset]:
    """A small classifier that is right nearly everywhere, its training data, and held-out data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(600, 4)
    y = x.argmax(1)
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x[:400]), y[:400]).backward()
        optimiser.step()
    return model, TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])


RECORD = {"seeds": {"training": 0}, "hashes": {"file": "ab"}, "stored_bytes": 12_345}


class TestUpperBound:
    @pytest.mark.parametrize("samples", [1, 10, 100, 5_000])
    def test_none_of_n_has_a_closed_form(self, samples):
        assert upper_bound(0, samples) == pytest.approx(1 - 0.05 ** (1 / samples), rel=1e-12)

    @pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
    @pytest.mark.parametrize(("regressions", "samples"), [(0, 100), (1, 100), (5, 100), (17, 400), (9, 10)])
    def test_at_the_bound_so_few_have_chance_one_less_confidence(self, regressions, samples, confidence):
        bound = upper_bound(regressions, samples, confidence)
        assert stats.binom.cdf(regressions, samples, bound) == pytest.approx(1 - confidence, rel=1e-9)
        assert bound > regressions / samples or confidence == 0.5

    def test_agrees_with_scipys_exact_interval(self):
        exact = stats.binomtest(7, 250, alternative="less").proportion_ci(0.95, method="exact").high
        assert upper_bound(7, 250) == pytest.approx(exact, rel=1e-9)

    def test_covers_the_true_rate_at_least_as_often_as_it_says(self):
        """Exact, over all outcomes: the chance that the bound lies below the true rate is at most 5 %."""
        for rate in (0.01, 0.05, 0.3):
            missed = sum(stats.binom.pmf(k, 60, rate) for k in range(61) if upper_bound(k, 60) < rate)
            assert missed <= 0.05

    def test_edges(self):
        assert upper_bound(0, 0) == 1.0
        assert upper_bound(8, 8) == 1.0

    def test_what_it_refuses(self):
        with pytest.raises(ValueError, match="5 regressions of 4 samples"):
            upper_bound(5, 4)
        with pytest.raises(ValueError, match="-1 regressions of 4 samples"):
            upper_bound(-1, 4)
        with pytest.raises(ValueError, match=r"confidence=95; want a number between 0 and 1"):
            upper_bound(1, 4, 95)


class TestCompare:
    def test_counts_by_hand(self):
        truth = torch.tensor([0, 1, 2, 0, 1, 2])
        found = compare(saying(0, 1, 2, 0, 0, 1), saying(0, 2, 2, 1, 1, 1), truth)
        assert (found.samples, found.float_right, found.packed_right) == (6, 4, 3)
        assert (found.regressions, found.improvements) == (2, 1)
        assert found.changed == (1, 3)
        assert found.regressions_by_class == {"0": 1, "1": 1, "2": 0}
        assert found.agreement == 3 / 6
        assert found.float_accuracy == 4 / 6
        assert found.packed_accuracy == 3 / 6
        assert found.standard_error == pytest.approx(math.sqrt(4 / 6 * 2 / 6 / 6))
        assert found.upper_bound_95 == upper_bound(2, 6)
        assert found.largest_output_difference == 2
        assert found.non_finite == 0

    def test_margins_by_hand(self):
        """Over the two samples that float had right; negative where packed is wrong."""
        high, low = math.exp(2) / (math.exp(2) + 2), 1 / (math.exp(2) + 2)
        found = compare(saying(0, 1, 0), saying(0, 2, 2), torch.tensor([0, 1, 2]))
        assert found.margin_float == pytest.approx(high - low)
        assert found.margin_packed == pytest.approx(0, abs=1e-12)  # one at + the margin, one at - the margin
        shrunk = compare(saying(0, 1, 0), saying(0, 1, 2) / 2, torch.tensor([0, 1, 2]))
        assert shrunk.margin_packed == pytest.approx((math.e - 1) / (math.e + 2))

    def test_equal_models(self):
        found = compare(saying(0, 1), saying(0, 1), torch.tensor([0, 0]))
        assert (found.regressions, found.improvements, found.agreement, found.mcnemar_p) == (0, 0, 1.0, 1.0)
        assert found.margin_float == found.margin_packed
        assert found.largest_output_difference == 0

    def test_nothing_was_right_before(self):
        found = compare(saying(1, 1), saying(0, 1), torch.tensor([0, 0]))
        assert (found.float_right, found.margin_float, found.margin_packed) == (0, 0.0, 0.0)
        assert found.improvements == 1

    def test_a_sequence_answers_at_its_last_position(self):
        before, after = torch.stack([saying(0, 1), saying(2, 2)]), torch.stack([saying(1, 1), saying(2, 0)])
        assert answers(before).tolist() == [1, 2]
        found = compare(before, after, torch.tensor([[0, 1], [0, 2]]))
        assert (found.samples, found.float_right, found.regressions, found.changed) == (2, 2, 1, (1,))
        assert found.largest_output_difference == 2

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_outputs_that_are_not_finite_are_wrong_answers(self, bad):
        after = saying(0, 1, 2)
        after[1, 1] = bad  # argmax would still answer 1 for NaN and inf
        found = compare(saying(0, 1, 2), after, torch.tensor([0, 1, 2]))
        assert (found.non_finite, found.regressions, found.packed_right, found.changed) == (1, 1, 2, (1,))
        assert found.agreement == pytest.approx(2 / 3)
        assert found.largest_output_difference == 0
        assert found.margin_packed == pytest.approx((2 * found.margin_float - 1) / 3, abs=1e-12)
        json.dumps(found.as_dict(), allow_nan=False)

    def test_a_sequence_is_wrong_if_any_position_is_not_finite(self):
        before = torch.stack([saying(0, 1), saying(2, 2)])
        after = before.clone()
        after[0, 0, 2] = float("nan")
        assert compare(before, after, torch.tensor([[0, 1], [0, 2]])).changed == (0,)

    @pytest.mark.parametrize(("worse", "better"), [(0, 5), (5, 0), (7, 3), (1, 1), (24, 4)])
    def test_mcnemar_is_the_exact_binomial_test(self, worse, better):
        truth = torch.zeros(40, dtype=torch.long)
        before, after = torch.zeros(40, dtype=torch.long), torch.zeros(40, dtype=torch.long)
        after[:worse] = 1
        before[30 : 30 + better] = 1
        found = compare(saying(*before.tolist()), saying(*after.tolist()), truth)
        total = worse + better
        tail = sum(math.comb(total, k) for k in range(min(worse, better) + 1)) / 2**total
        assert found.mcnemar_p == pytest.approx(min(1, 2 * tail))
        assert found.mcnemar_p == pytest.approx(stats.binomtest(worse, total).pvalue)

    def test_the_report_is_json_and_holds_every_number(self):
        found = compare(saying(0, 1), saying(1, 1), torch.tensor([0, 1])).as_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["changed"] == [0]
        assert {"float_accuracy", "packed_accuracy", "standard_error", "upper_bound_95", "mcnemar_p"} <= found.keys()

    @pytest.mark.parametrize(
        ("before", "after", "truth", "message"),
        [
            (saying(0, 1), saying(0, 1, 2), torch.tensor([0, 1]), r"packed outputs \(3, 3\), float outputs \(2, 3\)"),
            (saying(0, 1), saying(0, 1, of=4), torch.tensor([0, 1]), r"packed outputs \(2, 4\)"),
            (saying(0, 1), saying(0, 1), torch.tensor([0]), r"targets: got \(1,\), but outputs \(2, 3\) need \(2,\)"),
            (saying(0, 1), saying(0, 1), torch.tensor([0, 3]), "targets run from 0 to 3, .* allowed are 0 to 2"),
            (saying(0, 1), saying(0, 1), torch.tensor([0.0, 1.0]), "targets: got torch.float32, want integers"),
            (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5), torch.tensor([0, 1]), "want a tensor"),
            (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0).long(), "no samples"),
            (saying(0, 1) / 0, saying(0, 1), torch.tensor([0, 1]), "the float model's outputs hold NaN"),
        ],
    )
    def test_what_it_refuses(self, before, after, truth, message):
        with pytest.raises(ValueError, match=message):
            compare(before, after, truth)


class TestOutputs:
    def test_evaluation_mode_without_gradients_and_modes_restored(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        model.train()
        model[1].eval()
        modes = [module.training for module in model.modules()]
        x = torch.randn(10, 4)
        found = outputs(model, x, batch_size=3)
        assert [module.training for module in model.modules()] == modes
        assert not found.requires_grad
        assert torch.allclose(found, model.eval()(x), atol=1e-6)

    def test_modes_are_restored_after_an_error(self):
        model = nn.Sequential(nn.Dropout(), nn.Linear(4, 3))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            outputs(model, torch.zeros(2, 5))
        assert model[0].training

    def test_a_model_of_buffers_only(self):
        class Packed(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("rows", torch.eye(3))

            def forward(self, x):
                return x @ self.rows

        assert torch.equal(outputs(Packed(), torch.eye(3)), torch.eye(3))
        assert torch.equal(outputs(nn.Identity(), torch.eye(3)), torch.eye(3))

    def test_what_it_refuses(self):
        with pytest.raises(ValueError, match="got tuple, want a tensor"):
            outputs(nn.LSTM(2, 2), torch.zeros(3, 2))


class TestCertify:
    def test_the_same_model_loses_nothing(self):
        model, training, guard = trained()
        kept = PreservationSet.select(model, training, 40)
        found = certify(model, copy.deepcopy(model), guard, kept, tolerance=0.0, **RECORD)
        assert found.guard.regressions == 0
        assert found.preservation is not None
        assert found.preservation.regressions == 0
        assert found.held is True
        assert found.guard.upper_bound_95 == pytest.approx(1 - 0.05 ** (1 / 200))
        assert found.guard.samples == 200
        hashes = {"what the set was chosen from": kept.data_hash, "file": "ab"}
        assert (found.seeds, found.hashes, found.stored_bytes) == ({"training": 0}, hashes, 12_345)
        assert found.remark == ""

    def test_what_is_no_held_out_sample_is_counted_and_said(self):
        model, training, guard = trained()
        kept = PreservationSet.select(model, training, 40)
        both = ConcatDataset([guard, Subset(training, kept.indices.tolist()[:7])])
        found = certify(model, model, both, kept, tolerance=0.0, remark="on one machine", **RECORD)
        said = "on one machine; 7 of the held-out samples are in the preservation set, too: the bound is not of those"
        assert found.remark == said
        assert found.statement().endswith(f"{said}.")

    def test_one_corrupt_channel_fails_it(self):
        model, training, guard = trained()
        kept = PreservationSet.select(model, training, 40)
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken[-1].weight[2] = 0
        found = certify(model, broken, guard, kept, tolerance=0.02, **RECORD)
        assert found.held is False
        assert found.preservation is not None
        assert found.preservation.regressions > 2
        assert "NOT held" in found.statement()
        worst = max(found.guard.regressions_by_class, key=lambda name: found.guard.regressions_by_class[name])
        assert worst == "2"

    def test_without_a_preservation_set_there_is_nothing_to_hold(self):
        model, _, guard = trained()
        found = certify(model, model, guard, tolerance=0.1, **RECORD)
        assert found.preservation is None
        assert found.held is None
        assert found.allowed is None
        assert found.as_dict()["held"] is None
        assert "preservation" not in found.statement()

    @pytest.mark.parametrize(
        ("tolerance", "samples", "allowed"), [(0.0, 50, 0), (0.29, 100, 29), (0.01, 99, 0), (0.02, 150, 3), (1, 7, 7)]
    )
    def test_the_tolerance_allows_whole_samples_rounded_down(self, tolerance, samples, allowed):
        truth = torch.zeros(samples, dtype=torch.long)
        for regressions, held in ((allowed, True), (allowed + 1, False)):
            if regressions <= samples:
                wrong = [1] * regressions + [0] * (samples - regressions)
                found = compare(saying(*[0] * samples), saying(*wrong), truth)
                spotless = compare(saying(0), saying(0), truth[:1])
                certificate = Certificate(spotless, found, tolerance, {}, {}, 1)
                assert certificate.allowed == allowed
                assert certificate.held is held

    def test_the_statement_claims_what_was_measured(self):
        truth = torch.zeros(200, dtype=torch.long)
        after = saying(*[1] * 2 + [0] * 198)
        after[5] = float("nan")
        found = compare(saying(*[0] * 200), after, truth)
        text = Certificate(found, found, 0.01, {}, {}, 12_345).statement()
        assert text.startswith(
            "Of 200 held-out samples the packed model (12,345 bytes) gets 3 wrong that the float model"
        )
        assert f"at most {100 * upper_bound(3, 200):.2f} % at 95 % confidence" in text
        assert "of 200 preservation samples 3 regressed where the tolerance allows 2, which is NOT held" in text
        assert "outputs for 2 samples were not finite and count as wrong" in text
        assert "guarantee" not in text
        assert text.count(". ") == 0
        assert text.endswith(".")

    def test_the_record_is_json(self):
        model, training, guard = trained()
        kept = PreservationSet.select(model, training, 10)
        found = certify(model, model, guard, kept, tolerance=0.0, **RECORD).as_dict()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["held"] is True
        assert found["guard"]["samples"] == 200
        assert found["preservation"]["upper_bound_95"] == pytest.approx(1 - 0.05 ** (1 / 10))

    def test_a_float_model_that_was_compressed_in_place_is_noticed(self):
        model, training, guard = trained()
        kept = PreservationSet.select(model, training, 40)
        with torch.no_grad():
            model[0].weight.mul_(4).round_().div_(4)
        with pytest.raises(ValueError, match=r"does not give the outputs .* pass the untouched float model"):
            certify(model, model, guard, kept, tolerance=0.0, **RECORD)
        with torch.no_grad():
            model[0].weight.fill_(float("nan"))
        with pytest.raises(ValueError, match="does not give the outputs"):
            certify(model, model, guard, kept, tolerance=0.0, **RECORD)

    def test_what_it_refuses(self):
        model, _, guard = trained()
        with pytest.raises(ValueError, match=r"tolerance=2: want a share .* 0 to 1"):
            certify(model, model, guard, tolerance=2, **RECORD)
        with pytest.raises(ValueError, match="stored_bytes=0: want the bytes"):
            certify(model, model, guard, tolerance=0.0, **(RECORD | {"stored_bytes": 0}))
        with pytest.raises(ValueError, match="no samples to fetch"):
            certify(model, model, TensorDataset(torch.zeros(0, 4)), tolerance=0.0, **RECORD)
        with pytest.raises(ValueError, match=r"packed outputs \(200, 3\), float outputs \(200, 4\)"):
            certify(model, nn.Linear(4, 3), guard, tolerance=0.0, **RECORD)
