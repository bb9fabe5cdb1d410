"""A network with more or fewer channels that starts from the same weights.

Fewer: of each group the channels whose rows have the largest L1 norm stay (Li et al., arXiv 1608.08710). More: the same
channels are doubled, and what reads them divides its weights among both, so that the function stays (Chen et al.,
Net2Net, arXiv 1511.05641). The division is uneven by up to a tenth, at random a weight: equal halves would get equal
gradients for ever.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sgsc.coupling import module_of
from sgsc.layers import QuantLinear

from .structure import Structure

UNEVEN = 0.1


@torch.no_grad()
def resized(model: nn.Module, structure: Structure, sizes: Mapping[str, int], seed: int = 0) -> nn.Module:
    """A copy of a prepared model in which groups have other sizes; quantizers are to be attached anew.

    Args:
        model: A prepared model; it is left as it is.
        structure: Of the model.
        sizes: Group -> channels, 1 to twice what it has; groups that are left out keep theirs.
        seed: Of the division among doubled channels.

    Raises:
        ValueError: If there is no such group, or its size is out of range.
    """
    model = copy.deepcopy(model)
    copies = torch.ones(len(structure.coupling.pinned), dtype=torch.long)
    for group, size in sizes.items():
        if group not in structure.groups:
            raise ValueError(f"no group is called {group!r}; there are {', '.join(structure.groups) or 'none'}")
        ids = structure.groups[group]
        if not 1 <= size <= 2 * len(ids):
            raise ValueError(f"group {group!r} of {len(ids)} channels cannot have {size}; want 1 to {2 * len(ids)}")
        ranked = ids[_importance(model, structure, ids).argsort(descending=True, stable=True)]
        if size <= len(ids):
            copies[ranked[size:]] = 0
        else:
            copies[ranked[: size - len(ids)]] = 2
    if bool((copies == 1).all()):
        return model
    generator = torch.Generator().manual_seed(seed)
    for name, ids in structure.coupling.produced.items():
        layer, index = module_of(model, name), _index(copies[ids])
        _take(layer, ("weight", "bias"), index)
        if isinstance(layer, QuantLinear):
            layer.out_features = len(index)
        else:
            if layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1:
                layer.groups = layer.in_channels = len(index)
            layer.out_channels = len(index)
    for name, ids in structure.coupling.read.items():
        layer = module_of(model, name)
        linear = isinstance(layer, QuantLinear)
        per = (layer.in_features if linear else layer.in_channels) // len(ids)
        times = copies[ids].repeat_interleave(per)
        if per > 1:  # flattened: a channel's features stay together
            blocks = torch.arange(len(times)).view(-1, per)
            index = torch.cat([blocks[i].repeat(int(n)) for i, n in enumerate(copies[ids])])
        else:
            index = _index(times)
        _divide(layer, index, times, generator)
        if linear:
            layer.in_features = len(index)
        else:
            layer.in_channels = len(index)
    for name, ids in structure.coupling.norms.items():
        norm, index = module_of(model, name), _index(copies[ids])
        _take(norm, ("weight", "bias", "running_mean", "running_var"), index)
        norm.num_features = len(index)
    return model


def _importance(model: nn.Module, structure: Structure, ids: Tensor) -> Tensor:
    """(n,) L1 norm of the rows that produce each id, those of each layer relative to their mean."""
    total = torch.zeros(len(structure.coupling.pinned))
    for name, made in structure.coupling.produced.items():
        norms = module_of(model, name).weight.detach().flatten(1).abs().sum(1).float().cpu()
        total.index_add_(0, made, norms / norms.mean().clamp_min(1e-12))
    return total[ids]


def _index(copies: Tensor) -> Tensor:
    return torch.arange(len(copies)).repeat_interleave(copies)


def _take(module: nn.Module, names: tuple[str, ...], index: Tensor) -> None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            _put(module, name, value.index_select(0, index.to(value.device)))


def _divide(layer: nn.Module, index: Tensor, copies: Tensor, generator: torch.Generator) -> None:
    """Select input columns; the weights of one that is there twice add up to what they were."""
    weight = layer.get_parameter("weight")
    chosen = weight.index_select(1, index.to(weight.device)).clone()
    doubled = (copies == 2).nonzero().flatten().tolist()
    places: dict[int, list[int]] = {}
    for place, column in enumerate(index.tolist()):
        places.setdefault(column, []).append(place)
    for column in doubled:
        first, second = places[column]
        whole = weight[:, column]
        share = 0.5 + UNEVEN * (torch.rand(whole.shape, generator=generator).to(whole) - 0.5)
        chosen[:, first] = whole * share
        chosen[:, second] = whole - whole * share
    _put(layer, "weight", chosen)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module.register_parameter(name, nn.Parameter(value, requires_grad=module.get_parameter(name).requires_grad))
    else:
        module.register_buffer(name, value)
