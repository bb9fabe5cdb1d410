"""Averages of weights over steps (EMA, SWA) of a model that compresses itself."""

from __future__ import annotations

import torch
from torch import nn

from .coupling import couple
from .layers import quant_layers


@torch.no_grad()
def adopt_widths(averaged: nn.Module, model: nn.Module) -> nn.Module:
    """Give an average of a prepared model the widths and ranges of the model itself, in place.

    Widths move by whole bits and ranges are fitted anew with each: their means over steps describe no grid that was
    ever trained, and a channel that was removed on the way would come back. Biases and batch norms of removed channels
    are silenced as in the model, so that `pack` cuts the same channels out.

    Args:
        averaged: What `torch.optim.swa_utils.AveragedModel` made of `model`, or the module in it.
        model: The model that was trained; after `run.finish()`.

    Returns:
        The averaged module, ready for `pack`. Its answers are its own: certify it.

    Raises:
        ValueError: If the two are not the same prepared model.
    """
    inner = averaged.module if isinstance(averaged, torch.optim.swa_utils.AveragedModel) else averaged
    ours, theirs = quant_layers(model), quant_layers(inner)
    shapes, others = ({n: tuple(layer.weight.shape) for n, layer in group.items()} for group in (ours, theirs))
    if not ours or shapes != others:
        raise ValueError(
            f"adopt_widths: the average has quantized layers {others}, the model {shapes}; average the prepared model, "
            "from after its last cut on if it cuts channels out while it trains (cut=True)"
        )
    for name, layer in ours.items():
        theirs[name].weight_quantizer.load_state_dict(layer.weight_quantizer.state_dict())
    couple(inner).silence(inner)
    return inner
