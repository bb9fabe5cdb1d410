"""Weight-only products on a GPU that a user would take instead, each made of a bfloat16 weight (N, K).

What is made can be called on x (M, K) and deep-copied, weights included. None of it was written for rows of different
widths: a row has the bits of its peer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 128  # weights that share a scale, where the peer asks
CUBLAS = "F.linear bfloat16"
# Relative error (norms) that the rounding of weights may bring: beyond it something else is computed.
ROUNDING = {16: 0.01, 8: 0.03, 4: 0.25}

Product = Callable[[Tensor], Tensor]


def cublas(weight: Tensor) -> Product:
    """torch's own product of the float weight."""
    return partial(F.linear, weight=weight)


def levels(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) uint8 levels, and (N, K / group) float32 scale and lowest value: level * scale + lowest."""
    some = weight.float().unflatten(1, (-1, group))
    low, high = some.aminmax(dim=2)
    scale = (high - low).clamp_min(1e-8) / (2**bits - 1)
    found = ((some - low[..., None]) / scale[..., None]).round_().to(torch.uint8)
    return found.flatten(1), scale, low


def torch_int4(weight: Tensor) -> Product:
    """The int4 product in torch itself ("tinygemm"), which torchao's int4 calls too."""
    found, scale, low = levels(weight, 4, GROUP)
    packed = torch.ops.aten._convert_weight_to_int4pack(found[:, ::2] << 4 | found[:, 1::2], 8)
    grid = torch.stack([scale, low + 8 * scale], 2).transpose(0, 1).to(torch.bfloat16).contiguous()
    return partial(_int4, packed=packed, grid=grid)


def _int4(x: Tensor, packed: Tensor, grid: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, grid)


def torch_int8(weight: Tensor) -> Product:
    """The int8 product in torch itself."""
    scale = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scale[:, None]).round().to(torch.int8)
    return partial(_int8, codes=codes, scale=scale.to(torch.bfloat16))


def _int8(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return torch.ops.aten._weight_int8pack_mm(x, codes, scale)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def torchao(weight: Tensor, bits: int) -> Product:
    """torchao's int4 (groups) or int8 (rows)."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    layer = _linear(weight.clone())
    quantize_(layer, Int4WeightOnlyConfig(group_size=GROUP) if bits == 4 else Int8WeightOnlyConfig())
    return layer


def bitsandbytes(weight: Tensor) -> Product:
    """NF4."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device)


def hqq(weight: Tensor) -> Product:
    """Four bits by HQQ with its own product."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return HQQLinear(_linear(weight.clone()), config, compute_dtype=torch.bfloat16, device=str(weight.device))


def gemlite(weight: Tensor, bits: int) -> Product:
    """GemLite's Triton kernels, as its front page shows them."""
    from gemlite.core import DType, GemLiteLinear

    n, k = weight.shape
    group = GROUP if bits == 4 else k
    found, scale, low = levels(weight, bits, group)
    layer: Any = GemLiteLinear(
        bits, group_size=group, in_features=k, out_features=n, input_dtype=DType.BF16, output_dtype=DType.BF16
    )
    layer.pack(found, scale.view(-1, 1).to(torch.bfloat16), (-low / scale).view(-1, 1).to(torch.bfloat16), None)
    return layer


def humming(weight: Tensor, bits: int) -> Product:
    """humming's kernels, as its front page shows them."""
    from humming.layer import HummingLayer

    config = {"dtype": f"int{bits}", "group_size": GROUP if bits == 4 else 0}
    layer = HummingLayer(
        shape_n=weight.shape[0], shape_k=weight.shape[1], weight_config=config, torch_dtype=torch.bfloat16
    )
    layer = layer.to(weight.device)
    layer.load_from_unquantized(weight)
    layer.transform()
    return layer


def marlin(weight: Tensor) -> Product:
    """Not there: named, so that nobody takes it for beaten.

    Raises:
        ModuleNotFoundError: Always.
    """
    raise ModuleNotFoundError(
        "no wheel carries Marlin but vLLM's and GPTQModel's, which bring or build a torch of theirs"
    )


# (bits, how to make it), by name
PEERS: dict[str, tuple[int, Callable[[Tensor], Product]]] = {
    CUBLAS: (16, cublas),
    "torch int4": (4, torch_int4),
    "torch int8": (8, torch_int8),
    "torchao int4": (4, partial(torchao, bits=4)),
    "torchao int8": (8, partial(torchao, bits=8)),
    "gemlite 4 bits": (4, partial(gemlite, bits=4)),
    "gemlite 8 bits": (8, partial(gemlite, bits=8)),
    "bitsandbytes NF4": (4, bitsandbytes),
    "hqq 4 bits": (4, hqq),
    "humming 4 bits": (4, partial(humming, bits=4)),
    "humming 8 bits": (8, partial(humming, bits=8)),
    "Marlin 4 bits": (4, marlin),
}
