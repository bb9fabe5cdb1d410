"""The kernels' own checks on the GPU, side by side, and the bench's kernels compiled meanwhile.

A kernel of all widths takes the compiler ten seconds and more, on one core; so each check is a process, the long ones
several with a part of the cases each, and the variants that the bench will time are compiled beside them into Triton's
cache on disk. What does not end in time does not hold; bench/gpu.sh gives it nearly nine minutes where it is asked for
nothing else.

python -m bench.gpu_check [--seconds N] [--results FOLDER]      all of it; 1 if a check does not hold
python -m bench.gpu_check CHECK [PART PARTS]                    one, in this process
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.kernels import triton_interpreted_packed as packed
from tests.kernels.triton_interpreted import CHECKS

from . import gpu_chain, gpu_conv2d, gpu_linear
from .gpu_device import Device, find
from .record import claim, write

SECONDS = 170.0  # for all, where nothing else is said: the benches follow in the same nine minutes
PARTS = 4  # of a check that goes through the cases of an operation
ON_DEVICE = [name for name, check in CHECKS.items() if "device" in inspect.signature(check).parameters]
COMPILED: dict[str, tuple[Callable[[Device, int], None], int]] = {
    "compile linear": (gpu_linear.compile_one, len(gpu_linear.VARIANTS)),
    "compile a chain": (gpu_chain.compile_one, 1),
    "compile conv2d": (gpu_conv2d.compile_one, len(gpu_conv2d.VARIANTS)),
}
ROOT = Path(__file__).resolve().parents[1]
MORE = ROOT / "tests/kernels/test_gpu.py"  # checks that only a GPU can make, where there are any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one check or part, or all and write the section "checks"."""
    parser = argparse.ArgumentParser(description="The kernels' own checks on the GPU.")
    parser.add_argument("job", nargs="*", help="a check, and which part of how many")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all (default: {SECONDS:g})")
    parser.add_argument("--results", type=Path, default=None, help="folder of the results (default: bench/results)")
    chosen = parser.parse_args(arguments)
    try:
        device = find(quick=True)
    except ValueError as error:
        print(f"bench.gpu_check: {error}", file=sys.stderr)
        return 2
    if chosen.job:
        name, part, parts = (*chosen.job, "0", "1")[:3]
        run_one(name, int(part), int(parts), device)
        return 0
    rows = run_all(jobs(), chosen.seconds)
    failed = [row for row in rows if not row["holds"]]
    held = sum(row["holds"] for row in rows)
    text = "checks of the kernels on the device that hold"
    where = {"device": device.name}
    found = [claim(text, len(rows), held, "of them", holds=not failed) | where]
    write("gpu_kernels", "checks", [row | where for row in rows], found, "python -m bench.gpu_check", chosen.results)
    for row in failed:
        print(f"{row['check']} DOES NOT HOLD: {row['said']}", file=sys.stderr)
    print(f"{held} of {len(rows)} checks hold", file=sys.stderr)
    return 1 if failed else 0


def jobs() -> dict[str, list[str]]:
    """Commands by name, those first whose result matters most: what is compiled for the bench can wait."""
    one = [sys.executable, "-m", "bench.gpu_check"]
    found = {}
    if MORE.is_file() and importlib.util.find_spec("pytest"):
        # without the project's own options: they name plug-ins that a machine with a GPU need not have
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-W", "ignore"]
        for name in re.findall(r"^def (test_\w+)\(", MORE.read_text(), re.MULTILINE):
            found[f"{MORE.name}, {name}"] = [sys.executable, "-m", "pytest", *options, f"{MORE}::{name}"]
    elif MORE.is_file():  # a row that does not hold, not one that is missing
        found[MORE.name] = [sys.executable, "-c", "raise SystemExit('pytest is not installed: not checked')"]
    for name in ON_DEVICE:
        parts = PARTS if "check_all" in inspect.getsource(CHECKS[name]) else 1
        for part in range(parts):
            title = name if parts == 1 else f"{name}, part {part + 1} of {parts}"
            found[title] = [*one, name, str(part), str(parts)]
    for name, (_, count) in COMPILED.items():
        found |= {f"{name}, {i + 1} of {count}": [*one, name, str(i), str(count)] for i in range(count)}
    return found


def run_all(commands: Mapping[str, list[str]], seconds: float) -> list[dict[str, Any]]:
    """Run commands side by side, one a core; a row each: whether it ended well, after how long, and its last words."""
    until = time.monotonic() + seconds

    def run(name: str) -> dict[str, Any]:
        start = time.monotonic()
        left = max(0.1, until - start)
        try:
            done = subprocess.run(
                commands[name], check=False, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=left
            )
            holds, said = done.returncode == 0, (done.stderr + done.stdout).strip().splitlines()
        except subprocess.TimeoutExpired:
            holds, said = False, [f"not done after {time.monotonic() - start:.0f} s"]
        said = "" if holds else " ".join(said[-3:])[-300:]
        return {"check": name, "holds": holds, "seconds": round(time.monotonic() - start, 1), "said": said}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, commands))


def run_one(name: str, part: int, parts: int, device: Device) -> None:
    """A check, or a part of it, in this process; or one variant compiled.

    Raises:
        ValueError: If there is no such check.
    """
    if name in COMPILED:
        with device.running():
            COMPILED[name][0](device, part)
        return
    if name not in ON_DEVICE:
        raise ValueError(f"no check {name!r}; there are {', '.join([*ON_DEVICE, *COMPILED])}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms ask for it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # memory that no one has written reads as NaN
    kept = packed.check_all

    def some(op: Any, cases: Mapping[str, tuple], where: str, only: Callable[[str], bool] = lambda name: True) -> None:
        kept(op, {case: cases[case] for case in list(cases)[part::parts]}, where, only)

    with mock.patch.object(packed, "check_all", some):
        CHECKS[name](device.type)


if __name__ == "__main__":
    sys.exit(main())
