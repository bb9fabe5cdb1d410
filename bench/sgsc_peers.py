"""Weights in few bits by other libraries, beside uniform training and our own network of at most as many bytes.

Each library quantizes the weight matrices of one float network, rows of output channels, as it does by itself and
without data; its values are put back, and the network is evaluated as it then is. Bytes are those that the library
would store: codes at their width, scales and zeros as it holds them, everything else in float32. torchao holds codes
below 8 bits in bytes, and is counted as if it packed them; zeros of symmetric grids are not counted.

A library that is not installed, or refuses, is a row that says so. CONTRIBUTING.md says how they install.

python -m bench.sgsc_peers LIBRARY TASK --bits 4 --group 32 --work float.safetensors      one of them, as JSON
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sgsc.demos import evaluate
from sgsc.layers import QUANTIZED
from sgsc.size import float_bytes

from .runs import Row, Section, called
from .sgsc_claims import lead, pick, says, schedules
from .uniform import arguments_of, float_network, task_of

TASKS = ("shakespeare",)  # whose float networks the libraries round, too
ROW = 0  # one scale a row, instead of one for a group of so many weights


def torchao(rows: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """IntxWeightOnlyConfig, symmetric, float32 scales."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    layer = nn.Sequential(nn.Linear(rows.shape[1], rows.shape[0], bias=False))
    layer[0].weight.data.copy_(rows)
    granularity = PerGroup(group) if group else PerAxis(0)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity))
    weight = layer[0].weight
    return weight.dequantize(), rows.numel() * bits / 8 + 4 * weight.scale.numel()


def hqq(rows: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Half-quadratic quantization with zeros, scales and zeros of 2 bytes as by default.

    It packs as many rows into one as fit a byte, or ten of 3 bits into an int32: the last row fills up what is left,
    and is counted once.
    """
    from hqq.core.quantize import Quantizer

    how = {"nbits": bits, "group_size": group or rows.shape[1], "axis": 1, "round_zero": bits == 4}
    count = len(rows) + -len(rows) % 40
    filled = rows[torch.arange(count).clamp(max=len(rows) - 1)]
    codes, grid = Quantizer.quantize(filled, channel_wise=True, device="cpu", compute_dtype=torch.float32, **how)
    size = codes.numel() * codes.element_size() + 2 * (grid["scale"].numel() + grid["zero"].numel())
    return Quantizer.dequantize(codes, grid).view_as(filled)[: len(rows)], size * len(rows) / count


def brevitas(rows: Tensor, bits: int, group: int) -> tuple[Tensor, float]:
    """Int8WeightPerChannelFloat at the width: symmetric, narrow, float32 scales of a row."""
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat

    how = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits}
    layer = QuantLinear(rows.shape[1], rows.shape[0], bias=False, **how).eval()
    layer.weight.data.copy_(rows)
    found = layer.quant_weight()
    return found.value.detach(), rows.numel() * bits / 8 + 4 * found.scale.numel()


# library -> (quantizer of rows, sizes of its groups)
LIBRARIES: dict[str, tuple[Callable[[Tensor, int, int], tuple[Tensor, float]], tuple[int, ...]]] = {
    "torchao": (torchao, (ROW, 32)),
    "hqq": (hqq, (ROW, 64)),
    "brevitas": (brevitas, (ROW,)),
}


@torch.no_grad()
def quantized(network: nn.Module, library: str, bits: int, group: int) -> tuple[int, list[str]]:
    """Put the library's values into the network's weights: (bytes that would be stored, layers that it left float).

    Layers whose rows do not divide into groups get one scale a row. A layer that the library refuses stays float; its
    name and the reason are listed.
    """
    total, left = float(float_bytes(network)), []
    for name, layer in network.named_modules():
        if not isinstance(layer, tuple(QUANTIZED)):
            continue
        rows = layer.get_parameter("weight").flatten(1)
        size = group if group and rows.shape[1] % group == 0 else ROW
        try:
            values, stored = LIBRARIES[library][0](rows.clone(), bits, size)
        except ImportError:
            raise
        except Exception as error:  # of another's code, on shapes it may not serve
            left.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        layer.get_parameter("weight").copy_(values.view_as(layer.get_parameter("weight")))
        total += stored - 4 * rows.numel()
    return math.ceil(total), left


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantize, evaluate on the test split, print."""
    parser = argparse.ArgumentParser(description="One library at one width.")
    parser.add_argument("library", choices=LIBRARIES)
    arguments_of(parser)
    parser.add_argument("--group", type=int, default=ROW, help="weights that share a scale (default: 0, a row)")
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of other libraries
    task = task_of(chosen)
    network = float_network(task, chosen.work, chosen.seed, chosen.device)
    of_float = float_bytes(network)
    split = task.test()
    before = evaluate(network, split)
    try:
        size, left = quantized(network, chosen.library, chosen.bits, chosen.group)
    except ImportError as error:
        print(json.dumps({"missing": f"{type(error).__name__}: {error}"}))
        return 0
    after = evaluate(network, split)
    row = {"float_bytes": of_float, "stored_bytes": size, "stored_ratio": size / of_float, "left_float": left}
    row |= {"float_accuracy": before["accuracy"], "packed_accuracy": after["accuracy"]}
    print(json.dumps(row | {"float_loss": before["loss"], "packed_loss": after["loss"]}))
    return 0


# ---- rows and claims of bench.sgsc ----


def measure_peers(section: Section, task: str, bits: int, seed: int) -> list[Row]:
    """Each library at one width, with each size of groups."""
    sizes = [(library, group) for library, (_, groups) in LIBRARIES.items() for group in groups]
    return [one(section, library, task, bits, group, seed) for library, group in sizes]


def one(section: Section, library: str, task: str, bits: int, group: int, seed: int) -> Row:
    """One library at one width and size of groups."""

    def measure() -> Row:
        command = [sys.executable, "-m", "bench.sgsc_peers", library, task, "--bits", str(bits), "--group", str(group)]
        return called([*command, *section.alike(task, seed)], section.settings.timeout())

    of = {"method": library, "task": task, "bits": bits, "group": group, "seed": seed}
    return section.row(of, measure)


def peer_claims(rows: list[Row], need: int) -> list[Row]:
    """At each width of each task: ours against each library, at no more bytes; one that is not there has no claim."""
    found = []
    for schedule in schedules(rows):
        of = [row for row in pick(rows, schedule=schedule) if row["method"] in LIBRARIES and "missing" not in row]
        for point in {(row["task"], row["method"], row["bits"], row["group"]): row for row in of}.values():
            task, library, bits, group = (point[key] for key in ("task", "method", "bits", "group"))
            pairs = [
                (mine, peer)
                for peer in pick(of, task=task, method=library, bits=bits, group=group)
                for mine in pick(rows, schedule=schedule, task=task, seed=peer["seed"], against=f"lsq{bits}")
                if mine["stored_bytes"] <= peer["stored_bytes"]
            ]
            name = f"{library}, {bits} bits, scale of {group or 'a row'}"
            found.append(lead(f"{task}: ahead of {name}, at no more bytes{says(schedule)}", pairs, need))
    return found


if __name__ == "__main__":
    sys.exit(main())
