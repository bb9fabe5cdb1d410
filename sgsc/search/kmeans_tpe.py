"""A tree-structured Parzen estimator whose thresholds come from k-means: a sampler for Optuna.

What is observed is cut into clusters by its value. The top cluster is good, the bottom one bad, and what lies between
speaks for neither: two thresholds that follow the values, where TPE (Bergstra et al., NeurIPS 2011) has one fixed
quantile. The clusters are few at first and more later, so that "good" becomes stricter. With l and g the densities of
the good and the bad, each a product over parameters of kernel densities on ordered choices,

    proposal = of a few candidates drawn from l the one with the largest  sum over parameters of  log l - log g

among those that are within the budget and not proposed before. Where higher choices are no worse (`monotone`), what is
within the budget and not at its edge is not worth a trial: a proposal is raised, by what adds most to that sum, until
nothing more fits. It stays a distribution over whole configurations: choosing the best ratio a parameter at a time
proposes the same few points again and again. How many candidates there are, and so how greedy the choice is, changes
from trial to trial.

The generator of a trial is made of the seed and the trial's number alone. A study that is interrupted and resumed
therefore proposes what an uninterrupted one does, bit for bit, as long as trials run one after another.

Constants were chosen on the surrogates of bench/search.py of seeds 0 to 19; bench/results/search.json is of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .axes import Axis, Key, draws, key_of
from .clusters import kmeans_1d

START = 8  # trials that must have been told before the first model; those that are not given are random
CANDIDATES = (8, 32, 128)  # one of these a trial: always the many, and some studies never leave a poor valley
FIRST_CLUSTERS, MOST_CLUSTERS, TRIALS_A_CLUSTER = 2, 6, 15
GOOD = (0.10, 0.20)  # least and largest share of the observations that are good
BAD = (0.50, 0.70)  # and bad: what to avoid is told apart by many
LEAST = 4  # observations of either kind
WIDE, NARROW, NARROWED = 1.0, 0.4, 60  # bandwidth in choices at first and at last, and the trials of its decay
PRIOR = 1.0  # weight of the uniform density, in observations
OUTLIER = 2.0  # interquartile ranges above the median; worse values count as this
RESOLUTION = 256  # values that clusters are found on, at most: exact k-means is quadratic
TRIES = 50  # draws of a random configuration that is new
FEW = 4096  # configurations that are gone through one by one

Params = dict[str, Any]
Told = tuple[NDArray[np.int16], float | None, bool, Key]


class KMeansTPESampler(BaseSampler):
    """Proposes configurations by k-means TPE; for one objective.

    Args:
        seed: Of every random choice.
        feasible: Whether a configuration is within the budget; the others are never proposed. Ordered choices are taken
            to cost no less the higher they are. It sees the parameters of the relative search space, and those of one
            choice.
        space: The search space, where it is known: then the first trial has it too. Otherwise it is found as Optuna's
            own samplers do, from what all completed trials have in common.
        windows: Parameter -> the choices that may be proposed, where these are not all; other trials may have others.
        monotone: Parameters of ordered choices of which higher ones are no worse and cost no less whatever the others
            are, as bits are: nothing is proposed in which one could be raised within the budget, as long as there is
            something else. Ranges are not raised.
        start: Trials that must have been told before the first model; those that the sampler proposes are stratified:
            over `start` trials each parameter takes values of all of its range.
    """

    def __init__(
        self,
        seed: int = 0,
        feasible: Callable[[Mapping[str, Any]], bool] | None = None,
        space: Mapping[str, BaseDistribution] | None = None,
        windows: Mapping[str, Sequence[Any]] | None = None,
        monotone: Collection[str] = (),
        start: int = START,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed}: a seed is 0 or more")
        if start < 2:
            raise ValueError(f"start={start}: two clusters need at least 2 trials; give 2 or more")
        self._seed, self._feasible, self._start = seed, feasible, start
        self._monotone, self._windows = frozenset(monotone), dict(windows or {})
        self._space = None if space is None else dict(sorted(space.items()))
        self._found = IntersectionSearchSpace(include_pruned=True)
        self._fixed: Params = {}  # parameters of one choice
        if space and all(d.single() for d in space.values()):  # nobody will ask
            self._fixed = {name: Axis(d).value(0, 0.0) for name, d in space.items()}
            if not self._within({}):
                raise ValueError(f"the only configuration of the space, {self._fixed}, is not feasible; give choices")
        # of finished trials, which do not change: a cache, no state
        self._rows: dict[Any, Told] = {}
        self._rows_of: dict[str, BaseDistribution] = {}

    def reseed_rng(self) -> None:
        """Nothing to do: a trial's generator comes from its number, which no two workers share."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What is proposed together."""
        space = self._found.calculate(study) if self._space is None else self._space
        self._fixed = {name: Axis(d).value(0, 0.0) for name, d in space.items() if d.single()}
        return {name: d for name, d in space.items() if not d.single()}

    def _within(self, params: Params) -> bool:
        return self._feasible is None or bool(self._feasible({**self._fixed, **params}))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A whole configuration, within the budget and new where there still is one.

        Raises:
            ValueError: If the study has several objectives, or not even the cheapest configuration is feasible.
        """
        _refuse_several_objectives(study)
        if not search_space:
            return {}
        rng = self._rng(trial.number, 0)
        axes = {name: Axis(d, self._windows.get(name)) for name, d in search_space.items()}
        observed, losses, seen = self._observations(study, trial, axes)
        if not self._can_learn(losses):
            return self._random(axes, rng, trial.number, seen)
        for row, ratios in candidates(observed, losses, [*axes.values()], rng):
            params = self._params(axes, row, rng)
            if not self._monotone and key_of(axes, row, params) in seen:
                continue
            if self._within(params):
                row, params = self._raised(axes, row, params, rng, ratios)
                if key_of(axes, row, params) not in seen:
                    return params
        return self._random(axes, rng, trial.number, seen)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A parameter that other trials do not all have: stratified at random."""
        _refuse_several_objectives(study)
        rng = self._rng(trial.number, *param_name.encode())
        axis = Axis(param_distribution, self._windows.get(param_name))
        return axis.value(self._stratum(axis, param_name, trial.number, rng), rng.random())

    def _can_learn(self, losses: NDArray[np.float64]) -> bool:
        """Whether (N,) ascending losses, also of trials that were given, are enough and say anything."""
        enough = len(losses) >= max(self._start, 2 * LEAST) and np.isfinite(losses[:LEAST]).all()
        return bool(enough and losses[0] != losses[-1])

    def _observations(
        self, study: Study, trial: FrozenTrial, axes: Mapping[str, Axis]
    ) -> tuple[NDArray[np.int16], NDArray[np.float64], set[Key]]:
        """(N, P) choices and (N,) losses, ascending; all configurations there are.

        Trials that run or failed are not observed, but not proposed again either; a range may be looked at again. What
        lies outside a window has no place among the choices: it says nothing of the nearest one, and does not block it.
        """
        of = {name: axis.distribution for name, axis in axes.items()}
        if of != self._rows_of:
            self._rows, self._rows_of = {}, of
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        rows, losses, seen = [], [], set()
        for t in study.get_trials(deepcopy=False):
            if t.number == trial.number or not axes.keys() <= t.params.keys():
                continue
            key = (study.study_name, t.number, t.datetime_start)
            entry = self._rows.get(key)
            if entry is None:
                entry = _encoded(t, axes, sign)
                if t.state.is_finished():
                    self._rows[key] = entry
            row, loss, within, own = entry
            if not within:
                continue
            seen.add(own)
            if loss is not None:
                rows.append(row)
                losses.append(loss)
        order = np.argsort(losses, kind="stable")
        if not all(axis.discrete for axis in axes.values()):
            seen = set()
        return np.array(rows, dtype=np.int16).reshape(-1, len(axes))[order], np.array(losses)[order], seen

    def _rng(self, *of: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self._seed, *of]))

    def _stratum(self, axis: Axis, name: str, number: int, rng: np.random.Generator) -> int:
        block, place = divmod(number, self._start)
        order = self._rng(block, 1, *name.encode()).permutation(self._start)  # the same for all trials of the block
        return int((order[place] + rng.random()) / self._start * axis.count)

    def _random(self, axes: Mapping[str, Axis], rng: np.random.Generator, number: int, seen: set[Key]) -> Params:
        """Stratified at random, within the budget, and new as long as anything is; of long ranges, in `TRIES` draws."""
        names, kinds = list(axes), list(axes.values())
        params: Params = {}
        for attempt in range(TRIES):
            if attempt == 0:
                row = np.array([self._stratum(axes[n], n, number, rng) for n in names], dtype=np.int16)
            else:
                row = np.array([rng.integers(axis.count) for axis in kinds], dtype=np.int16)
            row, params = self._afforded(axes, row, rng)
            if attempt < TRIES // 2:  # later the edge of the budget may have nothing new
                row, params = self._raised(axes, row, params, rng)
            if key_of(axes, row, params) not in seen:
                return params
        counts = [axis.count for axis in kinds]
        if math.prod(counts) <= FEW:  # hardly anything is left: look at all there is
            for row in draws(counts, FEW, rng):
                new = self._params(axes, row, rng)
                if key_of(axes, row, new) not in seen and self._within(new):
                    return new
        return params

    def _afforded(
        self, axes: Mapping[str, Axis], row: NDArray[np.int16], rng: np.random.Generator
    ) -> tuple[NDArray[np.int16], Params]:
        """A configuration and its parameters, made cheaper a choice at a time until it is within the budget.

        Raises:
            ValueError: If not even the cheapest is, whatever the unordered choices; of very many some are looked at.
        """
        kinds = list(axes.values())
        free = [i for i, axis in enumerate(kinds) if not axis.ordered]
        others = draws([kinds[i].count for i in free], FEW if free else 0, rng)  # looked at where the rest is lowest
        while not self._within(params := self._params(axes, row, rng)):
            higher = [i for i, axis in enumerate(kinds) if axis.ordered and row[i] > 0]
            if higher:
                row[higher[int(rng.integers(len(higher)))]] -= 1
            elif (other := next(others, None)) is not None:
                row[free] = other
            else:
                raise ValueError(
                    f"no configuration of the {len(axes)} parameters is feasible: not even the lowest choice of each, "
                    f"{params}; raise the budget or give lower choices"
                )
        return row, params

    def _raised(
        self,
        axes: Mapping[str, Axis],
        row: NDArray[np.int16],
        params: Params,
        rng: np.random.Generator,
        ratios: Sequence[NDArray[np.float64]] | None = None,
    ) -> tuple[NDArray[np.int16], Params]:
        """A configuration within the budget, raised a choice at a time until nothing more fits, where that is no worse.

        First what gains most by `ratios`, (choices,) for each parameter; without them what comes, at random.
        """
        if self._feasible is None:  # there is no edge
            return row, params
        row, kinds = row.copy(), list(axes.values())
        raises = [axis.ordered and axis.values is not None for axis in kinds]
        left = [i for i, name in enumerate(axes) if name in self._monotone and raises[i]]
        while left := [i for i in left if row[i] + 1 < kinds[i].count]:
            if ratios is None:
                gains = rng.random(len(left))
            else:
                gains = [ratios[i][row[i] + 1] - ratios[i][row[i]] for i in left]
            i = left[int(np.argmax(gains))]
            row[i] += 1
            higher = self._params(axes, row, rng)
            if self._within(higher):
                params = higher
            else:  # nor will it be once others are raised
                row[i] -= 1
                left.remove(i)
        return row, params

    @staticmethod
    def _params(axes: Mapping[str, Axis], row: Iterable[Any], rng: np.random.Generator) -> Params:
        return {
            name: axis.values[i] if axis.values is not None else axis.value(int(i), rng.random())
            for (name, axis), i in zip(axes.items(), row, strict=True)
        }


def candidates(
    observed: NDArray[np.int16], losses: NDArray[np.float64], axes: Sequence[Axis], rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int16], list[NDArray[np.float64]]]]:
    """Configurations drawn from the density of the good observations, the most promising first, one of CANDIDATES many.

    Each is (P,) choices, and comes with log l - log g of all choices of each parameter.

    Args:
        observed: (N, P) choices.
        losses: (N,) ascending; infinity for an observation that is only known to be bad.
        axes: Of the P parameters.
        rng: Where randomness comes from.
    """
    good, bad = split(losses)
    bandwidth = NARROW + (WIDE - NARROW) * np.exp(-len(losses) / NARROWED)
    count = CANDIDATES[int(rng.integers(len(CANDIDATES)))]
    drawn = np.empty((count, len(axes)), dtype=np.int16)
    score, ratios = np.zeros(count), []
    for p, axis in enumerate(axes):
        kernel, uniform = axis.kernel(bandwidth), PRIOR / axis.count
        counts = (np.bincount(rows, minlength=axis.count) for rows in (observed[:good, p], observed[-bad:, p]))
        likely, unlikely = (
            (seen @ kernel + uniform) / (n + PRIOR) for seen, n in zip(counts, (good, bad), strict=True)
        )
        drawn[:, p] = np.searchsorted(np.cumsum(likely)[:-1], rng.random(count), side="right")
        ratios.append(np.log(likely) - np.log(unlikely))
        score += ratios[p][drawn[:, p]]
    for row in drawn[np.argsort(-score, kind="stable")]:
        yield row, ratios


def split(losses: NDArray[np.float64]) -> tuple[int, int]:
    """How many of the least of (N,) ascending losses are good, and how many of the greatest bad.

    The losses are winsorised, so that one diverged run is no cluster of its own.
    """
    count = len(losses)
    low, middle, high = np.quantile(losses, [0.25, 0.5, 0.75], method="lower")
    finite = losses[np.isfinite(losses)]
    spread = high - low if np.isfinite(high) else float(finite[-1] - finite[0])
    top = min(middle if np.isfinite(middle) else finite[-1], finite[-1]) + OUTLIER * spread
    clipped = np.minimum(losses, top)
    marks = clipped if count <= RESOLUTION else np.quantile(clipped, np.linspace(0, 1, RESOLUTION))
    clusters = min(MOST_CLUSTERS, FIRST_CLUSTERS + max(count - START, 0) // TRIALS_A_CLUSTER)
    labels = kmeans_1d(marks, clusters)
    shares = (labels == 0).mean(), (labels == labels.max()).mean()
    good, bad = (
        int(np.clip(round(share * count), max(LEAST, np.ceil(least * count)), max(LEAST, most * count)))
        for share, (least, most) in zip(shares, (GOOD, BAD), strict=True)
    )
    good = min(good, len(finite))  # what failed is not good, however few did not
    return good, min(bad, count - good)


def _encoded(trial: FrozenTrial, axes: Mapping[str, Axis], sign: float) -> Told:
    """(P,) choices; loss, infinite where it is only known to be bad, None where nothing is; in the windows?; key."""
    row = np.array([axis.index(trial.params[name]) for name, axis in axes.items()], dtype=np.int16)
    loss = None
    if trial.state == TrialState.PRUNED:
        loss = np.inf
    elif trial.state == TrialState.COMPLETE and trial.value is not None:
        loss = sign * trial.value if sign * trial.value > -np.inf else np.inf
    within = all(axis.holds(trial.params[name]) for name, axis in axes.items())
    return row, loss, within, key_of(axes, row, trial.params)


def _refuse_several_objectives(study: Study) -> None:
    if len(study.directions) > 1:
        said = f"KMeansTPESampler serves one objective, the study has {len(study.directions)}"
        raise ValueError(f"{said}; give the others as a budget, or use optuna.samplers.NSGAIISampler")
