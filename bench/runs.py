"""Runs of the command line, each in a process of its own, and sections that go on where they were interrupted.

A section of bench.sgsc asks for rows by what they are of: method, task, seed, target and settings. A row that stands in
the results with all of that, measured at this commit, is not measured again; every other one is, and the section is
written after each. A changed or unknown commit names no code, so that nothing measured there is believed later.

Runs of one task and seed start from one float network: the first trains it, and the others take it over (--start),
which gives them what their own training would have given, to the bit on one CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sgsc.certificate import allowed
from sgsc.demos.job import CHECKPOINT, FLOAT
from sgsc.demos.training import usable
from sgsc.environment import environment
from sgsc.files import write_atomically

from . import record

Row = dict[str, Any]
SUMMARY = (
    *("task", "seed", "target_size", "float_bytes", "stored_bytes", "stored_ratio", "bits_per_weight"),
    *("float_accuracy", "packed_accuracy", "accuracy_standard_error", "float_loss", "packed_loss", "channels"),
    *("channels_removed", "target_held", "tolerance_held", "seconds", "backend", "nominal_bytes"),
)
BUNDLED = ("digits", "char-lm")  # tasks that bring their data along


class OutOfTime(Exception):
    """No time is left for the next run; what was measured is written."""


def called(command: Sequence[str], seconds: float | None = None, codes: Sequence[int] = (0,)) -> Any:
    """The JSON document that a command prints.

    Raises:
        OutOfTime: If it takes longer than `seconds`; it is ended then.
        SystemExit: If it fails; the end of what it said is the message.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            out, said = process.communicate(timeout=seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started: it certifies in a process of its own
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutOfTime from None
            raise
    if process.returncode not in codes:
        raise SystemExit(f"{' '.join(command)} failed: {said[-2000:]}")
    return json.loads(out)


def report_of(
    task: str, target: float, seed: int, rest: Sequence[str], folder: str, seconds: float | None = None
) -> Row:
    """One run of `sgsc compress`: its report. A target that was not held is a result too."""
    command = [sys.executable, "-m", "sgsc", "compress", task, "--target-size", str(target), "--seed", str(seed)]
    return called([*command, "--out", folder, "--json", *rest], seconds, codes=(0, 1))


def summary(report: Mapping[str, Any]) -> Row:
    """A report without the long lists."""
    kept, guard = report["preservation"], report["guard"]
    return {name: report[name] for name in SUMMARY} | {
        "preservation_samples": kept["samples"],
        "preservation_regressions": kept["regressions"],
        "preservation_allowed": allowed(report["tolerance"], kept["samples"]),
        "tolerance": report["tolerance"],
        "guard_samples": guard["samples"],
        "guard_regressions": guard["regressions"],
        "guard_upper_bound_95": guard["upper_bound_95"],
    }


def compress(task: str, target: float, seed: int, *rest: str) -> Row:
    """One run of the command line; its report, without the long lists."""
    with tempfile.TemporaryDirectory() as folder:
        return summary(report_of(task, target, seed, rest, folder))


def timed(measure: Callable[[], Row]) -> Row:
    """What is measured, and the time it took: of the process, and in all."""
    process, began = time.process_time(), time.perf_counter()
    made = measure()
    return {**made, "processor_seconds": time.process_time() - process, "seconds": time.perf_counter() - began}


def in_all(parts: Sequence[Row]) -> Row:
    """The time that `timed` parts took together."""
    return {key: sum(part[key] for part in parts) for key in ("processor_seconds", "seconds")}


@dataclass
class Settings:
    """What all runs of one call of a bench share.

    Attributes:
        schedule: "full", the tasks' own, "reduced" for a CPU, or "quick".
        shorter: Task -> (float steps, compression steps, precision), where they are not the task's own.
        data: Folder of the data.
        device: Where networks are trained.
        device_name: Of a GPU, for the results; None where it is a CPU.
        results: Folder of the results, None for the usual one.
        work: What is kept between runs: float networks, and parts of rows that are not whole.
        rest: Further flags of `sgsc compress`, for quick runs.
        deadline: time.monotonic() at which to stop.
        commit: Of the code that measures.
    """

    schedule: str
    shorter: Mapping[str, tuple[int, int, str]]
    data: Path | None
    device: str
    device_name: str | None
    results: Path | None
    work: Path
    rest: Sequence[str] = ()
    deadline: float = float("inf")
    commit: str = field(default_factory=lambda: environment()["commit"])

    @property
    def named(self) -> bool:
        """Whether the commit says what code this is."""
        return not self.commit.endswith("-dirty") and self.commit != "unknown"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def flags(self, task: str) -> list[str]:
        """What every command on this task gets."""
        flags = ["--device", self.device]
        if self.data is not None and task not in BUNDLED:
            flags += ["--data", str(self.data)]
        if task in self.shorter:
            float_steps, steps, precision = self.shorter[task]
            flags += ["--float-steps", str(float_steps), "--steps", str(steps), "--precision", precision]
        return flags

    def timeout(self) -> float | None:
        """Of a subprocess."""
        return None if self.left == float("inf") else max(self.left, 0.001)


def add_options(parser: argparse.ArgumentParser, data: str) -> None:
    """What the command lines of all benches have that run in sections; `data` says what of."""
    parser.add_argument("--data", type=Path, default=None, help=f"folder of {data}")
    parser.add_argument("--seconds", type=float, default=None, help="stop before, with what is measured by then")
    parser.add_argument("--device", default="cpu", help="where to train: cpu (default), cuda, auto")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench"), help="what is kept between runs (default: runs/bench)"
    )


@contextlib.contextmanager
def shared(
    chosen: argparse.Namespace,
    schedule: str = "full",
    shorter: Mapping[str, tuple[int, int, str]] | None = None,
    rest: Sequence[str] = (),
) -> Iterator[Settings]:
    """What these options say; what is kept of code that no commit names serves this call alone."""
    deadline = float("inf") if chosen.seconds is None else time.monotonic() + chosen.seconds
    device = usable(chosen.device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    made = Settings(
        *(schedule, shorter or {}, chosen.data, device, name, chosen.results, chosen.work), rest=rest, deadline=deadline
    )
    with tempfile.TemporaryDirectory() as folder:
        yield made if made.named else replace(made, work=Path(folder))


@dataclass
class Section:
    """Rows of one section of a result file, measured one by one; `claims` makes its claims of all of them."""

    name: str
    settings: Settings
    claims: Callable[[list[Row]], list[Row]]
    file: str = "sgsc"  # of bench.record.NAMES, and the bench of that name
    begun: bool = field(default=False, init=False)  # whether this call has measured a part of a row

    def __post_init__(self) -> None:
        found = record.read(self.file, self.settings.results)["rows"]
        self.rows: list[Row] = [row for row in found if row["section"] == self.name]

    def row(self, of: Row, measure: Callable[[], Row], resumes: bool = False) -> Row:
        """The row with all the entries of `of`: the one that is there, or a new one, which is then written.

        Args:
            of: What it is of.
            measure: Returns the other entries.
            resumes: Whether what it could not end in time is not lost; else it is not begun unless it will end.

        Raises:
            OutOfTime: If it is not there, and no time is left to measure it.
        """
        of = {"schedule": self.settings.schedule, "device": self.settings.device_name, **of}
        same = [row for row in self.rows if all(row.get(key) == value for key, value in of.items())]
        of = {key: value for key, value in of.items() if value is not None}
        for row in same:
            if self.settings.named and row["commit"] == self.settings.commit and "missing" not in row:
                return row
        if self.settings.left <= (0.0 if resumes else self._expected(of)):
            raise OutOfTime
        had = self.settings.left
        try:
            made = {**of, **measure(), "commit": self.settings.commit}
        except OutOfTime:
            if not resumes:  # a call that gives it no more time would begin it for nothing, again and again
                said = " ".join(str(of[key]) for key in ("task", "method", "seed") if key in of)
                print(f"{self.name}: {said} did not end in {had:.0f} s, and is lost; raise --seconds", file=sys.stderr)
            raise
        self.rows = [row for row in self.rows if row not in same] + [made]
        self.write()
        return made

    def in_parts(self, of: Row, measure: Callable[[Path], Row]) -> Row:
        """A row that keeps what it has in a folder until it is whole: the same call, repeated, goes on with it."""
        s = self.settings
        name = "-".join(str(value) for value in (self.name, *of.values(), s.schedule, s.device, s.commit))
        folder = s.work / re.sub(r"[^\w.-]", "-", name)

        def whole() -> Row:
            folder.mkdir(parents=True, exist_ok=True)
            made = measure(folder)
            shutil.rmtree(folder)
            return made

        return self.row(of, whole, resumes=s.named)  # what no commit names is not kept

    def kept(self, path: Path, of: Any, measure: Callable[[], Row]) -> Row:
        """A part of a row: what the file says, or what is measured now and then lies there, with the time it took.

        Args:
            path: Of the file.
            of: What the part is of, JSON-able: a file of something else is not believed.
            measure: Returns it.

        Raises:
            OutOfTime: If it is not there, a part was measured in this call, and no time is left for the longest one.
        """
        if path.is_file() and (found := json.loads(path.read_text()))["of"] == of:
            return found
        beside = (json.loads(part.read_text())["seconds"] for part in path.parent.glob("*.json"))
        if self.begun and self.settings.left <= max(beside, default=0.0):  # else calls that are too short never end
            raise OutOfTime
        self.begun = True
        made = {**timed(measure), "of": of}
        write_atomically(path, json.dumps(made).encode())
        return made

    def _expected(self, of: Row) -> float:
        """Seconds that a row like this took at most; 0 where none was measured."""
        keys = ("schedule", "device", "task", "method")
        alike = [row for row in self.rows if all(row.get(key) == of.get(key) for key in keys)]
        trained = "seed" in of and self.start(of["task"], of["seed"]).is_file()
        return max((row.get("seconds", 0.0) - trained * row.get("float_seconds", 0.0) for row in alike), default=0.0)

    def write(self) -> None:
        """Put all rows and claims into the results; rows of before keep their stamp."""
        command = f"python -m bench.{self.file} {self.name}"
        record.write(self.file, self.name, self.rows, self.claims(self.rows), command, self.settings.results)
        self.rows = [
            row for row in record.read(self.file, self.settings.results)["rows"] if row["section"] == self.name
        ]

    def finished(self, measure: Callable[[], None]) -> bool:
        """Measure, and say how many rows there are; False where time ran out before all of it was."""
        try:
            measure()
            ended, more = True, ""
        except OutOfTime:
            ended, more = False, "; repeat the call to go on"
        rows = f"{len(self.rows)} row{'' if len(self.rows) == 1 else 's'} measured"
        print(f"{self.name}: {'' if ended else 'time is up with '}{rows}{more}", file=sys.stderr)
        return ended

    # ---- what is measured ----

    def start(self, task: str, seed: int) -> Path:
        """Where the float network of a task and seed lies once a run has trained it."""
        s = self.settings
        return s.work / f"{task}-{seed}-{s.schedule}-{s.device.replace(':', '')}-{s.commit}.safetensors"

    def sgsc(
        self, task: str, target: float, seed: int, method: str = "sgsc", rest: Sequence[str] = (), **of: Any
    ) -> Row:
        """One run of `sgsc compress`."""

        row = {"method": method, "task": task, "target_size": target, "seed": seed, **of}

        def measure(folder: Path) -> Row:
            s, start = self.settings, self.start(task, seed)
            flags = [*s.flags(task), *s.rest, *rest]  # after the schedule: it may ask for steps of its own
            if start.is_file():
                flags += ["--start", str(start)]
            resumed = (folder / CHECKPOINT).is_file()
            flags += ["--resume"] if resumed else []
            try:
                report = report_of(task, target, seed, flags, str(folder), s.timeout())
            finally:
                if not start.is_file() and (folder / FLOAT).is_file():
                    shutil.copy(folder / FLOAT, start)
            guard = report["guard"]
            tail = {key: guard[key] for key in ("worst_class", "tail") if key in guard}
            made = summary(report) | {"steps": report["settings"]["config"]["steps"], **tail}
            made |= {key: report["settings"][key] for key in ("precision", "distilled")}
            made |= {"resumed": True} if resumed else {}  # its seconds are those of its last part
            return made | {"float_seconds": report["seconds_by_phase"]["float training"]}

        return self.in_parts(row, measure)

    def alike(self, task: str, seed: int) -> list[str]:
        """What commands get that compare at one width."""
        s = self.settings
        flags = ["--seed", str(seed), *s.flags(task), "--work", str(self.start(task, seed))]
        if "--limit" in s.rest:
            flags += ["--limit", s.rest[list(s.rest).index("--limit") + 1]]
        return flags

    def uniform(self, task: str, bits: int, seed: int) -> Row:
        """Uniform quantization-aware training at one width, from the same float network and for as many steps."""

        def measure() -> Row:
            command = [sys.executable, "-m", "bench.uniform", task, "--bits", str(bits), *self.alike(task, seed)]
            return {k: v for k, v in called(command, self.settings.timeout()).items() if k != "device"}

        return self.row({"method": f"lsq{bits}", "task": task, "seed": seed}, measure)
