"""How widths are learned: what a bit is worth, the price that clears the market, and the optimiser that trades.

    worth_c      = -(dloss/dbit_depth_c of all but the size term) / (dsize/dbit_depth_c), averaged over steps
    bit_depth_c -= rate * clip(1 - worth_c / price, -1, 1)

A channel sells where its bit is worth less than its price and buys where it is worth more, so that all end where worth
equals price, whatever the scale of the loss. An optimiser that divides each channel's gradient by that channel's own
magnitude (Adam) cannot do this: the price cancels and acts as a switch.

The price is the one at which what is sold, less what is bought, is what the schedule of sizes asks for at this step.
Solving for it (bisection on C-sized vectors) is dual ascent with an exact inner step: there is no gain to tune, nothing
winds up, and the size neither lags nor overshoots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import QuantLayer, quant_layers

AVERAGE = 0.9  # decay of the running mean of worth_c
BISECTIONS = 40
LARGEST_PRICE = 1e3  # in units of the largest worth: all that may be sold is sold there


def clearing_price(worth: Tensor, bytes_a_step: Tensor, wanted: float) -> float:
    """The least price at which the net sale is at least `wanted`, or the largest one where even that is not.

    Args:
        worth: (C,) loss per unit of size.
        bytes_a_step: (C,) size that a channel sells at full speed, 0 for one that may not trade.
        wanted: Size to sell, net; in the unit of `bytes_a_step`.
    """
    top = float(worth.abs().max()) if worth.numel() else 0.0
    if top == 0.0:
        return 0.0

    def sold(price: float) -> float:
        return float((bytes_a_step * (1 - worth / price).clamp(-1, 1)).sum())

    low, high = top / LARGEST_PRICE**3, top * LARGEST_PRICE
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if sold(middle) >= wanted else (middle, high)
    return high


@torch.no_grad()
def set_depth(layer: QuantLayer, new: Tensor) -> None:
    """Set a layer's depths, (C,), and fit the ranges of the channels whose integer width changes."""
    depth = layer.weight_quantizer.get_parameter("bit_depth")
    changed = depth.round() != new.round()
    depth.copy_(new)
    if changed.any():
        layer.weight_quantizer.fit(layer.rows(), changed)


class BitOptimizer:
    """Owns the learned parameters of all quantizers, so that the user's optimiser may be any and need not know them.

    Their gradients are collected as backward makes them and taken out of `.grad`: the user's optimiser, clipping and
    weight decay see None there.
    """

    def __init__(self, model: nn.Module, bit_rate: float, grid_rate: float, least_size: float = 1e-12) -> None:
        self.layers: dict[str, QuantLayer] = quant_layers(model)
        for name, layer in self.layers.items():
            if not all(p.requires_grad for p in layer.weight_quantizer.parameters()):
                raise ValueError(
                    f"layer {name!r}: its quantizer is frozen and cannot learn; leave requires_grad set, "
                    "or prepare the model with the layer named in `skip`"
                )
        self.least_size = least_size  # of a bit, where a channel's inputs are all dead and its weights cost nothing
        self.bit_rate = bit_rate
        self.depths = {name: layer.weight_quantizer.get_parameter("bit_depth") for name, layer in self.layers.items()}
        own = {id(p) for p in self.depths.values()}
        grids = [p for layer in self.layers.values() for p in layer.weight_quantizer.parameters() if id(p) not in own]
        self.grids = torch.optim.Adam(grids, lr=grid_rate)
        self.worth = {name: torch.zeros_like(p) for name, p in self.depths.items()}
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

    def flat(self, values: dict[str, Tensor]) -> Tensor:
        """The channels of all layers in one vector."""
        return torch.cat([values[name] for name in self.depths])

    @torch.no_grad()
    def step(self, size_gradient: dict[str, Tensor], price: float, calls: int, step: int, sell: float | None) -> float:
        """Move the ranges and, unless `sell` is None, the widths.

        Args:
            size_gradient: Layer name -> (C,) gradient of the size by each depth, 0 or more.
            price: What the size term was multiplied by in the losses.
            calls: Losses that were added up since the last step.
            step: Number of this step; channels frozen beyond it stay.
            sell: Size to sell in this step, net.

        Returns:
            The price at which widths moved; `price` where they did not.

        Raises:
            ValueError: If a gradient is not finite (the message names the layer); nothing has moved then.
        """
        self._check_gradients()
        for group in self.grids.param_groups:
            for p in group["params"]:
                p.grad = self.gradient.get(p)
        self.grids.step()
        self.grids.zero_grad()
        per = {name: g.clamp_min(self.least_size) for name, g in size_gradient.items()}
        for name, depth in self.depths.items():
            gradient = self.gradient.get(depth)
            if gradient is not None:
                worth = (price * size_gradient[name] - gradient / calls) / per[name]
                self.worth[name].mul_(AVERAGE).add_(worth, alpha=1 - AVERAGE)
        self.gradient.clear()
        if sell is None:
            return price
        # a removed channel has nothing left to sell, and only the guard brings it back
        free = {n: ((until <= step) & (self.depths[n] > 0)).float() for n, until in self.frozen_until.items()}
        speed = {name: self.bit_rate * free[name] * per[name] for name in free}
        if not any(bool(s.any()) for s in speed.values()):
            return price
        price = clearing_price(self.flat(self.worth), self.flat(speed), sell)
        for name, depth in self.depths.items():
            pace = (1 - self.worth[name] / price).clamp(-1, 1) if price > 0 else torch.ones_like(depth)
            set_depth(self.layers[name], (depth - self.bit_rate * free[name] * pace).clamp(0, 8))
        return price

    def _check_gradients(self) -> None:
        for name, layer in self.layers.items():
            for parameter in layer.weight_quantizer.parameters():
                gradient = self.gradient.get(parameter)
                if gradient is not None and not torch.isfinite(gradient).all():
                    self.gradient.clear()
                    raise ValueError(
                        f"layer {name!r}: the gradient of its quantizer is not finite; lower the learning rate, "
                        "or load the last checkpoint"
                    )

    @torch.no_grad()
    def sell_cheapest(self, size_gradient: dict[str, Tensor], step: int, size: float) -> bool:
        """Sell one bit each of the channels whose bits are worth least, until `size` is sold; whether any was."""
        names = [name for name, depth in self.depths.items() for _ in range(len(depth))]
        index = torch.cat([torch.arange(len(depth)) for depth in self.depths.values()])
        width = self.flat({name: depth.round() for name, depth in self.depths.items()})
        may = (width > 0) & (self.flat(self.frozen_until) <= step)
        order = torch.where(may, self.flat(self.worth), float("inf")).argsort(stable=True)[: int(may.sum())]
        weights = self.flat(size_gradient)[order]
        count = int((weights.cumsum(0) < size).sum()) + 1
        new = {name: depth.detach().clone() for name, depth in self.depths.items()}
        for i in order[:count].tolist():
            new[names[i]][index[i]] = width[i] - 1
        for name, value in new.items():
            set_depth(self.layers[name], value)
        return bool(len(order))

    def state_dict(self) -> dict:
        """What a checkpoint needs."""
        return {"worth": dict(self.worth), "frozen_until": dict(self.frozen_until), "grids": self.grids.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        for mine, theirs in ((self.worth, state["worth"]), (self.frozen_until, state["frozen_until"])):
            for name, value in mine.items():
                value.copy_(theirs[name])
        self.grids.load_state_dict(state["grids"])
        self.gradient.clear()
