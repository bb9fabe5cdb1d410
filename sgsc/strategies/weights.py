"""Strategies that find the step of trained weights without training; codes -most - 1 .. most, without shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .registry import WeightStrategy, errors

RATIOS = 100  # steps that `mse` tries a row, evenly from a hundredth of that of max-abs to it
ROUNDS = 20  # of alternation, from each start
STARTS = (1.0, 0.7, 0.45)  # parts of the step of max-abs: alternation ends at the first step that suits its own codes
NORM, HARDENING = 0.7, 1.05  # of half-quadratic splitting: p, and the growth of beta a round


class MaxAbs(WeightStrategy, name="max-abs"):
    """The largest magnitude gets the highest code; nothing is clipped."""

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""
        return rows.abs().amax(1) / most


class Percentile(WeightStrategy, name="percentile"):
    """The highest code stands for what a share 2^-(b + 3) of the weights exceeds, an eighth of that of a level."""

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""
        share = 1 - 1 / (16 * (most + 1))
        magnitudes = rows.abs().sort(1).values
        place = share * (rows.shape[1] - 1)  # torch.quantile takes no more than 2^24 values
        below = magnitudes[:, int(place)]
        above = magnitudes[:, min(int(place) + 1, rows.shape[1] - 1)]
        return torch.lerp(below, above, place % 1) / most


class MSE(WeightStrategy, name="mse"):
    """The step of least squared error among a hundred."""

    power = 2.0

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""
        largest = (rows.abs().amax(1) / most).bfloat16().to(rows.dtype)
        best, least = largest, errors(rows, largest, most)
        for part in range(1, RATIOS):
            tried = (largest * (part / RATIOS)).bfloat16().to(rows.dtype)
            error = errors(rows, tried, most)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
        return best


class LeastSquares(WeightStrategy, name="least-squares"):
    """Alternates codes and the step that suits them, <row, code> / <code, code>; the best of three starts."""

    power = 2.0

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""
        return _alternate(rows, most, 2.0, lambda error, scale, beta: torch.zeros_like(error), STARTS)


class HalfQuadratic(WeightStrategy, name="half-quadratic"):
    """Half-quadratic splitting of a sum of |error|^0.7 (Badri and Shaji 2023, HQQ): large errors are outliers.

    Their solver moves zero points of groups of weights at given scales. Our grids hold 0, so it is the scale that is
    solved for here; and errors are measured in steps, so that one beta suits all rows: it starts at 1, at which an
    error is an outlier from one step on, and ends where half a step is one, the most that rounding alone makes. From
    the step of max-abs alone: smaller ones lead to less of that sum and, at 8 bits, to 20 times the squared error.
    """

    power = NORM

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""

        def outliers(error: Tensor, scale: Tensor, beta: float) -> Tensor:  # their generalised soft threshold
            v = error / scale[:, None]
            size = v.abs()
            kept = (size - size.clamp_min(1e-6).pow(NORM - 1) / beta).clamp_min(0)
            return v.sign() * kept * scale[:, None]

        return _alternate(rows, most, NORM, outliers, STARTS[:1])


def _alternate(
    rows: Tensor, most: int, power: float, outliers: Callable[[Tensor, Tensor, float], Tensor], starts: Sequence[float]
) -> Tensor:
    """The best step on the way of: codes of the rows; errors that are outliers; least squares of what is left."""
    largest = (rows.abs().amax(1) / most).clamp_min(1e-6).bfloat16().to(rows.dtype)
    best, least = largest, errors(rows, largest, most, power)
    for start in starts:
        scale, beta = (start * largest).bfloat16().to(rows.dtype), 1.0
        for _ in range(ROUNDS):
            codes = (rows / scale[:, None]).clamp(-most - 1, most).round()
            wanted = rows - outliers(rows - codes * scale[:, None], scale, beta)
            norm = codes.square().sum(1)
            solved = (wanted * codes).sum(1) / norm.clamp_min(1)
            scale = torch.where((norm > 0) & (solved > 0), solved, scale).bfloat16().to(rows.dtype)
            error = errors(rows, scale, most, power)
            better = error < least
            best, least = torch.where(better, scale, best), torch.where(better, error, least)
            beta *= HARDENING
    return best
