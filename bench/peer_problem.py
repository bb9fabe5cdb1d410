"""The problem that every peer is given, y = x W^T with W in few bits, what a candidate is, and our own candidates.

exact      float32 activations and sums             int8   activations quantized on the fly, per row or per block
bfloat16   bfloat16 activations and result
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT, INT8, BFLOAT16 = "exact", "int8", "bfloat16"
MIXED = "mixed"
READ = "read"  # no product at all: how fast memory can be read
WIDTHS = (*range(1, 9), MIXED)
# Channels by width in the linear layers of char-lm after `sgsc compress char-lm --target-size 0.1 --seed 0`; those that
# were removed are cut out of a packed network
TRAINED = {1: 181, 2: 658, 3: 1212, 4: 377, 5: 140, 6: 17}
CACHED = 8 << 20  # float32 bytes of a matrix up to which its layer is measured from the caches, where small layers live
FROM_MEMORY = 96 << 20  # bytes that push everything else out of the caches
PERIOD = 512  # rows after which W repeats: its values cost no time, and slow quantizers see few rows
CHECKED = 256  # output channels that a result is checked on

Call = Callable[[int, int], Any]  # (copy, rows of x) -> result
Make = Callable[[], "Candidate"]


@dataclass(frozen=True)
class Candidate:
    """One way to compute the product.

    Attributes:
        bits: Of a weight's code, MIXED or READ.
        numerics: EXACT, INT8, BFLOAT16 or READ.
        bytes: Of the packed weight with its scales.
        call: (copy, rows) -> result; copies are numbered without end.
        weight: (checked channels, K), what the candidate's own bits stand for.
        fetch: The result as a tensor.
    """

    bits: int | str
    numerics: str
    bytes: int
    call: Call
    weight: Tensor
    fetch: Callable[[Any], Tensor] = torch.as_tensor


class Problem:
    """W (n, k) and x (most, k), the same in every process, and what the libraries need of them."""

    def __init__(self, n: int, k: int, threads: int, most: int) -> None:
        make = torch.Generator().manual_seed(0)
        self.n, self.k, self.threads = n, k, threads
        self.weight = (
            (0.02 * torch.randn(min(n, PERIOD), k, generator=make)).repeat(-(-n // PERIOD), 1)[:n].contiguous()
        )
        self.x = torch.randn(most, k, generator=make)
        self.channels = torch.linspace(0, n - 1, min(n, CHECKED)).long()
        self.cached = self.is_cached(n, k)
        self.rows = functools.cache(self._rows)
        self.quantize = functools.cache(self._quantize)

    @staticmethod
    def is_cached(n: int, k: int) -> bool:
        """Whether a shape is small enough to be measured from the caches."""
        return 4 * n * k <= CACHED

    def _rows(self, m: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.x[:m].to(dtype).contiguous()

    def copies(self, size: float) -> int:
        """How many copies of a weight take turns, so that large ones come from memory."""
        return 1 if self.cached else min(4, max(2, -(-FROM_MEMORY // int(size))))

    def repeat(self, t: Tensor) -> list[Tensor]:
        """`t` and its copies."""
        return [t, *(t.clone() for _ in range(self.copies(t.numel() * t.element_size()) - 1))]

    def widths(self, bits: int | str) -> Tensor:
        """(n,) uint8 width of each row."""
        if bits != MIXED:
            return torch.full((self.n,), int(bits), dtype=torch.uint8)
        counts = torch.tensor([float(TRAINED.get(b, 0)) for b in range(9)])
        share = (counts.cumsum(0) / counts.sum() * self.n).round().long()
        ordered = torch.searchsorted(share, torch.arange(self.n), right=True)
        return ordered[torch.randperm(self.n, generator=torch.Generator().manual_seed(1))].to(torch.uint8)

    def _quantize(self, bits: int | str, group: int | None = None) -> tuple[Tensor, ...]:
        """Levels (n, k) uint8, scale (n, groups) and offset (n, groups): (level + offset) * scale; 1 bit: sign."""
        some = self.n if bits == MIXED else min(self.n, PERIOD)
        w = self.weight[:some].view(some, -1, group or self.k)
        half = torch.exp2(self.widths(bits)[:some].float() - 1)[:, None, None]
        sign = half == 1
        scale = torch.where(sign, 2 * w.abs().mean(-1, keepdim=True), w.abs().amax(-1, keepdim=True) / half)
        offset = torch.where(sign, -0.5, -half).expand_as(scale)
        levels = (w / scale - offset).round_().clamp_(min=0).minimum(2 * half - 1).to(torch.uint8)
        found = (t.flatten(1).repeat(-(-self.n // some), 1)[: self.n].contiguous() for t in (levels, scale, offset))
        return tuple(found)

    def signed(self, bits: int, group: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (n, k) int8, scale (n, groups), and the weight of the checked channels; 2 bits or more."""
        levels, scale, _ = self.quantize(bits, group)
        return (levels.int() - 2 ** (bits - 1)).to(torch.int8), scale, self.dequantized(bits, group)

    def dequantized(self, bits: int | str, group: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(checked channels, K) of `quantize`, with scales rounded to `dtype`."""
        levels, scale, offset = (t[self.channels] for t in self.quantize(bits, group))
        values = levels.double().unflatten(1, (scale.shape[1], -1)) + offset[..., None].double()
        return (values * scale.to(dtype).double()[..., None]).flatten(1)

    def bytes_of(self, levels: Tensor, bits: int) -> Tensor:
        """Levels several a byte, the first lowest: (n, k * bits / 8) uint8."""
        parts = levels.view(self.n, -1, 8 // bits)
        return sum(parts[..., j] << bits * j for j in range(8 // bits)).contiguous()


def ours(p: Problem) -> Iterator[tuple[str, Make]]:
    """PackedLinear, in each width and in a trained network's mixture; and plain reading, to compare with."""
    from sgsc.kernels import PackedRows, pack
    from sgsc.packed import PackedLinear

    packed = functools.cache(lambda bits: pack(p.quantize(bits)[0], p.widths(bits)))

    def layer(bits: int | str, numerics: str) -> Candidate:
        rows = packed(bits)
        scale, offset = (t[:, 0].contiguous() for t in p.quantize(bits)[1:])
        layers = [PackedLinear(PackedRows(d, rows.bits, p.k), scale, offset, None).eval() for d in p.repeat(rows.data)]
        for one in layers:
            one.numerics = numerics
        size = rows.data.numel() + 8 * p.n
        call = lambda copy, m: layers[copy % len(layers)](p.rows(m))  # noqa: E731
        return Candidate(bits, numerics, size, call, p.dequantized(bits))

    for numerics in (INT8, EXACT):
        for bits in WIDTHS:
            yield f"{bits} {numerics}", functools.partial(layer, bits, numerics)

    def read() -> Candidate:
        buffer = torch.ones(FROM_MEMORY // 4)
        return Candidate(READ, READ, FROM_MEMORY, lambda copy, m: buffer.sum(), torch.empty(0))

    yield "sum of a buffer", read
