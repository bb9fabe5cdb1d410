"""Calibration data: samples that users give in one tensor or in batches, checked, split, and batched anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.samples import device_of

from .settings import StrategySettings


def joined(batches: Sequence[Tensor], at_once: int) -> list[Tensor]:
    """The same samples in batches of up to `at_once` of one shape."""
    groups: dict[torch.Size, list[list[Tensor]]] = {}
    for batch in batches:
        alike = groups.setdefault(batch.shape[1:], [[]])
        if sum(map(len, alike[-1])) + len(batch) > at_once and alike[-1]:
            alike.append([])
        alike[-1].append(batch)
    return [torch.cat(group) for alike in groups.values() for group in alike]


def samples_of(calibration: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Each sample as a batch of its own.

    Raises:
        ValueError: If there is none, or one holds NaN or infinity.
    """
    one = isinstance(calibration, Tensor) or not isinstance(calibration, Iterable)
    given: list[Any] = [calibration] if one else list(calibration)
    for batch in given:
        if not isinstance(batch, Tensor) or not batch.dim():
            said = "single number" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"calibration data: a batch is a {said}; want tensors (samples, ...)")
    samples = [sample for batch in given if batch.numel() for sample in batch.split(1)]
    if not samples:
        raise ValueError("no calibration data: want a tensor (samples, ...) of inputs, or a list of such batches")
    for place, sample in enumerate(samples):
        if sample.is_floating_point() and not torch.isfinite(sample).all():
            raise ValueError(f"calibration data: sample {place} holds NaN or infinity; take it out")
    return samples


def split(
    calibration: Tensor | Sequence[Tensor], network: nn.Module, settings: StrategySettings
) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to fit to and batches to select by, on the network's device; a single sample serves both.

    Of a training all are fitted to.

    Raises:
        ValueError: If there is no sample, or one holds NaN or infinity or is of another dtype than the network.
    """
    samples = samples_of(calibration)
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float64:
        raise ValueError("the model is torch.float64, which has no quantized form; convert model and data by .float()")
    for sample in samples:
        if sample.is_floating_point() and sample.dtype != dtype:
            raise ValueError(
                f"calibration data is {sample.dtype}, the model {dtype}; convert it with .to({dtype}) (an array with "
                f".astype('{str(dtype).removeprefix('torch.')}')), or the model"
            )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    device = device_of(network)
    moved = [samples[i].to(device) for i in order]
    if settings.trained:  # the data that trains chooses
        return joined(moved, settings.batch_size), []
    count = min(max(round(settings.select_share * len(samples)), 1), len(samples) - 1)
    parts = (moved[count:], moved[:count]) if len(moved) > 1 else (moved, moved)
    return joined(parts[0], settings.batch_size), joined(parts[1], settings.batch_size)
