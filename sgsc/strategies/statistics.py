"""What calibration keeps of a layer's input: a fixed number of values, however much passes by.

    least, most     of all values
    average         exponential averages of least and most over groups of 64 samples
    histogram       (2 * 4096,) counts over -reach .. reach, reach a power of two; exact zeros are counted apart

A value beyond `reach` doubles it: neighbouring bins are then joined in pairs, which is exact, for 0 stays the edge
between two bins. At least 2048 of the bins are used on the side of the largest magnitude.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

BINS = 4096  # on each side of 0
GROUP = 64  # samples of a step of the averages, so that they do not depend on how data is cut into batches of more
MOMENTUM = 0.9
COUNTED = 2**22  # values at once: histc counts in float32, which stops at 2^24 a bin


class InputStatistics:
    """See the module. `observe` what a layer is given, then ask."""

    def __init__(self) -> None:
        self.least, self.most = 0.0, 0.0
        self.average: tuple[float, float] | None = None
        self.count = self.zeros = self.values = 0  # values of one sample, as it was last seen
        self.reach = 0.0
        self.histogram = torch.zeros(2 * BINS, dtype=torch.float64)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Add an input of any shape, samples along its first axis.

        Raises:
            ValueError: If it holds NaN or infinity, or is not floating point.
        """
        if not x.is_floating_point():
            raise ValueError(f"an input of {x.dtype} has no grid; want floating point")
        if not x.numel():
            return
        x = x.detach().float()
        if not torch.isfinite(x).all():
            raise ValueError("an input holds NaN or infinity")
        for part in x.split(GROUP) if x.dim() else (x[None],):
            low, high = (v.item() for v in part.aminmax())
            if self.average is None:
                self.average = low, high
            else:
                before = self.average
                self.average = (
                    MOMENTUM * before[0] + (1 - MOMENTUM) * low,
                    MOMENTUM * before[1] + (1 - MOMENTUM) * high,
                )
            self.least = low if not self.count else min(self.least, low)
            self.most = high if not self.count else max(self.most, high)
            self.count += part.numel()
        self.values = x[0].numel() if x.dim() else 1
        self._reach_to(max(-self.least, self.most))
        if self.reach:
            others = x[x != 0]
            self.zeros += x.numel() - others.numel()
            for part in others.split(COUNTED):
                self.histogram += torch.histc(part, 2 * BINS, -self.reach, self.reach).double().cpu()
        else:
            self.zeros += x.numel()

    def _reach_to(self, magnitude: float) -> None:
        if magnitude <= self.reach:
            return
        wanted = 2.0 ** math.ceil(math.log2(magnitude))
        wanted = min(wanted if wanted >= magnitude else 2 * wanted, 2.0**127)
        while 0 < self.reach < wanted and self.histogram.any():
            joined = torch.zeros_like(self.histogram)
            joined[BINS // 2 : BINS + BINS // 2] = self.histogram.view(-1, 2).sum(1)
            self.histogram, self.reach = joined, 2 * self.reach
        self.reach = wanted

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) values in order and (P,) counts: the middles of all bins that hold something; zeros are left out."""
        width = self.reach / BINS
        middles = (np.arange(2 * BINS) + 0.5) * width - self.reach
        counts = self.histogram.numpy()
        held = counts > 0
        return np.clip(middles[held], self.least, self.most), counts[held]

    def quantile(self, share: float) -> float:
        """The value below which that share of all values lies, as exact as a bin is wide."""
        values, counts = self.points()
        place = np.searchsorted(values, 0.0)
        values, counts = np.insert(values, place, 0.0), np.insert(counts, place, float(self.zeros))
        reached = np.searchsorted(np.cumsum(counts), share * counts.sum())
        return float(values[min(reached, len(values) - 1)])
