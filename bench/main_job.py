"""The main job as a user runs it: digits over seeds and target sizes, char-lm once, and the published form exactly.

    python -m bench.main_job [digits] [char-lm] [published] [--quick]

Every run is `sgsc compress` in a process of its own; each reads its test split once. The published form trains with
little data a step: without clipping its widths depend on learning rate and steps alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import record
from bench.runs import compress
from sgsc import nominal_bits, prepare
from sgsc.demos import models
from sgsc.layers import quant_layers
from sgsc.size import weight_count

SEEDS = range(5)
CURVE = {0.03: range(2), 0.02: range(2), 0.015: range(2), 0.01: range(2)}  # target size -> seeds
SECONDS = 180  # what one digits run may take on 2 cores


def digits(quick: bool, folder: Path | None) -> None:
    rest = ("--limit", "64", "--steps", "50", "--samples", "20") if quick else ()
    at_five = [compress("digits", 0.05, seed, *rest) for seed in (SEEDS if not quick else (0,))]
    curve = [compress("digits", t, seed, *rest) for t, seeds in CURVE.items() for seed in seeds] if not quick else []
    lost = statistics.mean(r["float_accuracy"] - r["packed_accuracy"] for r in at_five)
    error = statistics.mean(r["accuracy_standard_error"] for r in at_five)
    largest = max(r["stored_ratio"] for r in at_five)
    regressions = sum(r["preservation_regressions"] for r in at_five)
    slowest = max(r["seconds"] for r in at_five)
    count = len(at_five)
    claims = [
        record.claim(f"digits: stored size, largest of {count} seeds", 0.05, largest, "of float32", at_most=0.05),
        record.claim(f"digits at 5 %: test accuracy lost, mean of {count} seeds", error, lost, "share", at_most=error),
        record.claim(
            "digits at 5 %: preservation regressions beyond tolerance 0", 0, regressions, "samples", at_most=0
        ),
        record.claim("digits at 5 %: the slowest run, 2 cores", SECONDS, slowest, "s", at_most=SECONDS),
    ]
    record.write("main_job", "digits", at_five + curve, claims, "python -m bench.main_job digits", folder)


def char_lm(quick: bool, folder: Path | None) -> None:
    rest = ("--limit", "64", "--steps", "50", "--samples", "20") if quick else ()
    row = compress("char-lm", 0.1, 0, *rest)
    over = row["preservation_regressions"] - row["preservation_allowed"]
    claims = [
        record.claim("char-lm: stored size", 0.1, row["stored_ratio"], "of float32", at_most=0.1),
        record.claim(
            "char-lm at 10 %: preservation regressions beyond its tolerance",
            0,
            over,
            "samples",
            at_most=0,
        ),
    ]
    record.write("main_job", "char-lm", [row], claims, "python -m bench.main_job char-lm", folder)


def trajectory(task: str, steps: int) -> dict[str, Any]:
    """Mean bits of the published form after `steps`, from 32 bits, exponent -8, size weight 0.1, learning rate 1e-3."""
    torch.manual_seed(0)
    cnn = task == "cnn"
    network = models.MnistCNN() if cnn else models.NamesLM()
    skip = ["head"] if cnn else ["token", "position"]
    model = prepare(network, quantizer="published", skip=skip).model
    depths = [layer.weight_quantizer.get_parameter("bit_depth") for layer in quant_layers(model).values()]
    with torch.no_grad():
        for depth in depths:
            depth.fill_(32.0)
    make = torch.optim.Adam if cnn else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    started = time.perf_counter()
    for _ in range(steps):
        if cnn:
            x, y = torch.rand(2, 1, 28, 28, generator=generator), torch.randint(10, (2,), generator=generator)
        else:
            y = torch.randint(27, (1, 33), generator=generator)
            x, y = y[:, :-1], y[:, 1:].flatten()
        loss = F.cross_entropy(model(x).flatten(0, -2), y) + 0.1 * nominal_bits(model) / weight_count(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = float(nominal_bits(model).detach()) / weight_count(model)
    closed = 32 - 0.001 * steps if cnn else 132 * (1 - 1e-5) ** steps - 100
    seconds = time.perf_counter() - started
    return {"task": task, "steps": steps, "measured_bits": mean, "closed_form_bits": closed, "seconds": seconds}


def published(quick: bool, folder: Path | None) -> None:
    steps = 20 if quick else 10_000
    expected = {"cnn": 22.0065, "language model": 19.4404}  # arXiv 2505.00350's code, read off its logs
    rows, claims = [], []
    for task, bits in expected.items():
        row = trajectory("cnn" if task == "cnn" else "lm", steps) | {"expected_bits": bits}
        rows.append(row)
        off = abs(row["measured_bits"] - bits)
        claims.append(
            record.claim(
                f"published form, {task}: bits off {bits} after 10,000 steps", 0.001, off, "bits", at_most=0.001
            )
        )
    record.write("main_job", "published", rows, claims, "python -m bench.main_job published", folder)


def main(arguments: Sequence[str] | None = None) -> None:
    sections = {"digits": digits, "char-lm": char_lm, "published": published}
    arguments = sys.argv[1:] if arguments is None else arguments
    chosen = [a for a in arguments if a in sections]
    options = record.options([a for a in arguments if a not in sections], str(__doc__).splitlines()[0])
    for name in chosen or sections:
        sections[name](options.quick, options.results)


if __name__ == "__main__":
    main()
