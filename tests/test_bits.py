"""What a bit is worth, the price that clears the market, and who buys and sells."""

import pytest
import torch
from torch import nn

from sgsc import (
    prepare,
)
from sgsc.bits import BitOptimizer, clearing_price
from sgsc.distillation import distilled
from sgsc.layers import quant_layers
from tests.blobs import blobs, started


def sold(worth, speed, price):
    return float((speed * (1 - worth / price).clamp(-1, 1)).sum())


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("wanted", [-3.0, 0.0, 2.0, 9.0])
def test_the_price_clears_the_market_at_any_scale_of_the_loss(scale, wanted):
    worth = scale * torch.rand(200, generator=torch.Generator().manual_seed(0)) ** 4
    speed = torch.full((200,), 0.1)
    price = clearing_price(worth, speed, wanted)
    assert sold(worth, speed, price) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("wanted", [-12.0, -3.0, 0.0, 1.0, 20.0])
def test_the_price_clears_the_market_whoever_may_buy(wanted):
    make = torch.Generator().manual_seed(1)
    worth = 10.0 ** (12 * torch.rand(300, generator=make, dtype=torch.double) - 9)
    worth[:20] = 0.0  # they sell at any price
    worth[20:60] = worth[60]  # and these alike
    speed = torch.rand(300, generator=make, dtype=torch.double) * (torch.arange(300) % 7 > 0)
    room = torch.rand(300, generator=make, dtype=torch.double) * (torch.arange(300) % 3 > 0)
    price = clearing_price(worth, speed, wanted, room)
    bought = (speed * (1 - worth / price).clamp(-1, 1)).maximum(-room.minimum(speed))
    assert bought.sum().item() == pytest.approx(wanted, abs=1e-9)


def test_who_has_all_bits_buys_none():
    worth, speed = torch.tensor([5.0, 5.0, 1.0, 1.0]), torch.ones(4)
    room = torch.tensor([0.0, 0.0, 9.0, 9.0])
    price = clearing_price(worth, speed, 0.5, room)
    change = (1 - worth / price).clamp(-1, 1).maximum(-room.minimum(speed))
    assert change.sum().item() == pytest.approx(0.5, abs=1e-3)
    assert clearing_price(worth, speed, 0.5) > price  # else the two that cannot buy would be counted as buyers


def test_bits_that_are_worth_nothing_do_not_leave_faster_than_the_schedule(trained):
    model = prepare(trained).model
    bits = BitOptimizer(model, bit_rate=0.5, grid_rate=0.0)
    bits.looked.fill_(1.0)
    size = torch.full_like(bits.worth, 3.0)
    bits.step(size, 0.0, 6.0)
    depth = bits.flat(bits.depths).detach()
    assert float((8 - depth).sum() * 3) == pytest.approx(6.0, rel=1e-4)


def test_where_nothing_sells_and_too_little_can_be_bought_nothing_breaks(trained):
    bits = BitOptimizer(prepare(trained).model, bit_rate=0.5, grid_rate=0.0)
    bits.worth.fill_(1.0)
    bits.step(torch.ones_like(bits.worth), 0.0, -9.0)  # all have 8 bits
    assert (bits.flat(bits.depths) == 8).all()


def test_what_is_bought_fits_and_is_worth_most(trained):
    model = prepare(trained).model
    bits = BitOptimizer(model, bit_rate=0.5, grid_rate=0.0)
    for depth in bits.depths.values():
        depth.data.fill_(2.0)
    bits.worth.copy_(torch.arange(len(bits.worth)))
    bits.looked.fill_(1.0)
    size = torch.full_like(bits.worth, 3.0)
    assert bits.buy_dearest(size, 10.0)
    wide = bits.flat(bits.depths) == 3
    assert wide.nonzero().squeeze(1).tolist() == [len(wide) - i for i in (3, 2, 1)]
    assert not bits.buy_dearest(size, 2.9)


def test_what_is_needed_seldom_is_worth_its_mean_at_every_moment():
    bits = BitOptimizer(prepare(nn.Linear(5, 3, bias=False)).model, bit_rate=0.5, grid_rate=0.0)
    seen = []
    for step in range(1000):
        seldom = 50.0 if step % 50 == 40 else 0.0
        bits._learn(torch.tensor([1.0, seldom, float("nan") if step else 3.0]))
        seen.append(bits.worth.clone())
    always, late, once = torch.stack(seen[500:]).unbind(1)
    assert torch.allclose(always, torch.ones(500))
    assert 0.8 < late.min() < late.max() < 1.25
    assert (once == 3).all()  # nothing new was learned of it
    bits._learn(torch.full((3,), float("nan")))
    assert torch.equal(bits.worth, seen[-1])


def test_an_entry_of_an_embedding_that_was_reached_keeps_a_bit_and_one_that_never_is_may_go():
    model = prepare(nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 4))).model
    bits = BitOptimizer(model, bit_rate=1.0, grid_rate=0.0)
    size = torch.ones(10)

    def sell(steps):
        for _ in range(steps):
            loss = model(torch.tensor([0, 1, 2])).square().sum() * 1e-6
            loss.backward()
            bits.step(size, 0.0, 1e9)
            while bits.sell_cheapest(size, 1e9):
                pass
        return bits.depths["0"].round().tolist()

    assert sell(20) == [1.0] * 6  # too early to tell which is used
    assert sell(500) == [1.0] * 3 + [0.0] * 3


def test_no_price_sells_the_dearest_bits_like_the_cheapest():
    worth, speed = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1, torch.ones(50)
    price = clearing_price(worth, speed, 1e9)
    assert price == pytest.approx(2 * float(worth.max()))
    assert clearing_price(torch.full((3,), 0.7), torch.ones(3), 1e9) == pytest.approx(1.4)  # where all are alike all go
    assert clearing_price(torch.zeros(3), torch.ones(3), 1.0) == 0.0


def test_a_row_that_alone_gives_an_answer_keeps_a_bit(trained):
    run = started(trained, None, target_size=0.03, steps=60, bit_rate=1.0)
    bits = run.control.bits
    bits.looked.fill_(1.0)
    assert {n: int(m.sum()) for n, m in bits.by_layer(bits.least).items()} == {"0": 0, "3": 0, "5": 4}
    size = run.control.estimate()[1]
    bits.worth.copy_(1 - bits.least)  # what is to stay seems to be worth nothing
    for _ in range(9):
        bits.step(size, 0.0, 1.0)
        bits.worth.copy_(1 - bits.least)
    while bits.sell_cheapest(size, 1e9):
        pass
    assert {n: d.round().tolist() for n, d in bits.depths.items()}["5"] == [1.0] * 4
    assert all((bits.depths[n].round() == 0).all() for n in ("0", "3"))


def test_a_channel_that_is_worth_more_keeps_more_bits():
    torch.manual_seed(0)
    model = prepare(nn.Linear(200, 5, bias=False)).model
    bits = BitOptimizer(model, bit_rate=0.1, grid_rate=0.0)
    exact, importance = model.weight.detach().clone(), torch.tensor([1e4, 1e2, 1.0, 1e-2, 1e-4])[:, None]
    size = torch.full((5,), 200.0)
    price = 0.0
    for _ in range(200):
        loss = (importance * (model.quantized_weight() - exact).square()).sum()
        loss.backward()
        over = float(model.weight_quantizer.bit_depth.detach().sum()) - 15.0
        price = bits.step(size, price, 200 * over)
    widths_now = model.weight_quantizer.bits().tolist()
    assert widths_now == sorted(widths_now, reverse=True)
    assert widths_now[0] >= 6 > 2 >= widths_now[-1]
    assert 13 <= sum(widths_now) <= 17


def test_what_a_bit_is_worth_does_not_hang_on_the_sign_of_its_gradient():
    bits = BitOptimizer(prepare(nn.Linear(5, 3, bias=False)).model, bit_rate=0.5, grid_rate=0.0)
    (depth,) = bits.depths.values()
    for sign in (1.0, -1.0) * 50:
        bits.gradient[depth] = torch.tensor([3.0 * sign, 1.0, 0.0])
        bits.step(torch.tensor([2.0, 1.0, 1.0]), 0.0, None)
    assert bits.worth.tolist() == pytest.approx([9 / 2, 1, 0])


def test_a_bit_less_makes_the_next_one_worth_four_times_as_much():
    bits = BitOptimizer(prepare(nn.Linear(5, 3, bias=False)).model, bit_rate=0.5, grid_rate=0.0)
    bits.worth.copy_(torch.tensor([1.0, 2.0, 16.0]))
    with torch.no_grad():
        bits._set(torch.tensor([8.0, 8.0, 4.0]), torch.tensor([6.0, 7.6, 5.0]))
    assert bits.worth.tolist() == [16.0, 2.0, 4.0]


def test_a_network_that_is_trained_already_loses_bits_alike_in_all_channels(trained):
    """Near a minimum the mean gradient of a width is noise, by which channels would be removed at random."""
    run = started(trained, None, target_size=0.15, steps=160)
    x = blobs().tensors[0]
    for step in range(160):
        part = x[torch.randint(len(x), (32,), generator=torch.Generator().manual_seed(step))]
        with torch.no_grad():
            wanted = trained(part)
        loss = run.loss(distilled(run.model.train()(part), wanted))
        run.optimizers[0].zero_grad()
        loss.backward()
        run.optimizers[0].step()
        run.step()
    inner = torch.cat([layer.weight_quantizer.bits() for layer in list(quant_layers(run.model).values())[:2]]).float()
    assert (inner == 0).float().mean() < 0.25
    assert inner[inner > 0].std() < 1.2
