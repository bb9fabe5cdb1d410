"""Products with packed rows: each level shows in the result, and any shape agrees with the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgsc.kernels import OPS, extension
from sgsc.kernels.packed_linear import grid
from sgsc.kernels.packing import case, dequantize
from tests.checks import assert_agrees, assert_same


@pytest.mark.parametrize("width", [1, 8, 13, 601])
@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 4, 5, 6, 7, 8, 17, 200])
def test_one_hot_inputs_read_the_levels(width, rows_at_once, level):
    """A row of x with a single 1 selects one weight: the product is exact, so it shows each level bit for bit."""
    bits = torch.arange(9, dtype=torch.uint8).repeat(3)
    packed = case(bits, width)[1]
    scale, offset, _ = grid(bits)
    offset[::2] += 0.5
    weights = dequantize(*packed.args[:3], scale, offset, width, torch.float32)
    chosen = torch.arange(rows_at_once) * 7 % width
    x = torch.nn.functional.one_hot(chosen, width).float()
    y = OPS["packed_linear"](x, *packed.args[:3], scale, offset, None, width)
    assert_same(y + 0.0, weights[:, chosen].t().contiguous() + 0.0)


def test_one_hot_images_read_the_kernels(level):
    bits = torch.arange(9, dtype=torch.uint8).repeat(2)
    packed = case(bits, 45)[1]
    scale, offset, _ = grid(bits)
    weights = dequantize(*packed.args[:3], scale, offset, 45, torch.float32).view(18, 5, 3, 3)
    for group, channel in itertools.product(range(2), range(5)):
        x = torch.zeros(1, 10, 5, 5)
        x[0, 5 * group + channel, 2, 2] = 1
        y = OPS["packed_conv2d"](x, *packed.args[:3], scale, offset, None, [3, 3], [1, 1], [0, 0], [1, 1], 2)
        expected = torch.zeros(1, 18, 3, 3)
        mine = slice(9 * group, 9 * group + 9)
        expected[0, mine] = weights[mine, channel].flip(1, 2)
        assert_same(y + 0.0, expected + 0.0)


WIDTHS = st.lists(st.integers(0, 8), max_size=20)
# the fixture sets the same instruction set for all examples, as it should
ANY_SHAPE = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@ANY_SHAPE
@given(widths=WIDTHS, width=st.integers(0, 70), rows=st.integers(0, 20), with_bias=st.booleans())
def test_packed_linear_of_any_shape(level, widths, width, rows, with_bias):
    bits = torch.tensor(widths, dtype=torch.uint8)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    scale, offset, bias = grid(bits)
    arguments = (x, *case(bits, width)[1].args[:3], scale, offset, bias if with_bias else None, width)
    assert_agrees(OPS["packed_linear"], arguments, level)


@ANY_SHAPE
@given(
    channels=st.integers(1, 3),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 3),
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_packed_conv2d_of_any_shape(level, channels, groups, outputs, size, kernel, stride, padding, dilation):
    padding = [
        max(p, (d * (k - 1) + 1 - s + 1) // 2) for p, d, k, s in zip(padding, dilation, kernel, size, strict=True)
    ]
    bits = (torch.arange(groups * outputs) * 5 % 9).to(torch.uint8)
    x = torch.randn(2, channels * groups, *size, generator=torch.Generator().manual_seed(channels))
    packed = case(bits, channels * kernel[0] * kernel[1])[1]
    geometry = (list(kernel), list(stride), list(padding), list(dilation), groups)
    assert_agrees(OPS["packed_conv2d"], (x, *packed.args[:3], *grid(bits), *geometry), level)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 3, 12])
def test_what_is_not_finite_stays_in_its_row(bad, rows, level):
    """The rows of x do not mix, also where a vector or a tile holds several; removed weights stay out of it."""
    bits = torch.tensor([4, 0, 1], dtype=torch.uint8)
    x = torch.ones(rows, 21)
    x[-1, 20] = bad
    y = OPS["packed_linear"](x, *case(bits, 21)[1].args[:3], torch.ones(3), torch.full((3,), 0.5), torch.ones(3), 21)
    assert not y[-1, [0, 2]].isfinite().any()
    assert y[:-1].isfinite().all()
    if extension.LOADED:  # plain PyTorch multiplies by the zeros of a removed row
        assert (y[:, 1] == 1).all()
