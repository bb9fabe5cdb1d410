"""Samples for the eye: pictures as data URIs, texts with the place that decided."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from .words import drawable, plain

VISIBLE = {"\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}", " ": "\N{OPEN BOX}", "": "\N{EMPTY SET}"}


def png(picture: Any) -> str | None:
    """Turn rows of values (H, W), or of red, green and blue (H, W, 3), into a data URI, 8 bits a value.

    Grey runs from its smallest value, black, to its largest, white. Colours are shown as they are where they lie within
    0 to 1, and stretched in the same way, all three alike, where they do not. None for what is no picture.
    """
    if not (isinstance(picture, list) and picture and all(isinstance(row, list) and row for row in picture)):
        return None
    width, coloured = len(picture[0]), isinstance(picture[0][0], list)
    if any(len(row) != width for row in picture):
        return None
    if coloured and not all(isinstance(pixel, list) and len(pixel) == 3 for row in picture for pixel in row):
        return None
    rows = [
        [drawable(value) for value in ([part for pixel in row for part in pixel] if coloured else row)]
        for row in picture
    ]
    finite = [value for row in rows for value in row if not math.isnan(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    if coloured and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    span = high - low or 1.0
    levels = [bytes(0 if math.isnan(value) else round(255 * (value - low) / span) for value in row) for row in rows]
    header = struct.pack(">2I5B", width, len(rows), 8, 2 if coloured else 0, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"".join(b"\0" + row for row in levels)), b"IEND"]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(framed)).decode()


def visible(value: Any) -> Any:
    """An answer that a reader can see: a sign for white space; anything else as it is."""
    return VISIBLE.get(value, value) if isinstance(value, str) else value


def parted(sample: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The text of a sample before, at and after the character that was to be answered, or None if none was recorded."""
    text, at = sample.get("text"), sample.get("at")
    if not isinstance(text, str) or not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(text):
        return None
    return plain(text[:at]), plain(visible(text[at])), plain(text[at + 1 :])
