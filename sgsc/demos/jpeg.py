"""CIFAR-10 as JPEG images of quality 75 in one npz: read without trust, decoded once, kept in the temporary folder.

    head_SPLIT  (H,) uint8      the first bytes, which all images of the split share
    body_SPLIT  (B,) uint8      the rest of each image, one after the other
    len_SPLIT   (N,) uint16     how many bytes of the body each image has
    y_SPLIT     (N,) uint8      classes, 0 to 9

Every size is checked before memory is taken for it, and a picture of another size than 32 x 32 is not decoded.

The decoded pixels lie in a folder that only its owner can write to, under the digest of the container, and begin with
their own: a file that is torn, or another user's, is decoded anew instead of believed.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from sgsc.files import write_atomically

SIDE, CLASSES = 32, 10
MOST = {"train": 50_000, "test": 10_000}  # images
BYTES_AN_IMAGE = 4096  # on average, at most: at this quality they have 300
HEAD = 1 << 16

Splits = dict[str, tuple[np.ndarray, np.ndarray]]


def cifar10_arrays(path: Path) -> Splits:
    """ "train" and "test" -> pixels (N, 32, 32, 3) uint8 and classes (N,) uint8.

    Raises:
        ValueError: If the file is no such container, an image in it is damaged, or Pillow is missing.
    """
    parts = _read(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    shapes = {split: (len(parts[f"len_{split}"]), SIDE, SIDE, 3) for split in MOST}
    kept = _cache(digest.hexdigest())
    found = None if kept is None else _recall(kept, sum(int(np.prod(shape)) for shape in shapes.values()))
    if found is None:
        pixels = {split: _decode(path, parts, split) for split in MOST}
        if kept is not None:
            _keep(kept, b"".join(pixels[split].tobytes() for split in MOST))
    else:
        cut = int(np.prod(shapes["train"]))
        pixels = {"train": found[:cut].reshape(shapes["train"]), "test": found[cut:].reshape(shapes["test"])}
    return {split: (pixels[split], parts[f"y_{split}"]) for split in MOST}


def _digest(file: Any) -> Any:  # Python 3.10
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest


# ---- the container ----


def _read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of both splits, checked against one another.

    Raises:
        ValueError: If one is absent, of another type, too large, or does not fit the others.
    """
    parts: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for split, most in MOST.items():
                limits = {"head": HEAD, "len": most, "y": most, "body": most * BYTES_AN_IMAGE}
                for name, limit in limits.items():
                    kind = np.uint16 if name == "len" else np.uint8
                    parts[f"{name}_{split}"] = _member(archive, f"{name}_{split}.npy", kind, limit)
    except (OSError, EOFError, KeyError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"CIFAR-10 (JPEG q75): cannot read {path.name} ({error}); expected an npz of head, body, len and y, each "
            "of train and test"
        ) from None
    for split in MOST:
        body, lengths, labels = (parts[f"{name}_{split}"] for name in ("body", "len", "y"))
        wrong = ""
        if not len(lengths) or len(labels) != len(lengths):
            wrong = f"{len(lengths)} lengths and {len(labels)} classes; want as many, and at least one"
        elif int(lengths.sum(dtype=np.int64)) != len(body):
            wrong = f"the lengths add up to {lengths.sum(dtype=np.int64)}, but the body has {len(body)} bytes"
        elif labels.max() >= CLASSES:
            wrong = f"a class is {labels.max()}, the largest is {CLASSES - 1}"
        if wrong:
            raise ValueError(f"CIFAR-10 (JPEG q75): {path.name}, split {split}: {wrong}; take the whole file")
    return parts


def _member(archive: zipfile.ZipFile, name: str, kind: type, most: int) -> np.ndarray:
    """One 1-D array of at most `most` elements; the size that it names is believed only as far as bytes are there.

    Raises:
        ValueError: If it is of another type or shape, or too large.
    """
    size = np.dtype(kind).itemsize
    with archive.open(name) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of another npy version than 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 1 or dtype != np.dtype(kind) or fortran or not 0 <= shape[0] <= most:
            raise ValueError(f"{name} is {dtype} {shape}, expected {np.dtype(kind)} of at most {most} in one dimension")
        data = file.read(shape[0] * size + 1)
    if len(data) != shape[0] * size:
        raise ValueError(f"{name} names {shape[0]} elements and holds {len(data)} bytes or more")
    return np.frombuffer(data, kind)


def _decode(path: Path, parts: dict[str, np.ndarray], split: str) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ValueError(
            "CIFAR-10 (JPEG q75): its images are decoded by Pillow, which is not installed; pip install 'sgsc[images]'"
        ) from None
    head, body, lengths = (parts[f"{name}_{split}"].tobytes() for name in ("head", "body", "len"))
    ends = np.frombuffer(lengths, np.uint16).cumsum(dtype=np.int64).tolist()
    pixels = np.empty((len(ends), SIDE, SIDE, 3), np.uint8)
    for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        try:
            with Image.open(io.BytesIO(head + body[start:end]), formats=["JPEG"]) as image:
                if image.size != (SIDE, SIDE):  # known from its header alone
                    raise ValueError(f"it has {image.size[0]} x {image.size[1]} pixels, expected {SIDE} x {SIDE}")
                pixels[i] = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"CIFAR-10 (JPEG q75): {path.name}, split {split}, image {i}: {error}") from None
    return pixels


# ---- what was decoded before ----


def _cache(digest: str) -> Path | None:
    """Where the pixels of this container lie, in a folder of this user alone; None where there can be none."""
    if not hasattr(os, "getuid"):
        return None
    folder = Path(tempfile.gettempdir()) / f"sgsc-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    mine = found.st_uid == os.getuid() and not found.st_mode & 0o077  # a link is open to all
    return folder / f"cifar10-jpeg-{digest[:32]}.pixels" if mine else None


def _recall(path: Path, size: int) -> np.ndarray | None:
    """The pixels, or None where the file is absent or not what was written."""
    try:
        if path.stat().st_size != size + hashlib.sha256().digest_size:
            return None
        data = path.read_bytes()
    except OSError:
        return None
    said, pixels = data[: hashlib.sha256().digest_size], memoryview(data)[hashlib.sha256().digest_size :]
    return np.frombuffer(pixels, np.uint8) if hashlib.sha256(pixels).digest() == said else None


def _keep(path: Path, pixels: bytes) -> None:
    try:
        write_atomically(path, hashlib.sha256(pixels).digest() + pixels)
    except OSError:
        return  # a full or read-only disk: decoded again next time
