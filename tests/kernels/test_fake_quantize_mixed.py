"""A mixture of grids: the sum of the primitive on each, in values and gradients, also where x is infinite."""

from __future__ import annotations

import pytest
import torch

from sgsc.kernels import OPS, extension, fake_quantize, fake_quantize_mixed
from tests.checks import as_list, assert_close_to, assert_same

SHARE = torch.tensor([0.2, 0.5, -0.1, 0.4])
GRIDS = (  # the third is none
    torch.tensor([0.1, 0.3, float("inf"), 0.25]),
    torch.tensor([-8.0, 0.0, 0.0, -3.0]),
    torch.tensor([7.0, 15.0, 0.0, 2.0]),
    torch.tensor([0.0, 0.0, 0.0, 0.5]),
)

needs_extension = pytest.mark.skipif(not extension.LOADED, reason=f"no C++ extension: {extension.WHY}")


def composed(x: torch.Tensor, share: torch.Tensor, *grid: torch.Tensor) -> torch.Tensor:
    """What it stands for, by the primitive and autograd."""
    one_each = [fake_quantize(x.reshape(1, -1), *(v[i : i + 1] for v in grid)) for i in range(len(share))]
    return torch.stack([q.view(x.shape) for q in one_each], -1) @ share


def test_values_and_gradients_are_those_of_the_sum(level):
    make = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 5, 117, generator=make).transpose(0, 2) for _ in range(2))
    found = []
    for of in (fake_quantize_mixed, composed):
        inputs = [t.clone().requires_grad_(i < 5) for i, t in enumerate((x, SHARE, *GRIDS))]
        y = of(*inputs)
        y.backward(grad)
        found.append([y.detach(), *(t.grad for t in inputs[:5])])
    assert found[0][0].shape == x.shape
    for ours, theirs in zip(*found, strict=True):
        assert_close_to(ours, theirs.double(), 1e-5)


def test_one_grid_alone_is_the_primitive(level):
    x = torch.randn(4_099, generator=torch.Generator().manual_seed(1))
    grid = [v[3:] for v in GRIDS]
    arguments = (x, torch.ones(1), *grid)
    assert_same(fake_quantize_mixed(*arguments)[None], fake_quantize(x[None], *grid))
    ours = OPS["fake_quantize_mixed_backward"](x, *arguments)
    theirs = OPS["fake_quantize_backward"](x[None], x[None], *grid)
    assert_same(ours[0], theirs[0][0])
    for one, other in zip(ours[2:], theirs[1:], strict=True):
        assert_same(one, other)


def test_infinity_lies_outside_and_nan_stays(level):
    """Also in the gradient of a share, which is made of sums over what lies inside."""
    x = torch.tensor([float("inf"), -float("inf"), 0.3, 1e30] * 9)
    arguments = (torch.ones(36), x, SHARE, *GRIDS)
    for ours, theirs in zip(
        as_list(OPS["fake_quantize_mixed_backward"](*arguments)),
        as_list(OPS["fake_quantize_mixed_backward"].reference(*arguments)),
        strict=True,
    ):
        assert_close_to(ours, theirs.double(), 1e-5)
    x[5] = float("nan")
    assert fake_quantize_mixed(x, SHARE, *GRIDS).isnan().nonzero().tolist() == [[5]]
    of_shares = OPS["fake_quantize_mixed_backward"](*arguments)[1]
    assert of_shares.isnan().tolist() == [True, True, False, True]  # not of the grid that is none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype, level):
    x = torch.randn(2_000, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert_same(fake_quantize_mixed(x, SHARE, *GRIDS), fake_quantize_mixed(x.float(), SHARE, *GRIDS).to(dtype))


@needs_extension
def test_operands_of_another_dtype_are_named():
    with pytest.raises(ValueError, match=r"fake_quantize_mixed: share is \(4\) Double; want \(4\) Float"):
        fake_quantize_mixed(torch.ones(2), SHARE.double(), *GRIDS)


def test_vectors_that_do_not_fit_each_other_are_refused():
    for place, name in enumerate(("scale", "lo", "hi", "shift")):
        wrong = [v[:3] if i == place else v for i, v in enumerate(GRIDS)]
        with pytest.raises(ValueError, match=rf"fake_quantize_mixed: {name} has shape \(3,\) and share \(4,\)"):
            fake_quantize_mixed(torch.ones(2), SHARE, *wrong)
    with pytest.raises(ValueError, match=r"one value a grid"):
        fake_quantize_mixed(torch.ones(2), SHARE[None], *GRIDS)
