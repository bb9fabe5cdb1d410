"""Cutting dead channels out of a prepared model: for good when it is packed, and while it trains, optimiser included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .coupling import Coupling, couple, module_of
from .layers import QuantLinear

LEAST_SHARE = 0.02  # of all rows, that one cut while training takes

# Called as follow(name, value, axis, index) for each tensor of the model, before only `index` of `axis` is left of it.
Follow = Callable[[str, Tensor, int, Tensor], None]


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
    gone = (coupling.silent(model) if gone is None else gone).cpu()
    for ids in coupling.produced.values():
        if len(ids) and gone[ids].all():
            gone[ids[0]] = False
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
                _shorten(module, name, value, axis, index.to(value.device))

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


def _shorten(module: nn.Module, name: str, value: Tensor, axis: int, index: Tensor) -> None:
    chosen = value.detach().index_select(axis, index)
    if isinstance(value, nn.Parameter):
        value.grad = None
        # Another dtype for a moment: autograd then forgets the node that adds up gradients of the old shape, which the
        # graph of a loss that the caller still holds keeps alive.
        value.data = chosen.to(torch.float64 if value.dtype != torch.float64 else torch.float32)
        value.data = chosen
    else:
        module.register_buffer(name, chosen)


class Cuts:
    """Cuts dead channels out of a model while it trains, and all that lies beside it with it.

    A channel goes once it is dead in the model and in every state that the run may return to. What was cut is recorded,
    so that a run that resumes from a fresh model cuts it alike.

    Args:
        model: A prepared model.
        optimizers: Whose state follows; state of another shape than its parameter is left alone.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.model, self.optimizers = model, optimizers
        self.done: list[Tensor] = []

    def worth_it(self, coupling: Coupling, gone: Tensor) -> bool:
        """Whether enough goes: each cut traces the model anew."""
        rows = sum(int(gone[ids].sum()) for ids in coupling.produced.values())
        return rows >= LEAST_SHARE * sum(len(ids) for ids in coupling.produced.values())

    def cut(self, coupling: Coupling, gone: Tensor, states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Cut channels out of the model, its optimisers' state and `states`, state dicts of the model; in place.

        Returns:
            Layer name -> (C,) bool, of the rows before the cut those that are left; layers without a cut are left out.
        """
        left: dict[str, Tensor] = {}

        def follow(name: str, value: Tensor, axis: int, index: Tensor) -> None:
            for state in states:
                if name in state:
                    state[name] = state[name].index_select(axis, index.to(state[name].device))
            for optimizer in self.optimizers:
                held = optimizer.state.get(value, {})
                for key, one in held.items():
                    if isinstance(one, Tensor) and one.shape == value.shape:
                        held[key] = one.index_select(axis, index.to(one.device))
            if axis == 0 and name.endswith("weight_quantizer.bit_depth"):
                layer = name.removesuffix("weight_quantizer.bit_depth").removesuffix(".")
                left[layer] = torch.zeros(len(value), dtype=torch.bool, device=value.device).index_fill_(0, index, True)

        self.done.append(gone.cpu())
        remove_channels(self.model, coupling, gone, follow)
        return left

    def again(self, done: Sequence[Tensor], states: Sequence[dict[str, Tensor]] = ()) -> None:
        """Cut a fresh copy of the model as it was cut before; `done` is that of the run that it goes on for."""
        for gone in done:
            self.cut(couple(self.model), gone, states)
