"""Grids of a fixed width that fit a weight best before training: for the sensitivity, and to start short training."""

from __future__ import annotations

import torch
from torch import Tensor

from sgsc.layers import QuantLayer
from sgsc.quantizers import make_quantizer

SHARES = torch.linspace(0.2, 1.2, 41)  # of the step at which the largest weight of a row just fits


@torch.no_grad()
def best_steps(rows: Tensor, bits: int) -> Tensor:
    """(C, K) -> (C,) steps with the least squared error, of those in SHARES; codes are -2^(b-1) .. 2^(b-1) - 1.

    LSQ starts from the mean magnitude, which at 6 or 8 bits is far too coarse, and a short training does not mend it.
    """
    most = 2 ** (bits - 1) - 1
    fits = rows.abs().amax(1).clamp_min(1e-12) / max(most, 1)
    best, least = fits, torch.full_like(fits, float("inf"))
    for share in SHARES.tolist():
        step = (share * fits)[:, None].bfloat16().to(rows.dtype)  # as it will be stored
        error = ((rows / step).round().clamp(-most - 1, most) * step - rows).square().sum(1)
        best, least = torch.where(error < least, step[:, 0], best), torch.minimum(error, least)
    return best


def attach(layer: QuantLayer, bits: int) -> None:
    """Give a layer an LSQ quantizer of `bits`, with the best steps for its weight."""
    layer.attach(f"lsq{bits}")
    layer.weight_quantizer.get_parameter("step").data.copy_(best_steps(layer.rows().detach(), bits))


@torch.no_grad()
def rounding_error(rows: Tensor, bits: int) -> float:
    """||Q_b(W) - W||² with the best steps."""
    rows = rows.float()
    quantizer = make_quantizer(f"lsq{bits}", len(rows)).to(rows.device)
    quantizer.fit(rows)
    quantizer.get_parameter("step").data.copy_(best_steps(rows, bits))
    return float((quantizer(rows) - rows).double().square().sum())
