"""From a float model to one whose layers quantize themselves."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .layers import QUANTIZED, REFUSED, QuantLayer, bound, is_conv1d, quant_layers, with_served_layers
from .samples import evaluating, fed

ATTENTION = nn.MultiheadAttention


class Prepared(NamedTuple):
    """What `prepare` made and did.

    Attributes:
        model: The prepared copy.
        swapped: Names of the layers that now quantize their weight.
        left: Name -> why, for every module with parameters of its own that stays float.
    """

    model: nn.Module
    swapped: tuple[str, ...]
    left: dict[str, str]


def prepare(model: nn.Module, *, quantizer: str = "integer", skip: Iterable[str] = ()) -> Prepared:
    """Copy a model and give every Linear, Conv1d, Conv2d, Embedding and MultiheadAttention its quantizers.

    A Conv1D of transformers (GPT-2) becomes the Linear that it is.

    The float model is left as it is. The copy answers as the float model does, within the first grid (8 bits a weight
    with the default quantizer), and loads the float model's checkpoints.

    Args:
        model: Any module; a single layer too.
        quantizer: "integer" (default: what trains is what is stored), "half-steps", "ternary" and
            "interpolated" (variants of it), "published" (arXiv 2301.13142 as it is), or "lsq2" to "lsq8" (arXiv
            1902.08153: one fixed width for all, the steps are learned).
        skip: Names of layers to leave float; regular expressions that must match the whole name.

    Raises:
        ValueError: If a layer is of a type that cannot be served and is not skipped, a pattern of `skip` matches
            nothing, the model was prepared before, or there is nothing to quantize.
    """
    patterns = list(skip)
    names = [name for name, _ in model.named_modules()]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ValueError(f"skip={pattern!r} matches no module; names look like {', '.join(names[1:4])}")

    # an attention layer stands or falls with its projections
    whole = {n: why for n, m in model.named_modules() if isinstance(m, ATTENTION) and (why := bound(m, ATTENTION))}

    def skipped(name: str) -> str:
        parents = [name[: m.start()] for m in re.finditer(r"\.", name)]
        for part in [name, *parents]:
            if any(re.fullmatch(pattern, part) for pattern in patterns):
                return "named in skip"
            if part in whole:
                return whole[part] if part == name else f"it is part of {part!r}: {whole[part]}"
        return ""

    if any(isinstance(m, QuantLayer) for m in model.modules()):
        raise ValueError("the model is already prepared; prepare its float version")
    refused = [(n, m) for n, m in model.named_modules() if isinstance(m, REFUSED) and not skipped(n)]
    if refused:
        name, layer = refused[0]
        raise ValueError(
            f"layer {name!r} is a {type(layer).__name__}, which has no quantized form here; "
            f"leave it float with skip=[{name!r}]" + (f" ({len(refused)} such layers)" if len(refused) > 1 else "")
        )
    served = [(n, m) for n, m in model.named_modules() if isinstance(m, tuple(QUANTIZED)) or is_conv1d(m)]
    _refuse_shared_weights({n: m for n, m in served if not skipped(n)})
    model = copy.deepcopy(model)
    model = with_served_layers(model, lambda name: not skipped(name))
    made: dict[int, QuantLayer] = {}
    swapped: list[str] = []
    left: dict[str, str] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if next(module.parameters(recurse=False), None) is None and not isinstance(module, tuple(QUANTIZED)):
            continue
        why = skipped(name) or _why_not(module)
        if why:
            left[name] = why
            continue
        if id(module) not in made:
            cls = next(QUANTIZED[base] for base in type(module).__mro__ if base in QUANTIZED)
            made[id(module)] = cls.from_float(module, quantizer)
            swapped.append(name)
        if name == "":
            model = made[id(module)]
        else:
            model.set_submodule(name, made[id(module)])
    if not swapped:
        raise ValueError(
            f"nothing to quantize: the model has no {', '.join(sorted(c.__name__ for c in QUANTIZED))} outside `skip`"
        )
    return Prepared(model, tuple(swapped), left)


def _why_not(module: nn.Module) -> str:
    """Why a module with parameters stays float, or '' when it shall be quantized."""
    if is_conv1d(module):
        return bound(module)
    if not isinstance(module, tuple(QUANTIZED)):
        count = sum(p.numel() for p in module.parameters(recurse=False))
        return f"{type(module).__name__} has no quantized form ({count:,} parameters)"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "an Embedding with max_norm or sparse gradients changes its table outside autograd"
    return bound(module, next(b for b in type(module).__mro__ if b in QUANTIZED))


def _refuse_shared_weights(layers: dict[str, nn.Module]) -> None:
    owner: dict[int, str] = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")  # one that is computed is another each time
        if weight is not None and (first := owner.setdefault(id(weight), name)) != name:
            raise ValueError(
                f"layers {first!r} and {name!r} share one weight, which would be quantized twice; give each its own "
                f"(weight = nn.Parameter(weight.clone())), or leave both float with skip=[{first!r}, {name!r}]"
            )


@contextmanager
def unrounded(layers: Iterable[QuantLayer], poisoned: Iterable[QuantLayer] = ()) -> Iterator[None]:
    """Layers compute with their float weights; of those `poisoned`, who reads one beside calling its layer gets NaN."""
    weights = {layer: layer.weight for layer in layers}
    try:
        for layer, weight in weights.items():
            layer.__dict__["handed"] = lambda _, weight=weight: weight  # in place of a quantized one
        for layer in poisoned:
            nan = layer.weight.detach().new_full((), math.nan).expand(layer.weight.shape)
            layer._parameters["weight"] = nn.Parameter(nan, requires_grad=False)
        yield
    finally:
        for layer, weight in weights.items():
            layer.__dict__.pop("handed", None)
            layer._parameters["weight"] = weight  # pyright: ignore  a parameter


@torch.no_grad()
def read_beside(model: nn.Module, network: nn.Module, inputs: Tensor) -> list[str]:
    """Layers whose weight a model reads without calling them, as one does whose output is tied by `F.linear`.

    What is read so is not rounded while training, and is not there once packed.

    Args:
        model: From `prepare`, inputs not quantized.
        network: The float model, which answers with a tensor.
        inputs: One batch.

    Raises:
        ValueError: If the prepared model fails, or answers otherwise than the float one for another reason.
    """
    layers = quant_layers(model)

    def answers(of: nn.Module) -> Tensor:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # it answers 0 where the input is padding
        try:
            with evaluating(of), torch.random.fork_rng():
                torch.manual_seed(0)
                return of(fed(of, inputs))
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"prepared, the model does not run ({type(error).__name__}: {error}): it wants more of a layer than "
                "its forward and its weight; leave that layer float, by skip"
            ) from None
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)

    def off(poisoned: Iterable[QuantLayer]) -> bool:
        with unrounded(layers.values(), poisoned):
            return not alike(answers(model), wanted)

    wanted = answers(network)
    if not off(layers.values()) or not alike(answers(network), wanted):  # the latter never answers the same
        return []
    if off([]):
        raise ValueError(
            "prepared, with weights not rounded yet, the model answers otherwise than before: a layer does more than "
            "its type says; leave that layer float, by skip"
        )
    return [name for name, layer in layers.items() if off([layer])]


def alike(answers: Tensor, wanted: Tensor) -> bool:
    """Whether two answers differ by no more than sums in another order make; numbers of classes not at all."""
    if not wanted.is_floating_point():
        return torch.equal(answers, wanted)
    off = (answers - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return bool(off <= torch.finfo(wanted.dtype).eps ** 0.5)
