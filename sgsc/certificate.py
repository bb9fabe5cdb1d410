"""What a user takes away: how the packed model answers where the float model was right, sample by sample.

The bound (see `comparison`) speaks of samples drawn independently from the source of the guard split. A preservation
set is chosen, not drawn: the bound computed on it describes its size and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .comparison import Comparison, Part, answers, compare, margins, upper_bound
from .preservation import PreservationSet
from .samples import fetch, outputs

__all__ = [
    "Certificate",
    "Comparison",
    "Part",
    "allowed",
    "answers",
    "certify",
    "compare",
    "margins",
    "outputs",
    "upper_bound",
]

# Outputs recorded at selection may differ from today's by device and batch size, relative to the largest one; a
# compressed model differs by more.
RECORDED_OUTPUTS_MAY_MOVE = 1e-2
ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


_HELD = {True: "held", False: "NOT held", None: "not judged"}


def allowed(tolerance: float, samples: int) -> int:
    """Samples that may regress: floor(tolerance * samples)."""
    return floor(tolerance * samples + ROUNDING)


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
        margin_tolerance: Share of the float model's mean margin on the preservation set that may be lost; None if
            margins are reported and not judged.
        remark: What else is to be said of it, in words.
    """

    guard: Comparison
    preservation: Comparison | None
    tolerance: float
    seeds: dict[str, int]
    hashes: dict[str, str]
    stored_bytes: int
    margin_tolerance: float | None = None
    remark: str = ""

    @property
    def allowed(self) -> int | None:
        """Preservation samples that may regress: floor(tolerance * samples); None without a preservation set."""
        if self.preservation is None:
            return None
        return allowed(self.tolerance, self.preservation.samples)

    @property
    def answers_held(self) -> bool | None:
        """Whether the preservation set regressed no further than allowed; None where there is no set to hold."""
        if self.preservation is None or self.allowed is None:
            return None
        return self.preservation.regressions <= self.allowed

    @property
    def margin_held(self) -> bool | None:
        """Whether the mean margin on the preservation set shrank no further than allowed; None if it is not judged."""
        if self.preservation is None or self.margin_tolerance is None:
            return None
        least = (1 - self.margin_tolerance) * self.preservation.margin_float
        return self.preservation.margin_packed >= least - ROUNDING

    @property
    def held(self) -> bool | None:
        """Whether the answers held and, where it is judged, the margin; None where there is no set to hold."""
        return None if self.answers_held is None else self.answers_held and self.margin_held is not False

    @property
    def reason(self) -> str:
        """What did not hold, or nothing."""
        missed = {
            "the reloaded network regresses on more preservation samples than the tolerance allows": self.answers_held,
            "more of the margin on the preservation samples is lost than the margin tolerance allows": self.margin_held,
        }
        return "; ".join(text for text, held in missed.items() if held is False)

    def as_dict(self) -> dict[str, Any]:
        """All fields and properties, ready for JSON."""
        return {
            "guard": self.guard.as_dict(),
            "preservation": None if self.preservation is None else self.preservation.as_dict(),
            "tolerance": self.tolerance,
            "allowed": self.allowed,
            "margin_tolerance": self.margin_tolerance,
            "answers_held": self.answers_held,
            "margin_held": self.margin_held,
            "held": self.held,
            "reason": self.reason,
            "seeds": dict(self.seeds),
            "hashes": dict(self.hashes),
            "stored_bytes": self.stored_bytes,
            "remark": self.remark,
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
            parts.append(
                f"of {kept.samples} preservation samples {kept.regressions} regressed where the tolerance allows "
                f"{self.allowed}, which is {_HELD[self.answers_held]}"
            )
            if self.margin_tolerance is not None:
                parts.append(
                    f"their mean margin went from {kept.margin_float:.4f} to {kept.margin_packed:.4f} where "
                    f"{100 * self.margin_tolerance:.4g} % may be lost, which is {_HELD[self.margin_held]}"
                )
        broken = guard.non_finite + (kept.non_finite if kept is not None else 0)
        if broken:
            parts.append(f"outputs for {broken} samples were not finite and count as wrong")
        if self.remark:
            parts.append(self.remark)
        return "; ".join(parts) + "."


def certify(
    float_model: nn.Module,
    packed: nn.Module,
    guard: Dataset,
    preservation: PreservationSet | None = None,
    *,
    tolerance: float,
    margin_tolerance: float | None = None,
    stored_bytes: int,
    seeds: Mapping[str, int] | None = None,
    hashes: Mapping[str, str] | None = None,
    remark: str = "",
    batch_size: int = 256,
) -> Certificate:
    """Compare a packed model with the float model that it came from.

    Args:
        float_model: The model before compression, untouched.
        packed: The model as it was loaded from its file.
        guard: Map-style dataset of (x, y) pairs, held out from training and selection.
        preservation: The set that the compression had to keep; its recorded outputs stand for the float model.
        tolerance: Share of the preservation samples that may regress, 0 to 1.
        margin_tolerance: Share of the mean preservation margin that may be lost, 0 to 1; None for no such gate.
        seeds: Seed of each random choice, by name.
        hashes: Digests of model, data and file, by name; that of the data which the set was chosen from is added.
        stored_bytes: Bytes of the artefact on disk, as `save` returned them.
        remark: What else a reader must know, such as what the guard split is not held out from; ends the statement.
            That guard samples are in the preservation set, and which position of a sequence is judged, is added.
        batch_size: Samples a forward pass.

    Raises:
        ValueError: If a setting is out of range, shapes do not match, or `float_model` no longer gives the outputs that
            the preservation set recorded.
    """
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance={tolerance}: want a share of the preservation samples, 0 to 1; 0 allows none")
    if margin_tolerance is not None and not 0 <= margin_tolerance <= 1:
        raise ValueError(
            f"margin_tolerance={margin_tolerance}: want a share of the mean preservation margin, 0 to 1, or None"
        )
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
    remarks = [remark] if remark else []
    if targets.dim() == 2:
        remarks.append("sequences are judged at their last position")
    if preservation is not None:
        known = {_bytes_of(x) for x in preservation.inputs}
        both = sum(_bytes_of(x) in known for x in inputs)
        if both:
            remarks.append(
                f"{both} of the held-out samples are in the preservation set, too: the bound is not of those"
            )
        hashes = {"what the set was chosen from": preservation.data_hash} | dict(hashes or {})
    return Certificate(
        guard=compare(outputs(float_model, inputs, batch_size), outputs(packed, inputs, batch_size), targets),
        preservation=kept,
        tolerance=tolerance,
        margin_tolerance=margin_tolerance,
        seeds=dict(seeds or {}),
        hashes=dict(hashes or {}),
        stored_bytes=stored_bytes,
        remark="; ".join(remarks),
    )


def _bytes_of(sample: Tensor) -> bytes:
    return sample.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
