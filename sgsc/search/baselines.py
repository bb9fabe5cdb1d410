"""What a search must beat: uniform widths, and allocations of the sensitivity, greedy and exact.

All keep the parent's layer widths. An allocation minimises the sum of Omega_l(b_l) under the budget: greedily (of the
layers that can give up bits, the one that loses least Omega a unit of the budget), or as an integer program, which is
the best that the sensitivity can say (Hubara et al., arXiv 2006.10518). Random search and Optuna's own TPE are samplers
of the same study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial
from scipy.optimize import Bounds, LinearConstraint, milp

from .cost import Budget, Configuration, CostModel
from .kmeans_tpe import KMeansTPESampler
from .space import BITS

Omega = Mapping[str, Mapping[int, float]]
EDGES = 8  # bits of the first and the last layer, in the uniform variant that quantization-aware training commonly uses
SLACK = 0.002  # of the budget that the linear model may be off: padding, digits of the header


def uniform(layers: list[str]) -> dict[str, Configuration]:
    """Each width in all layers, and with 8 bits at both ends."""
    found = {}
    for bits in BITS:
        found[f"uniform {bits}"] = Configuration(dict.fromkeys(layers, bits))
        if bits < EDGES and len(layers) > 2:
            found[f"uniform {bits}, ends {EDGES}"] = Configuration(
                {**dict.fromkeys(layers, bits), layers[0]: EDGES, layers[-1]: EDGES}
            )
    return found


def greedy(cost: CostModel, omega: Omega, budget: Budget) -> Configuration | None:
    """Give up bits where a unit of the budget loses least, until the budget holds; None where it never does."""
    bits = {name: max(by) for name, by in omega.items()}
    while not budget.holds(now := cost(Configuration(bits))):
        best: tuple[float, str, int] | None = None
        for name, by in omega.items():
            for fewer in sorted((b for b in by if b < bits[name]), reverse=True):
                then = cost(Configuration({**bits, name: fewer}))
                saved = sum(
                    (now[of] - then[of]) / limit for of, limit in budget.limits().items() if now[of] > limit
                )  # of what is over, in shares of the limits
                if saved > 0:
                    rate = (by[fewer] - by[bits[name]]) / saved
                    best = min(best or (rate, name, fewer), (rate, name, fewer))
                    break  # the next width that saves anything: kernels are as fast at some widths as at others
        if best is None:
            return None
        bits[best[1]] = best[2]
    return Configuration(bits)


def integer_program(cost: CostModel, omega: Omega, budget: Budget) -> Configuration | None:
    """The allocation of least Omega within the budget; None where there is none.

    One binary variable a layer and width, one width a layer; every cost is a sum over layers.
    """
    names, base = list(omega), {name: max(by) for name, by in omega.items()}
    at_base = cost(Configuration(base))
    columns = [(name, bits) for name in names for bits in sorted(omega[name])]
    objective = np.array([omega[name][bits] for name, bits in columns])
    one_each = np.array([[float(name == n) for name, _ in columns] for n in names])
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    changes = [cost(Configuration({**base, name: bits})) for name, bits in columns]
    for slack in (0.0, SLACK):
        limits = [
            LinearConstraint(
                np.array([[change[of] - at_base[of] for change in changes]]), -np.inf, limit * (1 - slack) - at_base[of]
            )
            for of, limit in budget.limits().items()
        ]
        scale = objective.max() or 1.0
        solved = milp(
            objective / scale, constraints=[*constraints, *limits], integrality=1, bounds=Bounds(0, 1), options={}
        )
        if solved.x is None:
            return None
        chosen = Configuration({name: bits for (name, bits), x in zip(columns, solved.x, strict=True) if x > 0.5})
        if budget.holds(cost(chosen)):
            return chosen
    return None


class RandomSampler(KMeansTPESampler):
    """Random configurations within the budget, all different, for comparison; it learns nothing from what was told."""

    def _can_learn(self, losses: NDArray[np.float64]) -> bool:
        return False

    def _stratum(self, axis: Any, name: str, number: int, rng: np.random.Generator) -> int:
        return int(rng.integers(axis.count))


class FeasibleTPE(optuna.samplers.TPESampler):
    """Optuna's TPE, multivariate, asked again until it proposes something new within the budget, for comparison."""

    def __init__(self, seed: int, feasible: Callable[..., bool], space: Mapping[str, BaseDistribution]) -> None:
        super().__init__(seed=seed, multivariate=True)
        self._feasible, self._whole = feasible, dict(sorted(space.items()))
        self._random = RandomSampler(seed, feasible, space)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All of it, from the first trial on."""
        return {name: d for name, d in self._whole.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A new configuration within the budget; at random where it starts, or gives none in 100 tries."""
        tried = [t.params for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        for _ in range(100):
            params = super().sample_relative(study, trial, search_space)
            if not params:
                break
            if params not in tried and self._feasible(params):
                return params
        return self._random.sample_relative(study, trial, search_space)


SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "kmeans-tpe": KMeansTPESampler,
    "tpe": lambda seed, feasible, space, windows, monotone: FeasibleTPE(seed, feasible, space),
    "random": lambda seed, feasible, space, windows, monotone: RandomSampler(seed, feasible, space),
}
