"""Which channels of a network can change in number, and how every shape follows from their counts.

Channels that the same layers produce, such as those of a residual stream, form one *group*: they exist in all of these
layers or in none, so they share one width. `coupling` finds this from the graph. A layer may produce channels of
several groups, where streams are concatenated. Channels that are pinned (outputs, attention, what cannot be traced)
keep their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sgsc.coupling import Coupling, couple
from sgsc.layers import quant_layers

Sizes = Mapping[str, int]  # group -> channels


@dataclass(frozen=True)
class Count:
    """A number of channels: a fixed part, and how often each group's channels occur in it."""

    fixed: int
    of: Mapping[str, int]

    def at(self, sizes: Sizes) -> int:
        """The number where groups have these sizes."""
        return self.fixed + sum(times * sizes[group] for group, times in self.of.items())


@dataclass(frozen=True)
class Shape:
    """Of one layer: rows, inputs of a row, weights of an input (kernel or flattened area), and what else it stores."""

    rows: Count
    inputs: Count
    per_input: int
    bias: bool

    def weights(self, sizes: Sizes) -> tuple[int, int]:
        """(rows, weights a row)."""
        return self.rows.at(sizes), self.inputs.at(sizes) * self.per_input


@dataclass
class Structure:
    """A prepared model's layers, norms and groups.

    Attributes:
        layers: Name -> shape, in the model's order.
        norms: Name of a batch norm -> its channels.
        groups: Name -> (n,) ids of the coupling; named after the first layer that produces them.
        coupling: What this was read from.
    """

    layers: dict[str, Shape]
    norms: dict[str, Count]
    groups: dict[str, Tensor]
    coupling: Coupling

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Channels of each group as the model stands."""
        return {name: len(ids) for name, ids in self.groups.items()}


def structure_of(model: nn.Module) -> Structure:
    """Read a prepared model; where nothing could be proved there are no groups, and every layer keeps its shape."""
    coupling = couple(model)
    layers = quant_layers(model)
    group_of, groups = _groups(coupling)

    def count(ids: Tensor) -> Count:
        found: dict[str, int] = {}
        for i in ids.tolist():
            if i in group_of:
                found[group_of[i]] = found.get(group_of[i], 0) + 1
        return Count(len(ids) - sum(found.values()), {g: n // len(groups[g]) for g, n in found.items()})

    shapes = {}
    for name, layer in layers.items():
        rows, width = layer.weight.shape[0], layer.weight[0].numel()
        made = count(coupling.produced[name]) if name in coupling.produced else Count(rows, {})
        if name in coupling.read:
            ids = coupling.read[name]
            shapes[name] = Shape(made, count(ids), width // len(ids), layer.bias is not None)
        else:
            shapes[name] = Shape(made, Count(width, {}), 1, layer.bias is not None)
    return Structure(shapes, {n: count(ids) for n, ids in coupling.norms.items()}, groups, coupling)


def _groups(coupling: Coupling) -> tuple[dict[int, str], dict[str, Tensor]]:
    """Id -> group and group -> ids, of ids that may change in number."""
    makers: dict[int, list[str]] = {}
    fixed = set(coupling.pinned.nonzero().flatten().tolist())
    for name, ids in coupling.produced.items():
        for i in ids.tolist():
            if name in makers.setdefault(i, []):
                fixed.add(i)  # twice in one layer: two of its rows are one channel
            makers[i].append(name)
    uses: dict[int, list[str]] = {}
    for table in (coupling.read, coupling.norms):
        for name, ids in table.items():
            for i in ids.tolist():
                uses.setdefault(i, []).append(name)
    together: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
    for i, made in makers.items():
        if i not in fixed:
            together.setdefault((tuple(sorted(made)), tuple(sorted(uses.get(i, [])))), []).append(i)
    order = {name: place for place, name in enumerate(coupling.produced)}
    named: dict[str, Tensor] = {}
    for (made, _), ids in sorted(together.items(), key=lambda item: (min(order[n] for n in item[0][0]), item[1])):
        first = min(made, key=order.__getitem__)
        name = first if first not in named else f"{first}#{sum(n.partition('#')[0] == first for n in named)}"
        named[name] = torch.tensor(sorted(ids))
    return {int(i): name for name, ids in named.items() for i in ids}, named
