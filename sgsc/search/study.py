"""`search_network`: from a trained network, ways to train and judge it, and a budget, to one with widths of its own.

The baselines are the first trials of the study, and the result is the best of all trials within the budget, so that it
is never worse than the best baseline that was evaluated, on the data that `validate` judges by. `finish` trains the
best few of the search and the best baseline longer (finals.py); what the best trial had counts beside them.

Trials run one after another in a process; any number of processes share a study (storage.py), and each waits for the
last trials of the others: all come to the same result. One process alone, with deterministic functions, gives the same
study each time, also where it was interrupted by Ctrl-C, or killed between two trials; what a worker was at when it was
killed is tried again under a later number.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import BaseStorage
from optuna.study import Study
from torch import Tensor, nn

from .baselines import SAMPLERS
from .cost import Budget, Configuration
from .evidence import importance, layer_rows, trial_row
from .finals import End, judged, last_trainings
from .problem import Problem, check_batches, prepare_search
from .remembered import bytes_of, digest, recall, remember
from .sensitivity import Loss, Progress, check_method
from .storage import open_storage, open_study, refuse_other_aim, refuse_other_host, wait_for_others, writing
from .trials import TAKEN, Best, Train, Validate, enqueue_baselines, run_trial

SETTINGS = "settings"  # attribute of a study
REPETITIONS = 5  # in a row after which nothing new is left; one alone may be another worker's, proposed just before
SAME_WEIGHTS = "all workers start from one float network: --start float.safetensors of the first one's folder; or "
STARTUP = 8  # trials that must have reported before one is stopped for being worse than their median


@dataclass
class Found:
    """What a search came to.

    Attributes:
        model: The trained winner, prepared; `pack` it.
        configuration: Its bits and channels.
        loss: Its validation loss.
        cost: As the cost model says; bytes are those of the file.
        origin: The baseline's name where one won, else "search".
        report: The evidence: everything as JSON.
    """

    model: nn.Module
    configuration: Configuration
    loss: float
    cost: dict[str, float]
    origin: str
    report: dict[str, Any]


def search_network(
    network: nn.Module,
    train: Train,
    validate: Validate,
    budget: Budget,
    *,
    loss: Loss,
    batches: Sequence[tuple[Tensor, ...]],
    trials: int = 60,
    seed: int = 0,
    storage: BaseStorage | str | Path | None = None,
    name: str = "search",
    sampler: str = "kmeans-tpe",
    finish: Train | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = lambda phase, step, steps, values: None,
    **preparation: Any,
) -> Found:
    """Search bit widths and layer widths of a trained network under a hard budget.

    Args:
        network: Trained, in float; it is left as it is.
        train: Trains a candidate a little, in place, the same way each time; may call what it is given with a
            validation loss once on its way, which stops a hopeless candidate. It and `validate` may raise
            `sgsc.quantizers.Diverged`, as packing does.
        validate: Loss of a candidate on validation data, lower is better; NaN and infinity count as diverged.
        budget: What the result may cost.
        loss: Mean loss of a model on a batch, for the sensitivity.
        batches: Tuples (inputs, targets …) of training data, for the sensitivity and for counting multiplications.
        trials: Of the study, baselines included; a study that has some already gets the rest.
        seed: Of every random choice.
        storage: From `open_storage`, or what that takes; in memory if None.
        name: Of the study.
        sampler: "kmeans-tpe", or "tpe" or "random" for comparison.
        finish: Trains the three best networks of the search, and the best baseline, from the start and longer, if
            given; the result is the best of these and of all trials.
        settings: What else decides the results; a study of other settings is refused.
        progress: Called as progress(phase, step, steps, values).
        **preparation: `widths`, `method`, `architecture`, `notes`, `latency`, `skip`, as `prepare_search` takes them.

    Raises:
        ValueError: If the budget is below the smallest network, trials are below 1, the seed is negative, the sampler
            or the method is unknown, the study is of other settings, or no candidate gave a finite loss.
        StorageError: If the storage cannot be read or written, or is another host's SQLite file.
    """
    check_settings(trials, seed, sampler, preparation.get("method", "auto"))
    if not isinstance(budget, Budget):
        raise ValueError(f"budget={budget!r}: want a Budget, such as Budget(bytes=50_000)")
    check_batches(batches)
    preparation["skip"] = tuple(preparation.get("skip", ()))
    started, seed = time.perf_counter(), int(seed)
    key = digest(network, batches, seed, *(preparation.get(k) for k in ("method", "latency", "skip")))
    with _opened(storage) as storage, writing(storage):

        def prepare(known: Mapping[str, Any] | None) -> tuple[Problem, optuna.samplers.BaseSampler]:
            problem = prepare_search(
                network, budget, loss, batches, seed=seed, known=known, progress=progress, **preparation
            )
            space, windows = problem.space.distributions(), problem.space.windows
            how = {"space": space, "windows": windows, "monotone": problem.monotone}
            return problem, SAMPLERS[sampler](seed=seed, feasible=problem.feasible, **how)

        known = recall(storage, name, key)
        problem, made = prepare(known)
        study = open_study(storage, name, made, optuna.pruners.MedianPruner(n_startup_trials=STARTUP))
        if known is None and (known := recall(storage, name, key)) is not None:
            problem, study.sampler = prepare(known)  # another worker measured meanwhile: all judge by one table
        prepared = time.perf_counter() - started
        own = _settings_of(problem, sampler, seed, settings or {})
        _same_settings(study, own)
        remember(study, key, problem)
        enqueue_baselines(study, problem)
        came_back, repeated, best = True, 0, Best()
        while came_back:  # what other workers are at counts too; and where one dies, its trial is left
            repeated = 0  # in a row, now that something may be left again
            while repeated < REPETITIONS and (done := _done(study)) < trials:
                _refuse_others(name, study.user_attrs[SETTINGS], own)  # of a worker that began at the same moment
                new = run_trial(study, problem, train, validate, seed, trials, best)
                repeated = 0 if new else repeated + 1
                progress("search", min(done + 1, trials), trials, {"best loss": _best_so_far(study, problem)})
            came_back = wait_for_others(study, lambda whom: progress(f"waiting for {whom}", 0, 1, {}))
        reason = "nothing new within the budget was left to try" if repeated == REPETITIONS else ""
        searched = time.perf_counter() - started
        ends = last_trainings(study, problem, train, validate, finish, seed, best, progress)
        had = _best_so_far(study, problem)
        if ends[0].loss > had:
            reason = f"{reason}; " if reason else ""
            reason += f"the best trial, of {had:.6g}, came out at {ends[0].loss:.6g} when it was trained again"
        phases = {"preparation": prepared, "search": searched - prepared}
        phases["finish"] = time.perf_counter() - started - searched
        return _result(study, problem, ends, reason, phases)


@contextmanager
def _opened(storage: BaseStorage | str | Path | None) -> Iterator[BaseStorage]:
    """The storage itself, one in memory for None, or the one that is named, closed in the end."""
    if not isinstance(storage, (str, Path)):
        yield optuna.storages.InMemoryStorage() if storage is None else storage
        return
    named = open_storage(storage)
    try:
        yield named
    finally:
        named.engine.dispose()


def check_settings(trials: int, seed: int, sampler: str, method: str) -> None:
    """Refuse what no search can begin with.

    Raises:
        ValueError: If trials are no whole number from 1, the seed is negative, or the sampler or the method is unknown.
    """
    if not isinstance(trials, Integral) or trials < 1:
        raise ValueError(f"trials={trials!r}: want a whole number of trials, 1 or more")
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed={seed!r}: a seed is a whole number, 0 or more")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not known; choose one of {', '.join(SAMPLERS)}")
    check_method(method)


def _done(study: Study) -> int:
    return len(study.get_trials(deepcopy=False, states=TAKEN))


def _best_so_far(study: Study, problem: Problem) -> float:
    return min((t.value for t in judged(study, problem) if t.value is not None), default=math.nan)


def check_study(
    storage: BaseStorage, name: str, sampler: str, seed: int, budget: Budget, settings: Mapping[str, Any]
) -> None:
    """Refuse to go on with a study of other settings, before there is a network; its weights are compared later.

    Raises:
        ValueError: If it is one.
        StorageError: If the storage cannot be read.
    """
    with writing(storage):
        refuse_other_host(storage)
        try:
            study = optuna.load_study(study_name=name, storage=storage)
        except KeyError:  # there is no such study yet
            return
        refuse_other_aim(study)
        found = study.user_attrs.get(SETTINGS)
    if found is not None:
        own = _said(sampler, seed, budget, settings)
        _refuse_others(name, {key: found.get(key) for key in own}, own)


def _said(sampler: str, seed: int, budget: Budget, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a storage."""
    return json.loads(json.dumps({"sampler": sampler, "seed": seed, "budget": budget.limits(), **settings}))


def _refuse_others(name: str, found: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    other = [k for k in sorted({*own, *found}) if found.get(k) != own.get(k)]
    if other:
        raise ValueError(
            f"study {name!r} is of another {', '.join(other)}: { ({k: found.get(k) for k in other}) }; "
            f"{SAME_WEIGHTS if 'weights' in other else ''}give the settings of that study, or another name with --study"
        )


def _settings_of(problem: Problem, sampler: str, seed: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what the trials of a study are."""
    weights = hashlib.sha256()
    for name, value in problem.parent.state_dict().items():
        weights.update(name.encode() + bytes_of(value))
    space = {n: distribution_to_json(d) for n, d in problem.space.distributions().items()}
    searched = json.dumps([space, problem.space.windows], sort_keys=True)
    own = {"weights": weights.hexdigest(), "space": hashlib.sha256(searched.encode()).hexdigest()}
    return own | _said(sampler, seed, problem.budget, settings)


def _same_settings(study: Study, own: Mapping[str, Any]) -> None:
    """Refuse to go on with a study of another problem.

    Raises:
        ValueError: If it is one.
    """
    found = study.user_attrs.get(SETTINGS)
    if found is not None:
        _refuse_others(study.study_name, found, own)
    elif study.get_trials(deepcopy=False):
        raise ValueError(f"study {study.study_name!r} holds trials of something else; give another name with --study")
    else:
        study.set_user_attr(SETTINGS, dict(own))


def _result(study: Study, problem: Problem, ends: list[End], reason: str, phases: Mapping[str, float]) -> Found:
    """The best of the last trainings, and all that is known; `phases`: seconds of each."""
    best, configuration = ends[0], ends[0].configuration
    report = {
        **{"budget": problem.budget.limits(), "reason": reason, "sampler": study.user_attrs[SETTINGS]["sampler"]},
        "result": {
            **{"loss": best.loss, "trial": best.trial.number, "origin": best.baseline or "search"},
            **{"cost": problem.cost(configuration), "short_loss": best.trial.value, "long": best.long},
        },
        "finalists": [end.row() for end in ends],
        "trials": [trial_row(trial) for trial in study.get_trials(deepcopy=False)],
        "baselines_over_budget": sorted(
            name for name, c in problem.baselines.items() if not problem.budget.holds(problem.cost(c))
        ),
        "layers": layer_rows(problem, configuration),
        "groups": {g: {"channels": n, "of": problem.structure.sizes[g]} for g, n in configuration.sizes.items()},
        "channels_fixed": problem.structure.coupling.why,
        "latency": "measured" if problem.cost.times else "roofline",
        "windows": {name: list(choices) for name, choices in problem.space.windows.items()},
        "importance": importance(study),
        "sensitivity": {
            **{"method": problem.found.method, "samples": problem.found.samples, "seconds": problem.found.seconds},
            **{"converged": problem.found.converged, "worth": problem.found.worth},
            "share_error": max(problem.found.share_error.values()),
        },
        "seconds_by_phase": dict(phases),
    }
    return Found(best.model, configuration, best.loss, problem.cost(configuration), best.baseline or "search", report)
