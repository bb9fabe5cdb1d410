"""What a study came to, as rows of JSON."""

from __future__ import annotations

import math
import warnings
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .cost import Configuration
from .problem import Problem

BASELINE, COST, DIVERGED = "baseline", "cost", "diverged"  # attributes of a trial


def layer_rows(problem: Problem, of: Configuration) -> list[dict[str, Any]]:
    """What each layer got: bits, shape and sensitivity."""
    sizes = {**problem.structure.sizes, **of.sizes}
    return [
        {
            **{"name": name, "bits": of.bits[name], "rows": shape.rows.at(sizes)},
            **{"of_rows": shape.rows.at(problem.structure.sizes), "width": shape.weights(sizes)[1]},
            "sensitivity": problem.found.trace[name] / problem.found.weights[name],
            "bytes": problem.cost.layer_bytes(name, of.bits[name], sizes),
        }
        for name, shape in problem.structure.layers.items()
    ]


def trial_row(trial: FrozenTrial) -> dict[str, Any]:
    """What was tried, what it cost and what it gave."""
    state = "diverged" if DIVERGED in trial.user_attrs else trial.state.name.lower()
    value = trial.value if trial.state == TrialState.COMPLETE else None
    seconds = trial.duration.total_seconds() if trial.duration else None
    row = {"number": trial.number, "state": state, "loss": value, "baseline": trial.user_attrs.get(BASELINE)}
    return row | {"cost": trial.user_attrs.get(COST), "params": trial.params, "seconds": seconds}


def importance(study: Study) -> dict[str, float]:
    """Share of the variance of the loss that each parameter explains (PED-ANOVA); empty where too little is known."""
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < 8:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few trials: then the shares are equal, and show that
            found = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
    except (ValueError, RuntimeError, ZeroDivisionError):  # constant objectives
        return {}
    return {name: float(v) for name, v in found.items() if math.isfinite(v)}
