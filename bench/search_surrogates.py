"""Objectives that cost microseconds and behave as bit widths do, and how many trials a sampler needs on them.

A surrogate of L layers, each of 2, 3, 4, 6 or 8 bits, drawn from a law and not fitted to one network:

    noise    relative squared error of the best uniform grid for Gaussian weights, 2 bits 0.1175 to 8 bits 8.7e-5
    layers   three stages, each of four times the weights a layer of the one before, times exp(N(0, 0.3²)); the first
             layer has a fifth of that, the last a tenth
    loss     e = sum of s_l noise + interactions of neighbours, up to +0.5 (they amplify) and down to -0.15 of the
             geometric mean of their parts, and of all pairs at random, N(0, (0.15 / sqrt L)²)
    s_l      exp(N(0, 1.2²)), four times that at both ends
    value    1 - exp(-8 e / (L mean s)), as an error that saturates; lower is better
    budget   mean bits weighted by weights at most 4, which are the bytes of uniform 4 bits; it is hard

Nobody pays for configurations over budget. Random ones are drawn again. Ours never proposes one. Optuna's TPE is given
what serves it better, which differs: joint (multivariate) sampling draws again, and independent sampling, which would
propose the same one for ever, is told it as a violated constraint. Neither is counted as a trial.

One more surrogate follows no law: 22 layers with the costs that were measured on ResNet-20 (bench/search_measured.py),

    loss     e = sum of alone_l + interactions, those of each pair at 2 bits over the geometric mean of its parts there
    budget   the same, with the weights of that network

The target of a surrogate is what 1,000 random trials reach, median of 11 repeats.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState
from scipy.stats import spearmanr

from sgsc.search.kmeans_tpe import KMeansTPESampler

BITS = np.array([2, 3, 4, 6, 8])
NOISE = np.array([0.1175, 0.0345, 0.0115, 1.04e-3, 8.7e-5])
RANDOM_TRIALS, REPEATS, MOST_REFUSED = 1000, 11, 1000
MEAN_BITS = 4.0
FILE = Path(__file__).parent / "search_measured.json"
MEASURED = 22  # layers of the surrogate that was measured; no other has so many


class Surrogate:
    """One problem; choices are numbers of BITS."""

    def __init__(self, layers: int, seed: int, interaction: float = 0.5) -> None:
        rng = np.random.default_rng([seed, layers])
        self.layers = layers
        stage = np.arange(layers) * 3 // layers
        self.weights = 2304 * 4.0**stage * np.exp(rng.normal(0, 0.3, layers))
        self.weights[0] /= 5
        self.weights[-1] /= 10
        sensitivity = np.exp(rng.normal(0, 1.2, layers))
        sensitivity[[0, -1]] *= 4
        self.amplitude = np.sqrt(sensitivity[:, None] * NOISE)  # (L, 5)
        near = np.arange(layers - 1)
        self.pairs = np.zeros((layers, layers))
        self.pairs[near, near + 1] = rng.uniform(-0.3, 1, layers - 1) * interaction
        self.pairs += np.triu(rng.normal(0, 0.3 * interaction / np.sqrt(layers), (layers, layers)), 1)
        self.unit = 8 / sensitivity.mean() / layers

    def loss(self, choices: NDArray) -> NDArray:
        """(N, L) -> (N,) e."""
        part = self.amplitude[np.arange(self.layers), choices]
        return (part**2).sum(1) + ((part @ self.pairs) * part).sum(1)

    def value(self, choices: NDArray) -> NDArray:
        """(N, L) -> (N,)."""
        return 1 - np.exp(-np.maximum(self.loss(choices), 0) * self.unit)

    def excess(self, choices: NDArray) -> NDArray:
        """(N, L) -> (N,) mean bits over the budget."""
        return BITS[choices] @ self.weights / self.weights.sum() - MEAN_BITS

    def random(self, rng: np.random.Generator, count: int) -> NDArray:
        """(count, L) within the budget."""
        found = np.empty((0, self.layers), dtype=np.int64)
        while len(found) < count:
            drawn = rng.integers(0, len(BITS), (4 * count, self.layers))
            found = np.concatenate([found, drawn[self.excess(drawn) <= 0]])
        return found[:count]

    def target(self) -> float:
        """What random search reaches."""
        of = (self.random(np.random.default_rng([7, k]), RANDOM_TRIALS) for k in range(REPEATS))
        return statistics.median(float(self.value(choices).min()) for choices in of)


class Measured(Surrogate):
    """ResNet-20; there is one, and seeds are those of samplers."""

    def __init__(self, file: Path = FILE) -> None:
        said = json.loads(file.read_text())
        self.layers, self.weights = len(said["layers"]), np.array(said["weights"], dtype=np.float64)
        self.amplitude = np.sqrt(np.maximum(said["alone"], 0))
        least = self.amplitude[:, 0]
        self.pairs = np.array(said["pairs"]) / (least[:, None] * least)
        self.checks = [(check["choices"], check["loss"]) for check in said["checks"]]

    def value(self, choices: NDArray) -> NDArray:
        """(N, L) -> (N,) nats."""
        return self.loss(choices)

    def agreement(self) -> float:
        """Rank correlation with losses that were measured and not used."""
        choices, losses = zip(*self.checks, strict=True)
        return float(np.asarray(spearmanr(self.loss(np.array(choices)), losses))[0])


def problem_of(layers: int, seed: int) -> Surrogate:
    """The surrogate of so many layers."""
    return Measured() if layers == MEASURED else Surrogate(layers, seed)


def ours(problem: Surrogate, seed: int) -> tuple[Any, dict[str, Any], Callable[[Any], int]]:
    """Sampler, search space, and how to read a parameter."""
    places = {int(bits): i for i, bits in enumerate(BITS)}
    names = [f"bits{i:02d}" for i in range(problem.layers)]
    unit = dict(zip(names, problem.weights / problem.weights.sum(), strict=True))
    space = {name: CategoricalDistribution([int(b) for b in BITS]) for name in names}

    def feasible(params: Any) -> bool:
        return sum(unit[name] * params[name] for name in names) <= MEAN_BITS

    return KMeansTPESampler(seed, feasible, space, monotone=names), space, places.__getitem__


def tpe(problem: Surrogate, seed: int, joint: bool) -> tuple[Any, dict[str, Any], Callable[[Any], int]]:
    """Optuna's, on ordered integers: it did better there than on categories."""
    space = {f"bits{i:02d}": IntDistribution(0, len(BITS) - 1) for i in range(problem.layers)}
    return optuna.samplers.TPESampler(seed=seed, multivariate=joint), space, int


def trials_to(target: float, problem: Surrogate, made: tuple, redraw: bool, most: int) -> tuple[int, float, int]:
    """(trials until the target, `most` + 1 where it was not reached; seconds a proposal; proposals over budget)."""
    sampler, space, place = made
    study = optuna.create_study(sampler=sampler)
    spent, done, refused, in_a_row = 0.0, 0, 0, 0
    while done < most:
        started = time.perf_counter()
        trial = study.ask(space)
        spent += time.perf_counter() - started
        choices = np.array([[place(trial.params[name]) for name in space]])
        excess = float(problem.excess(choices)[0])
        if excess > 1e-9:
            refused, in_a_row = refused + 1, in_a_row + 1
            if in_a_row > MOST_REFUSED:  # it proposes nothing that is within the budget any more
                break
            if redraw:
                study.tell(trial, state=TrialState.FAIL)
            else:
                trial.set_constraint("mean bits", excess)
                study.tell(trial, 2.0)
            continue
        done, in_a_row = done + 1, 0
        value = float(problem.value(choices)[0])
        study.tell(trial, value)
        if value <= target:
            return done, spent / (done + refused), refused
    return most + 1, spent / max(done + refused, 1), refused


METHODS: dict[str, Callable[[Surrogate, int, float, int], tuple[int, float, int]]] = {
    "k-means TPE": lambda p, seed, target, most: trials_to(target, p, ours(p, seed), True, most),
    "TPE, multivariate": lambda p, seed, target, most: trials_to(target, p, tpe(p, seed, True), True, most),
    "TPE, independent": lambda p, seed, target, most: trials_to(target, p, tpe(p, seed, False), False, most),
}


def random_trials(problem: Surrogate, seed: int, target: float, most: int) -> tuple[int, float, int]:
    """Random search, counted alike."""
    hits = np.flatnonzero(problem.value(problem.random(np.random.default_rng([seed, 1]), most)) <= target)
    return (int(hits[0]) + 1 if len(hits) else most + 1), 0.0, 0


METHODS = {"random": random_trials, **METHODS}


def measure(layers: int, seed: int, method: str, target: float, most: int) -> dict[str, Any]:
    """One row."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        problem = problem_of(layers, seed)
        trials, seconds, refused = METHODS[method](problem, seed, target, most)
    row = {"trials": trials, "reached": trials <= most, "most": most, "over_budget": refused, "target": target}
    if isinstance(problem, Measured):
        row["agreement"] = problem.agreement()
    return row | {"milliseconds_a_proposal": 1e3 * seconds, "seconds": time.perf_counter() - started}
