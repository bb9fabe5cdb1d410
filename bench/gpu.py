"""The kernels on a GPU: ceilings of the machine, layers, the training quantizer, training steps, convolutions.

Times of operations are those of calls within a CUDA graph, over copies of the weights that together exceed twice the L2
cache; the time of an eager call stands beside. Nothing is timed whose result was not judged against float64 in the same
run. Each section has its seconds and is written as it grows, so that a run cut off leaves what it measured; a claim
that lacks a row does not hold.

bench/gpu.sh runs the first five, with the checks of the kernels on the device (bench/gpu_check.py) first.

python -m bench.gpu [--only SECTION] [--results FOLDER]
TRITON_INTERPRET=1 python -m bench.gpu --quick --results FOLDER      proves the bench itself where there is no GPU
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import gpu_chain, gpu_choices, gpu_conv2d, gpu_linear, gpu_training, gpu_variants
from .gpu_device import Gpu, Interpreted, Run, copy_bandwidth, find
from .record import write

NAME = "gpu_kernels"
SECONDS = 0.08  # that a contender is timed for, at least, beside making it and its graph


def ceilings(run: Run) -> None:
    """What the machine reaches by the libraries that know it best."""
    side = 64 if run.quick else 8192
    make = torch.Generator(run.device.type).manual_seed(0)
    a, b = (torch.randn(side, side, generator=make, device=run.device.type).to(torch.bfloat16) for _ in range(2))
    one, _ = run.device.rounds([lambda: a @ b])
    seconds = sorted(one() for _ in range(20))[10]
    run.put(
        [
            {"what": "copy of 1 GiB, read and written", "measured": run.copy / 1e9, "unit": "GB/s"},
            {"what": f"bfloat16 product, {side}^3", "measured": 2 * side**3 / seconds / 1e12, "unit": "TFLOP/s"},
        ],
        [],
    )


def linear(run: Run) -> None:
    """Layers in a row, which takes seconds, then each by itself until the time is over."""
    gpu_chain.measure(run)
    gpu_linear.measure(run)


# seconds of each, the most important first
SECTIONS: dict[str, tuple[Callable[[Run], None], float]] = {
    "ceilings": (ceilings, 10),
    "linear": (linear, 150),
    "fake_quantize": (gpu_training.measure_passes, 40),
    "training": (gpu_training.measure_steps, 50),
    "conv2d": (gpu_conv2d.measure, 50),
}
# a call of bench/gpu.sh each: what no claim of speed rests on
APART: dict[str, tuple[Callable[[Run], None], float]] = {
    "choices": (gpu_choices.measure, 440),
    "variants": (gpu_variants.measure, 440),
    "tokens": (gpu_linear.measure_rest, 440),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the sections of gpu_kernels.json; 1 if one broke or a result was wrong."""
    parser = argparse.ArgumentParser(description="The kernels on a GPU.")
    parser.add_argument("--only", choices=[*SECTIONS, *APART], help=f"one section (default: {', '.join(SECTIONS)})")
    parser.add_argument("--quick", action="store_true", help="one small case of each, once; needs --results")
    parser.add_argument("--results", type=Path, default=None, help="folder of the results (default: bench/results)")
    chosen = parser.parse_args(arguments)
    if chosen.quick and chosen.results is None:
        parser.error("--quick measures too little for bench/results; name another folder with --results")
    try:
        device = find(chosen.quick)
    except ValueError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    every = [*SECTIONS, *APART] if chosen.quick else SECTIONS
    done = [measure(device, section, chosen) for section in ([chosen.only] if chosen.only else every)]
    return 0 if all(done) else 1


def measure(device: Gpu | Interpreted, section: str, chosen: argparse.Namespace) -> bool:
    """Measure a section and write it; whether it came to its end, and no result was wrong."""
    fill, budget = {**SECTIONS, **APART}[section]
    until = float("inf") if chosen.quick else time.monotonic() + budget  # a slow machine proves the bench as well

    def put(rows: Iterable[Mapping[str, Any]], claims: Iterable[Mapping[str, Any]], where: str = section) -> None:
        rows, claims = ([{**one, "device": device.name} for one in found] for found in (rows, claims))
        write(NAME, where, rows, claims, f"python -m bench.gpu --only {section}", chosen.results)

    run = Run(device, chosen.quick, 0.0 if chosen.quick else SECONDS, lambda: until - time.monotonic(), put)
    try:
        with device.running():
            run.copy = copy_bandwidth(device, chosen.quick)
            fill(run)
    except Exception:
        print(f"{section} broke:\n{traceback.format_exc()}", file=sys.stderr)
        return False
    for what in run.wrong:
        print(f"WRONG, and not timed: {what}", file=sys.stderr)
    return not run.wrong


if __name__ == "__main__":
    sys.exit(main())
