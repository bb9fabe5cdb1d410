"""Words of fragments.py to the first operand of `tl.dot`, in registers.

A level becomes a 16-bit float by a shift, a mask and a multiply-add a pair: bits put into the mantissa of a power of
two are a float, 128 + level in bfloat16 and 1024 + level in float16. Joined pair by pair and permuted once, the floats
lie as the tensor cores want them: compiled for sm_80 and sm_90, no weight goes through shared memory again.
"""

# Triton compiles these functions and gives names another meaning than Python's types do.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from . import fragments
from .triton_compat import INTERPRETED

SPAN: tl.constexpr = tl.constexpr(fragments.SPAN)
UNIT: tl.constexpr = tl.constexpr(fragments.UNIT)
WORDS: tl.constexpr = tl.constexpr(fragments.WORDS)
PIECES: tl.constexpr = tl.constexpr(tuple(fragments.pieces(bits) for bits in range(1, 9)))


@triton.constexpr_function
def _in_ptx():
    """Whether NVIDIA's assembler takes part."""
    return not INTERPRETED.value and is_cuda()


@triton.constexpr_function
def _count(bits, pair):
    return len(PIECES.value[bits - 1][pair])


@triton.constexpr_function
def _plane(bits, pair, piece):
    return PIECES.value[bits - 1][pair][piece][0]


@triton.constexpr_function
def _at(bits, pair, piece):
    return PIECES.value[bits - 1][pair][piece][1]


@triton.constexpr_function
def _low(bits, pair, piece):
    return PIECES.value[bits - 1][pair][piece][3]


@triton.constexpr_function
def _mask(bits, pair, piece, at):
    """A piece's bits in both halves, once its lowest lies at `at`, as a number that fits an int32."""
    half = ((1 << PIECES.value[bits - 1][pair][piece][2]) - 1) << at
    both = half | half << 16
    return both - (1 << 32) if both >> 31 else both


@triton.constexpr_function
def _distance(bits, at, mantissa):
    """How far to shift a level down: not at all while it lies within the mantissa, and by few distances in any case."""
    fit = (mantissa - bits) // bits + 1  # levels side by side within the mantissa
    return at // (fit * bits) * (fit * bits)


@triton.constexpr_function
def _twice(value, bfloat16):
    """The bits of two equal 16-bit floats, of a value that they hold."""
    sign, value, exponent = (0x8000, -value, 0) if value < 0 else (0, value, 0)
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    if bfloat16:
        half = sign | (exponent + 127) << 7 | int((value - 1) * 128)
    else:
        half = sign | (exponent + 15) << 10 | int((value - 1) * 1024)
    return half | half << 16


@triton.constexpr_function
def _ptx(mask, base, scale, less, bfloat16):
    """(word & mask | base) * scale - less of both halves; a mask of 0 takes the word as it is."""
    take = f"mov.b32 a, {base}; lop3.b32 a, $1, {mask}, a, 0xEA;" if mask else "mov.b32 a, $1;"
    both = f"mov.b32 b, {_twice(scale, bfloat16)}; mov.b32 c, {_twice(-less, bfloat16)};"
    return f"{{ .reg .b32 a, b, c; {take} {both} fma.rn.{'bf16x2' if bfloat16 else 'f16x2'} $0, a, b, c; }}"


@triton.constexpr_function
def _ptx_of_eight_bits():
    """(word & 0x7F | 128.0) + (word & 0x80 ^ -256.0) of both halves, in bfloat16."""
    low = "mov.b32 a, 0x43004300; lop3.b32 a, $1, 0x007F007F, a, 0xEA;"
    high = "mov.b32 b, 0xC380C380; lop3.b32 b, $1, 0x00800080, b, 0x6A;"
    return f"{{ .reg .b32 a, b, c; {low} {high} mov.b32 c, 0x3F803F80; fma.rn.bf16x2 $0, a, c, b; }}"


@triton.jit
def _shifted(word, down: tl.constexpr):
    if down > 0:
        return word >> down
    elif down < 0:
        return word << -down
    else:
        return word


@triton.jit
def _floats(word, DTYPE: tl.constexpr):
    """The floats whose bits the halves of each word are, along a new last dimension."""
    low = word.to(tl.int16).to(DTYPE, bitcast=True)
    high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    if INTERPRETED:  # which computes with the bit patterns of bfloat16
        return tl.join(low.to(tl.float32), high.to(tl.float32))
    else:
        return tl.join(low, high)


@triton.jit
def _assembled(word, PTX: tl.constexpr, DTYPE: tl.constexpr):
    return _floats(tl.inline_asm_elementwise(PTX, "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1), DTYPE)


@triton.jit
def _centred(
    word, MASK: tl.constexpr, BASE: tl.constexpr, SCALE: tl.constexpr, LESS: tl.constexpr, DTYPE: tl.constexpr
):
    """(word & MASK | BASE) * SCALE - LESS of both halves, exactly; a MASK of 0 takes the word as it is.

    In two instructions on NVIDIA: left alone, the compiler takes apart what it could do to both halves at once.
    """
    if _in_ptx():
        return _assembled(word, _ptx(MASK, BASE, SCALE, LESS, tl.bfloat16 == DTYPE), DTYPE)
    else:
        return _floats((word & MASK) | BASE if MASK != 0 else word, DTYPE) * SCALE - LESS


@triton.jit
def _piece(words, PIECE: tl.constexpr, PAIR: tl.constexpr, BITS: tl.constexpr):
    """One piece of both levels of a pair, where it belongs in them."""
    LOW: tl.constexpr = _low(BITS, PAIR, PIECE)
    word = _shifted(words[_plane(BITS, PAIR, PIECE)], _at(BITS, PAIR, PIECE) - LOW)
    return word & _mask(BITS, PAIR, PIECE, LOW)


@triton.jit
def _pair(words, PAIR: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The levels of a pair less their centre 2^(BITS - 1), exactly: (ROWS, lanes, 2)."""
    MANTISSA: tl.constexpr = 7 if tl.bfloat16 == DTYPE else 10
    POWER: tl.constexpr = 128.0 if tl.bfloat16 == DTYPE else 1024.0
    BASE: tl.constexpr = 0x43004300 if tl.bfloat16 == DTYPE else 0x64006400
    CENTRE: tl.constexpr = 2.0 ** (BITS - 1)
    AT: tl.constexpr = _at(BITS, PAIR, 0)
    if BITS > MANTISSA:  # the eighth bit becomes -256 where it is clear and -128 where it is set
        word = _shifted(words[_plane(BITS, PAIR, 0)], AT)
        if _in_ptx():
            return _assembled(word, _ptx_of_eight_bits(), DTYPE)
        else:
            return _floats((word & 0x007F007F) | BASE, DTYPE) + _floats((word & 0x00800080) ^ -1014971520, DTYPE)
    elif _count(BITS, PAIR) == 1:
        DOWN: tl.constexpr = _distance(BITS, AT, MANTISSA)
        PART: tl.constexpr = 0.5 ** (AT - DOWN)  # the mantissa holds the level times 2^(AT - DOWN)
        word = _shifted(words[_plane(BITS, PAIR, 0)], DOWN)
        return _centred(word, _mask(BITS, PAIR, 0, AT - DOWN), BASE, PART, POWER * PART + CENTRE, DTYPE)
    else:
        level = _piece(words, 0, PAIR, BITS) | BASE
        for i in tl.static_range(1, _count(BITS, PAIR)):
            level |= _piece(words, i, PAIR, BITS)
        return _centred(level, 0, 0, 1.0, POWER + CENTRE, DTYPE)


@triton.jit
def weights(
    words, BITS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, ORDER: tl.constexpr
):
    """Levels less their centre, (ROWS, BLOCKS * 128), in the order of K that `order` gives."""
    a0 = tl.join(_pair(words, 0, BITS, DTYPE), _pair(words, 1, BITS, DTYPE))
    a1 = tl.join(_pair(words, 2, BITS, DTYPE), _pair(words, 3, BITS, DTYPE))
    a2 = tl.join(_pair(words, 4, BITS, DTYPE), _pair(words, 5, BITS, DTYPE))
    a3 = tl.join(_pair(words, 6, BITS, DTYPE), _pair(words, 7, BITS, DTYPE))
    a4 = tl.join(_pair(words, 8, BITS, DTYPE), _pair(words, 9, BITS, DTYPE))
    a5 = tl.join(_pair(words, 10, BITS, DTYPE), _pair(words, 11, BITS, DTYPE))
    a6 = tl.join(_pair(words, 12, BITS, DTYPE), _pair(words, 13, BITS, DTYPE))
    a7 = tl.join(_pair(words, 14, BITS, DTYPE), _pair(words, 15, BITS, DTYPE))
    low = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    high = tl.join(tl.join(a4, a5), tl.join(a6, a7))
    # (row, block, lane, half, p0, p1, p2, p3), the pair's number being p0 + 2 p1 + 4 p2 + 8 p3
    every = tl.join(low, high).reshape(ROWS, BLOCKS, 4, 2, 2, 2, 2, 2)
    every = every.permute(0, 1, 7, 6, 5, 4, 2, 3) if ORDER == "wide" else every.permute(0, 1, 7, 6, 5, 2, 4, 3)
    return every.reshape(ROWS, BLOCKS * SPAN)


@triton.jit
def order(x, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ORDER: tl.constexpr):
    """x, (SIZE, COLUMNS), in the order of K of the weights: no work, another name for each register.

    mma.sync is fed four neighbours a lane: what is two pairs of a lane in the words. No order of K is wrong as long as
    both operands have it.
    """
    if ORDER == "wide":
        return x
    else:
        return x.reshape(SIZE // 16, 2, 4, 2, COLUMNS).permute(0, 2, 1, 3, 4).reshape(SIZE, COLUMNS)


@triton.jit
def load_words(at, exists, BITS: tl.constexpr):
    """One word of each plane of BITS, a tuple of eight; those past BITS repeat the first and are not used."""
    w0 = tl.load(at, mask=exists, other=0)
    w1 = tl.load(at + 1 * WORDS, mask=exists, other=0) if BITS > 1 else w0
    w2 = tl.load(at + 2 * WORDS, mask=exists, other=0) if BITS > 2 else w0
    w3 = tl.load(at + 3 * WORDS, mask=exists, other=0) if BITS > 3 else w0
    w4 = tl.load(at + 4 * WORDS, mask=exists, other=0) if BITS > 4 else w0
    w5 = tl.load(at + 5 * WORDS, mask=exists, other=0) if BITS > 5 else w0
    w6 = tl.load(at + 6 * WORDS, mask=exists, other=0) if BITS > 6 else w0
    w7 = tl.load(at + 7 * WORDS, mask=exists, other=0) if BITS > 7 else w0
    return w0, w1, w2, w3, w4, w5, w6, w7
