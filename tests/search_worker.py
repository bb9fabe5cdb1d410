"""A worker that tests kill: it asks and tells, and acknowledges each trial on standard output once it is told.

python -m tests.search_worker FILE TRIALS
"""

import sys
import time

import optuna
from optuna.distributions import CategoricalDistribution

from sgsc.search.kmeans_tpe import KMeansTPESampler
from sgsc.search.storage import open_storage, open_study, working

SPACE = {f"bits{i}": CategoricalDistribution((2, 3, 4, 6, 8)) for i in range(6)}


def main(path: str, trials: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    started = time.perf_counter()
    study = open_study(open_storage(path), "study", KMeansTPESampler(space=SPACE))
    print("open", time.perf_counter() - started, flush=True)
    for _ in range(trials):
        trial = study.ask()
        with working(trial):
            value = sum(trial.suggest_categorical(name, d.choices) for name, d in SPACE.items())
            try:
                study.tell(trial, value)
            except optuna.exceptions.UpdateFinishedTrialError:  # it was slow, and another took it for lost
                continue
        print("told", trial.number, value, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
