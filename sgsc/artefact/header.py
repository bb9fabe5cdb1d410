"""What the header of a file says, every part of it checked; the format is in the package's docstring."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sgsc.packed import PACKED, PackedProduct

from .format import DTYPES, FORMATS, MAX_RANK, WITH_INPUTS, ArtefactError

Places = dict[str, tuple[str, int, int]]  # dtype, elements and first byte in the payload of each tensor


def _json(text: bytes, what: str) -> dict[str, Any]:
    def constant(name: str) -> None:
        raise ArtefactError(f"{what} holds {name}, which is not JSON")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            raise ArtefactError(f"{what}: the key {_twice([key for key, _ in items])!r} stands twice")
        return result

    def integer(digits: str) -> int | float:
        return -0.0 if digits == "-0" else int(digits)  # as other readers of JSON have it: no size

    try:
        decoded = text.decode("utf-8")  # json would also take UTF-16
        value = json.loads(decoded, object_pairs_hook=pairs, parse_constant=constant, parse_int=integer)
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


def parse_header(head: bytes, size: int) -> tuple[dict[str, Any], Places]:
    """The header, and the place of each tensor, checked to tile the payload exactly.

    Args:
        head: The file's bytes up to the payload.
        size: Bytes of the whole file.

    Raises:
        ArtefactError: If it is malformed.
    """
    if head[8:9] != b"{":
        raise ArtefactError("the header does not begin with '{'")
    header = _json(head[8:], "the header")
    payload = size - len(head)
    places: Places = {}
    ranges = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        ok = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not ok or type(entry["dtype"]) is not str or not is_sizes(entry["shape"], 1):
            raise ArtefactError(f"tensor {name!r}: want a flat tensor with dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES:
            raise ArtefactError(f"tensor {name!r}: dtype {entry['dtype']!r} is not one of {', '.join(DTYPES)}")
        if not is_sizes(entry["data_offsets"], 2):
            raise ArtefactError(f"tensor {name!r}: data_offsets {entry['data_offsets']} are not two whole numbers")
        begin, end = entry["data_offsets"]
        count = entry["shape"][0]
        if count == 0:
            raise ArtefactError(f"tensor {name!r} is empty; such a tensor is left out")
        if end - begin != count * DTYPES[entry["dtype"]].itemsize:
            raise ArtefactError(f"tensor {name!r}: {end - begin} bytes for {count} elements of {entry['dtype']}")
        places[name] = (entry["dtype"], count, begin)
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise ArtefactError(f"tensor {name!r} begins at byte {begin} of the payload, not at {position}")
        position = end
    if position != payload:
        kind = "cut short" if position > payload else "followed by bytes that no tensor owns"
        raise ArtefactError(f"the tensors take {position} bytes, the payload has {payload}: it is {kind}")
    return header, places


def is_size(value: Any) -> bool:
    """Whether it is a whole number that, times the size of an element, a 64-bit one still holds."""
    return type(value) is int and 0 <= value < 2**48


def is_sizes(value: Any, count: int | None = None) -> bool:
    """Whether it is a list of sizes, `count` of them if that is given."""
    fits = isinstance(value, list) and count in (None, len(value)) and len(value) <= MAX_RANK
    return fits and all(map(is_size, value))


def _is_shape(value: Any, rank: int | None = None) -> bool:
    """Whether it is a list of sizes whose product is one: then every stride is too, also where an axis is empty."""
    return is_sizes(value, rank) and is_size(math.prod(max(v, 1) for v in value))


def parse_manifest(header: dict[str, Any]) -> dict[str, Any]:
    """The manifest, checked by itself.

    Raises:
        ArtefactError: If it is malformed.
    """
    meta = header.get("__metadata__")
    if not isinstance(meta, dict) or meta.keys() != {"sgsc"} or not isinstance(meta["sgsc"], str):
        raise ArtefactError("no manifest: the metadata must hold the one key 'sgsc'")
    text = meta["sgsc"].encode("utf-8", "surrogatepass")  # half a character is refused as it is in the header
    manifest = _json(text, "the manifest")
    if type(manifest.get("format")) is not int or manifest["format"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise ArtefactError(f"format {manifest.get('format')!r}; this version reads {known}")
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
    parts = [str, str, list, int, dict]
    both = (parts, [*parts, list]) if manifest["format"] == WITH_INPUTS else (parts,)
    for entry in manifest["layers"]:
        if not isinstance(entry, list) or [type(e) for e in entry] not in both:
            more = " and, in format 2, the input's grid" if len(both) > 1 else ""
            raise ArtefactError(f"an entry of layers is not [name, type, [rows, width], shift, settings]{more}")
        name, kind, shape, shift, _, *grid = entry
        if kind not in PACKED:
            raise ArtefactError(f"layer {name!r}: type {kind!r} is not one of {', '.join(sorted(PACKED))}")
        if not _is_shape(shape, 2) or not 0 <= shift <= 8:
            raise ArtefactError(f"layer {name!r}: rows and width {shape} or shift {shift} out of range")
        if grid and [type(value) for value in grid[0]] not in ([float, int, int], [int, int, int]):
            raise ArtefactError(f"layer {name!r}: its input's grid {grid[0]} is not [scale, code_min, code_max]")
        if grid and not issubclass(PACKED[kind], PackedProduct):
            raise ArtefactError(f"layer {name!r}: the input of a layer of type {kind} has no grid")
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
