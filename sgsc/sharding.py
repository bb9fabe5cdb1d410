"""Models whose weights are sharded over ranks by FSDP2 (`torch.distributed.fsdp.fully_shard`), and the moments in which
they must be whole: to pack, to fit a grid to a row, to silence a removed channel, to give bits back.

The quantizers' parameters stay whole on every rank (`ignored_params`): widths decide about rows, and rows lie anywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    *("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)

_STATE = ("__composable_api_state_key", "_is_fsdp", "_fsdp")  # what fully_shard keeps in a module, process groups too


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in parts on several ranks (a DTensor, by what it can do: importing that takes a second)."""
    return hasattr(tensor, "full_tensor")


def whole_tensor(tensor: Any) -> Tensor:
    """All of a tensor; every rank must ask for it at the same time."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_of(whole: Tensor, like: Any) -> Any:
    """This rank's part of a tensor that every rank holds, cut as `like` is; the tensor where that is whole."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # no rank sends: each cuts its own part out
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def zero_rows(value: Any, rows: Tensor) -> None:
    """Set rows of a tensor to zero, sharded or not; `rows`: (C,) bool, whole."""
    if is_sharded(value):
        mask = rows.view(-1, *[1] * (value.dim() - 1)).expand(value.shape)
        value.to_local().masked_fill_(shard_of(mask.contiguous(), value).to_local(), 0.0)
    else:
        value[rows] = 0.0


def refuse_what_is_not_served(model: nn.Module, quantizers: set[nn.Parameter]) -> None:
    """Refuse shards that nothing here can put together again.

    Raises:
        ValueError: If quantizers are sharded, or weights by something else than FSDP2.
    """
    if not any(is_sharded(p) for p in model.parameters()):
        return
    if any(is_sharded(p) for p in quantizers):
        raise ValueError(
            "fully_shard took the quantizers' parameters; call it, each time, with "
            "ignored_params=sgsc.distributed.quantizer_parameters(model)"
        )
    if not any(_is_fsdp(module) for module in model.modules()):
        raise ValueError(
            "the weights are DTensors, but not of fully_shard: tensor parallelism is not served; use fully_shard or "
            "DistributedDataParallel"
        )


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(type(module), "set_requires_gradient_sync") and hasattr(type(module), "reshard")


def reshard(model: nn.Module) -> None:
    """Have shards lie in the modules: after a forward the outermost may hold whole weights, that nobody writes back."""
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()  # pyright: ignore[reportCallIssue]


@contextmanager
@torch.no_grad()
def whole(model: nn.Module, *, vectors: bool = False) -> Iterator[nn.Module]:
    """The model as a plain one that every rank holds whole; what changes in it goes back to the shards in the end.

    Every rank must enter and leave together. Nothing happens to a model that is not sharded.

    Args:
        model: A model, sharded or not.
        vectors: Only biases and the like are needed whole; the model cannot run then.
    """
    if not any(_is_fsdp(module) for module in model.modules()):
        yield model
        return
    modules = list(model.modules())
    reshard(model)
    made: dict[int, nn.Parameter] = {}
    swapped: list[tuple[nn.Module, str, Any]] = []
    plain: list[tuple[nn.Module, type]] = []
    hooks: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            for name, p in module._parameters.items():
                if p is not None and is_sharded(p) and (p.dim() <= 1 or not vectors):
                    if id(p) not in made:
                        made[id(p)] = nn.Parameter(whole_tensor(p).detach(), requires_grad=p.requires_grad)
                    swapped.append((module, name, p))
                    module._parameters[name] = made[id(p)]
            if _is_fsdp(module):
                plain.append((module, type(module)))
                module.__class__ = type(module).__mro__[2]  # fully_shard put its own class and FSDPModule before it
            for key in [k for k in module.__dict__ if k.startswith(_STATE)]:
                hooks.append((module, key, module.__dict__.pop(key)))
            for kind in _HOOKS:
                held = module.__dict__[kind]
                rest = OrderedDict((k, hook) for k, hook in held.items() if not _of_fsdp(hook))
                if len(rest) < len(held):
                    hooks.append((module, kind, held))
                    module.__dict__[kind] = rest
        yield model
    finally:
        for module, kind, held in hooks:
            module.__dict__[kind] = held
        for module, kind in plain:
            module.__class__ = kind
        for module, name, p in swapped:
            p.to_local().copy_(shard_of(made[id(p)].detach(), p).to_local())
            module._parameters[name] = p


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")
