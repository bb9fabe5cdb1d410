"""The guard: it checks the preservation set and gives bits back where losing them cost most, for their size.

What a change of widths cost is estimated to first order: the gradient of the preservation loss with respect to the
quantized weight, times the change of the quantized weight. The gradient is the mean of those before and after the
change, since a removed channel behind a ReLU has no gradient of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .certificate import allowed, answers, margins
from .coupling import Coupling
from .layers import QuantLayer, quant_layers
from .preservation import PreservationSet
from .samples import as_deployed, outputs
from .size import SizeModel

SAMPLES = 512  # of the preservation set that a cost estimate uses at most
GIVE_BACK = 0.03  # share of the present size that one restoration returns at least
HOPELESS = 0.5  # share of the mean margin; with more of it gone, training does not find its way back
PATIENCE = 3  # checks over which the guard looks whether training mends by itself what was lost
AT_ONCE = 2  # bits that a channel gets back at most: the estimate is one of first order


@dataclass(frozen=True)
class Check:
    """One look at the preservation set.

    Attributes:
        regressions, allowed, samples: Right before and wrong now; how many may be; of how many.
        margin_lost: Mean decision margin that samples lost which the float model has right, over its own mean margin.
        margin_allowed: What of that may be lost.
        margin_error: Standard error of `margin_lost`.
        risk: (samples,) how much of its margin each lost, 0 to 2; None for no samples.
    """

    regressions: int
    allowed: int
    samples: int
    margin_lost: float = 0.0
    margin_allowed: float = 1.0
    margin_error: float = 0.0
    risk: Tensor | None = None

    @property
    def held(self) -> bool:
        """Whether the tolerances hold, strictly."""
        return self.regressions <= self.allowed and self.margin_lost <= self.margin_allowed

    @property
    def fires(self) -> bool:
        """Whether the excess is evidence: two standard deviations over what is allowed."""
        by_answers = self.regressions > self.allowed + 2 * math.sqrt(max(self.allowed, 1))
        return by_answers or self.margin_lost > self.margin_allowed + 2 * self.margin_error

    @property
    def hopeless(self) -> bool:
        """Whether so much is lost that what is left is another network."""
        return not self.held and self.margin_lost > HOPELESS

    def violation(self) -> str:
        """What is not held, in words; empty where all is."""
        parts = []
        if self.regressions > self.allowed:
            parts.append(f"{self.regressions} of {self.samples} preservation samples regressed, {self.allowed} allowed")
        if self.margin_lost > self.margin_allowed:
            lost = f"{self.margin_lost:.0%} of the mean margin is lost"
            parts.append(f"{lost}, {self.margin_allowed:.0%} allowed")
        return "; ".join(parts)


def mends(found: Check, history: Sequence[Mapping[str, Any]], checks_left: float) -> bool:
    """Whether all will hold in the end if training goes on as in the last checks.

    Args:
        found: The present look.
        history: Of earlier ones, each with `regressions` and `margin_lost`; the last is last.
        checks_left: Until the end.
    """
    for before in history[-PATIENCE:][:1]:
        times = checks_left / PATIENCE
        broken = found.regressions - times * (before["regressions"] - found.regressions)
        lost = found.margin_lost - times * (before["margin_lost"] - found.margin_lost)
        return broken <= found.allowed and lost <= found.margin_allowed
    return False


def generosity(size: float, held: float, checks_left: float) -> float:
    """Share of the present size to give back, so that equal shares at all checks left lead up to a size that held.

    Args:
        size: Of the model, any unit.
        held: The smallest that held, the same unit; inf where none did.
        checks_left: Until the end.
    """
    if not size < held < math.inf:
        return GIVE_BACK
    return max(GIVE_BACK, (held / size) ** (1 / max(checks_left, 1)) - 1)


def check(model: nn.Module, keep: PreservationSet, tolerance: float, margin_tolerance: float = 1.0) -> Check:
    """Compare the model as it stands with the float model on the preservation set."""
    now = outputs(model, keep.inputs)
    right = answers(keep.outputs) == (keep.targets[:, -1] if keep.targets.dim() == 2 else keep.targets)
    before, after = margins(keep.outputs, keep.targets), margins(now, keep.targets)
    wrong, lost = right & (after <= 0), before - after
    count, mean = int(right.sum()), float(before[right].mean()) if right.any() else 0.0
    share = float(lost[right].mean()) / mean if mean > 0 else 0.0
    error = float(lost[right].std()) / mean / math.sqrt(count) if mean > 0 and count > 1 else 0.0
    may = allowed(tolerance, len(keep))
    return Check(int(wrong.sum()), may, len(keep), share, margin_tolerance, error, lost.clamp_min(0))


def widths(model: nn.Module) -> dict[str, Tensor]:
    """Integer widths of every channel, as real numbers."""
    return {name: layer.weight_quantizer.bits().float() for name, layer in quant_layers(model).items()}


@torch.no_grad()
def set_widths(layers: dict[str, QuantLayer], new: dict[str, Tensor]) -> None:
    """Set the integer widths, and fit the ranges, of the channels that change; the others keep fractions."""
    for name, layer in layers.items():
        depth = layer.weight_quantizer.get_parameter("bit_depth")
        changed = depth.round() != new[name]
        depth.copy_(torch.where(changed, new[name], depth))
        if changed.any():
            layer.weight_quantizer.fit(layer.rows(), changed)


def owned(model: nn.Module, coupling: Coupling, which: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What belongs to channels, by key of the state dict: rows of weights, biases, batch norms and their statistics.

    `which`: layer name -> (C,) bool. Yields (key, (n,) bool).
    """
    ids = torch.zeros(len(coupling.pinned), dtype=torch.bool)
    for name, mask in which.items():
        layer = model.get_submodule(name)
        for part in ("weight", "bias"):
            if isinstance(getattr(layer, part, None), Tensor):
                yield f"{name}.{part}".removeprefix("."), mask
        if name in coupling.produced:
            ids[coupling.produced[name][mask.cpu()]] = True
    for name, of in coupling.norms.items():
        norm = model.get_submodule(name)
        for part in ("weight", "bias", "running_mean", "running_var"):
            if isinstance(getattr(norm, part), Tensor):
                yield f"{name}.{part}", ids[of]


def revive(model: nn.Module, coupling: Coupling, good: dict[str, Tensor], which: dict[str, Tensor]) -> None:
    """Bring removed channels back as they were: weights, biases and batch norms from a snapshot of the state dict.

    `which`: layer name -> (C,) bool. Biases and batch norms of these channels were silenced when they died.
    """
    with torch.no_grad():
        state = model.state_dict()
        for name, mask in owned(model, coupling, which):
            rows = mask.to(state[name].device)
            state[name][rows] = good[name][rows]


def _weight_gradients(model: nn.Module, keep: PreservationSet) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (quantized rows, gradient of the preservation loss by them), in eval mode."""
    layers = quant_layers(model)
    for layer in layers.values():
        layer.probing = True
    try:
        count = min(SAMPLES, len(keep))
        chosen = torch.linspace(0, len(keep) - 1, count).long()
        with as_deployed(model), torch.enable_grad():
            loss = keep.loss(model, chosen)
        probes = {name: layer.probe for name, layer in layers.items() if layer.probe is not None}
        gradients = torch.autograd.grad(loss, list(probes.values()), allow_unused=True)
        return {
            name: (probe.detach().flatten(1), torch.zeros_like(probe).flatten(1) if g is None else g.flatten(1))
            for (name, probe), g in zip(probes.items(), gradients, strict=True)
        }
    finally:
        for layer in layers.values():
            layer.probing, layer.probe = False, None


def restore(
    model: nn.Module,
    coupling: Coupling,
    keep: PreservationSet,
    good: dict[str, Tensor],
    before: dict[str, Tensor],
    share: float = GIVE_BACK,
) -> dict[str, Tensor]:
    """Give bits back to the channels whose loss of them cost most for what they add to the file; in place.

    Past those whose loss seems to have cost something the rest follows, until the share is given: estimates are of
    first order, and what is short at the present size is room, whoever has it.

    Args:
        model: The model that violates the tolerance.
        coupling: Of the model.
        keep: The preservation set.
        good: State dict of the last model that held the tolerance.
        before: Its widths, by layer name.
        share: Of the present size, to give back.

    Returns:
        Layer name -> (C,) bool: the channels that got bits; empty if no channel lost any since.
    """
    layers = quant_layers(model)
    now = widths(model)
    full = {n: torch.maximum(now[n], torch.minimum(before[n].to(now[n]), now[n] + AT_ONCE)) for n in now}
    lost = {name: full[name] - now[name] for name in now}
    if not any(bool((x > 0).any()) for x in lost.values()):
        return {}
    after = _weight_gradients(model, keep)
    held = {k: v.detach().clone() for k, v in model.state_dict().items()}
    set_widths(layers, full)
    revive(model, coupling, good, {name: (now[name] == 0) & (lost[name] > 0) for name in now})
    earlier = _weight_gradients(model, keep)
    model.load_state_dict(held)
    size, more = SizeModel(model, coupling, file=True), torch.cat(list(lost.values()))
    (total, first), (_, further) = (size(torch.cat(list(of.values()))) for of in (now, full))
    # the first bit of a removed channel brings back what its readers hold for it
    first = torch.where(torch.cat(list(now.values())) > 0, further, first)
    added = first * more.clamp(max=1) + further * (more - 1).clamp_min(0)
    prices = dict(zip(now, added.split([len(x) for x in now.values()]), strict=True))
    costs = []
    for name in after:
        (q_now, g_now), (q_full, g_full), price = after[name], earlier[name], prices[name]
        cost = ((g_now + g_full) / 2 * (q_now - q_full)).sum(1) / price.clamp_min(1)
        costs += [(float(cost[i]), name, int(i), float(price[i])) for i in (lost[name] > 0).nonzero().flatten()]
    costs.sort(key=lambda c: (-c[0], c[1], c[2]))
    budget = share * float(total)
    given = {name: torch.zeros_like(now[name], dtype=torch.bool) for name in now}
    for _, name, i, price in costs:
        if budget <= 0:
            break
        given[name][i] = True
        budget -= price
    set_widths(layers, {name: torch.where(given[name], full[name], now[name]) for name in now})
    revive(model, coupling, good, {name: given[name] & (now[name] == 0) for name in now})
    return given
