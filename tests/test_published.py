"""The published form, exactly: without clipping, widths follow closed forms of learning rate and steps alone.

The published "60 % of the size" is this artefact: b(t) = 32 - 0.001 t under Adam, 132 (1 - 1e-5)^t - 100 under AdamW.
"""

import pytest
import torch
import torch.nn.functional as F

from sgsc import nominal_bits, prepare
from sgsc.demos import models
from sgsc.layers import quant_layers
from sgsc.size import weight_count

STEPS = 200
ROUNDING = STEPS * 2.0**-20  # a float32 near 32 moves by multiples of 2^-19, so each step is off by at most half of one


def published(model, skip):
    model = prepare(model, quantizer="published", skip=skip).model
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.weight_quantizer.bit_depth.fill_(32.0)
            layer.weight_quantizer.exponent.fill_(-8.0)
    return model


def depths(model) -> torch.Tensor:
    return torch.cat([layer.weight_quantizer.bit_depth.detach() for layer in quant_layers(model).values()])


def train(model, optimizer, task_loss, gamma):
    means = []
    for step in range(STEPS):
        loss = task_loss(step) + gamma * nominal_bits(model) / weight_count(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(depths(model).mean().item())
    return means


def test_the_cnn_follows_adam():
    model = published(models.MnistCNN(), ["fc|head|classifier|linear"])
    assert weight_count(model) == 81_696
    make = torch.Generator().manual_seed(0)
    x, y = torch.rand(4, 1, 28, 28, generator=make), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    means = train(model, optimizer, lambda step: F.cross_entropy(model(x), y), 0.1)
    for t in (1, 50, 100, STEPS):
        assert means[t - 1] == pytest.approx(32 - 0.001 * t, abs=ROUNDING)


def test_the_language_model_follows_adamw():
    model = published(models.NamesLM(), [r".*(token|position|embed).*"])
    assert weight_count(model) == 198_336
    make = torch.Generator().manual_seed(0)
    x = torch.randint(27, (2, 32), generator=make)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    means = train(model, optimizer, lambda step: F.cross_entropy(model(x).flatten(0, 1), x.flatten()), 0.1)
    for t in (1, 50, 100, STEPS):
        assert means[t - 1] == pytest.approx(132 * (1 - 1e-5) ** t - 100, abs=ROUNDING)
