"""From a verified file to a model that runs."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_parameter_registration_hook

from sgsc.layers import with_served_layers
from sgsc.packed import PackedConv2d, PackedEmbedding, PackedLayer, geometry

from .format import ArtefactError
from .read import Artefact, read

# Builders of known architectures: what lets `load(path)` work without the caller's model. A file names one; it cannot
# bring its own.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {}


def load(path: str | os.PathLike) -> nn.Module:
    """The packed model of a file whose architecture is known here; in eval mode.

    Raises:
        ArtefactError: If the file is malformed, or names no architecture that is known: use `load_into` then.
        FileNotFoundError: If there is none.
    """
    artefact = read(path)
    known = artefact.manifest["architecture"]
    if known is None or known[0] not in ARCHITECTURES:
        named = "names no architecture" if known is None else f"names the architecture {known[0]!r}"
        raise ArtefactError(
            f"{Path(path).name} {named}; known here: {', '.join(sorted(ARCHITECTURES)) or 'none'}. "
            "Construct the float model yourself and call load_into(model, path); or register its builder in "
            "sgsc.artefact.ARCHITECTURES (`import sgsc.demos` registers those of the demos)"
        )
    try:
        with torch.device("meta"), _at_most(64 + 8 * len(artefact.layers) + 2 * len(artefact.values)):
            model = ARCHITECTURES[known[0]](**known[1])  # shapes only: a file makes us allocate no more than it holds
    except Exception as error:
        said = f"{str(known[1])[:200]}: {error}"
        raise ArtefactError(f"architecture {known[0]!r} cannot be built from {said}") from None
    return _fill(model, artefact)


@contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Stop whoever registers more parameters in this thread: shapes are free, but modules take memory."""
    made, thread = 0, threading.get_ident()

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > parameters:
            raise ArtefactError(f"it makes more than {parameters} parameters, far more than the file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def load_into(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """A packed copy of `model`, a float model of the architecture that was compressed, with the file's weights.

    Raises:
        ArtefactError: If the file is malformed or does not fit the model; the message names the layer.
        FileNotFoundError: If there is none.
    """
    return _fill(copy.deepcopy(model), read(path))


def _fill(model: nn.Module, artefact: Artefact) -> nn.Module:
    try:
        held = artefact.layers
        model = with_served_layers(model, lambda name: name in held or _join(name, "q_proj") in held)
    except ValueError as error:
        raise ArtefactError(str(error)) from None
    modules = dict(model.named_modules(remove_duplicate=False))
    values = dict(artefact.values)
    for name, layer in artefact.layers.items():
        module = modules.get(name)
        if module is None:
            raise ArtefactError(f"layer {name!r} of the file is not in the model")
        _check_fits(name, module, layer)
        layer.bias = values.pop(_join(name, "bias"), None)
        _check_bias(name, module, layer)
        if isinstance(layer, PackedEmbedding):
            layer.like = torch.empty(0, dtype=module.weight.dtype)  # pyright: ignore  a tensor, as _check_fits has seen
        for other in [n for n, m in modules.items() if m is module]:  # a module in two places stays one
            if other == "":
                model = layer
            else:
                model.set_submodule(other, layer)
    modules, first = dict(model.named_modules(remove_duplicate=False)), dict(model.named_modules())
    for key, target in list(model.state_dict(keep_vars=True).items()):
        owner, _, leaf = key.rpartition(".")
        module = modules.get(owner)
        if isinstance(module, PackedLayer) or (module is not None and owner not in first):
            continue
        if isinstance(module, _BatchNorm) and leaf == "num_batches_tracked":
            module.register_buffer(leaf, torch.zeros((), dtype=torch.long))
            continue
        if module is None or not isinstance(target, Tensor) or key not in values:
            raise ArtefactError(f"the file holds nothing for {key!r} of the model")
        value = values.pop(key)
        shrinks = isinstance(module, _BatchNorm) and value.dim() == 1 and len(value) <= len(target)
        if value.dtype != target.dtype or (value.shape != target.shape and not shrinks):
            have, want = (f"{t.dtype} {list(t.shape)}" for t in (value, target))
            raise ArtefactError(f"{key!r}: {have} in the file, {want} in the model")
        if isinstance(target, nn.Parameter):
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module.register_buffer(leaf, value)
    if values:
        raise ArtefactError(f"the file holds {min(values)!r}, which the model does not have")
    for name, module in first.items():
        if isinstance(module, _BatchNorm):
            lengths = {len(v) for v in module.state_dict().values() if v.dim() == 1}
            if len(lengths) > 1:
                raise ArtefactError(f"{name!r}: tensors of {sorted(lengths)} channels in one {type(module).__name__}")
            module.num_features = lengths.pop() if lengths else module.num_features
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise ArtefactError(f"{left[0]!r} is not saved with a state dict, so the file cannot bring it; use load_into")
    return model.eval()


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _check_fits(name: str, module: Any, layer: PackedLayer) -> None:
    """Check type, shape and settings; smaller is right where `pack` may have cut removed channels out.

    Raises:
        ArtefactError: If one of them is not the model's.
    """
    if not isinstance(module, getattr(nn, layer.type_name)):
        raise ArtefactError(f"layer {name!r}: a {layer.type_name} in the file, a {type(module).__name__} in the model")
    have, want = layer.weight_shape(), tuple(module.weight.shape)
    groups = getattr(module, "groups", 1)
    depthwise = 1 < groups == module.in_channels == want[0] if isinstance(layer, PackedConv2d) else False
    if isinstance(layer, PackedEmbedding) or (groups > 1 and not depthwise):
        fits = have == want
    else:
        fits = len(have) == len(want) and have[2:] == want[2:] and have[0] <= want[0] and have[1] <= want[1]
        fits = fits and (not depthwise or have[1] == 1)
    if not fits:
        raise ArtefactError(f"layer {name!r}: weight {list(have)} in the file, {list(want)} in the model")
    if isinstance(layer, PackedConv2d):
        in_model = geometry(module) | {"groups": have[0] if depthwise else groups}
        for key, value in layer.settings().items():
            if value != in_model[key]:
                raise ArtefactError(f"layer {name!r}: {key} {value} in the file, {in_model[key]} in the model")


def _check_bias(name: str, module: Any, layer: PackedLayer) -> None:
    """Check the bias that the file has for a layer: also where the model's has none, for corrections may need one.

    Raises:
        ArtefactError: If it is missing, of another length or dtype, or of a layer that adds none.
    """
    in_model = getattr(module, "bias", None)
    if layer.bias is None and in_model is None:
        return
    have = None if layer.bias is None else (str(layer.bias.dtype), *layer.bias.shape)
    want = (str((module.weight if in_model is None else in_model).dtype), len(layer.bits))
    want = None if isinstance(layer, PackedEmbedding) else want
    if have != want:
        raise ArtefactError(f"layer {name!r}: its bias in the file does not fit the model's: {have}, want {want}")
