"""What a search chooses among: a prepared model, candidates of each layer, and a loss that judges a choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc.layers import QuantEmbedding, QuantLayer, quant_layers
from sgsc.preparation import prepare
from sgsc.quantizers import InputQuantizer, Quantizer
from sgsc.samples import device_of, evaluating

from .calibration import calibrate
from .folding import Folded, fold_batch_norms
from .registry import INPUTS, WEIGHTS, check_bits, strategies
from .statistics import InputStatistics

Loss = Callable[[Tensor, Tensor], Tensor]
Choice = dict[str, tuple[str, str | None]]  # layer -> strategy of its weight, of its input


def divergence(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL divergence, in nats, of the answers of `outputs` from those of `wanted`, logits (..., classes) both."""
    got, of = (t.flatten(0, -2).float().log_softmax(-1) for t in (outputs, wanted))
    return F.kl_div(got, of, reduction="batchmean", log_target=True)


def distance(outputs: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference, for outputs that are images or other real numbers."""
    return (outputs - wanted).abs().mean()


LOSSES: dict[str, Loss] = {"kl": divergence, "l1": distance}


@dataclass
class Problem:
    """A model whose layers are to get one candidate each.

    Attributes:
        model: Prepared, folded, in evaluation mode; its layers hold what was last `set`.
        layers: Quantized layers in the order in which the network calls them.
        weights: Layer -> strategy -> fitted quantizer.
        inputs: Layer -> strategy -> quantizer; empty for embeddings, and where inputs stay float.
        bits: Layer -> bits of the weight, of the input or None.
        fit: Inputs that grids and mixtures are fitted to, in batches.
        select: Inputs that discrete choices are judged by.
        wanted: What the float model answers to each batch of `fit`, then of `select`.
        loss: (outputs, wanted) -> scalar.
        left: Layers and norms that stay float -> why.
    """

    model: nn.Module
    layers: dict[str, QuantLayer]
    weights: dict[str, dict[str, Quantizer]]
    bits: dict[str, tuple[int, int | None]]
    input_strategies: Mapping[str, Any]
    fit: list[Tensor]
    select: list[Tensor]
    wanted: tuple[list[Tensor], list[Tensor]]
    loss: Loss
    left: dict[str, str]
    at_once: int
    inputs: dict[str, dict[str, InputQuantizer]] = field(default_factory=dict)
    place: int = 0  # of the batch that `judge` is at

    def set(self, choice: Choice) -> None:
        """Give every layer the candidates of that choice."""
        for name, (weight, given) in choice.items():
            self.layers[name].weight_quantizer = self.weights[name][weight]
            self.layers[name].input_quantizer = None if given is None else self.inputs[name][given]

    def uniform(self, weight: str, given: str | None) -> Choice:
        """The choice of one pair of strategies in all layers."""
        return {name: (weight, given if self.inputs.get(name) else None) for name in self.layers}

    @torch.no_grad()
    def judge(self) -> float:
        """Mean loss of the model as it stands over the samples of `select`."""
        total, count = 0.0, 0
        with evaluating(self.model):
            for place, (x, wanted) in enumerate(zip(self.select, self.wanted[1], strict=True)):
                self.place = place
                total += len(x) * self.loss(self.model(x), wanted).item()
                count += len(x)
        return total / count

    def calibrate(self, choose: Callable[[str, InputStatistics], InputQuantizer]) -> None:
        """Give every layer an input quantizer, in the order of the network, from the samples of `fit`."""
        if any(given is not None for _, given in self.bits.values()):
            calibrate(self.model, joined(self.fit, self.at_once), choose)

    def recalibrate(self, choice: Choice) -> None:
        """Set a choice, each layer calibrated on what the chosen ones before it give it."""
        self.set(choice)

        def choose(name: str, seen: InputStatistics) -> InputQuantizer:
            given = choice[name][1]
            assert given is not None  # calibrate leaves embeddings out, and `bits` says that the rest has inputs
            return self.input_strategies[given].fitted(seen, self.bits[name][1])

        self.calibrate(choose)


def make_problem(
    network: nn.Module,
    calibration: Tensor | Sequence[Tensor],
    *,
    bits_weights: int,
    bits_activations: int | None,
    edge_bits: int | None = 8,
    per_channel: bool = True,
    weights: Iterable[str] | None = None,
    inputs: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    loss: str | Loss = "kl",
    select_share: float = 0.25,
    batch_size: int = 64,
    at_once: int = 512,
    seed: int = 0,
    fold: bool = True,
    trained: bool = False,
) -> Problem:
    """Fold, prepare, and find every candidate's grid; see `search_strategies` for the arguments.

    The start of all inputs is the strategy `mse`, or the first that was named: what the layers before give a layer when
    its candidates find their grids.

    Raises:
        ValueError: If the calibration data, the model or an argument cannot be served.
    """
    check_bits(bits_weights)
    if bits_activations is not None:
        check_bits(bits_activations)
    judge = LOSSES.get(loss) if isinstance(loss, str) else loss
    if judge is None:
        raise ValueError(f"loss={loss!r} is not known; choose one of {', '.join(LOSSES)}, or pass a function")
    of_weights, of_inputs = strategies(WEIGHTS, weights, trained), strategies(INPUTS, inputs, trained)
    fit, select = split(calibration, network, select_share, batch_size, seed)
    folded = fold_batch_norms(network) if fold else Folded(copy.deepcopy(network).eval(), (), {})
    with torch.no_grad(), evaluating(folded.model):
        wanted = [folded.model(x) for x in fit], [folded.model(x) for x in select]
    for outputs in (y for part in wanted for y in part):
        if not isinstance(outputs, Tensor) or not torch.isfinite(outputs).all():
            said = "NaN or infinity" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}, not a tensor"
            raise ValueError(f"the float model answers {said} on the calibration data; there is nothing to be close to")
    prepared = prepare(folded.model, quantizer="lsq8", skip=skip)
    model = prepared.model.eval().requires_grad_(False)
    found = quant_layers(model)
    order = calibrate(model, joined(fit, at_once), _never, observe=False)
    layers = {name: found[name] for name in order}
    bits = dict.fromkeys(layers, (bits_weights, bits_activations))
    if edge_bits is not None:
        edge = check_bits(edge_bits)
        for name in (order[0], order[-1]):
            bits[name] = max(edge, bits_weights), None if bits_activations is None else max(edge, bits_activations)
    for name, layer in layers.items():
        if isinstance(layer, QuantEmbedding):
            bits[name] = bits[name][0], None
    problem = Problem(
        *(model, layers, {}, bits, of_inputs, fit, select, wanted, judge),
        left={**folded.left, **{k: v for k, v in prepared.left.items() if k not in folded.left}},
        at_once=at_once,
    )
    for name, layer in layers.items():
        problem.weights[name] = {}
        for strategy, cls in of_weights.items():
            made = cls(layer.weight.shape[0], bits[name][0], per_channel).to(layer.weight.device)
            try:
                made.fit(layer.rows())
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}") from None
            problem.weights[name][strategy] = made
        layer.weight_quantizer = problem.weights[name]["mse" if "mse" in of_weights else next(iter(of_weights))]
    start = "mse" if "mse" in of_inputs else next(iter(of_inputs))

    def choose(name: str, seen: InputStatistics) -> InputQuantizer:
        width = bits[name][1]
        assert width is not None
        device = layers[name].weight.device
        problem.inputs[name] = {s: cls.fitted(seen, width).to(device) for s, cls in of_inputs.items()}
        return problem.inputs[name][start]

    problem.calibrate(choose)
    return problem


def _never(name: str, seen: InputStatistics) -> InputQuantizer:
    raise AssertionError(name)


def joined(batches: Sequence[Tensor], at_once: int) -> list[Tensor]:
    """The same samples in batches of up to `at_once`, where their shapes allow it."""
    groups: list[list[Tensor]] = []
    for batch in batches:
        last = groups[-1] if groups else []
        if last and last[0].shape[1:] == batch.shape[1:] and sum(map(len, last)) + len(batch) <= at_once:
            last.append(batch)
        else:
            groups.append([batch])
    return [torch.cat(group) for group in groups]


def split(
    calibration: Tensor | Sequence[Tensor], network: nn.Module, select_share: float, batch_size: int, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Batches to fit to and batches to select by, on the network's device; a single sample serves both.

    Raises:
        ValueError: If there is no sample, one holds NaN or infinity or is of another dtype than the network, or an
            argument is out of its range.
    """
    if not 0 < select_share < 1 or batch_size < 1:
        raise ValueError(
            f"select_share={select_share}, batch_size={batch_size}: want a share of 1, and 1 sample or more"
        )
    batches = list(calibration.split(1)) if isinstance(calibration, Tensor) and calibration.dim() else list(calibration)
    batches = [b for b in batches if isinstance(b, Tensor) and b.numel()] if _tensors(batches) else []
    if not batches:
        raise ValueError("no calibration data: want a tensor (samples, ...) of inputs, or a list of such batches")
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
    for place, batch in enumerate(batches):
        if batch.is_floating_point() and not torch.isfinite(batch).all():
            what = "sample" if isinstance(calibration, Tensor) else "batch"
            raise ValueError(f"calibration data: {what} {place} holds NaN or infinity; take it out")
        if batch.is_floating_point() and batch.dtype != dtype:
            raise ValueError(
                f"calibration data is {batch.dtype}, the model {dtype}; convert it with .to({dtype}), or the model"
            )
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    device, count = device_of(network), max(round(select_share * len(batches)), 1)
    moved = [batches[i].to(device) for i in order]
    parts = (moved[count:], moved[:count]) if len(moved) > 1 else (moved, moved)
    return joined(parts[0], batch_size), joined(parts[1], batch_size)


def _tensors(batches: list[Any]) -> bool:
    for batch in batches:
        if not isinstance(batch, Tensor) or not batch.dim():
            raise ValueError(f"calibration data: a batch is a {type(batch).__name__}; want tensors (samples, ...)")
    return True
