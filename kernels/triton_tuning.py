"""Finding the fastest configuration of a packed product, on the GPU where it is to run.

The search starts from the heuristic and changes one field at a time to its neighbours, as long as that gains: a tenth
of all combinations, each of which has to be compiled. A candidate is timed only once its results agree with the
heuristic's, and kept only where it gains more than noise could.

Three choices stay as they are written. Depthwise products have other fields (`Sliding`), and none of them changes the
bytes of x and y that bind. Where a dense copy of the weights pays (DENSE, DENSE_PIXELS) is one number for all layers,
between times that are mostly cuBLAS's and cuDNN's; whether to start early (EARLY) shows between kernels only, and a
product is timed here among copies of itself. bench/gpu.sh times each of the latter on both sides of the choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from . import triton_packed
from .triton_configuration import Config, Gpu, ceil_div, gpu
from .triton_tables import VALUES, Key, allowed, answering

ROUNDS = 3  # over all fields
REPEATS = 2  # more times that the heuristic and the fastest are timed, in turns
GAIN = 0.02  # of the time: less may be noise
MOST_COPIES = 1_024  # of the words: a network of layers so small stays in the L2 cache too
LEAST_PRODUCTS = 16  # a graph: what a replay costs by itself must not show
REPLAYS = 9

Run = Callable[[Tensor], Tensor]


class Outcome(NamedTuple):
    """What tuning one product found.

    Attributes:
        key: Of the product.
        config: The configuration to use, or None where the heuristic's is as good.
        heuristic, seconds: Times of a product by the heuristic and by the fastest configuration.
        tried, failed: Configurations timed; those that gave a wrong result, or none.
    """

    key: Key
    config: Config | None
    heuristic: float
    seconds: float
    tried: int
    failed: int


def tune_product(
    run: Run, words: Tensor, columns: int, seconds: Callable[[Run, Tensor], float] | None = None
) -> Outcome | None:
    """Find the fastest configuration of one product.

    Args:
        run: The product of given words, by `linear` or `convolution` of triton_packed.py.
        words: Those of the layer.
        columns: Tokens or output pixels of the product.
        seconds: Times the product; None is `replayed`.

    Returns:
        What was found; None where the product has no configuration, as one through a dense copy of the weights.
    """
    index, time, key = words.device.index, seconds or replayed, key_of(run, words)
    if key is None:
        return None
    with answering(index, None):
        right = run(words)
    heuristic = triton_packed.configure(key.dtype, columns, *key[3:6], gpu(index), key.x)
    failed: list[Config] = []

    def timed(config: Config) -> float:
        with answering(index, config):
            try:
                if all(agrees(run(words), right) for _ in range(2)):  # twice: a race need not show at once
                    return time(run, words)
            except (TritonError, RuntimeError) as error:  # not compiled, or more than the GPU has
                if not isinstance(error, TritonError) and "PassManager" not in str(error):
                    raise  # an error of CUDA's, after which nothing on the GPU holds
        failed.append(config)
        return float("inf")

    times = search(key, heuristic, gpu(index), timed)
    best = min(times, key=times.__getitem__)
    if best != heuristic:
        again = {config: [times[config]] for config in (heuristic, best)}
        for _ in range(REPEATS):
            for config, its in again.items():
                its.append(timed(config))
        times |= {config: statistics.median(its) for config, its in again.items()}
    wins = times[best] < (1 - GAIN) * times[heuristic]
    return Outcome(key, best if wins else None, times[heuristic], times[best], len(times), len(failed))


def key_of(run: Run, words: Tensor) -> Key | None:
    """What a product asks the tables for, found by running it; None where it asks nothing, or computes nothing."""
    with answering(words.device.index, None) as asked:
        run(words)
    return asked.key if asked.key and asked.key.across and asked.key.planes else None


def agrees(found: Tensor, right: Tensor) -> bool:
    """Whether two results differ by no more than another order of their sums, and its rounding, explain."""
    finite = right[right.isfinite()].double()
    rms = finite.square().mean().sqrt().item() if finite.numel() else 0.0
    near = 2 * torch.finfo(right.dtype).eps
    # tensor cores cut sums off: by up to 2^-23 a step, of which there are some thousand
    return torch.allclose(found.double(), right.double(), rtol=near, atol=2.0**-12 * rms, equal_nan=True)


def search(key: Key, heuristic: Config, here: Gpu, seconds: Callable[[Config], float]) -> dict[Config, float]:
    """The time of every configuration that was tried: the heuristic and what is near the fastest so far."""
    times = {heuristic: seconds(heuristic)}
    best = heuristic
    for _ in range(ROUNDS):
        before = best
        for field in Config._fields:
            for config in [c for c in near(best, field, key) if allowed(key, c, here) and c not in times]:
                times[config] = seconds(config)
                best = min(best, config, key=times.__getitem__)
        if best == before:
            break
    return times


def near(config: Config, field: str, key: Key) -> Iterator[Config]:
    """Configurations that differ in one field by one place; in parts by a factor of two, or by having one alone."""
    if field == "parts":
        values = sorted({1, config.parts // 2, 2 * config.parts} - {0})
    else:
        place = VALUES[field].index(getattr(config, field))
        values = (*VALUES[field][max(place - 1, 0) : place], *VALUES[field][place + 1 : place + 2])
    for value in values:
        other = config._replace(**{field: value})
        steps = ceil_div(key.across, other.blocks)
        each = ceil_div(steps, other.parts)  # as in `configure`: no part without a step
        yield other._replace(parts=ceil_div(steps, each))


def replayed(run: Run, words: Tensor) -> float:
    """Seconds of a product on a GPU: the median replay of a CUDA graph of many, each from a copy of its own.

    Together the copies are larger than twice the L2 cache, so that each is read from memory, as in a network; a
    configuration that is fastest from the cache need not be so from memory.
    """
    size = torch.cuda.get_device_properties(words.device).L2_cache_size
    count = min(MOST_COPIES, 1 + ceil_div(2 * size, words.numel() * words.element_size()))
    copies = words.expand(count, -1).contiguous().unbind()
    products = copies * ceil_div(LEAST_PRODUCTS, count)
    with torch.cuda.device(words.device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for some in products:
                run(some)
        found = []
        for _ in range(REPLAYS + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3 / len(products))
    return statistics.median(found[2:])  # the first ones warm up
