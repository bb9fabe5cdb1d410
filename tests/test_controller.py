"""The size: it follows its schedule and lands on its target."""

import math

import pytest
import torch
from torch import nn

from sgsc import (
    prepare,
)
from sgsc.bits import BitOptimizer
from tests.blobs import blobs, started, train


@pytest.mark.parametrize("target", [0.3, 0.15, 0.08])
def test_the_size_ends_within_a_hundredth_below_the_target(trained, target):
    run = started(trained, None, target_size=target)
    train(run.model, blobs(), 240, run)
    assert 0.99 * target < run.finish().stored_ratio <= target


@pytest.mark.parametrize("steps", [80, 320])
def test_few_steps_reach_a_target_at_the_default_rate_and_break_nothing(trained, steps):
    x, y = blobs(1000, seed=7).tensors
    run = started(trained, None, target_size=0.05, steps=steps, bit_rate=0.05)  # too slow by itself for either
    train(run.model, blobs(), steps, run)
    assert 0.99 * 0.05 < run.finish().stored_ratio <= 0.05
    assert (run.model.eval()(x).argmax(1) == y).float().mean() > 0.98


def test_a_target_already_reached_changes_no_width(trained, keep):
    run = started(trained, keep, target_size=0.9)
    train(run.model, blobs(), 30, run)
    assert (run.model[0].weight_quantizer.bits() == 8).all()
    assert run.finish().target_held


def test_the_cost_of_rounding_rises_evenly_while_the_size_shrinks(trained):
    run = started(trained, None, target_size=0.1, steps=100, shrink_share=0.4)
    sizes = torch.tensor([run.control.wanted(step) for step in range(41)], dtype=torch.float64)
    rises = (4.0 ** (-8 * sizes / sizes[0])).diff()
    assert sizes[0] == pytest.approx(run.control.start_size)
    assert sizes[-1] == pytest.approx(0.1) == run.control.wanted(99)
    assert torch.allclose(rises[8:], rises[8].expand(32))
    assert (sizes.diff() < 0).all()
    falls = -8 * sizes.diff() / sizes[0]  # bits a step, were they alike in all channels
    assert falls.max() <= 0.5 * run.control.bit_rate + 1e-9  # half of what widths can move: who sells is chosen


def test_the_size_follows_its_schedule(trained):
    run = started(trained, None, target_size=0.08, steps=400)
    over = []
    for step in range(160):
        train(run.model, blobs(), 1, run, step)
        over.append(run.size / run.control.wanted(step))
    assert max(over) < 1.05


def test_a_network_far_below_its_target_has_no_way_to_go(trained):
    run = started(trained, None, target_size=0.9)
    run.control.start_size = 0.001
    assert run.control.wanted(0) == run.control.wanted(500) == 0.9


def test_an_unreachable_target_keeps_price_and_worth_finite(trained):
    run = started(trained, None, target_size=0.0226, steps=60, bit_rate=0.4)
    train(run.model, blobs(), 120, run)
    assert math.isfinite(run.control.price)
    assert torch.isfinite(run.control.bits.worth).all()


def test_widths_come_to_rest_where_nothing_else_changes():
    bits = BitOptimizer(prepare(nn.Linear(5, 4, bias=False)).model, bit_rate=0.2, grid_rate=0.0)
    (depth,) = bits.depths.values()
    importance, size, seen, price = torch.tensor([1.0, 1.7, 3.1, 40.0]), torch.ones(4), [], 0.0
    for _ in range(400):
        bits.gradient[depth] = importance * torch.exp2(-depth.detach().round())
        price = bits.step(size, price, float(depth.detach().sum()) - 18)
        seen.append(depth.detach().round())
    moved = torch.stack(seen[200:]).diff(dim=0).abs().sum(0)
    assert moved.max() <= 2
    assert seen[-1].tolist() == sorted(seen[-1].tolist())
    assert 16 <= seen[-1].sum() <= 20
