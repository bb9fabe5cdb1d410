"""The run form: its layout byte by byte, which row goes where, and what is refused before memory is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgsc.kernels import OPS, extension, pack, tile_rows
from sgsc.kernels.packing import case, shapes
from sgsc.kernels.tiling import BLOCK, LINE, TILE, blocks_of, plan_rows, untile, widths_and_rows
from tests.checks import assert_same

U8 = torch.uint8
needs_extension = pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")
ANY_SHAPE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the level is the same for all examples
)


def tiled(levels, bits, **how):
    count = len(bits)
    return tile_rows(pack(levels, bits), torch.ones(count), torch.zeros(count), **how)


# ---- the layout ----


def test_the_layout_is_this(level):
    """Two rows of 36 levels, the wider of 5 bits: planes of 4 and 1 bits, 4 lines and 1; the last block has one quad.

    The first, of 3 bits, holds k mod 8; the second holds 0 .. 31 and then 31, 0, 1, 16.
    """
    k = torch.arange(36)
    wide = torch.cat([k[:32], torch.tensor([31, 0, 1, 16])])
    tiles = tiled(torch.stack([wide, k % 8]).to(U8), torch.tensor([5, 3], dtype=U8))
    assert tiles.plan.tolist() == [5] + [1, 0] + [-1] * 14  # the narrow row first
    ascending = [0x40, 0x51, 0x62, 0x73]  # of a line of quads 0 and 1: levels 4, 5, 6, 7 above levels 0, 1, 2, 3
    first = [
        [*ascending, *ascending],
        [*ascending, 0xC8, 0xD9, 0xEA, 0xFB],  # quads 2 and 3: low halves of levels 12 .. 15 above those of 8 .. 11
        [*ascending, *ascending],
        [*ascending, 0xC8, 0xD9, 0xEA, 0xFB],
        [0, 0, 0, 0, 0xF0, 0xF0, 0xF0, 0xF0],  # the fifth bit, which quads 4 .. 7 of the wide row have
    ]
    second = [[0, 1, 2, 3, 15, 0, 1, 0], [0] * 8, [0] * 8, [0] * 8, [0, 0, 0, 0, 1, 0, 0, 1]]
    assert [line[:8] for line in tiles.lines.view(10, LINE).tolist()] == first + second
    assert not tiles.lines.view(10, LINE)[:, 8:].any()


def test_the_layout_of_a_kernel_is_this(level):
    """Three channels of two places: a quad is the channels at one place, and a zero."""
    levels = torch.tensor([[10, 11, 20, 21, 30, 31], [1, 2, 3, 4, 5, 6]], dtype=U8)
    tiles = tiled(levels, torch.tensor([8, 8], dtype=U8), area=2)
    lines = tiles.lines.view(8, LINE)
    assert lines[:2, :8].tolist() == [[10, 20, 30, 0, 1, 3, 5, 0], [11, 21, 31, 0, 2, 4, 6, 0]]
    assert lines.count_nonzero() == 12


def level_at(lines: list[int], bits: int, row: int, k: int) -> int:
    """The level of one row of a tile, by the words of the docstring."""
    block, quad, i = k // BLOCK, k % BLOCK // 4, k % 4
    level = low = 0
    for plane in (8, 4, 2, 1):
        if bits & plane:
            fields = 8 // plane
            line = block * bits + low + quad // fields
            field = lines[line * LINE + 4 * row + i] >> (quad % fields * plane) & ((1 << plane) - 1)
            level |= field << low
            low += plane
    return level


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_level_of_every_width_is_where_the_words_say(bits, level):
    width = 300
    levels = (torch.arange(16)[:, None] * 37 + torch.arange(width)).to(U8) & (2**bits - 1)
    tiles = tiled(levels, torch.full((16,), bits, dtype=U8))
    lines, order = tiles.lines.tolist(), tiles.plan[1:].tolist()
    assert len(lines) == bits * 10 * LINE
    for place in range(16):
        assert [level_at(lines, bits, place, k) for k in range(width)] == levels[order[place]].tolist()
        assert not any(level_at(lines, bits, place, k) for k in range(width, 320))


@pytest.mark.parametrize("area", [1, 2, 3, 9, 24])
@pytest.mark.parametrize("name", shapes())
def test_every_shape_comes_back(name, area, level):
    bits, width = shapes()[name]
    width *= area
    levels, rows = case(bits, width)
    for groups in {1, 3} if len(bits) % 3 == 0 else {1}:
        tiles = tile_rows(rows, torch.ones(len(bits)), torch.zeros(len(bits)), area=area, groups=groups)
        assert_same(untile(*tiles[:2], tiles.rows, width, area), levels)
        assert tiles.lines.numel() == int(widths_and_rows(tiles.plan)[0].sum()) * blocks_of(width, area) * LINE


@ANY_SHAPE
@given(widths=st.lists(st.integers(0, 8), max_size=60), channels=st.integers(0, 50), area=st.integers(1, 9))
def test_any_shape_is_the_references(level, widths, channels, area):
    bits, width = torch.tensor(widths, dtype=U8), channels * area
    levels, rows = case(bits, width)
    plan = plan_rows(bits)
    length = int(widths_and_rows(plan)[0].sum()) * blocks_of(width, area) * LINE
    arguments = (*rows.args[:3], plan, width, area, length)
    lines = OPS["tile"](*arguments)
    assert_same(lines, OPS["tile"].reference(*arguments))
    assert_same(untile(lines, plan, len(bits), width, area), levels)


def test_scale_and_offset_follow_their_rows():
    bits = torch.arange(9, dtype=U8).repeat(3)
    scale, offset = torch.rand(27), torch.rand(27)
    tiles = tile_rows(case(bits, 5)[1], scale, offset)
    slots = widths_and_rows(tiles.plan)[1]
    held = slots >= 0
    assert_same(tiles.grid[:, held], torch.stack([scale, offset])[:, slots[held].long()])
    assert tiles.grid.isfinite().all()


# ---- which row goes where ----


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data(), groups=st.integers(1, 4), each=st.integers(0, 40))
def test_a_plan_holds_every_row_once_and_wastes_little(data, groups, each):
    widths = data.draw(st.lists(st.integers(0, 8), min_size=groups * each, max_size=groups * each))
    bits = torch.tensor(widths, dtype=U8)
    plan = plan_rows(bits, groups)
    tile_bits, slots = widths_and_rows(plan)
    assert plan.dtype == torch.int32
    by_tile = slots.view(-1, TILE).tolist()
    assert len(by_tile) == len(tile_bits)
    assert sorted(row for tile in by_tile for row in tile if row >= 0) == list(range(groups * each))
    partly: list[tuple[int, bool]] = []
    cost = [0] * groups  # bits of one level of all tiles
    widest = [0] * groups  # of the tiles so far
    for wide, tile in zip(tile_bits.tolist(), by_tile, strict=True):
        rows = [row for row in tile if row >= 0]
        assert rows, "a tile holds nothing"
        assert tile == rows + [-1] * (TILE - len(rows)), "places in use do not come first"
        assert len({row // each for row in rows}) == 1, "a tile spans groups"
        assert max(widths[row] for row in rows) == wide
        assert wide == 0 or min(widths[row] for row in rows) > 0, "a removed row costs bytes"
        if wide:
            assert min(widths[row] for row in rows) >= widest[rows[0] // each], "rows are not sorted by width"
            widest[rows[0] // each] = wide
        cost[rows[0] // each] += TILE * wide
        if len(rows) < TILE:
            partly.append((rows[0] // each, wide > 0))
    assert len(partly) == len(set(partly)), "several tiles are partly filled where one would do"
    for group in range(groups):
        mine = widths[group * each : (group + 1) * each]
        assert cost[group] <= sum(mine) + 2 * TILE * 8


# ---- what is refused ----

LEVELS, ROWS = case(torch.tensor([3, 0, 4], dtype=U8), 10)
DATA, BITS, STARTS = ROWS.data, ROWS.bits, ROWS.starts
TILES = tile_rows(ROWS, torch.ones(3), torch.zeros(3))
PLAN = TILES.plan  # 0 and 4 bits, 4 lines; row 1, rows 0 and 2
GRID = torch.ones(2, 32)
LINES = TILES.lines
TILE_ARGUMENTS = (DATA, BITS, STARTS, PLAN, 10, 1, 4 * LINE)
LINEAR = (torch.ones(2, 10), LINES, PLAN, GRID, torch.ones(3), 3, 10, False)
CONV = (torch.ones(1, 10, 3, 3), *LINEAR[1:6], [1, 1], [1, 1], [0, 0], [1, 1], 1, False)
SLIDING = (torch.ones(1, 3, 3, 5), *LINEAR[1:6], [2, 5], [1, 1], [0, 1], [1, 1], 3, False)
PRODUCTS = {
    "linear": ("packed_linear", LINEAR),
    "conv2d": ("packed_conv2d", CONV),
    "sliding": ("packed_conv2d", SLIDING),
}


def changed(arguments: tuple, place: int, value: Any) -> tuple:
    return (*arguments[:place], value, *arguments[place + 1 :])


def with_slot(place: int, row: int) -> torch.Tensor:
    plan = PLAN.clone()
    plan[2 + place] = row
    return plan


def with_widths(*widths: int) -> torch.Tensor:
    return torch.cat([torch.tensor(widths, dtype=torch.int32), PLAN[2:]])


# of the tiles, which every operation that takes them refuses alike: places of `lines` to `offset` and of `rows`
BAD_TILES = {
    "lines-too-short": (0, LINES[:-1], r"lines has 255 bytes, .* need 4 times 64"),
    "lines-too-long": (0, torch.cat([LINES, LINES[:1]]), "lines has 257 bytes"),
    "lines-empty": (0, LINES[:0], "lines has 0 bytes"),
    "lines-of-int8": (0, LINES.view(torch.int8), r"lines is \(256\) Char; want \(any\) Byte"),
    "lines-matrix": (0, LINES.view(4, LINE), r"lines is \(4, 64\) Byte"),
    "nine-bits": (1, with_widths(0, 9), r"plan\[1\] is 9, the width of a tile; want 0 to 8"),
    "tile-bits-255": (1, with_widths(255, 4), r"plan\[0\] is 255"),
    "tile-bits-negative": (1, with_widths(-1, 4), r"plan\[0\] is -1"),
    "tile-bits-other": (1, with_widths(1, 4), "lines has 256 bytes, .* need 5 times 64"),
    "plan-of-int64": (1, PLAN.long(), r"plan is \(34\) Long"),
    "plan-too-short": (1, PLAN[:-1], "plan has 33 numbers; want .* a multiple of 17"),
    "plan-of-a-tile-less": (1, PLAN[:17], r"grid is \(2, 32\) Float; want \(2, 16\)"),
    "slots-beyond": (1, with_slot(0, 3), "plan holds 3 rows from -1 to 3"),
    "slots-far-beyond": (1, with_slot(0, 2**31 - 1), "to 2147483647"),
    "slots-below": (1, with_slot(5, -2), "rows from -2 to 2"),
    "slots-far-below": (1, with_slot(5, -(2**31)), "rows from -2147483648"),
    "slots-a-row-too-many": (1, with_slot(5, 1), "plan holds 4 rows"),
    "slots-a-row-too-few": (1, with_slot(0, -1), "plan holds 2 rows"),
    "slots-a-row-twice-for-another": (1, with_slot(17, 0), "plan holds 3 rows .* want each of 3 rows once"),
    "slots-a-gap": (1, with_slot(0, -1).index_fill(0, torch.tensor([7]), 1), "and -1 only after the rows"),
    "grid-too-short": (2, GRID[:, :-1], r"grid is \(2, 31\) Float; want \(2, 32\)"),
    "grid-of-double": (2, GRID.double(), r"grid is \(2, 32\) Double"),
    "grid-of-half": (2, GRID.half(), r"grid is \(2, 32\) Half"),
    "grid-of-one-row": (2, GRID[:1], r"grid is \(1, 32\) Float"),
    "bias-too-short": (3, torch.ones(2), r"bias is \(2\) Float; want \(3\)"),
    "bias-of-another-dtype": (3, torch.ones(3).bfloat16(), r"bias is \(3\) BFloat16; want \(3\) Float"),
}

BAD_ROWS = {
    "negative": (-1, "rows is -1; want 0 to 2"),
    "none": (0, "plan holds 3 rows from -1 to 2; want each of 0 rows"),
    "too-few": (2, "want each of 2 rows|do not divide"),
    "too-many": (4, "want each of 4 rows|do not divide"),
    "huge": (2**62, "rows is 4611686018427387904; want 0 to 2"),
    "least": (-(2**63), "rows is -9223372036854775808"),
}


@needs_extension
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("place", "value", "message"), BAD_TILES.values(), ids=BAD_TILES)
def test_malformed_tiles_are_refused(place, value, message, product, int8):
    name, arguments = PRODUCTS[product]
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        OPS[name](*changed(arguments, 1 + place, value)[:-1], int8)


@needs_extension
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("rows", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_number_of_rows_that_is_not_there_is_refused(rows, message, product):
    name, arguments = PRODUCTS[product]
    if (product, rows) == ("sliding", 0):
        rows, message = 3 * 2**40, "rows is 3298534883328"
    with pytest.raises(ValueError, match=message):
        OPS[name](*changed(changed(arguments, 4, None), 5, rows))


X, IMAGE = LINEAR[0], CONV[0]
REFUSED = {
    "linear-x-width": ("packed_linear", changed(LINEAR, 0, X[:, :9]), r"x is \(2, 9\) Float; want \(2, 10\)"),
    "linear-x-number": ("packed_linear", changed(LINEAR, 0, torch.tensor(1.0)), r"x is \(\) Float"),
    "linear-x-double": ("packed_linear", changed(LINEAR, 0, X.double()), "x is Double; want Float, BFloat16 or Half"),
    "linear-x-integers": ("packed_linear", changed(LINEAR, 0, X.int()), "x is Int; want Float"),
    "linear-narrower-in-the-same-blocks": ("packed_linear", changed(LINEAR, 6, 9), r"x is \(2, 10\) Float; want"),
    "linear-wider": ("packed_linear", changed(LINEAR, 6, 33), "lines has 256 bytes, .* need 4 times 128"),
    "linear-no-width": ("packed_linear", changed(LINEAR, 6, 0), "lines has 256 bytes, .* need 4 times 0"),
    "linear-negative-width": ("packed_linear", changed(LINEAR, 6, -1), "width is -1; want 0 to 2"),
    "linear-width-that-overflows": ("packed_linear", changed(LINEAR, 6, 2**63 - 1), "width is 9223372036854775807"),
    "linear-width-that-fills": ("packed_linear", changed(LINEAR, 6, 2**40), "lines has 256 bytes"),
    "conv-kernel": ("packed_conv2d", changed(CONV, 6, [3, 3]), "lines has 256 bytes, .* need 4 times 256?"),
    "conv-kernel-too-large": (
        "packed_conv2d",
        changed(CONV, 6, [4, 1]),
        "a kernel that covers 4 is larger than the input, 3",
    ),
    "conv-kernel-overflows": ("packed_conv2d", changed(CONV, 6, [2**24, 2**24]), "is larger than the input|too large"),
    "conv-kernel-zero": ("packed_conv2d", changed(CONV, 6, [0, 1]), "kernel holds 0; want 1 to"),
    "conv-stride": ("packed_conv2d", changed(CONV, 7, [0, 1]), "stride holds 0"),
    "conv-padding": ("packed_conv2d", changed(CONV, 8, [0, -1]), "padding holds -1"),
    "conv-padding-that-overflows": (
        "packed_conv2d",
        changed(changed(CONV, 8, [2**24 - 1, 2**24 - 1]), 7, [2**24, 2**24]),
        "has more than 2.40 values",
    ),
    "conv-dilation": ("packed_conv2d", changed(CONV, 9, [1, 2**62]), "dilation holds 4611686018427387904"),
    "conv-groups": ("packed_conv2d", changed(CONV, 10, 2), "2 groups do not divide 10 inputs and 3 outputs"),
    "conv-no-groups": ("packed_conv2d", changed(CONV, 10, 0), "0 groups do not divide"),
    "conv-x-image": ("packed_conv2d", changed(CONV, 0, IMAGE[0]), "x has 3 dimensions"),
    "conv-x-channels": ("packed_conv2d", changed(CONV, 0, torch.ones(1, 50, 3, 3)), "lines has 256 bytes"),
    "conv-x-double": ("packed_conv2d", changed(CONV, 0, IMAGE.double()), "x is Double; want Float"),
    "tile-data": ("tile", changed(TILE_ARGUMENTS, 0, DATA[:-1]), "data has 8 bytes, .* need 9"),
    "tile-data-of-int32": ("tile", changed(TILE_ARGUMENTS, 0, DATA.int()), r"data is \(9\) Int"),
    "tile-bits": ("tile", changed(TILE_ARGUMENTS, 1, torch.tensor([3, 0, 9], dtype=U8)), r"bits\[2\] is 9"),
    "tile-bits-other": ("tile", changed(TILE_ARGUMENTS, 1, BITS.flip(0)), r"starts\[1\] is 4, but .* make it 5"),
    "tile-starts": ("tile", changed(TILE_ARGUMENTS, 2, STARTS + 1), r"starts\[0\] is 1"),
    "tile-starts-of-int32": ("tile", changed(TILE_ARGUMENTS, 2, STARTS.int()), r"starts is \(4\) Int"),
    "tile-nine-bits": ("tile", changed(TILE_ARGUMENTS, 3, with_widths(0, 9)), r"plan\[1\] is 9"),
    "tile-too-narrow": (
        "tile",
        changed(changed(TILE_ARGUMENTS, 3, with_widths(0, 3)), 6, 3 * LINE),
        "row 2 has 4 bits, its tile 3; want rows no wider than their tile",
    ),
    "tile-removed-row-in-a-live-tile": (
        "tile",
        changed(changed(TILE_ARGUMENTS, 3, with_widths(1, 4)), 6, 5 * LINE),
        "row 1 has 0 bits, its tile 1; .* removed rows in tiles of 0 bits",
    ),
    "tile-live-row-in-a-removed-tile": (
        "tile",
        changed(changed(TILE_ARGUMENTS, 3, with_widths(0, 0)), 6, 0),
        "row 0 has 3 bits, its tile 0",
    ),
    "tile-slots-beyond": ("tile", changed(TILE_ARGUMENTS, 3, with_slot(0, 3)), "plan holds 3 rows from -1 to 3"),
    "tile-slots-below": ("tile", changed(TILE_ARGUMENTS, 3, with_slot(5, -2)), "plan holds 3 rows from -2"),
    "tile-slots-a-row-too-few": ("tile", changed(TILE_ARGUMENTS, 3, with_slot(0, -1)), "plan holds 2 rows"),
    "tile-plan-of-int64": ("tile", changed(TILE_ARGUMENTS, 3, PLAN.long()), r"plan is \(34\) Long"),
    "tile-plan-too-short": ("tile", changed(TILE_ARGUMENTS, 3, PLAN[:16]), "plan has 16 numbers"),
    "tile-width": ("tile", changed(TILE_ARGUMENTS, 4, -1), "a width of -1 levels"),
    "tile-area": ("tile", changed(TILE_ARGUMENTS, 5, 3), "an area of 3 for rows of 10 levels"),
    "tile-area-zero": ("tile", changed(TILE_ARGUMENTS, 5, 0), "an area of 0"),
    "tile-area-negative": ("tile", changed(TILE_ARGUMENTS, 5, -5), "an area of -5"),
    "tile-length": ("tile", changed(TILE_ARGUMENTS, 6, 4 * LINE - 1), "lines has 255 bytes, .* need 4 times 64"),
    "tile-length-too-long": ("tile", changed(TILE_ARGUMENTS, 6, 5 * LINE), "lines has 320 bytes"),
    "tile-length-negative": ("tile", changed(TILE_ARGUMENTS, 6, -1), "a length of -1"),
}


@needs_extension
@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_malformed_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        OPS[name](*arguments)


def test_what_the_refusals_start_from_is_accepted():
    assert_same(OPS["tile"](*TILE_ARGUMENTS), LINES)
    for name, arguments in PRODUCTS.values():
        for int8 in (False, True):
            assert OPS[name](*arguments[:-1], int8).isfinite().all()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"scale": torch.ones(2)}, r"scale \(2,\), offset \(3,\); want \(3,\)"),
        ({"offset": torch.ones(3, 1)}, r"offset \(3, 1\); want \(3,\)"),
        ({"area": 3}, "an area of 3 and 1 groups do not divide 10 levels and 3 rows"),
        ({"area": 0}, "an area of 0"),
        ({"groups": 2}, "2 groups do not divide"),
        ({"groups": 0}, "0 groups"),
    ],
    ids=str,
)
def test_what_cannot_be_laid_out_is_refused(how, message):
    with pytest.raises(ValueError, match=message):
        tile_rows(ROWS, **{"scale": torch.ones(3), "offset": torch.ones(3), **how})
