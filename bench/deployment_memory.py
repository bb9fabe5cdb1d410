"""Loading a large file, repacking it, and what a call costs: the sections "load" and "overhead" of bench.deployment."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sgsc.artefact import load_into, save
from sgsc.kernels import OPS, PackedRows
from sgsc.kernels.tiling import tile_arguments
from sgsc.measure import interleaved
from sgsc.packed import PackedLinear, PackedProduct

from .deployment_networks import MIXED, calling, compressed, with_numerics
from .deployment_timing import OURS, Contender, Row, measured
from .record import claim

BITS = 4
LOAD = 2.0  # times the seconds of reading
MEMORY = 1.1  # times the file, the run form and one layer
OVERHEAD = 6.0  # microseconds
MEASURE_PEAK = """
import json, sys
from pathlib import Path
import torch
from bench.deployment_memory import float_model, resident, small_load
from sgsc.artefact import load_into
path, layers, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
small_load(Path(path).parent)
model = float_model(layers, width)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
load_into(model, path)
print(json.dumps([before, resident("VmHWM")]))
"""


def float_model(layers: int, width: int) -> nn.Sequential:
    """Shapes alone, as one who loads has them."""
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))


def packed_model(layers: int, width: int) -> nn.Sequential:
    """Random codes of BITS bits."""
    make = torch.Generator().manual_seed(0)
    bits = torch.full((width,), BITS, dtype=torch.uint8)
    scale, offset = torch.full((width,), 2.0**-8), torch.full((width,), -(2.0 ** (BITS - 1)))

    def layer() -> PackedLinear:
        data = torch.randint(256, (width * width * BITS // 8,), dtype=torch.uint8, generator=make)
        return PackedLinear(PackedRows(data, bits.clone(), width), scale.clone(), offset.clone(), None)

    return nn.Sequential(*(layer() for _ in range(layers))).eval()


def small_load(folder: Path) -> None:
    """What a process pays once, at its first load, whatever the size."""
    path = folder / "first.sgsc"
    save(packed_model(1, 64), path)
    load_into(float_model(1, 64), path)


def resident(kind: str) -> int:
    """Bytes of "VmRSS" or "VmHWM", its peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])


def measure_load(budget: float, quick: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows and claims of the section "load".

    Raises:
        ValueError: If what is loaded is not what was saved.
    """
    layers, width = (2, 64) if quick else (8, 4096)
    model = packed_model(layers, width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.sgsc"
        size = save(model, path)
        empty = float_model(layers, width)
        for one, other in zip(load_into(empty, path), model, strict=True):
            if not (torch.equal(one.data, other.data) and torch.equal(one.lines, other.lines)):
                raise ValueError("load: what was loaded is not what was saved; no speed is written for it")
        data = path.read_bytes()
        rows = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            runs = {
                "load_into": lambda: load_into(empty, path),
                "read the file": path.read_bytes,
                "sha256 of its bytes": lambda: hashlib.sha256(data).digest(),
            }
            seconds = {name: statistics.median(t) for name, t in interleaved(runs, budget).items()}
            rows += [
                {
                    **{"what": name, "threads": threads, "bytes": size, "milliseconds": 1e3 * t},
                    **{"gigabytes_per_second": size / t / 1e9, "over_reading": t / seconds["read the file"]},
                }
                for name, t in seconds.items()
            ]
            rows += _tiling(model[0], threads, budget)
        rows.append(_peak(path, layers, width, size, model))
    for row in rows:
        print(
            ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), file=sys.stderr
        )
    return rows, load_claims(rows)


def _tiling(layer: PackedProduct, threads: int, budget: float) -> list[Row]:
    """The repacking of one layer, and a copy of as many bytes read and written."""
    arguments = tile_arguments(layer.rows, 1, 1)
    traffic = OPS["tile"].traffic(*arguments)
    source = torch.ones(traffic // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    runs = {"tile": lambda: OPS["tile"](*arguments), "copy of a layer's bytes": lambda: target.copy_(source)}
    seconds = {name: statistics.median(t) for name, t in interleaved(runs, budget).items()}
    return [
        {
            **{"what": name, "threads": threads, "bytes": traffic, "milliseconds": 1e3 * t},
            **{"gigabytes_per_second": traffic / t / 1e9, "over_reading": None},
        }
        for name, t in seconds.items()
    ]


def _peak(path: Path, layers: int, width: int, size: int, model: nn.Sequential) -> Row:
    """Of a process that loads the file: resident bytes at the peak beyond those before."""
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", MEASURE_PEAK, str(path), str(layers), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    before, peak = json.loads(done.stdout)
    run_form = sum(layer.lines.numel() for layer in model)
    one = model[0].data.numel() + model[0].lines.numel()
    return {
        **{"what": "peak of resident memory", "threads": None, "bytes": peak - before, "file_bytes": size},
        **{"run_form_bytes": run_form, "layer_bytes": one, "over_need": (peak - before) / (size + run_form + one)},
    }


def load_claims(rows: list[Row]) -> list[dict[str, Any]]:
    """Of the seconds and of the memory of loading."""
    loads = {row["threads"]: row["over_reading"] for row in rows if row["what"] == "load_into"}
    (memory,) = (row["over_need"] for row in rows if row["what"].startswith("peak"))
    text = "load: seconds of load_into, its digest verified, against reading the file"
    return [
        *(
            claim(f"{text}, {threads} thread{'s' * (threads > 1)}", LOAD, ratio, "times the time", at_most=LOAD)
            for threads, ratio in loads.items()
        ),
        claim(
            "load: peak of resident memory against the file, the run form and one layer in both forms",
            *(MEMORY, memory, "times the bytes"),
            at_most=MEMORY,
        ),
    ]


# ---- overhead ----


def measure_overhead(budget: float, quick: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows and claims of the section "overhead"."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    cases = {
        "Linear 16x32, 1 row": (nn.Linear(32, 16), torch.randn(1, 32)),
        "Conv2d 4-16 3x3 on 4x4": (nn.Conv2d(4, 16, 3, padding=1), torch.randn(1, 4, 4, 4)),
    }
    for case, (layer, x) in cases.items():
        packed, plain = compressed(layer, MIXED)
        exact = plain.double()(x.double())
        plain.float()
        contenders = {"torch": Contender(lambda plain=plain, x=x: calling(plain, x), exact, 1e-4)}
        for numerics, allowed in (("exact", 1e-4), ("int8", 5e-2)):
            contenders[f"{OURS} {numerics}"] = Contender(
                lambda packed=packed, x=x, numerics=numerics: calling(with_numerics(packed, numerics), x),
                exact,
                allowed,
            )
        rows += measured({"case": case, "threads": 1}, contenders, budget)
    return rows, overhead_claims(rows)


def overhead_claims(rows: list[Row]) -> list[dict[str, Any]]:
    """Of each layer, in its slower numerics."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        slower = max(row["microseconds"] for row in rows if row["case"] == case and row["by"].startswith(OURS))
        text = f"overhead: a call of a packed {case}, the slower numerics, median"
        found.append(claim(text, OVERHEAD, slower, "µs", at_most=OVERHEAD))
    return found
