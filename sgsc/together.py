"""All layers of a model quantize in one call, before its forward: `quantize_together`.

A training step of a small network is bound by how many operations it starts. Each layer that quantizes by itself runs
some ten on vectors of one value a channel, and twice that with its backward; here they run once, on the channels of all
layers, and so do the quantizer's two kernels. Values and gradients are the same to the bit, but for one case: the
gradients of a layer that a forward calls several times are added up before the quantizer's backward, not behind it.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from .layers import QuantLayer
from .quantizers import Quantizer


def quantize_together(model: nn.Module) -> Together:
    """Quantize the weights of all layers of `model` in one call each time it runs, training or not.

    What it costs, and why it is not the default:

    - The gradients of all weights are ready at the end of backward only. DistributedDataParallel then has nothing to
      overlap its communication with. FullyShardedDataParallel would have to gather all layers at once: sharded weights
      are left to their layers.
    - The quantized weights of all layers lie in memory during the forward, also where no gradient is wanted, and also
      of layers that this forward does not call.
    - A layer inside an activation checkpoint quantizes by itself as well: what is computed again must be what was
      saved. So does one that is called outside the model's forward, under `enable_grad` within `no_grad`, from another
      thread, or after its parameters changed, and one with hooks on its quantizer or with a weight that is no plain
      tensor. For these the call is a loss.
    - Weights that the forward itself changes in place raise autograd's error in backward.

    Under `torch.compile` each layer is compiled with its own quantizer, without a break of the graph.

    Args:
        model: A model with quantized layers, from `prepare`; layers may be added or swapped later. It may be a part of
            a larger one.

    Returns:
        A handle; `handle.remove()` undoes this. Copies of the model, and pickled ones, quantize together too; their
        handle, as that of any model that does so already, is what a further call returns.

    Raises:
        ValueError: If the model has no quantized layer.
    """
    if not _quant_layers(model):
        raise ValueError("quantize_together: the model has no quantized layer; pass what prepare(model).model returned")
    for hook in model._forward_pre_hooks.values():
        handle = getattr(hook, "__self__", None)
        if isinstance(handle, Together):
            return handle
    return Together(model)


class Together:
    """What `quantize_together` returns."""

    def __init__(self, model: nn.Module) -> None:
        self.hooks = (
            model.register_forward_pre_hook(self._hand_out),
            model.register_forward_hook(self._take_back, always_call=True),
        )

    def remove(self) -> None:
        """Let each layer quantize by itself again."""
        for hook in self.hooks:
            hook.remove()

    def _hand_out(self, model: nn.Module, arguments: Any) -> None:
        if torch.compiler.is_compiling():
            return
        # the model is the hook's, which may be a replica; what is handed out lies with it, not with this handle
        handed = model.__dict__["_together"] = Handed()
        for quantizer, layers in _by_quantizer(model).items():
            inputs = [_inputs(layer) for layer in layers]
            made = quantizer.forward_many([layer.weight_quantizer for layer in layers], [own[0] for own in inputs])
            for layer, own, weight in zip(layers, inputs, made, strict=True):
                handed.weights[layer] = weight, own, [_version(t) for t in own]
                layer.__dict__["handed"] = handed  # nn.Module's own way takes ten times as long

    def _take_back(self, model: nn.Module, arguments: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            model.__dict__.pop("_together", Handed()).weights.clear()


class Handed:
    """The quantized weights of one forward, and how it was called.

    All layers share it, so that one `clear` takes them back; a forward within a forward leaves the rest of the outer
    one to the layers themselves. It copies and pickles as empty.
    """

    def __init__(self) -> None:
        self.weights: dict[QuantLayer, tuple[Tensor, list[Tensor], list[int]]] = {}
        self.thread = threading.get_ident()
        self.grad = torch.is_grad_enabled()
        self.saving = _saved_tensor_hooks()

    def __reduce__(self) -> tuple:
        return Handed, ()

    def __call__(self, layer: QuantLayer) -> Tensor | None:
        """The layer's weight, or None where the layer must quantize by itself."""
        if torch.compiler.is_compiling():
            return None
        found = self.weights.get(layer)
        if found is None:
            return None
        weight, inputs, versions = found
        now = _inputs(layer)
        fits = (
            self.thread == threading.get_ident()
            and len(now) == len(inputs)
            and all(a is b and _version(a) == v for a, b, v in zip(now, inputs, versions, strict=True))
            and (not torch.is_grad_enabled() or (self.grad and self.saving == _saved_tensor_hooks()))
        )
        return weight if fits else None


def _inputs(layer: QuantLayer) -> list[Tensor]:
    """What the quantized weight is made from: the weight, and its quantizer's parameters."""
    return [layer.weight, *(p for p in layer.weight_quantizer._parameters.values() if p is not None)]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _saved_tensor_hooks() -> Any:
    """Who asks for tensors that are saved for backward now: activation checkpoints do."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]


def _by_quantizer(model: nn.Module) -> dict[type[Quantizer], list[QuantLayer]]:
    found: dict[type[Quantizer], list[QuantLayer]] = {}
    for layer in _quant_layers(model):
        if _takes(layer):
            found.setdefault(type(layer.weight_quantizer), []).append(layer)
    return found


def _takes(layer: QuantLayer) -> bool:
    """Whether the layer's weight is `quantizer(weight as rows)`, with nothing that would be passed over."""
    quantizer, kind = layer.weight_quantizer, type(layer)
    return (
        isinstance(quantizer, Quantizer)
        and not (quantizer._forward_hooks or quantizer._forward_pre_hooks)
        and not (quantizer._backward_hooks or quantizer._backward_pre_hooks)
        and type(layer.weight) in (nn.Parameter, Tensor)
        and kind.rows is QuantLayer.rows
        and kind.quantized_weight is QuantLayer.quantized_weight
    )


def _quant_layers(model: nn.Module) -> list[QuantLayer]:
    """As layers.quant_layers, without names and in any order, in a quarter of the time: this runs in every forward."""
    found: dict[nn.Module, None] = {}
    left: list[nn.Module | None] = [model]
    while left:
        module = left.pop()
        if module is not None and module not in found:
            found[module] = None
            left.extend(module._modules.values())
    return [m for m in found if isinstance(m, QuantLayer)]
