"""What a user takes away: how the packed model answers where the float model was right, sample by sample.

A regression is a sample that the float model gets right and the packed model gets wrong; an improvement is the reverse.
Both models see the same samples, so the comparison is paired: equal accuracies may hide regressions, counts do not.

    upper bound  the rate p at which k regressions or fewer in n samples still have chance 1 - confidence: the
                 confidence quantile of Beta(k + 1, n - k); 1 where k = n (Clopper & Pearson, Biometrika 1934)
    McNemar      two-sided binomial test of k regressions among the k + m samples whose rightness changed, chance 1/2

Both are exact, without a normal approximation. The bound speaks of samples drawn independently from the source of the
guard split. A preservation set is chosen, not drawn: the bound computed on it describes its size and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import floor, sqrt
from typing import Any

from scipy import stats
from torch import Tensor, nn
from torch.utils.data import Dataset

from .preservation import PreservationSet
from .samples import check_outputs, check_targets, fetch, outputs

# Outputs recorded at selection may differ from today's by device and batch size, relative to the largest one; a
# compressed model differs by more.
RECORDED_OUTPUTS_MAY_MOVE = 1e-2


def answers(outputs: Tensor) -> Tensor:
    """The answer to each sample, (N,) int64: the largest class, of a sequence (N, T, V) at its last position only.

    One answer a sample, because positions of one sequence are not independent and the bounds need independence.
    """
    return _deciding(outputs).argmax(-1)


def _deciding(outputs: Tensor) -> Tensor:
    """The rows that decide the answers: (N, classes)."""
    return outputs[:, -1] if outputs.dim() == 3 else outputs


def allowed(tolerance: float, samples: int) -> int:
    """Samples that may regress: floor(tolerance * samples)."""
    return floor(tolerance * samples + 1e-9)  # 0.29 * 100 is 28.999999999999996


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


def _margin(rows: Tensor, right: Tensor) -> Tensor:
    """Probability of the right class less the largest other, (N,): the top-2 margin where right, else negative."""
    probability = rows.double().softmax(-1)
    own = probability.gather(1, right[:, None])
    return (own - probability.scatter(1, right[:, None], -1.0).amax(1, keepdim=True)).squeeze(1)


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
        regressions_by_class: Class, as text, to its regressions; every class among the targets is listed.
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
    regressions_by_class: dict[str, int]
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

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return named | {
            "regressions_by_class": dict(self.regressions_by_class),
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

    kept = _margin(_deciding(packed_outputs), truth).where(finite, -1.0)
    difference = (packed_outputs[finite] - float_outputs[finite]).abs()
    had_right = int(float_right.sum())
    return Comparison(
        samples=samples,
        float_right=had_right,
        packed_right=int(packed_right.sum()),
        regressions=regressions,
        improvements=improvements,
        agreement=int(((float_answers == packed_answers) & finite).sum()) / samples,
        upper_bound_95=upper_bound(regressions, samples),
        mcnemar_p=_mcnemar(regressions, improvements),
        margin_float=float(_margin(_deciding(float_outputs), truth)[float_right].mean()) if had_right else 0.0,
        margin_packed=float(kept[float_right].mean()) if had_right else 0.0,
        largest_output_difference=float(difference.max()) if difference.numel() else 0.0,
        regressions_by_class={str(c): int((worse & (truth == c)).sum()) for c in truth.unique().tolist()},
        changed=tuple(worse.nonzero().flatten().tolist()),
        non_finite=int((~finite).sum()),
    )


def _mcnemar(regressions: int, improvements: int) -> float:
    changed = regressions + improvements
    return float(stats.binomtest(regressions, changed, 0.5).pvalue) if changed else 1.0


@dataclass(frozen=True)
class Certificate:
    """What was found about a packed model; made by `certify`.

    Attributes:
        guard: On held-out samples that neither training nor selection saw.
        preservation: On the preservation set, or None without one.
        tolerance: Share of the preservation samples that may regress.
        stored_bytes: Bytes of the artefact on disk.
        seeds: Seed of each random choice, by name, for the record.
        hashes: Digests of model, data and file, by name, for the record.
    """

    guard: Comparison
    preservation: Comparison | None
    tolerance: float
    seeds: dict[str, int]
    hashes: dict[str, str]
    stored_bytes: int

    @property
    def allowed(self) -> int | None:
        """Preservation samples that may regress: floor(tolerance * samples); None without a preservation set."""
        if self.preservation is None:
            return None
        return allowed(self.tolerance, self.preservation.samples)

    @property
    def held(self) -> bool | None:
        """Whether the preservation set regressed no further than allowed; None where there is no set to hold."""
        if self.preservation is None or self.allowed is None:
            return None
        return self.preservation.regressions <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        return {
            "guard": self.guard.as_dict(),
            "preservation": None if self.preservation is None else self.preservation.as_dict(),
            "tolerance": self.tolerance,
            "allowed": self.allowed,
            "held": self.held,
            "seeds": dict(self.seeds),
            "hashes": dict(self.hashes),
            "stored_bytes": self.stored_bytes,
            "statement": self.statement(),
        }

    def statement(self) -> str:
        """One sentence that claims no more than was measured."""
        guard, kept = self.guard, self.preservation
        parts = [
            f"Of {guard.samples} held-out samples the packed model ({self.stored_bytes:,} bytes) gets "
            f"{guard.regressions} wrong that the float model gets right, so for samples drawn independently from the "
            f"same source the rate of such regressions is at most {100 * guard.upper_bound_95:.2f} % at 95 % confidence"
        ]
        if kept is not None:
            verdict = "held" if self.held else "NOT held"
            parts.append(
                f"of {kept.samples} preservation samples {kept.regressions} regressed where the tolerance allows "
                f"{self.allowed}, which is {verdict}"
            )
        broken = guard.non_finite + (kept.non_finite if kept is not None else 0)
        if broken:
            parts.append(f"outputs for {broken} samples were not finite and count as wrong")
        return "; ".join(parts) + "."


def certify(
    float_model: nn.Module,
    packed: nn.Module,
    guard: Dataset,
    preservation: PreservationSet | None = None,
    *,
    tolerance: float,
    stored_bytes: int,
    seeds: Mapping[str, int] | None = None,
    hashes: Mapping[str, str] | None = None,
    batch_size: int = 256,
) -> Certificate:
    """Compare a packed model with the float model that it came from.

    Args:
        float_model: The model before compression, untouched.
        packed: The model as it was loaded from its file.
        guard: Map-style dataset of (x, y) pairs, held out from training and selection.
        preservation: The set that the compression had to keep; its recorded outputs stand for the float model.
        tolerance: Share of the preservation samples that may regress, 0 to 1.
        seeds: Seed of each random choice, by name.
        hashes: Digests of model, data and file, by name.
        stored_bytes: Bytes of the artefact on disk.
        batch_size: Samples a forward pass.

    Raises:
        ValueError: If a setting is out of range, shapes do not match, or `float_model` no longer gives the outputs that
            the preservation set recorded.
    """
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance={tolerance}: want a share of the preservation samples, 0 to 1; 0 allows none")
    if stored_bytes < 1:
        raise ValueError(f"stored_bytes={stored_bytes}: want the bytes of the artefact on disk, at least 1")
    kept = None
    if preservation is not None:
        recorded = preservation.outputs
        now = outputs(float_model, preservation.inputs, batch_size)
        if (
            now.shape != recorded.shape
            or not (now - recorded).abs().max() <= RECORDED_OUTPUTS_MAY_MOVE * recorded.abs().max()
        ):
            raise ValueError(
                "float_model does not give the outputs that the preservation set recorded, as if it had been trained "
                "or compressed since; pass the untouched float model, for example copy.deepcopy(model) taken before"
            )
        kept = compare(recorded, outputs(packed, preservation.inputs, batch_size), preservation.targets)
    inputs, targets = fetch(guard, range(len(guard)))  # pyright: ignore[reportArgumentType]
    return Certificate(
        guard=compare(outputs(float_model, inputs, batch_size), outputs(packed, inputs, batch_size), targets),
        preservation=kept,
        tolerance=tolerance,
        seeds=dict(seeds or {}),
        hashes=dict(hashes or {}),
        stored_bytes=stored_bytes,
    )
