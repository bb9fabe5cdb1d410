"""Layers that run from packed rows, and `pack`, which makes them from trained ones.

The packed model answers as the trained one: `pack` is lossless, and on the reference path a packed layer's forward
equals the fake-quantized one bit for bit in float32. Running needs no training code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.kernels import (
    NUMERICS,
    PackedRows,
    TiledRows,
    packed_conv2d,
    packed_embedding,
    packed_linear,
    tile_kernel,
    tile_rows,
)
from sgsc.kernels import pack as pack_rows
from sgsc.kernels.packing import dequantize
from sgsc.kernels.run_form import form_of

from .layers import QuantConv1d, QuantConv2d, QuantEmbedding, QuantLayer, QuantLinear
from .quantizers.base import at_least_float32


class PackedLayer(nn.Module):
    """Packed rows and the grid of each; abstract. State is plain tensors, all of them buffers.

    data    (N,) uint8     codes, laid out as kernels/packing.py says
    bits    (C,) uint8     width of each row
    scale   (C,) float32   step of each row
    offset  (C,) float32   real = (level + offset) * scale
    bias    (C,) or None
    """

    type_name: str
    data: Tensor
    bits: Tensor
    scale: Tensor
    offset: Tensor
    starts: Tensor
    bias: Tensor | None
    _float32: tuple[str, ...] = ("scale", "offset")  # what stays as it was stored under .half() and .bfloat16()

    def __init__(self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.channels, self.width = len(rows.bits), rows.width
        buffers = {"data": rows.data, "bits": rows.bits, "scale": scale, "offset": offset, "bias": bias}
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("starts", rows.starts, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        # .half() and .bfloat16() are for activations and bias
        grid = {name: getattr(self, name) for name in self._float32}
        super()._apply(fn, recurse)
        for name, before in grid.items():
            setattr(self, name, at_least_float32(before, getattr(self, name)))
        return self

    @property
    def rows(self) -> PackedRows:
        """The packed matrix."""
        return PackedRows(self.data, self.bits, self.width)

    @property
    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(data, bits, starts, scale, offset), as the packed operations take them."""
        return self.data, self.bits, self.starts, self.scale, self.offset

    def weight_rows(self) -> Tensor:
        """The dequantized weight, (C, K) float32: for inspection, not for running."""
        return dequantize(*self.grid, self.width, torch.float32)

    def settings(self) -> dict[str, Any]:
        """What the constructor needs beside the tensors, JSON-able."""
        return {}

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight that this stands for."""
        return (len(self.bits), self.width)

    def extra_repr(self) -> str:
        """Shape and mean width."""
        mean = self.bits.float().mean().item() if len(self.bits) else 0.0
        return f"{list(self.weight_shape())}, mean_bits={mean:.2f}, bytes={self.data.numel()}"


class PackedProduct(PackedLayer):
    """A packed layer that multiplies: beside the disk form it holds the run form of its rows; abstract.

    `numerics` is "exact", float activations, or "int8", activations rounded to 8 bits on the fly: several times as fast
    where arithmetic binds, with the bound of kernels/packed_linear.py. See `set_numerics`.
    """

    lines: Tensor
    plan: Tensor
    tile_grid: Tensor
    _float32 = (*PackedLayer._float32, "tile_grid")

    def __init__(self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None) -> None:
        super().__init__(rows, scale, offset, bias)
        self.numerics = NUMERICS[0]

    def _apply(self, fn, recurse: bool = True):
        before = self.lines.device.type
        super()._apply(fn, recurse)
        device = self.lines.device
        if "meta" not in (before, device.type) and self.lines.dtype != form_of(device).dtype:
            self.lay_out()  # moved to where products read another form
        return self

    def lay_out(self) -> None:
        """Make the run form anew, from the disk form; call it after changing `data`, `bits`, `scale` or `offset`."""
        tiles = self._tile(self.rows)
        for name, value in (("lines", tiles.lines), ("plan", tiles.plan), ("tile_grid", tiles.grid)):
            self.register_buffer(name, value, persistent=False)

    def _tile(self, rows: PackedRows) -> TiledRows:
        return tile_rows(rows, self.scale, self.offset)

    @property
    def tiles(self) -> TiledRows:
        """The run form."""
        b = self._buffers  # nn.Module's own look-up costs as much as a small product
        return tuple.__new__(TiledRows, (b["lines"], b["plan"], b["tile_grid"], self.channels))

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.register_buffer("starts", self.rows.starts, persistent=False)
        self.lay_out()


class PackedLinear(PackedProduct):
    """`nn.Linear` from packed rows."""

    type_name = "Linear"

    def __init__(self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None) -> None:
        super().__init__(rows, scale, offset, bias)
        self.lay_out()

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., C)."""
        return packed_linear(input, self.tiles, self._buffers["bias"], self.width, self.numerics == "int8")


class PackedConv2d(PackedProduct):
    """`nn.Conv2d` from packed rows; any padding mode of the original."""

    type_name = "Conv2d"

    def __init__(
        self,
        rows: PackedRows,
        scale: Tensor,
        offset: Tensor,
        bias: Tensor | None,
        *,
        kernel: list[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__(rows, scale, offset, bias)
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
        return packed_conv2d(x, self.tiles, self.bias, *geometry, self.numerics == "int8")

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
        return packed_conv2d(x.unsqueeze(2), self.tiles, self.bias, *geometry, self.numerics == "int8").squeeze(2)


class PackedEmbedding(PackedLayer):
    """`nn.Embedding` from packed rows; the result has the dtype that the model was last cast to."""

    type_name = "Embedding"
    like: Tensor

    def __init__(self, rows: PackedRows, scale: Tensor, offset: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(rows, scale, offset, bias)
        self.register_buffer("like", torch.empty(0), persistent=False)  # follows .half() and .bfloat16()

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
        numerics: "exact" or "int8"; see `PackedProduct`.

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


def _geometry(layer: QuantConv1d | QuantConv2d) -> dict[str, Any]:
    return {
        "kernel": list(layer.kernel_size),
        "stride": list(layer.stride),
        "padding": [int(p) for p in layer._reversed_padding_repeated_twice],
        "dilation": list(layer.dilation),
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
    }


_KIND: dict[type[QuantLayer], tuple[type[PackedLayer], Callable[[Any], dict[str, Any]]]] = {
    QuantLinear: (PackedLinear, lambda layer: {}),
    QuantConv1d: (PackedConv1d, _geometry),
    QuantConv2d: (PackedConv2d, _geometry),
    QuantEmbedding: (PackedEmbedding, lambda layer: {}),
}


def pack_layer(layer: QuantLayer) -> PackedLayer:
    """The packed form of one trained layer; the layer is left as it is.

    Raises:
        ValueError: If the layer's type has no packed form or it quantizes its input, which no packed layer does yet.
    """
    if layer.input_quantizer is not None:
        raise ValueError("a layer with an input_quantizer has no packed form yet; set input_quantizer to None")
    if type(layer) not in _KIND:
        raise ValueError(
            f"{type(layer).__name__} has no packed form; those that have are {[c.__name__ for c in _KIND]}"
        )
    cls, settings = _KIND[type(layer)]
    codes = layer.weight_quantizer.codes(layer.rows().detach())
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return cls(pack_rows(codes.levels, codes.bits), codes.scale, codes.offset, bias, **settings(layer))


def pack(model: nn.Module, *, remove: bool = True) -> nn.Module:
    """A packed copy of a prepared, trained model, in eval mode; the model itself is left as it is.

    Args:
        model: A model that `prepare` returned.
        remove: Cut removed channels out of every layer where the model's graph proves that this changes nothing;
            elsewhere they keep their place, at no bytes for their weights.

    Raises:
        ValueError: If the model holds no quantized layer, or a layer cannot be packed (the message names it).
    """
    from .cutting import remove_channels  # only training has dead channels to cut; running must not need this

    model = copy.deepcopy(model).eval()
    if remove:
        remove_channels(model)
    return replace_layers(model, QuantLayer, pack_layer).requires_grad_(False)


def replace_layers(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> nn.Module:
    """Replace every submodule of type `kind`, in place, once each; shared ones stay shared. Returns the model.

    Raises:
        ValueError: If there is none, or `make` refuses one (the message then begins with its name).
    """
    done: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, kind):
            continue
        if id(module) not in done:
            try:
                done[id(module)] = make(module)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
        if name == "":
            return done[id(module)]
        model.set_submodule(name, done[id(module)])
    if not done:
        raise ValueError(f"the model holds no {kind.__name__}; call prepare(model) first")
    return model
