"""The space that is searched and the baselines in it."""

import itertools

import pytest
import torch
from torch import nn

from sgsc import prepare
from sgsc.demos import models
from sgsc.search.baselines import greedy, integer_program, uniform
from sgsc.search.cost import Budget, Configuration, CostModel
from sgsc.search.space import BITS, make_space
from sgsc.search.structure import structure_of


@pytest.fixture(scope="module")
def digits():
    model = prepare(models.DigitsCNN(), quantizer="lsq8").model
    structure = structure_of(model)
    return structure, CostModel(model, structure, torch.zeros(1, 1, 8, 8))


def test_sensitive_layers_keep_many_bits_and_others_few(digits):
    structure, _ = digits
    sensitivity = dict(zip(structure.layers, (1e3, 1e-4, 1e-4, 1e-1, 1.0, 1e3), strict=True))
    space = make_space(structure, sensitivity, widths=False)
    assert space.windows["bits.stem.0"] == space.windows["bits.head"] == (3, 4, 6, 8)
    assert space.windows["bits.first.0"] == space.windows["bits.second.0"] == (2, 3, 4)
    same = make_space(structure, dict.fromkeys(structure.layers, -1.0), widths=False)
    assert set(same.windows.values()) == {BITS}  # nothing is known, nothing is left out


def test_what_a_residual_ties_shares_one_width_in_steps_of_eight(digits):
    structure, _ = digits
    space = make_space(structure, dict.fromkeys(structure.layers, 1.0))
    assert set(space.groups.values()) == {"stem.0", "first.0", "second.0"}  # the shortcut and the depthwise follow
    assert space.windows["width.second.0"] == (96, 112, 128, 144, 160)
    assert space.windows["width.stem.0"] == (24, 32, 40)


def test_configurations_and_parameters_are_inverse(digits):
    structure, _ = digits
    space = make_space(structure, dict.fromkeys(structure.layers, 1.0))
    params = {name: choices[-1] for name, choices in space.windows.items()}
    assert space.params(space.configuration(params), structure.sizes) == params
    assert space.params(Configuration(dict.fromkeys(structure.layers, 4)), structure.sizes)["width.stem.0"] == 32


def test_many_layers_share_sixty_parameters():
    model = prepare(nn.Sequential(*(nn.Linear(32, 32) for _ in range(80))), quantizer="lsq8").model
    structure = structure_of(model)
    space = make_space(structure, {name: 1.0 + int(name) % 7 for name in structure.layers})
    assert len(space.windows) == 60
    assert sorted(n for names in space.layers.values() for n in names) == sorted(structure.layers)
    assert len(space.groups) == 20
    for end in ("0", "79"):  # which have 8 bits in some baselines
        assert space.layers[f"bits.{end}"] == (end,)
    cost = CostModel(model, structure, torch.zeros(1, 32))
    omega, budget = omega_of(structure), Budget(mean_bits=3.5)
    sets = [*space.layers.values()]
    found = {**uniform(list(structure.layers)), "greedy": greedy(cost, omega, budget, sets)}
    found["integer program"] = integer_program(cost, omega, budget, sets)
    for name, chosen in found.items():
        assert space.configuration(space.params(chosen, structure.sizes)).bits == chosen.bits, name
    for name in ("greedy", "integer program"):
        assert budget.holds(cost(found[name]))
    assert total(omega, found["integer program"]) <= total(omega, found["greedy"])


def omega_of(structure):
    return {
        name: {b: (1 + i) * 4.0**-b * (10 if b == 2 else 1) for b in BITS} for i, name in enumerate(structure.layers)
    }


def total(omega, chosen):
    return sum(omega[name][bits] for name, bits in chosen.bits.items())


@pytest.mark.parametrize("limit", [{"mean_bits": 3.1}, {"bytes": 75_000}, {"bytes": 90_000, "mean_bits": 3.3}], ids=str)
def test_the_integer_program_is_the_best_of_all_allocations(digits, limit):
    structure, cost = digits
    omega, budget = omega_of(structure), Budget(**limit)
    best = min(
        total(omega, chosen)
        for bits in itertools.product(BITS, repeat=6)
        if budget.holds(
            {
                **{"bytes": 0},
                **_fast(cost, chosen := Configuration(dict(zip(structure.layers, bits, strict=True))), limit),
            }
        )
    )
    exact, quick = integer_program(cost, omega, budget), greedy(cost, omega, budget)
    assert budget.holds(cost(exact))
    assert budget.holds(cost(quick))
    assert total(omega, exact) == pytest.approx(best, rel=2e-2 if "bytes" in limit else 1e-9)
    assert best * (1 - 1e-9) <= total(omega, quick) <= 3 * best


def test_greedy_steps_over_a_width_that_is_no_faster(digits):
    structure, _ = digits
    model = prepare(models.DigitsCNN(), quantizer="lsq8").model
    cost = CostModel(model, structure, torch.zeros(1, 1, 8, 8))
    cost.times = {(name, b): 2.0 if b > 3 else 1.0 for name in structure.layers for b in BITS}
    chosen = greedy(cost, omega_of(structure), Budget(seconds=9.0))
    assert sorted(chosen.bits.values()) == [3, 3, 3, 8, 8, 8]
    assert set(chosen.bits) - {n for n, b in chosen.bits.items() if b == 8} == set(list(structure.layers)[:3])


def _fast(cost, chosen, limit):
    found = cost(chosen, {"bytes"} & limit.keys())
    if "mean_bits" in limit:
        sizes = cost.structure.sizes
        counts = {n: shape.weights(sizes)[0] * shape.weights(sizes)[1] for n, shape in cost.shapes.items()}
        found["mean_bits"] = sum(counts[n] * chosen.bits[n] for n in counts) / sum(counts.values())
    return found


def test_where_nothing_fits_there_is_no_allocation(digits):
    structure, cost = digits
    for allocate in (greedy, integer_program):
        assert allocate(cost, omega_of(structure), Budget(mean_bits=1.5)) is None
        assert allocate(cost, omega_of(structure), Budget(macs=1)) is None  # which bits do not change


def test_every_uniform_width_is_a_baseline(digits):
    structure, _ = digits
    found = uniform(list(structure.layers))
    assert {f"uniform {b}" for b in BITS} <= set(found)
    assert set(found["uniform 3"].bits.values()) == {3}
    assert found["uniform 3, ends 8"].bits["head"] == 8
