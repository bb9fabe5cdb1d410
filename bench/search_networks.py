"""The search on real networks, against what is had without it. One float network a task and seed; all train alike.

    uniform          every uniform width within a budget, with and without 8 bits at both ends, trained as long as a
                     trial of a search, and the best of them as long as its finalists; the one of least validation loss
    integer program  the exact allocation of the sensitivity within the same budget, trained alike
    kmeans-tpe       `sgsc search` with four fifths of the bytes of the smaller of those two: 20 % fewer than both
    tpe              the same by Optuna's TPE, with as many trials more as take the time of our sensitivity
    proxy            random configurations of the search's space and budget, each after the short training of a trial
                     and after the long one: the rank correlation of their validation losses

ResNet-20 is compared at two sizes: that of the narrowest uniform width that wider ones do not beat by more than one
standard error of validation accuracy (4 bits; 6 were tried, on a seed that no row has), and one with nothing to spare.

Everything is chosen by validation samples; what is chosen answers the test split once. The searches are the command
line, start-up, sensitivity, all last trainings and packing included. Processor seconds are of one thread; those of the
first row of a call hold the float network's training too, where it was not there.
"""

from __future__ import annotations

import copy
import functools
import math
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import optuna
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import TensorDataset

from sgsc.artefact import load_into, save
from sgsc.demos.job import FLOAT, MODEL, float_model, read_float
from sgsc.demos.search import STUDY, WINNER, Schedule, loss_of, parse_budget, parts_of
from sgsc.demos.task import Task
from sgsc.demos.tasks import load
from sgsc.demos.training import evaluate, from_file
from sgsc.packed import pack
from sgsc.search.baselines import RandomSampler
from sgsc.search.cost import Budget, Configuration
from sgsc.search.finals import FINALISTS
from sgsc.search.problem import Problem, prepare_search
from sgsc.search.trials import Train, trained
from sgsc.size import float_bytes

from .runs import Row, Section, called, in_all, timed
from .search_claims import REFERENCES, SEARCHES

SHARE = 0.8  # of the bytes of the smaller reference


@dataclass(frozen=True)
class Plan:
    """Budgets of the references, trials, steps of a trial, a winner and the float network, proxies; what in."""

    budgets: tuple[str, ...]
    trials: int
    steps: int | None = None
    finish_steps: int | None = None
    float_steps: int | None = None
    proxies: int = 20
    precision: str = "float32"


SMALL, BOTH = ("11%",), ("14.2%", "11%")
# of ResNet-20 what a GPU does in some calls of nine minutes: 93,000 steps a seed and budget
FULL = {"digits": Plan(SMALL, 100), "mnist": Plan(SMALL, 100), "resnet20": Plan(BOTH, 60, 200, 2000)}
REDUCED = {
    "digits": Plan(SMALL, 30, 40, 300, None, 20),
    "mnist": Plan(SMALL, 24, 25, 100, 500, 20),
    "resnet20": Plan(BOTH, 20, 20, 120, None, 8, "bfloat16"),
}


class Network:
    """One task, seed and budget: what its rows share, made when the first of them needs it."""

    def __init__(self, section: Section, task: str, seed: int, within: str) -> None:
        self.section, self.name, self.seed, self.within = section, task, seed, within
        self.plan = plan_of(section, task)
        self.start = section.start(f"search-{task}", seed)

    @cached_property
    def task(self) -> Task:
        """Data and the float network's schedule."""
        task = load(self.name, self.section.settings.data if self.name != "digits" else None, self.seed)
        return from_file(task, None, self.plan.float_steps, self.plan.precision)

    @cached_property
    def float(self) -> nn.Module:
        """The trained float network, which lies beside others between runs."""
        return self._trained().cpu().eval()

    @property
    def folder(self) -> Path:
        """Where the float network lies."""
        folder = self.start.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def file(self) -> Path:
        """The float network's, which is trained where it is not there."""
        path = self.folder / FLOAT
        if not path.is_file():
            self._trained()
        return path

    def _trained(self) -> nn.Module:
        return float_model(self.task.to(self.device), self.seed, self.folder, lambda *_: None)

    @property
    def learned(self) -> Row:
        """What taught and judged, and in which precision: of all rows; labels did those of before."""
        return {"distilled": True, "judged_by": "answers", "precision": self.plan.precision}

    @property
    def device(self) -> str:
        """Where it is trained."""
        return self.section.settings.device

    @cached_property
    def schedule(self) -> Schedule:
        """Of a trial and of a winner."""
        steps = self.plan.steps or round(0.1 * self.task.compress_steps)
        finish = self.plan.finish_steps or self.task.compress_steps
        return Schedule(
            self.task.to(self.device), self.device, self.seed, steps, finish, copy.deepcopy(self.float).to(self.device)
        )

    def problem(self, budget: Budget) -> Problem:
        """Sensitivity, space and baselines within a budget."""
        return prepare_search(self.float, budget, loss_of(self.task), parts_of(self.task), seed=self.seed)

    @property
    def budget(self) -> Budget:
        """Of the references."""
        return parse_budget(self.within, float_bytes(self.float))

    @cached_property
    def test(self) -> TensorDataset:
        """For what was chosen."""
        return self.task.test()

    def row(self, method: str, measure: Callable[[Path], Row]) -> Row:
        """The row of a method."""
        of = {"task": self.name, "seed": self.seed, "within": self.within, "method": method}
        return self.section.in_parts(of, measure)

    @torch.no_grad()
    def answered(self, model: nn.Module, split: TensorDataset) -> Row:
        """How many validation samples there are, the share that is right, and which are wrong, by number."""
        x, y = split.tensors
        wrong = (torch.cat([model.eval()(part).argmax(1) for part in x.split(512)]) != y).nonzero()[:, 0].tolist()
        right = 1 - len(wrong) / len(y)
        return {"validation_samples": len(y), "validation_accuracy": right, "validation_wrong": wrong}

    def judged(self, model: nn.Module) -> Row:
        """A trained network, on validation samples."""
        return {
            "validation_loss": self.schedule.loss(model),
            **self.answered(model, self.schedule.task.validation),
        }


def network(section: Section, seeds: Sequence[int]) -> None:
    """All rows of one task, those that claims are about first; seed by seed, so that the first is whole early."""
    name = section.name.removeprefix("search-")
    limits = {}
    for within in plan_of(section, name).budgets:
        for seed in seeds:
            one = Network(section, name, seed, within)
            sizes = [one.row(m, functools.partial(reference, one, m))["stored_bytes"] for m in REFERENCES]
            limits[within, seed], more = math.floor(SHARE * min(sizes)), 0
            for sampler in SEARCHES:
                row = one.row(sampler, functools.partial(search, one, sampler, limits[within, seed], more))
                more = math.ceil(row["sensitivity_seconds"] / row["trial_seconds"])
    for (within, seed), limit in limits.items():
        one = Network(section, name, seed, within)
        one.row("proxy", functools.partial(proxy, one, limit))


def plan_of(section: Section, task: str) -> Plan:
    """By the section's schedule."""
    return {"full": FULL, "reduced": REDUCED}[section.settings.schedule][task]


def reference(one: Network, method: str, folder: Path) -> Row:
    """The best network of one family within the budget."""
    made = timed(lambda: {"problem": one.problem(one.budget)})
    problem: Problem = made["problem"]
    chosen = {
        name: configuration
        for name, configuration in problem.baselines.items()
        if name.startswith(method) and one.budget.holds(problem.cost(configuration))
    }
    if not chosen:
        raise SystemExit(f"{one.name}: no {method} is within {one.within}; raise the budget of the bench")

    def trial(configuration: Configuration, train: Train, file: Path) -> Row:
        model = trained(problem, configuration, train, lambda loss: None, one.seed)
        judged = one.judged(model)
        notes = {"task": one.name, "seed": one.seed, "searched": True}  # as the search's files
        save(pack(model.cpu(), remove=False), file, notes=notes)
        return judged

    tried: dict[str, tuple[Row, Path]] = {}
    spent = [made]

    def try_all(kind: str, train: Train, names: Sequence[str]) -> None:
        for name in names:
            file = folder / f"{list(chosen).index(name)}-{kind}.sgsc"
            judged = one.section.kept(
                file.with_suffix(".json"), said(chosen[name]), functools.partial(trial, chosen[name], train, file)
            )
            spent.append(judged)
            if name not in tried or judged["validation_loss"] < tried[name][0]["validation_loss"]:
                tried[name] = judged, file

    try_all("short", one.schedule.short, list(chosen))  # as a search does
    try_all("long", one.schedule.long, sorted(tried, key=lambda name: tried[name][0]["validation_loss"])[:FINALISTS])
    best = min(tried, key=lambda name: tried[name][0]["validation_loss"])
    judged, file = tried[best]
    judged = {key: value for key, value in judged.items() if key != "of"}
    return {
        **{"configuration": best, "tried": {name: row["validation_loss"] for name, (row, _) in tried.items()}},
        **judged,
        **ended(one, file),
        **in_all(spent),
    }


def ended(one: Network, file: Path) -> Row:
    """Bytes of the file, and how float and packed network answer the test split."""
    packed = load_into(one.float, file)
    total, before, after = float_bytes(one.float), evaluate(one.float, one.test), evaluate(packed, one.test)
    size = file.stat().st_size
    return {
        **{"float_bytes": total, "stored_bytes": size, "stored_ratio": size / total, "budget": one.within},
        **{"packed_accuracy": after["accuracy"], "float_accuracy": before["accuracy"]},
        **{"steps": one.schedule.steps, "finish_steps": one.schedule.finish_steps, **one.learned},
    }


def search(one: Network, sampler: str, limit: int, more: int, folder: Path) -> Row:
    """One `sgsc search`; where one was interrupted it goes on, and its seconds are those of the last part."""
    plan, settings = one.plan, one.section.settings
    start, resumed = one.file(), (folder / STUDY).is_file()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sgsc", "search", one.name, "--budget", f"{limit}B", "--seed", str(one.seed)]
    command += ["--trials", str(plan.trials + more), "--sampler", sampler, "--out", str(folder)]
    command += ["--start", str(start), "--precision", plan.precision]
    flags = settings.flags(one.name)
    for flag, value in (("--steps", plan.steps), ("--finish-steps", plan.finish_steps)):
        flags += [] if value is None else [flag, str(value)]
    found = called([*command, "--json", *flags], settings.timeout())
    network = read_float(one.task, folder / WINNER)  # with the channels that it has
    answered = one.answered(load_into(network, folder / MODEL), one.task.validation)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    judged = [t for t in found["trials"] if t["state"] in ("complete", "pruned", "diverged")]
    kept = ("float_bytes", "stored_bytes", "stored_ratio", "float_accuracy", "packed_accuracy", "steps", "finish_steps")
    return {
        **{key: found[key] for key in kept},
        **one.learned,
        **{"budget": f"{limit} B", "trials": len(judged), "configuration": found["result"]["origin"]},
        "validation_loss": found["result"]["loss"],
        **answered,
        "validation_accuracy": found["validation"]["packed"]["accuracy"],  # the command's own
        "short_loss": min(t["loss"] for t in judged if t["loss"] is not None),
        "sensitivity_seconds": found["sensitivity"]["seconds"],
        "trial_seconds": statistics.fmean(t["seconds"] for t in judged),
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "seconds": found["seconds"],
        **({"resumed": True} if resumed else {}),
    }


def proxy(one: Network, limit: int, folder: Path) -> Row:
    """Rank correlation of short and long training."""
    made = timed(lambda: {"problem": one.problem(Budget(bytes=limit))})
    problem: Problem = made["problem"]

    def trial(configuration: Configuration) -> Row:
        return {
            kind: one.schedule.loss(trained(problem, configuration, train, lambda loss: None, one.seed))
            for kind, train in (("short", one.schedule.short), ("long", one.schedule.long))
        }

    found = [
        one.section.kept(folder / f"{place}.json", said(configuration), functools.partial(trial, configuration))
        for place, configuration in enumerate(drawn(problem, one.plan.proxies, one.seed))
    ]
    short, long = ([part[kind] for part in found] for kind in ("short", "long"))
    return {
        **{"configurations": len(short), "spearman": float(np.asarray(spearmanr(short, long))[0])},
        **{"short_losses": short, "long_losses": long, "budget": f"{limit} B"},
        **{"steps": one.schedule.steps, "finish_steps": one.schedule.finish_steps, **one.learned},
        **in_all([made, *found]),
    }


def said(configuration: Configuration) -> Row:
    """It, JSON-able."""
    parts = {"bits": configuration.bits, "sizes": configuration.sizes}
    return {part: {name: int(value) for name, value in of.items()} for part, of in parts.items()}


def drawn(problem: Problem, count: int, seed: int) -> list[Configuration]:
    """Random configurations of the search's choices within the budget, all different."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = problem.space.distributions()
    study = optuna.create_study(sampler=RandomSampler(seed, problem.feasible, space, problem.space.windows))
    return [problem.space.configuration(study.ask(space).params) for _ in range(count)]
