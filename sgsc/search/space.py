"""What is searched: a few widths for each layer, a few channel counts for each group, as parameters of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution

from .clusters import kmeans_1d
from .cost import Configuration
from .structure import Structure

BITS = (2, 3, 4, 6, 8)
FACTORS = (0.75, 0.875, 1.0, 1.125, 1.25)
MULTIPLE = 8  # channels
# Widths of a layer, from the least sensitive cluster to the most: each loses what is hopeless there, or wasted.
WINDOWS = ((2, 3, 4), (2, 3, 4, 6), (2, 3, 4, 6, 8), (3, 4, 6, 8))
MOST_PARAMETERS, MOST_GROUPS = 60, 20


@dataclass(frozen=True)
class Space:
    """Parameters and what they stand for.

    Attributes:
        layers: Parameter "bits.NAME" -> the layers that share it.
        windows: Parameter -> the choices that the sampler proposes, bits or channels, ascending.
        groups: Parameter "width.NAME" -> its group.
    """

    layers: Mapping[str, tuple[str, ...]]
    windows: Mapping[str, tuple[int, ...]]
    groups: Mapping[str, str]

    def distributions(self) -> dict[str, BaseDistribution]:
        """For Optuna; bits have all of BITS there, for the baselines have them too."""
        return {
            name: CategoricalDistribution(BITS if name in self.layers else self.windows[name]) for name in self.windows
        }

    def configuration(self, params: Mapping[str, Any]) -> Configuration:
        """What a trial stands for."""
        bits = {layer: int(params[name]) for name, layers in self.layers.items() for layer in layers}
        return Configuration(bits, {group: int(params[name]) for name, group in self.groups.items()})

    def params(self, of: Configuration, sizes: Mapping[str, int]) -> dict[str, int]:
        """The parameters of a configuration; layers that share one get the most bits among them.

        `sizes`: of the groups as the parent has them.
        """
        found = {name: max(of.bits[layer] for layer in layers) for name, layers in self.layers.items()}
        return found | {name: {**sizes, **of.sizes}[group] for name, group in self.groups.items()}

    def smallest(self) -> dict[str, int]:
        """The cheapest parameters of all."""
        return {name: min(BITS) if name in self.layers else choices[0] for name, choices in self.windows.items()}


def make_space(structure: Structure, sensitivity: Mapping[str, float], *, widths: bool = True) -> Space:
    """The space of a network.

    Layers are clustered by the logarithm of their mean sensitivity, and a cluster has one window of bits. Beyond
    `MOST_PARAMETERS` layers of neighbouring sensitivity share a parameter. Groups that rounding to 8 channels leaves no
    choice keep their width, and so do the smallest ones beyond `MOST_GROUPS`.

    Args:
        structure: Of the prepared parent.
        sensitivity: Layer -> mean trace of a weight; what is not positive counts as the least that is.
        widths: Whether layer widths are searched.
    """
    groups: dict[str, tuple[int, ...]] = {}
    for group, ids in structure.groups.items() if widths else ():
        size = len(ids)
        counts = {max(MULTIPLE, MULTIPLE * round(factor * size / MULTIPLE)) for factor in FACTORS}
        choices = tuple(sorted({n for n in counts if n <= 2 * size} | {size}))
        if len(choices) > 1:
            groups[group] = choices
    largest = sorted(groups, key=lambda g: -_weights_of(structure, g))[:MOST_GROUPS]
    groups = {group: groups[group] for group in groups if group in largest}
    positive = [s for s in sensitivity.values() if s > 0] or [1.0]
    logs = {name: math.log(max(sensitivity[name], min(positive))) for name in structure.layers}
    labels = kmeans_1d(list(logs.values()), len(WINDOWS))
    cluster = dict(zip(structure.layers, labels.tolist(), strict=True))
    count = max(cluster.values()) + 1
    windows = list(WINDOWS[-count:]) if count > 1 else [BITS]  # fewer clusters: the stricter windows go first
    shared = _shared(logs, cluster, MOST_PARAMETERS - len(groups))
    layers, choices = {}, {}
    for names in shared:
        first, *others = names
        parameter = f"bits.{first}" + (f"+{len(others)}" if others else "")
        layers[parameter], choices[parameter] = names, windows[cluster[first]]
    widths_of = {f"width.{group}": group for group in groups}
    counts_of = {name: groups[group] for name, group in widths_of.items()}
    return Space(layers, {**choices, **counts_of}, widths_of)


def _weights_of(structure: Structure, group: str) -> int:
    sizes = structure.sizes
    return sum(
        math.prod(shape.weights(sizes))
        for shape in structure.layers.values()
        if group in shape.rows.of or group in shape.inputs.of
    )


def _shared(logs: dict[str, float], cluster: Mapping[str, int], most: int) -> list[tuple[str, ...]]:
    """Layers in the model's order, each by itself, or joined with the nearest of its cluster until `most` are left.

    First and last stay by themselves.
    """
    sets, ends = [[name] for name in logs], {next(iter(logs)), next(reversed(logs))}  # which baselines keep apart
    while len(sets) > most:
        mean = [sum(logs[n] for n in names) / len(names) for names in sets]
        inner = [i for i, names in enumerate(sets) if not ends.intersection(names)]
        order = sorted(inner, key=lambda i: (cluster[sets[i][0]], mean[i]))
        pairs = [(mean[b] - mean[a], a, b) for a, b in pairwise(order) if cluster[sets[a][0]] == cluster[sets[b][0]]]
        if not pairs:
            break
        _, a, b = min(pairs)
        joined = sets[a] + sets[b]
        sets = [names for i, names in enumerate(sets) if i not in (a, b)] + [joined]
    place = {name: i for i, name in enumerate(logs)}
    joined_sets = [tuple(sorted(names, key=place.__getitem__)) for names in sets]
    return sorted(joined_sets, key=lambda names: place[names[0]])
