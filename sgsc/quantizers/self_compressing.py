"""Quantizers whose bit depth is learned, per channel, down to 0: the channel is then removed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgsc.kernels import OPS, fake_quantize

from .base import Quantizer

MAX_BITS = 8
LN2 = math.log(2)
_FIT_CANDIDATES = 24  # ranges tried between a seventh of the largest magnitude and all of it
_FIT_AT_ONCE = 1 << 22  # values of all ranges that are rounded in one call


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """`value`, exactly, with the gradient of `x`."""
    return value.detach() + (x - x.detach())


def _integer_grid(
    bit_depth: Tensor, log_range: Tensor, table: Tensor, sizes: list[int] | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """SelfCompressing.grid() without autograd, and (exact scale, half, depth is inside its clamp) for the backward.

    `table` is SelfCompressing.by_width. `sizes` are the channels of each layer, where several lie one after another.
    """
    depth = bit_depth.clamp(0, MAX_BITS)
    n = depth.round()
    exponent = log_range + 1 - n
    if sizes is None or exponent.device.type != "cpu":
        exact = torch.exp2(exponent)
    else:  # torch's exp2 rounds the last few of a vector on a CPU in another way: each layer must keep its own last few
        exact = torch.cat([torch.exp2(e) for e in exponent.split(sizes)])
    lo, hi, shift, half = table.index_select(1, n.nan_to_num().int()).unbind()
    return (exact.bfloat16().to(exact.dtype), lo, hi, shift), (exact, half, depth == bit_depth)


def _by_parameters(
    by_scale: Tensor, by_lo: Tensor, by_hi: Tensor, exact: Tensor, half: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of bit_depth and range from those of the grid."""
    by_range = by_scale * exact * LN2  # of 2^range
    by_width = (by_hi - by_lo) * half * LN2 - by_range
    return torch.where(inside, by_width, 0.0), by_range


class _OnIntegerGrid(torch.autograd.Function):
    """`fake_quantize(rows, *grid())` of SelfCompressing, differentiated by hand: autograd takes thirty small steps.

    `table` is SelfCompressing.by_width.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, bit_depth: Tensor, log_range: Tensor, table: Tensor) -> Tensor:
        grid, rest = _integer_grid(bit_depth, log_range, table)
        ctx.save_for_backward(rows, *grid, *rest)
        return OPS["fake_quantize"](rows, *grid)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, scale, lo, hi, shift, *rest = ctx.saved_tensors
        grad_rows, *by_grid = OPS["fake_quantize_backward"](grad, rows, scale, lo, hi, shift)
        return grad_rows, *_by_parameters(*by_grid, *rest), None


class _OnIntegerGrids(torch.autograd.Function):
    """`_OnIntegerGrid` of several layers at once: all weights, then all bit depths, then all ranges."""

    @staticmethod
    def forward(ctx, table: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        count = len(flat) // 3
        weights, depths, ranges = flat[:count], flat[count : 2 * count], flat[2 * count :]
        ctx.sizes = [len(depth) for depth in depths]
        grid, rest = _integer_grid(torch.cat(depths), torch.cat(ranges), table, ctx.sizes)
        lists = [v.split(ctx.sizes) for v in grid]
        rows = [w.flatten(1) for w in weights]
        made = OPS["fake_quantize_many"](rows, *lists)
        made = [m if w.dim() == 2 else m.view(w.shape) for m, w in zip(made, weights, strict=True)]
        # a layer without a gradient stays one, and one that forward leaves out gets None: as where each runs alone
        learns = [any(ctx.needs_input_grad[1 + i :: count]) for i in range(count)]
        ctx.mark_non_differentiable(*(m for m, one in zip(made, learns, strict=True) if not one))
        ctx.set_materialize_grads(False)
        ctx.shapes = [w.shape for w in weights]
        ctx.save_for_backward(*rows, *grid, *rest)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        count, sizes = len(grads), ctx.sizes
        given = {i: grad.flatten(1) for i, grad in enumerate(grads) if grad is not None}
        used = list(given)
        result: list[Tensor | None] = [None] * (1 + 3 * count)
        if not used:
            return tuple(result)
        saved = ctx.saved_tensors  # read once: a checkpoint refuses a second time
        rows, vectors = saved[:count], saved[count:]
        lists = [[parts[i] for i in used] for parts in (v.split(sizes) for v in vectors[:4])]
        rest = vectors[4:]
        if len(used) < count:
            rest = [torch.cat([parts[i] for i in used]) for parts in (v.split(sizes) for v in rest)]
        found = OPS["fake_quantize_many_backward"](list(given.values()), [rows[i] for i in used], *lists)
        by_grid = [torch.cat(found[k * len(used) : (k + 1) * len(used)]) for k in (1, 2, 3)]
        by_depth, by_range = (g.split([sizes[i] for i in used]) for g in _by_parameters(*by_grid, *rest))
        for k, i in enumerate(used):
            shape = ctx.shapes[i]
            of_weight = found[k] if len(shape) == 2 else found[k].view(shape)
            result[1 + i :: count] = of_weight, by_depth[k], by_range[k]
        return tuple(result)


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

    by_width: Tensor
    half_steps = 1  # widths up to which levels lie at half steps: no 0, and as many on either side of it
    balanced = False  # whether wider grids leave their lowest code out, for as many on either side of 0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bit_depth = nn.Parameter(torch.full((channels,), float(MAX_BITS)))
        self.range = nn.Parameter(torch.zeros(channels))
        widths = range(MAX_BITS + 1)
        half = [2.0 ** (n - 1) if n else 0.0 for n in widths]
        low = [h - 1 if self.balanced and n > self.half_steps else h for n, h in zip(widths, half, strict=True)]
        shift = [0.5 * (0 < n <= self.half_steps) for n in widths]
        by_width = [[-h for h in low], [max(h - 1, 0.0) for h in half], shift, half]
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
        lo, hi, shift, _ = self.by_width.index_select(1, n.detach().nan_to_num().int()).unbind()
        grows = torch.exp2(n - 1)
        grows = torch.where(n > 0, grows - grows.detach(), 0.0)  # 0, with the gradient of half
        return scale, lo - grows, hi + grows, shift

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K), differentiable in `rows` and in the learned parameters."""
        return _OnIntegerGrid.apply(rows, self.bit_depth, self.range, self.by_width)

    @classmethod
    def forward_many(cls, quantizers: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
        """See `Quantizer`: bit for bit what each would give alone, gradients too, in one node of the graph."""
        groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[int]] = {}
        depths, ranges = [q.bit_depth for q in quantizers], [q.range for q in quantizers]
        for i, (depth, log_range) in enumerate(zip(depths, ranges, strict=True)):
            groups.setdefault((depth.device, depth.dtype, log_range.dtype), []).append(i)
        made: dict[int, Tensor] = {}
        for members in groups.values():
            flat = [values[i] for values in (weights, depths, ranges) for i in members]
            results = _OnIntegerGrids.apply(quantizers[members[0]].by_width, *flat)
            made.update(zip(members, results, strict=True))
        return [made[i] for i in range(len(weights))]

    def bit_cost(self) -> Tensor:
        """(C,) the integer width, straight through: what the file will hold."""
        return self.width()

    @torch.no_grad()
    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Choose each channel's range, at its present width, by the least squared error over a grid of ranges."""
        if where is not None and bool(where.all()):
            where = None
        chosen = slice(None) if where is None else where.nonzero().squeeze(1)
        rows, depth = rows[chosen].to(self.range.dtype), self.bit_depth[chosen]
        if rows.numel() == 0:
            return
        top = rows.abs().amax(1).clamp_min(1e-12).log2()
        ranges = top - torch.arange(_FIT_CANDIDATES, device=rows.device)[:, None] / 8  # eighths of an octave: (F, C)
        errors = []
        for some in ranges.split(max(1, _FIT_AT_ONCE // rows.numel())):
            many = rows.repeat(len(some), 1)  # all ranges in one call: a channel at a time would be all overhead
            grid, _ = _integer_grid(depth.repeat(len(some)), some.flatten(), self.by_width)
            errors.append((fake_quantize(many, *grid) - many).square().sum(1).view(some.shape))
        self.range[chosen] = ranges.gather(0, torch.cat(errors).argmin(0, keepdim=True))[0]


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
