"""From a verified file to a model that runs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sgsc.layers import QuantMultiheadAttention
from sgsc.packed import PackedLayer

from .format import ArtefactError
from .read import Artefact, read

# Builders of known architectures: what lets `load(path)` work without the caller's model. A file names one; it cannot
# bring its own.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}


def load(path: str | os.PathLike) -> nn.Module:
    """The packed model of a file whose architecture is known here; in eval mode.

    Raises:
        ArtefactError: If the file is malformed, or names no architecture that is known: use `load_into` then.
    """
    artefact = read(path)
    known = artefact.manifest["architecture"]
    if known is None or known[0] not in ARCHITECTURES:
        named = "names no architecture" if known is None else f"names the architecture {known[0]!r}"
        raise ArtefactError(
            f"{Path(path).name} {named}; known here: {', '.join(sorted(ARCHITECTURES)) or 'none'}. "
            "Construct the float model yourself and call load_into(model, path)"
        )
    try:
        with torch.device("meta"):  # shapes only: a file cannot make us allocate what it does not hold
            model = ARCHITECTURES[known[0]](**known[1])
    except Exception as error:
        raise ArtefactError(f"architecture {known[0]!r} cannot be built from {known[1]}: {error}") from None
    return _fill(model, artefact)


def load_into(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """A packed copy of `model`, a float model of the architecture that was compressed, with the file's weights.

    Raises:
        ArtefactError: If the file is malformed or does not fit the model; the message names the layer.
    """
    return _fill(copy.deepcopy(model), read(path))


def _fill(model: nn.Module, artefact: Artefact) -> nn.Module:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and any(n.startswith(f"{name}.q_proj") for n in artefact.layers):
            model.set_submodule(name, QuantMultiheadAttention(module))
    modules = dict(model.named_modules(remove_duplicate=False))
    values = dict(artefact.values)
    for name, layer in artefact.layers.items():
        _check_fits(name, modules.get(name), layer)
        layer.bias = values.pop(f"{name}.bias", None)
        had_bias = getattr(modules[name], "bias", None) is not None
        shape = None if layer.bias is None else tuple(layer.bias.shape)
        if shape != ((len(layer.bits),) if had_bias else None):
            raise ArtefactError(f"layer {name!r}: its bias in the file does not fit the model's")
        for other, module in modules.items():  # a module in two places stays one
            if module is modules[name]:
                model.set_submodule(other, layer) if other else None
        if name == "":
            model = layer
    own = {f"{name}.{key}" if name else key for name, layer in artefact.layers.items() for key in layer.state_dict()}
    for key, target in list(model.state_dict(keep_vars=True).items()):
        if key in own:
            continue
        module, leaf = model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]
        if leaf == "num_batches_tracked":
            module.register_buffer(leaf, torch.zeros((), dtype=torch.long))
            continue
        if key not in values:
            raise ArtefactError(f"the file holds nothing for {key!r} of the model")
        value = values.pop(key)
        shrinks = isinstance(module, _BatchNorm) and len(value) <= target.shape[0]
        if value.dtype != target.dtype or (value.shape != target.shape and not (shrinks and value.dim() == 1)):
            have, want = (f"{t.dtype} {list(t.shape)}" for t in (value, target))
            raise ArtefactError(f"{key!r}: {have} in the file, {want} in the model")
        if isinstance(target, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value)
        if isinstance(module, _BatchNorm):
            module.num_features = len(value)
    if values:
        raise ArtefactError(f"the file holds {min(values)!r}, which the model does not have")
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise ArtefactError(f"{left[0]!r} is not saved with a state dict, so the file cannot bring it; use load_into")
    return model.eval()


def _check_fits(name: str, module: nn.Module | None, layer: PackedLayer) -> None:
    if module is None:
        raise ArtefactError(f"layer {name!r} of the file is not in the model")
    if layer.type_name not in {cls.__name__ for cls in type(module).__mro__}:
        raise ArtefactError(f"layer {name!r}: a {layer.type_name} in the file, a {type(module).__name__} in the model")
    have, want = layer.weight_shape(), tuple(module.get_parameter("weight").shape)
    removed = len(have) == len(want) and all(h <= w for h, w in zip(have[:2], want[:2], strict=True))
    if not removed or have[2:] != want[2:]:
        raise ArtefactError(f"layer {name!r}: weight {list(have)} in the file, {list(want)} in the model")
