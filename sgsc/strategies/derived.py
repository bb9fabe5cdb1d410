"""The file of a derived network: weights before rounding and all grids, for whoever goes on from them in Python.

safetensors: the state dict of the prepared network; the metadata's key "layers" is JSON, layer -> [strategy of the
weight, whether it has a step a channel, its bits, strategy of the input or null]. What runs is the packed file.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from sgsc.files import write_atomically
from sgsc.layers import quant_layers
from sgsc.preparation import prepare
from sgsc.quantizers import InputQuantizer, Quantizer

from .biases import give_biases
from .folding import fold_batch_norms
from .registry import INPUTS, WEIGHTS
from .statistics import InputStatistics

# what files of another kind, or metadata of another shape, raise
NONE_OF_OURS = (safetensors.SafetensorError, OSError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


def save_derived(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a network that `search_strategies` or a finished `StrategyTraining` has made, atomically.

    Raises:
        ValueError: If a layer holds something else than one strategy.
    """
    layers: dict[str, list[Any]] = {}
    for name, layer in quant_layers(model).items():
        weight, given = layer.weight_quantizer, layer.input_quantizer
        names = [None if q is None else getattr(q, "strategy", "") for q in (weight, given)]
        if "" in names:
            raise ValueError(f"layer {name!r} holds no strategy, or a mixture of several; derive the network first")
        layers[name] = [names[0], weight.per_channel, int(weight.bits().max()), names[1]]  # pyright: ignore
    # a module in two places is stored in both
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    write_atomically(Path(path), safetensors.torch.save(state, metadata={"layers": json.dumps(layers)}))


def load_derived(network: nn.Module, path: str | os.PathLike) -> nn.Module:
    """The derived network, prepared and in evaluation mode, from its file and the float network that it was made of.

    Args:
        network: Of the same architecture, batch norms in place; its weights do not matter, and it is left as it is.
        path: Of `save_derived`.

    Raises:
        ValueError: If the file is none, or does not fit the network.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            layers: dict[str, list[Any]] = json.loads((file.metadata() or {})["layers"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        for weight, per_channel, bits, given in layers.values():
            WEIGHTS[weight](1, bits, per_channel)
            _ = given is None or INPUTS[given]
    except NONE_OF_OURS as error:
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{os.fspath(path)!r} is not the file of a derived network ({said})") from None
    said = "it is of other layers"
    for base in (fold_batch_norms(network).model, copy.deepcopy(network).eval()):
        try:
            model = prepare(base, quantizer="lsq8", skip=map(re.escape, _others(base, layers))).model
            if set(quant_layers(model)) == set(layers):
                _attach(model, layers)
                _give(model, state)
                model.load_state_dict(state)
                _check_grids(model.eval(), layers)
                return model
        except (ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:300]
    raise ValueError(f"{os.fspath(path)!r} does not fit the network: {said}")


def _others(network: nn.Module, layers: Iterable[str]) -> list[str]:
    """Modules with parameters, of which none of the layers is a part."""
    kept = {name[:end] for name in layers for end in (*(m.start() for m in re.finditer(r"\.", name)), len(name))}
    held = (name for name, m in network.named_modules() if next(m.parameters(recurse=False), None) is not None)
    return [name for name in held if name and name not in kept]


def _attach(model: nn.Module, layers: Mapping[str, Sequence[Any]]) -> None:
    """Give each layer quantizers of its strategies; their values are to be loaded."""
    seen = InputStatistics()
    seen.observe(torch.tensor([0.0, 1.0]))
    for name, layer in quant_layers(model).items():
        weight, per_channel, bits, given = layers[name]
        at = layer.weight.device
        layer.weight_quantizer = WEIGHTS[weight](layer.weight.shape[0], bits, per_channel).to(at)
        layer.input_quantizer = None if given is None else INPUTS[given].fitted(seen, bits).to(at)


def _give(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give biases to layers that have none in the network and one in the file.

    Raises:
        ValueError: If a bias is not finite, or of another dtype than its layer's weight.
    """
    for name, layer in quant_layers(model).items():
        bias = state.get(f"{name}.bias".removeprefix("."))
        if bias is not None and layer.bias is None:
            give_biases({name: layer})
            if bias.dtype != layer.weight.dtype:
                raise ValueError(f"layer {name!r}: a bias of {bias.dtype}, a weight of {layer.weight.dtype}")
        if bias is not None and not torch.isfinite(bias).all():
            raise ValueError(f"layer {name!r}: a bias that is not finite")


def _check_grids(model: nn.Module, layers: Mapping[str, Sequence[Any]]) -> None:
    """Refuse values that no strategy makes.

    Raises:
        ValueError: If a grid is not finite, or of other bits than the file says.
    """
    for name, layer in quant_layers(model).items():
        for quantizer, bits in ((layer.weight_quantizer, layers[name][2]), (layer.input_quantizer, 8)):
            if isinstance(quantizer, Quantizer | InputQuantizer):
                scale, low, high, _ = quantizer.grid()
                if not torch.isfinite(torch.stack([scale, low, high])).all() or (high - low >= 2**bits).any():
                    raise ValueError(f"layer {name!r} holds a grid that no strategy of {bits} bits makes")
