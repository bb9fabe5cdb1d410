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
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.artefact.format import DTYPES, FORMAT, ZEROS
from sgsc.artefact.write import _unusual, _values
from sgsc.layers import quant_layers
from sgsc.packed import PackedLayer, pack, pack_layer
from sgsc.samples import evaluating

from .grids import attach
from .structure import Count, Structure

PEAK, BANDWIDTH = 2e10, 1e10  # multiply-accumulates and bytes a second of one CPU core, where nothing was measured
_ORDER = {name: (-DTYPES[name].itemsize, name) for name in DTYPES}


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
        self.places = _places(model, example)
        self.times: dict[tuple[str, int], float] = {}
        packed = pack(model, remove=False)
        layers = {n: m for n, m in packed.named_modules() if isinstance(m, PackedLayer)}
        self._layers = [(n, m.type_name, _unusual(m)) for n, m in layers.items()]
        self._values: list[tuple[str, str, list[Count]]] = []
        for name, value in _values(packed):
            owner, _, _ = name.rpartition(".")
            dims = [Count(n, {}) for n in value.shape]
            if owner in structure.norms and value.dim() == 1:
                dims = [structure.norms[owner]]
            elif owner in self.shapes and name.endswith("bias"):
                dims = [self.shapes[owner].rows]
            self._values.append((_name_of(value.dtype), name, dims))
        self._rest = {
            "format": FORMAT,
            "sha256": ZEROS,
            "architecture": list(architecture) if architecture else None,
            "notes": dict(notes or {}),
        }

    def sizes(self, of: Configuration) -> dict[str, int]:
        """Channels of every group."""
        return {**self.structure.sizes, **of.sizes}

    def __call__(self, of: Configuration) -> dict[str, float]:
        """All costs, by the names of `Budget`."""
        sizes = self.sizes(of)
        shapes = {name: shape.weights(sizes) for name, shape in self.shapes.items()}
        weights = sum(rows * width for rows, width in shapes.values())
        bits = sum(of.bits[name] * rows * width for name, (rows, width) in shapes.items())
        return {
            "bytes": self.bytes(of),
            "mean_bits": bits / weights,
            "macs": sum(self.places[name] * rows * width for name, (rows, width) in shapes.items()),
            "seconds": sum(self.seconds(name, of.bits[name], *shape) for name, shape in shapes.items()),
        }

    def seconds(self, name: str, bits: int, rows: int, width: int) -> float:
        """Of one layer: measured in its own widths and scaled with its weights, or the roofline."""
        if (name, bits) in self.times:
            own_rows, own_width = self.shapes[name].weights(self.structure.sizes)
            return self.times[name, bits] * (rows * width) / (own_rows * own_width)
        macs = self.places[name] * rows * width
        return max(macs / PEAK, rows * width * bits / 8 / BANDWIDTH)

    def layer_bytes(self, name: str, bits: int, sizes: Mapping[str, int]) -> float:
        """Payload of one layer, its share of the width table included."""
        rows, width = self.shapes[name].weights(sizes)
        return rows * (-(-width * bits // 8) + 2 + 0.5 + 4 * self.shapes[name].bias)

    def bytes(self, of: Configuration) -> int:
        """Of the file that `save` will write, exactly."""
        sizes = self.sizes(of)
        shapes = {name: shape.weights(sizes) for name, shape in self.shapes.items()}
        rows = sum(count for count, _ in shapes.values())
        listed: dict[str, list] = {}
        lengths: dict[str, int] = {}
        for dtype, name, dims in self._values:
            shape = [dim.at(sizes) for dim in dims]
            listed.setdefault(dtype, []).append([name, shape])
            count = 1
            for n in shape:
                count *= n
            lengths[dtype] = lengths.get(dtype, 0) + count
        tensors = {
            "codes": ("U8", sum(n * -(-width * of.bits[name] // 8) for name, (n, width) in shapes.items())),
            "bits": ("U8", (rows + 1) // 2),
            "scales": ("BF16", rows),
            **{f"values.{dtype}": (dtype, count) for dtype, count in lengths.items()},
        }
        manifest = {
            **{key: self._rest[key] for key in ("format", "sha256", "architecture")},
            "layers": [[name, kind, list(shapes[name]), 0, settings] for name, kind, settings in self._layers],
            "values": listed,
            "notes": self._rest["notes"],
        }
        text = json.dumps(manifest, separators=(",", ":"))
        header: dict[str, Any] = {"__metadata__": {"sgsc": text}}
        end = 0
        for name, (dtype, count) in sorted(tensors.items(), key=lambda t: (*_ORDER[t[1][0]][:1], t[0])):
            if count:
                start, end = end, end + count * DTYPES[dtype].itemsize
                header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
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
                        times.append(time.perf_counter() - started)
                slowest = max(slowest, sorted(times[1:])[repeats // 2])
                self.times[name, width] = slowest


def _inputs(model: nn.Module, example: Tensor) -> dict[str, Tensor]:
    """Layer -> what it is given for one sample."""
    found: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        found.setdefault(name, x.detach())

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(str(name), args[0]))
        for name, layer in quant_layers(model).items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _places(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Layer -> rows of outputs a sample: pixels of a convolution, positions of a Linear; 0 for a table."""
    places = dict.fromkeys(quant_layers(model), 0)

    def count(name: str, layer: nn.Module, out: Any) -> None:
        if not isinstance(layer, nn.Embedding):
            places[name] += out.numel() // len(out) // layer.get_parameter("weight").shape[0]

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
    return places


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)
