"""Other grids and other gradients for learned widths, for comparison: bench.sgsc quantizers draws their curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgsc.kernels import fake_quantize

from .self_compressing import SelfCompressing


class HalfSteps(SelfCompressing, name="half-steps"):
    """Two bits are -3/2, -1/2, +1/2, +3/2 steps, as one bit is -1/2, +1/2: all levels are used, and none is 0."""

    half_steps = 2


class Ternary(SelfCompressing, name="ternary"):
    """Codes -(2^(n-1) - 1) .. 2^(n-1) - 1 from two bits on, which are -1, 0, +1: symmetric, at the cost of a level."""

    balanced = True


class Interpolated(SelfCompressing, name="interpolated"):
    """While it trains the rows lie between those of the two neighbouring widths, by the fraction of the depth.

    The gradient of the depth is the change of the loss from one width to the next, to first order. In evaluation mode,
    and where the depth is whole, rows are on the grid that will be stored.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K), differentiable in `rows` and in the learned parameters."""
        if not self.training:
            return super().forward(rows)
        depth = self.bit_depth.clamp(0, 8)
        below = depth.detach().floor()
        q_below, q_above = (fake_quantize(rows, *self._grid(n)) for n in (below, (below + 1).clamp(max=8)))
        return torch.lerp(q_below, q_above, (depth - below)[:, None].to(rows.dtype))

    def _grid(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lo, hi, shift, _ = self.by_width.index_select(1, n.int()).unbind()
        return torch.exp2(self.range + 1 - n).bfloat16().to(self.range.dtype), lo, hi, shift

    @classmethod
    def forward_many(cls, quantizers: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
        """See `Quantizer`."""
        return [q(w.flatten(1)).view(w.shape) for q, w in zip(quantizers, weights, strict=True)]
