"""Products with tiles: each level shows in the result, any shape agrees with the reference, no row disturbs another.

How far results may be from real arithmetic is in test_product_bounds.py.
"""

from __future__ import annotations

import itertools
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgsc.kernels import NUMERICS, OPS, extension, tile_kernel, tile_rows
from sgsc.kernels.op import isas, set_isa
from sgsc.kernels.packed_conv2d import output_size
from sgsc.kernels.packed_linear import grid
from sgsc.kernels.packing import case
from tests.checks import assert_agrees, assert_same

numerics = pytest.mark.parametrize("int8", [n == "int8" for n in NUMERICS], ids=NUMERICS)


def linear(x: Tensor, bits: Tensor, scale: Tensor, offset: Tensor, bias: Tensor | None, int8: bool) -> tuple:
    """Arguments of packed_linear, with random levels."""
    width = x.shape[1]
    tiles = tile_rows(case(bits, width)[1], scale, offset)
    return x, *tiles[:3], bias, tiles.rows, width, int8


def conv2d(
    x: Tensor, bits: Tensor, offset: Tensor, bias: Tensor | None, kernel, stride, padding, dilation, groups, int8: bool
) -> tuple:
    """Arguments of packed_conv2d, with random levels."""
    packed = case(bits, x.shape[1] // groups * prod(kernel))[1]
    tiles = tile_kernel(packed, grid(bits)[0], offset, inputs=x.shape[1], kernel=kernel, groups=groups)
    return x, *tiles[:3], bias, tiles.rows, kernel, stride, padding, dilation, groups, int8


def exact_grid(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Steps that are powers of two, one unlike the next, and offsets with halves: no product with them is rounded."""
    row = torch.arange(len(bits))
    return torch.exp2((row % 11 - 5).float()), -torch.exp2(bits.float() - 1) + row % 2 / 2


def exact_weights(bits: Tensor, width: int) -> Tensor:
    scale, offset = exact_grid(bits)
    weights = (case(bits, width)[0] + offset[:, None]) * scale[:, None]
    return torch.where(bits[:, None] > 0, weights, 0.0)


# ---- levels ----


@numerics
@pytest.mark.parametrize("width", [1, 8, 13, 601])
@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 4, 5, 6, 7, 8, 17, 200])
def test_one_hot_inputs_read_the_levels(width, rows_at_once, int8, level):
    """A row of x with a single value selects one weight: nothing is rounded, so it shows each level bit for bit."""
    bits = torch.arange(9, dtype=torch.uint8).repeat(3)
    chosen = torch.arange(rows_at_once) * 7 % width
    size = 127.0 if int8 else 1.0  # the code is 127, and the step 1
    x = size * torch.nn.functional.one_hot(chosen, width).float()
    y = OPS["packed_linear"](*linear(x, bits, *exact_grid(bits), None, int8))
    assert_same(y + 0.0, size * exact_weights(bits, width)[:, chosen].t().contiguous() + 0.0)


@numerics
def test_one_hot_images_read_the_kernels(int8, level):
    bits = torch.arange(9, dtype=torch.uint8).repeat(2)
    scale, offset = exact_grid(bits)
    tiles = tile_kernel(case(bits, 45)[1], scale, offset, inputs=10, kernel=[3, 3], groups=2)
    weights = exact_weights(bits, 45).view(18, 5, 3, 3)
    size = 127.0 if int8 else 1.0
    for group, channel in itertools.product(range(2), range(5)):
        x = torch.zeros(1, 10, 5, 5)
        x[0, 5 * group + channel, 2, 2] = size
        y = OPS["packed_conv2d"](x, *tiles[:3], None, 18, [3, 3], [1, 1], [0, 0], [1, 1], 2, int8)
        expected = torch.zeros(1, 18, 3, 3)
        mine = slice(9 * group, 9 * group + 9)
        expected[0, mine] = size * weights[mine, channel].flip(1, 2)
        assert_same(y + 0.0, expected + 0.0)


# ---- shapes ----

WIDTHS = st.lists(st.integers(0, 8), max_size=40)
OFFSETS = st.sampled_from(["whole", "half", "any", "mixed"])
# the fixture sets the same instruction set for all examples, as it should
ANY_SHAPE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def offsets(bits: Tensor, kind: str) -> Tensor:
    whole, row = -torch.exp2(bits.float() - 1), torch.arange(len(bits))
    some = torch.randn(len(bits), generator=torch.Generator().manual_seed(len(bits)))
    return (
        whole + {"whole": 0.0, "half": 0.5, "any": some, "mixed": torch.where(row % 17 == 0, some, row % 2 / 2)}[kind]
    )


@numerics
@ANY_SHAPE
@given(widths=WIDTHS, width=st.integers(0, 140), rows=st.integers(0, 40), with_bias=st.booleans(), kind=OFFSETS)
def test_packed_linear_of_any_shape(level, int8, widths, width, rows, with_bias, kind):
    bits = torch.tensor(widths, dtype=torch.uint8)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    scale, _, bias = grid(bits)
    arguments = linear(x, bits, scale, offsets(bits, kind), bias if with_bias else None, int8)
    assert_agrees(OPS["packed_linear"], arguments, level)


@numerics
@ANY_SHAPE
@given(
    channels=st.integers(1, 9),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 20),
    size=st.tuples(st.integers(1, 9), st.integers(1, 19)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kind=OFFSETS,
)
def test_packed_conv2d_of_any_shape(
    level, int8, channels, groups, outputs, size, kernel, stride, padding, dilation, kind
):
    padding = [
        max(p, (d * (k - 1) + 1 - s + 1) // 2) for p, d, k, s in zip(padding, dilation, kernel, size, strict=True)
    ]
    assert all(output_size(*one) > 0 for one in zip(size, kernel, stride, padding, dilation, strict=True))
    bits = (torch.arange(groups * outputs) * 5 % 9).to(torch.uint8)
    x = torch.randn(2, channels * groups, *size, generator=torch.Generator().manual_seed(channels))
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    arguments = conv2d(x, bits, offsets(bits, kind), grid(bits)[2], *geometry, int8)
    assert_agrees(OPS["packed_conv2d"], arguments, level)


@numerics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_with_gaps_are_read_as_they_are(int8, dtype, level):
    """Every tensor argument, each a view into a larger one whose rest is NaN, or 255."""

    def with_gaps(value):
        if not isinstance(value, Tensor):
            return value
        room = torch.full((*value.shape, 2), float("nan") if value.is_floating_point() else 255).to(value.dtype)
        room[..., 0] = value
        return room[..., 0]

    bits = torch.arange(9, dtype=torch.uint8).repeat(3)
    scale, offset, bias = grid(bits)
    x, image = torch.randn(5, 40).to(dtype), torch.randn(2, 8, 6, 5).to(dtype)
    geometry = ([3, 3], [1, 2], [1, 0], [1, 1], 1)
    for op, arguments in (
        (OPS["packed_linear"], linear(x, bits, scale, offset, bias.to(dtype), int8)),
        (OPS["packed_conv2d"], conv2d(image, bits, offset, bias.to(dtype), *geometry, int8)),
    ):
        assert_same(op(*map(with_gaps, arguments)), op(*arguments), op.name)


# ---- what is not finite ----

BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])


@numerics
@BAD
@pytest.mark.parametrize("rows", [1, 3, 12, 16, 40])
def test_what_is_not_finite_stays_in_its_row(bad, rows, int8, level):
    """The rows of x do not mix, also where a vector or a tile holds several; removed weights stay out of it."""
    bits = torch.tensor([4, 0, 1], dtype=torch.uint8)
    x = torch.randn(rows, 21)
    grids = (torch.ones(3), torch.full((3,), 0.5), torch.ones(3))
    finite = OPS["packed_linear"](*linear(x, bits, *grids, int8))
    for at in {0, rows // 2, rows - 1}:
        odd = x.clone()
        odd[at, 20] = bad
        y = OPS["packed_linear"](*linear(odd, bits, *grids, int8))
        assert not y[at, [0, 2]].isfinite().any()
        assert y[at, [0, 2]].isnan().all() or not int8
        others = torch.arange(rows) != at
        assert_same(y[others], finite[others])
        assert (y[:, 1] == 1).all()


@numerics
@BAD
@pytest.mark.parametrize("groups", [1, 4], ids=["multiplied", "sliding"])
def test_what_is_not_finite_stays_in_its_image(bad, groups, int8, level):
    """In exact numerics, in the pixels whose kernels see it."""
    bits = torch.tensor([4, 0, 1, 8], dtype=torch.uint8)
    rest = (torch.full((4,), 0.5), torch.ones(4), [3, 3], [1, 1], [1, 1], [1, 1], groups, int8)
    x = torch.randn(3, 4, 7, 9)
    finite = OPS["packed_conv2d"](*conv2d(x, bits, *rest))
    odd = x.clone()
    odd[1, 3, 2, 4] = bad
    y = OPS["packed_conv2d"](*conv2d(odd, bits, *rest))
    assert_same(y[[0, 2]], finite[[0, 2]])
    assert (y[:, 1] == 1).all()
    reached = torch.zeros(4, 7, 9, dtype=torch.bool)
    if int8 and groups == 1:
        reached[:] = True
        assert y[1, [0, 2, 3]].isnan().all()
    else:
        reached[3 if groups == 4 else slice(None), 1:4, 3:6] = True
        assert_same(y[1][~reached], finite[1][~reached])
    reached[1] = False
    assert not y[1][reached].isfinite().any()


# ---- instruction sets ----


@pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33])
@pytest.mark.parametrize(("shift", "units"), [(0.0, 0), (0.5, 0), (0.123, 2)])
def test_all_instruction_sets_round_int8_alike(tokens, shift, units):
    """Sums of levels are integers, and with offsets of halves their settling is exact up to one float32: bit for bit.

    Any other offset brings a product that one set rounds and another, which fuses it, does not: two units in the last
    place of the sum of the terms' sizes.
    """
    bits = torch.arange(9, dtype=torch.uint8).repeat(5)
    scale, whole, bias = grid(bits)
    x, image = torch.randn(tokens, 777), torch.randn(2, 12, 5, 9)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1)
    calls = {
        "packed_linear": linear(x, bits, scale, whole + shift, bias, True),
        "packed_conv2d": conv2d(image, bits, whole + shift, bias, *geometry, True),
    }
    for name, arguments in calls.items():
        results = []
        for isa in isas():
            before = set_isa(isa)
            results.append(OPS[name](*arguments))
            set_isa(before)
        if units == 0:
            for other in results:
                assert_same(other, results[0], name)
        levels = case(bits, 777 if name == "packed_linear" else 108)[0]
        row = ((levels + (whole + shift)[:, None]).abs() + 1).sum(1) * scale
        of = arguments[0].flatten(1).abs().amax(1)
        terms = (of[:, None] * row).view(*(of.shape + row.shape), *[1] * (arguments[0].dim() - 2)) + bias.abs().max()
        for other in results:
            assert ((other - results[0]).abs() <= units * 2.0**-23 * terms).all(), name
