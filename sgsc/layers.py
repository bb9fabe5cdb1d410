"""Drop-in layers: subclasses of torch's own that quantize their weight, and the table that makes a type known.

A quantized layer keeps the keys `weight` and `bias`, so a float checkpoint loads into it; its quantizer's parameters
live under `weight_quantizer`. Rows of the (C, K) view are output channels (entries, for an embedding).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quantizers import Quantizer, make_quantizer


class QuantLayer(nn.Module):
    """The part that all quantized layers share; mixed in before the torch layer."""

    weight: Tensor
    bias: Tensor | None
    weight_quantizer: Quantizer
    input_quantizer: nn.Module | None
    probe: Tensor | None = None  # while `probing`: the last quantized weight
    probing: bool = False
    handed: Callable[[QuantLayer], Tensor | None] | None = None  # by `quantize_together`: finds a weight made before
    turned: bool = False  # float checkpoints have the weight as (K, C)

    def attach(self, quantizer: str) -> None:
        """Add the quantizer of that name, fitted to the weight."""
        self.weight_quantizer = make_quantizer(quantizer, self.weight.shape[0]).to(self.weight.device)
        self.input_quantizer = None
        self.weight_quantizer.fit(self.rows())

    def rows(self) -> Tensor:
        """The float weight as (C, K)."""
        return self.weight.flatten(1)

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, in its own shape."""
        weight = None if self.handed is None else self.handed(self)
        if weight is None:
            weight = self.weight_quantizer(self.rows()).view(self.weight.shape)
        if self.probing and weight.requires_grad:
            self.probe = weight
        return weight

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input on its grid, where an input quantizer is set."""
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def extra_repr(self) -> str:
        """The layer's own line and its mean width."""
        mean = self.weight_quantizer.bits().float().mean().item() if self.weight.shape[0] else 0.0
        return f"{super().extra_repr()}, mean_bits={mean:.2f}"

    @classmethod
    def from_float(cls, layer: nn.Module, quantizer: str = "integer"):
        """The same layer, sharing its parameters, with a quantizer; the float layer itself is left as it was."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        for name, value in layer.__dict__.items():
            if not name.startswith("_") or name in ("_reversed_padding_repeated_twice",):
                made.__dict__[name] = value
        made._parameters.update(layer._parameters)
        made._buffers.update(layer._buffers)
        made.attach(quantizer)
        return made

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *rest) -> None:
        # A float checkpoint holds no quantizer: fit one to the weight that comes, and do not call that a missing key.
        key = f"{prefix}weight_quantizer."
        is_float = f"{prefix}weight" in state_dict and not any(k.startswith(key) for k in state_dict)
        if is_float and self.turned:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if is_float:
            self.weight_quantizer.fit(self.rows())
            state_dict.update({key + k: v for k, v in self.weight_quantizer.state_dict().items()})


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` on quantized weights; constructed like it, plus the name of a quantizer."""

    def __init__(self, *args, quantizer: str = "integer", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.attach(quantizer)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., C)."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """`nn.Conv1d` on quantized weights; constructed like it, plus the name of a quantizer."""

    def __init__(self, *args, quantizer: str = "integer", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.attach(quantizer)

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, L) -> (B, C, L')."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` on quantized weights; constructed like it, plus the name of a quantizer."""

    def __init__(self, *args, quantizer: str = "integer", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.attach(quantizer)

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, C, H', W')."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantEmbedding(QuantLayer, nn.Embedding):
    """`nn.Embedding` on a quantized table: every entry is a channel with its own width."""

    bias = None

    def __init__(self, *args, quantizer: str = "integer", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.max_norm is not None or self.sparse:
            raise ValueError("QuantEmbedding serves neither max_norm nor sparse gradients; use nn.Embedding for these")
        self.attach(quantizer)

    def forward(self, input: Tensor) -> Tensor:
        """(...) int -> (..., K)."""
        return F.embedding(input, self.quantized_weight(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class QuantMultiheadAttention(nn.Module):
    """`nn.MultiheadAttention` with its four projections as `QuantLinear`, since the original hides them from any swap.

    The checkpoint of the original loads: its `in_proj_weight` is cut into `q_proj`, `k_proj`, `v_proj`.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    in_proj_bias = None  # tells nn.TransformerEncoderLayer not to take its fast path around us
    _qkv_same_embed_dim = True

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        if source.bias_k is not None or source.add_zero_attn:
            raise ValueError(
                "nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot be quantized; "
                "construct it without, or name the layer in `skip`"
            )
        self.embed_dim, self.num_heads, self.dropout = source.embed_dim, source.num_heads, source.dropout
        self.head_dim, self.batch_first = source.head_dim, source.batch_first
        weights = (
            source.in_proj_weight.chunk(3)
            if source._qkv_same_embed_dim
            else (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        )
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.detach().chunk(3)
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            projection = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            projection.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            if bias is not None:
                projection.bias = nn.Parameter(bias.clone(), requires_grad=source.in_proj_bias.requires_grad)
            setattr(self, f"{name}_proj", projection)
        out = nn.Linear(source.embed_dim, source.embed_dim, bias=source.out_proj.bias is not None, device="meta")
        out.weight, out.bias = source.out_proj.weight, source.out_proj.bias
        self.out_proj = out
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: (output, attention weights or None).

        Raises:
            ValueError: If `is_causal` is set without a mask, as the original has it.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask, as in nn.MultiheadAttention; pass the causal mask")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        (b, t, _), s = query.shape, key.shape[1]

        def heads(x: Tensor) -> Tensor:  # (B, T, E) -> (B, heads, T, E / heads)
            return x.view(b, -1, self.num_heads, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(query)), heads(self.k_proj(key)), heads(self.v_proj(value))
        mask = _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(b, self.num_heads, t, s)
        padding = _additive(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.view(b, 1, 1, s)
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(b, t, -1))
        if not self.batch_first:
            out = out.transpose(0, 1)
        if not batched:
            out = out.squeeze(0 if self.batch_first else 1)
            weights = weights if weights is None else weights.squeeze(0)
        return out, weights

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        for kind in ("weight", "bias"):
            joined = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            if joined is not None:
                for name, part in zip("qkv", joined.chunk(3), strict=True):
                    state_dict[f"{prefix}{name}_proj.{kind}"] = part
        for name in "qkv":
            separate = state_dict.pop(f"{prefix}{name}_proj_weight", None)
            if separate is not None:
                state_dict[f"{prefix}{name}_proj.weight"] = separate
        super()._load_from_state_dict(state_dict, prefix, *rest)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a Linear whose weight is (K, C). Known by name, for it may not be there."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def bound(module: nn.Module, base: type[nn.Module] | None = None) -> str:
    """Why a layer could not be swapped without losing something, or ''; `base` is the type that is served."""
    base = base or type(module)
    for name in ("forward", "__call__", "_conv_forward"):
        if getattr(type(module), name, None) is not getattr(base, name, None):
            return f"{type(module).__name__} overrides {base.__name__}.{name}"
        if name in module.__dict__:
            return f"its {name} was replaced, which a swapped layer would not have"
    parts = [module, module.out_proj] if isinstance(module, nn.MultiheadAttention) else [module]
    if any("parametrizations" in part._modules for part in parts) or (
        base is not nn.MultiheadAttention and not isinstance(module._parameters.get("weight"), nn.Parameter)
    ):
        return "its weight is computed (parametrization, weight_norm, spectral_norm, prune); remove that first"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it carries forward hooks, which a swapped layer would lose; remove them first"
    return ""


def _linear_of(conv1d: nn.Module) -> nn.Linear:
    """The same layer as torch has it, the weight a copy; what it becomes takes transformers' float checkpoints."""
    source, bias = conv1d.weight, conv1d.bias
    made = nn.Linear(*source.shape, device="meta")  # pyright: ignore  a tensor, as is_conv1d has it
    made.weight = nn.Parameter(source.detach().t().contiguous(), requires_grad=source.requires_grad)  # pyright: ignore
    made.bias, made.turned = bias, True  # pyright: ignore
    return made.train(conv1d.training)


def with_served_layers(model: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    """Put layers that are served in place of wanted ones that hold the same weights in another form.

    `QuantMultiheadAttention` for `nn.MultiheadAttention`, `nn.Linear` for transformers' Conv1D that is not `bound`;
    shared ones stay shared. Encoder layers of torch that hold wanted ones lose their fast path, which reads weights and
    calls no layer.

    Raises:
        ValueError: If one cannot be replaced; the message names it.
    """
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            parts = [f"{name}.{part}".strip(".") for part, _ in module.named_modules()]
            if any(map(wanted, parts)):
                module.__dict__.update(activation_relu_or_gelu=False, use_nested_tensor=False)
        attention = isinstance(module, nn.MultiheadAttention)
        served = attention or (is_conv1d(module) and not bound(module))
        if not served or not (wanted(name) or id(module) in made):
            continue
        try:
            if id(module) not in made:
                made[id(module)] = QuantMultiheadAttention(module) if attention else _linear_of(module)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        if name == "":
            return made[id(module)]
        model.set_submodule(name, made[id(module)])
    return model


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


# Float type -> quantized type. A new layer type is a row here and one in packed.PACKED.
QUANTIZED: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Embedding: QuantEmbedding,
}
# Types with weights that are not served; `prepare` refuses them by name, since skipping in silence misleads.
REFUSED: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Conv3d,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.EmbeddingBag,
)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model by name, each once, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def some_quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """`quant_layers` of a model that must have some.

    Raises:
        ValueError: If it has none.
    """
    layers = quant_layers(model)
    if not layers:
        raise ValueError("the model has no quantized layer; pass what prepare(model).model returned")
    return layers
