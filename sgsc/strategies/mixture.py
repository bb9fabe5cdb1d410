"""Layers that hold all their candidates at once, and multiply once.

Products are bilinear, so that a mixture of products is the product of two mixtures:

    sum_ij alpha_i beta_j (W_j * A_i(x))  =  (sum_j beta_j W_j) * (sum_i alpha_i A_i(x))

alpha, beta  softmax of a layer's logits over a temperature, (N,) and (J,)
W_j          (C, K) the weight on the grid of candidate j; A_i(x) the input on that of candidate i

The layer stays what it is: its weight quantizer and its input quantizer are mixtures. Backward rounds the input again
instead of keeping N roundings of it: memory of activations is that of one candidate, whatever their number, and so is
the product. What grows with N is the arithmetic of rounding (kernels/fake_quantize_mixed.py), and the J weights, which
are held beside one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.kernels import fake_quantize_mixed
from sgsc.layers import quant_layers
from sgsc.quantizers import InputQuantizer, Quantizer
from sgsc.quantizers.base import Codes


class Mixture(nn.Module):
    """Candidates and their shares; mixed in before the kind of quantizer. Its grid is that of the leading candidate.

    Args:
        candidates: Name -> fitted quantizer.
    """

    def __init__(self, candidates: Mapping[str, Any]) -> None:
        super().__init__()
        self.names = list(candidates)
        self.candidates = nn.ModuleList(candidates.values())
        device = next(iter(candidates.values())).grid()[0].device
        self.logits = nn.Parameter(torch.zeros(len(self.names), device=device))
        self.temperature = 1.0

    def shares(self) -> Tensor:
        """(N,) alpha or beta."""
        return (self.logits / self.temperature).softmax(0)

    def leading(self) -> int:
        """Place of the candidate with the largest share."""
        return int(self.logits.argmax())

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        return self.candidates[self.leading()].grid()  # pyright: ignore  a quantizer


class MixedWeights(Mixture, Quantizer):
    """sum_j beta_j W_j.

    Args:
        candidates: Name -> fitted quantizer.
        rows: (C, K) the weight, if it will not change: then every W_j is made once, here.
    """

    fixed: Tensor | None

    def __init__(self, candidates: Mapping[str, Quantizer], rows: Tensor | None = None) -> None:
        super().__init__(candidates)
        with torch.no_grad():
            made = None if rows is None else self._made(rows)
        self.register_buffer("fixed", made, persistent=False)

    def _made(self, rows: Tensor) -> Tensor:
        return torch.stack([q(rows) for q in self.candidates])

    def forward(self, rows: Tensor) -> Tensor:
        """(C, K) -> (C, K)."""
        made = self._made(rows) if self.fixed is None else self.fixed
        return torch.tensordot(self.shares().to(made.dtype), made, 1)

    def codes(self, rows: Tensor) -> Codes:
        """Of the leading candidate."""
        return self.candidates[self.leading()].codes(rows)  # pyright: ignore

    def bit_cost(self) -> Tensor:
        """(C,) of the leading candidate."""
        return self.candidates[self.leading()].bit_cost()  # pyright: ignore

    def fit(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Fit every candidate anew."""
        for candidate in self.candidates:
            candidate.fit(rows, where)  # pyright: ignore
        if self.fixed is not None:
            with torch.no_grad():
                self.fixed.copy_(self._made(rows))


class MixedInput(Mixture, InputQuantizer):
    """sum_i alpha_i A_i(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same."""
        for candidate in self.candidates if self.training and x.numel() else ():
            candidate.follow(x)  # pyright: ignore
        grids = [torch.cat(parts) for parts in zip(*(q.grid() for q in self.candidates), strict=True)]  # pyright: ignore
        return fake_quantize_mixed(x, self.shares(), *grids)


def mixtures(model: nn.Module) -> list[Mixture]:
    """All mixtures of a model, weights before inputs, in the model's order."""
    kinds = (MixedWeights, MixedInput)
    return [m for kind in kinds for m in model.modules() if isinstance(m, kind)]


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Of all mixtures: the lower, the closer to one candidate."""
    for mixed in mixtures(model):
        mixed.temperature = temperature


def entropy(model: nn.Module) -> Tensor:
    """Mean entropy of the shares of all mixtures of several candidates, in units of the largest it can be; a scalar."""
    found = [m.shares() for m in mixtures(model) if len(m.names) > 1]
    parts = [-(p * p.clamp_min(1e-12).log()).sum() / torch.tensor(float(len(p))).log() for p in found]
    return torch.stack(parts).mean() if parts else torch.zeros(())


def settle(model: nn.Module) -> dict[str, tuple[str, str | None]]:
    """Leave every layer its leading candidates alone; layer -> names of those of its weight and of its input.

    Raises:
        ValueError: If a layer holds no mixture.
    """
    found: dict[str, tuple[str, str | None]] = {}
    for name, layer in quant_layers(model).items():
        weight, given = layer.weight_quantizer, layer.input_quantizer
        if not isinstance(weight, MixedWeights):
            raise ValueError(f"layer {name!r} holds a {type(weight).__name__}, not a mixture; it is settled already")
        layer.weight_quantizer = weight.candidates[weight.leading()]  # pyright: ignore
        other = None
        if isinstance(given, MixedInput):
            other = given.names[given.leading()]
            layer.input_quantizer = given.candidates[given.leading()]
        found[name] = weight.names[weight.leading()], other
    return found
