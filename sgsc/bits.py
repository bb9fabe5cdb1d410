"""How widths are learned: what a bit is worth, the price that clears the market, and the optimiser that trades.

    worth_c      = mean of (dloss/dbit_depth_c of all but the size term)^2 over steps, / (dsize/dbit_depth_c)
    bit_depth_c -= rate * clip(1 - worth_c / price, -1, 1)

A channel sells where its bit is worth less than its price and buys where it is worth more, so that all end where worth
equals price, whatever the scale of the loss. An optimiser that divides each channel's gradient by that channel's own
magnitude (Adam) cannot do this: the price cancels and acts as a switch.

The square is what rounding costs to second order, r' H r / 2 for the rounding errors r of a channel: H is nearly the
mean square of gradients (Fisher's information; Theis et al. 2018, arXiv 1801.05787, judge channels so), and but for a
common factor dloss/dbit_depth_c is gradient times r. To first order it would be that derivative itself: near a minimum
mostly noise, of either sign, that doubles with every bit sold: channels then walk at random until they are gone, and
none comes back. A bit less doubles r: worth is four times as much, and between two widths in between, or depths would
jump to and fro. (Gradients of a float network's answers are themselves of the order of r; there worth rises by more.)

The average goes back over twenty of the steps in which a channel was reached: an entry of an embedding that matters in
one step of fifty is worth a fiftieth of what it is then. An entry that was reached keeps a bit at any price: gradients
do not tell what the last one is worth, and its symbol would be lost for good.

The price is the one at which what is sold, less what is bought, is what the schedule of sizes asks for at this step.
That sum is convex in 1 / price, lines between an edge for each channel, so that one sort solves for it: dual ascent
with an exact inner step. There is no gain to tune, nothing winds up, and the size neither lags nor overshoots. All
channels of all layers lie in one vector: a step costs as many operations for any network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Ranks
from .layers import QuantEmbedding, QuantLayer, quant_layers
from .quantizers.self_compressing import MAX_BITS
from .sharding import whole_tensor

PROBATION = 500  # steps in which an entry of an embedding must be reached, or it may go
AVERAGE = 0.95  # decay of the running mean of worth_c, a step in which the channel's gradient is not 0
SMALLEST_PRICE, LARGEST_PRICE = 1e-18, 2.0  # in units of the largest worth: there the dearest bits sell at half speed


def clearing_price(worth: Tensor, bytes_a_step: Tensor, wanted: float, room: Tensor | None = None) -> float:
    """The least price at which the net sale is at least `wanted`, or the largest one where even that is not.

    Above that one all would leave alike, the dearest with the cheapest: what the schedule wants beyond it waits.

    Args:
        worth: (C,) per unit of size, 0 or more.
        bytes_a_step: (C,) size that a channel sells at full speed, 0 for one that may not trade.
        wanted: Size to sell, net; in the unit of `bytes_a_step`.
        room: (C,) size that a channel may buy at most; None is without limit.
    """
    traded = bytes_a_step > 0
    speed, worth = bytes_a_step[traded].double().cpu(), worth[traded].double().cpu()  # once: each look at a GPU waits
    top = float(worth.max()) if len(worth) else 0.0
    if top == 0.0:
        return 0.0
    bought = speed if room is None else torch.minimum(speed, room[traded].double().cpu())
    # by u = 1 / price a channel sells speed * (1 - worth * u), until at its `end` it buys all that it may
    ends, order = ((1 + bought / speed) / worth).clamp(max=1 / (top * SMALLEST_PRICE)).sort(descending=True)
    # just before each end: who has not come to his sells along `slope`, the others buy what they may
    level = speed[order].cumsum(0) + bought[order].cumsum(0) - bought.sum()
    slope = (speed * worth)[order].cumsum(0)
    at = int((level - slope * ends <= wanted).sum()) - 1
    if at < 0:
        return top * SMALLEST_PRICE
    u = float((level[at] - wanted) / slope[at].clamp_min(1e-300))
    return 1 / u if u > 1 / (top * LARGEST_PRICE) else top * LARGEST_PRICE


class BitOptimizer:
    """Owns the learned parameters of all quantizers, so that the user's optimiser may be any and need not know them.

    Their gradients are collected as backward makes them and taken out of `.grad`: the user's optimiser, clipping and
    weight decay see None there.

    Attributes:
        depths: Layer name -> its (C,) learned widths.
        worth: (C,) of all channels: what a bit is worth, the mean over steps; its unit is that of the loss, squared.
        weight: (C,) what stands behind it, 0 to 1.
        reached, looked: (C,) steps in which the gradient was not 0, and all in which there was one. What nobody looked
            at is not traded: that nothing is known of it does not make it worthless.
        least: (C,) bits that a channel keeps at any price, beside entries of embeddings, see `floor`.
    """

    def __init__(
        self,
        model: nn.Module,
        bit_rate: float,
        grid_rate: float,
        least_size: float = 1e-12,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = Ranks() if ranks is None else ranks
        self.layers: dict[str, QuantLayer] = quant_layers(model)
        for name, layer in self.layers.items():
            if not all(p.requires_grad for p in layer.weight_quantizer.parameters()):
                raise ValueError(
                    f"layer {name!r}: its quantizer is frozen and cannot learn; leave requires_grad set, "
                    "or prepare the model with the layer named in `skip`"
                )
        self.least_size = least_size  # of a bit, where a channel's inputs are all dead and its weights cost nothing
        self.bit_rate = bit_rate
        self.loss_scale: float | None = None  # of a GradScaler, which lets gradients overflow now and then
        self.depths = {name: layer.weight_quantizer.get_parameter("bit_depth") for name, layer in self.layers.items()}
        own = {id(p) for p in self.depths.values()}
        grids = [p for layer in self.layers.values() for p in layer.weight_quantizer.parameters() if id(p) not in own]
        self.grids = torch.optim.Adam(grids, lr=grid_rate)
        self.gradient: dict[nn.Parameter, Tensor] = {}
        self.averaged = False  # over ranks, in this step
        self._handles = [self._take_over(p) for p in [*self.depths.values(), *grids]]
        depth = self.flat(self.depths).detach()
        self.worth = depth.new_zeros(len(depth), dtype=torch.promote_types(depth.dtype, torch.float32))  # of squares
        self.weight, self.reached, self.looked = (torch.zeros_like(self.worth) for _ in range(3))
        self.look_anew({})

    def look_anew(self, answers: Mapping[str, Tensor]) -> None:
        """Learn which channels are to stay; `answers`: layer name -> (C,) bool, what `Coupling.answers` found."""
        none = {name: torch.zeros(len(d), dtype=torch.bool) for name, d in self.depths.items()}
        entries = {name: ~none[name] for name, layer in self.layers.items() if isinstance(layer, QuantEmbedding)}
        self.least = self.flat(none | dict(answers)).to(self.worth)
        self.entries = self.flat(none | entries).to(self.worth.device)

    def _take_over(self, parameter: nn.Parameter) -> Any:
        """Collect from now on, in place of a run that was broken off: its hook would take the gradients first."""
        former = getattr(parameter, "collector", None)
        if former is not None:
            former.remove()
        parameter.collector = parameter.register_post_accumulate_grad_hook(self._collect)  # pyright: ignore
        return parameter.collector  # pyright: ignore

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in self.gradient:
            self.gradient[parameter] += parameter.grad
        else:
            self.gradient[parameter] = parameter.grad
        parameter.grad = None

    def _average(self) -> None:
        """Give every rank the mean of what the ranks collected, in one exchange.

        Raises:
            ValueError: If somebody else averages these gradients too.
        """
        self.ranks.check()
        own = [p for group in self.grids.param_groups for p in group["params"]]
        parameters: list[nn.Parameter] = [*self.depths.values(), *own]
        if any(p.grad is not None for p in parameters):  # the hook took it; only a reducer puts one back
            self.gradient.clear()
            raise ValueError(
                "DistributedDataParallel averages the quantizers' gradients: it was made before SelfCompression; make "
                "SelfCompression first, or call sgsc.distributed.leave_out(module) on what you wrap, before wrapping it"
            )
        if self.ranks.count == 1 or self.averaged:
            return
        self.averaged = True
        there = torch.tensor([float(p in self.gradient) for p in parameters]).to(self.worth.device)
        mine = [self.gradient.get(p, torch.zeros_like(p)) for p in parameters]
        there, *means = self.ranks.mean([there, *mine])
        self.gradient = {p: g for p, g, n in zip(parameters, means, there.tolist(), strict=True) if n}

    def forget(self) -> None:
        """Drop what was collected in this step."""
        self.gradient.clear()
        self.averaged = False

    def detach(self) -> None:
        """Leave the parameters alone from now on."""
        for handle in self._handles:
            handle.remove()

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """The channels of all layers in one vector."""
        return torch.cat([values[name] for name in self.depths])

    def by_layer(self, values: Tensor) -> dict[str, Tensor]:
        """Inverse of `flat`; views."""
        return dict(zip(self.depths, values.split([len(d) for d in self.depths.values()]), strict=True))

    @torch.no_grad()
    def widths(self) -> Tensor:
        """(C,) bits a weight that the size term charges, of all channels."""
        return torch.cat([layer.weight_quantizer.bit_cost() for layer in self.layers.values()])

    def unreached(self) -> list[str]:
        """Names of the layers that no loss has reached yet."""
        return [name for name, looked in self.by_layer(self.looked).items() if len(looked) and not looked.any()]

    def floor(self) -> Tensor:
        """(C,) bits that each channel keeps at any price, as far as is known by now."""
        kept = self.entries & ((self.reached > 0) | (self.looked < PROBATION))
        return self.least.maximum(kept.to(self.least.dtype))

    @torch.no_grad()
    def step(self, size_gradient: Tensor, price: float, sell: float | None) -> float:
        """Move the ranges and, unless `sell` is None, the widths.

        Args:
            size_gradient: (C,) gradient of the size by each channel's depth, 0 or more.
            price: That of the step before.
            sell: Size to sell in this step, net.

        Returns:
            The price at which widths moved; `price` where they did not.

        Raises:
            ValueError: If a gradient is not finite (the message names the layer); nothing has moved then.
        """
        counts = self._counts()
        self.averaged = False
        if not counts:
            return price
        for group in self.grids.param_groups:
            for p in group["params"]:
                p.grad = self.gradient.get(p)
        self.grids.step()
        self.grids.zero_grad()
        per = size_gradient.to(self.worth.dtype).clamp_min(self.least_size)
        nan = float("nan")  # of a layer that no loss reached: its channels keep what they are worth
        gradient = torch.cat([self.gradient.get(d, torch.full_like(d, nan)) for d in self.depths.values()])
        self._learn(gradient.to(self.worth.dtype).square() / per)
        self.gradient.clear()
        if sell is None:
            return price
        depth = self.flat(self.depths)
        # a removed channel has nothing left to sell, and only the guard brings it back; an answer is never sold
        least = self.floor()
        speed = self.bit_rate * ((depth > least) & (self.looked > 0))
        if not speed.any():
            return price
        worth = self.worth / (self.worth * per).mean().sqrt().clamp_min(1e-30)  # so that the price is one of the loss
        worth = worth * torch.exp2(2 * (depth.round() - depth))
        price = clearing_price(worth, speed * per, sell, (MAX_BITS - depth) * per)
        pace = (1 - worth / price).clamp(-1, 1) if price > 0 else torch.ones_like(depth)
        change = (speed * pace).minimum(depth - least).maximum(depth - MAX_BITS)
        sold, bought = float(change.clamp_min(0) @ per), float(-change.clamp_max(0) @ per)
        # bits that are worth nothing want to go at any price: not below the schedule
        if sold > 0 and sold - bought > sell:
            change = torch.where(change > 0, change * max(0.0, (sell + bought) / sold), change)
        self._set(depth, depth - change)
        return price

    def _learn(self, worth: Tensor) -> None:
        """Average what bits were worth in this step, (C,), NaN where nothing is known."""
        known = ~worth.isnan()
        self.looked += known
        self.reached += known & (worth != 0)
        pace = (1 - AVERAGE) * known * self.reached / self.looked.clamp_min(1)
        self.weight.lerp_(torch.ones_like(pace), pace)
        self.worth.lerp_(torch.where(known, worth, 0.0), pace / torch.where(self.weight > 0, self.weight, 1.0))

    def check_finite(self) -> bool:
        """Whether all gradients that were collected are finite; those of a scaled loss may be infinite.

        They are averaged over ranks first, so that all of them stop or none does.

        Raises:
            ValueError: If one of an unscaled loss is not; the message names the layer, and all are forgotten.
        """
        self._average()
        if not self.gradient or torch.isfinite(torch.cat([g.flatten() for g in self.gradient.values()])).all():
            return True
        if self.loss_scale is not None:
            return False
        bad = next(
            name
            for name, layer in self.layers.items()
            for p in layer.weight_quantizer.parameters()
            if p in self.gradient and not torch.isfinite(self.gradient[p]).all()
        )
        self.gradient.clear()
        raise ValueError(
            f"layer {bad!r}: the gradient of its quantizer is not finite; lower the learning rate, "
            "or load the last checkpoint"
        )

    def _counts(self) -> bool:
        """Whether this step counts; gradients of a scaled loss are brought to scale."""
        finite = self.check_finite()
        if not finite:
            self.gradient.clear()
        elif self.loss_scale is not None and self.gradient:
            torch._foreach_div_(list(self.gradient.values()), self.loss_scale)
        return finite

    def _set(self, old: Tensor, new: Tensor) -> None:
        """Move all depths from `old` to `new`, (C,), and fit the ranges of the channels whose width changes."""
        fewer = old.round() - new.round()
        self.worth *= torch.exp2(2 * fewer)  # bits, each of which doubles the rounding errors
        changed = self.by_layer(fewer != 0)
        torch._foreach_copy_(list(self.depths.values()), list(self.by_layer(new).values()))
        for name, which in changed.items():
            if which.any():
                weight = whole_tensor(self.layers[name].weight)
                self.layers[name].weight_quantizer.fit(weight.flatten(1), which)

    @torch.no_grad()
    def sell_cheapest(self, size_gradient: Tensor, size: float) -> bool:
        """Sell one bit each of the channels whose bits are worth least, until `size` is sold; whether any was."""
        depth = self.flat(self.depths)
        width = depth.round()
        may = (width > self.floor()) & (self.looked > 0)
        order = torch.where(may, self.worth, float("inf")).argsort(stable=True)[: int(may.sum())]
        count = int((size_gradient[order].cumsum(0) < size).sum()) + 1
        new = depth.clone()
        new[order[:count]] = width[order[:count]] - 1
        self._set(depth, new)
        return bool(len(order))

    @torch.no_grad()
    def buy_dearest(self, size_gradient: Tensor, size: float) -> bool:
        """Buy one bit each for the channels whose bits are worth most, of no more than `size`; whether any was."""
        depth = self.flat(self.depths)
        width = depth.round()
        may = (width > 0) & (width < MAX_BITS) & (size_gradient <= size) & (self.looked > 0)
        order = torch.where(may, self.worth, -float("inf")).argsort(descending=True, stable=True)[: int(may.sum())]
        order = order[size_gradient[order].cumsum(0) <= size]
        new = depth.clone()
        new[order] = width[order] + 1
        self._set(depth, new)
        return bool(len(order))

    def keep(self, left: dict[str, Tensor]) -> None:
        """Forget channels that were cut out; `left`: layer name -> (C,) bool of its channels before."""
        mask = self.flat({n: left.get(n, torch.ones_like(d, dtype=torch.bool)) for n, d in self.depths.items()})
        for name in self._AVERAGES:
            setattr(self, name, getattr(self, name)[mask])
        self.gradient.clear()

    _AVERAGES = ("worth", "weight", "reached", "looked")

    def state_dict(self) -> dict:
        """What a checkpoint needs."""
        return {"grids": self.grids.state_dict(), **{name: getattr(self, name) for name in self._AVERAGES}}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        for name in self._AVERAGES:
            setattr(self, name, state[name].to(self.worth))
        self.grids.load_state_dict(state["grids"])
        self.gradient.clear()
