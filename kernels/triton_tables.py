"""Configurations of packed products that were timed on a GPU: the look-up, and the files behind it.

    look-up   `tuned`: a dict, asked by what the host knows of a product without waiting for the GPU (`Key`); the width
              of each tile is the GPU's alone, so the bytes of the words stand for all of them. Where it has nothing,
              `configure` decides from shapes: a first call tunes nothing
    cache     $XDG_CACHE_HOME/sgsc, a file for a GPU, a Triton and the kernels' sources, written by `sgsc tune`
    shipped   tuned/ beside this file, a file for a GPU. It comes with the kernels that it was made for, so it need not
              say of which sources it is: an edit of a comment would discard it, and a table that fits the kernels badly
              costs speed, never a result. What was measured here, in the cache, goes before it

Files are looked for once, at a GPU's first product that no graph captures: two calls of stat where there are none. They
are never trusted: whatever `allowed` lets pass gives right results, and a file with anything else in it is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import fragments
from .triton_configuration import COLUMNS, Config, Gpu, ceil_div, gpu, most_columns, shared, warps_of

FORMAT = 2
MOST_BYTES = 2**22  # of a file: some ten thousand entries
SOURCES = ("fragments.py", "triton_compat.py", "triton_early.py", "triton_packed_kernels.py", "triton_unpack.py")
SHIPPED = Path(__file__).with_name("tuned")
X = ("tokens", "runs", "pixels")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

VALUES = {
    "columns": COLUMNS,
    "blocks": (1, 2, 4),
    "order": ("narrow", "wide"),
    "warps": (1, 2, 4, 8),
    "stages": (1, 2, 3, 4, 5),
}
MOST_PROGRAMS = 16  # a multiprocessor, where K is split: sums in parts take memory


class Key(NamedTuple):
    """What a configuration is chosen by.

    Attributes:
        dtype: Of x.
        x: How x lies, as `configure` has it; columns are output pixels but for "tokens".
        most: Columns, rounded up by `bucket`.
        tiles, size: Tiles, and rows of each.
        across: Blocks of K.
        planes: Planes of all tiles: bytes decide.
        groups: Of a convolution, each with channels of its own.
    """

    dtype: torch.dtype
    x: str
    most: int
    tiles: int
    size: int
    across: int
    planes: int
    groups: int = 1


# ---- look-up ----

_tables: dict[int | None, Any] = {}


def bucket(columns: int, pixels: bool) -> int:
    """Columns, rounded up to a power of two from 8 on; pixels to a power of four from 16 on."""
    exponent = (columns - 1).bit_length()
    return max(16, 1 << (exponent + exponent % 2)) if pixels else max(8, 1 << exponent)


def tuned(
    x: Tensor, words: Tensor, lies: str, columns: int, tiles: int, size: int, across: int, groups: int = 1
) -> Config | None:
    """The configuration that was found fastest for a product on x's GPU; None where none is known."""
    index = x.device.index
    table: Any = _tables.get(index)
    if table is None:
        table = _load(index)
    if not table:
        return None
    planes = words.numel() // fragments.WORDS
    return table.get((x.dtype, lies, bucket(columns, lies != "tokens"), tiles, size, across, planes, groups))


def forget() -> None:
    """Let the next product on each GPU read its files again."""
    _tables.clear()


class Asked:
    """A table with the same answer to every key, which it remembers."""

    def __init__(self, answer: Config | None) -> None:
        self.answer = answer
        self.key: Key | None = None

    def get(self, key: tuple) -> Config | None:
        """The answer."""
        self.key = Key._make(key)
        return self.answer


@contextmanager
def answering(index: int | None, answer: Config | None) -> Iterator[Asked]:
    """Have products on a GPU ask a table with one answer; None leaves them to the heuristic."""
    before, asked = _tables.pop(index, None), Asked(answer)
    _tables[index] = asked
    try:
        yield asked
    finally:
        _tables.pop(index)
        if before is not None:
            _tables[index] = before


def _load(index: int | None) -> Mapping[Key, Config]:
    if index is not None and torch.cuda.is_current_stream_capturing():
        return {}  # a capture reads no files; a product before it, which compiles the kernels, has
    here, found, ignored = gpu(index), {}, []
    try:
        found |= read_table(shipped_path(here), here, shipped=True)
    except (OSError, ValueError) as error:
        ignored.append(error)
    try:
        if cache_folder().is_dir():  # else there is nothing to hash the sources for
            found |= read_table(cache_path(here), here)
    except (OSError, ValueError) as error:
        ignored.append(error)
    _tables[index] = found  # before the warnings, which may be errors: they come once
    for error in ignored:
        warnings.warn(
            f"sgsc: a table of tuned configurations is ignored: {error}; `sgsc tune` makes a new one",
            RuntimeWarning,
            stacklevel=4,
        )
    return found


# ---- files ----


def cache_folder() -> Path:
    """Where `sgsc tune` writes: $XDG_CACHE_HOME/sgsc, or ~/.cache/sgsc where that is no absolute path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = os.path.expanduser("~/.cache")  # noqa: PTH111  pathlib's raises where there is no home
    return Path(base if base.is_absolute() else home, "sgsc")


def cache_path(here: Gpu) -> Path:
    """The cache's file for a GPU, this Triton and these sources."""
    return cache_folder() / f"{_slug(here)}-triton-{_safe(triton.__version__)}-{sources()[:12]}.json"


def shipped_path(here: Gpu) -> Path:
    """The package's file for a GPU."""
    return SHIPPED / f"{_slug(here)}.json"


def _slug(here: Gpu) -> str:
    return f"{_safe(here.name).lower()}-{here.processors}"


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:100]


@cache
def sources() -> str:
    """SHA-256 of the kernels' sources."""
    digest = hashlib.sha256()
    for name in SOURCES:
        data = Path(__file__).with_name(name).read_bytes()
        digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _header(here: Gpu) -> dict[str, Any]:
    mine = {"format": FORMAT, "gpu": here.name, "processors": here.processors}
    return mine | {"triton": triton.__version__, "sources": sources()}


def write_table(table: Mapping[Key, Config], here: Gpu) -> bytes:
    """A file that `read_table` reads."""
    entries = [
        key._asdict() | {"dtype": str(key.dtype).removeprefix("torch."), **c._asdict()} for key, c in table.items()
    ]
    lines = ",\n".join(sorted(json.dumps(entry) for entry in entries))
    return f'{json.dumps(_header(here))[:-1]}, "entries": [\n{lines}\n]}}\n'.encode()


def read_table(path: Path, here: Gpu, *, shipped: bool = False) -> dict[Key, Config]:
    """The entries of a file; none where there is no file.

    Args:
        path: The file.
        here: The GPU that it must be for.
        shipped: Take it whatever Triton and sources it names.

    Raises:
        ValueError: If it is not such a file, is for something else, or an entry is not `allowed`.
        OSError: If it cannot be read.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
        raise ValueError(f"{path} is no file of at most {MOST_BYTES} bytes")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES)
    try:
        said = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not JSON") from None
    header = _header(here)
    if (
        not isinstance(said, dict)
        or said.keys() != header.keys() | {"entries"}
        or not isinstance(said["entries"], list)
    ):
        raise ValueError(f"{path} does not hold {', '.join(header)} and entries")
    for name in ("format", "gpu", "processors") if shipped else header:
        if said[name] != header[name] or type(said[name]) is not type(header[name]):
            raise ValueError(f"{path} is for another {name} than {header[name]!r}")
    entries = [_entry(entry, here) for entry in said["entries"]]
    if None in entries:
        raise ValueError(f"{path}: entry {entries.index(None)} is none that tuning writes")
    return dict(filter(None, entries))


def _entry(entry: Any, here: Gpu) -> tuple[Key, Config] | None:
    named = (*Key._fields, *Config._fields)
    right = isinstance(entry, dict) and entry.keys() == set(named)
    for name in named if right else ():
        kind = str if name in ("dtype", "order", "x") else int
        right = right and type(entry[name]) is kind and (kind is not int or 0 < entry[name] < 2**31)
    if right and entry["dtype"] in DTYPES and entry["x"] in X:
        key = Key(DTYPES[entry["dtype"]], *(entry[name] for name in Key._fields[1:]))
        config = Config(**{name: entry[name] for name in Config._fields})
        if key.most == bucket(key.most, key.x != "tokens") and allowed(key, config, here):
            return key, config
    return None


def allowed(key: Key, config: Config, here: Gpu) -> bool:
    """Whether a product may run so: programs fit the GPU and its registers, their sums in parts a modest memory."""
    if any(getattr(config, name) not in values for name, values in VALUES.items()):
        return False
    steps = ceil_div(key.across, config.blocks)
    programs = config.parts * key.tiles * ceil_div(key.most, config.columns)
    times = config.warps / warps_of(key.size)  # the registers that most_columns counts on
    return (
        config.columns <= key.most
        and (key.x != "pixels" or config.columns <= most_columns(key.dtype, key.size, here, key.x) * times)
        and 1 <= config.parts <= steps
        and (config.parts == 1 or programs <= MOST_PROGRAMS * here.processors)
        and shared(key.dtype, key.size, config) <= here.shared
    )
