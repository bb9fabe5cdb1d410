"""The layout of packed rows, bit for bit, and what is refused before memory is touched; of tiles: test_tiling.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgsc.kernels import OPS, PackedRows, extension, pack, unpack
from sgsc.kernels.packing import case
from tests.checks import assert_same

U8 = torch.uint8


def test_the_layout_is_this(level):
    """Three bits, levels 1 to 5: 001 010 011 100 101, written from the lowest bit; then a row of eight bits."""
    levels = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 0], [255, 1, 128, 0, 7]], dtype=U8)
    rows = pack(levels, torch.tensor([3, 0, 8], dtype=U8))
    # bit string from the right: 0 101100 01 1010001 -> 0b11010001, then 0b01011000
    assert rows.data.tolist() == [0b11010001, 0b01011000, 255, 1, 128, 0, 7]
    assert rows.starts.tolist() == [0, 2, 2, 7]
    assert_same(unpack(rows), levels)


def bytes_by_integer(levels: list[int], bits: int) -> bytes:
    """The layout once more, by one large integer."""
    value = sum(level << (bits * k) for k, level in enumerate(levels))
    return value.to_bytes((bits * len(levels) + 7) // 8, "little")


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_short_row(bits, width, level):
    """All rows of up to four levels of up to three bits, in one matrix."""
    all_rows = list(itertools.product(range(2**bits), repeat=width))
    rows = pack(torch.tensor(all_rows, dtype=U8), torch.full((len(all_rows),), bits, dtype=U8))
    assert bytes(rows.data.tolist()) == b"".join(bytes_by_integer(row, bits) for row in all_rows)
    assert unpack(rows).tolist() == [list(row) for row in all_rows]


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_of_every_width(bits, level):
    levels = torch.arange(2**bits).repeat(3)[None].to(U8)
    rows = pack(levels, torch.tensor([bits], dtype=U8))
    assert bytes(rows.data.tolist()) == bytes_by_integer(levels[0].tolist(), bits)
    assert_same(unpack(rows), levels)


def test_every_length_comes_back(level):
    every = torch.arange(9, dtype=U8)
    for width in range(65):
        levels, by_reference = case(every, width, seed=width)
        rows = pack(levels, every)
        assert_same(rows.data, by_reference.data, f"width {width}")
        assert_same(unpack(rows), levels, f"width {width}")
        assert bytes(rows.data.tolist()) == b"".join(
            bytes_by_integer(row, bits) for bits, row in enumerate(levels.tolist())
        )


def test_unused_bits_are_zero(level):
    for bits, width in itertools.product(range(1, 9), range(1, 17)):
        ones = torch.full((1, width), 2**bits - 1, dtype=U8)
        last = int(pack(ones, torch.tensor([bits], dtype=U8)).data[-1])
        assert last == 2 ** ((bits * width - 1) % 8 + 1) - 1


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the level is the same for all examples
)
@given(widths=st.lists(st.integers(0, 8), max_size=40), width=st.integers(0, 150), spare=st.integers(0, 9))
def test_any_shape_is_the_references(level, widths, width, spare):
    bits = torch.tensor(widths, dtype=U8)
    levels, rows = case(bits, width, seed=len(widths))
    data = OPS["pack"](levels, bits, rows.starts, rows.data.numel() + spare)
    assert_same(data, OPS["pack"].reference(levels, bits, rows.starts, rows.data.numel() + spare))
    assert_same(OPS["unpack"](data, bits, rows.starts, width), levels)


def test_levels_that_do_not_fit_are_cut_like_the_references(level):
    """Where the check of `pack` is passed by, a level may not spill into its neighbour."""
    _, rows = case(torch.arange(9, dtype=U8), 21)
    arguments = (torch.randint(0, 256, (9, 21), dtype=U8), rows.bits, rows.starts, rows.data.numel())
    assert_same(OPS["pack"](*arguments), OPS["pack"].reference(*arguments))


@pytest.mark.parametrize("beyond", [0, 255])
def test_bytes_around_the_data_do_not_matter(beyond, level):
    levels, rows = case(torch.arange(9, dtype=U8), 21)
    memory = torch.full((rows.data.numel() + 32,), beyond, dtype=U8)
    inside = memory[16:-16]
    inside.copy_(rows.data)
    assert_same(unpack(PackedRows(inside, rows.bits, 21)), levels)


def test_a_level_that_does_not_fit_is_named():
    levels = torch.tensor([[1, 0], [3, 8]], dtype=U8)
    with pytest.raises(ValueError, match="level 8 at row 1, column 1 does not fit 3 bits"):
        pack(levels, torch.tensor([1, 3], dtype=U8))
    with pytest.raises(ValueError, match="level 1 at row 0, column 0 does not fit 0 bits"):
        pack(levels, torch.tensor([0, 4], dtype=U8))


@pytest.mark.parametrize(
    ("levels", "bits"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=U8)),
        (torch.zeros(3, dtype=U8), torch.ones(3, dtype=U8)),
        (torch.zeros(2, 3, dtype=U8), torch.ones(3, dtype=U8)),
    ],
    ids=["dtype", "vector", "rows"],
)
def test_what_is_no_matrix_of_levels_is_refused(levels, bits):
    with pytest.raises(ValueError, match=r"pack: levels .* want uint8 \(C, K\)"):
        pack(levels, bits)


@pytest.mark.parametrize(
    ("data", "bits", "message"),
    [
        (8, torch.tensor([3, 4], dtype=U8), r"packed data: \(8,\) torch.uint8, but 2 rows of 10 .* need \(9,\)"),
        (10, torch.tensor([3, 4], dtype=U8), r"packed data: \(10,\)"),
        (9, torch.tensor([3, 9], dtype=U8), "want a vector of uint8 from 0 to 8"),
        (9, torch.tensor([3, 4]), "want a vector of uint8 from 0 to 8, got torch.int64"),
    ],
    ids=["too-short", "too-long", "nine-bits", "bits-of-int64"],
)
def test_packed_rows_that_contradict_themselves_are_refused(data, bits, message):
    with pytest.raises(ValueError, match=message):
        PackedRows(torch.zeros(data, dtype=U8), bits, 10)


needs_extension = pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")
DATA, BITS, STARTS = torch.zeros(9, dtype=U8), torch.tensor([3, 0, 4], dtype=U8), torch.tensor([0, 4, 4, 9])
VECTOR = torch.ones(3)
EMBEDDING = (torch.tensor([0, 2]), DATA, BITS, STARTS, VECTOR, VECTOR, 10)
ROWS = (torch.ones(3, 4), VECTOR, -VECTOR, VECTOR, VECTOR)


def changed(arguments: tuple, place: int, value: Any) -> tuple:
    return (*arguments[:place], value, *arguments[place + 1 :])


REFUSED = {
    "too-many-bits": ("unpack", (DATA, torch.tensor([3, 0, 9], dtype=U8), STARTS, 10), r"bits\[2\] is 9; want 0 to 8"),
    "starts-too-late": ("unpack", (DATA, BITS, torch.tensor([0, 5, 5, 9]), 10), r"starts\[1\] is 5, but .* make it 4"),
    "starts-negative": ("unpack", (DATA, BITS, torch.tensor([-4, 0, 0, 5]), 10), r"starts\[0\] is -4"),
    "starts-not-at-the-end": (
        "unpack",
        (DATA, BITS, torch.tensor([0, 4, 4, 8]), 10),
        r"starts\[3\] is 8, .* make it 9",
    ),
    "starts-too-few": ("unpack", (DATA, BITS, STARTS[:3], 10), r"starts is \(3\) Long; want \(4\)"),
    "starts-of-int32": ("unpack", (DATA, BITS, STARTS.int(), 10), r"starts is \(4\) Int"),
    "data-too-short": ("unpack", (DATA[:8], BITS, STARTS, 10), "data has 8 bytes, .* need 9"),
    "data-of-another-dtype": ("unpack", (DATA.int(), BITS, STARTS, 10), r"data is \(9\) Int; want \(any\) Byte"),
    "negative-width": ("unpack", (DATA, BITS, STARTS, -1), "a width of -1 levels"),
    "width-that-overflows": ("unpack", (DATA, BITS, STARTS, 2**61), "want 0 to 2"),
    "size-that-overflows": (
        "unpack",
        (DATA, torch.full((40,), 8, dtype=U8), torch.arange(41) * 2**56, 2**56),
        "data has 9 bytes|more than",
    ),
    "pack-too-short": ("pack", (torch.zeros(3, 10, dtype=U8), BITS, STARTS, 8), "data has 8 bytes"),
    "pack-negative-length": ("pack", (torch.zeros(3, 10, dtype=U8), BITS, STARTS, -1), "data has -1 bytes"),
    "pack-rows-differ": (
        "pack",
        (torch.zeros(2, 10, dtype=U8), BITS, STARTS, 9),
        r"levels is \(2, 10\) Byte; want \(3, any\)",
    ),
    "embedding-data": ("packed_embedding", changed(EMBEDDING, 1, DATA[:8]), "data has 8 bytes"),
    "embedding-index-dtype": ("packed_embedding", changed(EMBEDDING, 0, torch.ones(2)), r"index is \(2\) Float"),
    "embedding-scale": ("packed_embedding", changed(EMBEDDING, 4, torch.ones(2)), r"scale is \(2\) Float"),
    "quantize-rows": ("fake_quantize", changed(ROWS, 1, torch.ones(4)), r"scale is \(4\) Float; want \(3\)"),
    "quantize-scale-dtype": (
        "fake_quantize",
        changed(ROWS, 1, VECTOR.double()),
        r"scale is \(3\) Double; want \(3\) Float",
    ),
    "quantize-integers": (
        "fake_quantize",
        changed(ROWS, 0, torch.ones(3, 4, dtype=torch.int32)),
        "x is Int; want Float",
    ),
    "quantize-shape": ("fake_quantize", changed(ROWS, 0, torch.ones(3)), r"x is \(3\) Float; want \(any, any\)"),
    "quantize-grad": ("fake_quantize_backward", (torch.ones(3, 5), *ROWS), r"grad is \(3, 5\) Float; want \(3, 4\)"),
    "many-lists": ("fake_quantize_many", ([ROWS[0]], [], [], [], []), "lists of 1 and 0 tensors"),
}


@needs_extension
@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_malformed_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        OPS[name](*arguments)


@needs_extension
def test_what_the_refusals_start_from_is_accepted():
    assert_same(OPS["unpack"](DATA, BITS, STARTS, 10), torch.zeros(3, 10, dtype=U8))
    assert OPS["packed_embedding"](*EMBEDDING).isfinite().all()


@pytest.mark.parametrize("index", [-1, 3, 2**62])
def test_an_index_outside_the_table_is_refused(index):
    with pytest.raises(IndexError, match="out of range"):
        OPS["packed_embedding"](torch.tensor([0, index]), *EMBEDDING[1:])
