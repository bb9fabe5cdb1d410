"""What the GPU bench claims of its rows, and that each claim can fail."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: there is nothing to bench on a GPU")

from bench import gpu_conv2d, gpu_linear, gpu_peers, gpu_training
from bench.kernels import LARGE
from bench.peer_problem import MIXED
from bench.training import FLOAT


def rows_of_linear(change=lambda row: None):
    """All rows of the plan, as fast as every claim wants; `change` may make one worse."""
    rows = []
    for shape, tokens, widths in gpu_linear.EVERYTHING.cases():
        for bits in widths:
            size = 1e6 * (3 if bits == MIXED else bits)
            row = {"case": shape, "tokens": tokens, "bits": bits, "bytes": size, "microseconds": size / 1e6}
            row |= {"share_of_copy": 0.86, "ratio": {gpu_peers.CUBLAS: 1.0, "torch int4": 1.5, "hqq 4 bits": None}}
            change(row)
            rows.append(row)
    return rows


def claims_that_fail(rows):
    return {claim["claim"]: claim for claim in gpu_linear.claims(rows, gpu_linear.EVERYTHING) if not claim["holds"]}


def worse(case, tokens, bits, **changes):
    def change(row):
        if (row["case"], row["tokens"], row["bits"]) == (case, tokens, bits):
            row.update(changes)

    return rows_of_linear(change)


def test_claims_of_linear_hold_where_all_is_well():
    assert claims_that_fail(rows_of_linear()) == {}


@pytest.mark.parametrize(
    ("where", "changes", "said"),
    [
        (("4096x4096", 1, 4), {"microseconds": 5.1, "bytes": 5.1e6}, "one token, 4 bits, 4096x4096"),
        (("8192x8192", 1, 4), {"microseconds": 12.1, "bytes": 12.1e6}, "one token, 4 bits, 8192x8192"),
        (("8B gate_up", 1, 4), {"share_of_copy": 0.84}, "one token, 4 bits, 8B gate_up"),
        (("8192x8192", 1, 3), {"microseconds": 3.5}, "one token, every width, 8192x8192: off .*; worst: 3 bits"),
        (("8B gate_up", 1, MIXED), {"microseconds": 2.5}, "one token, every width, 8B gate_up: off .*; worst: mixed"),
        (("4096x4096", 16, 4), {"ratio": {"a": 2.0, "torch int4": 0.9}}, "16 tokens.*4096x4096, 4 bits.*torch int4"),
        (("8B gate_up", 64, MIXED), {"ratio": {gpu_peers.CUBLAS: 0.99}}, "64 tokens.*8B gate_up, mixed.*F.linear"),
        (("4096x4096", 4096, 4), {"ratio": {gpu_peers.CUBLAS: 0.94}}, "1024 tokens and more.*4096 tokens"),
    ],
)
def test_each_claim_of_linear_can_fail(where, changes, said):
    (text,) = claims_that_fail(worse(*where, **changes))
    assert re.match(f"packed_linear, {said}", text), text


def test_a_claim_without_all_its_rows_does_not_hold():
    for case in [("4096x4096", 1, 4), ("8B gate_up", 1, 7), ("8192x8192", 16, 4), ("8B gate_up", 1024, MIXED)]:
        rows = [row for row in rows_of_linear() if (row["case"], row["tokens"], row["bits"]) != case]
        failed = claims_that_fail(rows)
        assert failed
        assert all(claim["measured"] is None for claim in failed.values())
    assert claims_that_fail(worse("4096x4096", 64, 4, ratio={"torch int4": None}))  # nobody to be ahead of
    failed = claims_that_fail([])
    assert len(failed) == len(gpu_linear.claims([], gpu_linear.EVERYTHING)) == 9


def test_claims_of_the_other_sections_can_fail():
    def passes(**changes):
        rows = [
            {"pass": "forward", "case": LARGE, "share_of_copy": 0.9, "microseconds": 27.0},
            {"pass": "backward", "case": LARGE, "share_of_copy": 0.9, "microseconds": 52.0},
        ]
        rows[1].update(changes)
        return [claim["holds"] for claim in gpu_training.pass_claims(rows)]

    assert passes() == [True, True, True, True]
    assert passes(share_of_copy=0.89) == [True, True, False, True]
    assert passes(microseconds=52.1) == [True, True, True, False]
    assert passes(case="64x576") == [True, True, False, False]

    ratios = dict(zip((FLOAT, *gpu_training.PREPARED), (1.0, 1.05, 1.06), strict=True))
    steps = [{"task": "t", "variant": variant, "over_float": ratio} for variant, ratio in ratios.items()]
    assert [claim["holds"] for claim in gpu_training.step_claims(steps)] == [True, False]

    def layers(batch, *ratios):
        rows = [{"case": str(i), "batch": batch, "ratio": {"a": r, "b": 2.0, "c": None}} for i, r in enumerate(ratios)]
        rows = [row | {"groups": 1} for row in rows] + [rows[0] | {"groups": 2, "case": "apart", "ratio": {"a": 0.1}}]
        return {claim["target"]: claim["holds"] for claim in gpu_conv2d.claims(rows, 1)}

    assert layers(1, 1.0, 1.1) == {1.0: True, 0.9: False}
    assert layers(1, 1.0, 0.99) == {1.0: False, 0.9: False}
    assert layers(32, 0.9, 1.1) == {1.0: False, 0.9: True}
    assert layers(32, 0.95) == {1.0: False, 0.9: False}  # a layer is missing
