"""The search: trials to reach what random reaches, cost of a proposal, kills, and real networks.

    python -m bench.search [surrogates] [proposal] [kills] [search-digits] [search-mnist] [search-resnet20]
                           [--data PATH] [--reduced] [--seconds N] [--seeds N] [--device cuda]

What is in the results at this commit is not measured again, so that a call cut off, or ended by --seconds, goes on when
it is repeated. The surrogates are those of bench/search_surrogates.py, the networks' rows those of
bench/search_networks.py; --reduced trains these less, and each row says by which schedule it was trained.
"""

from __future__ import annotations

import argparse
import functools
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from sgsc.search.storage import open_storage, open_study
from tests import servers

from . import record
from .runs import Row, Section, add_options, shared
from .search_claims import kill_claims, network_claims, proposal_claims, surrogate_claims
from .search_networks import FULL, network
from .search_surrogates import BITS, MEASURED, METHODS, Surrogate, measure, ours, problem_of

SEEDS = {"surrogates": 60, "proposal": 3, "kills": 1}  # of other sections 3
FEW_SEEDS = {"TPE, independent": 20}  # methods that take too long for all
FRESH = 100  # first seed of the surrogates: on those from 0 the sampler's constants were chosen
LAYERS = (12, MEASURED, 24, 60)
MOST = {"random": 5000, "k-means TPE": 1000, "TPE, multivariate": 1000, "TPE, independent": 300}
PARAMETERS, TRIALS = 60, 500
KILLS = 100


def surrogates(section: Section, seeds: Sequence[int]) -> None:
    """Every method on every problem, the slowest one last; no seed that the sampler was tuned on."""
    target = functools.cache(lambda layers, seed: problem_of(layers, seed).target())
    for method in METHODS:
        for layers in LAYERS:
            for seed in (FRESH + s for s in seeds[: FEW_SEEDS.get(method)]):

                def run(layers: int = layers, seed: int = seed, method: str = method) -> Row:
                    return measure(layers, seed, method, target(layers, seed), MOST[method])

                section.row({"task": f"surrogate of {layers}", "layers": layers, "seed": seed, "method": method}, run)


def proposal(section: Section, seeds: Sequence[int]) -> None:
    """Milliseconds of one proposal at 60 parameters and 500 trials, in memory, median of 11; ours within a budget."""
    for seed in seeds:
        for method in ("k-means TPE", "TPE, multivariate", "TPE, independent"):
            section.row({"task": "proposal", "seed": seed, "method": method}, lambda s=seed, m=method: _proposal(s, m))


def _proposal(seed: int, method: str) -> Row:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    problem, rng = Surrogate(PARAMETERS, seed), np.random.default_rng(seed)
    space = {f"bits{i:02d}": CategoricalDistribution([int(b) for b in BITS]) for i in range(PARAMETERS)}
    sampler = {
        "k-means TPE": lambda: ours(problem, seed)[0],
        "TPE, multivariate": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
        "TPE, independent": lambda: optuna.samplers.TPESampler(seed=seed),
    }[method]()
    study = optuna.create_study(sampler=sampler)
    drawn = problem.random(rng, TRIALS)
    for choices, value in zip(drawn, problem.value(drawn), strict=True):
        params = {name: int(BITS[c]) for name, c in zip(space, choices, strict=True)}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=float(value)))
    times = []
    for _ in range(12):
        started = time.perf_counter()
        trial = study.ask(space)
        times.append(time.perf_counter() - started)
        study.tell(trial, state=TrialState.FAIL)
    return {"parameters": PARAMETERS, "trials": TRIALS, "milliseconds": 1e3 * statistics.median(times[1:])}


def kills(section: Section, seeds: Sequence[int]) -> None:
    """Workers killed at random moments, one after another on one study; on servers too that are installed."""
    for seed in seeds:
        section.row({"task": "kills", "seed": seed, "method": "SQLite"}, lambda s=seed: _kills_of_a_file(s))
        for kind in servers.installed():
            row = {"task": "kills", "seed": seed, "method": kind.__name__}
            section.row(row, lambda s=seed, k=kind: _kills_of_a_server(s, k))


def _kills_of_a_file(seed: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        return _kills(seed, f"{folder}/s.db")


def _kills_of_a_server(seed: int, kind: type[servers.Server]) -> Row:
    with servers.server(kind) as server:
        return _kills(seed, server.database("kills"))


def _kills(seed: int, where: str) -> Row:
    rng, told, openings = random.Random(seed), {}, []
    for _ in range(KILLS):
        command = [sys.executable, "-m", "tests.search_worker", where, "100000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            openings.append(float(process.stdout.readline().split()[1]))
            time.sleep(rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
            lines = [line.split() for line in process.stdout.read().splitlines()]
        told |= {int(line[1]): float(line[2]) for line in lines if line[0] == "told" and len(line) == 3}
    storage = open_storage(where)
    trials = open_study(storage, "study", optuna.samplers.RandomSampler()).get_trials()
    storage.engine.dispose()
    complete = {t.number: t.value for t in trials if t.state == TrialState.COMPLETE}
    return {
        "kills": KILLS,
        "acknowledged": len(told),
        "lost": sum(complete.get(number) != value for number, value in told.items()),
        "zombies": sum(t.state == TrialState.RUNNING for t in trials),
        "slowest_opening_seconds": max(openings),
        "median_opening_seconds": statistics.median(openings),
    }


SECTIONS: dict[str, tuple[Callable[[Section, Sequence[int]], None], Callable[[list[Row]], list[Row]]]] = {
    "surrogates": (surrogates, surrogate_claims),
    "proposal": (proposal, proposal_claims),
    "kills": (kills, kill_claims),
    **{f"search-{task}": (network, network_claims) for task in FULL},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not there yet; 0 also where time ran out before all of it was."""
    chosen = record.options(arguments, str(__doc__).splitlines()[0], _more)
    unknown = [name for name in chosen.sections if name not in SECTIONS]
    if unknown:
        print(f"bench.search: no section is called {unknown[0]!r}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        raise SystemExit(2)
    with shared(chosen, "reduced" if chosen.reduced else "full") as settings:
        for name in chosen.sections or SECTIONS:
            run, claims = SECTIONS[name]
            own = settings if run is network else replace(settings, device="cpu", device_name=None)
            section = Section(name, own, claims, file="search")
            seeds = range(chosen.seeds or (1 if chosen.quick else SEEDS.get(name, 3)))
            if not section.finished(functools.partial(run, section, seeds)):
                break
    return 0


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    add_options(parser, "the data of mnist and resnet20")
    parser.add_argument("--reduced", action="store_true", help="short training for a CPU, and said so in every row")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of each section (default: 60, 3 or 1)")


if __name__ == "__main__":
    sys.exit(main())
