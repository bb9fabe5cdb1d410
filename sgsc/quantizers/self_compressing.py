"""Quantizers whose bit depth is learned, per channel, down to 0: the channel is then removed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgsc.kernels import OPS, fake_quantize

from .base import Quantizer

MAX_BITS = 8
LN2 = math.log(2)
_FIT_CANDIDATES = 24  # ranges tried between a seventh of the largest magnitude and all of it


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `x`."""
    return value.detach() + (x - x.detach())


class _OnIntegerGrid(torch.autograd.Function):
    """`fake_quantize(rows, *grid())` of SelfCompressing, differentiated by hand: autograd takes thirty small steps.

    `table` is SelfCompressing.by_width.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, bit_depth: Tensor, log_range: Tensor, table: Tensor) -> Tensor:
        depth = bit_depth.clamp(0, MAX_BITS)
        n = depth.round()
        exact = torch.exp2(log_range + 1 - n)
        lo, hi, shift, half = table.index_select(1, n.nan_to_num().int()).unbind()
        grid = exact.bfloat16().to(exact.dtype), lo, hi, shift
        ctx.save_for_backward(rows, exact, half, depth == bit_depth, *grid)
        return OPS["fake_quantize"](rows, *grid)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, exact, half, inside, *grid = ctx.saved_tensors
        grad_rows, by_scale, by_lo, by_hi = OPS["fake_quantize_backward"](grad, rows, *grid)
        by_range = by_scale * exact * LN2  # of 2^range
        by_width = (by_hi - by_lo) * half * LN2 - by_range
        return grad_rows, torch.where(inside, by_width, 0.0), by_range, None


class SelfCompressing(Quantizer, name="integer"):
    """Learned integer width and range a channel: the forward pass uses the grid that will be stored.

        n     = round(clamp(bit_depth, 0, 8))                 straight through
        scale = 2^range * 2^(1 - n), rounded to bfloat16      so that two bytes store it without loss
        codes   -2^(n-1) .. 2^(n-1) - 1; at one bit -1 and +1 half steps; none at n = 0

    bit_depth  (C,)  bits a weight      range  (C,)  log2 of the largest magnitude that the grid holds

    What differs from the published form, and why (arXiv 2301.13142 has the published one):
    lowering the depth costs resolution, not range; a fractional depth is never charged, since it cannot be stored; the
    start is the channel's own data at 8 bits; one bit is {-1, +1}, not {-1, 0}. The gradient of the depth, through
    scale, lo and hi, is the first-order change of the loss when the channel's rounding error halves.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bit_depth = nn.Parameter(torch.full((channels,), float(MAX_BITS)))
        self.range = nn.Parameter(torch.zeros(channels))
        half = [0.0, *(2.0 ** (n - 1) for n in range(1, MAX_BITS + 1))]
        by_width = [[-h for h in half], [max(h - 1, 0.0) for h in half], [0.5 * (h == 1) for h in half], half]
        self.register_buffer("by_width", torch.tensor(by_width) + 0.0, persistent=False)  # lo, hi, shift, half: (4, 9)

    def width(self) -> Tensor:
        """(C,) the integer width as a real number, differentiable."""
        depth = self.bit_depth.clamp(0, MAX_BITS)
        return straight_through(depth.round(), depth)

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        n = self.width()
        exact = torch.exp2(self.range + 1 - n)
        scale = straight_through(exact.bfloat16().to(exact.dtype), exact)
        half = torch.exp2(n - 1)
        alive = n > 0
        one_bit = (n == 1).to(scale.dtype).detach() / 2
        return scale, torch.where(alive, -half, 0.0), torch.where(alive, half - 1, 0.0), one_bit

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K), differentiable in `rows` and in the learned parameters."""
        return _OnIntegerGrid.apply(rows, self.bit_depth, self.range, self.by_width)

    def bit_cost(self) -> Tensor:
        """(C,) the integer width, straight through: what the file will hold."""
        return self.width()

    @torch.no_grad()
    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Choose each channel's range, at its present width, by the least squared error over a grid of ranges."""
        where = torch.ones_like(self.range, dtype=torch.bool) if where is None else where
        rows = rows[where].to(self.range.dtype)
        if rows.numel() == 0:
            return
        top = rows.abs().amax(1).clamp_min(1e-12).log2()
        old = self.range.clone()
        best = torch.full_like(top, float("inf"))
        found = top.clone()
        for step in range(_FIT_CANDIDATES):
            candidate = top - step / 8  # eighths of an octave
            self.range[where] = candidate
            error = (fake_quantize(rows, *(t[where] for t in self.grid())) - rows).square().sum(1)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, candidate, found)
        self.range.copy_(old)
        self.range[where] = found


class PublishedSelfCompressing(Quantizer, name="published"):
    """The form of arXiv 2301.13142, equations 1 to 4, kept for comparison; its defects are kept too.

        scale = 2^exponent, lo = -2^(b-1), hi = 2^(b-1) - 1, b = max(bit_depth, 0); all zeros where b = 0

    bit_depth  (C,)  real bits a weight; a fraction is charged though it cannot be stored
    exponent   (C,)  log2 of the step
    """

    def __init__(self, channels: int, bit_depth: float = 2.0, exponent: float = -8.0) -> None:
        super().__init__()
        self.bit_depth = nn.Parameter(torch.full((channels,), bit_depth))
        self.exponent = nn.Parameter(torch.full((channels,), exponent))

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        depth = self.bit_depth.relu()
        half = torch.exp2(depth - 1)
        alive = depth > 0
        lo, hi = torch.where(alive, -half, 0.0), torch.where(alive, half - 1, 0.0)
        return torch.exp2(self.exponent), lo, hi, torch.zeros_like(self.exponent)

    def bit_cost(self) -> Tensor:
        """(C,) max(bit_depth, 0)."""
        return self.bit_depth.relu()

    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Nothing: the published form starts from constants."""
