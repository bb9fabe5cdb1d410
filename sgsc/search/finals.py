"""The last trainings: which networks of a study are trained to the end, and the best of them.

A short training tells roughly, not exactly, how good a network becomes; and a longer one may also make it worse. So the
best few of the search and the best baseline are trained to the end, and what the best trial had counts beside them.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from sgsc.quantizers import Diverged

from .cost import Configuration
from .evidence import BASELINE
from .problem import Problem
from .sensitivity import Progress
from .trials import Best, Train, Validate, trained, validation_loss

FINALISTS = 3  # of the search, beside the best baseline


@dataclass(frozen=True)
class End:
    """A trial's network after its last training, and its validation loss."""

    loss: float
    trial: FrozenTrial
    configuration: Configuration
    model: nn.Module
    long: bool  # trained by `finish`

    @property
    def baseline(self) -> str | None:
        """Its name, where the trial was one."""
        return self.trial.user_attrs.get(BASELINE)

    def row(self) -> dict[str, Any]:
        """As JSON."""
        return {"trial": self.trial.number, "loss": self.loss, "baseline": self.baseline, "long": self.long}


def judged(study: Study, problem: Problem) -> list[FrozenTrial]:
    """Trials that came to an end, and are within the budget as this process counts it: by its own latency table."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [t for t in complete if problem.feasible(t.params)]


def last_trainings(
    study: Study,
    problem: Problem,
    train: Train,
    validate: Validate,
    finish: Train | None,
    seed: int,
    best: Best,
    progress: Progress = lambda phase, step, steps, values: None,
) -> list[End]:
    """The finalists, the best first; the best trial as it was in the study too, where none of them reaches its loss.

    That is the network that was judged, where this process trained it; else it is trained again, the same way.

    Raises:
        ValueError: If no trial came to an end, or all diverge now.
    """
    complete = sorted(judged(study, problem), key=lambda t: (t.value, t.number))
    if not complete:
        raise ValueError(
            f"none of the {len(study.trials)} trials gave a finite validation loss within the budget; train the parent "
            "longer, lower the learning rate of `train`, or raise the budget"
        )

    ends: list[End] = []

    def end(trial: FrozenTrial, by: Train) -> None:
        configuration = problem.space.configuration(trial.params)
        with suppress(Diverged):
            model = trained(problem, configuration, by, lambda loss: None, seed)
            loss = validation_loss(validate, model)
            if math.isfinite(loss):
                ends.append(End(loss, trial, configuration, model, by is finish))

    baselines = [t for t in complete if BASELINE in t.user_attrs]
    if finish is not None:
        finalists = [t for t in complete if BASELINE not in t.user_attrs][:FINALISTS] + baselines[:1]
        for step, trial in enumerate(finalists, start=1):
            end(trial, finish)
            progress("finish", step, len(finalists), {"best loss": min((e.loss for e in ends), default=math.nan)})
    had = complete[0].value
    assert had is not None  # it is complete
    if had < min((e.loss for e in ends), default=math.inf):
        if best.model is not None and best.number == complete[0].number:
            ends.append(End(best.loss, complete[0], problem.space.configuration(complete[0].params), best.model, False))
        else:
            end(complete[0], train)
    # where training is not the same each time, no network of this process may be as good as a baseline was
    reached = min((e.loss for e in ends), default=math.inf)
    if baselines and baselines[0] is not complete[0] and reached > float(baselines[0].values[0]):
        end(baselines[0], train)
    if not ends:
        raise ValueError("the winner diverged in its last training; lower the learning rate of `finish`")
    return sorted(ends, key=lambda e: e.loss)
