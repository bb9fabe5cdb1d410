"""Calibration data: samples that users give in one tensor or in batches, checked, split, and batched anew.

They lie in memory once, where their user has them; a batch is joined when it is asked for. Beside them a search keeps
statistics whose size does not depend on how many there are, and the float network's answers to what it selects by; to
the rest where they are small beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from sgsc.samples import refuse_doubles

from .settings import StrategySettings

Calibration = Tensor | Iterable[Tensor | Sequence[Any]]


class Batches(Sequence[Tensor]):
    """Samples that lie where their user has them, as batches that are made, and moved, when they are asked for.

    Args:
        samples: (1, ...) each, of one shape or several; those of one shape come together.
        at_once: Samples of a batch, at most; batches are of one size as far as may be: some models take no single one.
        device: Where batches go.
    """

    def __init__(self, samples: Sequence[Tensor], at_once: int, device: torch.device) -> None:
        self.device = device
        groups: dict[torch.Size, list[Tensor]] = {}
        for sample in samples:
            groups.setdefault(sample.shape[1:], []).append(sample)
        self.parts: list[list[Tensor]] = []
        for alike in groups.values():
            places = torch.arange(len(alike)).tensor_split(-(-len(alike) // at_once))
            self.parts += [[alike[i] for i in part.tolist()] for part in places]

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def samples(self) -> int:
        """Of all batches."""
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return torch.cat(self.parts[index]).to(self.device)


def samples_of(calibration: Calibration) -> list[Tensor]:
    """Each sample as a batch of its own; of batches (inputs, targets, ...) the inputs.

    Raises:
        ValueError: If there is none, or one holds NaN or infinity.
    """
    one = isinstance(calibration, Tensor) or not isinstance(calibration, Iterable)
    given: list[Any] = [calibration] if one else list(calibration)
    if isinstance(calibration, Mapping) or (hasattr(calibration, "__array__") and not one):
        raise ValueError(
            f"calibration data is a {type(calibration).__name__}; want a tensor (samples, ...), or batches of tensors: "
            "of an array torch.from_numpy(...), of several inputs those of a wrapper that takes one tensor"
        )
    given = [b[0] if isinstance(b, (tuple, list)) and len(b) and isinstance(b[0], Tensor) else b for b in given]
    for batch in given:
        if not isinstance(batch, Tensor) or not batch.dim():
            said = "single number" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"calibration data: a batch is a {said}; want tensors (samples, ...), alone or first in a tuple"
            )
    samples = [sample for batch in given if batch.numel() for sample in batch.split(1)]
    if not samples:
        raise ValueError("no calibration data: want a tensor (samples, ...) of inputs, or a list of such batches")
    for place, sample in enumerate(samples):
        if sample.is_floating_point() and not torch.isfinite(sample).all():
            raise ValueError(f"calibration data: sample {place} holds NaN or infinity; take it out")
    return samples


def split(
    calibration: Calibration, network: nn.Module, settings: StrategySettings
) -> tuple[list[Tensor], list[Tensor]]:
    """Samples, (1, ...) each, to fit to and to select by; a single one serves both.

    Of a training all are fitted to.

    Raises:
        ValueError: If there is no sample, or one holds NaN or infinity or is of another dtype than the network, or
            that is of float64.
    """
    refuse_doubles(network)
    samples = samples_of(calibration)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    for sample in samples:
        if sample.is_floating_point() and sample.dtype != dtype:
            raise ValueError(
                f"calibration data is {sample.dtype}, the model {dtype}; convert it with .to({dtype}) (an array with "
                f".astype('{str(dtype).removeprefix('torch.')}')), or the model"
            )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    drawn = [samples[i] for i in order]
    if settings.trained:  # the data that trains chooses
        return drawn, []
    count = min(max(round(settings.select_share * len(samples)), 1), len(samples) - 1)
    return (drawn[count:], drawn[:count]) if len(drawn) > 1 else (drawn, drawn)
