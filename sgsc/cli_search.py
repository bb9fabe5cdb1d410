"""The command `search`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from .cli_output import Progress, print_json
from .cli_task import add_device, add_task, task_of


def arguments_of(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_task(sub)
    add_device(sub)
    sub.add_argument("--budget", required=True, help="10%%, 50kB, 4bits, 2.5MMAC, 3ms; several with commas")
    sub.add_argument("--trials", type=int, default=60, help="of the study, baselines included (default: 60)")
    sub.add_argument("--out", type=Path, default=None, help="run folder (default: runs/search-TASK)")
    sub.add_argument("--storage", default=None, help="URL or SQLite file of the study (default: study.db in --out)")
    sub.add_argument("--study", default=None, help="name of the study (default: the task); workers share it")
    sub.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    sub.add_argument("--steps", type=int, default=None, help="optimiser steps of a candidate (default: by the task)")
    sub.add_argument("--finish-steps", type=int, default=None, help="of the winner (default: by the task)")
    sub.add_argument("--sampler", default="kmeans-tpe", help="kmeans-tpe (default), tpe or random")
    sub.add_argument("--sensitivity", default="auto", help="hutchinson, fisher or auto: fisher from 50,000 weights on")
    sub.add_argument("--bits-only", action="store_true", help="keep the channels of every layer")


def run(options: argparse.Namespace) -> int:
    """Search, or go on with a study that is there; 0 where the budget is held.

    Raises:
        ValueError: If Optuna is not installed.
    """
    from . import report as reports
    from .environment import environment
    from .files import made, write_atomically

    try:
        import optuna
    except ImportError:
        raise ValueError("the search needs Optuna, which is not installed; pip install 'sgsc[search]'") from None
    from .demos.search import parse_budget, search

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parse_budget(options.budget, 1)  # a bad flag is refused before the data is read
    task = task_of(options)
    folder = options.out or Path("runs") / f"search-{options.task}"
    with made(folder), Progress(quiet=options.json) as progress:
        done = search(
            *(task, options.budget, folder),
            trials=options.trials,
            seed=options.seed,
            steps=options.steps,
            finish_steps=options.finish_steps,
            storage=options.storage,
            study=options.study,
            sampler=options.sampler,
            sensitivity=options.sensitivity,
            widths=not options.bits_only,
            device=options.device,
            progress=progress,
        )
    report = {**done.report, "budget_held": done.held, "limit": options.limit, **environment()}
    write_atomically(folder / "report.json", reports.to_json(report).encode())
    reports.write_search_html(report, folder / "report.html")
    if options.json:
        print_json(report)
    else:
        Console().print(reports.search_summary(report))
        print(f"wrote {folder}/: model.sgsc, winner.safetensors, report.json, report.html")
    if not done.held:
        print(f"sgsc search: over the budget {report['budget_text']}; see {folder}/report.json", file=sys.stderr)
    return 0 if done.held else 1
