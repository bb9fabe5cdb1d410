"""Writing a packed model as a file; the format is in the package's docstring."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sgsc.files import write_atomically
from sgsc.packed import PackedConv2d, PackedLayer, PackedProduct, input_grid

from .format import DTYPES, FORMAT, MAX_HEADER, MAX_RANK, USUAL, WITH_INPUTS, ZEROS, offsets

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
        ValueError: If the model holds no packed layer, or something that the format does not hold.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    if not packed:
        raise ValueError("the model holds no packed layer; call pack(model) first")
    layers, tensors = [], {}
    for name, m in packed.items():
        halves = m.bits[(m.bits > 0) & (m.offset != offsets(m.bits, 0).to(m.offset))]
        shift = int(halves.max()) if len(halves) else 0
        _check_grid(name, m, shift)
        layers.append([name, m.type_name, [len(m.bits), m.width], shift, settings_of(m), *_input(name, m)])
    parts = list(packed.values())
    scales = torch.cat([m.scale[m.bits > 0].float() for m in parts])
    short = scales.bfloat16()
    tensors["codes"] = torch.cat([m.data for m in parts])
    tensors["bits"] = _nibbles(torch.cat([m.bits for m in parts]))
    tensors["scales"] = short if torch.equal(short.float(), scales) else scales
    flat: dict[str, list[Tensor]] = {}
    listed: dict[str, list] = {}
    for name, value in values_of(model):
        listed.setdefault(_NAMES[value.dtype], []).append([name, list(value.shape)])
        flat.setdefault(_NAMES[value.dtype], []).append(value.detach().flatten())
    for dtype, values in flat.items():
        tensors[f"values.{dtype}"] = torch.cat(values)
    manifest = {
        "format": WITH_INPUTS if any(len(entry) > 5 for entry in layers) else FORMAT,
        "sha256": ZEROS,
        "architecture": list(architecture) if architecture else None,
        "layers": layers,
        "values": listed,
        "notes": notes or {},
    }
    text = _text(manifest)
    present = {k: v.cpu().contiguous() for k, v in tensors.items() if v.numel()}
    data = safetensors.torch.save(present, metadata={"sgsc": text})
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise ValueError(f"the header would have more than {MAX_HEADER} bytes, the format's limit; shorten the notes")
    digest = hashlib.sha256(data).hexdigest()
    return data.replace(ZEROS.encode(), digest.encode(), 1)


def save(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    architecture: tuple[str, dict[str, Any]] | None = None,
    notes: dict[str, Any] | None = None,
) -> int:
    """Write a packed model, atomically: `path` holds the old file or the new one, never a part. Returns its bytes.

    Args:
        model: What `pack` returned.
        path: Of the file; its folder must be there.
        architecture: (name, arguments) of a builder in `ARCHITECTURES` that makes the float model, for `load`.
        notes: JSON-able facts to keep in the file.

    Raises:
        ValueError: If the model holds no packed layer, or something that the format does not hold.
        OSError: If the file cannot be written.
    """
    data = to_bytes(model, architecture=architecture, notes=notes)
    write_atomically(Path(path), data)
    return len(data)


def stored_size(model: nn.Module, **kwargs: Any) -> int:
    """Bytes that `save` would write for this packed model, with the same `architecture` and `notes`.

    Raises:
        ValueError: As `save` does.
    """
    return len(to_bytes(model, **kwargs))


def _check_grid(name: str, layer: PackedLayer, shift: int) -> None:
    """Refuse what would come back as something else.

    Raises:
        ValueError: If a row's grid is not one that the format can say.
    """
    alive = layer.bits > 0
    scale, offset = layer.scale[alive], layer.offset[alive]
    if not (torch.isfinite(scale) & (scale > 0)).all() or not torch.equal(scale.float().to(scale.dtype), scale):
        raise ValueError(f"layer {name!r}: a scale is not a positive and finite float32, as a file holds them")
    if not torch.equal(offset.float(), offsets(layer.bits, shift)[alive]):
        raise ValueError(f"layer {name!r}: its offsets are not those of its widths, half a step more up to one width")


def _input(name: str, layer: PackedLayer) -> list[list[float]]:
    """The grid of the layer's input as the manifest has it; nothing where there is none.

    Raises:
        ValueError: If it is none that the format can say.
    """
    if not isinstance(layer, PackedProduct) or layer.input_grid is None:
        return []
    scale, low, high = layer.input_grid.tolist()
    try:
        said = [float(str(np.float32(scale))), int(low), int(high)]  # in the fewest digits that tell the float32
        same = torch.equal(input_grid(*said).to(layer.input_grid), layer.input_grid)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"layer {name!r}: {error}") from None
    if not same:
        raise ValueError(f"layer {name!r}: its input's grid {[scale, low, high]} is not of float32 and integers")
    return [said]


def values_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The state dict without packed layers' own tensors, counters of batches, and second names of shared modules.

    Raises:
        ValueError: If a value is nothing that the format holds.
    """
    modules, first = dict(model.named_modules(remove_duplicate=False)), dict(model.named_modules())
    values = []
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner not in modules:
            raise ValueError(f"{name!r} of the state dict belongs to no module, so that it could not be put back")
        module = modules[owner]
        own = isinstance(module, PackedLayer) and leaf != "bias"
        if own or owner not in first or (isinstance(module, _BatchNorm) and leaf == "num_batches_tracked"):
            continue
        if not isinstance(value, Tensor) or value.dtype not in _NAMES or value.dim() > MAX_RANK:
            what = f"{value.dtype} with {value.dim()} axes" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{name!r} is {what}; the format holds tensors of {', '.join(DTYPES)} with up to {MAX_RANK}: convert it"
            )
        values.append((name, value))
    return values


def _text(manifest: dict[str, Any]) -> str:
    """The manifest as JSON.

    Raises:
        ValueError: If architecture or notes do not come back from JSON.
    """
    architecture, notes = manifest["architecture"], manifest["notes"]
    named = architecture is None or [type(a) for a in architecture] == [str, dict]
    if not named or not isinstance(notes, dict):
        raise ValueError(f"want architecture=(name, arguments) and a dict of notes, got {architecture!r}, {notes!r}")
    try:
        text = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"architecture or notes cannot be written as JSON ({error})") from None
    if json.dumps(json.loads(text), separators=(",", ":")) != text:
        raise ValueError("architecture or notes hold a key twice once it is text, such as 1 and '1'; rename one")
    return text


def _nibbles(bits: Tensor) -> Tensor:
    if len(bits) % 2:
        bits = torch.cat([bits, bits.new_zeros(1)])
    return bits[::2] | (bits[1::2] << 4)


def settings_of(layer: PackedLayer) -> dict[str, Any]:
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
