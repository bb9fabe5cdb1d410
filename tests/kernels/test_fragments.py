"""The run form of a GPU in plain PyTorch: every level comes back, and any width costs its bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgsc.kernels import fragments, run_form, tile_rows
from sgsc.kernels.fragments import SPAN, UNIT, WORDS, blocks_of, parts_of, pieces, tile_size, tiles_of, unfragment
from sgsc.kernels.packed_linear import grid
from sgsc.kernels.packing import case, shapes
from tests.checks import assert_same


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_pieces_fill_every_bit_once(bits):
    of_words = [(plane, at + i) for pair in pieces(bits) for plane, at, count, _ in pair for i in range(count)]
    assert sorted(of_words) == [(plane, bit) for plane in range(bits) for bit in range(16)]
    for pair in pieces(bits):
        assert sorted(low + i for _, _, count, low in pair for i in range(count)) == list(range(bits))


def test_whole_levels_come_first_and_pieces_are_few():
    assert [len(pair) for pair in pieces(4)] == [1] * 16
    assert [sum(len(pair) > 1 for pair in pieces(bits)) for bits in range(1, 9)] == [0, 0, 1, 0, 1, 4, 2, 0]
    assert max(len(pair) for bits in range(1, 9) for pair in pieces(bits)) == 5


def test_a_lane_holds_what_the_tensor_cores_want_of_it():
    """Level 16 s + 8 j + 2 t + h of row r is half h of pair 2 s + j of lane t."""
    levels = torch.zeros(16, 128, dtype=torch.uint8)
    levels[5, 16 * 3 + 8 * 1 + 2 * 2 + 1] = 0xAB
    bits = torch.full((16,), 8, dtype=torch.uint8)
    plan, planes = fragments.plan_tiles(bits, 1)
    words = fragments.fragment(levels, plan, 16, 128, 1, planes).view(8, WORDS)
    pair = 2 * 3 + 1
    plane, at = pieces(8)[pair][0][:2]
    assert words.nonzero().tolist() == [[plane, 4 * 5 + 2]]
    assert (int(words[plane, 22]) & 0xFFFFFFFF) == 0xAB << (at + 16)


def check(bits, width, area=1, shift=0.0, groups=1):
    levels, rows = case(bits, width)
    scale, offset, _ = grid(bits)
    t = run_form.FRAGMENTS.lay_out(rows, scale, offset + shift, area, groups)
    widths, _, slots = parts_of(t.plan, t.grid)
    size = tile_size(len(bits) // groups)
    assert tiles_of(t.plan, t.grid.shape[1]) == (len(widths), size if len(widths) else UNIT)
    assert (widths.diff() >= 0).all()  # programs start with the last, the widest
    for tile in slots.view(-1, size):
        assert tile[0] >= 0  # it tells the group
        assert (tile[tile >= 0] // (len(bits) // groups) == tile[0] // (len(bits) // groups)).all()
    assert t.lines.dtype == torch.int32
    assert t.lines.numel() == int(widths.sum()) * (size // UNIT) * blocks_of(width, area) * WORDS
    assert sorted(slots[slots >= 0].tolist()) == list(range(len(bits)))
    by_place = widths.repeat_interleave(size)
    wide = by_place.new_zeros(len(bits) + 1)
    wide[slots.long()] = by_place
    wide, own = wide[:-1], bits.int()
    assert ((wide >= own) & ((wide > 0) == (own > 0))).all()
    found = unfragment(t.lines, t.plan, t.grid, len(bits), width, area)
    moved = torch.where(own > 0, (1 << wide >> 1) - (1 << own >> 1), 0)
    assert_same(found, (levels + moved[:, None]).to(torch.uint8))
    real, live = run_form.tiled_weight(*t[:3], len(bits), width, area, torch.float64)
    assert_same(live, bits > 0)
    expected = (levels.float() + (offset + shift)[:, None]) * scale[:, None]
    expected = torch.where(live[:, None], expected, 0.0)
    torch.testing.assert_close(real.float(), expected, rtol=1e-6, atol=1e-6)
    return t


@pytest.mark.parametrize("name", shapes())
@pytest.mark.parametrize("units", [1, 4])
def test_levels_come_back(name, units, monkeypatch):
    monkeypatch.setattr(fragments, "MANY", 10_000 if units == 1 else 0)
    check(*shapes()[name])


@given(st.lists(st.integers(0, 8), max_size=40), st.integers(1, 40), st.sampled_from([1, 2, 9]))
def test_levels_of_any_shape_come_back(bits, channels, area):
    check(torch.tensor(bits, dtype=torch.uint8), channels * area, area)


@pytest.mark.parametrize(("groups", "each"), [(2, 17), (3, 16), (5, 1), (2, 70)])
@pytest.mark.parametrize("units", [1, 4])
def test_the_rows_of_a_tile_are_of_one_group(groups, each, units, monkeypatch):
    monkeypatch.setattr(fragments, "MANY", 10_000 if units == 1 else 0)
    bits = torch.randint(0, 9, (groups * each,), generator=torch.Generator().manual_seed(each), dtype=torch.uint8)
    check(bits, 36, 9, 0.5, groups)


def test_many_rows_in_small_groups_have_small_tiles():
    bits = torch.full((1_024,), 4, dtype=torch.uint8)
    assert tiles_of(check(bits, 9, 9, groups=64).plan, 1_024) == (64, 16)
    assert tiles_of(check(bits, 9, 9, groups=2).plan, 1_024) == (16, 64)


def test_any_width_costs_its_bits():
    for bits in range(1, 9):
        rows = case(torch.full((512,), bits, dtype=torch.uint8), SPAN)[1]
        t = run_form.FRAGMENTS.lay_out(rows, torch.ones(512), torch.zeros(512), 1, 1)
        assert 4 * t.lines.numel() == 512 * SPAN * bits // 8


def test_centred_grids_need_no_offsets():
    bits = torch.arange(9, dtype=torch.uint8).repeat(5)
    assert len(check(bits, 40).grid) == 1
    assert len(check(bits, 40, shift=0.5).grid) == 2


def test_the_form_is_that_of_the_device(monkeypatch):
    monkeypatch.setitem(run_form.FORMS, "cpu", run_form.FRAGMENTS)
    rows = case(torch.full((3,), 4, dtype=torch.uint8), 10)[1]
    assert tile_rows(rows, torch.ones(3), torch.zeros(3)).lines.dtype == torch.int32
    monkeypatch.undo()
    assert tile_rows(rows, torch.ones(3), torch.zeros(3)).lines.dtype == torch.uint8
