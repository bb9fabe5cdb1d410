"""Comparisons that can fail; test_checks.py proves that they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgsc.kernels import Op

# Sums of some hundred products in another order differ by a few tens of units in the last place of float32. A level
# that is wrong by one can hide in this where its row has a small scale: one-hot inputs show each level exactly.
OTHER_ORDER = 2.0**-16


def relative_error(actual: Tensor, exact: Tensor, what: str = "") -> float:
    """The largest error as a fraction of the RMS of `exact` (its finite values); 0 for empty tensors.

    Fails at once unless shapes agree and NaN and infinities stand where `exact` has them, and only there.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert exact.dtype == torch.float64, f"{what}: judged against {exact.dtype}; the reference must be float64"
    found = actual.double()
    assert torch.equal(found.isnan(), exact.isnan()), (
        f"{what}: {int(found.isnan().sum())} NaN, expected {int(exact.isnan().sum())}, or elsewhere"
    )
    infinite = exact.isinf() | found.isinf()
    assert torch.equal(found[infinite], exact[infinite]), f"{what}: infinities differ from the expected ones"
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    error = (found[finite] - exact[finite]).abs().max().item()
    if error == 0:
        return 0.0
    largest = exact[finite].abs().max()
    if largest == 0:
        return float("inf")
    return error / (largest * (exact[finite] / largest).square().mean().sqrt()).item()  # tiny values do not underflow


def assert_close_to(
    actual: Tensor, exact: Tensor, allowed: float, what: str = "", dtype: torch.dtype = torch.float32
) -> None:
    """Fail unless `actual` is of `dtype` and its largest error is at most `allowed` of the RMS of `exact`."""
    assert actual.dtype == dtype, f"{what}: dtype {actual.dtype}, expected {dtype}"
    error = relative_error(actual, exact, what)
    assert error <= allowed, f"{what}: error {error:.2e} of the RMS, allowed {allowed:.2e}"


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Fail unless dtype, shape and every bit agree; NaN equals NaN whatever its payload, -0 is not 0."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    differ = _bits(actual) != _bits(expected)
    if differ.any():
        where = tuple(int(i) for i in differ.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} values differ, "
            f"the first at {where}: {actual[where].item()!r}, expected {expected[where].item()!r}"
        )


def assert_agrees(op: Op, arguments: tuple, what: str = "") -> None:
    """Fail unless an operation is at most twice as wrong as plain PyTorch in the same dtype, judged in float64.

    Operations marked exact must equal plain PyTorch bit for bit.
    """
    found, plain = as_list(op(*arguments)), as_list(op.reference(*arguments))
    exact = as_list(op.reference(*map(in_double, arguments)))
    for i, (f, p, e) in enumerate(zip(found, plain, exact, strict=True)):
        name = f"{op.name} {what}, result {i}"
        assert f.is_contiguous(), f"{name}: strides {f.stride()}"
        if op.exact:
            assert_same(f, p, name)
        else:
            assert_close_to(f, e.double(), 2 * relative_error(p, e.double()) + OTHER_ORDER, name, p.dtype)


def as_list(results: Tensor | tuple | list) -> list[Tensor]:
    """What an operation returned, whether one tensor or several."""
    return [results] if isinstance(results, Tensor) else list(results)


def in_double(argument: Any) -> Any:
    """The argument with float64 for every other floating dtype."""
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
        return [in_double(a) for a in argument]
    return argument


def _bits(t: Tensor) -> Tensor:
    if not t.is_floating_point():
        return t
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), torch.full_like(t, float("nan")), t).contiguous().view(integer)
