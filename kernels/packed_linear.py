"""y = x W^T + bias from tiles of packed rows; the width differs from row to row, removed rows give the bias alone.

    x       (..., K)  float32, bfloat16 or float16    lines, plan, grid   as in tiling.py
    bias    (C,)  dtype of x, or None                 rows, width   C and K          y   (..., C)  dtype of x
    input_grid  (3 + C,) float32 as in input_grid.py, or None

Two numerics:

    exact   float activations and float32 sums. Of each implementation the error against float64 is bounded by that of
            any order of summation: |y - exact| <= K * 2^-23 * sum_k |w_k x_k|, plus one rounding to the dtype of y.
    int8    each row of x (a token) is rounded to 8 bits on the fly, symmetric, with its own step = max |x| / 127 (at
            least 2^-126, a normal number); sums of levels are exact integers. |y - exact| <= step / 2 * sum_k |w_k|,
            beside the rounding of floats; for normal x about 1 % of y's RMS at any width. A token that holds NaN or
            infinity gives NaN. Rows wider than 2^15 levels, whose sums could leave 32 bits, are computed in exact
            numerics.

With an input_grid x stands for q, its values on the grid:

    exact   x is rounded to q, in its own dtype, and the product is the exact one.
    int8    no pass over x to measure: sums of codes and levels are exact integers, and what is left of the error is the
            rounding of floats, whatever K: |y - exact| <= 2^-21 * sum_k (level_k + |offset|) * scale * |q_k|, plus one
            rounding of the product and one of its sum with the bias to the dtype of y. q is not rounded to the dtype of
            x. Infinity becomes an end of the grid; a token that holds NaN gives NaN. Rows wider than 2^14 levels are
            computed in exact numerics. On a GPU all are.

Floor at M = 1: the bytes of the tiles, b/8 a weight. At large M: 2 * M * C * K operations, of which a core does four
times as many on int8 as on floats. Ratios against the peers are in bench/results/cpu_peers.json.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .input_grid import WIDEST_STATIC, check_grid, codes_on, on_grid, with_sums
from .op import Op
from .packing import case, shapes
from .run_form import TiledRows, tile_rows, tiled_weight
from .tiling import row_bits

NUMERICS = ("exact", "int8")
WIDEST = 2**15  # levels whose sum of products with codes fits 32 bits


def quantize_tokens(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes -127 .. 127 of x, as floats, and their step: one a slice over `dims`, which keep a size of 1.

    The arithmetic is float32, whatever the dtype of x: an implementation in other arithmetic may round a value that
    lies at a tie to the code beside. Where a slice is not finite the step is NaN and the codes are 0.
    """
    x = x.float()
    largest = x.abs().amax(dims, keepdim=True) if x.numel() else x.new_zeros([])
    finite = largest.isfinite()
    inverse = (torch.full_like(largest, 127) / largest).clamp_max(2.0**126)  # 127 / t would be 127 * (1 / t)
    codes = torch.where(finite, (torch.where(finite, x, 0.0) * inverse).round(), 0.0)
    return codes, torch.where(finite, 1 / inverse, torch.nan)


def check(x: Tensor, width: int) -> None:
    """What every implementation refuses.

    Raises:
        ValueError: If the last dimension of x is not `width`.
    """
    if not x.dim() or x.shape[-1] != width:
        raise ValueError(f"packed_linear: x is {tuple(x.shape)}; want (..., {width}), the layer's input features")


def _fake(x, lines, plan, grid, bias, rows, width, int8, input_grid=None):
    check(x, width)
    check_grid("packed_linear", input_grid, rows)
    return x.new_empty(*x.shape[:-1], rows)


def reference(
    x: Tensor,
    lines: Tensor,
    plan: Tensor,
    grid: Tensor,
    bias: Tensor | None,
    rows: int,
    width: int,
    int8: bool,
    input_grid: Tensor | None = None,
) -> Tensor:
    """The meaning: dequantize, then torch's own linear.

    Raises:
        ValueError: If the last dimension of x is not K, or `input_grid` has another shape.
    """
    check(x, width)
    check_grid("packed_linear", input_grid, rows)
    tiles = (lines, plan, grid, rows, width, 1)
    if int8 and width <= (WIDEST if input_grid is None else WIDEST_STATIC):
        weight, live = tiled_weight(*tiles, torch.float64)
        codes, step = quantize_tokens(x, (-1,)) if input_grid is None else codes_on(x, input_grid, (-1,))
        y = (codes.double() @ weight.t() * step).to(x.dtype)
        y = y if bias is None else y + bias
    else:
        x = x if input_grid is None else on_grid(x, input_grid)
        weight, live = tiled_weight(*tiles, x.dtype)
        y = F.linear(x, weight, bias)
    alone = torch.zeros_like(y) if bias is None else bias.to(y.dtype)
    return torch.where(live, y, alone)  # also where x is not finite


def grid(bits: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, offset and bias for rows of these widths, for cases."""
    make = torch.Generator().manual_seed(seed)
    scale = 0.01 + torch.rand(len(bits), generator=make)
    return scale, -torch.exp2(bits.float() - 1), torch.randn(len(bits), generator=make)


def _case(
    bits: Tensor,
    width: int,
    rows: int,
    dtype: torch.dtype = torch.float32,
    with_bias: bool = True,
    int8: bool = False,
    shift: float = 0.0,
    codes: tuple[int, int] | None = None,
) -> tuple:
    scale, offset, bias = grid(bits)
    packed = case(bits, width)[1]
    tiles = tile_rows(packed, scale, offset + shift)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    static = with_sums(static_grid(codes), packed) if codes else None
    return x, *tiles[:3], bias.to(dtype) if with_bias else None, tiles.rows, width, int8, static


UNSIGNED, SIGNED, SKEW, FOUR_BITS = (0, 255), (-128, 127), (-37, 218), (0, 15)
# What cases come in, by name: int8, and the ends of a grid of x. "static" is int8 on a grid.
FORMS = {"exact": (False, None), "int8": (True, None), "static": (True, SKEW)}


def static_grid(codes: tuple[int, int]) -> Tensor:
    """(3,) of a grid that about a hundredth of normal values exceed, for cases."""
    return torch.tensor([2.5 / max(-codes[0], codes[1]), *map(float, codes)])


def cases() -> dict[str, tuple]:
    """All edges of packing, for one row of x and for several, the dtypes, both numerics, and grids of x."""
    found = {}
    every = shapes()["every-width-one-past-a-group"]
    for form, (int8, codes) in FORMS.items():

        def of(*arguments, int8: bool = int8, codes: tuple[int, int] | None = codes, **options) -> tuple:
            return _case(*arguments, int8=int8, codes=codes, **options)

        one = {f"{name}-{rows}-rows": of(*shape, rows) for name, shape in shapes().items() for rows in (1, 3, 17)}
        # long sums must not drift, and the panels of many tokens have an end
        one["deployment-depth"] = of(shapes()["every-width"][0], 4_096, 17)
        one["no-rows-of-x"] = of(*every, 0)
        one["no-bias"] = of(*every, 2, with_bias=False)
        one["bfloat16"] = of(*every, 5, torch.bfloat16)
        one["float16"] = of(*every, 5, torch.float16)
        one["half-steps"] = of(*every, 5, shift=0.5)
        one["any-offset"] = of(*every, 18, shift=0.123)
        one["offset-far-away"] = of(*every, 2, shift=30_000.25)
        odd = of(*every, 3)
        odd[0][0, 3], odd[0][1, 24], odd[0][2, 0] = float("nan"), float("inf"), -float("inf")
        one["nan-and-infinity"] = odd
        tiny = of(*every, 4)
        tiny[0][0], tiny[0][1], tiny[0][2] = 0.0, 1e-40, 1e30
        one["zeros-tiny-and-huge"] = tiny
        of_rank = of(*every, 6)
        one["x-of-rank-one"] = (of_rank[0][0], *of_rank[1:])
        one["x-of-rank-four"] = (of_rank[0].view(3, 1, 2, -1), *of_rank[1:])
        wide = of(*shapes()["wider-than-a-block"], 4)
        one["x-not-contiguous"] = (wide[0].t().contiguous().t(), *wide[1:])
        found |= {f"{form}-{name}": arguments for name, arguments in one.items()}
    extreme = _case(torch.full((16,), 8, dtype=torch.uint8), WIDEST, 2, int8=True)
    extreme[0].fill_(1.0)
    extreme[1].fill_(255)  # the largest sum that can be: no accumulator may wrap or saturate
    found["int8-every-level-and-token-at-its-end"] = extreme
    found["int8-too-wide"] = _case(torch.tensor([3], dtype=torch.uint8), WIDEST + 1, 2, int8=True)
    extreme = _case(torch.full((16,), 8, dtype=torch.uint8), WIDEST_STATIC, 2, int8=True, codes=UNSIGNED)
    extreme[0].fill_(9.0)
    extreme[1].fill_(255)
    extreme[8][3:] = 255 * WIDEST_STATIC
    found["static-every-level-and-code-at-its-end"] = extreme
    three = torch.tensor([3], dtype=torch.uint8)
    found["static-too-wide"] = _case(three, WIDEST_STATIC + 1, 2, int8=True, codes=SKEW)
    for name, codes in {"unsigned": UNSIGNED, "signed": SIGNED, "four-bits": FOUR_BITS, "two-codes": (-1, 0)}.items():
        found[f"static-{name}"] = _case(*every, 17, int8=True, codes=codes)
    ties = _case(*every, 5, int8=True, codes=SKEW)
    ties[8][0] = 0.3  # halves of a step that is no power of two
    ties[0].copy_((torch.arange(ties[0].numel()).view_as(ties[0]) % 41 - 20) / 2 * ties[8][0])
    found["static-every-value-a-tie"] = ties
    found["static-exact"] = _case(*every, 17, codes=SKEW)
    found["static-exact-bfloat16"] = _case(*every, 5, torch.bfloat16, codes=UNSIGNED)
    found["static-exact-ties"] = (*ties[:7], False, ties[8])
    return found


def bench_cases() -> dict[str, tuple]:
    """Deployment sizes at one width and at a mixed histogram, in both numerics and, as after a ReLU, on a grid."""
    mixed = torch.tensor([0, 2, 3, 3, 4, 4, 5, 8], dtype=torch.uint8)
    four = torch.tensor([4], dtype=torch.uint8)
    return {
        f"{n}x{n}-{name}-M{m}-{form}": _case(bits.repeat(n // len(bits)), n, m, int8=int8, codes=codes and UNSIGNED)
        for n in (512, 4096)
        for name, bits in (("4bit", four), ("mixed", mixed))
        for m in (1, 16, 128)
        for form, (int8, codes) in FORMS.items()
    }


OP = Op(
    name="packed_linear",
    schema="(Tensor x, Tensor lines, Tensor plan, Tensor grid, Tensor? bias, int rows, int width, bool int8,"
    " Tensor? input_grid=None) -> Tensor",
    reference=reference,
    fake=_fake,
    cases=cases,
    bench_cases=bench_cases,
    traffic=lambda x, lines, *rest: lines.numel() + x.element_size() * (x.numel() + x.shape[:-1].numel() * rest[3]),
    operations=lambda x, lines, plan, *_: 2 * x.numel() * int((row_bits(plan) > 0).sum()),
)


def packed_linear(
    x: Tensor, tiles: TiledRows, bias: Tensor | None, width: int, int8: bool = False, input_grid: Tensor | None = None
) -> Tensor:
    """`torch.nn.functional.linear` with packed weights; x is (..., K), the result (..., C).

    Args:
        x: Activations.
        tiles: The weights, C rows of K levels, as `tile_rows` made them.
        bias: (C,), or None.
        width: K.
        int8: Round each token to 8 bits on the fly, instead of exact numerics; see the module's docstring.
        input_grid: (3 + C,), a grid for x that is known beforehand, as input_grid.py says.

    Raises:
        ValueError: If the last dimension of x is not K, or `input_grid` is none.
    """
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)  # as under autocast
    # the operation checks x: looking at a shape here takes a tenth of a small call
    return OP(x, tiles.lines, tiles.plan, tiles.grid, bias, tiles.rows, width, int8, input_grid)
