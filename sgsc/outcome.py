"""What a finished run reached, and in words why it did not reach more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .guard import Check


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached.

    Attributes:
        stored_ratio: Stored bytes over float32 bytes.
        regressions, allowed: Preservation samples that regressed, that may.
        target_held: Whether the size is at most the target.
        tolerance_held: Whether the preservation set held; None without one.
        reason: Why not, where something was not held; else empty.
    """

    stored_ratio: float
    regressions: int
    allowed: int
    target_held: bool
    tolerance_held: bool | None
    reason: str


def judged(found: Check, size: float, target: float, steps: tuple[int, int], unreached: Sequence[str]) -> Outcome:
    """The outcome of a run that ends with this.

    Args:
        found: The last look at the preservation set; of no samples without one.
        size: Stored bytes over float32 bytes.
        target: What they were to be.
        steps: That were made, that were asked for.
        unreached: Names of layers that no gradient ever reached.
    """
    made, asked = steps
    reasons = []
    if not found.held:
        reasons.append(f"{found.violation()}: raise the tolerance, the target size or the steps")
    if size > target:
        which = "the smallest model that held" if found.samples else "the model"
        way_out = "the target size" + ", the tolerance or the steps" * bool(found.samples)
        reasons.append(f"{which} has {size:.2%} of the float32 bytes, not {target:.2%}: raise {way_out}")
    if reasons and made < asked:
        reasons.insert(0, f"the run ended after {made:,} of {asked:,} steps")
    if size > target and unreached and made:
        some = ", ".join(unreached[:3]) + (" …" if len(unreached) > 3 else "")
        reasons.append(
            f"no gradient reached {len(unreached)} layers ({some}), which keep their bits: leave no_grad off"
        )
    held = found.held if found.samples else None
    return Outcome(size, found.regressions, found.allowed, size <= target, held, "; ".join(reasons))
