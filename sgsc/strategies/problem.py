"""What a search chooses among: a prepared model, candidates of each layer, and a loss that judges a choice."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgsc.layers import QuantEmbedding, QuantLayer, quant_layers
from sgsc.preparation import Prepared, alike, prepare, read_beside
from sgsc.quantizers import InputQuantizer, Quantizer
from sgsc.samples import device_of, evaluating, fed, taking

from .biases import Answers, correct_bias, correct_biases, float_answers, give_unseen, mean, mean_inputs, own_biases
from .calibration import Calls, calibrate, count_calls, room
from .data import Batches, Calibration, split
from .folding import Folded, fold_batch_norms
from .registry import INPUTS, WEIGHTS, strategies
from .settings import Loss, StrategySettings, by_sample, check_answers, check_loss, mean_of
from .statistics import InputStatistics

Choice = dict[str, tuple[str, str | None]]  # layer -> strategy of its weight, of its input
MOST_BYTES = 2**28  # of the float network's answers to what mixtures learn from: others are asked for again


class Derived(NamedTuple):
    """A network that a choice stands for, as it may be deployed; `Problem.take` makes it.

    Attributes:
        loss: On the samples that choices are judged by.
        recalibrated: Whether its grids were found behind the chosen layers, and not behind those of one strategy.
        held: Layer -> quantizers of its weight and input.
        biases: Layer -> its bias, where that may be corrected.
    """

    loss: float
    recalibrated: bool
    held: dict[str, tuple[Quantizer, nn.Module | None]]
    biases: dict[str, Tensor]


@dataclass
class Problem:
    """A model whose layers are to get one candidate each.

    Attributes:
        model: Prepared, folded, in evaluation mode; its layers hold what was last `set`.
        layers: Quantized layers in the order in which the network ends with them.
        bits: Layer -> bits of the weight, of the input or None.
        input_strategies: Those that inputs may get, by name.
        fit: Inputs that grids and mixtures are fitted to, in batches.
        select: Inputs that discrete choices are judged by.
        wanted: What the float model answers to each batch of `select`; to those of `fit`, see `answer`.
        float_model: A copy of the one that was given.
        loss: (outputs, wanted) -> scalar, of a batch.
        alone: (outputs, wanted) -> (samples,) losses by themselves; None where these say nothing, see `by_sample`.
        left: Layers and norms that stay float -> why.
        together: The samples of `fit` in batches of as many as there is room for, which calibrate.
        calls: Of the layers, for each of those.
        counts: For each batch of `fit`, layer -> number of its calls.
        weights: Layer -> strategy -> fitted quantizer.
        inputs: Layer -> strategy -> quantizer; empty for embeddings, and where inputs stay float.
        answers: Of the float network, for each batch of `fit`; of layers whose biases may be corrected.
        biases: The same layers -> their biases as they were.
        added: Those among them that had none, and were given zeros.
        learns: Names of the model's own parameters that were not frozen when it was given.
        answered: Place of a batch of `fit` -> what the float model answers, of the first that there is room for.
        place: Of the batch that `looks` is at.
    """

    model: nn.Module
    layers: dict[str, QuantLayer]
    bits: dict[str, tuple[int, int | None]]
    input_strategies: Mapping[str, Any]
    fit: Batches
    select: Batches
    wanted: list[Tensor]
    float_model: nn.Module
    loss: Loss
    alone: Loss | None
    left: dict[str, str]
    together: Batches
    calls: Calls
    counts: list[dict[str, int]] = field(default_factory=list)
    weights: dict[str, dict[str, Quantizer]] = field(default_factory=dict)
    inputs: dict[str, dict[str, InputQuantizer]] = field(default_factory=dict)
    answers: list[Answers] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    learns: list[str] = field(default_factory=list)
    answered: dict[int, Tensor] = field(default_factory=dict)
    place: int = 0

    def set(self, choice: Choice, bias: Tensor | None = None) -> None:
        """Give every layer the candidates of that choice, and its bias as it was or that one."""
        for name, (weight, given) in choice.items():
            self.layers[name].weight_quantizer = self.weights[name][weight]
            self.layers[name].input_quantizer = None if given is None else self.inputs[name][given]
            if name in self.biases:
                self.layers[name].bias.copy_(self.biases[name] if bias is None else bias)  # pyright: ignore

    def uniform(self, weight: str, given: str | None) -> Choice:
        """The choice of one pair of strategies in all layers."""
        return {name: (weight, given if self.inputs.get(name) else None) for name in self.layers}

    @torch.no_grad()
    def looks(self) -> Iterator[tuple[Tensor, Tensor, int]]:
        """What the model as it stands answers to each batch of `select`, what is wanted, and its samples."""
        with evaluating(self.model):
            for place, (x, wanted) in enumerate(zip(self.select, self.wanted, strict=True)):
                self.place = place
                yield self.model(fed(self.model, x)), wanted, len(x)

    @torch.no_grad()  # a user's loss may have parameters
    def losses(self) -> Tensor:
        """(samples,) float64: the loss of each sample of `select` by the model as it stands, or that of its batch."""
        judge = self.alone or (lambda outputs, wanted: self.loss(outputs, wanted).reshape(1))
        return torch.cat([judge(y, wanted).expand(count) for y, wanted, count in self.looks()]).cpu().double()

    def judge(self) -> float:
        """Mean of `losses`; infinite where it is NaN."""
        return mean_loss(self.losses())

    @torch.no_grad()
    def answer(self, place: int, x: Tensor) -> Tensor:
        """What the float model answers to `x`, that batch of `fit`."""
        if place in self.answered:
            return self.answered[place]
        with evaluating(self.float_model):
            return self.float_model(fed(self.float_model, x))

    def fitted(self, name: str, strategy: str, seen: InputStatistics) -> InputQuantizer:
        """The input quantizer that a strategy gives a layer, where the layer is.

        Raises:
            ValueError: If it finds no grid.
        """
        try:
            made = self.input_strategies[strategy].fitted(seen, self.bits[name][1])
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"strategy {strategy!r} finds no grid for the input of layer {name!r}: {error}") from None
        return made.to(self.layers[name].weight.device)

    def calibrate(self, choose: Callable[[str, InputStatistics], InputQuantizer]) -> None:
        """Give every layer an input quantizer, in the order of the network, from the samples of `fit`."""
        if any(given is not None for _, given in self.bits.values()):
            calibrate(self.model, self.together, choose, self.calls)

    def recalibrate(self, choice: Choice) -> None:
        """Set a choice, each layer calibrated on what the chosen ones before it give it."""
        self.set(choice)

        def choose(name: str, seen: InputStatistics) -> InputQuantizer:
            given = choice[name][1]
            assert given is not None  # calibrate leaves embeddings out, and `bits` says that the rest has inputs
            return self.fitted(name, given, seen)

        self.calibrate(choose)

    def derive(self, choice: Choice, recalibrate: bool = True) -> Derived:
        """Set a choice as it is best on the samples of `select`, corrected or not, recalibrated or not.

        Either may be for the worse: grids and biases are found on other samples, and know nothing of the loss.
        """
        found: list[Derived] = []
        for again in (False, True) if recalibrate and any(self.inputs.values()) else (False,):
            if again:
                try:
                    self.recalibrate(choice)
                except ValueError:  # rounded so, a network that decides by its data no longer calls some layer
                    continue
            else:
                self.set(choice)
            found.append(self.as_it_stands(self.judge(), again))
            if self.biases:
                correct_biases(self.model, self.layers, self.answers, self.fit)
                found.append(self.as_it_stands(self.judge(), again))
        best = min(found, key=lambda derived: derived.loss)
        self.take(best)
        return best

    def as_it_stands(self, loss: float, recalibrated: bool = False) -> Derived:
        """The network that the model now is."""
        held = {name: (layer.weight_quantizer, layer.input_quantizer) for name, layer in self.layers.items()}
        biases = {name: bias for name in self.biases if (bias := self.bias(name)) is not None}
        return Derived(loss, recalibrated, held, biases)

    def take(self, derived: Derived) -> None:
        """Make the model that network."""
        for name, (weight, given) in derived.held.items():
            self.layers[name].weight_quantizer, self.layers[name].input_quantizer = weight, given
        for name, bias in derived.biases.items():
            self.layers[name].bias.copy_(bias)  # pyright: ignore  it has one

    def bias(self, name: str) -> Tensor | None:
        """A copy of a layer's bias, where that may be corrected."""
        return self.layers[name].bias.clone() if name in self.biases else None  # pyright: ignore

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """Layer -> (C,) mean of its `answers`, where it has any."""
        means = {name: mean([of for answers in self.answers for of in answers[name]]) for name in self.biases}
        return {name: value for name, value in means.items() if value is not None}

    def given_to(self, name: str) -> dict[str | None, Tensor | None]:
        """The `mean_inputs` of a layer on `fit`, by candidate; nothing where its bias is not corrected."""
        if name not in self.means:
            return {}
        quantizers = self.inputs.get(name) or {None: None}
        return mean_inputs(self.model, name, self.layers[name], quantizers, self.fit, self.counts)

    def correct(self, name: str, choice: tuple[str, str | None], given: Mapping[str | None, Tensor | None]) -> None:
        """Correct the bias of one layer that has these candidates and is `given_to` this."""
        if given:
            correct_bias(self.layers[name], self.means[name], given[choice[1]])


def mean_loss(losses: Tensor) -> float:
    """Of all samples; infinite where it is NaN."""
    loss = losses.mean().item()
    return math.inf if math.isnan(loss) else loss  # -inf is a loss too, of equal answers


def make_problem(
    network: nn.Module, calibration: Calibration, settings: StrategySettings, fold: bool = True
) -> Problem:
    """Fold, prepare, and find every candidate's grid; see `search_strategies` for network and data.

    The start of all inputs is the strategy `mse`, or the first that was named: what the layers before give a layer when
    its candidates find their grids. Layers `added` to those with a bias keep it: `take_back` takes those of zeros.

    Raises:
        ValueError: If the calibration data, the model or a setting cannot be served.
    """
    network = copy.deepcopy(network)  # some count their calls
    judge = mean_of(settings.loss)
    of_weights = strategies(WEIGHTS, settings.weights, settings.trained)
    of_inputs = strategies(INPUTS, settings.inputs, settings.trained)
    to_fit, to_select = split(calibration, network, settings)
    device = device_of(network)
    fit, select = (Batches(samples, settings.batch_size, device) for samples in (to_fit, to_select))
    answered: dict[int, Tensor] = {}
    free = 0 if settings.trained else MOST_BYTES  # trainings have a loss of their own
    with torch.no_grad(), evaluating(network):
        first = _answer(network, fit[0], settings.loss)
        for place, x in enumerate(fit):
            answer = first if place == 0 else _answer(network, x, settings.loss)
            free -= answer.nbytes
            if free >= 0:
                answered[place] = answer.clone()  # it may be a view of much more
        wanted = [_answer(network, x, settings.loss) for x in select]
        check_loss(judge, first)
        alone = by_sample(settings.loss, wanted, [len(x) for x in select])
    folded = _folded(network, fit[0], first) if fold else Folded(network, (), {})
    prepared = _prepared(folded.model, settings.skip, fit[0])
    quantizers = {id(p) for layer in quant_layers(prepared.model).values() for p in layer.weight_quantizer.parameters()}
    learns = [n for n, p in prepared.model.named_parameters() if p.requires_grad and id(p) not in quantizers]
    model = prepared.model.eval().requires_grad_(False)
    found = quant_layers(model)
    together = Batches(to_fit, room(model, found, fit[0]), device)
    calls = count_calls(model, found, together).of_all()
    edges = {calls.first[0], calls.last[-1]}
    layers = {name: found[name] for name in calls.last}
    bits = {name: settings.bits(name in edges) for name in layers}
    for name, layer in layers.items():
        if isinstance(layer, QuantEmbedding):
            bits[name] = bits[name][0], None
    left = {**folded.left, **{k: v for k, v in prepared.left.items() if k not in folded.left}}
    problem = Problem(model, layers, bits, of_inputs, fit, select, wanted, network, judge, alone, left, together, calls)
    problem.learns, problem.answered = learns, answered
    if settings.correct_bias and not settings.trained:
        problem.added = give_unseen(model, layers, fit[0], first)
        problem.biases = {name: layers[name].bias.clone() for name in own_biases(model, layers)}  # pyright: ignore
        problem.answers = float_answers(model, layers, list(problem.biases), fit)
        problem.counts = count_calls(model, layers, fit).counts
    for name, layer in layers.items():
        problem.weights[name] = _fitted_weights(name, layer, of_weights, bits[name][0], settings.per_channel)
        layer.weight_quantizer = problem.weights[name][_start(of_weights)]

    def choose(name: str, seen: InputStatistics) -> InputQuantizer:
        problem.inputs[name] = {strategy: problem.fitted(name, strategy, seen) for strategy in of_inputs}
        return problem.inputs[name][_start(of_inputs)]

    problem.calibrate(choose)
    return problem


def _start(known: Mapping[str, Any]) -> str:
    """The strategy that layers have while others find their grids."""
    return "mse" if "mse" in known else next(iter(known))


def _fitted_weights(
    name: str, layer: QuantLayer, known: Mapping[str, Any], bits: int, per_channel: bool
) -> dict[str, Quantizer]:
    """Strategy -> the quantizer of a layer's weight that it gives.

    Raises:
        ValueError: If one finds no grid, or none that is finite.
    """
    found: dict[str, Quantizer] = {}
    for strategy, cls in known.items():
        made = cls(layer.weight.shape[0], bits, per_channel).to(layer.weight.device)
        try:
            made.fit(layer.rows())
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        if not all(torch.isfinite(part).all() for part in made.grid()):
            raise ValueError(f"strategy {strategy!r} finds a grid that is not finite for layer {name!r}")
        found[strategy] = made
    return found


def _answer(network: nn.Module, x: Tensor, loss: str | Loss) -> Tensor:
    with taking(x, "the calibration data"):
        outputs = network(fed(network, x))
    check_answers(outputs, loss)
    return outputs


def _prepared(network: nn.Module, skip: Iterable[str], x: Tensor) -> Prepared:
    """As `prepare`, but layers stay float whose weight is read beside calling them."""
    prepared = prepare(network, quantizer="lsq8", skip=skip)
    beside = read_beside(prepared.model, network, x)
    if not beside:
        return prepared
    known = dict(network.named_modules())
    beside = [name if name in known else name.rpartition(".")[0] for name in beside]  # a projection of an attention
    prepared = prepare(network, quantizer="lsq8", skip=[*skip, *map(re.escape, beside)])
    why = "its weight is read beside calling it, as where embedding and output are tied"
    return prepared._replace(left=prepared.left | dict.fromkeys(beside, why))


def _folded(network: nn.Module, x: Tensor, wanted: Tensor) -> Folded:
    """Norms folded, unless the network then answers otherwise: its graph cannot tell everything."""
    folded = fold_batch_norms(network)
    if folded.folded:
        with torch.no_grad():
            answers = folded.model(fed(network, x))
        if not alike(answers, wanted):
            why = dict.fromkeys(folded.folded, "folded, the network answers otherwise")
            return Folded(network, (), {**folded.left, **why})  # `prepare` copies it
    return folded
