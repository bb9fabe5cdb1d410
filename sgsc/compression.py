"""Self-compression in the user's own training loop: an object with `loss(...)` and `step()`, and no loop of its own.

    loss = task + size_weight * size + sparsity_weight * mean |w| + preservation_weight * preservation

    size          nominal bits of the live weights over the bits of the float32 model (differentiable in the widths)
    preservation  KL divergence from the float model's outputs on a random part of the preservation set

`size_weight` is a price: it follows from the target size, stored bytes over float32 bytes (bits.py). A run shrinks
until the stored size reaches the target, then holds the widths while the weights recover. Every `guard_every` steps the
guard compares with the float model on the whole preservation set: on evidence of harm it gives bits back where their
loss cost most (guard.py), freezes these channels for a while and halves the price; any excess raises
`preservation_weight`. The last model that held everything is kept; `finish` returns to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .artefact import stored_size
from .bits import BitOptimizer, Price
from .config import CompressionConfig
from .coupling import couple
from .guard import Check, check, restore, widths
from .layers import quant_layers
from .packed import pack
from .preservation import PreservationSet
from .size import float_bytes, nominal_bits, weight_count

FREEZE_CHECKS = 3  # checks for which a restored channel keeps its bits
INSIST, RELAX, INSIST_MOST = 1.5, 0.9, 64.0  # how the preservation weight follows violations, and its limit


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached; `reason` says why not, where something was not held."""

    stored_ratio: float
    regressions: int
    allowed: int
    target_held: bool
    tolerance_held: bool
    reason: str


class SelfCompression:
    """Compresses a prepared model while the user trains it.

    Args:
        model: From `prepare`; its quantizers must learn a `bit_depth`.
        keep: The preservation set, chosen with the float model; None turns preservation and guard off.
        optimizer: The user's optimiser, if its moments shall be reset for channels that the guard revives.
        settings: Fields of `CompressionConfig`.

    Once a step: `run.loss(task_loss).backward()`, the user's optimiser, `run.step()`; after the last, `run.finish()`.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: PreservationSet | None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        **settings: Any,
    ) -> None:
        self.config = CompressionConfig(**settings)
        self.model, self.keep, self.optimizer = model, keep, optimizer
        if not quant_layers(model):
            raise ValueError("the model has no quantized layer; pass what prepare(model).model returned")
        self.coupling = couple(model)
        self.bits = BitOptimizer(model, self.config.bit_rate, self.config.grid_rate)
        self.price = Price()
        self.float_bytes = float_bytes(model)
        self.preservation_weight = self.config.preservation_weight
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.steps = 0
        self.calls = 0
        self.holding = False
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.good: dict[str, Tensor] = {}  # state dict of the last model that held the tolerance …
        self.best: dict[str, Tensor] = {}  # … and of the smallest such one, once at the target the latest
        self.best_size = math.inf
        self.last: dict[str, float] = {}
        self._measure()
        self.start_size = self.size
        if self.start_size <= self.config.target_size:
            self._hold("the target is reached before the first step")
        self._check()

    # ---- the user's calls ----

    @property
    def size(self) -> float:
        """Stored bytes over float32 bytes: measured at checks, in between followed by the nominal size."""
        with torch.no_grad():
            return (float(self._nominal()) / 8 + self.overhead) / self.float_bytes

    @property
    def wanted(self) -> float:
        """The size that the schedule wants after this step: geometric from the start to the target."""
        share = min(1.0, self.steps / max(1.0, self.config.shrink_share * self.config.steps))
        return self.start_size * (self.config.target_size / self.start_size) ** share

    def loss(self, task_loss: Tensor) -> Tensor:
        """The sum that the module's docstring states; call `.backward()` on it.

        Raises:
            ValueError: If the task loss is not one finite number; the model is then still as it was before this step.
        """
        if task_loss.numel() != 1 or not math.isfinite(task_loss.item()):
            raise ValueError(
                f"task loss {task_loss.detach().flatten()[:3].tolist()} at step {self.steps}: want one finite number; "
                "lower the learning rate, or load the last checkpoint"
            )
        self.calls += 1
        total = task_loss
        self.last = {"loss": task_loss.item()}
        if self.price.value > 0 and not self.holding:
            total = total + self.price.value * self._nominal() / (8 * self.float_bytes)
        if self.config.sparsity_weight > 0:
            count = weight_count(self.model)
            magnitude = sum(layer.weight.abs().sum() for layer in quant_layers(self.model).values())
            total = total + self.config.sparsity_weight * magnitude / count
        if self.keep is not None and self.preservation_weight > 0:
            preserved = self._preservation_loss()
            self.last["preservation_loss"] = preserved.item()
            total = total + self.preservation_weight * preserved
        return total

    def step(self) -> None:
        """Move widths and ranges after the user's optimiser has moved the weights; checks every `guard_every` steps.

        Raises:
            ValueError: If no loss was made since the last step.
        """
        if self.calls == 0:
            raise ValueError("step() without a loss: call run.loss(task_loss).backward() before run.step()")
        if not self.holding:
            self._move_widths()
        else:
            self.bits.step({}, 0.0, self.calls, self.steps, moving=False)
        self.calls = 0
        self.steps += 1
        self.coupling.silence(self.model)
        if self.steps % self.config.guard_every == 0 or self.steps == self.config.steps:
            self._check()

    def finish(self) -> Outcome:
        """End the run: return the model to the best state that held, and say what was reached."""
        if self.best:
            self.model.load_state_dict(self.best)
        self.bits.detach()
        self._measure()
        found = check(self.model, self.keep, self.config.tolerance) if self.keep is not None else Check(0, 0, 0)
        target_held = self.size <= self.config.target_size
        reasons = []
        if not found.held:
            reasons.append(
                f"{found.regressions} of {found.samples} preservation samples regressed, {found.allowed} are allowed: "
                "raise the tolerance, the target size or the steps"
            )
        if not target_held:
            reasons.append(
                f"the smallest model that held has {self.size:.2%} of the float32 bytes, not "
                f"{self.config.target_size:.2%}: raise the target size, the tolerance or the steps"
            )
        return Outcome(self.size, found.regressions, found.allowed, target_held, found.held, "; ".join(reasons))

    # ---- widths ----

    def _nominal(self) -> Tensor:
        return nominal_bits(self.model, self.coupling)

    def _units(self) -> dict[str, float]:
        """Layer name -> gradient of the size by one channel's depth, dead inputs left out."""
        alive = self.coupling.alive(widths(self.model))
        units = {}
        for name, layer in quant_layers(self.model).items():
            width = layer.weight[0].numel()
            ids = self.coupling.read.get(name)
            share = 1.0 if ids is None else float(alive[ids.to(alive.device)].mean())
            units[name] = max(width * share, 1.0) / (8 * self.float_bytes)
        return units

    def _move_widths(self) -> None:
        units = self._units()
        if self.price.value == 0:
            # The first price is what a bit is worth on average now, so that half of the channels would sell.
            worth = [
                (g.abs() / (self.calls * units[name])).mean()
                for name, depth in self.bits.depths.items()
                if (g := self.bits.gradient.get(depth)) is not None
            ]
            self.price.value = max(float(torch.stack(worth).mean()) if worth else 0.0, 1e-8)
            self.bits.step(units, 0.0, self.calls, self.steps, moving=False)
            return
        before = widths(self.model)
        self.bits.step(units, self.price.value, self.calls, self.steps, moving=True)
        self.price.update(self.size, self.wanted)
        if self.size <= self.config.target_size:
            self._land(before)

    @torch.no_grad()
    def _land(self, before: dict[str, Tensor]) -> None:
        """At the target: give back the dearest of the last sales as far as the target allows, then hold."""
        self._measure()
        sales = [
            (float(self.bits.ratio[name][i]), name, int(i))
            for name, width in widths(self.model).items()
            for i in (width < before[name]).nonzero().flatten()
        ]
        units = self._units()
        room = self.config.target_size - self.size
        for _, name, i in sorted(sales):
            layer = quant_layers(self.model)[name]
            depth = layer.weight_quantizer.get_parameter("bit_depth")
            price = float(before[name][i] - depth[i].round()) * units[name]
            if price <= room and depth[i].round() > 0:
                depth[i] = before[name][i]
                where = torch.zeros_like(depth, dtype=torch.bool)
                where[i] = True
                layer.weight_quantizer.fit(layer.rows(), where)
                room -= price
        self._measure()
        if self.size <= self.config.target_size:
            self._hold(f"reached {self.size:.2%} of the float32 bytes; widths are held from here")

    def _hold(self, text: str) -> None:
        self.holding = True
        self._event("target", text)

    def _measure(self) -> None:
        """Pack, and learn how far the stored size lies above the nominal one."""
        self.coupling.silence(self.model)
        with torch.no_grad():
            self.overhead = stored_size(pack(self.model)) - float(self._nominal()) / 8

    # ---- preservation ----

    def _preservation_loss(self) -> Tensor:
        """On a random part of the set, in eval mode: what is deployed is what is preserved."""
        assert self.keep is not None
        flags = {m: m.training for m in self.model.modules()}
        self.model.eval()
        try:
            size = min(self.config.preservation_batch, len(self.keep))
            return self.keep.loss(self.model, self.keep.batch(self.generator, size))
        finally:
            for module, was in flags.items():
                module.training = was

    def _check(self) -> None:
        self._measure()
        if self.holding and self.size > self.config.target_size:
            self.holding = False  # removed channels or restored ones moved the stored size
        found = check(self.model, self.keep, self.config.tolerance) if self.keep is not None else Check(0, 0, 0)
        size = self.size
        if found.held:
            self.good = self._snapshot()
            if size <= max(self.best_size, self.config.target_size):
                self.best, self.best_size = self.good, size
            self.preservation_weight = max(self.config.preservation_weight, self.preservation_weight * RELAX)
        else:
            most = INSIST_MOST * self.config.preservation_weight
            self.preservation_weight = min(most, self.preservation_weight * INSIST)
            if found.fires:
                self._restore(found)
        self.history.append(
            {
                "step": self.steps,
                "size": size,
                "target": self.wanted,
                "size_weight": self.price.value,
                "preservation_weight": self.preservation_weight,
                "regressions": found.regressions,
                **self.last,
            }
        )

    def _restore(self, found: Check) -> None:
        if not self.good or self.keep is None:
            return
        before = {
            name: self.good[f"{name}.weight_quantizer.bit_depth" if name else "weight_quantizer.bit_depth"].round()
            for name in self.bits.depths
        }
        given = restore(self.model, self.coupling, self.keep, self.good, before)
        channels = sum(int(mask.sum()) for mask in given.values())
        if not channels:
            return
        until = self.steps + FREEZE_CHECKS * self.config.guard_every
        for name, mask in given.items():
            self.bits.frozen_until[name][mask] = until
            self.bits.ratio[name][mask] = 0.0
            self._forget_moments(self.bits.layers[name].weight, mask)
        self.price.value /= 2
        self._measure()
        self.holding = self.size <= self.config.target_size
        self._event(
            "guard", f"{found.regressions} regressions, {found.allowed} allowed: gave bits back to {channels} channels"
        )

    def _forget_moments(self, weight: Tensor, rows: Tensor) -> None:
        state = self.optimizer.state.get(weight, {}) if self.optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value[rows] = 0.0

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _event(self, what: str, text: str) -> None:
        self.events.append({"step": self.steps, "what": what, "text": text})

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, the model's own state included."""
        return {
            "model": self.model.state_dict(),
            "bits": self.bits.state_dict(),
            "price": self.price.state_dict(),
            "generator": self.generator.get_state(),
            "good": self.good,
            "best": self.best,
            "values": {name: getattr(self, name) for name in self._VALUES},
        }

    _VALUES = (
        *("preservation_weight", "steps", "holding", "history", "events", "best_size", "start_size", "overhead"),
    )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for a run made from the same model, set and settings."""
        self.model.load_state_dict(state["model"])
        self.bits.load_state_dict(state["bits"])
        self.price.load_state_dict(state["price"])
        self.generator.set_state(state["generator"])
        self.good, self.best = dict(state["good"]), dict(state["best"])
        for name in self._VALUES:
            setattr(self, name, state["values"][name])
        self.calls = 0
