"""Holds the stored size to its schedule: shrink at an even cost, trade at the target, land on it, stay.

    shrink   until `shrink_share` of the steps: first fast, since the first bits cost nothing, then ever more slowly:
             what rounding costs, 4^-bits, rises evenly
    trade    until `settle_share`: bits move from channels where they are worth little to those where they are worth
             much, at the target; ever more slowly, since each change of a width costs the weights some steps
    settled  widths stay, weights and ranges go on; the size is at most the target, and less than one bit's room below

Half of the steps at settled widths belong to training alone. What the guard gives back after them is not sold again: a
run that does not hold its tolerance at the target ends with the smallest model that does.

Nothing depends on how many steps a bit takes to sell: the clearing price of bits.py sells what the schedule asks for.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .artefact import stored_size
from .bits import MAX_BITS, BitOptimizer
from .config import CompressionConfig
from .coupling import couple
from .cutting import check_states, cut_while_training, depthwise_layers, spare, take_shapes
from .distributed import Ranks
from .layers import quant_layers
from .packed import pack
from .sharding import whole
from .size import SizeModel, float_bytes

LANDINGS = 60  # rounds of selling or buying that a landing may take; each measures a file
ROOM = 0.004  # of the target, that may stay unused
WAIT = 0.5  # share of the steps at settled widths that training alone gets: it mends much as its rate falls
WAY = 64  # bits that a width could move within the steps of the shrinking; the schedule never asks for more than half
LEAST_CUT = 0.02  # of the channels, that are worth tracing the model anew


class Controller:
    """Widths, their price, and the size that they make.

    Args:
        model: A prepared model.
        config: Target, schedule and rates.
        file: Further arguments of `save`: the size is that of the whole file.
        say: Told what happened, as say(kind, text).
        optimizers: Of the weights; their state follows where channels are cut out.
        ranks: That train the model together.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CompressionConfig,
        file: dict[str, Any],
        say: Callable[[str, str], None],
        optimizers: Sequence[torch.optim.Optimizer] = (),
        ranks: Ranks | None = None,
    ) -> None:
        if config.cut and not optimizers:
            raise ValueError("cut=True without optimizer: give it, since its state must follow what is cut out")
        self.model, self.config, self.file, self.say = model, config, file, say
        self.float_bytes = float_bytes(model)
        self.bit_rate = max(config.bit_rate, WAY / (config.shrink_share * config.steps))
        self.bits = BitOptimizer(model, self.bit_rate, config.grid_rate, 1 / (8 * self.float_bytes), ranks)
        self.optimizers = [*optimizers, self.bits.grids]
        self.depthwise = depthwise_layers(model)
        self.price = 0.0
        self.target = config.target_size  # grows by what the guard gives back
        self.settled = max(config.shrink_share, config.settle_share) * config.steps
        self.settled = min(self.settled, config.steps - 1)  # the last step lands, the latest
        self.gives_way = self.settled + WAIT * (config.steps - self.settled)  # the step from which the target may grow
        self.holding = False
        self.stuck = False  # whether a landing found nothing left to sell
        self.look_anew()
        self.measure()
        self.start_size = self.size
        self._refuse_unreachable()
        if self.start_size <= config.target_size:
            self._hold("the target is reached before the first step")

    @torch.no_grad()
    def _refuse_unreachable(self) -> None:
        estimate = float(self.sizes(self.bits.least)[0]) / (8 * self.float_bytes) + self.overhead
        if self.config.target_size >= estimate:
            return
        with whole(self.model):
            smallest = copy.deepcopy(self.model)
            layers = quant_layers(smallest)
            for name, bits in self.bits.by_layer(self.bits.least).items():
                layers[name].weight_quantizer.get_parameter("bit_depth").copy_(bits)
            self.coupling.silence(smallest)
            least = stored_size(pack(smallest), **self.file) / self.float_bytes
        if self.config.target_size < least:
            way_out = "raise the target size" if least < 1 else "the network is too small: keep it float"
            raise ValueError(
                f"target_size={self.config.target_size}: with no bit left in any channel that may go, the file still "
                f"has {least:.2%} of the float32 bytes, for what stays float and for its header; {way_out}"
            )

    def look_anew(self) -> None:
        """Read the model's shapes again."""
        with whole(self.model):
            self.coupling = couple(self.model)
            self.sizes = SizeModel(self.model, self.coupling, file=True)
        self.bits.look_anew(self.coupling.answers())  # a class without a bit would never be answered again
        self.silent: Tensor | None = None  # (ids,) channels that were dead at the last call of `cut`
        self._known: dict[str, Any] = {}

    # ---- size ----

    def _of_these_widths(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, called again only once a width has moved."""
        now = tuple((id(d), d._version) for d in self.bits.depths.values())
        if self._known.get("widths") != now:
            self._known = {"widths": now}
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    def estimate(self) -> tuple[Tensor, Tensor]:
        """Size of all that depends on widths, a scalar, and its gradient by each channel's width; of float32 bytes."""

        def made() -> tuple[Tensor, Tensor]:
            bits, gradient = self.sizes(self.bits.widths())
            float_bits = 8 * self.float_bytes
            return bits / float_bits, gradient / float_bits

        return self._of_these_widths("size", made)

    def measure(self) -> None:
        """Pack, and learn how far the stored size lies above the estimate."""
        with whole(self.model):
            self.coupling.silence(self.model)
            self.stored = stored_size(pack(self.model), **self.file) / self.float_bytes
        self.overhead = self.stored - float(self.estimate()[0])

    @property
    def size(self) -> float:
        """Stored bytes over float32 bytes: measured at checks, in between followed by the estimate."""
        return float(self.estimate()[0]) + self.overhead

    def wanted(self, step: int) -> float:
        """The size that the schedule wants at a step: its cost rises evenly, were bits alike, and 8 at the start."""
        share = step / max(1.0, self.config.shrink_share * self.config.steps)
        ratio = self.config.target_size / self.start_size
        if share >= 1 or ratio >= 1:
            return self.config.target_size
        first, last = (4.0 ** (-MAX_BITS * part) for part in (1.0, ratio))
        bits = -math.log(first + share * (last - first), 4)
        return self.start_size * max(bits / MAX_BITS, 1 - WAY / 2 * share / MAX_BITS)

    # ---- widths ----

    def step(self, step: int) -> None:
        """Move ranges and widths, after a backward; `step` counts from 0."""
        self._move(step)
        with whole(self.model, vectors=True):
            dead = self._of_these_widths("dead", lambda: self.coupling.dead(self.model))
            self.coupling.silence(self.model, dead)

    def _move(self, step: int) -> None:
        config = self.config
        gradient = self.estimate()[1]
        if self.holding:
            self.bits.step(gradient, self.price, None)
            return
        depth = self.bits.flat(self.bits.depths).detach()
        # The size if fractions of bits could be stored: integer widths follow it, a channel at a time. Keeping the
        # lesser of both to the schedule halves how far the stored size falls below it, but ends with more loss.
        relaxed = self.size + float((depth - depth.round()).double() @ gradient)
        start, end = config.shrink_share * config.steps, self.settled
        self.bits.bit_rate = self.bit_rate * min(1.0, max(0.0, (end - step) / max(end - start, 1.0)))
        if step < end:
            self.price = self.bits.step(gradient, self.price, relaxed - self.wanted(step))
        else:
            self.bits.step(gradient, self.price, None)
            if not self.stuck or step % config.guard_every == 0:  # each try packs the model
                self._land()

    def _land(self) -> None:
        """Sell the cheapest bits, or buy the dearest, until the stored size is just below the target; then hold."""
        target, bought, trust = self.target, False, 1.0
        for depth in self.bits.depths.values():
            depth.data.round_()  # no more of it will be traded: what is between two widths has no use
        self.measure()
        for _ in range(LANDINGS):
            excess = self.stored - target
            if excess > 0:
                if bought:  # it took more than it promised: less of that
                    trust, bought = trust / 2, False
                if not self.bits.sell_cheapest(self.estimate()[1], excess):
                    break
            elif -excess <= ROOM * target or not self.bits.buy_dearest(self.estimate()[1], -excess * trust):
                break
            else:
                bought = True
            self.measure()
        self.stuck = self.stored > target
        if not self.stuck:
            self._hold(f"reached {self.stored:.2%} of the float32 bytes; widths are held from here")

    def _hold(self, text: str) -> None:
        self.holding = True
        self.say("target", text)

    def give_way(self) -> None:
        """Let what was given back stay given."""
        self.measure()
        self.target = max(self.target, self.size)

    # ---- channels that leave ----

    def cut(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Cut out the channels that were dead at the last call too, of `states`, state dicts of the model, alike.

        Only where the model holds its tolerance without them: the guard cannot bring them back.

        Raises:
            ValueError: If an optimiser keeps state that could not follow.
        """
        if self.coupling.why:
            return
        check_states(self.optimizers)
        silent = self.coupling.silent(self.model).cpu()
        before, self.silent = self.silent, silent
        gone = spare(self.coupling, silent & before) if before is not None else torch.zeros_like(silent)
        if int(gone.sum()) >= LEAST_CUT * len(gone):
            self.bits.keep(cut_while_training(self.model, self.coupling, gone, self.optimizers, states))
            self.look_anew()

    def take_shapes(self, state: dict[str, Tensor]) -> None:
        """Make the model ready to load a state dict from before or after a cut."""
        take_shapes(self.model, state, self.depthwise)

    # ---- checkpoints ----

    _VALUES = ("price", "target", "holding", "overhead", "stored", "start_size", "silent", "stuck")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, beside the model."""
        return {"bits": self.bits.state_dict(), "values": {name: getattr(self, name) for name in self._VALUES}}

    def load_state_dict(self, state: dict[str, Any], model: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; `model` is the state dict of the model, which is loaded too."""
        self.take_shapes(model)
        self.model.load_state_dict(model)
        self.look_anew()
        self.bits.load_state_dict(state["bits"])
        for name in self._VALUES:
            setattr(self, name, state["values"][name])
