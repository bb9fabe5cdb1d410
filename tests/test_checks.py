"""The comparisons fail on each kind of wrong answer, and pass on the right one."""

import pytest
import torch

from tests.checks import assert_close_to, assert_same, relative_error

EXACT = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.5, -0.25, 4.0, 1.5]], dtype=torch.float64)
TINY = EXACT * 1e-30
ODD = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 2.0], dtype=torch.float64)


def with_value(value: float) -> torch.Tensor:
    wrong = EXACT.float()
    wrong[1, 2] = value
    return wrong


WRONG = {
    "nan": (with_value(float("nan")), EXACT, "1 NaN, expected 0"),
    "inf": (with_value(float("inf")), EXACT, "infinities differ"),
    "minus-inf": (with_value(-float("inf")), EXACT, "infinities differ"),
    "one-value-off-by-ten-percent": (with_value(4.4), EXACT, "error 1.98e-01 of the RMS"),
    "all-ten-percent-too-large": (1.1 * EXACT.float(), EXACT, "of the RMS"),
    "all-zero": (torch.zeros(2, 4), EXACT, "of the RMS"),
    "all-zero-where-values-are-tiny": (torch.zeros(2, 4), TINY, "of the RMS"),
    "ten-percent-of-tiny-values": (1.1 * TINY.float(), TINY, "of the RMS"),
    "something-where-all-is-zero": (torch.full((2, 4), 1e-30), torch.zeros(2, 4, dtype=torch.float64), "error inf"),
    "shape": (EXACT.float().t(), EXACT, "shape"),
    "broadcastable-shape": (EXACT.float()[None], EXACT, "shape"),
    "dtype": (EXACT, EXACT, "dtype torch.float64, expected torch.float32"),
    "reference-in-float32": (EXACT.float(), EXACT.float(), "must be float64"),
    "number-where-nan-is-expected": (ODD.nan_to_num(0.0, float("inf"), -float("inf")).float(), ODD, "0 NaN"),
    "nan-elsewhere": (ODD.float()[[1, 0, 2, 3, 4]], ODD, "or elsewhere"),
    "infinity-of-the-other-sign": (ODD.float()[[0, 1, 3, 2, 4]], ODD, "infinities differ"),
    "number-where-infinity-is-expected": (ODD.float().clamp(max=9.0), ODD, "infinities differ"),
    "wrong-beside-nan-and-infinity": (ODD.float() * 1.1, ODD, "of the RMS"),
}


@pytest.mark.parametrize(("actual", "exact", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_result_is_not_close(actual, exact, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_to(actual, exact, allowed=1e-3)


@pytest.mark.parametrize("exact", [EXACT, TINY, ODD, torch.zeros(3, dtype=torch.float64), EXACT[:0]])
def test_a_right_result_is_close(exact):
    assert_close_to(exact.float(), exact, allowed=1e-6)
    assert_close_to(exact, exact, allowed=0.0, dtype=torch.float64)


def test_the_error_is_a_fraction_of_the_rms():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact + torch.tensor([0.5, 0.25]), exact) == pytest.approx(0.5 / 12.5**0.5)


SAME = torch.tensor([1.0, 0.0, float("nan"), float("inf"), 1e-30])
DIFFERENT = {
    "nan": (torch.tensor([float("nan"), 0.0, float("nan"), float("inf"), 1e-30]), SAME, r"first at \(0,\): nan"),
    "number-for-nan": (SAME.nan_to_num(0.0, float("inf")), SAME, r"first at \(2,\)"),
    "inf": (SAME.clone().index_fill_(0, torch.tensor(0), float("inf")), SAME, "inf, expected 1.0"),
    "ten-percent": (SAME * 1.1, SAME, "2 of 5 values differ"),
    "one-unit-in-the-last-place": (torch.nextafter(SAME, torch.tensor(2.0)), SAME, "values differ"),
    "sign-of-zero": (torch.tensor([1.0, -0.0, float("nan"), float("inf"), 1e-30]), SAME, "-0.0, expected 0.0"),
    "zero-for-tiny": (torch.tensor([1.0, 0.0, float("nan"), float("inf"), 0.0]), SAME, r"first at \(4,\)"),
    "integers": (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4]), "3, expected 4"),
    "shape": (SAME[None], SAME, "shape"),
    "dtype": (SAME.double(), SAME, "dtype"),
    "dtype-of-integers": (torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.int64), "dtype"),
}


@pytest.mark.parametrize(("actual", "expected", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_a_different_result_is_not_the_same(actual, expected, message):
    with pytest.raises(AssertionError, match=message):
        assert_same(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_the_same_result_is_the_same(dtype):
    one = SAME.nan_to_num(3.0, 5.0).to(dtype) if dtype == torch.uint8 else SAME.to(dtype)
    assert_same(one.clone(), one)
    assert_same(one[:0], one[:0])


def test_nan_equals_nan_whatever_its_bits():
    other = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    assert_same(other, torch.full((2,), float("nan")))


def test_unwritten_memory_reads_as_nan():
    assert torch.empty(3).isnan().all()
    assert torch.ones(2).new_empty(3).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()
