"""A process for each library: it makes the library's candidates, judges their results and times their calls."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .peer_libraries import LIBRARIES
from .peer_problem import BFLOAT16, EXACT, FROM_MEMORY, INT8, READ, Candidate, Problem

ALLOWED = {EXACT: 1e-4, INT8: 3e-2, BFLOAT16: 1e-2}  # relative error of a result, Frobenius norm
BURST = 1e-3  # seconds that one sample of a small shape lasts, about: as within a network, code is warm as well
LONG = 0.2  # seconds of a call of which one will do
DISTURBED = 0.03  # share of a call that its threads may have waited for a core
TO_BUILD, TO_CALL = 600.0, 30.0  # seconds to wait for a library's candidates, and for some calls of one
# As OpenMP waits where nobody says anything, some milliseconds awake: other benches here let threads sleep at once, and
# waking one takes longer than a small product.
USUAL_WAIT = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"}
LIVES = 4  # times that a library's process is started


def build(library: str, problem: Problem) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The candidates of a library that run, by name; and of the others, why not."""
    found, missing = {}, {}
    for name, make in LIBRARIES[library][0](problem):
        try:
            candidate = make()
            candidate.call(0, 1)
            found[name] = candidate
        except Exception as error:  # whatever a library may raise: noted
            missing[name] = reason(error)
    return found, missing


def check(candidate: Candidate, problem: Problem, m: int) -> float:
    """Relative error of a result for m rows of x, Frobenius norm, against float64 by the candidate's own weight.

    Raises:
        ValueError: If it is larger than ALLOWED.
    """
    if candidate.numerics == READ:
        return 0.0
    y = candidate.fetch(candidate.call(0, m))
    if tuple(y.shape) != (m, problem.n):
        raise ValueError(f"wrong: a result of shape {tuple(y.shape)} for {(m, problem.n)}")
    exact = problem.x[:m].double() @ candidate.weight.double().t()
    error = float((y[:, problem.channels].double() - exact).norm() / exact.norm())
    if not error <= ALLOWED[candidate.numerics]:  # NaN is wrong
        raise ValueError(f"wrong: error {error:.2g}, {candidate.numerics} may have {ALLOWED[candidate.numerics]:g}")
    return error


def visit(candidate: Candidate, problem: Problem, m: int, other: np.ndarray) -> list[tuple[float, bool]]:
    """(seconds, whether undisturbed) of some calls; `other` is read before to empty the caches."""
    repeat, calls = 1, 3 if m <= 16 else 1
    if problem.cached:
        candidate.call(0, m)
        start, repeat, calls = time.perf_counter(), 0, calls + 2
        while time.perf_counter() - start < BURST:  # as many calls as a sample will have warm what they need
            candidate.call(0, m)
            repeat += 1
    elif m <= 16:
        start = time.perf_counter()
        candidate.call(0, m)
        calls = 1 if time.perf_counter() - start > LONG else calls
        for copy in range(1, calls + 1):  # idle while others had their turn, pages may have gone to the host
            candidate.call(copy, m)
        other.max()
        candidate.call(0, m)  # code and x are warm, weights come from memory
    samples = []
    for copy in range(1, calls + 1):
        before = delays()
        start = time.perf_counter()
        for _ in range(repeat):
            candidate.call(copy, m)
        seconds = time.perf_counter() - start
        waited = sum(delay - before.get(thread, 0) for thread, delay in delays().items()) * 1e-9
        samples.append((seconds / repeat, waited <= DISTURBED * seconds))
    return samples


def delays() -> dict[str, int]:
    """Nanoseconds that each thread of this process has waited for a core; empty where the system does not say."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            found[path.parent.name] = int(path.read_text().split()[1])
    return found


def serve(connection: Any, library: str, n: int, k: int, threads: int, most: int) -> None:
    """Build the candidates of a library, then answer ("check" | "visit", candidate, m) until None comes."""
    with Path(os.devnull).open("w") as nowhere:
        for stream in (1, 2):  # what C++ libraries print, too
            os.dup2(nowhere.fileno(), stream)
    try:
        torch.set_num_threads(threads)
        problem = Problem(n, k, threads, most)
        candidates, missing = build(library, problem)
        other = np.ones(FROM_MEMORY // 8, np.int64)
        seen = {name: (c.bits, c.numerics, c.bytes) for name, c in candidates.items()}
        connection.send((seen, missing))
    except Exception as error:
        connection.send(({}, {"": reason(error)}))
        return
    met = set()
    while (asked := connection.recv()) is not None:
        what, name, m = asked
        try:
            with torch.inference_mode():
                if name not in met and not problem.cached:
                    for copy in range(problem.copies(candidates[name].bytes)):  # some pack at the first call
                        candidates[name].call(copy, m)
                met.add(name)
                if what == "check":
                    connection.send((check(candidates[name], problem, m), None))
                else:
                    connection.send((visit(candidates[name], problem, m, other), None))
        except Exception as error:
            connection.send((None, reason(error)))


def reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


class Worker:
    """A library's process; one that dies or hangs is started again, a few times."""

    def __init__(self, library: str, n: int, k: int, threads: int, most: int) -> None:
        self.arguments, self.threads, self.lives = (library, n, k, threads, most), threads, LIVES
        self.start()

    def start(self) -> None:
        """Start the process, which then says what it has: see `answer`."""
        context = multiprocessing.get_context("spawn")
        self.alive, self.lives = True, self.lives - 1
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *self.arguments), daemon=True)
        before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", *USUAL_WAIT)}
        os.environ.update(USUAL_WAIT, OMP_NUM_THREADS=str(self.threads))  # read when the libraries are loaded
        try:
            self.process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        theirs.close()

    def answer(self, patience: float) -> tuple[Any, Any]:
        """The next answer; (None, why) if none comes."""
        try:
            if self.connection.poll(patience):
                return self.connection.recv()
            self.close()
            return None, f"no answer in {patience:g} s"
        except (EOFError, OSError):
            self.process.join(5)
            self.close()
            return None, f"its process ended with code {self.process.exitcode}"

    def built(self) -> tuple[dict[str, Any], dict[str, str]]:
        """(what the candidates are, why others are missing), by name."""
        found, missing = self.answer(TO_BUILD)
        return ({}, {"": missing}) if found is None else (found, missing)

    def ask(self, what: str, name: str, m: int) -> tuple[Any, str | None]:
        """(answer, None), or (None, why there is none)."""
        if not self.alive and self.lives:
            self.start()
            self.built()
        with contextlib.suppress(OSError):  # it has died, which its answer says
            self.connection.send((what, name, m))
        return self.answer(TO_CALL)

    def close(self) -> None:
        """End the process."""
        self.alive = False
        self.process.kill()
        self.process.join()
