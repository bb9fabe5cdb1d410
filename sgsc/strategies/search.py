"""`search_strategies`: without retraining, from a network and calibration data to one of the best strategy a layer.

A mixture of roundings has less error than any of them, so the relaxed loss is optimistic, and its winner need not be
the best network. So the mixture only proposes: temperature and entropy close it, and its argmax is judged on its way
as the discrete network that it stands for, on samples that neither grids nor mixture have seen. From the best of them
one greedy pass goes through the layers, and another from the best uniform choice; the better of the two is the result,
which therefore is never worse, on those samples, than the best uniform choice and than greed alone.

The constants were tried on the digits network at 2 and 3 bits: no rate, temperature or weight of the entropy was best
there, and the last argmax was up to six times as bad as the best on its way. Drawing one candidate a layer instead of
mixing was better at two bits of weights, and lost the network at two bits of inputs.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgsc.layers import QuantLayer, quant_layers
from sgsc.samples import fed

from .biases import round_biases, take_back
from .data import Calibration
from .mixture import MixedInput, MixedWeights, entropy, mixtures, set_temperature
from .problem import Choice, Derived, Problem, make_problem, mean_loss
from .settings import check_steps, settings_of
from .settled import Settled

Progress = Callable[[str, int, int, dict[str, float]], None]
Shares = dict[str, tuple[dict[str, float], dict[str, float]]]  # layer -> candidate -> share, of weight, of input

RATE = 0.1  # of Adam, on logits
COLDEST = 0.1  # temperature of the last step; the first has 1
LOOKS = 8  # times that the argmax is judged
SHARP = 0.1  # weight of the entropy at the last step, in units of the first loss, whatever its sign; the first has 0

# settings that the report repeats
KEPT = ("bits_weights", "bits_activations", "edge_bits", "per_channel", "seed")


@dataclass
class Strategies:
    """What a search came to.

    Attributes:
        model: The derived network, prepared; `pack` it. Its file loads into `fold_batch_norms` of the network, or into
            the network itself where `report["left"]` says that, folded, it answers otherwise.
        choice: Layer -> (strategy of its weight, of its input or None).
        loss: On the samples that choices were judged by.
        origin: "mixture", or "greedy" where the mixture's way ended at a worse network.
        report: The evidence, JSON-able.
        greedy: What greed alone ends with, from the best uniform choice; before biases are whole numbers the result is
            no worse.
        uniform: The best uniform choice's strategies.
    """

    model: nn.Module
    choice: Choice
    loss: float
    origin: str
    report: dict[str, Any]
    greedy: Derived
    uniform: tuple[str, str | None]


@torch.inference_mode(False)
@torch.enable_grad()
def search_strategies(
    model: nn.Module,
    calibration: Calibration,
    *,
    steps: int = 100,
    integer_bias: bool = False,
    progress: Progress = lambda phase, step, steps, values: None,
    **settings: Any,
) -> Strategies:
    """Find, without retraining, the quantization strategy of each layer's weight and input.

    Args:
        model: Trained, in float; it is left as it is. Batch norms are folded where its graph allows it.
        calibration: Inputs, (samples, ...), or batches of them, of the kind that the model will see; of batches of
            inputs and targets, as a DataLoader gives them, the inputs are taken.
        steps: Of Adam on the mixture.
        integer_bias: Round biases to steps of the int32 sums of integer kernels (ours need no such rounding); the loss
            is that of rounded biases.
        progress: Called as progress(phase, step, steps, values).
        settings: Fields of StrategySettings: bits_weights=4, bits_activations=8, edge_bits=8, per_channel=True,
            weights, inputs, skip, loss="kl", select_share=0.5, batch_size=64, correct_bias=True, seed=0.

    Raises:
        ValueError: If the calibration data is empty, not finite or of another dtype than the model, a layer is never
            called or cannot be quantized, or an argument is out of its range.
    """
    check_steps(steps, 0)
    wanted = settings_of(False, settings)
    started = time.perf_counter()
    problem = make_problem(model, calibration, wanted)
    clock = {"calibration": time.perf_counter() - started}
    uniforms = try_uniforms(problem, progress)
    best = min(uniforms, key=lambda pair: uniforms[pair])
    if uniforms[best] == math.inf:
        raise ValueError(
            f"with none of {len(uniforms)} pairs of strategies the loss is finite; give more bits, or look for values "
            f"that {next(problem.model.parameters()).dtype} cannot hold"
        )
    clock["uniform"] = time.perf_counter() - started - sum(clock.values())
    problem.set(problem.uniform(*best))  # biases as they were: the mixture's errors are not those of any choice
    proposed, shares, course = train_mixture(problem, steps, wanted.seed, progress)
    problem.answered.clear()  # nobody else asks
    clock["mixture"] = time.perf_counter() - started - sum(clock.values())
    ends = {
        "greedy": greedy(problem, problem.uniform(*best), progress, "greedy pass from the best uniform"),
        "mixture": greedy(problem, proposed, progress, "greedy pass from the mixture"),
    }
    clock["greedy"] = time.perf_counter() - started - sum(clock.values())
    origin = min(ends, key=lambda name: (ends[name].loss, name == "greedy"))
    end = ends[origin]
    derived = end.network
    problem.take(derived)
    result, left_biases = derived.loss, 0
    corrected = any(not torch.equal(bias, problem.biases[name]) for name, bias in derived.biases.items())
    if integer_bias:
        left_biases = round_biases(problem.model, problem.added)
        result = problem.judge()
    added = take_back(problem.layers, problem.added)
    layers = [
        row | {"weight_losses": end.losses[row["name"]][0], "input_losses": end.losses[row["name"]][1]}
        for row in layer_rows(problem.layers, end.choice, problem.bits, shares)
    ]
    report = {
        **{key: getattr(wanted, key) for key in KEPT},
        **{
            "judged_by": wanted.loss if isinstance(wanted.loss, str) else getattr(wanted.loss, "__name__", "a function")
        },
        **{"correct_bias": wanted.correct_bias, "steps": steps, "samples_fit": problem.fit.samples},
        **{"samples_select": problem.select.samples, "origin": origin, "loss": result, "left": problem.left},
        **{"uniform": [{"weight": w, "input": a, "loss": v} for (w, a), v in uniforms.items()]},
        **{"best_uniform": list(best), "best_uniform_loss": uniforms[best], "greedy_loss": ends["greedy"].loss},
        **{"mixture_argmax_loss": ends["mixture"].start, "mixture_greedy_loss": ends["mixture"].loss},
        **{"recalibrated": derived.recalibrated, "biases_corrected": corrected, "biases_left": left_biases},
        **{"biases_added": len(added), "beyond_chance": problem.alone is not None},
        **{"course": course, "layers": layers},
        **{"seconds_by_phase": clock, "seconds": time.perf_counter() - started},
    }
    for layer in problem.layers.values():  # what is derived is independent of what was tried
        layer.weight_quantizer = copy.deepcopy(layer.weight_quantizer)
        layer.input_quantizer = copy.deepcopy(layer.input_quantizer)
    return Strategies(problem.model, end.choice, result, origin, report, ends["greedy"].network, best)


def layer_rows(
    layers: Mapping[str, QuantLayer], choice: Choice, bits: Mapping[str, tuple[int, int | None]], shares: Shares
) -> list[dict[str, Any]]:
    """What a report says of each layer: its strategies, their bits, what the candidates came to, and its size."""
    return [
        {
            **{"name": name, "weight": choice[name][0], "input": choice[name][1]},
            **{"bits_weight": bits[name][0], "bits_input": bits[name][1]},
            **{"weight_shares": shares[name][0], "input_shares": shares[name][1]},
            **{"rows": layer.weight.shape[0], "width": layer.weight[0].numel()},
        }
        for name, layer in layers.items()
    ]


def try_uniforms(problem: Problem, progress: Progress) -> dict[tuple[str, str | None], float]:
    """Each pair of strategies in all layers -> loss."""
    of_weights = list(next(iter(problem.weights.values())))
    of_inputs: list[str | None] = list(problem.input_strategies) if any(problem.inputs.values()) else [None]
    pairs = [(w, a) for w in of_weights for a in of_inputs]
    found = {}
    for place, pair in enumerate(pairs):
        found[pair] = problem.derive(problem.uniform(*pair), recalibrate=False).loss
        progress("uniform strategies", place + 1, len(pairs), {"least loss": min(found.values())})
    return found


def train_mixture(
    problem: Problem, steps: int, seed: int, progress: Progress
) -> tuple[Choice, Shares, list[dict[str, float]]]:
    """Adam on the shares alone: (best argmax on its way, last shares, losses)."""
    model = copy.deepcopy(problem.model)
    layers = quant_layers(model)
    for name, layer in layers.items():
        layer.weight_quantizer = MixedWeights(problem.weights[name], layer.rows())
        layer.input_quantizer = MixedInput(problem.inputs[name]) if problem.inputs.get(name) else None
    logits = [m.logits for m in mixtures(model)]
    optimiser = torch.optim.Adam(logits, lr=RATE)
    draw, course, first = torch.Generator().manual_seed(seed), [], None
    judged: list[tuple[float, Choice]] = []
    for step in range(steps):
        part = step / max(steps - 1, 1)
        set_temperature(model, COLDEST**part)
        place = int(torch.randint(len(problem.fit), (1,), generator=draw))
        x = problem.fit[place]
        loss = problem.loss(model(fed(model, x)), problem.answer(place, x))
        sharp = entropy(model)
        if math.isfinite(loss.item()):  # else nothing is to be learned from this step
            first = abs(loss.item()) if first is None else first
            optimiser.zero_grad()
            (loss + SHARP * first * part * sharp).backward()
            optimiser.step()
        course.append({"step": step, "loss": loss.item(), "entropy": sharp.item()})
        if (step + 1) * LOOKS // steps > step * LOOKS // steps:
            choice = leading(layers)
            if choice not in [c for _, c in judged]:
                judged.append((problem.derive(choice, recalibrate=False).loss, choice))
        progress("mixture", step + 1, steps, {"loss": loss.item(), "entropy": sharp.item()})
    choice = min(judged, key=lambda pair: pair[0])[1] if judged else leading(layers)
    return {name: choice[name] for name in problem.layers}, shares_in(layers), course


def leading(layers: dict[str, QuantLayer]) -> Choice:
    """The names of the leading candidates of mixtures."""
    found: Choice = {}
    for name, layer in layers.items():
        weight, given = layer.weight_quantizer, layer.input_quantizer
        assert isinstance(weight, MixedWeights)
        other = given.names[given.leading()] if isinstance(given, MixedInput) else None
        found[name] = weight.names[weight.leading()], other
    return found


def shares_in(layers: dict[str, QuantLayer]) -> Shares:
    """Of all layers."""
    return {
        name: (shares_of(layer.weight_quantizer), shares_of(layer.input_quantizer)) for name, layer in layers.items()
    }


def shares_of(mixed: Any) -> dict[str, float]:
    """Candidate -> share, of a mixture; empty of anything else."""
    is_mixture = isinstance(mixed, (MixedWeights, MixedInput))
    return dict(zip(mixed.names, mixed.shares().tolist(), strict=True)) if is_mixture else {}


@dataclass
class Pass:
    """A greedy pass: where it started and ended, and what each candidate of a layer would have given at its turn."""

    choice: Choice
    start: float
    loss: float
    losses: dict[str, tuple[dict[str, float], dict[str, float]]]
    network: Derived = field(compare=False)


def greedy(problem: Problem, start: Choice, progress: Progress, phase: str) -> Pass:
    """Once through the layers: each candidate of each is tried in turn, and kept where the loss falls beyond chance.

    A candidate comes with the bias that makes up for its own mean error: a choice by what errors happen to cancel on
    few samples would not last. Nor would leads within their standard error: many small ones fit the samples (ResNet-20
    at W4A8, judged by 64 images: with every lead the divergence is 0.009, 0.011 and 0.017 nats there and 0.032, 0.028
    and 0.027 on 1,500 others, three draws; with leads of more than one error 0.011, 0.018, 0.029 and 0.029, 0.023,
    0.025; of more than two 0.031, 0.023, 0.024 on the others).
    """
    choice, better = dict(start), ahead if problem.alone else less
    first = problem.derive(choice, recalibrate=False).loss
    best = problem.losses()
    losses: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    with Settled(problem) as settled:
        for place, name in enumerate(problem.layers):
            losses[name] = ({}, {})
            with settled.aside():
                given = problem.given_to(name)
            bias = problem.bias(name)
            if given:  # what the layers before now give it asks for another bias
                problem.correct(name, choice[name], given)
                found = problem.losses()
                if better(found, best):
                    best, bias = found, problem.bias(name)
            for side, candidates in enumerate((problem.weights[name], problem.inputs.get(name, {}))):
                now = mean_loss(best)
                known = [(grid_of(candidates[choice[name][side]]), now)] if candidates else []  # pyright: ignore
                for strategy, quantizer in candidates.items():
                    grid = grid_of(quantizer)
                    loss = next((v for g, v in known if torch.equal(g, grid)), None)
                    if loss is None:
                        pair = (strategy, choice[name][1]) if side == 0 else (choice[name][0], strategy)
                        problem.set({name: pair})
                        problem.correct(name, pair, given)
                        found = problem.losses()
                        loss = mean_loss(found)
                        known.append((grid, loss))
                        if better(found, best):
                            best, choice[name], bias = found, pair, problem.bias(name)
                    losses[name][side][strategy] = loss
                problem.set({name: choice[name]}, bias)
            settled.add(name)
            progress(phase, place + 1, len(problem.layers), {"loss": mean_loss(best)})
    found = problem.as_it_stands(mean_loss(best))
    # grids were found behind layers of one strategy; now they may be found behind those that are chosen
    network = min(found, problem.derive(choice), key=lambda derived: derived.loss)
    return Pass(choice, first, network.loss, losses, network)


def less(losses: Tensor, best: Tensor) -> bool:
    """Whether (samples,) losses are less than the best ones in the mean: losses of batches do not tell chance."""
    return mean_loss(losses) < mean_loss(best)


def ahead(losses: Tensor, best: Tensor) -> bool:
    """Whether (samples,) losses are below the best ones by more than one standard error of the mean difference.

    The rule of Breiman et al., Classification and Regression Trees, 1984. That of one sample counts as 0.
    """
    leads = best - losses
    lead = leads.mean()
    if not lead.isfinite():
        return less(losses, best)
    return bool(lead > leads.std(correction=0) / max(len(leads) - 1, 1) ** 0.5)


def grid_of(quantizer: Any) -> Tensor:
    """The grid as one tensor: quantizers of equal grids are one candidate."""
    return torch.stack([t.detach() for t in quantizer.grid()])
