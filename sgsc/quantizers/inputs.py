"""Grids for a layer's input: one for the whole tensor, known before the input is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from sgsc.kernels import fake_quantize

from .base import at_least_float32


class InputQuantizer(nn.Module, ABC):
    """Rounds an input of any shape to one grid: real = code * scale, code_min <= code <= code_max. Abstract.

    The grid holds 0 (code_min <= 0 <= code_max), so that padding is exact, and at most 256 codes, so that a byte does.
    """

    @abstractmethod
    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(scale, code_min, code_max, shift), (1,) each, differentiable in what is learned; shift is 0."""

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(lambda t: at_least_float32(t, fn(t)), recurse)

    def follow(self, x: Tensor) -> None:
        """Take notice of an input while training, where that moves the grid; most do not."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same, differentiable in x and in what is learned; not to be overridden: mixtures fuse it."""
        if self.training and x.numel():
            self.follow(x)
        return fake_quantize(x.reshape(1, -1), *self.grid()).view(x.shape)


class StaticInput(InputQuantizer):
    """A grid that calibration has found.

    Args:
        scale: Step, positive and finite.
        code_min: At most 0.
        code_max: At least 0, and at most code_min + 255.

    Raises:
        ValueError: If one of them is out of its range.
    """

    scale: Tensor
    code_min: Tensor
    code_max: Tensor

    def __init__(self, scale: float, code_min: int, code_max: int) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise ValueError(f"scale={scale} of an input's grid; want a positive, finite step")
        if not code_min <= 0 <= code_max or not 0 < code_max - code_min <= 255:
            raise ValueError(f"codes {code_min} .. {code_max}: want a range that holds 0 and 2 to 256 codes")
        for name, value in (("scale", scale), ("code_min", code_min), ("code_max", code_max)):
            self.register_buffer(name, torch.tensor([float(value)]))

    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        return self.scale, self.code_min, self.code_max, torch.zeros_like(self.scale)

    def extra_repr(self) -> str:
        """The grid."""
        return f"scale={self.scale.item():.4g}, codes={int(self.code_min)}..{int(self.code_max)}"
