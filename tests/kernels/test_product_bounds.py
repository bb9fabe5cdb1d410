"""How far products with tiles may be from real arithmetic: the bounds that kernels/packed_linear.py states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sgsc.kernels import NUMERICS, OPS, PackedRows, pack, tile_kernel, tile_rows
from sgsc.kernels.packed_linear import grid
from sgsc.kernels.packing import case
from tests.checks import assert_same

numerics = pytest.mark.parametrize("int8", [n == "int8" for n in NUMERICS], ids=NUMERICS)
EVERY = torch.arange(9, dtype=torch.uint8)


def weights_of(levels: Tensor, bits: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """What levels stand for, in float64 without rounding."""
    weights = (levels.double() + offset.double()[:, None]) * scale.double()[:, None]
    return torch.where(bits[:, None] > 0, weights, 0.0)


def multiply(x: Tensor, rows: PackedRows, scale: Tensor, offset: Tensor, int8: bool) -> Tensor:
    tiles = tile_rows(rows, scale, offset)
    return OPS["packed_linear"](x, *tiles[:3], None, tiles.rows, rows.width, int8)


# ---- int8 ----

WIDTH = 601
TOKENS = {
    "random": lambda make: torch.randn(9, WIDTH, generator=make),
    "one-outlier": lambda make: torch.randn(9, WIDTH, generator=make).index_fill(1, torch.tensor([7]), 1_000.0),
    "heavy-tailed": lambda make: torch.randn(9, WIDTH, generator=make) / torch.rand(9, WIDTH, generator=make),
    "constant": lambda make: torch.full((9, WIDTH), -3.7),
    "tiny": lambda make: 1e-30 * torch.randn(9, WIDTH, generator=make),
    "one-token": lambda make: torch.randn(1, WIDTH, generator=make),
    "many-tokens": lambda make: torch.randn(50, WIDTH, generator=make),
}


def within_int8_bound(y: Tensor, x: Tensor, weights: Tensor) -> bool:
    """|y - exact| <= step / 2 * sum |w|, and for floats a thousandth of that more."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    error = (y.double() - x.double() @ weights.t()).abs()
    return bool((error <= 1.001 * step / 2 * weights.abs().sum(1)).all())


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.123])
@pytest.mark.parametrize("tokens", TOKENS)
def test_int8_stays_within_its_bound(tokens, shift, level):
    levels, rows = case(EVERY.repeat(3), WIDTH)
    scale, offset, _ = grid(rows.bits)
    weights = weights_of(levels, rows.bits, scale, offset + shift)
    x = TOKENS[tokens](torch.Generator().manual_seed(3))
    assert within_int8_bound(multiply(x, rows, scale, offset + shift, True), x, weights)


def test_the_int8_bound_is_reached_and_a_wrong_step_leaves_it(level):
    """Values just below ties, each rounded away from its weight's sign; and a constant, which has no error at all."""
    levels, rows = case(EVERY[1:], WIDTH)
    scale, offset, _ = grid(rows.bits)
    weights = weights_of(levels, rows.bits, scale, offset + 0.5)
    for row in range(8):
        x = (torch.arange(WIDTH) % 100 + 0.499) * weights[row].sign().float()
        x[0] = 127.0
        y = multiply(x[None], rows, scale, offset + 0.5, True)
        assert within_int8_bound(y, x[None], weights)
        error = (y[0, row].double() - x.double() @ weights[row]).abs()
        assert error > 0.99 * weights[row].abs().sum() / 2
    x = torch.full((3, WIDTH), 2.5)
    y = multiply(x, rows, scale, torch.zeros(8), True)
    weights = weights_of(levels, rows.bits, scale, torch.zeros(8))
    assert within_int8_bound(y, x, weights)
    for wrong in (128 / 127, 126 / 127):
        assert not within_int8_bound(y * wrong, x, weights)


def test_int8_images_stay_within_their_bound(level):
    levels, rows = case(EVERY.repeat(3), 54)
    scale, offset, _ = grid(rows.bits)
    weights = weights_of(levels, rows.bits, scale, offset).view(27, 6, 3, 3)
    x = torch.randn(3, 6, 9, 7) * torch.tensor([1e-3, 1.0, 100.0]).view(3, 1, 1, 1)  # each image has its own step
    tiles = tile_kernel(rows, scale, offset, inputs=6, kernel=[3, 3], groups=1)
    y = OPS["packed_conv2d"](x, *tiles[:3], None, 27, [3, 3], [1, 1], [1, 1], [1, 1], 1, True)
    error = (y.double() - torch.nn.functional.conv2d(x.double(), weights, padding=1)).abs()
    step = x.double().abs().amax((1, 2, 3), keepdim=True) / 127
    assert (error <= 1.001 * step / 2 * weights.abs().sum((1, 2, 3)).view(27, 1, 1)).all()


# ---- the ends of int8: sums as large as they can be, judged by integers ----

DEEP = 2**15


def deep_rows(width: int = DEEP) -> tuple[Tensor, PackedRows]:
    """Rows of 8, 7 and 4 bits, each in tiles of its own: all levels at the top, all 0, the two in turn, and random."""
    bits = torch.tensor([8, 7, 4], dtype=torch.uint8).repeat_interleave(16)
    top = (2 ** bits.int() - 1)[:, None]
    k = torch.arange(width)
    patterns = [torch.ones(width), torch.zeros(width), k % 2, (k + 1) % 2, k // 2 % 2, torch.rand(width) < 0.5]
    levels = torch.stack([patterns[row % len(patterns)] for row in range(48)]).int() * top
    random = (torch.arange(48) % 8 == 7)[:, None]
    levels = torch.where(random, torch.randint(0, 256, levels.shape) & top, levels).to(torch.uint8)
    return levels, pack(levels, bits)


def deep_codes(tokens: int, width: int = DEEP) -> Tensor:
    """All at an end, the ends in turn, and random: integers of which one is 127, so that the step is 1."""
    k, found = torch.arange(width), torch.randint(-127, 128, (tokens, width))
    patterns = [torch.full((width,), 127), torch.full((width,), -127), k % 2 * 254 - 127, k // 2 % 2 * 254 - 127]
    for token in range(tokens):
        if token % 5 < 4:
            found[token] = patterns[token % 5]
    found[:, 0] = 127
    return found


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 35])
def test_int8_sums_do_not_overflow(tokens, level):
    """What is compared is one rounding to float32 of the exact integer; offsets up to 256 take part in the integers."""
    levels, rows = deep_rows()
    offset = torch.tensor([256.0, 0, -128, -255, 255, -256, 1]).repeat(7)[:48]
    codes = deep_codes(tokens)
    y = multiply(codes.float(), rows, torch.ones(48), offset, True)
    exact = codes.double() @ (levels.double() + offset.double()[:, None]).t()  # integers below 2^53
    assert exact.abs().max() > 0.98 * 2**31
    assert_same(y + 0.0, exact.float() + 0.0)


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 35])
@pytest.mark.parametrize("bits", range(1, 9))
def test_int8_sums_do_not_saturate(bits, tokens, level):
    """Each width in tiles of its own, levels and codes at their ends: neighbours may not meet in 16 bits."""
    width, top = 192, 2**bits - 1
    k = torch.arange(width)
    levels = torch.stack([k * 0 + top, k % 2 * top, (k + 1) % 2 * top, k // 2 % 2 * top, k % 4 * top // 3])
    rows = pack(levels.to(torch.uint8), torch.full((5,), bits, dtype=torch.uint8))
    codes = deep_codes(tokens, width)
    y = multiply(codes.float(), rows, torch.ones(5), torch.zeros(5), True)
    assert y.long().tolist() == (codes @ levels.t()).tolist()


@pytest.mark.parametrize("end", [127.0, -127.0])
def test_int8_sums_of_a_convolution_do_not_overflow(end, level):
    levels, rows = deep_rows()
    offset = torch.tensor([0.0, -128, -255, 256]).repeat(12)
    tiles = tile_kernel(rows, torch.ones(48), offset, inputs=DEEP // 4, kernel=[2, 2], groups=1)
    x = torch.full((1, DEEP // 4, 3, 2), end)
    x[0, ::3, 1] = 5
    y = OPS["packed_conv2d"](x, *tiles[:3], None, 48, [2, 2], [1, 1], [0, 0], [1, 1], 1, True)
    weights = (levels.double() + offset.double()[:, None]).view(48, DEEP // 4, 2, 2)
    patches = torch.stack([x[0, :, i : i + 2] for i in range(2)]).flatten(1).double()
    assert_same(y[0, :, :, 0] + 0.0, (weights.flatten(1) @ patches.t()).float() + 0.0)


# ---- exact ----


def assert_within_exact_bound(y: Tensor, x: Tensor, weights: Tensor) -> None:
    """|y - exact| <= K 2^-23 sum |w x|, and one rounding of y."""
    exact, size = x.double() @ weights.t(), x.double().abs() @ weights.abs().t()
    error = (y.double() - exact).abs()
    allowed = x.shape[1] * 2.0**-23 * size + 2.0**-24 * exact.abs()
    assert (error <= allowed).all(), f"{(error / allowed).nan_to_num().max().item():.2f} of what is allowed"


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 35])
@pytest.mark.parametrize("width", [1, 2, 3, 8, 33, 100, 1_000])
@pytest.mark.parametrize("shift", [0.0, 0.5, 0.123])
def test_exact_numerics_stay_within_their_bound(shift, width, tokens, level):
    levels, rows = case(EVERY.repeat(3), width)
    scale, offset, _ = grid(rows.bits)
    weights = weights_of(levels, rows.bits, scale, offset + shift)
    x = torch.randn(tokens, width) * torch.exp2(torch.randint(-20, 20, (tokens, width)).float())
    assert_within_exact_bound(multiply(x, rows, scale, offset + shift, False), x, weights)


@pytest.mark.parametrize("tokens", [1, 2, 4, 16, 35])
@pytest.mark.parametrize("width", [2, 8, 100, 1_000])
def test_exact_numerics_stay_within_their_bound_where_all_cancels(width, tokens, level):
    """The last value of a token undoes what the others bring to one row: the sum is a millionth of its terms."""
    levels, rows = case(EVERY[1:].repeat(3), width)
    scale, offset, _ = grid(rows.bits)
    weights = weights_of(levels, rows.bits, scale, offset + 0.5)  # none is 0
    x, row = torch.randn(tokens, width).double(), torch.arange(tokens) % 24
    x[:, -1] = -(x[:, :-1] * weights[row, :-1]).sum(1) / weights[row, -1]
    x = x.float()
    exact = (x.double() * weights[row]).sum(1).abs()
    assert (exact <= 2.0**-20 * (x.double() * weights[row]).abs().sum(1)).all()
    assert_within_exact_bound(multiply(x, rows, scale, offset + 0.5, False), x, weights)


def test_the_exact_bound_leaves_no_room_for_half_precision(level):
    levels, rows = case(EVERY[1:], 16)
    scale, offset, _ = grid(rows.bits)
    weights, x = weights_of(levels, rows.bits, scale, offset + 0.5), torch.randn(5, 16)
    y = multiply(x, rows, scale, offset + 0.5, False)
    assert_within_exact_bound(y, x, weights)
    for rounded in (y.bfloat16(), y.half(), multiply(x.half().float(), rows, scale, offset + 0.5, False)):
        with pytest.raises(AssertionError, match="of what is allowed"):
            assert_within_exact_bound(rounded, x, weights)


def test_pixels_stay_within_the_exact_bound(level):
    levels, rows = case(EVERY.repeat(3), 54)
    scale, offset, _ = grid(rows.bits)
    for groups, shape in ((1, (27, 6, 3, 3)), (3, (27, 6, 3, 3))):
        x = torch.randn(2, 6 * groups, 9, 7)
        tiles = tile_kernel(rows, scale, offset, inputs=6 * groups, kernel=[3, 3], groups=groups)
        y = OPS["packed_conv2d"](x, *tiles[:3], None, 27, [3, 3], [1, 1], [1, 1], [1, 1], groups, False)
        weights = weights_of(levels, rows.bits, scale, offset).view(shape)
        options = {"padding": 1, "groups": groups}
        exact = torch.nn.functional.conv2d(x.double(), weights, **options)
        size = torch.nn.functional.conv2d(x.double().abs(), weights.abs(), **options)
        assert ((y.double() - exact).abs() <= 54 * 2.0**-23 * size + 2.0**-24 * exact.abs()).all()
