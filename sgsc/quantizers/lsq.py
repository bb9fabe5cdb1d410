"""Uniform quantization-aware training, the baseline that learned widths are compared with.

Esser et al., Learned Step Size Quantization, arXiv 1902.08153: the width stays, the step is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Quantizer

WIDTHS = range(2, 9)
MAX_BITS = max(WIDTHS)
SMALLEST_STEP = 1e-12  # of a row of zeros


class LSQ(Quantizer):
    """A learned step a channel at a fixed width; a class a width is registered, "lsq2" to "lsq8".

        n     = bit_depth, whole and fixed
        scale = |step|, rounded to bfloat16       so that two bytes store it without loss
        codes   -2^(n-1) .. 2^(n-1) - 1 = Q_P; none at n = 0

    step       (C,)  starts as 2 <|w|> / sqrt(Q_P)                  (section 2.1)
    bit_depth  (C,)  bits a weight; not trained

    The gradient of the step is multiplied by 1 / sqrt(K Q_P), K weights a row (section 2.2).
    """

    start_bits: int

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.ones(channels))
        self.bit_depth = nn.Parameter(torch.full((channels,), float(self.start_bits)), requires_grad=False)
        self.row = 1  # weights a row, known when fitted

    def bit_cost(self) -> Tensor:
        """(C,) the width."""
        return self.bit_depth.clamp(0, MAX_BITS).round()

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        n = self.bit_cost()
        half = torch.exp2(n - 1)
        slow = self.step / (self.row * (half - 1).clamp_min(1)).sqrt()
        size = self.step.abs().clamp_min(SMALLEST_STEP)  # a step that crosses 0 comes back
        scale = size.bfloat16().to(size.dtype).detach() + self.step.sign().detach() * (slow - slow.detach())
        return scale, torch.where(n > 0, -half, 0.0), torch.where(n > 0, half - 1, 0.0), torch.zeros_like(scale)

    @torch.no_grad()
    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Start each channel's step from the mean magnitude of its weights."""
        self.row = max(rows.shape[1], 1)
        most = (torch.exp2(self.bit_cost() - 1) - 1).clamp_min(1)
        start = (2 * rows.abs().sum(1).to(most.dtype) / self.row / most.sqrt()).clamp_min(SMALLEST_STEP)
        self.step.copy_(start if where is None else torch.where(where, start, self.step))


for _bits in WIDTHS:
    type(f"LSQ{_bits}", (LSQ,), {"start_bits": _bits, "__doc__": LSQ.__doc__}, name=f"lsq{_bits}")
