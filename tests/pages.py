"""What tests of reports share: a full report, and readers of the page and of the terminal."""

from __future__ import annotations

import base64
import html.parser
import math
import random
import re
import struct
import zlib

from rich.console import Console

from sgsc.report import summary, write_html

NAN, INF = float("nan"), float("inf")
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=https://example.org onerror=alert(2)>[/bold]{{ 7 * 7 }}$x^$\x1b[31m\0\ud800"
)
EIGHT = ["00155100", "08a33a80", "0a9009a0", "03c88c30", "06caac60", "0c3003c0", "0b6006b0", "02bccb20"]
SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)


def layer(name, kind, shape, counts, size):
    rows, width = shape[0], math.prod(shape[1:])
    return {
        "name": name,
        "type": kind,
        "shape": shape,
        "bits": {str(bits): count for bits, count in counts.items()},
        "channels": rows,
        "removed": counts.get(0, 0),
        "bytes": size,
        "float_bytes": 4 * rows * width,
    }


def full_report():
    """Return what a run on digits would write; the numbers are made up, their shape is not."""
    noise = random.Random(0)
    history = []
    for i in range(121):
        target = max(0.05, 0.27 * 0.974**i)
        dip = 0.012 * math.exp(-((i - 62) ** 2) / 40)
        history.append(
            {
                "step": 25 * i,
                "size": target * (1 + 0.06 * math.exp(-i / 30) + noise.uniform(-0.01, 0.01)) if i < 118 else 0.0488,
                "target": target,
                "accuracy": 0.985 - dip + noise.uniform(-0.002, 0.002),
                "loss": 0.08 + 0.5 * dip + noise.uniform(0, 0.01),
                "preservation_loss": 0.02 * (1 - math.exp(-i / 25)) + 2 * dip + noise.uniform(0, 0.002),
                "size_weight": 0.1 * i,
                "regressions": 2 if 60 <= i <= 63 else 0,
            }
        )
    picture = [[int(c, 16) / 13 for c in row] for row in EIGHT]
    return {
        "task": "digits",
        "sources": "scikit-learn 1.7.2 load_digits: 1,797 pictures of 8 × 8, split by seed",
        "seed": 0,
        "target_size": 0.05,
        "tolerance": 0.0,
        "float_accuracy": 0.9861,
        "packed_accuracy": 0.9833,
        "accuracy_standard_error": 0.0062,
        "float_loss": 0.0512,
        "packed_loss": 0.0634,
        "float_bytes": 612345,
        "stored_bytes": 29871,
        "stored_ratio": 0.04878,
        "nominal_bytes": 26127,
        "bits_per_weight": 1.37,
        "channels": 426,
        "channels_removed": 101,
        "channels_zeroed_in_place": 3,
        "preservation": {
            "samples": 200,
            "regressions": 0,
            "upper_bound_95": 0.014867,
            "agreement": 0.995,
            "margin_float": 0.6231,
            "margin_packed": 0.5987,
            "regressions_by_class": {},
            "reasons": {"hard": 50, "uncertain": 50, "salient": 50, "representative": 50},
        },
        "guard": {
            "samples": 270,
            "regressions": 2,
            "upper_bound_95": 0.023137,
            "agreement": 0.98765,
            "margin_float": 0.9411,
            "margin_packed": 0.9135,
            "regressions_by_class": {"0": 0, "3": 1, "8": {"samples": 27, "regressions": 1, "upper_bound_95": 0.16397}},
            "reasons": {},
        },
        "tolerance_held": True,
        "target_held": True,
        "reason": "",
        "backend": "cpu: C++ (avx2)",
        "backends": {
            "packed_linear": "cpu: C++ (avx2)",
            "packed_conv2d": "cpu: C++ (scalar)",
            "fake_quantize": "cpu: PyTorch (SGSC_NO_EXT=1)",
        },
        "seconds": 93.14,
        "seconds_by_phase": {"float training": 21.4, "selection": 1.2, "compression": 67.3, "certification": 3.24},
        "commit": "abc1234",
        "versions": {"python": "3.11.2", "torch": "2.13.0", "sgsc": "0.1.0"},
        "machine": "Intel Xeon Platinum 8259CL, 2 cores, 7.6 GiB",
        "file": "model.sgsc",
        "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "layers": [
            layer("conv1", "QuantConv2d", [32, 1, 3, 3], {0: 2, 2: 4, 3: 14, 4: 9, 5: 2, 7: 1}, 214),
            layer("blocks.0.conv", "QuantConv2d", [64, 32, 3, 3], {0: 12, 1: 11, 2: 30, 3: 11}, 8123),
            layer("blocks.1.conv", "QuantConv2d", [64, 64, 3, 3], {0: 27, 1: 19, 2: 16, 3: 2}, 6871),
            layer("blocks.1.downsample.projection", "QuantConv2d", [128, 64, 1, 1], {0: 31, 1: 60, 2: 36, 3: 1}, 1934),
            layer("hidden", "QuantLinear", [128, 512], {0: 29, 1: 71, 2: 27, 6: 1}, 9731),
            layer("classify", "QuantLinear", [10, 128], {3: 1, 4: 6, 5: 2, 8: 1}, 688),
        ],
        "left_float": [
            {"name": "norm1", "why": "batch norm follows a residual sum and cannot be folded", "bytes": 512},
            {"name": "classify.bias", "why": "biases are stored as float32", "bytes": 40},
        ],
        "history": history,
        "events": [
            {"step": 1525, "what": "guard", "text": "2 regressions; gave 12 bits back to 7 channels"},
            {"step": 1600, "what": "guard", "text": "1 regression; revived channel 17 of hidden"},
            {"step": 2950, "what": "target", "text": "reached 5.00 % of the float bytes"},
        ],
        "changed": [
            {
                "split": "guard",
                "index": 17,
                "target": "8",
                "float_answer": "8",
                "packed_answer": "3",
                "picture": picture,
            },
            {
                "split": "guard",
                "index": 203,
                "target": "3",
                "float_answer": "3",
                "packed_answer": "8",
                "picture": [row[::-1] for row in picture[::-1]],
            },
            {
                "split": "test",
                "index": 91,
                "target": "e",
                "float_answer": "e",
                "packed_answer": "a",
                "text": "def read(self, size=-1):\n    if size is None or size < 0:\n        return self.r",
            },
        ],
    }


def page_of(report, tmp_path):
    path = tmp_path / "report.html"
    write_html(report, path)
    return path.read_text("utf-8")


def words_of(page):
    """Return what a person reads: the text of the body, whitespace collapsed."""
    collector = Reader()
    collector.feed(page)
    return " ".join(" ".join(collector.words).split())


class Reader(html.parser.HTMLParser):
    """Collects text and elements, and that every element is closed in order."""

    VOID = {"meta", "br", "img", "hr", "link", "input"}

    def __init__(self):
        super().__init__()
        self.words, self.elements, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words.append(data)


def elements_of(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader.elements


def rows_of(uri, colour, size):
    """Rows, in bytes, of a PNG that this package wrote: 8 bits a sample, of that colour type and bytes a pixel."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"), validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind], at = body, at + 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">2I5B", chunks[b"IHDR"])
    assert rest == [8, colour, 0, 0, 0]
    raw = zlib.decompress(chunks[b"IDAT"])
    wide = 1 + size * width  # a byte says how a row is filtered
    assert len(raw) == height * wide
    rows = [raw[i : i + wide] for i in range(0, len(raw), wide)]
    assert all(row[0] == 0 for row in rows)
    return [row[1:] for row in rows]


def printed(report, width):
    console = Console(width=width, file=None, record=True, quiet=False, color_system=None)
    with console.capture() as capture:
        console.print(summary(report))
    return capture.get()
