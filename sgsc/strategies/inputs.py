"""Strategies that find the range of a layer's input from its statistics."""

from __future__ import annotations

import numpy as np

from .registry import RangeStrategy, grid_between
from .statistics import InputStatistics

RATIOS = np.linspace(0.02, 1.0, 99)  # parts of the range that are tried
ROUNDS, STARTS = 20, (1.0, 0.7, 0.45)  # of alternation, as for weights


class MinMax(RangeStrategy, name="min-max"):
    """All that was seen; nothing is clipped."""

    @classmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """See `RangeStrategy`."""
        return seen.least, seen.most


class MovingAverage(RangeStrategy, name="moving-average"):
    """Averages of the ends of groups of samples (Jacob et al. 2017, arXiv 1712.05877, section 3.1)."""

    @classmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """See `RangeStrategy`."""
        return seen.average or (0.0, 0.0)


class Percentile(RangeStrategy, name="percentile"):
    """All but a share 2^-(b + 6) of the values, a sixty-fourth of a level's; half of it at each end with values."""

    @classmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """See `RangeStrategy`."""
        share = 2.0 ** -(bits + 6)
        if seen.least >= 0:
            return 0.0, seen.quantile(1 - share)
        return seen.quantile(share / 2), seen.quantile(1 - share / 2)


class KL(RangeStrategy, name="kl"):
    """The range of least divergence of the rounded from the real distribution (Migacz 2017, "8-bit inference with
    TensorRT"), of 2048 bins or more.

    What is clipped counts as mass of the last bin in the range; zeros, which are exact, do not count.
    """

    @classmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """See `RangeStrategy`."""
        values, counts = seen.points()
        if not len(values):
            return 0.0, 0.0
        found = [_divergence(values, counts, *grid_between(seen.least * r, seen.most * r, bits)) for r in RATIOS]
        ratio = RATIOS[int(np.argmin(found))]
        return seen.least * ratio, seen.most * ratio


class MSE(RangeStrategy, name="mse"):
    """The range of least squared error: one part of both ends first, then each end by itself."""

    @classmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """See `RangeStrategy`."""
        values, counts = seen.points()
        if not len(values):
            return 0.0, 0.0

        def best(pairs: list[tuple[float, float]]) -> tuple[float, float]:
            return min(pairs, key=lambda p: _error(values, counts, *grid_between(*p, bits)))

        low, high = best([(seen.least * r, seen.most * r) for r in RATIOS])
        if seen.least < 0 < seen.most:
            low, high = best([(seen.least * r, high) for r in RATIOS] + [(low, high)])
            low, high = best([(low, seen.most * r) for r in RATIOS] + [(low, high)])
        return low, high


class LeastSquares(RangeStrategy, name="least-squares"):
    """Alternates codes and the step that suits them, from parts of that of min-max on; the best on the way."""

    @classmethod
    def ends(cls, seen: InputStatistics, bits: int) -> tuple[float, float]:
        """See `RangeStrategy`."""
        values, counts = seen.points()
        scale, first, last = grid_between(seen.least, seen.most, bits)
        if not len(values):
            return 0.0, 0.0
        found = []
        for start in STARTS:
            step = start * scale
            for _ in range(ROUNDS):
                found.append((_error(values, counts, step, first, last), step))
                codes = np.clip(np.rint(values / step), first, last)
                if not codes.any():
                    break
                step = float((counts * values * codes).sum() / (counts * codes * codes).sum())
        scale = min(found)[1]
        return scale * first, scale * last


def _error(values: np.ndarray, counts: np.ndarray, scale: float, first: int, last: int) -> float:
    rounded = np.clip(np.rint(values / scale), first, last) * scale
    return float((counts * ((rounded - values) / scale) ** 2).sum()) * scale * scale


def _divergence(values: np.ndarray, counts: np.ndarray, scale: float, first: int, last: int) -> float:
    """Sum of p log(p / q): p the counts with what is clipped in the last bins, q each code's count over its bins."""
    codes = np.rint(values / scale)
    inside = (codes >= first) & (codes <= last)
    if not inside.any():
        return float("inf")
    kept = counts[inside]
    index = (codes[inside] - first).astype(np.int64)
    mass = np.bincount(index, kept, last - first + 1)
    spread = mass[index] / np.bincount(index, minlength=last - first + 1)[index]
    clipped = kept.copy()
    clipped[-1] += counts[codes > last].sum()
    clipped[0] += counts[codes < first].sum()
    # q lacks what is clipped and is not made whole: a range of one bin would else be without divergence
    p, q = clipped / counts.sum(), spread / counts.sum()
    return float((p * np.log(p / q)).sum())
