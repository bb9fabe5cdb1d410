"""Training with strategies: one backward for weights and for the choice of a strategy, in three stages.

warm-up    shares stay uniform while weights get used to rounding
search     weights and shares learn from the same backward, each by an optimiser of its own; temperature falls,
           entropy costs more and more
settled    every layer keeps its leading candidate; the learning rate starts anew, and the network trains as it
           will be deployed: in a mixture no candidate was trained on its own, and that is what it lacked
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.layers import quant_layers

from .data import Calibration
from .mixture import MixedInput, MixedWeights, entropy, mixtures, set_temperature, settle
from .problem import Choice, make_problem
from .search import COLDEST, RATE, Shares, shares_in
from .settings import UNTRAINED, check_steps, settings_of

WARM, SEARCH = 0.1, 0.3  # shares of the steps; the rest is settled
SHARP = 1.0  # weight of the entropy at the end of the search, in units of the loss at its start, whatever its sign
CLIP = 1.0  # norm of all gradients of weights and grids


class StrategyTraining:
    """Quantization-aware training that finds each layer's strategies on its way; owns no loop.

        run = StrategyTraining(network, inputs, steps=2000, bits_weights=4, bits_activations=4)
        for x, y in data:                                     # until run.done
            run.step(loss(run.model(x), y))
        packed = pack(run.model.eval())

    Args:
        network: Trained, in float; it is left as it is.
        calibration: Inputs that learned grids start from, as `search_strategies` takes them.
        steps: Of the whole training.
        fold: Whether batch norms are folded before; else they train on, and stay.
        rate: Peak of the learning rate of the weights; shares have their own.
        optimiser: Called with groups of parameters; AdamW if None.
        bits_activations: As of StrategySettings, but 4 unless it is named.
        settings: Fields of StrategySettings, but not loss, select_share and correct_bias; with one name each of
            `weights` and `inputs` nothing is searched.

    Attributes:
        settings: As they were given.
        model: What is trained.
        stage, done: Where the training is.
        choice: Layer -> (strategy of its weight, of its input or None), once settled.
        shares: Layer -> what the candidates of its weight, of its input had come to by then.
        bits: Layer -> bits of its weight, of its input or None.
        left: Layers that stay float -> why.

    Raises:
        ValueError: If `steps` is below 1, or as `search_strategies` does.
    """

    def __init__(
        self,
        network: nn.Module,
        calibration: Calibration,
        *,
        steps: int,
        fold: bool = False,
        rate: float = 1e-3,
        optimiser: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        bits_activations: int | None = 4,
        **settings: Any,
    ) -> None:
        check_steps(steps, 1)
        self.settings = settings_of(True, {"bits_activations": bits_activations, **settings})
        problem = make_problem(network, calibration, self.settings, fold)
        self.model = problem.model
        for name in problem.learns:  # the search has all weights frozen
            self.model.get_parameter(name).requires_grad_(True)
        self.steps, self.done_steps, self.rate = int(steps), 0, rate
        self.bits, self.left = problem.bits, problem.left
        self.choice: Choice = {}
        self.shares: Shares = {}
        self.first: float | None = None
        self._make = optimiser or (lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=0.01))
        for name, layer in problem.layers.items():
            layer.weight_quantizer = MixedWeights(problem.weights[name])
            layer.input_quantizer = MixedInput(problem.inputs[name]) if problem.inputs.get(name) else None
        self.model.train()
        self.logits = [m.logits for m in mixtures(self.model) if len(m.names) > 1]
        self.warm, self.search = (round(share * steps) for share in (WARM, SEARCH))
        self.of_shares = torch.optim.Adam(self.logits, lr=RATE) if self.logits else None
        self._start()
        own = {"steps": self.steps, "rate": rate, "fold": fold, "optimiser": type(self.optimiser).__name__}
        self.arguments = own | {
            name: str(value) for name, value in vars(self.settings).items() if name not in UNTRAINED
        }
        if not self.logits:
            self._settle()

    @property
    def stage(self) -> str:
        """ "warm-up", "search" or "settled"."""
        if self.choice:
            return "settled"
        return "warm-up" if self.done_steps < self.warm else "search"

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.done_steps >= self.steps

    def step(self, loss: Tensor) -> dict[str, float]:
        """Learn from the loss of one batch; returns what it was made of.

        Raises:
            ValueError: If the loss is not one number, NaN or infinite, or there is nothing that it could train.
            RuntimeError: If all steps are done.
        """
        if self.done:
            raise RuntimeError(f"all {self.steps} steps are done; make a new StrategyTraining to go on")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            said = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is a {type(loss).__name__}"
            raise ValueError(f"the loss {said}; want a tensor of one number, such as a mean over the batch")
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} at step {self.done_steps}; lower the rate, or look at the data")
        if not loss.requires_grad:
            raise ValueError("the loss needs no gradient: all weights are frozen, and no strategy learns its grid")
        said = {"loss": value}
        searching = self.stage == "search" and self.of_shares is not None
        if searching:
            part = (self.done_steps - self.warm) / max(self.search - 1, 1)
            self.first = abs(value) if self.first is None else self.first
            sharp = entropy(self.model)
            said["entropy"] = sharp.item()
            loss = loss + SHARP * self.first * part * sharp
            set_temperature(self.model, COLDEST ** min((part * (self.search - 1) + 1) / max(self.search, 1), 1.0))
        for logits in self.logits:
            logits.grad = None
        self.optimiser.zero_grad()
        loss.backward()
        factor = self._factor()
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate * group["of"] * factor
        nn.utils.clip_grad_norm_([p for g in self.optimiser.param_groups for p in g["params"]], CLIP)
        self.optimiser.step()
        if searching and self.of_shares is not None:
            self.of_shares.step()
        self.done_steps += 1
        if not self.choice and self.done_steps >= min(self.warm + self.search, self.steps):
            self._settle()
        return said | {"learning_rate": self.rate * factor}

    def state_dict(self) -> dict[str, Any]:
        """What a run made with the same arguments needs to go on as this one would have; `save_checkpoint` takes it."""
        return {
            **{"arguments": self.arguments, "done": self.done_steps, "began": self.began, "first": self.first},
            **{"choice": dict(self.choice), "shares": dict(self.shares), "model": self.model.state_dict()},
            "temperature": next((m.temperature for m in mixtures(self.model)), 1.0),
            "optimiser": self.optimiser.state_dict(),
            "of_shares": None if self.of_shares is None else self.of_shares.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, for a run that has not begun.

        Raises:
            ValueError: If this one has begun, or was made with other arguments.
        """
        if self.done_steps:
            raise ValueError(f"{self.done_steps} steps are done; make a new StrategyTraining, then load")
        try:
            for name, value in self.arguments.items():
                if state["arguments"][name] != value:
                    raise ValueError(f"{name}={state['arguments'][name]} there, {value} here")
            layers = quant_layers(self.model)
            for name, layer in layers.items():
                if state["model"][f"{name}.weight"].shape != layer.weight.shape:
                    raise ValueError(f"layer {name!r} has another shape there")
            if state["choice"] and not self.choice:
                if set(state["choice"]) != set(layers):
                    raise ValueError(f"layers {', '.join(state['choice'])} there")
                chosen = [(layers[name], pair) for name, pair in state["choice"].items()]
                for mixed, name in [(layer.weight_quantizer, w) for layer, (w, _) in chosen] + [
                    (layer.input_quantizer, i) for layer, (_, i) in chosen if i is not None
                ]:
                    mixed.logits.data[mixed.names.index(name)] = 1.0  # pyright: ignore  mixtures
                self._settle()
            self.model.load_state_dict(state["model"])
            self._start()
            self.optimiser.load_state_dict(state["optimiser"])
            if self.of_shares is not None:
                self.of_shares.load_state_dict(state["of_shares"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"the state is of a training with other arguments ({said})") from None
        set_temperature(self.model, state["temperature"])
        self.done_steps, self.began, self.first = state["done"], state["began"], state["first"]
        self.choice, self.shares = state["choice"], state["shares"]

    def _settle(self) -> None:
        self.shares = shares_in(quant_layers(self.model))
        self.choice = settle(self.model)
        self.logits, self.of_shares = [], None
        self._start()

    def _start(self) -> None:
        """A new optimiser for what is to be trained now; its learning rate starts anew."""
        own: dict[int, float] = {}
        for layer in quant_layers(self.model).values():
            for quantizer in (layer.weight_quantizer, layer.input_quantizer):
                for name, p in [] if quantizer is None else quantizer.named_parameters():
                    own[id(p)] = 0.0 if name == "logits" else _unit(quantizer, name, p)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        plain = [p for p in learned if id(p) not in own]
        groups: list[dict[str, Any]] = [{"params": plain, "of": 1.0}]
        groups += [{"params": [p], "of": own[id(p)], "weight_decay": 0.0} for p in learned if own.get(id(p), 0.0) > 0]
        self.optimiser = self._make(groups)
        self.began = self.done_steps

    def _factor(self) -> float:
        """Share of the peak learning rate: a short rise, then a cosine to a tenth; settled, to 0."""
        end = self.steps if self.choice else min(self.warm + self.search, self.steps)
        part = (self.done_steps - self.began) / max(end - self.began, 1)
        least = 0.0 if self.choice else 0.1
        return min(part / 0.05 + 0.05, least + (1 - least) * 0.5 * (1 + math.cos(math.pi * part)))


def _unit(quantizer: Any, name: str, p: Tensor) -> float:
    """What a rate is relative to: an optimiser that normalises gradients would else move all steps alike.

    It is the size of the parameter as it starts; of an offset, which may start at 0, what the grid spans.
    """
    if name.endswith("offset"):
        scale, low, high, _ = quantizer.grid()
        return float((scale * (high - low)).detach().mean())
    return max(p.detach().abs().mean().item(), 1e-8)
