"""Which channels of a model stand or fall together, proved from its graph (cutting.py cuts them out).

A channel is *dead* when every row that produces it has 0 bits. It may be cut out where the graph proves that it then
is exactly zero all the way to the layers that read it: through batch norm, activations that keep zero, pooling,
flatten, sums and concatenation. (A BatchNorm1d behind a Linear is taken to see (B, C), as it does everywhere but in a
model whose sequence length equals its width.) Everything else (attention, reshapes, the model's outputs, code that
cannot be traced) *pins* the channel: it keeps its place, at no bytes for its own weights.

The proof is by value, so that nothing hidden is needed at run time: a dead channel's biases, batch-norm shift and
running mean must be zero. `Coupling.silence` sets them so while training; `remove_channels` checks before it cuts.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .layers import QuantConv1d, QuantConv2d, QuantLayer, QuantLinear, QuantMultiheadAttention, quant_layers

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Modules and functions with f(0) = 0 a channel at a time, so that a zero channel stays a zero channel.
_KEEP_ZERO_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.Softsign),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
)
_KEEP_ZERO_CALLS: set[Any] = {
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.tanh, F.hardswish, F.dropout, torch.relu, torch.tanh),
    *(F.max_pool1d, F.max_pool2d, F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
    *("relu", "relu_", "tanh", "contiguous", "clone"),
}
_COMBINE: set[Any] = {operator.add, operator.iadd, operator.mul, torch.add, torch.mul, "add", "add_", "mul"}


@dataclass(frozen=True)
class Space:
    """The channels along one axis of a traced tensor: ids in order, each covering equally many features in a row."""

    ids: tuple[int, ...]
    last: bool  # the axis is the last one; else it is axis 1, followed by spatial axes
    spread: bool = False  # flattened: each id covers several neighbouring features


@dataclass
class Coupling:
    """The result of `couple`; ids are channels of the graph, and joined ids are one channel.

    Attributes:
        why: Why nothing could be proved, or an empty text.
        produced: Layer name -> (C,) id of each of its rows.
        read: Layer name -> (I,) id of each of its input channels, where that is known.
        norms: Batch-norm name -> (C,) id of each of its channels.
        pinned: (ids,) bool: the channel must keep its place.
        returned: (ids,) bool: what the model returns is made of it alone, such as the score of one class.
    """

    why: str = ""
    produced: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    pinned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    returned: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def alive(self, widths: dict[str, Tensor]) -> Tensor:
        """(ids,) 1 where some row that produces the channel has a bit, 0 where none has; 1 where nothing is known.

        `widths`: layer name -> (C,) bits.
        """
        count = len(self.pinned)
        some = next(iter(widths.values()), None)
        result = torch.zeros(count) if some is None else some.new_zeros(count)
        made = torch.zeros(count, dtype=torch.bool, device=result.device)
        for name, ids in self.produced.items():
            ids = ids.to(result.device)
            result = result.scatter_reduce(0, ids, widths[name].clamp(0, 1), "amax")
            made[ids] = True
        return torch.where(made, result, 1.0)

    def answers(self) -> dict[str, Tensor]:
        """Layer name -> (C,) bool: rows without which something that the model returns would be lost for good."""
        if not self.produced:
            return {}
        makers = torch.bincount(torch.cat(list(self.produced.values())), minlength=len(self.pinned))
        alone = self.returned & (makers == 1)
        return {name: alone[ids] for name, ids in self.produced.items() if alone[ids].any()}

    def dead(self, model: nn.Module) -> Tensor:
        """(ids,) bool: no row that produces the channel has a bit, and it is not pinned."""
        widths = {n: layer.weight_quantizer.bits().float() for n, layer in quant_layers(model).items()}
        alive = self.alive(widths)
        return (alive == 0) & ~self.pinned.to(alive.device)

    @torch.no_grad()
    def silence(self, model: nn.Module, dead: Tensor | None = None) -> None:
        """Set what a dead channel would still add to zero: biases of its rows, batch-norm shift and running mean."""
        dead = self.dead(model) if dead is None else dead
        if not dead.any():
            return
        for name, ids in self.produced.items():
            bias = module_of(model, name).bias
            if isinstance(bias, Tensor):
                bias.masked_fill_(dead[ids.to(dead.device)].to(bias.device), 0.0)
        for name, ids in self.norms.items():
            norm = module_of(model, name)
            for value in (norm.bias, norm.running_mean):
                if isinstance(value, Tensor):
                    value.masked_fill_(dead[ids.to(dead.device)].to(value.device), 0.0)

    def silent(self, model: nn.Module) -> Tensor:
        """(ids,) bool: dead, and proved by value to be exactly zero wherever it is read."""
        ok = self.dead(model)
        for name, ids in self.produced.items():
            bias = module_of(model, name).bias
            if isinstance(bias, Tensor):
                ok[ids[bias.ne(0).to(ids.device)]] = False
        for name, ids in self.norms.items():
            norm = module_of(model, name)
            if norm.running_mean is None:
                ok[ids] = False
                continue
            shifted = norm.running_mean.ne(0)
            if norm.bias is not None:
                shifted = shifted | norm.bias.ne(0)
            ok[ids[shifted.to(ids.device)]] = False
        return ok


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (QuantLayer, QuantMultiheadAttention)) or super().is_leaf_module(m, module_qualified_name)


class _Walk:
    """One pass over the graph, joining ids."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.parent: list[int] = []
        self.pinned: set[int] = set()
        self.produced: dict[str, tuple[int, ...]] = {}
        self.read: dict[str, tuple[int, ...]] = {}
        self.norms: dict[str, tuple[int, ...]] = {}
        self.shared: set[str] = set()
        self.called: set[str] = set()
        self.space: dict[fx.Node, Space | None] = {}
        self.returned: set[int] = set()
        seen: dict[int, str] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                name = seen.setdefault(id(self.modules[str(node.target)]), str(node.target))
                self.called.add(name)
                if name in self.produced or name in self.norms:
                    self.shared.add(name)
            self.space[node] = self.visit(node)
        read = {id(p) for node in graph.nodes if node.op == "get_attr" for p in [_attribute(model, str(node.target))]}
        for table in (self.produced, self.read, self.norms):
            for name, ids in table.items():  # a weight that is also read beside its layer keeps its shape
                if any(id(value) in read for value in self.modules[name]._parameters.values()):
                    self.pinned.update(ids)

    def new(self, count: int) -> tuple[int, ...]:
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return tuple(range(start, start + count))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = i = self.parent[self.parent[i]]
        return i

    def join(self, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        for i, j in zip(a, b, strict=True):
            self.parent[self.find(i)] = self.find(j)

    def pin(self, *spaces: Space | None) -> None:
        for s in spaces:
            self.pinned.update(s.ids if s else ())

    def inputs(self, node: fx.Node) -> list[Space | None]:
        return [self.space[n] for n in node.all_input_nodes]

    def visit(self, node: fx.Node) -> Space | None:
        inputs = self.inputs(node)
        first = inputs[0] if inputs else None
        if node.op == "call_module":
            return self.visit_module(node, self.modules[str(node.target)], first, inputs)
        if node.op in ("call_function", "call_method"):
            return self.visit_call(node, first, inputs)
        if node.op == "output":
            self.pin(*inputs)
            self.follow_back(node)
        return None

    def follow_back(self, node: fx.Node) -> None:
        """Find the channels that a node is made of, back through calls that nothing is known of (log_softmax)."""
        for before in node.all_input_nodes:
            space = self.space[before]
            if space is not None:
                self.returned.update(space.ids)
            elif len(before.all_input_nodes) == 1:
                self.follow_back(before)

    def visit_module(self, node: fx.Node, m: nn.Module, first: Space | None, inputs: list) -> Space | None:
        if isinstance(m, (QuantLinear, QuantConv1d, QuantConv2d)):
            return self.visit_layer(str(node.target), m, first)
        if isinstance(m, NORMS) and first and not first.last | first.spread and len(first.ids) == m.num_features:
            self.pinned.update(self.norms.get(str(node.target), ()))  # where it was called before
            self.norms[str(node.target)] = first.ids
            return first
        if isinstance(m, nn.BatchNorm1d) and first and not first.spread and len(first.ids) == m.num_features:
            self.pinned.update(self.norms.get(str(node.target), ()))
            self.norms[str(node.target)] = first.ids  # (B, C): the last axis is axis 1, which 2-D inputs alone have
            return first
        if isinstance(m, _KEEP_ZERO_MODULES):
            return self.keep(first, pools="Pool" in type(m).__name__)
        if isinstance(m, nn.Flatten) and m.start_dim == 1 and m.end_dim == -1:
            return self.flatten(first)
        self.pin(*inputs)
        return None

    def visit_layer(self, name: str, layer: Any, first: Space | None) -> Space | None:
        linear = isinstance(layer, QuantLinear)
        inputs = layer.in_features if linear else layer.in_channels
        out = self.new(layer.weight.shape[0])
        if name in self.produced:  # called before: its channels answer to two places
            self.pin(first)
            self.pinned.update(self.produced[name], self.read.get(name, ()))
        self.produced[name] = out
        fits = first is not None and (
            (first.last and inputs % max(len(first.ids), 1) == 0 and (first.spread or inputs == len(first.ids)))
            if linear
            else (not first.last and inputs == len(first.ids))
        )
        if fits and first and (linear or layer.groups == 1):
            self.read[name] = first.ids
        elif fits and first and layer.groups == inputs == len(out):  # depthwise: each channel is its own
            self.join(first.ids, out)
        else:
            self.pin(first)
            if not linear and layer.groups > 1:
                self.pinned.update(out)
        return Space(out, last=linear)

    def visit_call(self, node: fx.Node, first: Space | None, inputs: list) -> Space | None:
        target = node.target
        if target in _KEEP_ZERO_CALLS:
            return self.keep(first, pools="pool" in str(getattr(target, "__name__", target)))
        if target in (torch.flatten, "flatten") and _arguments(node, start_dim=0, end_dim=-1) == (1, -1):
            return self.flatten(first)
        if target in (torch.mean, "mean") and first and not first.last:
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
            if dims in ((2, 3), [2, 3], (-2, -1), [-2, -1]) and not keep:
                return Space(first.ids, last=True)
        if target in _COMBINE and len(inputs) == 2 and len(node.args) == 2 and inputs[0] and inputs[1]:
            a, b = inputs
            if len(a.ids) == len(b.ids) and (a.last, a.spread) == (b.last, b.spread):
                self.join(a.ids, b.ids)
                return a
        if target is torch.cat and _arguments(node, dim=0) == (1,):
            parts = [s for s in inputs if s and not s.last]
            if len(parts) == len(inputs) == len(list(node.args[0])):  # type: ignore[arg-type]
                return Space(tuple(i for s in parts for i in s.ids), last=False)
        self.pin(*inputs)
        return None

    def keep(self, first: Space | None, pools: bool) -> Space | None:
        if pools and first and first.last:  # pooling along the channels themselves
            self.pin(first)
            return None
        return first

    def flatten(self, first: Space | None) -> Space | None:
        if first and not first.last:
            return Space(first.ids, last=True, spread=True)
        self.pin(first)
        return None


def _attribute(model: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def _arguments(node: fx.Node, **defaults: Any) -> tuple[Any, ...]:
    rest = node.args[1:]
    return tuple(rest[i] if i < len(rest) else node.kwargs.get(k, d) for i, (k, d) in enumerate(defaults.items()))


def couple(model: nn.Module) -> Coupling:
    """Trace a prepared model and find which channels stand or fall together; never fails: see `Coupling.why`."""
    try:
        # optional arguments take their defaults, as when they are not given: `if mask is None` then goes the usual way
        parameters = inspect.signature(model.forward).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        walk = _Walk(model, _Tracer().trace(model, concrete_args=defaults or None))
    except Exception as error:  # anything may come out of a user's forward
        return Coupling(why=f"the model cannot be traced ({type(error).__name__}: {str(error).splitlines()[0][:200]})")
    inside = [n for n, m in model.named_modules() if isinstance(m, QuantMultiheadAttention)]
    unseen = {n for n in quant_layers(model) if not n.startswith(tuple(f"{i}." for i in inside))} - walk.called
    if unseen:
        return Coupling(why=f"layer {min(unseen)!r} is not reached when the model is traced with its default arguments")
    roots = [walk.find(i) for i in range(len(walk.parent))]
    pinned, returned = (torch.zeros(len(roots), dtype=torch.bool) for _ in range(2))
    for mask, found in ((pinned, walk.pinned), (returned, walk.returned)):
        mask[[roots[i] for i in found]] = True
    for table in (walk.produced, walk.read, walk.norms):
        for name in walk.shared & set(table):  # called twice: its channels answer to two places
            pinned[[roots[i] for i in table[name]]] = True

    def tensors(table: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.tensor([roots[i] for i in ids], dtype=torch.long) for name, ids in table.items()}

    return Coupling("", tensors(walk.produced), tensors(walk.read), tensors(walk.norms), pinned, returned)


def module_of(model: nn.Module, name: str) -> Any:
    """A submodule; Any, since its attributes depend on its type, which the caller knows."""
    return model.get_submodule(name)
