"""Two models on the same samples: which answers one gets right and the other wrong, and by what margin.

A regression is a sample that the float model gets right and the packed model gets wrong; an improvement is the reverse.
Both models see the same samples, so the comparison is paired: equal accuracies may hide regressions, counts do not.

    upper bound  the rate p at which k regressions or fewer in n samples still have chance 1 - confidence: the
                 confidence quantile of Beta(k + 1, n - k); 1 where k = n (Clopper & Pearson, Biometrika 1934)
    McNemar      two-sided binomial test of k regressions among the k + m samples whose rightness changed, chance 1/2
    margin       probability of the right class less the largest other; it shrinks before answers change
    hard tail    of the samples that the float model answers right, the tenth (rounded up) with its lowest margins

The first two are exact, without a normal approximation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import sqrt
from typing import Any

from scipy import stats
from torch import Tensor

from .samples import check_outputs, check_targets

TAIL = 10  # the hard tail is one sample in so many


def answers(outputs: Tensor) -> Tensor:
    """The answer to each sample, (N,) int64: the largest class, of a sequence (N, T, V) at its last position only.

    One answer a sample, because positions of one sequence are not independent and the bounds need independence.
    """
    return _deciding(outputs).argmax(-1)


def _deciding(outputs: Tensor) -> Tensor:
    """The rows that decide the answers: (N, classes)."""
    return outputs[:, -1] if outputs.dim() == 3 else outputs


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """Decision margin of each sample, (N,) float64 from -1 to 1: probability of the right class less the largest other.

    Where the answer is right this is the top-2 margin, where it is wrong it is negative. A sequence has one margin, at
    its last position, as it has one answer. -1 for a sample with NaN or infinity anywhere in its outputs.

    Args:
        outputs: Logits (N, classes), or (N, T, vocabulary), on any device.
        targets: (N,) class ids, or (N, T) token ids, there too; unchecked, for this is called while training.
    """
    probability = _deciding(outputs).double().softmax(-1)
    right = (targets[:, -1] if targets.dim() == 2 else targets).long()[:, None]
    margin = probability.gather(1, right) - probability.scatter(1, right, -1.0).amax(1, keepdim=True)
    return margin.squeeze(1).where(outputs.isfinite().flatten(1).all(1), -1.0)


def upper_bound(regressions: int, samples: int, confidence: float = 0.95) -> float:
    """Clopper-Pearson one-sided exact upper bound of the rate of regressions, from 0 to 1; 1 for no samples.

    Raises:
        ValueError: Unless 0 <= regressions <= samples and 0 < confidence < 1.
    """
    if not 0 <= regressions <= samples:
        raise ValueError(
            f"upper_bound: {regressions} regressions of {samples} samples; want 0 <= regressions <= samples"
        )
    if not 0 < confidence < 1:
        raise ValueError(f"upper_bound: confidence={confidence}; want a number between 0 and 1, such as 0.95")
    if regressions == samples:
        return 1.0
    return float(stats.beta.ppf(confidence, regressions + 1, samples - regressions))


@dataclass(frozen=True)
class Part:
    """Some of the samples that the float model answers right (no other can regress): a class of them, or the hard tail.

    Attributes:
        samples: How many.
        regressions: Of them, those that the packed model answers wrong.
        margin_float: Their mean margin; 0 without samples.
        margin_packed: The same of the packed model.
    """

    samples: int
    regressions: int
    margin_float: float
    margin_packed: float

    @property
    def share(self) -> float:
        """Share of the samples that regressed; 0 without samples."""
        return self.regressions / self.samples if self.samples else 0.0

    @property
    def margin_lost(self) -> float:
        """Share of the float margin that is gone; negative where the margin grew, 0 where there was none."""
        return 1 - self.margin_packed / self.margin_float if self.margin_float else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        return asdict(self) | {"share": self.share, "margin_lost": self.margin_lost}


@dataclass(frozen=True)
class Comparison:
    """Two models on the same samples; made by `compare`.

    Attributes:
        samples: How many.
        float_right: Samples that the float model answers right.
        packed_right: Samples that the packed model answers right.
        regressions: Right before, wrong after.
        improvements: Wrong before, right after.
        agreement: Share of samples with the same answer, right or wrong.
        upper_bound_95: Clopper-Pearson bound at 95 % of the rate of regressions.
        mcnemar_p: Exact two-sided chance of so uneven a split of regressions and improvements if both were as likely.
        margin_float: Mean probability of the right class less the largest other, over samples that float had right.
        margin_packed: The same of the packed model, over the same samples; -1 for outputs that are not finite.
        largest_output_difference: Largest absolute difference of two outputs, all positions, where packed is finite.
        by_class: Class, as text, to its part; every class among the targets is listed.
        tail: The hard tail, by the float model's own margins; of equal ones, those that come first.
        changed: Positions of the regressions, ascending.
        non_finite: Samples for which the packed model returned NaN or infinity; each counts as a wrong answer.
    """

    samples: int
    float_right: int
    packed_right: int
    regressions: int
    improvements: int
    agreement: float
    upper_bound_95: float
    mcnemar_p: float
    margin_float: float
    margin_packed: float
    largest_output_difference: float
    by_class: dict[str, Part]
    tail: Part
    changed: tuple[int, ...]
    non_finite: int

    @property
    def float_accuracy(self) -> float:
        """Share of samples that the float model answers right."""
        return self.float_right / self.samples

    @property
    def packed_accuracy(self) -> float:
        """Share of samples that the packed model answers right."""
        return self.packed_right / self.samples

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the float accuracy."""
        return sqrt(self.float_accuracy * (1 - self.float_accuracy) / self.samples)

    @property
    def whole(self) -> Part:
        """All samples that the float model answers right, as one part."""
        return Part(self.float_right, self.regressions, self.margin_float, self.margin_packed)

    @property
    def margin_lost(self) -> float:
        """Share of the mean float margin that is gone; negative where it grew."""
        return self.whole.margin_lost

    @property
    def regressions_by_class(self) -> dict[str, int]:
        """Class, as text, to its regressions."""
        return {name: part.regressions for name, part in self.by_class.items()}

    @property
    def worst_class(self) -> str | None:
        """The class of which the largest share regressed; of equal ones, the one that lost most of its margin.

        So it names a class while no answer has changed yet. None if the float model answers nothing right.
        """
        known = {name: (part.share, part.margin_lost) for name, part in self.by_class.items() if part.samples}
        return max(known, key=lambda name: known[name]) if known else None

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        worst = self.worst_class
        return named | {
            "by_class": {name: part.as_dict() for name, part in self.by_class.items()},
            "tail": self.tail.as_dict(),
            "worst_class": None if worst is None else {"name": worst} | self.by_class[worst].as_dict(),
            "margin_lost": self.margin_lost,
            "regressions_by_class": self.regressions_by_class,
            "changed": list(self.changed),
            "float_accuracy": self.float_accuracy,
            "packed_accuracy": self.packed_accuracy,
            "standard_error": self.standard_error,
        }


def compare(float_outputs: Tensor, packed_outputs: Tensor, targets: Tensor) -> Comparison:
    """Compare two models' outputs on the same samples.

    Args:
        float_outputs: (N, classes), or (N, T, vocabulary), finite.
        packed_outputs: The same shape; a sample with NaN or infinity anywhere in it counts as answered wrong.
        targets: (N,) class ids, or (N, T) token ids of which the last is what the answer is judged by.

    Raises:
        ValueError: If there are no samples, shapes or dtypes do not match, or a float output is not finite.
    """
    check_outputs(float_outputs)
    check_targets(targets, float_outputs)
    if packed_outputs.shape != float_outputs.shape:
        raise ValueError(
            f"compare: packed outputs {tuple(packed_outputs.shape)}, float outputs {tuple(float_outputs.shape)}; "
            "both models must see the same samples"
        )
    samples = len(targets)
    if samples == 0:
        raise ValueError("compare: no samples; a certificate needs at least one")
    float_outputs, packed_outputs, targets = (t.detach().cpu() for t in (float_outputs, packed_outputs, targets.long()))
    if not float_outputs.isfinite().all():
        raise ValueError("compare: the float model's outputs hold NaN or infinity; there is no right answer to keep")

    finite = packed_outputs.isfinite().flatten(1).all(1)
    truth = targets[:, -1] if targets.dim() == 2 else targets
    float_answers, packed_answers = answers(float_outputs), answers(packed_outputs)
    float_right = float_answers == truth
    packed_right = (packed_answers == truth) & finite
    worse, better = float_right & ~packed_right, ~float_right & packed_right
    regressions, improvements = int(worse.sum()), int(better.sum())

    before, after = margins(float_outputs, targets), margins(packed_outputs, targets)
    difference = (packed_outputs[finite] - float_outputs[finite]).abs()
    right = float_right.nonzero().squeeze(1)
    hardest = before[right].argsort(stable=True)[: -(-len(right) // TAIL)]

    def part(which: Tensor) -> Part:
        if not len(which):
            return Part(0, 0, 0.0, 0.0)
        return Part(len(which), int(worse[which].sum()), float(before[which].mean()), float(after[which].mean()))

    whole = part(right)
    return Comparison(
        samples=samples,
        float_right=whole.samples,
        packed_right=int(packed_right.sum()),
        regressions=regressions,
        improvements=improvements,
        agreement=int(((float_answers == packed_answers) & finite).sum()) / samples,
        upper_bound_95=upper_bound(regressions, samples),
        mcnemar_p=_mcnemar(regressions, improvements),
        margin_float=whole.margin_float,
        margin_packed=whole.margin_packed,
        largest_output_difference=float(difference.max()) if difference.numel() else 0.0,
        by_class={str(c): part(right[truth[right] == c]) for c in truth.unique().tolist()},
        tail=part(right[hardest]),
        changed=tuple(worse.nonzero().flatten().tolist()),
        non_finite=int((~finite).sum()),
    )


def _mcnemar(regressions: int, improvements: int) -> float:
    changed = regressions + improvements
    return float(stats.binomtest(regressions, changed, 0.5).pvalue) if changed else 1.0
