"""All that is known before the first trial: sensitivity, space, costs and baselines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sgsc.layers import quant_layers
from sgsc.samples import taking

from .baselines import greedy, integer_program, narrowed, uniform
from .candidates import parent_of
from .cost import Budget, Configuration, CostModel
from .sensitivity import Loss, Progress, Sensitivity, sensitivity
from .space import BITS, Space, make_space
from .structure import Structure, structure_of


@dataclass
class Problem:
    """All that is known before the first trial."""

    parent: nn.Module
    structure: Structure
    cost: CostModel
    found: Sensitivity
    space: Space
    budget: Budget
    baselines: dict[str, Configuration]
    asked: dict[tuple[Any, ...], bool] = field(default_factory=dict, repr=False)

    def feasible(self, params: Mapping[str, Any]) -> bool:
        """Whether parameters are within the budget; remembered, since after each trial all of a study are asked of."""
        key = tuple(params[name] for name in self.space.windows)
        if key not in self.asked:
            self.asked[key] = self.budget.holds(self.cost(self.space.configuration(params), self.budget.limits()))
        return self.asked[key]

    @property
    def monotone(self) -> tuple[str, ...]:
        """Parameters that cost no less and serve no worse the higher they are.

        Bits always; channels not where mean bits are limited: more of those with few bits lower the mean.
        """
        return tuple(self.space.windows if self.budget.mean_bits is None else self.space.layers)


def prepare_search(
    network: nn.Module,
    budget: Budget,
    loss: Loss,
    batches: Sequence[tuple[Tensor, ...]],
    *,
    widths: bool = True,
    method: str = "auto",
    seed: int = 0,
    architecture: tuple[str, dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
    latency: bool = False,
    skip: Iterable[str] = (),
    known: Mapping[str, Any] | None = None,
    progress: Progress = lambda phase, step, steps, values: None,
) -> Problem:
    """Sensitivity, space, costs and baselines; see `search_network` for the arguments.

    `widths`: whether channels are searched. `method`: of the sensitivity. `architecture`, `notes`: as `save` will be
    given. `latency`: measure it instead of the roofline. `skip`: layers to leave float, as `prepare` takes them.
    `known`: sensitivity and latency table of an earlier call on the same weights and data, as `remember` kept them.

    Raises:
        ValueError: If even the smallest network is over the budget, or network or batches cannot be served.
    """
    check_batches(batches)
    parent = parent_of(network, tuple(skip))
    structure = structure_of(parent)
    x = batches[0][0]
    with taking(x, "the batches' inputs"):
        cost = CostModel(parent, structure, x, architecture, notes)
    if known is not None:
        cost.times = {(name, bits): seconds for name, bits, seconds in known["times"]}
    if latency and not cost.times:
        cost.measure(parent, x, BITS)
    _refuse_too_small(budget, cost, widths)
    layers = quant_layers(parent)
    parameters = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    originals = {
        name: network.get_submodule(name).get_parameter("weight") for name in parameters if _has(network, name)
    }
    if known is not None:
        found = Sensitivity(**known["sensitivity"])
    elif originals.keys() == parameters.keys():  # layers that were taken out of an attention are not there in float
        found = sensitivity(network, originals, loss, batches, method=method, seed=seed, progress=progress)
    elif method == "hutchinson":
        missing = ", ".join(sorted(parameters.keys() - originals.keys()))
        raise ValueError(
            f"method='hutchinson' serves no layers taken out of an attention ({missing}); take fisher or auto"
        )
    else:
        found = sensitivity(parent, parameters, loss, batches, method="fisher", seed=seed, progress=progress)
    space = make_space(structure, {n: t / found.weights[n] for n, t in found.trace.items()}, widths=widths)
    low = {name: min(choices) for name, choices in space.windows.items()}
    reachable = {name: cost(space.configuration(low))[name] for name in budget.limits()}
    if not budget.holds(reachable):  # the windows of sensitive layers are too high for it
        space = Space(
            space.layers, {n: BITS if n in space.layers else w for n, w in space.windows.items()}, space.groups
        )
    baselines: dict[str, Configuration] = {}
    omega = found.omega({name: layer.rows() for name, layer in layers.items()}, BITS)
    for name, allocate in (("greedy", greedy), ("integer program", integer_program)):
        allocation = allocate(cost, omega, budget, [*space.layers.values()])
        if allocation is not None:
            baselines[name] = allocation
    baselines |= uniform(list(structure.layers))  # last: few trials leave some of them out

    def holds(of: Configuration) -> bool:
        return budget.holds(cost(of, budget.limits()))

    if not any(map(holds, baselines.values())):
        baselines |= narrowed(space, structure, holds)
    return Problem(parent, structure, cost, found, space, budget, baselines)


def check_batches(batches: Any) -> None:
    """Refuse what is no list of tuples (inputs, targets …).

    Raises:
        ValueError: If it is not, or holds no sample.
    """
    want = "want a list of tuples of tensors (inputs, targets …), some batches of training data"
    if not isinstance(batches, Sequence):
        raise ValueError(f"batches is a {type(batches).__name__}; {want}: list(itertools.islice(loader, 8))")
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or not batch or not all(isinstance(part, Tensor) for part in batch):
            said = [type(part).__name__ for part in batch] if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise ValueError(f"batches holds {said}; {want}")
    if not batches or not len(batches[0][0]):
        raise ValueError("no batches of training data: want at least one, of a sample or more")


def check_budget(
    network: nn.Module,
    budget: Budget,
    example: Tensor,
    *,
    widths: bool = True,
    architecture: tuple[str, dict[str, Any]] | None = None,
    notes: Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
) -> None:
    """Refuse a budget that no network of the space holds, whatever its weights: before any is trained.

    Where seconds are limited they are measured, at the least bits. `example`: inputs, one sample at least.

    Raises:
        ValueError: If even the smallest network is over the budget.
    """
    parent = parent_of(network, tuple(skip))
    cost = CostModel(parent, structure_of(parent), example, architecture, notes)
    if budget.seconds is not None:
        cost.measure(parent, example, (min(BITS),))
    _refuse_too_small(budget, cost, widths)


def _refuse_too_small(budget: Budget, cost: CostModel, widths: bool) -> None:
    """Compare with the smallest network, which is the same whatever the sensitivities are.

    Raises:
        ValueError: If it is over the budget.
    """
    space = make_space(cost.structure, dict.fromkeys(cost.shapes, 1.0), widths=widths)
    least = cost(space.configuration(space.smallest()))
    if not budget.holds(least):
        over = ", ".join(
            f"{n} {limit:,.10g} < {least[n]:,.10g}" for n, limit in budget.limits().items() if least[n] > limit
        )
        why = cost.structure.coupling.why
        channels = f"all channels, for {why}" if why else "the least channels"
        raise ValueError(
            f"the budget is below the smallest network of the space ({over}, with {min(BITS)} bits in every layer and "
            f"{channels}); raise the budget, or start from a smaller network"
        )


def _has(network: nn.Module, name: str) -> bool:
    try:
        return "weight" in network.get_submodule(name)._parameters
    except AttributeError:
        return False
