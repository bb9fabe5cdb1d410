"""Strategies that learn their grid together with the weights; each starts from a weight or from statistics.

All gradients are those of `fake_quantize`, straight through the rounding; what differs is the formula before it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sgsc.kernels import fake_quantize
from sgsc.quantizers import InputQuantizer
from sgsc.quantizers.base import Codes

from .inputs import MSE
from .registry import SMALLEST_STEP, InputStrategy, WeightStrategy, check_bits, grid_between
from .statistics import InputStatistics
from .weights import MaxAbs


class LSQ(WeightStrategy, name="lsq"):
    """A learned step (Esser et al. 2019, arXiv 1902.08153): starts as 2 <|w|> / sqrt(Q_P), section 2.1.

    The gradient of a step is multiplied by 1 / sqrt(K Q_P), K weights a step (section 2.2). `sgsc.quantizers.LSQ` is
    the same for rows whose width may change; this one also has one step for all rows.
    """

    trained = True
    slowness: Tensor  # (), what the gradient of a step is multiplied by

    def __init__(self, channels: int, bits: int, per_channel: bool = True) -> None:
        super().__init__(channels, bits, per_channel)
        self.step = nn.Parameter(torch.ones(channels if per_channel else min(channels, 1)))
        self.register_buffer("slowness", torch.ones(()))

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""
        return 2 * rows.abs().mean(1) / math.sqrt(most)

    @torch.no_grad()
    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """See `WeightStrategy`."""
        super().fit(rows, where)
        self.slowness.fill_((max(rows.numel() // max(len(self.step), 1), 1) * self.most()) ** -0.5)
        self.step.copy_(self.scale[: len(self.step)])

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        _, lo, hi, shift = super().grid()
        slow = self.step * self.slowness
        size = self.step.detach().abs().clamp_min(SMALLEST_STEP)  # a step that crosses 0 comes back
        scale = size.bfloat16().to(size.dtype) + self.step.detach().sign() * (slow - slow.detach())
        return scale.expand(len(lo)), lo, hi, shift


class LSQPlus(LSQ, name="lsq+"):
    """LSQ from the start of LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576): max(|m - 3 s|, |m + 3 s|) / 2^(b-1).

    m and s are mean and standard deviation of the weights of a step (section 3.2); weights get no offset there either.
    """

    def steps(self, rows: Tensor, most: int) -> Tensor:
        """See `WeightStrategy`."""
        mean, deviation = rows.mean(1), rows.std(1, correction=0)
        return torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / (most + 1)


class MinMax(MaxAbs, name="straight-through"):
    """The step of max-abs, found anew from the weights at every step of the training."""

    trained = True

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K)."""
        if self.training:
            self.fit(rows)
        return super().forward(rows)


class DoReFa(MaxAbs, name="dorefa"):
    """Rounds tanh(w) instead of w (Zhou et al. 2016, arXiv 1606.06160, equation 9), which spreads out small weights.

    There tanh(w) / max |tanh(w)| in -1..1 is the weight, whatever its size was, on a grid without 0. Ours keeps the
    largest weight as it is, so that a trained network survives the start, and a 0, so that the codes can be stored.
    """

    trained = True

    def squashed(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K): what is rounded."""
        if not rows.numel():
            return rows
        most = rows.abs().amax(1, keepdim=True) if self.per_channel else rows.abs().amax()
        most = most.clamp_min(SMALLEST_STEP)
        return (rows.tanh() / most.tanh() * most).to(rows.dtype)

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K)."""
        rows = self.squashed(rows)
        if self.training:
            self.fit(rows)
        return fake_quantize(rows, *self.grid())

    @torch.no_grad()
    def codes(self, rows: Tensor) -> Codes:
        """See `Quantizer`."""
        return super().codes(self.squashed(rows))


# ---- inputs ----


class LearnedInput(InputStrategy, InputQuantizer):
    """A learned step on fixed codes; abstract.

    step                (1,)  starts where the range of least squared error has it
    code_min, code_max  (1,)  from 0 on for inputs that are nowhere negative
    """

    trained = True
    code_min: Tensor
    code_max: Tensor
    slowness: Tensor  # (), what the gradient of the step is multiplied by

    def __init__(self, scale: float, code_min: int, code_max: int, values: int) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor([float(scale)]))
        self.register_buffer("code_min", torch.tensor([float(code_min)]))
        self.register_buffer("code_max", torch.tensor([float(code_max)]))
        self.register_buffer("slowness", torch.tensor((max(values, 1) * max(code_max, -code_min, 1)) ** -0.5))

    @classmethod
    def fitted(cls, seen: InputStatistics, bits: int) -> InputQuantizer:
        """See `InputStrategy`."""
        scale, first, last = grid_between(*MSE.ends(seen, check_bits(bits)), bits)
        return cls(scale, first, last, seen.values)

    def learned_step(self) -> Tensor:
        """(1,) positive, with the gradient of `step` made slow by 1 / sqrt(values of a sample * Q_P)."""
        slow = self.step * self.slowness
        return self.step.detach().abs().clamp_min(SMALLEST_STEP) + self.step.detach().sign() * (slow - slow.detach())


class LSQInput(LearnedInput, name="lsq"):
    """A learned step (Esser et al. 2019, arXiv 1902.08153); codes stay where calibration has put them."""

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `InputQuantizer`."""
        return self.learned_step(), self.code_min, self.code_max, torch.zeros_like(self.code_min)


class LSQPlusInput(LearnedInput, name="lsq+"):
    """A learned step and a learned offset (Bhalgat et al. 2020, arXiv 2004.09576, section 3.1), also below 0 for ReLU.

    There the offset is real; here it is a whole number of steps, so that 0 has a code. Straight through its rounding.
    """

    def __init__(self, scale: float, code_min: int, code_max: int, values: int) -> None:
        super().__init__(scale, code_min, code_max, values)
        self.offset = nn.Parameter(torch.tensor([float(scale * code_min)]))  # the least value, in the unit of the input

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `InputQuantizer`."""
        scale, levels = self.learned_step(), self.code_max - self.code_min
        slow = self.offset * self.slowness
        offset = self.offset.detach() + slow - slow.detach()
        first = torch.minimum(torch.maximum(offset / scale.detach(), -levels), torch.zeros_like(levels))
        first = first + (first.round() - first).detach()
        return scale, first, first + levels, torch.zeros_like(scale)


class PACT(LearnedInput, name="pact"):
    """A learned clip (Choi et al. 2018, arXiv 1805.06085, equation 3): its gradient is that of what lies beyond, alone.

    An input that is somewhere negative has the same clip at both ends, in codes -2^(b-1) + 1 .. 2^(b-1) - 1. Starts at
    the clip of least squared error.
    """

    @classmethod
    def fitted(cls, seen: InputStatistics, bits: int) -> InputQuantizer:
        """See `InputStrategy`."""
        low, high = MSE.ends(seen, check_bits(bits))
        if low >= 0:
            return cls(*grid_between(0.0, high, bits), seen.values)
        most = 2 ** (bits - 1) - 1
        return cls(max(-low, high) / most, -most, most, seen.values)

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `InputQuantizer`."""
        scale = self.step.detach().abs().clamp_min(SMALLEST_STEP)
        codes = (self.step - self.step.detach()) / scale * self.code_max  # 0, with the gradient of the clip
        first = self.code_min - torch.where(self.code_min < 0, codes, 0.0)
        return scale, first, self.code_max + codes, torch.zeros_like(scale)


class MinMaxInput(LearnedInput, name="straight-through"):
    """The range of moving averages of what training shows, straight through (Jacob et al. 2017, arXiv 1712.05877)."""

    least: Tensor
    most: Tensor

    def __init__(self, scale: float, code_min: int, code_max: int, values: int) -> None:
        super().__init__(scale, code_min, code_max, values)
        self.step.requires_grad_(False)
        self.register_buffer("least", torch.tensor([float(scale * code_min)]))
        self.register_buffer("most", torch.tensor([float(scale * code_max)]))

    @classmethod
    def fitted(cls, seen: InputStatistics, bits: int) -> InputQuantizer:
        """See `InputStrategy`."""
        return cls(*grid_between(*(seen.average or (0.0, 0.0)), check_bits(bits)), seen.values)

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `InputQuantizer`."""
        # copies: a forward that follows moves them before the backward of this one
        return self.step.detach().clone(), self.code_min.clone(), self.code_max.clone(), torch.zeros_like(self.code_min)

    @torch.no_grad()
    def follow(self, x: Tensor) -> None:
        """See `InputQuantizer`."""
        low, high = x.detach().aminmax()
        self.least.lerp_(low.to(self.least.dtype).clamp_max(0), 0.01)
        self.most.lerp_(high.to(self.most.dtype).clamp_min(0), 0.01)
        levels = self.code_max - self.code_min
        scale = ((self.most - self.least) / levels).clamp_min(SMALLEST_STEP)
        first = torch.minimum(torch.maximum((self.least / scale).round(), -levels), torch.zeros_like(levels))
        self.step.copy_(scale)
        self.code_max.copy_(first + levels)
        self.code_min.copy_(first)
