"""What a search must beat: uniform widths, and allocations of the sensitivity, greedy and exact.

All keep the parent's layer widths, unless no such network is within the budget (`narrowed`). An allocation minimises
the sum of Omega_l(b_l) under the budget: greedily (of the layers that can give up bits, the one that loses least Omega
a unit of the budget), or as an integer program, which is the best that the sensitivity can say (Hubara et al., arXiv
2006.10518). Random search and Optuna's own TPE are samplers of the same study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from .space import BITS, FACTORS, Space
from .structure import Structure

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


def narrowed(space: Space, structure: Structure, holds: Callable[[Configuration], bool]) -> dict[str, Configuration]:
    """One share of the channels in all groups, and the most bits in all layers that the budget then `holds`.

    A group gets the most channels that it may have and that are no more than its share, or its least.
    """
    found, shares = {}, {}
    for share in sorted((f for f in FACTORS if f < 1 and space.groups), reverse=True):
        choices = {group: space.windows[parameter] for parameter, group in space.groups.items()}
        most = {g: max((n for n in of if n <= share * structure.sizes[g]), default=of[0]) for g, of in choices.items()}
        shares[tuple(most.items())] = share
    for sizes, share in shares.items():
        tried = (Configuration(dict.fromkeys(structure.layers, bits), dict(sizes)) for bits in reversed(BITS))
        within = next((c for c in tried if holds(c)), None)
        if within is not None:
            found[f"uniform {max(within.bits.values())}, {100 * share:g} % of the channels"] = within
    return found


def joined(omega: Omega, sets: Sequence[Sequence[str]] | None) -> dict[tuple[str, ...], dict[int, float]]:
    """Omega of layers that have one width together: the sum."""
    sets = [(name,) for name in omega] if sets is None else sets
    return {tuple(names): {bits: sum(omega[n][bits] for n in names) for bits in omega[names[0]]} for names in sets}


def greedy(
    cost: CostModel, omega: Omega, budget: Budget, sets: Sequence[Sequence[str]] | None = None
) -> Configuration | None:
    """Give up bits where a unit of the budget loses least, until the budget holds; None where it never does.

    `sets`: of layers that have one width together, each layer in one of them; each by itself if None.
    """
    limits, of_sets = budget.limits(), joined(omega, sets)
    chosen = {names: max(by) for names, by in of_sets.items()}
    bits = _of_layers(chosen)
    while not budget.holds(now := cost(Configuration(bits), limits)):
        best: tuple[float, tuple[str, ...], int] | None = None
        for name, by in of_sets.items():
            for fewer in sorted((b for b in by if b < chosen[name]), reverse=True):
                then = cost(Configuration(bits | dict.fromkeys(name, fewer)), limits)
                saved = sum(
                    (now[of] - then[of]) / limit for of, limit in limits.items() if now[of] > limit
                )  # of what is over, in shares of the limits
                if saved > 0:
                    rate = (by[fewer] - by[chosen[name]]) / saved
                    best = min(best or (rate, name, fewer), (rate, name, fewer))
                    break  # the next width that saves anything: kernels are as fast at some widths as at others
        if best is None:
            return None
        chosen[best[1]] = best[2]
        bits = _of_layers(chosen)
    return Configuration(bits)


def integer_program(
    cost: CostModel, omega: Omega, budget: Budget, sets: Sequence[Sequence[str]] | None = None
) -> Configuration | None:
    """The allocation of least Omega within the budget; None where there is none.

    One binary variable a set and width, one width a set; every cost is a sum over layers. `sets`: as of `greedy`.
    """
    of_sets, wanted = joined(omega, sets), budget.limits()
    base = _of_layers({names: max(by) for names, by in of_sets.items()})
    at_base = cost(Configuration(base), wanted)
    columns = [(names, bits) for names, by in of_sets.items() for bits in sorted(by)]
    objective = np.array([of_sets[names][bits] for names, bits in columns])
    one_each = np.array([[float(names == n) for names, _ in columns] for n in of_sets])
    constraints: list[Any] = [LinearConstraint(one_each, 1, 1)]
    changes = [cost(Configuration(base | dict.fromkeys(names, bits)), wanted) for names, bits in columns]
    for slack in (0.0, SLACK):
        limits = [
            LinearConstraint(
                np.array([[change[of] - at_base[of] for change in changes]]), -np.inf, limit * (1 - slack) - at_base[of]
            )
            for of, limit in wanted.items()
        ]
        scale = objective.max() or 1.0
        solved = milp(
            objective / scale,
            constraints=[*constraints, *limits],
            integrality=1,
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0},
        )
        if solved.x is None:
            return None
        taken = {names: bits for (names, bits), x in zip(columns, solved.x, strict=True) if x > 0.5}
        chosen = Configuration(_of_layers(taken))
        if budget.holds(cost(chosen, wanted)):
            return chosen
    return None


def _of_layers(bits: Mapping[tuple[str, ...], int]) -> dict[str, int]:
    return {name: width for names, width in bits.items() for name in names}


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
