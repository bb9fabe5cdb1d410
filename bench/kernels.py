"""The CPU operators against what a user would take instead, all in one process, taking turns.

    fake_quantize   forward, and forward + backward, against the same formula in eager PyTorch under autograd, the same
                    with a hand-written backward, `torch.compile` of the formula, and torch's own learnable quantizer;
                    and against its floor, a copy of the same bytes into memory that is there, past the caches
    packed          every other operation on its bench cases, against torch on float weights ("float") and against
                    the operation's reference in plain PyTorch ("reference": it dequantizes for each call)

A row is written only for a result that was judged against float64 in the same run. Ratios are peer time over ours:
below 1 the peer is faster. Float weights of 4096 x 4096 are larger than most caches, and as the peers take turns with
us they push the packed weights out between our calls.

python -m bench.kernels [--quick --results FOLDER]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sgsc.kernels import OPS, backend, extension, fake_quantize
from sgsc.kernels.packed_conv2d import slides
from sgsc.kernels.packing import dequantize
from sgsc.kernels.run_form import tiled_weight
from sgsc.kernels.tiling import row_bits
from sgsc.measure import copy_bandwidth, interleaved
from tests.checks import assert_agrees, in_double

from .record import claim, options, write

BUDGET = 0.5  # seconds that the fastest of a comparison is measured for, at least
SMALL = "64x576"  # the case of a quick run
LARGE = "4096x4096"  # the case that the claims speak of
COMPILER = "inductor"
AUTOGRAD, BY_HAND, COMPILED, LEARNABLE = "eager, autograd", "eager, hand-written backward", "torch.compile", "learnable"
# What forward + backward must bring at least, against the eager formula and against torch.compile, and how far from the
# floor it may be: past the caches at LARGE; elsewhere the calls themselves count.
TARGETS = {LARGE: (30.0, 4.0)}
TARGETS_ELSEWHERE = (3.0, 1.0)
NEAR_FLOOR = 1.25
LONGEST_REASON = 200  # characters of why a peer is missing
STRAY = 1e-5  # share of the elements that float32 may round to the other side of a tie than float64

Quantize = Callable[..., Tensor]  # (x, scale, lo, hi, shift) -> q
Runs = dict[str, Callable[[], Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write both sections of cpu_kernels.json."""
    chosen = options(arguments, "The CPU operators against what a user would take instead.")
    budget = 0.0 if chosen.quick else BUDGET
    copy = copy_bandwidth(budget)
    for section, measure in (("fake_quantize", measure_fake_quantize), ("packed", measure_packed)):
        rows, claims = measure(budget, copy, chosen.quick)
        path = write("cpu_kernels", section, rows, claims, "python -m bench.kernels", chosen.results)
        print(f"wrote {len(rows)} rows and {len(claims)} claims of {section} to {path}", file=sys.stderr)
    return 0


def compare(runs: Runs, budget: float, traffic: int, copy: float, missing: Mapping[str, str]) -> dict[str, Any]:
    """Medians of `runs`, of which the one called "ours" is compared with each other; the measured part of a row."""
    times = interleaved(runs, budget)
    median = {name: statistics.median(t) * 1e6 for name, t in times.items()}
    ours = median.pop("ours")
    return {
        "bytes": traffic,
        "microseconds": ours,
        "fastest_microseconds": min(times["ours"]) * 1e6,
        "rounds": len(times["ours"]),
        "share_of_copy": traffic / (ours * 1e-6) / copy,
        "copy_gigabytes_per_second": copy / 1e9,
        "peer_microseconds": median | dict.fromkeys(missing),
        "ratio": {name: t / ours for name, t in median.items()} | dict.fromkeys(missing),
        "missing": dict(missing),
    }


# ---- fake_quantize ----


def formula(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
    """What kernels/fake_quantize.py states, as one writes it without an operator of one's own: autograd does it."""
    s, low, high, z = (t[:, None] for t in (scale, lo, hi, shift))
    v = torch.minimum(torch.maximum(x / s - z, low), high)
    code = v + (v.round() - v).detach()
    return torch.where(high > low, (code + z) * s, 0.0)


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return OPS["fake_quantize"].reference(*tensors)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *OPS["fake_quantize_backward"].reference(grad, *ctx.saved_tensors), None


def peers(arguments: tuple[Tensor, ...]) -> dict[str, Quantize]:
    """Everyone who computes the same from (x, scale, lo, hi, shift), for arguments with one range for all rows."""
    low, high = int(arguments[2][0]), int(arguments[3][0])
    torch._dynamo.reset()  # each shape is compiled for itself

    def learnable(x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor, shift: Tensor) -> Tensor:
        return torch._fake_quantize_learnable_per_channel_affine(x, scale, shift, 0, low, high, 1.0)

    return {
        AUTOGRAD: formula,
        BY_HAND: _ByHand.apply,
        COMPILED: torch.compile(formula, dynamic=False, fullgraph=True, backend=COMPILER),
        LEARNABLE: learnable,
    }


def learnable_gradients(grad: Tensor, x: Tensor, scale: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and scale by the formula of torch's quantizer: inside is what rounds into the range, not what lies in it."""
    s, low, high = (t[:, None] for t in (scale, lo, hi))
    v = x / s
    code = v.round()
    inside = (code >= low) & (code <= high)
    slope = torch.where(inside, code - v, torch.minimum(torch.maximum(code, low), high))
    return torch.where(inside, grad, 0.0), (grad * slope).sum(1)


def same(found: Sequence[Tensor | None], exact: Sequence[Tensor]) -> bool:
    """Whether float32 results are those of float64, but for the few elements that lie on a tie."""
    for f, e in zip(found, exact, strict=False):  # a forward alone has one result
        if f is None:  # a gradient that this peer has not
            continue
        near = (f - e).abs() <= 1e-4 * e.abs().max() if f.shape == e.shape else torch.zeros_like(e)
        if near.numel() - int(near.sum()) > STRAY * e.numel() + 1:  # counted so, NaN is wrong
            return False
    return True


def measure_fake_quantize(budget: float, copy: float, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and claims of the section "fake_quantize".

    Raises:
        ValueError: If our own result is wrong.
    """
    rows = []
    for case, arguments in OPS["fake_quantize"].bench_cases().items():
        if quick and case != SMALL:
            continue
        leaves = [t.clone().requires_grad_() for t in arguments[:4]]
        upstream = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(3))
        candidates: dict[str, Quantize] = {"ours": fake_quantize, **peers(arguments)}

        @torch.no_grad()
        def forward(quantize: Quantize, arguments: tuple[Tensor, ...] = arguments) -> tuple[Tensor]:
            return (quantize(*arguments),)

        def both(quantize: Quantize, leaves=leaves, upstream=upstream, shift=arguments[4]) -> tuple[Tensor | None, ...]:
            q = quantize(*leaves, shift)
            return q, *torch.autograd.grad(q, leaves, upstream, allow_unused=True)

        exact = [OPS["fake_quantize"].reference(*in_double(arguments))]
        exact += OPS["fake_quantize_backward"].reference(*in_double((upstream, *arguments)))
        theirs = [exact[0], *learnable_gradients(*in_double((upstream, *arguments[:4]))), *exact[3:]]
        exact_of = {name: theirs if name == LEARNABLE else exact for name in candidates}
        traffic = OPS["fake_quantize"].traffic(*arguments)
        round_trip = traffic + OPS["fake_quantize_backward"].traffic(upstream, *arguments)
        for name, call, moved in (("forward", forward, traffic), ("forward + backward", both, round_trip)):
            runs, missing = admit(candidates, call, exact_of)
            if "ours" in missing:
                raise ValueError(f"fake_quantize, {case}, {name}: {missing['ours']}; no speed is written for it")
            row = {"op": "fake_quantize", "case": case, "pass": name, "backend": backend(OPS["fake_quantize"])}
            row |= compare(runs, budget, moved, copy, missing)
            if extension.LOADED:
                row |= over_floor(runs["ours"], floor(name, arguments[0], upstream), budget)
            rows.append(row)
            say(rows[-1])
    return rows, fake_quantize_claims(rows)


def floor(name: str, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """The least that the pass called `name` must move, into memory that is there, on pages as ours, past the caches."""
    q, gradient = torch.ops.sgsc._uninitialised(x), torch.ops.sgsc._uninitialised(x)

    def forward() -> None:
        torch.ops.sgsc._stream(x, None, q)

    def both() -> None:
        torch.ops.sgsc._stream(x, None, q)
        torch.ops.sgsc._stream(upstream, x, gradient)

    return forward if name == "forward" else both


def over_floor(ours: Callable[[], Any], least: Callable[[], None], budget: float) -> dict[str, float]:
    """Ours and the floor, taking turns by themselves: peers would leave the caches to one of the two."""
    times = interleaved({"ours": ours, "floor": least}, budget)
    median = {name: statistics.median(t) for name, t in times.items()}
    return {"floor_microseconds": median["floor"] * 1e6, "over_floor": median["ours"] / median["floor"]}


def admit(
    candidates: Mapping[str, Quantize],
    call: Callable[[Quantize], Sequence[Tensor | None]],
    exact: Mapping[str, Sequence[Tensor]],
) -> tuple[Runs, dict[str, str]]:
    """Who may be timed: those whose result is right; and of the others, why not."""
    runs: Runs = {}
    missing = {}
    for name, quantize in candidates.items():
        try:
            right = same(call(quantize), exact[name])
        except Exception as error:  # a peer may fail in any way, such as torch.compile without a compiler: noted
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST_REASON]
            continue
        if right:
            runs[name] = lambda quantize=quantize: call(quantize)
        else:
            missing[name] = "the result differs from float64"
    return runs, missing


def fake_quantize_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of forward + backward at the largest shape that was measured."""
    last = [row for row in rows if row["pass"] == "forward + backward"][-1]
    what = f"fake_quantize, forward + backward at {last['case']}"
    eager, compiled = TARGETS.get(last["case"], TARGETS_ELSEWHERE)
    claims = [
        claim(f"{what}, against the eager formula", eager, last["ratio"][AUTOGRAD], "times as fast", at_least=eager),
        claim(f"{what}, against torch.compile", compiled, last["ratio"][COMPILED], "times as fast", at_least=compiled),
    ]
    if last["case"] in TARGETS:
        text = f"{what}, against copies of the same bytes past the caches"
        claims.append(claim(text, NEAR_FLOOR, last.get("over_floor"), "times the time", at_most=NEAR_FLOOR))
    return claims


# ---- packed operations ----


def float_form(name: str, arguments: tuple) -> Callable[[], Tensor] | None:
    """torch's own operation on weights that were dequantized beforehand; None where it has no such operation."""
    if name == "packed_linear":
        x, *tiles, bias, rows, width, _, _ = arguments
        weight = tiled_weight(*tiles, rows, width, 1, x.dtype)[0]
        return lambda: F.linear(x, weight, bias)
    if name == "packed_conv2d":
        x, *tiles, bias, rows, kernel, stride, padding, dilation, groups, _, _ = arguments
        inputs, taps = x.shape[1] // groups, kernel[0] * kernel[1]
        area = 1 if slides(x.shape[1], groups) else taps
        weight = tiled_weight(*tiles, rows, inputs * taps, area, x.dtype)[0].view(rows, inputs, *kernel)
        return lambda: F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if name == "packed_embedding":
        index, data, bits, starts, scale, offset, width = arguments
        table = dequantize(data, bits, starts, scale, offset, width, torch.float32)
        return lambda: F.embedding(index, table)
    return None


def bits_of(name: str, arguments: tuple) -> Tensor:
    """Bits of each row among the arguments of a packed operation; of a product, of the tile that holds it."""
    if name in ("packed_linear", "packed_conv2d"):
        return row_bits(arguments[2])
    return arguments[2 if name == "packed_embedding" else 1]


def measure_packed(budget: float, copy: float, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and claims of the section "packed": every operation but the quantizers."""
    rows = []
    for name, op in OPS.items():
        if name.startswith("fake_quantize"):
            continue
        cases = dict(list(op.cases().items())[:2]) if quick else op.bench_cases()
        for case, arguments in cases.items():
            assert_agrees(op, arguments, case)
            runs: Runs = {"ours": lambda op=op, a=arguments: op(*a)}
            as_float = float_form(name, arguments)
            if as_float is not None:
                runs["float"] = as_float
            runs["reference"] = lambda op=op, a=arguments: op.reference(*a)
            counts = torch.bincount(bits_of(name, arguments).long(), minlength=9).tolist()
            row = {
                "op": name,
                "case": case,
                "batch": arguments[0].shape[0] if name.startswith("packed_") else None,
                "channels_by_bits": {str(b): n for b, n in enumerate(counts) if n},
                "backend": backend(op),
                **compare(runs, budget, op.traffic(*arguments), copy, {}),
            }
            row["gigaoperations_per_second"] = op.operations(*arguments) / row["microseconds"] / 1e3
            rows.append(row)
            say(row)
    return rows, packed_claims(rows)


def packed_claims(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """That a packed operation is worth having at all: at no bench case slower than unpacking for each call."""
    claims = []
    for op in dict.fromkeys(row["op"] for row in rows if row["op"].startswith("packed_")):
        worst = min((row for row in rows if row["op"] == op), key=lambda row: row["ratio"]["reference"])
        text = f"{op}, worst case, against dequantizing for each call"
        claims.append(claim(text, 1.0, worst["ratio"]["reference"], "times as fast", at_least=1.0))
    return claims


def say(row: Mapping[str, Any]) -> None:
    """One line on what was measured, for whoever waits."""
    ratios = ", ".join(f"{name} {'missing' if r is None else f'{r:.2f}x'}" for name, r in row["ratio"].items())
    what = " ".join(row[key] for key in ("op", "case", "pass") if key in row)
    print(f"{what}: {row['microseconds']:,.1f} µs, {row['share_of_copy']:.0%} of copy; {ratios}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
