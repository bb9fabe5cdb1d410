"""What a configuration costs, known before anything is trained: stored bytes, mean bits, multiplications, latency.

bytes       of the file, exactly: payload and header, as `artefact.stored_size` of the trained network will say
mean bits   bits of all quantized weights over their number
macs        multiply-accumulates of one sample
seconds     of one sample: the sum over layers of a measured time, or else of a roofline,
            max(macs / peak, bytes of codes / bandwidth)   (Williams et al., CACM 52/4, 2009)
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.artefact.format import DTYPES, FORMAT, ZEROS
from sgsc.artefact.write import settings_of, values_of
from sgsc.layers import quant_layers
from sgsc.packed import PackedLayer, pack, pack_layer
from sgsc.samples import evaluating

from .grids import attach
from .structure import Count, Sizes, Structure

PEAK, BANDWIDTH = 2e10, 1e10  # multiply-accumulates and bytes a second of one CPU core, where nothing was measured
# as safetensors lays tensors out, the last first
ORDER = ("BOOL", "U8", "I8", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
GROUPS = r",\"groups\":"  # a setting, as it stands in a manifest within the header
COSTS = ("bytes", "mean_bits", "macs", "seconds")


@dataclass(frozen=True)
class Configuration:
    """Bits of each layer, and channels of each group that does not keep its own number."""

    bits: Mapping[str, int]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Hard limits; at least one.

    Attributes:
        bytes: Of the file.
        mean_bits: Of the quantized weights.
        macs: Multiply-accumulates of one sample.
        seconds: Latency of one sample, by the cost model; measure a table for numbers of this machine.
    """

    bytes: float | None = None
    mean_bits: float | None = None
    macs: float | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if not isinstance(limit, Real):
                raise ValueError(f"budget {name}={limit!r}: want a number")
            object.__setattr__(self, name, float(limit))  # one of numpy's would not go into a study
        given = self.limits()
        if not given:
            raise ValueError("no budget was given; want at least one of bytes, mean_bits, macs, seconds")
        for name, limit in given.items():
            if not limit > 0:
                raise ValueError(f"budget {name}={limit}: want more than 0")

    def limits(self) -> dict[str, float]:
        """Those that are set."""
        return {k: v for k, v in vars(self).items() if v is not None}

    def holds(self, cost: Mapping[str, float]) -> bool:
        """Whether a cost is within all limits."""
        return all(cost[name] <= limit for name, limit in self.limits().items())


class CostModel:
    """Costs of all configurations of one network.

    Args:
        model: A prepared model in its own widths.
        structure: Of the model.
        example: Inputs, one sample at least, from which the places at which each layer multiplies are counted.
        architecture: As `save` will be given; with `notes` it is part of the file.
        notes: The same.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        example: Tensor,
        architecture: tuple[str, dict[str, Any]] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        self.structure, self.shapes = structure, structure.layers
        self.places, self.calls = _places(model, example)
        self.times: dict[tuple[str, int], float] = {}
        self._own = {name: math.prod(shape.weights(structure.sizes)) for name, shape in self.shapes.items()}
        packed = pack(model, remove=False)
        self._values: list[tuple[str, list[Count]]] = []
        listed: dict[str, list[list]] = {}
        for name, value in values_of(packed):
            owner, _, _ = name.rpartition(".")
            dims = [Count(n, {}) for n in value.shape]
            if owner in structure.norms and value.dim() == 1:
                dims = [structure.norms[owner]]
            elif owner in self.shapes and name.endswith("bias"):
                dims = [self.shapes[owner].rows]
            self._values.append((_name_of(value.dtype), dims))
            listed.setdefault(_name_of(value.dtype), []).append([name, [""] * len(dims)])
        layers, self._depthwise = [], []
        for name, m in packed.named_modules():
            if isinstance(m, PackedLayer):
                settings = settings_of(m)
                if settings.get("groups") == self.shapes[name].rows.at(structure.sizes):  # and in other widths too
                    settings["groups"] = ""
                    self._depthwise.append(name)
                layers.append([name, m.type_name, ["", ""], 0, settings])
        manifest = {
            "format": FORMAT,  # candidates have no grids of inputs
            "sha256": ZEROS,
            "architecture": list(architecture) if architecture else None,
            "layers": layers,
            "values": listed,
            "notes": dict(notes or {}),
        }
        numbers = 2 * len(layers) + len(self._depthwise) + sum(len(dims) for _, dims in self._values)
        text = json.dumps(json.dumps(manifest, separators=(",", ":")))
        self._manifest = len(text) - 2 - 4 * numbers  # but for the numbers of channels; each stands here as \"\"

    def sizes(self, of: Configuration) -> dict[str, int]:
        """Channels of every group."""
        return {**self.structure.sizes, **of.sizes}

    def __call__(self, of: Configuration, names: Iterable[str] = COSTS) -> dict[str, float]:
        """Costs, by the names of `Budget`: all, or those that are named."""
        sizes = self.sizes(of)
        shapes = {name: shape.weights(sizes) for name, shape in self.shapes.items()}
        found: dict[str, float] = {}
        for name in names:
            if name == "bytes":
                found[name] = self._bytes(of, sizes, shapes)
            elif name == "mean_bits":
                bits = sum(of.bits[layer] * rows * width for layer, (rows, width) in shapes.items())
                found[name] = bits / sum(rows * width for rows, width in shapes.values())
            elif name == "macs":
                found[name] = sum(self.places[layer] * rows * width for layer, (rows, width) in shapes.items())
            else:
                found[name] = sum(self.seconds(layer, of.bits[layer], *shape) for layer, shape in shapes.items())
        return found

    def seconds(self, name: str, bits: int, rows: int, width: int) -> float:
        """Of one layer: measured in its own widths and scaled with its weights, or the roofline."""
        calls = self.calls[name]
        if (name, bits) in self.times:
            return calls * self.times[name, bits] * (rows * width) / self._own[name]
        macs = self.places[name] * rows * width
        return max(macs / PEAK, calls * rows * width * bits / 8 / BANDWIDTH)

    def layer_bytes(self, name: str, bits: int, sizes: Mapping[str, int]) -> float:
        """Payload of one layer, its share of the width table included."""
        rows, width = self.shapes[name].weights(sizes)
        return rows * (-(-width * bits // 8) + 2 + 0.5 + 4 * self.shapes[name].bias)

    def _bytes(self, of: Configuration, sizes: Sizes, shapes: Mapping[str, tuple[int, int]]) -> int:
        """Of the file that `save` will write, exactly; the manifest is not written, its digits are counted."""
        rows = codes = digits = 0
        for name, (count, width) in shapes.items():
            rows += count
            codes += count * -(-width * of.bits[name] // 8)
            digits += len(str(count)) + len(str(width))
            if name in self._depthwise:  # one group is the usual, and not written
                digits += len(str(count)) if count > 1 else -len(GROUPS)
        lengths: dict[str, int] = {}
        for dtype, dims in self._values:
            shape = [dim.at(sizes) for dim in dims]
            lengths[dtype] = lengths.get(dtype, 0) + math.prod(shape)
            digits += sum(len(str(n)) for n in shape)
        tensors = {
            "codes": ("U8", codes),
            "bits": ("U8", (rows + 1) // 2),
            "scales": ("BF16", rows),
            **{f"values.{dtype}": (dtype, count) for dtype, count in lengths.items()},
        }
        header: dict[str, Any] = {"__metadata__": {"sgsc": ""}}
        end = 0
        for name, (dtype, count) in sorted(tensors.items(), key=lambda t: (-ORDER.index(t[1][0]), t[0])):
            if count:
                start, end = end, end + count * DTYPES[dtype].itemsize
                header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}
        length = self._manifest + digits + len(json.dumps(header, separators=(",", ":")))
        return 8 + -(-length // 8) * 8 + end

    def measure(self, model: nn.Module, example: Tensor, bits: tuple[int, ...], repeats: int = 20) -> None:
        """Time each packed layer at each width on this machine, one sample, and use the medians from then on.

        A width never counts as faster than a narrower one: the search takes it that more bits do not cost less.

        `model`: the prepared model in its own widths; `example`: (1, ...).
        """
        inputs = _inputs(model, example[:1])
        for name, layer in quant_layers(model).items():
            if name not in inputs:
                continue
            slowest = 0.0
            for width in sorted(bits):
                one = copy.deepcopy(layer)
                attach(one, width)
                packed, x = pack_layer(one), inputs[name]
                times = []
                with torch.no_grad():
                    for _ in range(repeats + 1):
                        started = time.perf_counter()
                        packed(x)
                        if x.is_cuda:
                            torch.cuda.synchronize(x.device)
                        times.append(time.perf_counter() - started)
                slowest = max(slowest, sorted(times[1:])[repeats // 2])
                self.times[name, width] = slowest


def _inputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Layer -> what it is given for one sample."""
    found: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        found.setdefault(name, next(x for x in (*args, *named.values()) if isinstance(x, Tensor)).detach())

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, named, name=name: note(str(name), args, named), with_kwargs=True
        )
        for name, layer in quant_layers(model).items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _places(model: nn.Module, example: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Layer -> rows of outputs a sample (pixels, positions of a Linear, 0 for a table), and calls."""
    places, calls = (dict.fromkeys(quant_layers(model), 0) for _ in range(2))

    def count(name: str, layer: nn.Module, out: Any) -> None:
        calls[name] += 1
        if not isinstance(layer, nn.Embedding):
            places[name] += out.numel() // layer.get_parameter("weight").shape[0]  # of one sample, wherever its axis is

    hooks = [
        layer.register_forward_hook(lambda m, _, out, name=name: count(str(name), m, out))
        for name, layer in quant_layers(model).items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return places, calls


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)
