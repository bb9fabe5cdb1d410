"""Pictures of samples, as data URIs."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from typing import Any

from .words import drawable


def png(picture: Any) -> str | None:
    """Turn rows of numbers (H, W) into a data URI, 8-bit grey: black its smallest value, white its largest."""
    if not (isinstance(picture, list) and picture and all(isinstance(row, list) and row for row in picture)):
        return None
    rows = [[drawable(value) for value in row] for row in picture]
    finite = [value for row in rows for value in row if not math.isnan(value)]
    if not finite or any(len(row) != len(rows[0]) for row in rows):
        return None
    low, span = min(finite), max(finite) - min(finite) or 1.0
    grey = [bytes(0 if math.isnan(value) else round(255 * (value - low) / span) for value in row) for row in rows]
    header = struct.pack(">2I5B", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b"".join(b"\0" + row for row in grey)), b"IEND"]
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(framed)).decode()
