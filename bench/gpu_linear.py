"""`packed_linear` on a GPU: every width, the layers of Llama 3, few and many tokens, against its peers in bfloat16."""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgsc.kernels import OPS, TiledRows, fragments, packed_linear
from tests.checks import in_double

from .gpu_device import Device, Run, Time, judge, part_of_row, race, reason, size_of
from .gpu_peers import CUBLAS, PEERS, ROUNDING, Product
from .peer_problem import MIXED, TRAINED, WIDTHS
from .record import claim

SHAPES = {  # (N, K); the three that are measured in every way, then the rest of Llama 3
    "4096x4096": (4096, 4096),
    "8192x8192": (8192, 8192),
    "8B gate_up": (28672, 4096),
    "8B qkv": (6144, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B gate_up": (57344, 8192),
    "70B down": (8192, 28672),
}
FULL = ("4096x4096", "8192x8192", "8B gate_up")
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
FEW_WIDTHS = (4, MIXED)  # of the other shapes, and of more than one token
JUDGED = 64  # tokens of a result that are compared with float64
MICROSECONDS = {"4096x4096": 5.0, "8192x8192": 12.0}  # of one token at four bits
SHARE = ("8B gate_up", 0.85)  # of the copy's bandwidth, the same
OFF_LINE = 0.15  # of a time proportional to bytes
AHEAD = (16, 64)  # tokens at which no peer may be faster
MANY = (1024, 0.95)  # tokens from which this share of F.linear's speed is asked

VARIANTS = [(shape, m) for shape in ("4096x4096", "8B gate_up") for m in (1, 16, 64, 256, 1024)]  # of the kernels

Case = tuple[str, int, tuple[int | str, ...]]  # shape, tokens, widths


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    shapes: Mapping[str, tuple[int, int]]
    full: Sequence[str]
    tokens: Sequence[int]
    widths: Sequence[int | str]
    few: Sequence[int | str]

    def cases(self) -> Iterator[Case]:
        """The claims' first; peers of a shape are made once for cases that follow one another."""
        for shape in self.full:
            yield shape, 1, tuple(self.widths)
        for shape in self.full:
            for tokens in self.tokens[1:]:
                yield shape, tokens, tuple(self.few)
        for shape in self.shapes:
            if shape not in self.full:
                yield shape, 1, tuple(self.few)


EVERYTHING = Plan(SHAPES, FULL, TOKENS, WIDTHS, FEW_WIDTHS)
LITTLE = Plan({"32x256": (32, 256), "16x128": (16, 128)}, ("32x256",), (1, 17, 257), (3, 4, MIXED), FEW_WIDTHS)

OTHERS = tuple(shape for shape in SHAPES if shape not in FULL)
REST = Plan({shape: SHAPES[shape] for shape in OTHERS}, OTHERS, TOKENS, FEW_WIDTHS, FEW_WIDTHS)
LITTLE_REST = Plan({"16x128": (16, 128)}, ("16x128",), (1, 2), FEW_WIDTHS, (4,))


# ---- layers ----


def widths_of(rows: int, bits: int | str) -> Tensor:
    """(rows,) uint8: all the same, or in the shares of a trained network, shuffled."""
    if bits != MIXED:
        return torch.full((rows,), int(bits), dtype=torch.uint8)
    counts = torch.tensor([float(TRAINED.get(b, 0)) for b in range(9)])
    ends = (counts.cumsum(0) / counts.sum() * rows).round().long()
    ordered = torch.searchsorted(ends, torch.arange(rows), right=True).to(torch.uint8)
    return ordered[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]


def random_tiles(widths: Tensor, width: int, area: int, device: Device, groups: int = 1) -> TiledRows:
    """A layer's run form, of random words: any words are levels, so that nothing needs packing."""
    make = torch.Generator(device.type).manual_seed(len(widths) + width)
    plan, planes = fragments.plan_tiles(widths.to(device.type), fragments.blocks_of(width, area), groups)
    size = fragments.tile_size(len(widths) // groups)
    places = size * (len(plan) // (2 + size))
    shape = (planes * fragments.WORDS,)
    words = torch.randint(-(2**31), 2**31, shape, generator=make, dtype=torch.int32, device=device.type)
    scale = 0.005 + 0.01 * torch.rand(1, places, generator=make, device=device.type)
    return TiledRows(words, plan, scale, len(widths))


def copies_of(tiles: TiledRows, device: Device) -> list[TiledRows]:
    """The layer and its copies, which take turns; the plan and the grid are the same tensors."""
    count = device.copies(size_of(tiles.lines))
    return [tiles, *(tiles._replace(lines=tiles.lines.clone()) for _ in range(count - 1))]


# ---- peers ----


@functools.lru_cache(maxsize=1)
def peers_of(n: int, k: int, device: Device) -> tuple[Tensor, dict[str, list[Product]], dict[str, str]]:
    """The float weight, the copies of each peer, and why the others are missing."""
    make = torch.Generator(device.type).manual_seed(n + k)
    weight = (0.02 * torch.randn(n, k, generator=make, device=device.type)).to(torch.bfloat16)
    found, missing = {}, {}
    for name, (bits, make_peer) in PEERS.items():
        try:
            peer = make_peer(weight)
            count = device.copies(n * k * bits // 8)
            found[name] = [peer, *(copy.deepcopy(peer) for _ in range(count - 1))]
        except Exception as error:
            missing[name] = reason(error)
    return weight, found, missing


def admitted(x: Tensor, sample: Tensor, n: int, k: int, device: Device) -> tuple[dict[str, list[Product]], dict]:
    """Peers whose result is that of their weight, and why the others are missing."""
    weight, found, missing = peers_of(n, k, device)
    exact = x[sample].double() @ weight.double().t()
    right, missing = {}, dict(missing)
    for name, products in found.items():
        try:
            error = float((products[0](x)[sample].double() - exact).norm() / exact.norm())
        except Exception as failed:
            missing[name] = reason(failed)
            continue
        if error <= ROUNDING[PEERS[name][0]]:  # so, NaN is wrong
            right[name] = products
        else:
            missing[name] = f"the result is off by {error:.2g} of its size"
    return right, missing


# ---- the section ----


def measure(run: Run) -> None:
    """Write the section as it grows, case by case, until its time is over."""
    plan = LITTLE if run.quick else EVERYTHING
    measure_plan(run, plan, lambda rows: claims(rows, plan))


def measure_rest(run: Run) -> None:
    """The shapes of which `measure` has one token alone, at every number of tokens; nothing is claimed of them."""
    measure_plan(run, LITTLE_REST if run.quick else REST, lambda rows: [])


@torch.no_grad()
def measure_plan(run: Run, plan: Plan, judged: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Write rows of a plan as they come, and what is claimed of them."""
    rows: list[dict[str, Any]] = []
    for case in plan.cases():
        if run.left() < 0:
            print(f"linear: no time left for {case} and what follows", file=sys.stderr)
            break
        rows += measure_case(run, plan, case)
        run.put(rows, judged(rows))
    peers_of.cache_clear()


def measure_case(run: Run, plan: Plan, case: Case) -> list[dict[str, Any]]:
    """A row a width whose result is right."""
    shape, tokens, widths = case
    n, k = plan.shapes[shape]
    make = torch.Generator(run.device.type).manual_seed(tokens)
    x = torch.randn(tokens, k, generator=make, device=run.device.type).to(torch.bfloat16)
    sample = torch.linspace(0, tokens - 1, min(tokens, JUDGED), device=run.device.type).long()
    products, missing = admitted(x, sample, n, k, run.device)
    contenders = {name: [functools.partial(p, x) for p in copies] for name, copies in products.items()}
    op, layers, errors = OPS["packed_linear"], {}, {}
    for bits in widths:
        layer = random_tiles(widths_of(n, bits), k, 1, run.device)
        arguments = (x[sample], *layer[:3], None, n, k, False)
        plain, exact = op.reference(*arguments), op.reference(*in_double(arguments))
        error, wrong = judge(packed_linear(x, layer, None, k)[sample], plain, exact)
        if wrong:
            run.wrong.append(f"linear {shape}, {bits} bits, {tokens} tokens: {wrong}")
            continue
        name = f"ours {bits}"
        layers[name], errors[name] = (layer, bits), error
        contenders[name] = [functools.partial(packed_linear, x, t, None, k) for t in copies_of(layer, run.device)]
    times, failed = race(run, contenders)
    others = {name: t for name, t in times.items() if name in products}
    rows = []
    for name, (layer, bits) in layers.items():
        moved = size_of(*layer[:3], x) + 2 * tokens * n
        rows.append(
            {"op": "packed_linear", "case": shape, "shape": [n, k], "bits": bits, "tokens": tokens}
            | {"bits_a_weight": 8 * size_of(layer.lines) / (n * k), "error": errors[name]}
            | part_of_row(run, times[name], moved, others, missing | failed)
            | {"teraflops": 2 * tokens * n * k / times[name].median / 1e6}
        )
        say(rows[-1], times[name])
    del contenders
    gc.collect()  # captured graphs keep their memory until then
    return rows


def say(row: Mapping[str, Any], t: Time) -> None:
    """One line on what was measured, for whoever waits."""
    ratios = ", ".join(f"{name} {r:.2f}x" for name, r in row["ratio"].items() if r is not None)
    what = f"{row['case']} {row['bits']} bits M={row['tokens']}"
    print(f"{what}: {t.median:,.2f} µs ({t.eager:,.1f} eager), {row['share_of_copy']:.0%}; {ratios}", file=sys.stderr)


def compile_one(device: Device, index: int) -> None:
    """Run the variant of that number once, so that its kernel lies in Triton's cache."""
    shape, tokens = VARIANTS[index]
    n, k = SHAPES[shape]
    x = torch.ones(tokens, k, dtype=torch.bfloat16, device=device.type)
    packed_linear(x, random_tiles(widths_of(n, 4), k, 1, device), None, k)


# ---- claims ----


def claims(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """All of them, whether or not their rows are there already: a claim without all its rows does not hold."""
    at = {(row["case"], row["tokens"], row["bits"]): row for row in rows}
    found = []
    for shape, most in MICROSECONDS.items():
        text = f"packed_linear, one token, 4 bits, {shape}"
        measured = at[shape, 1, 4]["microseconds"] if (shape, 1, 4) in at else None
        found.append(claim(text, most, measured, "µs", at_most=most))
    shape, least = SHARE
    measured = at[shape, 1, 4]["share_of_copy"] if (shape, 1, 4) in at else None
    text = f"packed_linear, one token, 4 bits, {shape}"
    found.append(claim(text, least, measured, "of the copy's bandwidth", at_least=least))
    for shape in plan.full:
        some = [at[shape, 1, bits] for bits in plan.widths if (shape, 1, bits) in at]
        text, worst = f"packed_linear, one token, every width, {shape}: off a time proportional to bytes", None
        if len(some) == len(plan.widths):
            rate = statistics.median(row["microseconds"] / row["bytes"] for row in some)
            off = {row["bits"]: abs(row["microseconds"] / row["bytes"] / rate - 1) for row in some}
            bits, worst = max(off.items(), key=lambda item: item[1])
            text += f"; worst: {bits if bits == MIXED else f'{bits} bits'}"
        found.append(claim(text, OFF_LINE, worst, "of it", at_most=OFF_LINE))
    for tokens in AHEAD:
        found.append(slowest(at, plan, [tokens], 1.0, list(PEERS), f"{tokens} tokens, against every peer"))
    tokens, least = MANY
    many = [t for t in plan.tokens if t >= tokens]
    found.append(slowest(at, plan, many, least, [CUBLAS], f"{tokens} tokens and more, against {CUBLAS}"))
    return found


def slowest(
    at: Mapping[tuple, Mapping[str, Any]], plan: Plan, tokens: Sequence[int], least: float, names: list[str], text: str
) -> dict[str, Any]:
    """The claim that the least ratio to these peers is at least `least`."""
    wanted = [(shape, m, bits) for shape in plan.full for m in tokens for bits in plan.few]
    ratios = {}
    for key in wanted:
        for name in names:
            value = at[key]["ratio"].get(name) if key in at else None
            if value is not None:
                ratios[key, name] = value
    measured, text = None, f"packed_linear, {text}"
    if wanted and all(any(k == key for k, _ in ratios) for key in wanted):
        ((shape, m, bits), name), measured = min(ratios.items(), key=lambda item: item[1])
        text += f"; worst: {shape}, {bits if bits == MIXED else f'{bits} bits'}, {m} tokens, {name}"
    return claim(text, least, measured, "times as fast", at_least=least)
