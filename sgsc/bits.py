"""How widths are learned: the price of a bit, and the optimiser that buys and sells them.

A channel's width moves against the gradient of the whole loss, measured in the gradient of its own size term:

    ratio_c = dloss/dbit_depth_c / (price * dsize/dbit_depth_c)        1 - (what a bit is worth) / (what it costs)
    bit_depth_c -= rate * clip(average of ratio_c, -1, 1)

so that every channel ends where its bit is worth its price, whatever the scale of the loss. An optimiser that divides
each channel's gradient by that channel's own magnitude (Adam) cannot do this: the price cancels and acts as a switch.

The price follows a schedule of sizes: a proportional-integral controller on its logarithm, since losing a bit makes
the next one about four times as dear (the squared error of a grid).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .layers import QuantLayer, quant_layers

AVERAGE = 0.9  # decay of the running mean of ratio_c
INTEGRAL, PROPORTIONAL = 0.1, 2.0  # of log(size / wanted); the second damps the first
LARGEST_ERROR = 0.5  # of that logarithm, so that a far target does not wind the price up


class Price:
    """What a byte costs, in units of loss per share of the float size."""

    def __init__(self) -> None:
        self.value = 0.0
        self.error = 0.0

    def update(self, size: float, wanted: float) -> None:
        """Move the price, given the size now and the size wanted now (any common unit)."""
        error = max(-LARGEST_ERROR, min(LARGEST_ERROR, math.log(size / wanted)))
        if self.value > 0:
            self.value *= math.exp(INTEGRAL * error + PROPORTIONAL * (error - self.error))
        self.error = error

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""
        return {"value": self.value, "error": self.error}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Inverse of `state_dict`."""
        self.value, self.error = state["value"], state["error"]


class BitOptimizer:
    """Owns the learned parameters of all quantizers, so that the user's optimiser may be any and need not know them.

    Their gradients are collected as backward makes them and taken out of `.grad`: the user's optimiser, clipping and
    weight decay see None there.
    """

    def __init__(self, model: nn.Module, bit_rate: float, grid_rate: float) -> None:
        self.layers: dict[str, QuantLayer] = quant_layers(model)
        self.bit_rate = bit_rate
        self.depths = {name: layer.weight_quantizer.get_parameter("bit_depth") for name, layer in self.layers.items()}
        own = {id(p) for p in self.depths.values()}
        grids = [p for layer in self.layers.values() for p in layer.weight_quantizer.parameters() if id(p) not in own]
        self.grids = torch.optim.Adam(grids, lr=grid_rate)
        self.ratio = {name: torch.zeros_like(p) for name, p in self.depths.items()}
        self.frozen_until = {name: torch.zeros_like(p, dtype=torch.long) for name, p in self.depths.items()}
        self.gradient: dict[nn.Parameter, Tensor] = {}
        self._handles = [p.register_post_accumulate_grad_hook(self._collect) for p in [*self.depths.values(), *grids]]

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in self.gradient:
            self.gradient[parameter] += parameter.grad
        else:
            self.gradient[parameter] = parameter.grad
        parameter.grad = None

    def detach(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def worth(self, cost: dict[str, Tensor], price: float) -> dict[str, Tensor]:
        """What a bit of each channel is worth over what it costs, from the last gradients: 1 - ratio."""
        return {name: 1 - ratio for name, ratio in self.ratio.items()}

    @torch.no_grad()
    def step(self, unit: dict[str, float], price: float, calls: int, step: int, moving: bool) -> dict[str, Tensor]:
        """Move ranges and, where `moving`, widths.

        Args:
            unit: Layer name -> gradient of the size term with respect to one channel's depth.
            price: What the size term was multiplied by.
            calls: Losses that were added up since the last step.
            step: Number of this step; channels frozen beyond it stay.
            moving: Whether widths move at all.

        Returns:
            Layer name -> (C,) bool: the channels whose integer width changed; their ranges were fitted anew.
        """
        for group in self.grids.param_groups:
            for p in group["params"]:
                p.grad = self.gradient.get(p)
        self.grids.step()
        for group in self.grids.param_groups:
            for p in group["params"]:
                p.grad = None
        changed = {}
        for name, depth in self.depths.items():
            gradient = self.gradient.get(depth)
            if gradient is None or not moving or price <= 0:
                continue
            before = depth.clamp_min(0).round()
            ratio = (gradient / (calls * price * unit[name])).clamp(-1, 1)
            self.ratio[name].mul_(AVERAGE).add_(ratio, alpha=1 - AVERAGE)
            free = self.frozen_until[name] <= step
            depth.sub_(self.bit_rate * self.ratio[name] * free).clamp_(0, 8)
            changed[name] = depth.round() != before
            if changed[name].any():
                layer = self.layers[name]
                layer.weight_quantizer.fit(layer.rows(), changed[name])
        self.gradient.clear()
        return changed

    def state_dict(self) -> dict:
        """What a checkpoint needs."""
        return {"ratio": dict(self.ratio), "frozen_until": dict(self.frozen_until), "grids": self.grids.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        for mine, theirs in ((self.ratio, state["ratio"]), (self.frozen_until, state["frozen_until"])):
            for name, value in mine.items():
                value.copy_(theirs[name])
        self.grids.load_state_dict(state["grids"])
        self.gradient.clear()
