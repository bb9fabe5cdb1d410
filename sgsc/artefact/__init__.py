"""The file format `.sgsc`, versions 1 and 2, and its writer and reader.

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

    format        1; 2 where a layer rounds its input to a grid: readers from before know no such layer and say so
    sha256        of the whole file, these 64 digits read as zeros
    architecture  [name, arguments] of a builder in ARCHITECTURES, or null
    layers        [name, type, [rows, width], shift, settings] each; type is a key of packed.PACKED; rows of at most
                  shift bits have their levels at half steps (1: a bit means -1/2 or +1/2); settings are those that
                  differ from the usual. In format 2 a sixth part, where there is one, is the grid of the layer's
                  input, [scale, code_min, code_max]
    values        {DTYPE: [[name, shape], …]}, biases of packed layers among them, also of layers that have none in the
                  float model: a Linear or convolution is the same with a bias of its own
    notes         free JSON of the writer

A row of b bits stands for (level + offset) * scale with offset = -2^(b-1), plus 1/2 where b <= shift.

An input x of a layer with a grid stands for round(clamp(x / scale, code_min, code_max)) * scale, in float32, half to
even. The scale is a decimal number, read as the nearest float32; the codes are 2 to 256 whole numbers, 0 among them.

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
