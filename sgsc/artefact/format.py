"""Constants of the format and its error, shared by writer and reader."""

from __future__ import annotations

import torch
from torch import Tensor

FORMAT, WITH_INPUTS = 1, 2  # of a file, and of one in which a layer rounds its input to a grid
FORMATS = (FORMAT, WITH_INPUTS)
MAX_HEADER = 16 * 2**20
MAX_RANK = 8
ZEROS = "0" * 64  # stands for the digest while it is computed
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
USUAL = {"stride": 1, "padding": 0, "dilation": 1}  # settings of a convolution that a file leaves out


class ArtefactError(ValueError):
    """A file is not what it must be; the message says which part."""


def offsets(bits: Tensor, shift: int) -> Tensor:
    """(C,) float32 offset of each row of `bits` (C,) uint8, as the format defines it; 0 for rows without bits."""
    return torch.where(bits > 0, 0.5 * (bits <= shift) - torch.exp2(bits.float() - 1), 0.0)
