"""From the payload of a file to packed layers and values, checked; the format is in the package's docstring."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sgsc.kernels import PackedRows
from sgsc.packed import PACKED, PackedConv2d, PackedLayer, input_grid

from .format import DTYPES, USUAL, ArtefactError, offsets
from .header import Places, is_size, is_sizes


def parse_contents(
    manifest: dict[str, Any], places: Places, payload: Tensor
) -> tuple[dict[str, PackedLayer], dict[str, Tensor]]:
    """Layers and values by name. Codes are views of the payload, which lives as long as they; nothing else is.

    Args:
        manifest: Checked by itself.
        places: Checked against the length of the payload.
        payload: (N,) uint8, what it may be.

    Raises:
        ArtefactError: If tensors and manifest do not fit each other, or a value is out of range.
    """
    rows = sum(entry[2][0] for entry in manifest["layers"])
    _expect(places, "bits", "U8", (rows + 1) // 2)
    for dtype, listed in manifest["values"].items():
        _expect(places, f"values.{dtype}", dtype, sum(math.prod(shape) for _, shape in listed))
    extra = places.keys() - {"codes", "bits", "scales"} - {f"values.{d}" for d in manifest["values"]}
    if extra:
        raise ArtefactError(f"tensor {min(extra)!r} is not part of the format")
    tensors = {name: _tensor(payload, *place) for name, place in places.items()}
    if "values.BOOL" in tensors and (tensors["values.BOOL"].view(torch.uint8) > 1).any():
        raise ArtefactError("tensor 'values.BOOL': a byte is neither 0 nor 1")
    layers = _layers(manifest, places, tensors)
    values = {}
    for dtype, listed in manifest["values"].items():
        sizes = [math.prod(shape) for _, shape in listed]
        if not sum(sizes):
            values |= {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, shape in listed}
            continue
        parts = tensors[f"values.{dtype}"].split(sizes)
        values |= {name: part.view(shape).clone() for (name, shape), part in zip(listed, parts, strict=True)}
    return layers, values


def _tensor(payload: Tensor, dtype: str, count: int, begin: int) -> Tensor:
    """A view of the payload; a copy where no tensor may lie, at a fraction of an element."""
    size = DTYPES[dtype].itemsize
    found = payload[begin : begin + count * size]
    return (found if found.storage_offset() % size == 0 else found.clone()).view(DTYPES[dtype])


def _expect(places: Places, name: str, dtype: str, count: int) -> None:
    have = places.get(name, (dtype, 0, 0))[:2]
    if have != (dtype, count):
        raise ArtefactError(
            f"tensor {name!r}: {have[1]} elements of {have[0]}, but the manifest needs {count} of {dtype}"
        )


def _layers(manifest: dict, places: Places, tensors: dict[str, Tensor]) -> dict[str, PackedLayer]:
    none = torch.zeros(0, dtype=torch.uint8)
    both = tensors.get("bits", none)
    bits = torch.stack([both & 15, both >> 4], 1).flatten()
    rows = sum(entry[2][0] for entry in manifest["layers"])
    if len(bits) > rows and bits[rows] != 0:
        raise ArtefactError("tensor 'bits': the unused half of its last byte is not 0")
    bits = bits[:rows]
    position = 0
    spans = []
    for name, _, (count, width), *_ in manifest["layers"]:
        own = bits[position : position + count]
        if (own > 8).any():
            raise ArtefactError(f"layer {name!r}: a row of {int(own.max())} bits; want 0 to 8")
        counts = torch.bincount(own, minlength=9).tolist()  # Python's integers: nothing wraps around
        spans.append((own.clone(), sum(n * ((b * width + 7) // 8) for b, n in enumerate(counts))))
        position += count
    needed = sum(length for _, length in spans)
    have = places.get("codes", ("U8", 0, 0))[:2]
    if have != ("U8", needed):
        raise ArtefactError(f"tensor 'codes': {have[1]} bytes of {have[0]}, but the layers' widths need {needed} of U8")
    live = int((bits > 0).sum())
    dtype, count, _ = places.get("scales", ("F32", 0, 0))
    if dtype not in ("F32", "BF16") or count != live:
        raise ArtefactError(f"tensor 'scales': {count} of {dtype}, but {live} rows have bits; want F32 or BF16")
    scales = tensors.get("scales", torch.zeros(0)).float()
    data = tensors.get("codes", none)
    layers: dict[str, PackedLayer] = {}
    first_scale = first_byte = 0
    for (name, kind, (_, width), shift, settings, *grid), (own, length) in zip(manifest["layers"], spans, strict=True):
        alive = own > 0
        scale = torch.ones(len(own))
        scale[alive] = scales[first_scale : first_scale + int(alive.sum())]
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ArtefactError(f"layer {name!r}: a scale is not positive and finite")
        codes = PackedRows(data[first_byte : first_byte + length], own, width)  # all layers share the file's bytes
        used = own.long() * width % 8  # bits of a row's last byte; 0 where all are
        if (codes.data[codes.starts[1:][used > 0] - 1] >> used[used > 0]).any():
            raise ArtefactError(f"layer {name!r}: the unused bits of a row's last byte are not 0")
        layers[name] = _layer(name, kind, codes, scale, offsets(own, shift), settings, *grid)
        first_scale += int(alive.sum())
        first_byte += length
    return layers


def _layer(
    name: str,
    kind: str,
    rows: PackedRows,
    scale: Tensor,
    offset: Tensor,
    settings: dict,
    grid: list[float] | None = None,
) -> PackedLayer:
    cls = PACKED[kind]
    try:
        given = {} if grid is None else {"input_grid": input_grid(*grid)}
    except (ValueError, OverflowError) as error:
        raise ArtefactError(f"layer {name!r}: {error}") from None
    if not issubclass(cls, PackedConv2d):
        if settings:
            raise ArtefactError(f"layer {name!r}: a {kind} has no settings, got {sorted(settings)}")
        return cls(rows, scale, offset, None, **given)
    axes = 1 if kind == "Conv1d" else 2
    kernel = settings.get("kernel")
    full: dict[str, Any] = {k: [usual] * (2 * axes if k == "padding" else axes) for k, usual in USUAL.items()}
    full |= {"kernel": kernel, "groups": 1, "padding_mode": "zeros"} | settings
    fits = full.keys() == {*USUAL, "kernel", "groups", "padding_mode"} and all(
        is_sizes(full[k], 2 * axes if k == "padding" else axes) for k in (*USUAL, "kernel")
    )
    positive = fits and all(0 < v < 2**31 for k in ("kernel", "stride", "dilation") for v in full[k])
    modes = ("zeros", "reflect", "replicate", "circular")
    if not positive or not is_size(full["groups"]) or full["groups"] < 1 or full["padding_mode"] not in modes:
        raise ArtefactError(f"layer {name!r}: settings {settings} do not fit a {kind}")
    if rows.width % math.prod(full["kernel"]) or len(rows.bits) % full["groups"]:
        raise ArtefactError(f"layer {name!r}: {len(rows.bits)} rows of {rows.width} do not fit its kernel and groups")
    return cls(rows, scale, offset, None, **given, **full)
