"""What rounding costs a real network, a layer and a pair of layers at a time: numbers that a surrogate is made of.

    python -m bench.search_measured --data PATH [--samples 256] [--checks 60] [--out bench/search_measured.json]

The network is the trained ResNet-20 on CIFAR-10 (JPEG q75), 22 layers. They are rounded with the steps of least squared
error, and not trained; the loss is that of the first validation images. With everything else at 8 bits,

    alone   (L, 5)  loss with one layer at 2, 3, 4, 6 or 8 bits, less that with all at 8, nats
    pairs   (L, L)  above the diagonal: loss with two layers at 2 bits, less what each of them costs alone, nats
    checks          random configurations of at most 4 bits a weight, seed 0, and their losses: for judging the fit
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from sgsc.demos.tasks import load
from sgsc.demos.training import evaluate
from sgsc.environment import environment
from sgsc.files import write_atomically
from sgsc.search.candidates import build, parent_of
from sgsc.search.cost import Configuration
from sgsc.search.space import BITS
from sgsc.search.structure import Structure, structure_of

FILE = Path(__file__).parent / "search_measured.json"
MEAN_BITS = 4.0


def measure(network: nn.Module, data: TensorDataset, checks: int) -> dict[str, Any]:
    """The numbers of a float network."""
    parent = parent_of(network)
    structure = structure_of(parent)
    names = list(structure.layers)

    def loss(of: Mapping[str, int]) -> float:
        bits = {**dict.fromkeys(names, max(BITS)), **of}
        return evaluate(build(parent, structure, Configuration(bits)), data)["loss"]

    base, least = loss({}), min(BITS)
    alone = [[loss({name: bits}) - base if bits < max(BITS) else 0.0 for bits in BITS] for name in names]
    at_least = [row[BITS.index(least)] for row in alone]
    pairs = np.zeros((len(names), len(names)))
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            pairs[i, j] = loss({first: least, names[j]: least}) - base - at_least[i] - at_least[j]
    weights = _weights(structure)
    drawn = _drawn(weights, checks)
    losses = [loss(dict(zip(names, (BITS[c] for c in row), strict=True))) - base for row in drawn]
    return {
        **{"layers": names, "weights": weights.tolist(), "loss": base, "alone": alone, "pairs": pairs.tolist()},
        "checks": [{"choices": row.tolist(), "loss": value} for row, value in zip(drawn, losses, strict=True)],
    }


def _weights(structure: Structure) -> NDArray[np.int64]:
    return np.array([np.prod(shape.weights(structure.sizes)) for shape in structure.layers.values()])


def _drawn(weights: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """(count, L) choices within the budget."""
    rng, found = np.random.default_rng(0), np.empty((0, len(weights)), dtype=np.int64)
    while len(found) < count:
        drawn = rng.integers(0, len(BITS), (count, len(weights)))
        within = np.array(BITS)[drawn] @ weights <= MEAN_BITS * weights.sum()
        found = np.concatenate([found, drawn[within]])
    return found[:count]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_jpeg.npz and models/")
    parser.add_argument("--samples", type=int, default=256, help="validation images (default: 256)")
    parser.add_argument("--checks", type=int, default=60, help="random configurations (default: 60)")
    parser.add_argument("--out", type=Path, default=FILE)
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    task = load("resnet20", chosen.data, 0, chosen.samples)
    if task.start is None:
        parser.error(f"{chosen.data} has no trained ResNet-20; name a folder with models/")
    network = task.build().eval()
    network.load_state_dict(task.start())
    found = {"network": "ResNet-20", "sources": task.sources, "samples": chosen.samples, "bits": list(BITS)}
    found |= measure(network, task.validation, chosen.checks)
    found |= {"seconds": time.perf_counter() - started, **{k: environment()[k] for k in ("machine", "commit")}}
    write_atomically(chosen.out, (json.dumps(found, indent=None, separators=(",", ":")) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
