"""Reading a file, which may be damaged or hostile, and verifying it; the format is in the package's docstring."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from sgsc.packed import PackedLayer

from .contents import parse_contents
from .format import MAX_HEADER, ZEROS, ArtefactError
from .header import parse_header, parse_manifest

CHUNK = 2**20  # bytes read at once: they are hashed while the next ones are read


@dataclass(frozen=True)
class Artefact:
    """A verified file in memory.

    Attributes:
        manifest: As in the module's docstring.
        layers: Packed layers by name, without their biases; together they keep the file's bytes in memory.
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
        try:
            return _read(file, os.fstat(file.fileno()).st_size)
        except ArtefactError as error:
            raise ArtefactError(f"{Path(path).name}: {error}") from None


def from_bytes(data: bytes) -> Artefact:
    """As `read`, from the bytes of a file.

    Raises:
        ArtefactError: If anything about them is not as the format says; the message names the part.
    """
    return _read(io.BytesIO(data), len(data))


def _read(file: io.BufferedIOBase, size: int) -> Artefact:
    head = _head(file, size)
    header, places = parse_header(head, size)  # the lengths fit the file before memory is taken for the rest of it
    manifest = parse_manifest(header)
    parts: SimpleQueue[bytes | memoryview | None] = SimpleQueue()
    with ThreadPoolExecutor(1) as pool:  # the digest takes as long as reading and making the layers together
        digest = pool.submit(_digest, parts)
        try:
            parts.put(head.replace(manifest["sha256"].encode(), ZEROS.encode(), 1))
            data = _rest(file, head, size, parts)
        finally:
            parts.put(None)
        try:
            layers, values = parse_contents(manifest, places, data[len(head) :])
        except Exception:  # where the bytes are not the writer's, that is the error, whatever they led to
            _check_digest(digest.result(), manifest["sha256"])
            raise
        _check_digest(digest.result(), manifest["sha256"])
    return Artefact(manifest, layers, values, size)


def _check_digest(found: str, said: str) -> None:
    if found != said:
        raise ArtefactError(f"digest {found[:12]}…, but the manifest says {said[:12]}…: the file is damaged") from None


def _head(file: io.BufferedIOBase, size: int) -> bytes:
    """The bytes in front of the payload.

    Raises:
        ArtefactError: If their length cannot be; then they are not read.
    """
    if size < 8:
        raise ArtefactError(f"{size} bytes; a file has at least 8 and a header: it is cut short")
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if length > MAX_HEADER:
        said = f"header length {length} is over the limit of {MAX_HEADER} bytes"
        raise ArtefactError(f"{said}: this is no .sgsc file, or it is damaged")
    if 8 + length > size:
        raise ArtefactError(f"header length {length}, but only {size - 8} bytes follow: the file is cut short")
    return first + file.read(length)


def _rest(file: io.BufferedIOBase, head: bytes, size: int, parts: SimpleQueue) -> Tensor:
    """The whole file, (size,) uint8; what follows `head` goes to `parts` as it is read.

    Raises:
        ArtefactError: If it ends too early.
    """
    memory = _memory(size)
    view = memoryview(memory)
    at = len(head)
    view[:at] = head
    while at < size:
        count = file.readinto(view[at : at + CHUNK])
        if not count:
            raise ArtefactError(f"{size} bytes when it was opened, {at} when it was read: something writes to it")
        parts.put(view[at : at + count])
        at += count
    return torch.frombuffer(memory, dtype=torch.uint8)


def _memory(size: int) -> bytearray | mmap.mmap:
    """Huge pages where the system has them: first written, small ones take three times as long."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(size)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _digest(parts: SimpleQueue) -> str:
    digest = hashlib.sha256()
    while (part := parts.get()) is not None:
        digest.update(part)
    return digest.hexdigest()
