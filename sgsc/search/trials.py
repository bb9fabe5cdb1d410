"""The trials of a study: baselines in the queue first, then each is taken, trained, judged and told.

A trial that Ctrl-C ends is given back and goes on under its own number; a candidate that diverges is told as bad.
A baseline comes back into the queue until it was judged, whatever interrupts a worker, or failed `TRIES` times.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import optuna
import torch
from optuna.study import Study
from optuna.trial import TrialState
from torch import nn

from sgsc.quantizers import Diverged

from .candidates import build
from .cost import Configuration
from .evidence import BASELINE, COST, DIVERGED
from .problem import Problem
from .storage import WORKER, given, working

Report = Callable[[float], None]  # called with the validation loss part of the way through a training; may not return
Train = Callable[[nn.Module, Report], None]
Validate = Callable[[nn.Module], float]

TAKEN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)  # judged, stopped or being judged
TRIES = 3  # of a baseline, until it counts as one that cannot be trained


@dataclass
class Best:
    """The best network that this process trained in a trial, as it was judged: trained again it may come out worse."""

    loss: float = math.inf
    number: int = -1
    model: nn.Module | None = None

    def see(self, loss: float, number: int, model: nn.Module) -> None:
        """Keep it where it is better."""
        if loss < self.loss:
            self.loss, self.number, self.model = loss, number, model


def enqueue_baselines(study: Study, problem: Problem) -> None:
    """Put the baselines first that are within the budget and neither judged nor waiting nor running."""
    for name, configuration in problem.baselines.items():
        params = problem.space.params(configuration, problem.structure.sizes)
        states = [t.state for t in study.get_trials(deepcopy=False) if given(t) == params]
        lost = states.count(TrialState.FAIL)
        if lost == len(states) < TRIES and problem.feasible(params):
            study.enqueue_trial(params, user_attrs={BASELINE: name})


def run_trial(
    study: Study, problem: Problem, train: Train, validate: Validate, seed: int, trials: int, best: Best
) -> bool:
    """Run one, unless others took the last ones meanwhile; False where the sampler repeated one that there is."""
    trial = study.ask()
    try:
        others = [t for t in study.get_trials(deepcopy=False, states=TAKEN) if t.number != trial.number]
        if sum(t.state.is_finished() or t.number < trial.number for t in others) >= trials:
            _give_back(study, trial)  # for whoever asks for more trials
            return True
        with working(trial):
            return _judge(study, trial, problem, train, validate, seed, best)
    except optuna.exceptions.UpdateFinishedTrialError:  # taken for lost and failed meanwhile: it is in the queue again
        return True
    except Exception:
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        raise
    except BaseException:  # Ctrl-C
        _give_back(study, trial)
        raise


def _judge(
    study: Study, trial: optuna.Trial, problem: Problem, train: Train, validate: Validate, seed: int, best: Best
) -> bool:
    """Train and judge what a trial proposes; False where the sampler repeated one that there is.

    Raises:
        Diverged: In `report`, which is caught here.
    """
    params = {n: trial.suggest_categorical(n, d.choices) for n, d in problem.space.distributions().items()}  # pyright: ignore
    others = study.get_trials(deepcopy=False)
    if any(t.number < trial.number and t.params == params and t.state != TrialState.FAIL for t in others):
        study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return BASELINE in trial.user_attrs
    configuration = problem.space.configuration(params)
    trial.set_user_attr(COST, problem.cost(configuration))
    baseline = trial.user_attrs.get(BASELINE)

    def report(loss: float) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"the validation loss is {loss} part of the way through the training")
        if not study._storage.get_trial(trial._trial_id).intermediate_values:  # else it was given back after its report
            trial.report(loss, 1)
        if baseline is None and trial.should_prune():
            raise optuna.TrialPruned

    try:
        model = trained(problem, configuration, train, report, seed)
        value = validation_loss(validate, model)
        if math.isfinite(value):
            best.see(value, trial.number, model)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        return True
    except Diverged:
        value = math.nan
    if math.isfinite(value):
        study.tell(trial, value, skip_if_finished=True)
    else:
        trial.set_user_attr(DIVERGED, True)
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    return True


def validation_loss(validate: Validate, model: nn.Module) -> float:
    """What `validate` says of a model.

    Raises:
        ValueError: If it is no number.
    """
    loss = validate(model)
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"validate returned {loss!r:.80}; want the validation loss, one number") from None


def _give_back(study: Study, trial: optuna.Trial) -> None:
    """Put a trial back in the queue under its own number: whoever takes it proposes and trains the same."""
    with suppress(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr(WORKER, None)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def trained(problem: Problem, of: Configuration, train: Train, report: Report, seed: int) -> nn.Module:
    """A candidate, built from the parent and trained, in evaluation mode; torch's global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(problem.parent, problem.structure, of, seed)
        train(model, report)
    return model.eval()
