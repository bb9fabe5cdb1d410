"""Cutting dead channels out of a prepared model: when it is packed, and while it trains, its optimiser included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .coupling import NORMS, Coupling, couple, module_of
from .layers import QuantLinear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)  # quantized ones are among them
# Called as follow(name, value, axis, index) for each tensor of the model, before only `index` of `axis` is left of it.
Follow = Callable[[str, Tensor, int, Tensor], None]


def spare(coupling: Coupling, gone: Tensor) -> Tensor:
    """The channels that may go, (ids,) bool on the CPU: each layer keeps one."""
    gone = gone.clone()
    for ids in coupling.produced.values():
        if len(ids) and gone[ids].all():
            gone[ids[0]] = False
    return gone


@torch.no_grad()
def remove_channels(
    model: nn.Module, coupling: Coupling | None = None, gone: Tensor | None = None, follow: Follow | None = None
) -> dict[str, int]:
    """Cut the dead channels that are proved silent out of a prepared model, in place.

    Each layer keeps at least one channel. The model computes the same function (sums lose terms that are exactly 0).
    Parameters stay the same objects, so that an optimiser goes on with them; their gradients are dropped.

    Args:
        model: A prepared model.
        coupling: Of the model; found if None.
        gone: (ids,) bool, the channels to cut, silent ones; all of them if None.
        follow: Told of each cut, so that what is kept beside the model can be cut alike.

    Returns:
        Layer name -> channels cut.
    """
    coupling = couple(model) if coupling is None else coupling
    if coupling.why:
        return {}
    gone = spare(coupling, (coupling.silent(model) if gone is None else gone).cpu())
    if not gone.any():
        return {}

    def select(owner: str, names: Any, axis: int, keep: Tensor) -> None:
        index = keep.nonzero().squeeze(1)
        module = module_of(model, owner)
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, Tensor) and len(index) < value.shape[axis]:
                if follow is not None:
                    follow(f"{owner}.{name}".removeprefix("."), value, axis, index.to(value.device))
                _put(module, name, value, value.detach().index_select(axis, index.to(value.device)))

    cut = {}
    for name, ids in coupling.produced.items():
        cut[name] = int(gone[ids].sum())
        layer = module_of(model, name)
        keep = ~gone[ids]
        select(name, ("weight", "bias"), 0, keep)
        # what is saved is a value a channel
        select(f"{name}.weight_quantizer".removeprefix("."), list(layer.weight_quantizer.state_dict()), 0, keep)
        if isinstance(layer, QuantLinear):
            layer.out_features = int(keep.sum())
        else:
            if layer.groups == layer.in_channels == layer.out_channels and layer.groups > 1:
                layer.groups = layer.in_channels = int(keep.sum())
            layer.out_channels = int(keep.sum())
    for name, ids in coupling.read.items():
        layer = module_of(model, name)
        inputs = layer.in_features if isinstance(layer, QuantLinear) else layer.in_channels
        keep = (~gone[ids]).repeat_interleave(inputs // len(ids))
        select(name, ("weight",), 1, keep)
        if isinstance(layer, QuantLinear):
            layer.in_features = int(keep.sum())
        else:
            layer.in_channels = int(keep.sum())
    for name, ids in coupling.norms.items():
        select(name, ("weight", "bias", "running_mean", "running_var"), 0, ~gone[ids])
        module_of(model, name).num_features = int((~gone[ids]).sum())
    return {name: count for name, count in cut.items() if count}


def _put(module: nn.Module, name: str, old: Tensor, new: Tensor) -> None:
    """Put a value of another shape in the place of a parameter or buffer."""
    if isinstance(old, nn.Parameter):
        old.grad = None
        # Another dtype for a moment: autograd then forgets the node that adds up gradients of the old shape, which the
        # graph of a loss that the caller still holds keeps alive.
        old.data = new.to(torch.float64 if old.dtype != torch.float64 else torch.float32)
        old.data = new
    else:
        module.register_buffer(name, new, persistent=name not in module._non_persistent_buffers_set)


def check_states(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse optimisers whose state could not be cut.

    Raises:
        ValueError: If one keeps state that is not a value a weight.
    """
    for optimizer in optimizers:
        for parameter, held in optimizer.state.items():
            for key, one in held.items():
                if isinstance(one, Tensor) and one.numel() > 1 and one.shape != parameter.shape:
                    raise ValueError(
                        f"{type(optimizer).__name__} keeps {key!r} {tuple(one.shape)} for a parameter "
                        f"{tuple(parameter.shape)}, which cannot be cut with it; leave `cut` off, or use an optimiser "
                        "with a value a weight, such as Adam or SGD"
                    )


@torch.no_grad()
def cut_while_training(
    model: nn.Module,
    coupling: Coupling,
    gone: Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    states: Sequence[dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Cut channels out of a model, the state of its optimisers, and state dicts of it; all in place.

    Returns:
        Layer name -> (C,) bool, of the rows before the cut those that are left; layers that keep all are left out.

    Raises:
        ValueError: If an optimiser keeps state that is not a value a weight; nothing is cut then.
    """
    check_states(optimizers)
    left: dict[str, Tensor] = {}

    def follow(name: str, value: Tensor, axis: int, index: Tensor) -> None:
        for state in states:
            if name in state:
                state[name] = state[name].index_select(axis, index.to(state[name].device))
        for optimizer in optimizers:
            held = optimizer.state.get(value, {})
            for key, one in held.items():
                if isinstance(one, Tensor) and one.shape == value.shape:
                    held[key] = one.index_select(axis, index.to(one.device))
        if name.endswith("weight_quantizer.bit_depth"):
            layer = name.removesuffix("weight_quantizer.bit_depth").removesuffix(".")
            left[layer] = torch.zeros(len(value), dtype=torch.bool, device=value.device).index_fill_(0, index, True)

    remove_channels(model, coupling, gone, follow)
    return left


def depthwise_layers(model: nn.Module) -> set[str]:
    """Names of the convolutions whose every channel is a group of its own: with one channel left none looks like it."""
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, CONVOLUTIONS)}
    return {name for name, m in convolutions.items() if m.groups == m.in_channels == m.out_channels > 1}


@torch.no_grad()
def take_shapes(model: nn.Module, state: dict[str, Tensor], depthwise: set[str]) -> None:
    """Give a model whose channels were cut, or were not, the shapes of a state dict of it, so that it can be loaded.

    The model is prepared or float, and what a search gave other widths has a state dict of it, too.

    Parameters stay the same objects; their values are those of the state. `depthwise`: `depthwise_layers` of the model
    before any cut.
    """
    for name, value in state.items():
        owner, _, leaf = name.rpartition(".")
        module = module_of(model, owner)
        old = getattr(module, leaf)
        if old.shape == value.shape:
            continue
        _put(module, leaf, old, value.detach().clone().to(old.device))
        if isinstance(module, NORMS):
            module.num_features = len(value)
        if leaf == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = value.shape
        elif leaf == "weight" and isinstance(module, CONVOLUTIONS):
            module.groups = len(value) if owner in depthwise else module.groups
            module.out_channels, module.in_channels = len(value), value.shape[1] * module.groups
