"""Batch norms taken into the convolution or Linear before them, where the model's graph proves that nothing else reads.

With w' = w * gamma / sqrt(var + eps) and b' = (b - mean) * gamma / sqrt(var + eps) + beta the layer answers as both did
in evaluation mode. Its grids are then those of what is deployed, and its rows no longer differ by what a norm undoes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class Folded(NamedTuple):
    """What `fold_batch_norms` made and did.

    Attributes:
        model: The copy.
        folded: Names of the norms that are gone.
        left: Name -> why, for every norm that stays.
    """

    model: nn.Module
    folded: tuple[str, ...]
    left: dict[str, str]


def fold_batch_norms(model: nn.Module) -> Folded:
    """Copy a model and fold its batch norms, as the module's docstring says; the copy is in evaluation mode.

    Names stay as they are: an `nn.Identity` takes the place of a norm. A model that torch.fx cannot trace keeps its
    norms, and so does a layer or norm that is called twice; `left` says so.

    Args:
        model: In float, trained; it is left as it is.

    Returns:
        `.model`, the copy; `.folded`, names of the norms that are gone; `.left`, name -> why, of those that stay.
    """
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    norms = [name for name, m in modules.items() if isinstance(m, _BatchNorm)]
    if not norms:
        return Folded(model, (), {})
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # of the model's own code, which may raise anything when it is given no numbers
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return Folded(model, (), dict.fromkeys(norms, f"the model cannot be traced ({said})"))
    calls: dict[int, list[fx.Node]] = {}
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(id(modules[str(node.target)]), []).append(node)
    folded, left = [], {}
    for name in norms:
        why = _why_not(modules, calls, name, read)
        if why:
            left[name] = why
            continue
        before = str(calls[id(modules[name])][0].args[0].target)  # pyright: ignore  a node, as _why_not has found
        fuse = fuse_linear_bn_eval if isinstance(modules[before], nn.Linear) else fuse_conv_bn_eval
        fused = fuse(modules[before], modules[name])  # pyright: ignore
        # a bias that is new learns where that of the norm, or the weight, would
        learns = [p.requires_grad for p in (modules[before].weight, modules[name].bias) if p is not None][-1]
        modules[before].weight, modules[before].bias = fused.weight, fused.bias.requires_grad_(learns)
        gone = nn.Identity()
        for alias, module in list(model.named_modules(remove_duplicate=False)):
            if module is modules[name]:
                model.set_submodule(alias, gone)
        folded.append(name)
    return Folded(model, tuple(folded), left)


def _why_not(modules: dict[str, nn.Module], calls: dict[int, list[fx.Node]], name: str, read: set[str]) -> str:
    norm: Any = modules[name]
    nodes = calls.get(id(norm), [])
    if len(nodes) != 1:
        return f"it is called {len(nodes)} times"
    if any(modules[of] is norm for of in read if of in modules):
        return "its parameters are read beside calling it"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it carries forward hooks, which would be gone"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    source = nodes[0].args[0] if nodes[0].args else None
    if not isinstance(source, fx.Node) or source.op != "call_module":
        return "no layer is right before it"
    layer = modules[str(source.target)]
    if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
        return f"a {type(layer).__name__} is right before it"
    if isinstance(layer, nn.Linear) and type(norm) is not nn.BatchNorm1d:
        return f"a {type(norm).__name__} after a Linear"
    if layer._parameters.get("weight") is None or layer._forward_hooks or layer._forward_pre_hooks:
        return f"the weight of {source.target} is computed, or it carries hooks"
    if layer.weight.shape[0] != norm.num_features:
        return f"{source.target} has {layer.weight.shape[0]} channels and the norm {norm.num_features}"
    if (
        any(modules[of] is layer for of in read if of in modules)
        or len(calls[id(layer)]) != 1
        or len(source.users) != 1
    ):
        return f"{source.target} is read by others too"
    if sum(layer.weight is p for m in modules.values() for p in m._parameters.values()) > 1:
        return f"{source.target} shares its weight"
    return ""
