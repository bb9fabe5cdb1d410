"""Self-compression in the user's own training loop: an object with `loss(...)` and `step()`, and no loop of its own.

    loss = task + size_weight * size + sparsity_weight * mean |w| + preservation_weight * preservation

    size          bits that the file will hold for weights, scales, widths, biases and norms (size.py), over those of
                  the float32 model. Its gradient is known without autograd and goes straight to the widths
    preservation  KL divergence from the float model's outputs, leant towards its right answers, on a part of the
                  preservation set, drawn by what each sample lost of its margin (preservation.py)

`size_weight` is a price: it follows from the target size, stored bytes over float32 bytes (bits.py, controller.py).
Every `guard_every` steps the guard compares with the float model on the whole preservation set. While the size still
shrinks it only looks: what is lost then, training mends as a rule, and what is given back is sold again. Once
widths are settled any excess raises `preservation_weight`; where nothing at the target held, the target gives way to
the tolerance: bits go back where their loss cost most (guard.py), at once if the model is hopeless, half of the rest
later on evidence of harm that training does not mend. `finish` returns to the smallest model that held everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import CompressionConfig
from .controller import Controller
from .distributed import Ranks
from .guard import Check, check, generosity, mends, owned, restore
from .layers import quant_layers, some_quant_layers
from .outcome import Outcome, judged
from .preservation import PreservationSet
from .samples import as_deployed, device_of
from .sharding import is_sharded, shard_of, whole, whole_tensor, zero_rows
from .size import weight_count

FORM = 2  # of a checkpoint; those without had worths of first order
WAY_OUT = "lower the learning rate, or load the last checkpoint"
LATE = 0.85  # share of the steps after which any excess counts, not evidence alone: what does not hold is not returned
INSIST, RELAX, INSIST_MOST = 1.25, 0.8, 8.0  # how the preservation weight follows violations, and its limit


class SelfCompression:
    """Compresses a prepared model while the user trains it.

    Args:
        model: From `prepare`; its quantizers must learn a `bit_depth`.
        keep: The preservation set, chosen with the float model; None turns preservation and guard off.
        optimizer: The user's optimiser, or several, whose moments follow channels that are revived or cut out.
        file: Further arguments that `save` will get (architecture, notes): the target counts the whole file.
        scaler: The user's `torch.amp.GradScaler`, if losses are scaled: a step whose gradients overflow moves nothing.
        process_group: Ranks that train the model together; where torch.distributed is initialised, all of them.
        settings: Fields of `sgsc.config.CompressionConfig`, such as target_size=0.05, tolerance=0.0 and steps=1000.

    Raises:
        ValueError: If the model is not prepared, a setting is out of range, or no width reaches the target.

    Once a step: `run.loss(task_loss).backward()`, the user's optimiser, `run.step()`; after the last, `run.finish()`.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: PreservationSet | None,
        *,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        file: dict[str, Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,  # pyright: ignore[reportPrivateImportUsage]
        process_group: Any = None,
        **settings: Any,
    ) -> None:
        self.config = CompressionConfig(**settings)
        self.model, self.keep, self.scaler = model, keep, scaler
        self.optimizers = [] if optimizer is None else [*optimizer] if isinstance(optimizer, Sequence) else [optimizer]
        some_quant_layers(model)  # refuses a float one
        self.ranks = Ranks(process_group)
        self._share_start()
        self.preservation_weight = self.config.preservation_weight
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.steps = self.calls = 0
        self.finished = False
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.good: dict[str, Tensor] = {}  # state dict of the last model that held the tolerance …
        self.best: dict[str, Tensor] = {}  # … and of the smallest such one, once at the target the latest
        self.best_size = math.inf
        self.last: dict[str, float] = {}
        self.risk: Tensor | None = None
        self.drawn: Tensor | None = None  # of the preservation set, in this step
        self.control = Controller(model, self.config, file or {}, self._event, self.optimizers, self.ranks)
        self.float_bytes = self.control.float_bytes
        self._check()

    def _share_start(self) -> None:
        kept = "" if self.keep is None else f"{self.keep.indices.tolist()} {self.keep.data_hash}"
        self.ranks.start(self.model, f"{self.config} {kept}")
        if self.ranks.count > 1 and self.config.cut:
            raise ValueError(
                "cut=True on several ranks: DistributedDataParallel knows parameters by the shapes they had; leave "
                "cut off, `pack` removes the same channels in the end"
            )
        if self.config.sparsity_weight and any(is_sharded(p) for p in self.model.parameters()):
            raise ValueError(
                f"sparsity_weight={self.config.sparsity_weight} with sharded weights: not served; leave it at 0"
            )
        if self.ranks.count > 1 and self.keep is not None:
            outputs = self.keep.outputs.clone()  # the same but for rounding
            self.ranks.follow([outputs])
            self.keep = replace(self.keep, outputs=outputs)

    # ---- the user's calls ----

    @property
    def size(self) -> float:
        """Stored bytes over float32 bytes: measured at checks, in between followed by the size term."""
        return self.control.size

    @property
    def size_weight(self) -> float:
        """The price of the size in the loss; 0 while widths are held."""
        return 0.0 if self.control.holding else self.control.price

    def loss(self, task_loss: Tensor) -> Tensor:
        """The sum that the module's docstring states; call `.backward()` on it.

        Raises:
            ValueError: If the task loss is not one finite number. No weight, width or range has moved in this step;
                batch norms have seen the batch.
        """
        if task_loss.numel() != 1:
            raise ValueError(f"task loss of shape {tuple(task_loss.shape)}: want one number, such as its mean")
        extra, parts = self._extra()
        total = task_loss + extra
        self._made({"task_loss": task_loss, **parts, "sum": total})
        return total

    def extra_loss(self) -> Tensor:
        """What `loss` adds to the task loss, for trainers that run their own backward.

        Once a step, in place of `loss`: its gradients add up with those of the task loss. It needs no gradient where
        there is nothing to preserve and no sparsity asked for.

        Raises:
            ValueError: If it is not finite.
        """
        extra, parts = self._extra()
        self._made({**parts, "sum": extra})
        return extra

    def _made(self, shown: dict[str, Tensor]) -> None:
        means = self.ranks.mean([torch.stack([v.detach().double().reshape(()) for v in shown.values()])])
        values = dict(zip(shown, means[0].tolist(), strict=True))
        task = values.get("task_loss", 0.0)
        if not (math.isfinite(task) and math.isfinite(values["sum"])):
            self.discard()
        if not math.isfinite(task):
            raise ValueError(f"task loss [{task}] at step {self.steps}: want one finite number; {WAY_OUT}")
        if not math.isfinite(values.pop("sum")):
            raise ValueError(f"the loss at step {self.steps} is not finite, its parts are {values}; {WAY_OUT}")
        self.calls += 1
        self.last = values
        if self.scaler is not None and self.scaler.is_enabled():  # now, since the user updates it before `step`
            self.control.bits.loss_scale = float(self.scaler.get_scale())

    def _extra(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the task loss, and those of its parts that the history shows."""
        parts: dict[str, Tensor] = {}
        total = self.size_weight * self.control.estimate()[0].float()
        if self.config.sparsity_weight > 0:
            magnitude = sum(layer.weight.abs().sum() for layer in quant_layers(self.model).values())
            total = total + self.config.sparsity_weight * magnitude / weight_count(self.model)
        if self.keep is not None and self.preservation_weight > 0:
            parts["preservation_loss"] = preserved = self._preservation_loss()
            total = total + self.preservation_weight * preserved
        return total, parts

    def step(self) -> None:
        """Move widths and ranges after the user's optimiser has moved the weights; checks every `guard_every` steps.

        Raises:
            ValueError: If no loss was made since the last step, or the run has finished.
        """
        if self.finished:
            raise ValueError("step() after finish(): the run has ended; make a new SelfCompression to go on")
        if self.calls == 0:
            raise ValueError("step() without a loss: call run.loss(task_loss).backward() before run.step()")
        self.control.step(self.steps)
        self.calls, self.drawn = 0, None
        self.steps += 1
        if self.steps % self.config.guard_every == 0 or self.steps == self.config.steps:
            self._check()

    def discard(self) -> None:
        """Forget the losses since the last step, where a batch is given up: their gradients of widths would count.

        On all ranks. Gradients of weights are the caller's, who sets them to zero.
        """
        self.control.bits.forget()
        self.calls, self.drawn = 0, None

    def finish(self) -> Outcome:
        """End the run: return the model to the best state that held, and say what was reached."""
        unreached = self.control.bits.unreached()  # before channels come back that were cut out
        if self.best:
            self.control.take_shapes(self.best)
            self.model.load_state_dict(self.best)
            self.control.look_anew()
        self.control.bits.detach()
        self.control.measure()
        self.finished = True
        return judged(self._look(), self.size, self.config.target_size, (self.steps, self.config.steps), unreached)

    # ---- preservation ----

    def _preservation_loss(self) -> Tensor:
        """On a part of the set, as it is deployed; what lost most of its margin is drawn most often.

        One part a step, so that a batch in several parts, each with a loss, is the same batch. Ranks share it.
        """
        assert self.keep is not None
        if self.drawn is None:
            size = min(self.config.preservation_batch, len(self.keep))
            self.drawn = self.keep.batch(self.generator, size, self.risk)
        part, weight = self.ranks.share(self.drawn)
        with as_deployed(self.model):
            return weight * self.keep.loss(self.model, part, kind="answers")

    def _look(self) -> Check:
        if self.keep is None:
            return Check(0, 0, 0)
        found = check(self.model, self.keep, self.config.tolerance, self.config.margin_tolerance)
        self.ranks.follow([] if found.risk is None else [found.risk])
        return self.ranks.follow_numbers(found, device_of(self.model))

    def _check(self) -> None:
        self.ranks.follow(b for b in self.model.buffers() if b.is_floating_point())
        self.control.measure()
        size = self.size
        found = self._look()
        self.risk = found.risk
        if found.held:
            self.good = self._snapshot()
            if size <= max(self.best_size, self.config.target_size):
                self.best, self.best_size = dict(self.good), size  # a dict of its own, that no cut follows
            self.preservation_weight = max(self.config.preservation_weight, self.preservation_weight * RELAX)
        elif self.steps >= self.control.settled:
            most = INSIST_MOST * self.config.preservation_weight
            self.preservation_weight = min(most, self.preservation_weight * INSIST)
            if self._insists(found):
                self._restore(found)
        self.history.append(
            {
                "step": self.steps,
                "size": size,
                "target": self.control.wanted(self.steps),
                "size_weight": self.size_weight,
                "preservation_weight": self.preservation_weight,
                "regressions": found.regressions,
                "margin_lost": found.margin_lost,
                **self.last,
            }
        )
        if self.config.cut and found.held:  # else the guard may want back what is dead
            self.control.cut([self.good])

    @property
    def _checks_left(self) -> float:
        return (self.config.steps - self.steps) / self.config.guard_every

    def _insists(self, found: Check) -> bool:
        """Whether the target must give way: the fewer steps are left to mend what was lost, on the less evidence."""
        if self.best_size <= self.config.target_size or self._checks_left < 1:
            return False
        late, due = self.steps >= LATE * self.config.steps, self.steps >= self.control.gives_way
        evidence = late or (found.fires if due else found.hopeless)
        return evidence and not mends(found, self.history, self._checks_left)

    def _restore(self, found: Check) -> None:
        if not self.good or self.keep is None:
            return
        bits = self.control.bits
        before = {
            name: self.good[f"{name}.weight_quantizer.bit_depth".removeprefix(".")].round() for name in bits.depths
        }
        good = {name: whole_tensor(value) for name, value in self.good.items()}
        with whole(self.model):
            share = generosity(self.size, self.best_size, self._checks_left)
            given = restore(self.model, self.control.coupling, self.keep, good, before, share)
            self.ranks.follow([*self.model.state_dict().values(), *given.values()])
        channels = sum(int(mask.sum()) for mask in given.values())
        if not channels:
            return
        parameters = dict(self.model.named_parameters())
        for name, rows in owned(self.model, self.control.coupling, given):
            if name in parameters:  # the rest is statistics
                self._forget_moments(parameters[name], rows)
        self.control.give_way()
        self._event("guard", f"{found.violation()}: gave bits back to {channels} channels")

    def _forget_moments(self, of: Tensor, rows: Tensor) -> None:
        for value in [value for optimizer in self.optimizers for value in optimizer.state.get(of, {}).values()]:
            if isinstance(value, Tensor) and value.shape == of.shape:
                zero_rows(value, rows.to(value.device))

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _event(self, what: str, text: str) -> None:
        self.events.append({"step": self.steps, "what": what, "text": text})

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on bit for bit, the model's own state included, whole."""
        states = {"model": self.model.state_dict(), "good": self.good, "best": self.best}
        return {
            **{kind: {name: whole_tensor(v) for name, v in state.items()} for kind, state in states.items()},
            "control": self.control.state_dict(),
            "generator": self.generator.get_state(),
            "config": self.config.as_dict(),
            "risk": self.risk,
            "values": {name: getattr(self, name) for name in self._VALUES} | {"form": FORM},
        }

    _VALUES = ("preservation_weight", "steps", "history", "events", "best_size")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for a run made from the same model, set and settings; before the optimiser's own.

        Raises:
            ValueError: If the settings are others, or the state is of an earlier sgsc.
        """
        if state["values"].get("form") != FORM:
            raise ValueError("the checkpoint is of an earlier sgsc; end its run there, or start anew")
        if state["config"] != self.config.as_dict():
            raise ValueError(f"the checkpoint is of a run with settings {state['config']}; this one has {self.config}")
        with whole(self.model):
            self.control.load_state_dict(state["control"], state["model"])
        self.generator.set_state(state["generator"])
        self.risk = state["risk"]
        here = self.model.state_dict()
        self.good, self.best = (
            {n: shard_of(v.to(here[n].device), here[n]) for n, v in state[kind].items()} for kind in ("good", "best")
        )
        for name in self._VALUES:
            setattr(self, name, state["values"][name])
        self.calls = 0
