"""The second half of the main job: load the file as a user would, compare, and read the test split, once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgsc.artefact import load as load_artefact
from sgsc.artefact import load_into, read
from sgsc.certificate import answers, certify, compare, outputs
from sgsc.checkpoint import load_checkpoint
from sgsc.kernels import OPS, backend
from sgsc.preservation import PreservationSet

from .job import FLOAT, KEPT, MODEL, read_float
from .task import Task, data_hash

SHOWN = 24  # changed samples that the report shows, at most


def certify_run(
    task: Task, folder: Path, seed: int, tolerance: float, margin_tolerance: float | None = None
) -> dict[str, Any]:
    """Load the file as a user would and compare it with the float network; reads the test split, once.

    Meant to run in a process that has not trained: what it sees is what the file holds.
    """
    started = time.perf_counter()
    artefact = read(folder / MODEL)
    network = read_float(task, folder / FLOAT)
    named = artefact.manifest["architecture"] is not None
    packed = load_artefact(folder / MODEL) if named else load_into(network, folder / MODEL)
    keep = PreservationSet.from_state(*load_checkpoint(folder / KEPT))
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (MODEL, FLOAT)}
    certificate = certify(
        network,
        packed,
        task.guard,
        keep,
        tolerance=tolerance,
        margin_tolerance=margin_tolerance,
        seeds={"run": seed},
        hashes={**hashes, "splits": data_hash(task)},
        stored_bytes=artefact.size,
        remark=task.remark,
    )
    x, y = task.test().tensors
    before, after = outputs(network, x), outputs(packed, x)
    on_test = compare(before, after, y)
    changed = _changed(task, "guard", task.guard.tensors, (network, packed), certificate.guard.changed)
    if certificate.preservation is not None:
        reasons, pair = list(keep.reasons), (keep.inputs, keep.targets)
        kept = _changed(task, "preservation", pair, (network, packed), certificate.preservation.changed)
        changed += [e | {"reason": reasons[e["index"]], "index": int(keep.indices[e["index"]])} for e in kept]
    counts = {reason: keep.reasons.count(reason) for reason in dict.fromkeys(keep.reasons)}
    values = certificate.as_dict()
    return {
        "certificate": values,
        "statement": certificate.statement(),
        "preservation": (values["preservation"] or {}) | {"reasons": counts},
        "guard": values["guard"],
        "margin_tolerance": margin_tolerance,
        "tolerance_held": bool(certificate.held),
        "float_accuracy": on_test.float_accuracy,
        "packed_accuracy": on_test.packed_accuracy,
        "accuracy_standard_error": on_test.standard_error,
        "test": on_test.as_dict(),
        "class_names": dict(enumerate(task.alphabet)),
        "float_loss": task.loss(before, y).item(),
        "packed_loss": task.loss(after, y).item(),
        "changed": changed[:SHOWN],
        "backend": backend(OPS["packed_linear"]),
        "backends": {name: backend(op) for name, op in OPS.items() if name.startswith("packed")},
        "sha256": artefact.manifest["sha256"],
        "file": MODEL,
        "certify_seconds": time.perf_counter() - started,
    }


def _changed(
    task: Task, split: str, pair: tuple[Tensor, ...], models: tuple[nn.Module, nn.Module], which: Iterable[int]
) -> list[dict[str, Any]]:
    which = list(which)[:SHOWN]
    if not which:
        return []
    x, y = pair
    before, after = (answers(outputs(model, x[which])) for model in models)
    shown = []
    for n, i in enumerate(which):
        target = y[i] if y.dim() == 1 else y[i, -1]
        say = [task.alphabet[int(v)] if task.text else str(int(v)) for v in (target, before[n], after[n])]
        entry = {"split": split, "index": int(i), "target": say[0], "float_answer": say[1], "packed_answer": say[2]}
        shown.append(entry | _sample(task, x[i], say[0]))
    return shown


def _sample(task: Task, x: Tensor, target: str) -> dict[str, Any]:
    """The sample for a reader.

    Text goes on to the character that was to be answered, and `at` is its place. A picture is H lists of W values, or
    of W [red, green, blue]; four decimals keep what eight bits held, and a report readable.
    """
    if task.text:
        text = str(task.show(x))
        return {"text": text + target, "at": len(text)}
    return {"picture": _rounded(task.show(x))}


def _rounded(values: Any) -> Any:
    return [_rounded(value) for value in values] if isinstance(values, list) else round(values, 4)
