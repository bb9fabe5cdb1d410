"""What every quantizer promises, and the registry that makes one known by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgsc.kernels import fake_quantize, fake_quantize_many

QUANTIZERS: dict[str, Callable[[int], Quantizer]] = {}


class Diverged(ValueError):
    """A training has left the finite numbers."""


def at_least_float32(before: Tensor, after: Tensor) -> Tensor:
    """`after`, or where that is a half-precision cast, `before` on the device of `after`."""
    return before.to(after.device) if after.is_floating_point() and after.element_size() < 4 else after


class Codes(NamedTuple):
    """Rows as they will be stored: real = (level + offset) * scale, and 0 where bits is 0."""

    levels: Tensor  # (C, K) uint8, 0 .. 2^bits - 1
    bits: Tensor  # (C,) uint8
    scale: Tensor  # (C,) float32
    offset: Tensor  # (C,) float32


class Quantizer(nn.Module, ABC):
    """Turns rows (C, K), one a channel, into rows on a grid. Abstract; every subclass is final.

    Learned parameters and saved buffers are 1-D, one value a channel, so that they shard, average and checkpoint like
    any other, and go with their channel when that is cut out.
    """

    def __init_subclass__(cls, name: str = "", **rest) -> None:
        super().__init_subclass__(**rest)
        if name:
            if name in QUANTIZERS:
                raise ValueError(f"two quantizers are called {name!r}; rename one of them")
            QUANTIZERS[name] = cls

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scale, lo, hi, shift), (C,) each, differentiable in the learned parameters."""

    @abstractmethod
    def bit_cost(self) -> Tensor:
        """(C,) nominal bits a weight, at least 0, differentiable."""

    @abstractmethod
    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Set the grid of each channel (of those marked by `where`, (C,) bool) from its data, (C, K)."""

    def _apply(self, fn, recurse: bool = True):
        # half precision is for weights and activations: a grid in it would lose the codes
        return super()._apply(lambda t: at_least_float32(t, fn(t)), recurse)

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K), differentiable in `rows` and in the learned parameters."""
        return fake_quantize(rows, *self.grid())

    @classmethod
    def forward_many(cls, quantizers: Sequence[Any], weights: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several quantizers of this class at once; a class with a `forward` of its own gains nothing yet.

        Args:
            quantizers: One a weight.
            weights: (C, ...) each, a channel a row, of any devices and dtypes.

        Returns:
            The quantized weights, each in its own shape.
        """
        rows = [w.flatten(1) for w in weights]
        if cls.forward is not Quantizer.forward:
            made = [q(r) for q, r in zip(quantizers, rows, strict=True)]
            return [m.view(w.shape) for m, w in zip(made, weights, strict=True)]
        grids = [q.grid() for q in quantizers]
        results: dict[int, Tensor] = {}
        learns = [any(t.requires_grad for t in (r, *grid)) for r, grid in zip(rows, grids, strict=True)]
        for members in ([i for i, one in enumerate(learns) if one is kind] for kind in (True, False)):
            of = fake_quantize_many([rows[i] for i in members], [grids[i] for i in members])
            results.update(zip(members, of, strict=True))
        return [results[i].view(w.shape) for i, w in enumerate(weights)]

    @torch.no_grad()
    def code_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest code that can occur, (C,) each; both 0 where there is no grid."""
        _, lo, hi, _ = self.grid()
        alive = hi > lo
        return torch.where(alive, lo.round(), 0.0), torch.where(alive, hi.round(), 0.0)

    @torch.no_grad()
    def bits(self) -> Tensor:
        """(C,) uint8: the least width of a two's-complement code that holds the range; 0 for a removed channel."""
        low, high = self.code_range()
        levels = torch.maximum(-low, high + 1)  # a b-bit code holds -2^(b-1) .. 2^(b-1) - 1
        width = torch.ceil(torch.log2(levels.clamp_min(1.0))) + 1
        return torch.where(low == high, 0.0, width).to(torch.uint8)

    @torch.no_grad()
    def codes(self, rows: Tensor) -> Codes:
        """The rows as they are stored. `(levels + offset) * scale` equals `forward(rows)` bit for bit.

        Raises:
            Diverged: If a row holds NaN or infinity, or a scale is not positive and finite.
            ValueError: If a code needs over 8 bits.
        """
        scale, lo, hi, shift = (t.detach() for t in self.grid())
        bits, alive = self.bits(), hi > lo
        if not torch.isfinite(rows).all():
            raise Diverged("weights hold NaN or infinity and cannot be packed; training has diverged")
        if not (torch.isfinite(scale) & (scale > 0))[alive].all():
            raise Diverged("a channel's scale is not positive and finite; training has diverged")
        if (bits > 8).any():
            raise ValueError(f"a channel needs {int(bits.max())} bits; packing holds at most 8: train to fewer")
        v = rows / scale[:, None] - shift[:, None]
        code = torch.minimum(torch.maximum(v, lo[:, None]), hi[:, None]).round()
        code_min = -torch.exp2(bits.to(scale.dtype) - 1)
        levels = torch.where(alive[:, None], code - code_min[:, None], 0.0).to(torch.uint8)
        return Codes(levels, bits, scale, torch.where(alive, code_min + shift, 0.0))


def make_quantizer(name: str, channels: int) -> Quantizer:
    """The quantizer called `name` for a layer of `channels` rows.

    Raises:
        ValueError: If no quantizer has that name.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer {name!r} is not known; choose one of {', '.join(sorted(QUANTIZERS))}")
    return QUANTIZERS[name](channels)
