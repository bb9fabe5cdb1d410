"""Reading and verifying a file; the format is in the package's docstring."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sgsc.kernels import PackedRows
from sgsc.packed import PACKED, PackedConv2d, PackedLayer

from .format import DTYPES, FORMAT, MAX_HEADER, MAX_RANK, USUAL, ZEROS, ArtefactError, offsets


@dataclass(frozen=True)
class Artefact:
    """A verified file in memory.

    Attributes:
        manifest: As in the module's docstring.
        layers: Packed layers by name, without their biases.
        values: The rest of the state dict by name.
        size: Bytes on disk.
    """

    manifest: dict[str, Any]
    layers: dict[str, PackedLayer]
    values: dict[str, Tensor]
    size: int


def read(path: str | os.PathLike) -> Artefact:
    """Read and verify a file.

    Raises:
        ArtefactError: If anything about it is not as the format says; the message names the part.
        OSError: If it cannot be opened.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8 + MAX_HEADER)
        try:
            header, shapes = _header(head, size)  # the lengths fit the file before the rest of it is read
            file.seek(0)
            return _contents([file.read(size)], size, header, shapes)
        except ArtefactError as error:
            raise ArtefactError(f"{Path(path).name}: {error}") from None


def from_bytes(data: bytes) -> Artefact:
    """As `read`, from the bytes of a file.

    Raises:
        ArtefactError: If anything about them is not as the format says; the message names the part.
    """
    return _contents([data], len(data), *_header(data, len(data)))


def _contents(held: list[bytes], size: int, header: dict[str, Any], shapes: dict[str, tuple[str, int]]) -> Artefact:
    data = held.pop()  # nobody else holds what was read from a file: it is gone before the run form is made
    if len(data) != size:
        raise ArtefactError(f"{size} bytes when it was opened, {len(data)} when it was read: something writes to it")
    manifest = _manifest(header)
    _check_digest(data, manifest)
    rows = sum(entry[2][0] for entry in manifest["layers"])
    _expect(shapes, "bits", "U8", (rows + 1) // 2)
    for dtype, listed in manifest["values"].items():
        _expect(shapes, f"values.{dtype}", dtype, sum(math.prod(shape) for _, shape in listed))
    extra = shapes.keys() - {"codes", "bits", "scales"} - {f"values.{d}" for d in manifest["values"]}
    if extra:
        raise ArtefactError(f"tensor {min(extra)!r} is not part of the format")
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:  # what Python's JSON reads and the other reader does not, such as -0
        raise ArtefactError(f"the header is no safetensors header ({error})") from None
    del data
    if "values.BOOL" in tensors and (tensors["values.BOOL"].view(torch.uint8) > 1).any():
        raise ArtefactError("tensor 'values.BOOL': a byte is neither 0 nor 1")
    layers = _layers(manifest, shapes, tensors)
    values = {}
    for dtype, listed in manifest["values"].items():
        sizes = [math.prod(shape) for _, shape in listed]
        if not sum(sizes):
            values |= {name: torch.empty(shape, dtype=DTYPES[dtype]) for name, shape in listed}
            continue
        parts = tensors[f"values.{dtype}"].split(sizes)
        values |= {name: part.view(shape).clone() for (name, shape), part in zip(listed, parts, strict=True)}
    return Artefact(manifest, layers, values, size)


def _json(text: bytes | str, what: str) -> dict[str, Any]:
    def constant(name: str) -> None:
        raise ArtefactError(f"{what} holds {name}, which is not JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            raise ArtefactError(f"{what}: the key {_twice([key for key, _ in items])!r} stands twice")
        return result

    try:
        text = text if isinstance(text, str) else text.decode("utf-8")  # json would also take UTF-16
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except ArtefactError:
        raise
    except (ValueError, RecursionError) as error:  # among them numbers of more digits than Python reads
        raise ArtefactError(f"{what} is not JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{what} is not a JSON object")
    return value


def _twice(names: list[str]) -> str:
    """The first name that stands there before."""
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))


def _header(data: bytes, size: int) -> tuple[dict[str, Any], dict[str, tuple[str, int]]]:
    """The header, and (dtype, elements) of each tensor, checked to tile the payload exactly.

    Args:
        data: The file's first bytes, the header at least.
        size: Bytes of the whole file.

    Raises:
        ArtefactError: If it is malformed.
    """
    if size < 8:
        raise ArtefactError(f"{size} bytes; a file has at least 8 and a header: it is cut short")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER:
        raise ArtefactError(f"header length {length} is over the limit of {MAX_HEADER} bytes")
    if 8 + length > size:
        raise ArtefactError(f"header length {length}, but only {size - 8} bytes follow: the file is cut short")
    if data[8:9] != b"{":
        raise ArtefactError("the header does not begin with '{'")
    header = _json(data[8 : 8 + length], "the header")
    payload = size - 8 - length
    shapes: dict[str, tuple[str, int]] = {}
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        ok = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not ok or type(entry["dtype"]) is not str or not _is_sizes(entry["shape"], 1):
            raise ArtefactError(f"tensor {name!r}: want a flat tensor with dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES:
            raise ArtefactError(f"tensor {name!r}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
        if not _is_sizes(entry["data_offsets"], 2):
            raise ArtefactError(f"tensor {name!r}: data_offsets {entry['data_offsets']} are not two whole numbers")
        begin, end = entry["data_offsets"]
        count = entry["shape"][0]
        if count == 0:
            raise ArtefactError(f"tensor {name!r} is empty; such a tensor is left out")
        if end - begin != count * DTYPES[entry["dtype"]].itemsize:
            raise ArtefactError(f"tensor {name!r}: {end - begin} bytes for {count} elements of {entry['dtype']}")
        shapes[name] = (entry["dtype"], count)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise ArtefactError(f"tensor {name!r} begins at byte {begin} of the payload, not at {position}")
        position = end
    if position != payload:
        kind = "cut short" if position > payload else "followed by bytes that no tensor owns"
        raise ArtefactError(f"the tensors take {position} bytes, the payload has {payload}: it is {kind}")
    return header, shapes


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_sizes(value: Any, count: int | None = None) -> bool:
    fits = isinstance(value, list) and count in (None, len(value)) and len(value) <= MAX_RANK
    return fits and all(map(_is_size, value))


def _is_shape(value: Any, rank: int | None = None) -> bool:
    """Whether it is a list of sizes whose product is one: then every stride is too, also where an axis is empty."""
    return _is_sizes(value, rank) and _is_size(math.prod(max(v, 1) for v in value))


def _manifest(header: dict[str, Any]) -> dict[str, Any]:
    meta = header.get("__metadata__")
    if not isinstance(meta, dict) or meta.keys() != {"sgsc"} or not isinstance(meta["sgsc"], str):
        raise ArtefactError("no manifest: the metadata must hold the one key 'sgsc'")
    manifest = _json(meta["sgsc"], "the manifest")
    if manifest.get("format") != FORMAT or type(manifest["format"]) is not int:
        raise ArtefactError(f"format {manifest.get('format')!r}; this version reads {FORMAT}")
    keys = {"format", "sha256", "architecture", "layers", "values", "notes"}
    if manifest.keys() != keys:
        raise ArtefactError(f"the manifest's keys differ from the format's in {sorted(manifest.keys() ^ keys)}")
    if not isinstance(manifest["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", manifest["sha256"]):
        raise ArtefactError("the manifest's sha256 is not 64 hexadecimal digits")
    architecture = manifest["architecture"]
    if architecture is not None and not (
        isinstance(architecture, list) and [type(a) for a in architecture] == [str, dict]
    ):
        raise ArtefactError("the manifest's architecture is not [name, arguments]")
    if not isinstance(manifest["notes"], dict) or not isinstance(manifest["values"], dict):
        raise ArtefactError("the manifest's notes and values must be objects")
    if not isinstance(manifest["layers"], list) or not manifest["layers"]:
        raise ArtefactError("the manifest's layers must be a list of at least one")
    for entry in manifest["layers"]:
        if not isinstance(entry, list) or [type(e) for e in entry] != [str, str, list, int, dict]:
            raise ArtefactError("an entry of layers is not [name, type, [rows, width], shift, settings]")
        name, kind, shape, shift, _ = entry
        if kind not in PACKED:
            raise ArtefactError(f"layer {name!r}: type {kind!r} is not one of {', '.join(sorted(PACKED))}")
        if not _is_shape(shape, 2) or shift not in (0, 1):
            raise ArtefactError(f"layer {name!r}: rows and width {shape} or shift {shift} out of range")
    names = [entry[0] for entry in manifest["layers"]]
    for dtype, listed in manifest["values"].items():
        if dtype not in DTYPES or not isinstance(listed, list):
            raise ArtefactError(f"values of dtype {dtype!r} are not part of the format")
        for entry in listed:
            if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not str or not _is_shape(entry[1]):
                raise ArtefactError(f"an entry of values.{dtype} is not [name, shape]")
            names.append(entry[0])
    if len(set(names)) != len(names):
        raise ArtefactError(f"the name {_twice(names)!r} stands twice in the manifest")
    return manifest


def _check_digest(data: bytes, manifest: dict[str, Any]) -> None:
    said = manifest["sha256"]
    place = data.find(said.encode())  # not there if the header writes it with escapes
    view, digest = memoryview(data), hashlib.sha256()
    for part in (view[: max(place, 0)], ZEROS.encode(), view[max(place, 0) + len(said) :]):
        digest.update(part)
    found = digest.hexdigest()
    if place < 0 or found != said:
        raise ArtefactError(f"digest {found[:12]}…, but the manifest says {said[:12]}…: the file is damaged")


def _expect(shapes: dict[str, tuple[str, int]], name: str, dtype: str, count: int) -> None:
    have = shapes.get(name, (dtype, 0))
    if have != (dtype, count):
        raise ArtefactError(
            f"tensor {name!r}: {have[1]} elements of {have[0]}, but the manifest needs {count} of {dtype}"
        )


def _layers(manifest: dict, shapes: dict[str, tuple[str, int]], tensors: dict[str, Tensor]) -> dict[str, PackedLayer]:
    none = torch.zeros(0, dtype=torch.uint8)
    both = tensors.get("bits", none)
    bits = torch.stack([both & 15, both >> 4], 1).flatten()
    rows = sum(entry[2][0] for entry in manifest["layers"])
    if len(bits) > rows and bits[rows] != 0:
        raise ArtefactError("tensor 'bits': the unused half of its last byte is not 0")
    bits = bits[:rows]
    position = 0
    spans = []
    for name, _, (count, width), _, _ in manifest["layers"]:
        own = bits[position : position + count]
        if (own > 8).any():
            raise ArtefactError(f"layer {name!r}: a row of {int(own.max())} bits; want 0 to 8")
        counts = torch.bincount(own, minlength=9).tolist()  # Python's integers: nothing wraps around
        spans.append((own.clone(), sum(n * ((b * width + 7) // 8) for b, n in enumerate(counts))))
        position += count
    needed = sum(length for _, length in spans)
    have = shapes.get("codes", ("U8", 0))
    if have != ("U8", needed):
        raise ArtefactError(f"tensor 'codes': {have[1]} bytes of {have[0]}, but the layers' widths need {needed} of U8")
    live = int((bits > 0).sum())
    dtype, count = shapes.get("scales", ("F32", 0))
    if dtype not in ("F32", "BF16") or count != live:
        raise ArtefactError(f"tensor 'scales': {count} of {dtype}, but {live} rows have bits; want F32 or BF16")
    scales = tensors.get("scales", torch.zeros(0)).float()
    data = tensors.get("codes", none)
    layers: dict[str, PackedLayer] = {}
    first_scale = first_byte = 0
    for (name, kind, (_, width), shift, settings), (own, length) in zip(manifest["layers"], spans, strict=True):
        alive = own > 0
        scale = torch.ones(len(own))
        scale[alive] = scales[first_scale : first_scale + int(alive.sum())]
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ArtefactError(f"layer {name!r}: a scale is not positive and finite")
        codes = PackedRows(
            data[first_byte : first_byte + length], own, width
        )  # a view: all layers share the file's bytes
        used = own.long() * width % 8  # bits of a row's last byte; 0 where all are
        if (codes.data[codes.starts[1:][used > 0] - 1] >> used[used > 0]).any():
            raise ArtefactError(f"layer {name!r}: the unused bits of a row's last byte are not 0")
        layers[name] = _layer(name, kind, codes, scale, offsets(own, shift), settings)
        first_scale += int(alive.sum())
        first_byte += length
    return layers


def _layer(name: str, kind: str, rows: PackedRows, scale: Tensor, offset: Tensor, settings: dict) -> PackedLayer:
    cls = PACKED[kind]
    if not issubclass(cls, PackedConv2d):
        if settings:
            raise ArtefactError(f"layer {name!r}: a {kind} has no settings, got {sorted(settings)}")
        return cls(rows, scale, offset, None)
    axes = 1 if kind == "Conv1d" else 2
    kernel = settings.get("kernel")
    full: dict[str, Any] = {k: [usual] * (2 * axes if k == "padding" else axes) for k, usual in USUAL.items()}
    full |= {"kernel": kernel, "groups": 1, "padding_mode": "zeros"} | settings
    fits = full.keys() == {*USUAL, "kernel", "groups", "padding_mode"} and all(
        _is_sizes(full[k], 2 * axes if k == "padding" else axes) for k in (*USUAL, "kernel")
    )
    positive = fits and all(0 < v < 2**31 for k in ("kernel", "stride", "dilation") for v in full[k])
    modes = ("zeros", "reflect", "replicate", "circular")
    if not positive or not _is_size(full["groups"]) or full["groups"] < 1 or full["padding_mode"] not in modes:
        raise ArtefactError(f"layer {name!r}: settings {settings} do not fit a {kind}")
    if rows.width % math.prod(full["kernel"]) or len(rows.bits) % full["groups"]:
        raise ArtefactError(f"layer {name!r}: {len(rows.bits)} rows of {rows.width} do not fit its kernel and groups")
    return cls(rows, scale, offset, None, **full)
