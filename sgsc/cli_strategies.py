"""The command `strategies`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from .cli_output import Progress, print_json
from .cli_task import add_task, task_of


def arguments_of(sub: argparse.ArgumentParser) -> None:
    """What the command takes."""
    add_task(sub, nargs="?")
    sub.set_defaults(device="cpu")  # the search has no flag for it
    sub.add_argument("--model", default=None, help="instead of a task: module:name or file.py:name of a network")
    sub.add_argument("--calibration", type=Path, default=None, help="of --model: .npy of inputs, (samples, ...)")
    sub.add_argument("--bits-weights", type=int, default=4, help="2 to 8 (default: 4)")
    sub.add_argument("--bits-activations", type=int, default=8, help="2 to 8 (default: 8), or 0: inputs stay float")
    sub.add_argument(
        "--edge-bits", type=int, default=8, help="least bits of first and last layer (default: 8; 0: none)"
    )
    sub.add_argument("--per-tensor", action="store_true", help="one step a weight instead of one a channel")
    sub.add_argument(
        "--weights", type=_names, default=None, help="strategies to choose from, with commas (default: all)"
    )
    sub.add_argument("--inputs", type=_names, default=None, help="the same of activations (default: all)")
    sub.add_argument("--skip", type=_names, default=(), help="layers to leave float, with commas")
    sub.add_argument("--loss", default=None, help="kl (default: logits, classes last), l1 or l2 (images, numbers)")
    sub.add_argument("--steps", type=int, default=None, help="of the mixture (default: 100)")
    sub.add_argument("--train", type=int, default=None, metavar="STEPS", help="train a task with strategies that learn")
    sub.add_argument("--rate", type=float, default=None, help="peak learning rate of --train (default: the task's)")
    sub.add_argument("--samples", type=int, default=1024, help="of calibration (default: 1024)")
    sub.add_argument("--integer-bias", action="store_true", help="biases in whole steps of int32 sums")
    sub.add_argument("--no-correct-bias", action="store_true", help="biases do not make up for mean errors; faster")
    sub.add_argument("--out", type=Path, default=None, help="run folder (default: runs/strategies-TASK, or -trained)")
    sub.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")


def run(options: argparse.Namespace) -> int:
    """Search or train, write the derived network and the report; 0.

    Raises:
        ValueError: If neither or both of a task and a model are named, or a file is not what is asked for.
    """
    if (options.task is None) == (options.model is None) or (options.model is None) != (options.calibration is None):
        raise ValueError("name a task, or --model with --calibration; `sgsc strategies --help` says what they are")
    _check_purpose(options)
    from . import report as reports
    from .demos.strategies import draw, search, search_any, train
    from .environment import environment
    from .files import made, write_atomically

    settings: dict[str, Any] = {
        **{key: vars(options)[key] for key in ("bits_weights", "weights", "inputs", "skip", "seed")},
        **{"bits_activations": options.bits_activations or None, "edge_bits": options.edge_bits or None},
        "per_channel": not options.per_tensor,
    }
    if options.train is None:
        settings |= {"integer_bias": options.integer_bias, "correct_bias": not options.no_correct_bias}
        settings |= {key: vars(options)[key] for key in ("loss", "steps") if vars(options)[key] is not None}
    of = options.task or "model"
    folder = options.out or Path("runs") / f"strategies-{of}{'' if options.train is None else '-trained'}"
    with made(folder), Progress(quiet=options.json) as progress:
        if options.model:
            network, inputs = _named(options.model), draw(_read(options.calibration), options.samples, options.seed)
            report = search_any(network, inputs, folder, progress=progress, **settings)
        else:
            task = task_of(options)
            settings |= {"samples": options.samples, "progress": progress}
            if options.train is None:
                report = search(task, folder, **settings)
            else:
                report = train(task, folder, steps=options.train, rate=options.rate, **settings)
    report |= {"limit": options.limit, **environment()}
    write_atomically(folder / "report.json", reports.to_json(report).encode())
    reports.write_strategies_html(report, folder / "report.html")
    if options.json:
        print_json(report)
        return 0
    Console().print(reports.strategies_summary(report))
    written = ["derived.safetensors", *(["model.sgsc"] if not report["not_packed"] else []), "report.json, report.html"]
    print(f"wrote {folder}/: {', '.join(written)}")
    if report["not_packed"]:
        print(f"no model.sgsc: {report['not_packed']}", file=sys.stderr)
    return 0


def _check_purpose(options: argparse.Namespace) -> None:
    """Refuse flags of the other purpose.

    Raises:
        ValueError: If there is one, or a network of one's own is to be trained.
    """
    of_task = {"--start": options.start, "--float-steps": options.float_steps, "--data": options.data}
    of_task |= {"--limit": options.limit, "--precision": None if options.precision == "float32" else options.precision}
    for flag, given in of_task.items() if options.model else ():
        if given is not None:
            raise ValueError(f"{flag} is of a task; --model is trained already, and takes --calibration")
    for flag, bits, none in (
        ("--bits-weights", options.bits_weights, False),
        ("--bits-activations", options.bits_activations, True),
        ("--edge-bits", options.edge_bits, True),
    ):
        if not (2 <= bits <= 8 or (none and bits == 0)):
            raise ValueError(f"{flag} {bits}: want 2 to 8{', or 0 for none' if none else ''}")
    if options.train is None:
        if options.rate is not None:
            raise ValueError("--rate is of a training; name its steps too, with --train STEPS")
        return
    if options.model:
        raise ValueError(
            "--train needs a task, which brings batches along; train your own network by sgsc.StrategyTraining"
        )
    of_search = {
        **{"--steps": options.steps is not None, "--loss": options.loss is not None},
        **{"--integer-bias": options.integer_bias, "--no-correct-bias": options.no_correct_bias},
    }
    for flag, given in of_search.items():
        if given:
            raise ValueError(f"{flag} is of the search without training; leave it out, or --train")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _named(name: str) -> Any:
    """What module:name or file.py:name gives: a module, or what a function of no arguments returns.

    Raises:
        ValueError: If there is no such thing, it needs arguments, or it is no module.
    """
    from torch import nn

    home, _, attribute = name.rpartition(":")
    if not home or not attribute:
        raise ValueError(f"--model {name!r}: want module:name or file.py:name, such as net.py:make")
    # what the network's own code imports lies beside it, and may be imported as late as it runs; ours goes first
    sys.path.append(str(Path(home).resolve().parent) if home.endswith(".py") else str(Path.cwd()))
    try:
        if home.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(home).stem, home)
            if spec is None or spec.loader is None:
                raise ValueError(f"{home} is no Python file")
            found = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
            spec.loader.exec_module(found)
        else:
            found = importlib.import_module(home)
        made = getattr(found, attribute)
    except Exception as error:  # of whatever the file holds
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"--model {name!r}: {said}; want module:name or file.py:name") from None
    if not isinstance(made, nn.Module):
        try:
            inspect.signature(made).bind()
        except (TypeError, ValueError) as error:
            raise ValueError(f"--model {name!r}: {error}; want an nn.Module, or a function of no arguments") from None
        try:
            made = made()
        except Exception as error:  # likewise
            raise ValueError(f"--model {name!r} does not make a network: {type(error).__name__}: {error}") from None
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"--model {name!r} is a {type(made).__name__}; want an nn.Module, or a function that makes one"
        )
    return made


def _read(path: Path) -> Any:
    """A tensor from an .npy file, without pickle.

    Raises:
        ValueError: If it is no such file.
    """
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, OSError, TypeError, EOFError) as error:
        raise ValueError(f"--calibration {str(path)!r}: {error}; want what numpy.save writes") from None
