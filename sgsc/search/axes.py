"""Optuna's distributions as a few choices in a row, with kernels that know which choices are near each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

Key = tuple[Any, ...]

MOST = 16  # choices of a numeric range; a larger one is cut into so many intervals


class Axis:
    """One parameter: `count` choices, numbered from 0.

    Numeric choices are ordered, those of a CategoricalDistribution too where they are numbers that ascend, such as bit
    widths; an interval of a range stands for all values in it. A window leaves only some choices.
    """

    def __init__(self, distribution: BaseDistribution, window: Sequence[Any] | None = None) -> None:
        self.distribution = distribution
        self.values: list[Any] | None = None
        if isinstance(distribution, CategoricalDistribution):
            self.values = list(distribution.choices)
            numbers = [v for v in self.values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            self.ordered = len(numbers) == len(self.values) and numbers == sorted(set(numbers))
        elif isinstance(distribution, (FloatDistribution, IntDistribution)):
            self.ordered = True
            step = distribution.step
            if step is not None and not distribution.log:
                count = round((distribution.high - distribution.low) / step) + 1
                if count <= MOST:
                    whole = isinstance(distribution, IntDistribution)
                    grid = [distribution.low + i * step for i in range(count)]
                    self.values = grid if whole else [min(float(v), distribution.high) for v in grid]
            self.low, self.high = self._inner(distribution.low), self._inner(distribution.high)
        else:
            raise ValueError(
                f"a {type(distribution).__name__} cannot be searched; "
                "use suggest_categorical, suggest_int or suggest_float"
            )
        ranged = isinstance(distribution, FloatDistribution) and distribution.step is None
        self.discrete = not ranged  # a configuration of such parameters is not proposed twice
        self._outside: frozenset[Any] = frozenset()
        if window is not None and self.values is not None:
            self._outside = frozenset(v for v in self.values if v not in window)
            self.values = [v for v in self.values if v in window]
            if not self.values:
                raise ValueError(
                    f"the window {list(window)} holds no choice of {distribution}; give some of its choices"
                )
        self.count = MOST if self.values is None else len(self.values)
        self._index = None if self.values is None else {v: i for i, v in enumerate(self.values)}

    def holds(self, value: Any) -> bool:
        """Whether the window leaves a value, or there is none."""
        return value not in self._outside

    def index(self, value: Any) -> int:
        """The number of the choice that a value is or lies in; of the nearest one where it is outside."""
        if self._index is not None:
            found = self._index.get(value)
            if found is not None:
                return found
            if not self.ordered:
                return 0
            assert self.values is not None
            return int(np.argmin([abs(v - value) for v in self.values]))
        share = (self._inner(value) - self.low) / max(self.high - self.low, 1e-300)
        return min(max(int(share * MOST), 0), MOST - 1)

    def value(self, index: int, place: float) -> Any:
        """The value of a choice; `place`, 0 to 1, where in its interval."""
        if self.values is not None:
            return self.values[index]
        d = self.distribution
        assert isinstance(d, (FloatDistribution, IntDistribution))
        inner = self.low + (self.high - self.low) * (index + place) / MOST
        outer = math.exp(inner) if d.log else inner
        if d.step is not None and not (d.log and isinstance(d, FloatDistribution)):
            outer = d.low + round((outer - d.low) / d.step) * d.step
        outer = min(max(outer, d.low), d.high)
        return int(outer) if isinstance(d, IntDistribution) else float(outer)

    def kernel(self, bandwidth: float) -> NDArray[np.float64]:
        """(count, count) rows that sum to 1: how much an observation of one choice says of each other one.

        Gaussian in the number of places between ordered choices; an unordered choice speaks of itself alone.
        """
        places = np.arange(self.count, dtype=np.float64)
        if not self.ordered:
            return np.eye(self.count)
        if self.values is None:  # the interval is a finer unit than a choice
            places *= 5 / MOST
        kernel = np.exp(-0.5 * ((places[:, None] - places[None, :]) / bandwidth) ** 2)
        return kernel / kernel.sum(1, keepdims=True)

    def _inner(self, value: float) -> float:
        return math.log(value) if getattr(self.distribution, "log", False) else float(value)


def key_of(axes: Mapping[str, Axis], row: NDArray[np.int16], params: Mapping[str, Any]) -> Key:
    """What tells a configuration from others: choices, and of an interval of many values the value."""
    return tuple(int(i) if a.values is not None else params[n] for (n, a), i in zip(axes.items(), row, strict=True))


def draws(counts: Sequence[int], most: int, rng: np.random.Generator) -> Iterator[NDArray[np.int16]]:
    """(P,) numbers of choices: all there are of P parameters in random order, or `most` at random of more than that."""
    total = math.prod(counts)
    order = rng.permutation(total) if total <= most else None
    for place in range(min(total, most)):
        row = rng.integers(counts) if order is None else np.unravel_index(order[place], counts)
        yield np.array(row, dtype=np.int16)
