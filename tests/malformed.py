"""A file that fits a small model, to be changed: what files that are not what they must be are made from.

`sealed` writes the digest that a file must have, so that each rule has to refuse by itself.
"""

import hashlib
import json

import pytest
import torch
from torch import nn

from sgsc.artefact import ArtefactError, load_into

ZEROS = "0" * 64
SIZES = {"F64": 8, "I64": 8, "F32": 4, "BF16": 2, "U8": 1, "BOOL": 1}


def floats(*values):
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


def short(*values):
    return torch.tensor(values, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()


def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 2, 2, bias=False), nn.BatchNorm2d(2))


def base():
    """A manifest and tensors {name: (dtype, bytes)} of a file that fits `model()`."""
    manifest = {
        "format": 1,
        "sha256": ZEROS,
        "architecture": None,
        "layers": [["0", "Linear", [3, 4], 1, {}], ["1", "Conv2d", [2, 8], 0, {"kernel": [2, 2]}]],
        "values": {"F32": [["0.bias", [3]], *([f"2.{n}", [2]] for n in NORM)]},
        "notes": {},
    }
    tensors = {
        "codes": ("U8", bytes([1, 128, 255, 77, 0b1010, 9, 8, 7, 6, 5])),
        "bits": ("U8", bytes([0x18, 0x30, 0x02])),  # 8, 1, 0 and 3, 2
        "scales": ("BF16", short(0.5, 2.0, 0.25, 1.5)),
        "values.F32": ("F32", floats(1, 2, 3, 1, 1, 0, 0, 0, 0, 1, 1)),
    }
    return manifest, tensors


def gridded():
    """The same where both layers round their inputs."""
    manifest, tensors = base()
    manifest["format"] = 2
    manifest["layers"][0].append([0.0123, 0, 255])
    manifest["layers"][1].append([2, -128, 127])
    return manifest, tensors


NORM = ("weight", "bias", "running_mean", "running_var")


def sealed(text, payload):
    """A file of a header's text and a payload; 64 zeros in the text become the digest."""
    text = text if isinstance(text, bytes) else text.encode()
    data = len(text).to_bytes(8, "little") + text + payload
    return data.replace(ZEROS.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def header(manifest, tensors):
    entries, position = {"__metadata__": {"sgsc": json.dumps(manifest)}}, 0
    for name, (dtype, content) in tensors.items():
        end = position + len(content)
        entries[name] = {"dtype": dtype, "shape": [len(content) // SIZES[dtype]], "data_offsets": [position, end]}
        position = end
    return entries


def payload(tensors):
    return b"".join(content for _, content in tensors.values())


def build(manifest, tensors):
    return sealed(json.dumps(header(manifest, tensors)), payload(tensors))


def refuses(data, match, tmp_path):
    path = tmp_path / "a.sgsc"
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=match):
        load_into(model(), path)


def loaded_base(tmp_path):
    (tmp_path / "whole.sgsc").write_bytes(build(*base()))
    return load_into(model(), tmp_path / "whole.sgsc")
