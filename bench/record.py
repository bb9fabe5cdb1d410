"""Result files: bench/results/NAME.json = {"rows": [...], "claims": [...]}, one file for several benches.

Every row and claim carries its `section`; writing a section replaces that section alone, so that a bench can be
repeated without the others. Machine, commit and date are those of the bench that wrote the section; a row that was read
from the file before, and is written again beside new ones, keeps its own, and so does a claim that names a commit.

    from bench.record import claim, write

    claims = [claim("digits: stored size", 0.05, largest, "of the float32 bytes", at_most=0.05)]
    write("main_job", "digits", rows, claims, "python -m bench.main_job digits")
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgsc.environment import environment
from sgsc.files import write_atomically
from sgsc.measure import CLAIM

RESULTS = Path(__file__).parent / "results"
NAMES = ("main_job", "cpu_kernels", "cpu_peers", "deployment", "gpu_kernels", "sgsc", "search", "strategies")


def claim(
    text: str,
    target: Any,
    measured: Any,
    unit: str,
    holds: bool | None = None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A statement that a bench can refute.

    Args:
        text: What is claimed.
        target: The number of the issue.
        measured: What was found; None where it could not be measured, and then the claim does not hold.
        unit: Of both numbers.
        holds: Whether the claim is true of `measured`; or else one of the next two says so.
        at_least: It holds from this number upwards.
        at_most: It holds up to this number.

    Raises:
        ValueError: If not exactly one of `holds`, `at_least`, `at_most` is given.
    """
    if sum(given is not None for given in (holds, at_least, at_most)) != 1:
        raise ValueError(f"claim {text!r}: give one of holds={holds}, at_least={at_least}, at_most={at_most}")
    if measured is None:
        holds = False
    elif at_least is not None:
        holds = measured >= at_least
    elif at_most is not None:
        holds = measured <= at_most
    return {"claim": text, "target": target, "measured": measured, "unit": unit, "holds": bool(holds)}


def write(
    name: str,
    section: str,
    rows: Iterable[Mapping[str, Any]],
    claims: Iterable[Mapping[str, Any]],
    command: str,
    folder: Path | None = None,
) -> Path:
    """Put a section's rows and claims into the result file `name`, in place of those it held of this section.

    Args:
        name: One of NAMES.
        section: Which part of the file this is.
        rows: Measurements, JSON-able.
        claims: As made by `claim`.
        command: What to type to measure again.
        folder: Where the file lies, if not in RESULTS.

    Raises:
        ValueError: If the name is none of NAMES, a claim lacks a part, a number is not finite, or the file that is
            there is no result file.
    """
    folder = RESULTS if folder is None else folder
    path = folder / f"{name}.json"
    found = read(name, folder)
    here = environment()
    stamp = {"machine": here["machine"], "commit": here["commit"], "date": _today()}
    claims = list(claims)
    for c in claims:
        if not c.keys() >= CLAIM or type(c["holds"]) is not bool:
            raise ValueError(f"claim {dict(c)}: want {', '.join(sorted(CLAIM))}, holds true or false; use claim(...)")
    new = {
        "rows": [{"section": section, **row, **{k: row.get(k, v) for k, v in stamp.items()}} for row in rows],
        "claims": [{"section": section, "command": command, **stamp, **c} for c in claims],
    }
    merged = {}
    for kind, entries in new.items():
        kept = [entry for entry in found[kind] if entry["section"] != section]
        merged[kind] = sorted(kept + entries, key=lambda entry: entry["section"])  # stable: a section keeps its order
    try:
        text = json.dumps(merged, indent=1, allow_nan=False, ensure_ascii=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}, section {section}: {error}; a result holds text, finite numbers and null") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{text}\n".encode())
    return path


def read(name: str, folder: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """The rows and claims of a result file; empty lists where there is none.

    Raises:
        ValueError: If the name is none of NAMES, or the file is no result file.
    """
    if name not in NAMES:
        raise ValueError(f"results {name!r} are not known; choose one of {', '.join(NAMES)}")
    path = (RESULTS if folder is None else folder) / f"{name}.json"
    if not path.is_file():
        return {"rows": [], "claims": []}
    try:
        said = json.loads(path.read_text())
        return {kind: [{"section": entry["section"], **entry} for entry in said[kind]] for kind in ("rows", "claims")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no result file ({type(error).__name__}: {error}); delete it, and run its benches again"
        ) from None


def options(
    arguments: Sequence[str] | None,
    description: str,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """The command line that benches share: `quick` (bool), `results` (folder); `more` adds to it."""
    parser = argparse.ArgumentParser(description=description)
    more(parser)
    parser.add_argument("--quick", action="store_true", help="one small case of each, once; needs --results")
    parser.add_argument("--results", type=Path, default=None, help="folder of the results (default: bench/results)")
    found = parser.parse_args(arguments)
    if found.quick and found.results is None:
        parser.error("--quick measures too little for bench/results; name another folder with --results")
    return found


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
