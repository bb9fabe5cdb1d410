"""The command line: the only place that parses and prints.

    sgsc compress TASK   train, compress, pack, save, certify in a fresh process, report
    sgsc search TASK     bits and channels of each layer under a budget, pack, report
    sgsc strategies TASK  the quantization strategy of each layer, searched or trained, report
    sgsc certify RUN     load RUN/model.sgsc and compare it with the float network of the run
    sgsc inspect FILE    what a file holds
    sgsc verify FILE     whether a file is whole
    sgsc report RUN      write report.html again from report.json
    sgsc bench           throughput of the kernels on this machine; --claims: which claims do not hold
    sgsc tune FILE ...   time configurations of the layers' GPU kernels and store the fastest

Each takes --json: one JSON document on standard output and nothing else. Exit codes: 0 done; 1 the target or the
tolerance was not held, a file is not whole, or a claim does not hold; 2 wrong use; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import __version__, cli_files, cli_search, cli_strategies
from .cli_output import Progress, plain, print_json
from .cli_task import add_device, add_task, shares, task_of
from .config import CompressionConfig, add_settings, from_arguments

# Before torch starts its threads: on a machine that others use too, threads that spin while they wait for one another
# made a training step 12 times slower (2 threads on 2 busy cores); sleeping ones cost nothing measurable on idle cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPORT, CERTIFICATE, PAGE = "report.json", "certificate.json", "report.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Raises:
        RuntimeError: Of a defect.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, RecursionError) as error:
        return _refused(options.command, error)
    except RuntimeError as error:
        if str(error).startswith("SGSC_ISA="):
            return _refused(options.command, error)
        raise
    except KeyboardInterrupt:
        print(f"sgsc {options.command}: interrupted", file=sys.stderr)
        return 130


def _refused(command: str, error: Exception) -> int:
    """Say why a command ends, on one line; its exit code."""
    from .artefact import ArtefactError  # not before: a mistyped flag is answered without torch

    said = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}; name another path"
    print(f"sgsc {command}: {plain(said)}", file=sys.stderr)
    return 1 if isinstance(error, ArtefactError) else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sgsc", description="Networks that compress themselves, safely.")
    parser.add_argument("--version", action="version", version=f"sgsc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str):
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
        sub.set_defaults(run=run)
        return sub

    sub = command("compress", _compress, "compress a demo task, end to end")
    add_task(sub)
    add_device(sub)
    sub.add_argument("--out", type=Path, default=None, help="run folder (default: runs/TASK)")
    sub.add_argument("--samples", type=int, default=None, help="size of the preservation set (default: the task's)")
    of = "of its selectors uncertain, salient, representative, hard and random, such as uncertain=0.5,random=0.5"
    sub.add_argument("--shares", type=shares, default=None, help=of)
    sub.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint")
    sub.add_argument(
        "--quantizer", default="integer", help="integer (default), half-steps, ternary, interpolated, published"
    )
    add_settings(sub, CompressionConfig, {"steps": None, "tolerance": None, "cut": True})

    cli_search.arguments_of(command("search", cli_search.run, "search bits and channels of each layer under a budget"))

    strategies = "find the quantization strategy of each layer, without retraining or with it"
    cli_strategies.arguments_of(command("strategies", cli_strategies.run, strategies))

    compare = "compare a run's packed network with its float network"
    command("certify", _certify, compare).add_argument("folder", type=Path, help="a run folder of `sgsc compress`")
    report = "write report.html again"
    command("report", _report, report).add_argument("folder", type=Path, help="a run folder of any command")

    files = (("inspect", cli_files.inspect, "what a file holds"), ("verify", cli_files.verify, "whether it is whole"))
    for name, run, help in files:
        sub = command(name, run, help)
        sub.add_argument("file", type=Path, help="what `sgsc.save` wrote, such as model.sgsc of a run folder")

    sub = command("bench", _bench, "throughput of the kernels on this machine")
    sub.add_argument("--op", default=None, help="one operation only, such as packed_linear")
    sub.add_argument("--budget", type=float, default=0.2, help="seconds a measurement (default: 0.2)")
    sub.add_argument("--claims", action="store_true", help="list the claims of bench/results that do not hold")
    sub.add_argument("--results", type=Path, default=Path("bench/results"), help="folder of the results")

    sub = command("tune", _tune, "time configurations of the layers' GPU kernels and store the fastest")
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE")
    sub.add_argument("--batches", type=_numbers, default="1,16,64", help="tokens of a Linear (default: 1,16,64)")
    pixels, dtypes = "16,64,256,1024,4096", "float16,bfloat16,float32"
    sub.add_argument("--pixels", type=_numbers, default=pixels, help=f"the same of a convolution (default: {pixels})")
    sub.add_argument("--dtypes", type=lambda s: s.split(","), default=dtypes, help=f"of inputs (default: {dtypes})")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: want whole numbers with commas, such as 1,16,64") from None


# ---- compress and certify ----


def _compress(options: argparse.Namespace) -> int:
    from . import report as reports
    from .demos.job import CHECKPOINT, compress
    from .environment import environment
    from .files import made, write_atomically

    started = time.perf_counter()

    def settings(**own: Any) -> CompressionConfig:  # the task's own values where no flag was given
        return from_arguments(CompressionConfig, options, **{k: v for k, v in own.items() if vars(options)[k] is None})

    settings(steps=1, tolerance=0.0)  # a bad flag is refused before the data is read
    task = task_of(options)
    config = settings(steps=task.compress_steps, tolerance=task.tolerance)
    folder = options.out or Path("runs") / options.task
    with made(folder), Progress(quiet=options.json) as progress:
        how = {k: vars(options)[k] for k in ("samples", "resume", "quantizer", "shares")}
        done = compress(task, config, folder, **how, device=options.device, progress=progress)
    report = {**done.report, "data": None if options.data is None else str(options.data), "limit": options.limit}
    report |= {"start": None if options.start is None else str(options.start)}
    report |= {"device": options.device, "float_steps": 0 if task.start else task.float_steps}
    write_atomically(folder / REPORT, reports.to_json(report).encode())
    certified = _in_a_fresh_process(folder)
    certificate = certified.pop("certificate")
    report |= certified
    reasons = [report["reason"]] if report["reason"] else []
    if not report["tolerance_held"] and not reasons:
        reasons.append(certificate["reason"])
    report |= {"reason": "; ".join(reasons), "seconds": time.perf_counter() - started, **environment()}
    report["seconds_by_phase"] |= {"certification": report.pop("certify_seconds")}
    for name, value in ((REPORT, report), (CERTIFICATE, certificate)):
        write_atomically(folder / name, reports.to_json(value).encode())
    reports.write_html(report, folder / PAGE, reports.runs_beside(folder, report))
    (folder / CHECKPOINT).unlink(missing_ok=True)  # not before: what ends it while it certifies costs some steps
    if options.json:
        print_json(report)
    else:
        Console().print(reports.summary(report))
        print(f"wrote {folder}/: model.sgsc, {REPORT}, {CERTIFICATE}, {PAGE}")
    held = report["target_held"] and report["tolerance_held"]
    if not held:
        print(f"sgsc compress: not held: {report['reason']}", file=sys.stderr)
    return 0 if held else 1


def _in_a_fresh_process(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "sgsc", "certify", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        last = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise OSError(f"the packed network could not be certified in a fresh process: {last[0]}") from None


def _certify(options: argparse.Namespace) -> int:
    from .demos.certification import certify_run
    from .demos.tasks import load

    said = _read_report(options.folder)
    missing = [key for key in ("task", "seed", "tolerance") if key not in said]
    if missing:
        raise ValueError(f"{options.folder / REPORT} lacks {', '.join(missing)}; only `sgsc compress` writes them")
    task = load(said["task"], said.get("data"), said["seed"], said.get("limit"))
    result = certify_run(task, options.folder, said["seed"], said["tolerance"], said.get("margin_tolerance"))
    print_json(result) if options.json else print(result["statement"])
    return 0 if result["tolerance_held"] else 1


def _read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    if not path.is_file():
        raise ValueError(
            f"{folder} is no run folder: it has no {REPORT}; `sgsc compress TASK --out {folder}` makes one"
        )
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no report: it is not JSON ({error})") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no report: it is not a JSON object")
    return said


def _report(options: argparse.Namespace) -> int:
    from .report import runs_beside, write_html, write_search_html, write_strategies_html

    report = _read_report(options.folder)
    if report.get("kind") == "search":
        write_search_html(report, options.folder / PAGE)
    elif report.get("kind") == "strategies":
        write_strategies_html(report, options.folder / PAGE)
    else:
        write_html(report, options.folder / PAGE, runs_beside(options.folder, report))
    print_json({"file": str(options.folder / PAGE)}) if options.json else print(f"wrote {options.folder / PAGE}")
    return 0


# ---- bench and tune ----


def _bench(options: argparse.Namespace) -> int:
    from .measure import broken_claims, measure_ops

    if options.claims and options.op is not None:
        raise ValueError("--op is of measuring, --claims measures nothing; leave one of them out")
    if options.claims:
        broken = broken_claims(options.results)
        if options.json:
            print_json(broken)
        for claim in broken if not options.json else ():
            print(f"{claim['file']}: {claim['claim']}: {claim['measured']} against {claim['target']} {claim['unit']}")
        return 1 if broken else 0
    rows = measure_ops(options.op, options.budget)
    if options.json:
        print_json(rows)
        return 0
    table = Table(title="medians; share is of the copy bandwidth measured in the same run")
    for column in ("operation", "case", "backend", "µs", "GB/s", "share", "Gop/s"):
        table.add_column(column, justify="left" if column in ("operation", "case", "backend") else "right")
    for r in rows:
        shown = f"{r['microseconds']:,.1f}", f"{r['gigabytes_per_second']:.2f}", f"{r['share_of_copy']:.0%}"
        table.add_row(r["op"], r["case"], r["backend"], *shown, f"{r['gigaoperations_per_second']:.2f}")
    Console().print(table)
    return 0


def _tune(options: argparse.Namespace) -> int:
    from .artefact import read
    from .tuning import tune

    layers = {f"{path}: {name}": layer for path in options.files for name, layer in read(path).layers.items()}
    with Progress(quiet=options.json) as progress:
        rows = tune(layers, options.batches, pixels=options.pixels, dtypes=options.dtypes, progress=progress)
    if options.json:
        print_json(rows)
    for row in rows if not options.json else ():
        what = f"{plain(', '.join(row['layers']))}, {row['columns']} {row['of']}, {row['dtype']}"
        times = f"{row['heuristic_microseconds']:.1f} -> {row['microseconds']:.1f} µs"
        print(f"{what}: {times}, {row['config'] or 'the heuristic stays'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
