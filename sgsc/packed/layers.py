"""The packed form of each layer type, and the numerics of a model of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.kernels import NUMERICS, PackedRows, TiledRows, packed_conv2d, packed_embedding, packed_linear, tile_kernel

from .base import PackedLayer, PackedProduct


class PackedLinear(PackedProduct):
    """`nn.Linear` from packed rows."""

    type_name = "Linear"

    def __init__(
        self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None, input_grid: Tensor | None = None
    ) -> None:
        super().__init__(rows, scale, offset, bias, input_grid)
        self.lay_out()

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., C)."""
        b = self._buffers
        return packed_linear(input, self.tiles, b["bias"], self.width, self.numerics == "int8", b["input_form"])


class PackedConv2d(PackedProduct):
    """`nn.Conv2d` from packed rows; any padding mode of the original."""

    type_name = "Conv2d"

    def __init__(
        self,
        rows: PackedRows,
        scale: Tensor,
        offset: Tensor,
        bias: Tensor | None,
        input_grid: Tensor | None = None,
        *,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(rows, scale, offset, bias, input_grid)
        self.kernel, self.stride, self.dilation, self.groups = list(kernel), list(stride), list(dilation), groups
        self.padding, self.padding_mode = list(padding), padding_mode  # before and after each axis, last axis first
        even = all(self.padding[2 * i] == self.padding[2 * i + 1] for i in range(len(self.kernel)))
        self._inside = padding_mode == "zeros" and even  # whether the operation itself pads
        self._zero = [0] * len(self.kernel)
        self._symmetric = self.padding[::2][::-1] if self._inside else self._zero
        self.lay_out()

    def _tile(self, rows: PackedRows) -> TiledRows:
        inputs = self.weight_shape()[1] * self.groups
        return tile_kernel(rows, self.scale, self.offset, inputs=inputs, kernel=self.kernel, groups=self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, H, W) or (I, H, W) -> the same with C channels.

        Raises:
            ValueError: If the input has another number of dimensions.
        """
        spatial = len(self.kernel)
        if input.dim() not in (spatial + 1, spatial + 2):
            raise ValueError(
                f"{type(self).__name__}: input {tuple(input.shape)}; want {spatial + 1} or {spatial + 2} dims"
            )
        x = input if input.dim() == spatial + 2 else input.unsqueeze(0)
        if not self._inside:
            x = F.pad(x, self.padding, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        y = self._convolve(x)
        return y if input.dim() == spatial + 2 else y.squeeze(0)

    def _convolve(self, x: Tensor) -> Tensor:
        geometry = (self.kernel, self.stride, self._symmetric, self.dilation, self.groups)
        b = self._buffers
        return packed_conv2d(x, self.tiles, b["bias"], *geometry, self.numerics == "int8", b["input_form"])

    def settings(self) -> dict[str, Any]:
        """Geometry; padding as F.pad takes it."""
        names = ("kernel", "stride", "padding", "dilation", "groups", "padding_mode")
        return {name: getattr(self, name) for name in names}

    def weight_shape(self) -> tuple[int, ...]:
        """(C, I / groups, kernel...)."""
        area = 1
        for k in self.kernel:
            area *= k
        return (len(self.bits), self.width // area, *self.kernel)


class PackedConv1d(PackedConv2d):
    """`nn.Conv1d` from packed rows: a 2-D convolution of height one."""

    type_name = "Conv1d"

    def _convolve(self, x: Tensor) -> Tensor:
        (k,), (s,), (p,), (d,) = self.kernel, self.stride, self._symmetric, self.dilation
        geometry = ([1, k], [1, s], [0, p], [1, d], self.groups)
        b = self._buffers
        numerics = (self.numerics == "int8", b["input_form"])
        return packed_conv2d(x.unsqueeze(2), self.tiles, b["bias"], *geometry, *numerics).squeeze(2)


class PackedEmbedding(PackedLayer):
    """`nn.Embedding` from packed rows; the result has its dtype, or the one that the model was last cast to."""

    type_name = "Embedding"
    like: Tensor

    def __init__(
        self,
        rows: PackedRows,
        scale: Tensor,
        offset: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(rows, scale, offset, bias)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows .half() and .bfloat16()

    def forward(self, input: Tensor) -> Tensor:
        """(...) int -> (..., K)."""
        return packed_embedding(input, *self.grid, self.width).to(self.like.dtype)


PACKED: dict[str, type[PackedLayer]] = {
    cls.type_name: cls for cls in (PackedLinear, PackedConv1d, PackedConv2d, PackedEmbedding)
}


def set_numerics(model: nn.Module, numerics: str) -> nn.Module:
    """Choose the numerics of every packed layer of a model, in place; returns the model.

    Args:
        model: A packed model.
        numerics: "exact" or "int8": inputs in steps of a row, measured on the fly, and products of integers; the error
            that this may make is stated in `sgsc.kernels.packed_linear`.

    Raises:
        ValueError: If `numerics` is neither, or the model holds no packed layer that multiplies.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics {numerics!r} is not known; choose one of {', '.join(NUMERICS)}")
    layers = [m for m in model.modules() if isinstance(m, PackedProduct)]
    if not layers:
        raise ValueError("set_numerics: the model holds no packed layer; pack it, or load it from a file, first")
    for layer in layers:
        layer.numerics = numerics
    return model
