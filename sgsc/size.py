"""How large a prepared model is: nominal, by formula and differentiable. The stored size is artefact.stored_size.

    nominal = sum over layers, rows c of  bits_c * live weights a row           (arXiv 2301.13142, equations 3 to 5)

A removed output of one layer removes inputs of the layers that read it (equation 5) where `coupling` proves who does.
"""

from __future__ import annotations

from torch import Tensor, nn

from .coupling import Coupling
from .layers import quant_layers


def nominal_bits(model: nn.Module, coupling: Coupling | None = None) -> Tensor:
    """Bits that the quantized weights need; a differentiable scalar.

    With a `coupling` only live inputs are charged (equation 5), else all of them (equations 3 and 4).
    """
    layers = quant_layers(model)
    costs = {name: layer.weight_quantizer.bit_cost() for name, layer in layers.items()}
    alive = coupling.alive(costs) if coupling is not None and not coupling.why else None
    total = next(iter(costs.values())).new_zeros(())
    for name, layer in layers.items():
        width = layer.weight[0].numel() if layer.weight.shape[0] else 0
        if alive is not None and coupling is not None and name in coupling.read:
            ids = coupling.read[name].to(alive.device)
            width = alive[ids].sum() * (width // len(ids))
        total = total + costs[name].sum() * width
    return total


def weight_count(model: nn.Module) -> int:
    """Quantized weights of the model as it stands."""
    return sum(layer.weight.numel() for layer in quant_layers(model).values())


def float_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers in float32: what every stored size is compared with.

    Quantizer parameters do not count, nor do counters and masks that are not floating point.
    """
    own = {id(p) for layer in quant_layers(model).values() for p in layer.weight_quantizer.parameters()}
    values = {k: v for k, v in model.state_dict(keep_vars=True).items() if v.is_floating_point() and id(v) not in own}
    return sum(4 * v.numel() for v in {id(v): v for v in values.values()}.values())
