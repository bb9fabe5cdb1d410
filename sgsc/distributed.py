"""Training on several ranks: what they share, so that all of them make the same decisions without asking each other.

Weights are the user's: DistributedDataParallel averages their gradients. The quantizers' parameters are left out of it
(`leave_out`), since `BitOptimizer` takes their gradients away as backward makes them; it averages them itself, one
vector a step. Every rank then moves widths, prices and ranges alike, by the same arithmetic on the same numbers: what
DistributedDataParallel itself relies on for the weights.

What could differ is shared: the losses, so that all ranks stop where one is not finite; buffers, since batch norm
counts on each rank's own batches (rank 0's win, as in DistributedDataParallel); what the guard saw and gave back, since
kernels may add up in an order of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .layers import quant_layers
from .samples import device_of

T = TypeVar("T")


def quantizer_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The learned parameters of all quantizers in a model, which `SelfCompression` moves and nobody else may."""
    return {p for layer in quant_layers(model).values() for p in layer.weight_quantizer.parameters()}


def leave_out(module: nn.Module) -> None:
    """Keep the quantizers out of a later `DistributedDataParallel(module)`.

    `SelfCompression` does so for its model. Call it for a larger module that holds the model, before wrapping that.
    """
    ours = {
        id(value)
        for layer in quant_layers(module).values()
        for value in (*layer.weight_quantizer.parameters(), *layer.weight_quantizer.buffers())
    }
    named = [*module.named_parameters(), *module.named_buffers()]
    names = {name for name, value in named if id(value) in ours}
    names |= set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(names))


class Ranks:
    """The ranks that train one model together; a single one where torch.distributed is not initialised.

    Args:
        group: Their process group; the default one if None.
    """

    def __init__(self, group: Any = None) -> None:
        self.ready = dist.is_available() and dist.is_initialized()
        self.group = group
        self.count = dist.get_world_size(group) if self.ready else 1
        self.rank = dist.get_rank(group) if self.ready else 0

    def start(self, model: nn.Module, settings: str) -> None:
        """Give all ranks the first one's model, as DistributedDataParallel does, and make it ready to be wrapped.

        Raises:
            ValueError: If the model is wrapped already, or the ranks differ in what `settings` says.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("got DistributedDataParallel; pass the model itself, and wrap it after SelfCompression")
        leave_out(model)
        if not self.agree(settings, device_of(model)):
            raise ValueError(
                "ranks differ in settings or preservation set; use the same seed and data on all, or, for runs that "
                "are independent of each other, a process_group of one rank each"
            )
        self.follow(model.state_dict().values())

    def check(self) -> None:
        """Refuse ranks that came up later, which no gradient would be shared with.

        Raises:
            ValueError: If torch.distributed was initialised since.
        """
        if not self.ready and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"torch.distributed was initialised, with {dist.get_world_size()} ranks, after SelfCompression was "
                "made; initialise it first"
            )

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """The mean over ranks of each of some tensors, in one exchange; the tensors themselves on a single rank."""
        if self.count == 1 or not values:
            return list(values)
        flat = torch.cat([v.detach().flatten() for v in values])
        dist.all_reduce(flat, group=self.group)
        parts = (flat / self.count).split([v.numel() for v in values])
        return [part.view(v.shape).to(v.dtype) for part, v in zip(parts, values, strict=True)]

    def share(self, batch: Tensor) -> tuple[Tensor, float]:
        """This rank's part of a batch, and the weight that makes the mean over ranks the mean over the whole batch.

        Parts differ by one where the sizes do not divide; a rank without one gets a sample at weight 0, so that all
        ranks run the model.
        """
        if self.count == 1:
            return batch, 1.0
        part = batch.tensor_split(self.count)[self.rank]
        return (part, self.count * len(part) / len(batch)) if len(part) else (batch[:1], 0.0)

    @torch.no_grad()
    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values of the first one, in place."""
        if self.count == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, group=self.group, group_src=0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.copy_(whole)

    def follow_numbers(self, record: T, device: torch.device) -> T:
        """A dataclass with the first rank's numbers; what is no number in it stays each rank's own."""
        if self.count == 1:
            return record
        every = {f.name: getattr(record, f.name) for f in fields(record)}  # pyright: ignore[reportArgumentType]
        own = {name: v for name, v in every.items() if isinstance(v, (int, float))}
        values = torch.tensor([float(v) for v in own.values()], dtype=torch.float64, device=device)
        self.follow([values])
        return replace(record, **{k: type(v)(x) for (k, v), x in zip(own.items(), values.tolist(), strict=True)})  # pyright: ignore

    def agree(self, text: str, device: torch.device) -> bool:
        """Whether all ranks hold the same text; they all get the same answer."""
        if self.count == 1:
            return True
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        low, high = (torch.tensor(number, device=device) for _ in range(2))
        dist.all_reduce(low, dist.ReduceOp.MIN, self.group)
        dist.all_reduce(high, dist.ReduceOp.MAX, self.group)
        return bool(low == high)
