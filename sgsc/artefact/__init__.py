"""The file format `.sgsc`, version 1, and its writer and reader.

One safetensors file: 8 bytes little-endian length of the header, the header (JSON, padded with spaces), the payload.
Nothing in it is code: no pickle, no class paths, no file names. It is independent of instruction sets; repacking for
one happens at load.

Tensors (each is absent when it would be empty), for all packed layers in the order of the manifest:

    codes         U8           packed rows of every layer, one after the other, each as kernels/packing.py lays it out
    bits          U8           width of every row, 0 to 8: two a byte, the first in the low half; a last odd half is 0
    scales        BF16 or F32  step of every row that has bits, rows without have none
    values.DTYPE  DTYPE        everything else of the state dict, one flat tensor a dtype (F32, BF16, F16, F64, I64 …);
                               a module in two places stands here once, a batch norm's counter of batches not at all

Few tensors, because each costs about 70 bytes of header, and channels of small networks cost little more than that.

The header's only metadata is "sgsc", the manifest, JSON again:

    format        1
    sha256        of the whole file, these 64 digits read as zeros
    architecture  [name, arguments] of a builder in ARCHITECTURES, or null
    layers        [name, type, [rows, width], shift, settings] each; type is a key of packed.PACKED; rows of at most
                  shift bits have their levels at half steps (1: a bit means -1/2 or +1/2); settings are those that
                  differ from the usual
    values        {DTYPE: [[name, shape], …]}, biases of packed layers among them
    notes         free JSON of the writer

A row of b bits stands for (level + offset) * scale with offset = -2^(b-1), plus 1/2 where b <= shift.

A reader trusts nothing: every length is checked against the bytes that are there before a tensor is made, the header
may have 16 MiB, and whatever does not fit exactly is refused with an `ArtefactError` that names it. The digest finds
damage; it is no signature.
"""

from .format import FORMAT, ArtefactError
from .load import ARCHITECTURES, load, load_into
from .read import Artefact, from_bytes, read
from .write import save, stored_size, to_bytes

__all__ = [
    "ARCHITECTURES",
    "FORMAT",
    "Artefact",
    "ArtefactError",
    "from_bytes",
    "load",
    "load_into",
    "read",
    "save",
    "stored_size",
    "to_bytes",
]
