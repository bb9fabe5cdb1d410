"""Products of x on a grid that is known beforehand: its codes, exact integers, the stated bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sgsc.kernels import OPS, PackedRows, extension, fake_quantize, pack, tile_kernel, tile_rows
from sgsc.kernels.input_grid import WIDEST_STATIC, with_sums
from sgsc.kernels.op import isas, set_isa
from sgsc.kernels.packed_linear import grid as grid_of
from sgsc.kernels.packing import case
from tests.checks import assert_agrees, assert_close_to, assert_same
from tests.kernels.test_product_bounds import EVERY, deep_rows, weights_of

GRIDS = {
    "unsigned": (0.0123, 0, 255),
    "signed": (0.021, -128, 127),
    "skew": (0.017, -37, 218),
    "negative": (0.3, -255, 0),
    "four-bits": (0.31, 0, 15),
    "two-codes": (1.7, 0, 1),
}
every_grid = pytest.mark.parametrize("which", GRIDS)
needs_extension = pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")


def rounded(x: Tensor, grid: Tensor) -> Tensor:
    """What the trained layer multiplies."""
    return fake_quantize(x.reshape(1, -1), *grid.split(1), torch.zeros(1)).view(x.shape)


def multiply(x: Tensor, rows: PackedRows, scale: Tensor, offset: Tensor, grid: Tensor, int8: bool = True) -> Tensor:
    tiles = tile_rows(rows, scale, offset)
    return OPS["packed_linear"](x, *tiles[:3], None, tiles.rows, rows.width, int8, with_sums(grid, rows))


def assert_within_static_bound(y: Tensor, q: Tensor, levels: Tensor, scale: Tensor, offset: Tensor) -> None:
    """|y - exact| <= 2^-21 sum (level + |offset|) scale |q|, and one rounding of y."""
    live = levels.double() + offset.double()[:, None]
    exact = q.double() @ (live * scale.double()[:, None]).t()
    size = q.double().abs() @ ((levels + offset.double().abs()[:, None]) * scale.double()[:, None]).t()
    error, allowed = (y.double() - exact).abs(), 2.0**-21 * size + 2.0**-24 * exact.abs()
    assert (error <= allowed).all(), f"{(error / allowed).nan_to_num().max().item():.2f} of what is allowed"


# ---- codes ----


@every_grid
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_one_weight_reads_the_codes_of_fake_quantize(which, tokens, level):
    """Weights of one row of ones: y is q itself, also where x lies on a tie or beyond the grid."""
    scale, low, high = GRIDS[which]
    grid = torch.tensor([scale, float(low), float(high)])
    codes = torch.arange(2 * (low - 3), 2 * (high + 3) + 1) / 2  # of half a step
    x = torch.cat([codes * grid[0], (codes * grid[0]).nextafter(torch.tensor(9e9)), torch.tensor([0.0, 1e-40, 3e38])])
    x = torch.cat([x, -x, torch.tensor([float("inf"), -float("inf")])])
    bits = torch.ones(1, dtype=torch.uint8)
    one = pack(torch.ones(1, 1, dtype=torch.uint8), bits)
    for some in x.split(tokens):
        y = multiply(some[:, None], one, torch.ones(1), torch.zeros(1), grid)
        assert_same(y[:, 0] + 0.0, rounded(some, grid) + 0.0, which)


def test_the_inverse_of_a_scale_would_give_other_codes():
    """So that the test above can tell the two apart."""
    codes = torch.arange(512) / 2
    scale = torch.tensor(0.0123)
    x = codes * scale
    assert not torch.equal((x / scale).round(), (x * (1 / scale)).round())


# ---- sums ----


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 16, 35])
@pytest.mark.parametrize("ends", [(0, 255), (-255, 0), (-128, 127), (-37, 218)])
def test_sums_do_not_overflow(ends, tokens, level):
    """What is compared is one rounding to float32 of the exact integer; offsets up to 256 take part in the integers."""
    levels, rows = deep_rows(WIDEST_STATIC)
    offset = torch.tensor([256.0, 0, -128, -255, 255, -256, 1]).repeat(7)[:48]
    codes = torch.randint(ends[0], ends[1] + 1, (tokens, WIDEST_STATIC))
    for token in range(tokens):
        if token % 3 < 2:
            codes[token] = ends[(token + (-ends[0] < ends[1])) % 2]
    y = multiply(codes.float(), rows, torch.ones(48), offset, torch.tensor([1.0, *map(float, ends)]))
    exact = codes.double() @ (levels.double() + offset.double()[:, None]).t()  # integers below 2^53
    if ends != (-128, 127) and ends != (-37, 218):
        assert exact.abs().max() > 0.98 * 2**31
    assert_same(y + 0.0, exact.float() + 0.0)


@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_sums_that_would_overflow_are_of_floats(tokens, level):
    levels, rows = deep_rows(2 * WIDEST_STATIC)
    offset = torch.full((48,), 256.0)
    codes = torch.full((tokens, 2 * WIDEST_STATIC), 255)
    y = multiply(codes.float(), rows, torch.ones(48), offset, torch.tensor([1.0, 0.0, 255.0]))
    exact = codes.double() @ (levels.double() + 256).t()
    assert exact.max() > 2**32 - 2**28
    assert_close_to(y, exact, 1e-4)


@every_grid
@pytest.mark.parametrize("padding", [[0, 0], [1, 2]])
@pytest.mark.parametrize(("inputs", "width"), [(5, 9), (8, 16)], ids=["gathered", "where-they-lie"])
def test_images_are_summed_exactly_padding_and_all(which, padding, inputs, width, level):
    """Integers of x with a scale of 1, at most 8 x 9 x 255 x 511 < 2^24: nothing is rounded, so padding shows."""
    _, low, high = GRIDS[which]
    grid = torch.tensor([1.0, float(low), float(high)])
    levels, rows = case(EVERY, inputs * 9)
    offset = -torch.exp2(EVERY.float() - 1) + torch.arange(9) % 2 / 2
    tiles = tile_kernel(rows, torch.ones(9), offset, inputs=inputs, kernel=[3, 3], groups=1)
    x = torch.randint(low - 9, high + 9, (2, inputs, 7, width)).float()
    form = with_sums(grid, rows)
    y = OPS["packed_conv2d"](x, *tiles[:3], None, 9, [3, 3], [1, 1], padding, [1, 1], 1, True, form)
    weights = weights_of(levels, rows.bits, torch.ones(9), offset).view(9, inputs, 3, 3)
    exact = torch.nn.functional.conv2d(x.double().clamp(low, high), weights, padding=padding)
    assert_same(y + 0.0, exact.float() + 0.0)


@every_grid
@pytest.mark.parametrize("shift", [0.0, 0.5, 0.123, 300.25])
@pytest.mark.parametrize("tokens", [1, 4, 50])
def test_static_products_stay_within_their_bound(which, shift, tokens, level):
    levels, rows = case(EVERY[1:].repeat(3), 601)
    scale, offset, _ = grid_of(rows.bits)
    grid = torch.tensor(GRIDS[which])
    x = torch.randn(tokens, 601)
    y = multiply(x, rows, scale, offset + shift, grid)
    assert_within_static_bound(y, rounded(x, grid).double(), levels, scale, offset + shift)


def test_the_static_bound_leaves_no_room_for_a_step_measured_anew(level):
    levels, rows = case(EVERY[1:].repeat(3), 601)
    scale, offset, _ = grid_of(rows.bits)
    grid, x, tiles = torch.tensor(GRIDS["skew"]), torch.randn(4, 601), tile_rows(rows, scale, offset)
    q = rounded(x, grid)
    again = OPS["packed_linear"](q, *tiles[:3], None, 24, 601, True)
    assert_within_static_bound(multiply(x, rows, scale, offset, grid), q, levels, scale, offset)
    with pytest.raises(AssertionError, match="of what is allowed"):
        assert_within_static_bound(again, q, levels, scale, offset)


@every_grid
def test_exact_numerics_multiply_the_rounded_input(which, level):
    _, rows = case(EVERY.repeat(3), 77)
    scale, offset, _ = grid_of(rows.bits)
    grid, tiles = torch.tensor(GRIDS[which]), tile_rows(rows, scale, offset)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 77).to(dtype)
        want = OPS["packed_linear"](rounded(x, grid), *tiles[:3], None, 27, 77, False)
        assert_same(multiply(x, rows, scale, offset, grid, int8=False), want)


def test_depthwise_layers_multiply_the_rounded_input_in_either_numerics(level):
    bits = EVERY.repeat(3)
    _, rows = case(bits, 9)
    scale, offset, _ = grid_of(bits)
    tiles = tile_kernel(rows, scale, offset, inputs=27, kernel=[3, 3], groups=27)
    grid, x = torch.tensor(GRIDS["skew"]), torch.randn(2, 27, 6, 7)
    geometry = (None, 27, [3, 3], [1, 1], [1, 1], [1, 1], 27)
    want = OPS["packed_conv2d"](rounded(x, grid), *tiles[:3], *geometry, False)
    for int8 in (False, True):
        assert_same(OPS["packed_conv2d"](x, *tiles[:3], *geometry, int8, with_sums(grid, rows)), want)


# ---- shapes ----

ANY_SHAPE = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
RANGES = st.integers(-255, 0).flatmap(lambda low: st.tuples(st.just(low), st.integers(max(low + 1, 0), low + 255)))


@ANY_SHAPE
@given(
    widths=st.lists(st.integers(0, 8), max_size=40),
    width=st.integers(0, 140),
    rows=st.integers(0, 40),
    ends=RANGES,
    int8=st.booleans(),
)
def test_linear_of_any_shape_and_range(level, widths, width, rows, ends, int8):
    bits = torch.tensor(widths, dtype=torch.uint8)
    packed = case(bits, width)[1]
    scale, offset, bias = grid_of(bits)
    tiles = tile_rows(packed, scale, offset)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    form = with_sums(torch.tensor([2.0 / max(-ends[0], ends[1]), *map(float, ends)]), packed)
    assert_agrees(OPS["packed_linear"], (x, *tiles[:3], bias, tiles.rows, width, int8, form), level)


@ANY_SHAPE
@given(
    channels=st.integers(1, 9),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 20),
    size=st.tuples(st.integers(3, 9), st.integers(3, 19)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    ends=RANGES,
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_conv2d_of_any_shape_and_range(level, channels, groups, outputs, size, kernel, stride, padding, ends, dtype):
    bits = (torch.arange(groups * outputs) * 5 % 9).to(torch.uint8)
    packed = case(bits, channels * kernel[0] * kernel[1])[1]
    scale, offset, bias = grid_of(bits)
    tiles = tile_kernel(packed, scale, offset, inputs=channels * groups, kernel=list(kernel), groups=groups)
    x = torch.randn(2, channels * groups, *size, generator=torch.Generator().manual_seed(channels)).to(dtype)
    form = with_sums(torch.tensor([2.0 / max(-ends[0], ends[1]), *map(float, ends)]), packed)
    geometry = (list(kernel), list(stride), list(padding), [1, 1], groups)
    arguments = (x, *tiles[:3], bias.to(dtype), tiles.rows, *geometry, True, form)
    assert_agrees(OPS["packed_conv2d"], arguments, level)


# ---- what is not a number, and what is refused ----


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_nan_stays_in_its_row(rows, level):
    packed = case(torch.tensor([4, 0, 1], dtype=torch.uint8), 21)[1]
    grid, x = torch.tensor(GRIDS["skew"]), torch.randn(rows, 21)
    finite = multiply(x, packed, torch.ones(3), torch.full((3,), 0.5), grid)
    for at in {0, rows // 2, rows - 1}:
        odd = x.clone()
        odd[at, 20] = float("nan")
        y = multiply(odd, packed, torch.ones(3), torch.full((3,), 0.5), grid)
        assert y[at, [0, 2]].isnan().all()
        others = torch.arange(rows) != at
        assert_same(y[others], finite[others])
        assert (y[:, 1] == 0).all()


def test_an_image_with_nan_gives_nan_and_no_other_does(level):
    bits = torch.tensor([4, 0, 8], dtype=torch.uint8)
    packed = case(bits, 45)[1]
    tiles = tile_kernel(packed, torch.ones(3), torch.zeros(3), inputs=5, kernel=[3, 3], groups=1)
    x = torch.randn(3, 5, 6, 7)
    x[1, 4, 2, 3] = float("nan")
    x[2, 0, 0, 0] = float("inf")
    form = with_sums(torch.tensor(GRIDS["signed"]), packed)
    y = OPS["packed_conv2d"](x, *tiles[:3], torch.ones(3), 3, [3, 3], [1, 1], [1, 1], [1, 1], 1, True, form)
    assert y[1, [0, 2]].isnan().all()
    assert (y[1, 1] == 1).all()
    assert y[[0, 2]].isfinite().all()


def test_a_grid_of_another_shape_is_refused(level):
    linear = OPS["packed_linear"].cases()["static-no-bias"]
    conv = OPS["packed_conv2d"].cases()["static-three-by-three"]
    for op, arguments in ((OPS["packed_linear"], linear), (OPS["packed_conv2d"], conv)):
        for form in (op, op.fake, op.reference):
            with pytest.raises(ValueError, match=rf"^{op.name}: input_grid is \(3\)?"):
                form(*arguments[:-1], arguments[-1][:3])


@needs_extension
@pytest.mark.parametrize(
    "grid",
    [
        (0.0, 0, 255),
        (-1.0, 0, 255),
        (float("nan"), 0, 255),
        (float("inf"), 0, 255),
        (1.0, 0, 256),
        (1.0, 1, 9),
        (1.0, -9, -1),
        (1.0, 0, 0),
        (1.0, -0.5, 7),
        (1.0, 0, 7.5),
        (1.0, float("nan"), 7),
        (1.0, -float("inf"), 7),
    ],
)
def test_a_grid_that_bytes_do_not_hold_is_refused(grid):
    rows = case(EVERY, 8)[1]
    with pytest.raises(ValueError, match=r"packed_linear: input_grid has a scale of .*want a positive, finite scale"):
        multiply(torch.ones(1, 8), rows, torch.ones(9), torch.zeros(9), torch.tensor(grid))


@needs_extension
@every_grid
def test_all_instruction_sets_give_the_same_bits(which):
    levels, rows = case(EVERY.repeat(3), 601)
    scale, offset, _ = grid_of(rows.bits)
    x, found, before = torch.randn(17, 601), [], None
    for name in isas():
        before = before or set_isa(name)
        set_isa(name)
        found.append(multiply(x, rows, scale, offset, torch.tensor(GRIDS[which])))
    set_isa(before)
    for y in found[1:]:
        assert_same(y, found[0])
    assert_close_to(
        found[0],
        rounded(x, torch.tensor(GRIDS[which])).double() @ weights_of(levels, rows.bits, scale, offset).t(),
        1e-6,
    )
