"""Writing a packed model as a file; the format is in the package's docstring."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sgsc.files import write_atomically
from sgsc.packed import PackedConv2d, PackedLayer

from .format import DTYPES, FORMAT, USUAL, ZEROS

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_bytes(
    model: nn.Module, *, architecture: tuple[str, dict[str, Any]] | None = None, notes: dict[str, Any] | None = None
) -> bytes:
    """The file of a packed model.

    Args:
        model: What `pack` returned.
        architecture: (name, arguments) of a builder in ARCHITECTURES that makes the float model.
        notes: JSON-able facts to keep in the file.

    Raises:
        ValueError: If the model holds no packed layer, or a value of a dtype that the format does not have.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    if not packed:
        raise ValueError("the model holds no packed layer; call pack(model) first")
    layers, tensors = [], {}
    own = {f"{name}.{part}" for name in packed for part in ("data", "bits", "scale", "offset")}
    for name, m in packed.items():
        shift = int(((m.bits == 1) & (m.offset == -0.5)).any())
        layers.append([name, m.type_name, [len(m.bits), m.width], shift, _unusual(m)])
    parts = list(packed.values())
    scales = torch.cat([m.scale[m.bits > 0] for m in parts])
    short = scales.bfloat16()
    tensors["codes"] = torch.cat([m.data for m in parts])
    tensors["bits"] = _nibbles(torch.cat([m.bits for m in parts]))
    tensors["scales"] = short if torch.equal(short.to(scales.dtype), scales) else scales
    flat: dict[str, list[Tensor]] = {}
    listed: dict[str, list] = {}
    for name, value in model.state_dict().items():
        if name in own or name.endswith("num_batches_tracked"):
            continue
        if value.dtype not in _NAMES:
            raise ValueError(f"{name!r} is {value.dtype}, which the format does not hold; convert it first")
        listed.setdefault(_NAMES[value.dtype], []).append([name, list(value.shape)])
        flat.setdefault(_NAMES[value.dtype], []).append(value.detach().flatten())
    for dtype, values in flat.items():
        tensors[f"values.{dtype}"] = torch.cat(values)
    manifest = {
        "format": FORMAT,
        "sha256": ZEROS,
        "architecture": list(architecture) if architecture else None,
        "layers": layers,
        "values": listed,
        "notes": notes or {},
    }
    text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    present = {k: v.cpu().contiguous() for k, v in tensors.items() if v.numel()}
    data = safetensors.torch.save(present, metadata={"sgsc": text})
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(ZEROS.encode(), digest.encode(), 1)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    architecture: tuple[str, dict[str, Any]] | None = None,
    notes: dict[str, Any] | None = None,
) -> int:
    """Write a packed model, atomically: `path` holds the old file or the new one, never a part. Returns its bytes."""
    data = to_bytes(model, architecture=architecture, notes=notes)
    write_atomically(Path(path), data)
    return len(data)


def stored_size(model: nn.Module, **kwargs: Any) -> int:
    """Bytes that `save` would write for this packed model."""
    return len(to_bytes(model, **kwargs))


def _nibbles(bits: Tensor) -> Tensor:
    if len(bits) % 2:
        bits = torch.cat([bits, bits.new_zeros(1)])
    return bits[::2] | (bits[1::2] << 4)


def _unusual(layer: PackedLayer) -> dict[str, Any]:
    """The layer's settings without those that have their usual value."""
    settings = layer.settings()
    if not isinstance(layer, PackedConv2d):
        return settings
    kept = {"kernel": settings["kernel"]}
    kept |= {k: settings[k] for k, usual in USUAL.items() if set(settings[k]) != {usual}}
    if settings["groups"] != 1:
        kept["groups"] = settings["groups"]
    if settings["padding_mode"] != "zeros":
        kept["padding_mode"] = settings["padding_mode"]
    return kept
