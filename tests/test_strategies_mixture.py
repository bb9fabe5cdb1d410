"""Mixtures: one product, the gradients of the sum, and memory that candidates do not add to."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgsc.layers import quant_layers
from sgsc.preparation import prepare
from sgsc.quantizers import StaticInput
from sgsc.strategies import INPUTS, WEIGHTS, InputStatistics
from sgsc.strategies.mixture import MixedInput, MixedWeights, entropy, mixtures, set_temperature, settle


def weights(rows, names=("max-abs", "percentile", "mse", "least-squares"), bits=3):
    made = {name: WEIGHTS[name](len(rows), bits) for name in names}
    for quantizer in made.values():
        quantizer.fit(rows)
    return made


def inputs(count=4):
    return {str(i): StaticInput(0.1 + 0.07 * i, -8, 7) for i in range(count)}


def mixed_conv(count=4, fixed=True):
    layer = prepare(nn.Conv2d(3, 5, 3, padding=1), quantizer="lsq4").model
    of_weights = {f"{i}": weights(layer.rows().detach(), ["mse"], 2 + i % 7)["mse"] for i in range(count)}
    layer.weight_quantizer = MixedWeights(of_weights, layer.rows().detach() if fixed else None)
    layer.input_quantizer = MixedInput(inputs(count))
    return layer


@pytest.mark.parametrize("fixed", [True, False])
def test_one_product_of_mixtures_is_the_mixture_of_all_products(fixed):
    layer, x = mixed_conv(3, fixed).double(), torch.randn(2, 3, 6, 6).double()
    with torch.no_grad():
        for mixed in mixtures(layer):
            mixed.logits.copy_(torch.randn(3))
        of_weights, of_inputs = layer.weight_quantizer, layer.input_quantizer
        beta, alpha = of_weights.shares(), of_inputs.shares()
        total = torch.zeros(1)
        for b, q in zip(beta, of_weights.candidates, strict=True):
            for a, g in zip(alpha, of_inputs.candidates, strict=True):
                product = torch.conv2d(g(x), q(layer.rows()).view_as(layer.weight), None, padding=1)
                total = total + a * b * product
        expected = total + layer.bias[:, None, None]
        torch.testing.assert_close(layer(x), expected)


def test_shares_have_the_gradient_of_the_plain_sum():
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 7, dtype=torch.float64)
    mixed = MixedInput(inputs()).double()
    with torch.no_grad():
        mixed.logits.copy_(torch.randn(4))
    mixed(x).backward(upstream)
    found = x.grad.clone(), mixed.logits.grad.clone()
    x.grad = mixed.logits.grad = None
    sum(a * q(x) for a, q in zip(mixed.shares(), mixed.candidates, strict=True)).backward(upstream)
    for got, want in zip(found, (x.grad, mixed.logits.grad), strict=True):
        torch.testing.assert_close(got, want)


def test_grids_that_learn_get_their_gradient():
    seen = InputStatistics()
    x = torch.randn(50, 8)
    seen.observe(x)
    found = []
    for plain in (False, True):
        names = ["lsq", "lsq+", "pact"]
        mixed = MixedInput({name: INPUTS[name].fitted(seen, 3) for name in names})
        y = sum(a * q(x) for a, q in zip(mixed.shares(), mixed.candidates, strict=True)) if plain else mixed(x)
        (y * torch.linspace(-1, 2, 400).view(50, 8)).sum().backward()
        found.append({name: p.grad for name, p in mixed.named_parameters()})
    assert len(found[0]) == 5
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


class Convolutions(TorchDispatchMode):
    """Counts products, and the most that one backward keeps."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_number_of_products_does_not_depend_on_the_number_of_candidates():
    counts = []
    for count in (2, 4, 8, 16):
        layer, x = mixed_conv(count), torch.randn(2, 3, 6, 6)
        with Convolutions() as seen:
            layer(x).sum().backward()
        counts.append(seen.count)
    assert counts == [2, 2, 2, 2]  # forward, backward


def test_what_is_kept_for_the_backward_does_not_depend_on_the_number_of_candidates():
    kept = []
    for count in (2, 16):
        layer, x, sizes = mixed_conv(count), torch.randn(4, 3, 16, 16, requires_grad=True), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            layer(x)
        kept.append(sum(n for n in sizes.values() if n >= x.numel()))
    assert kept[0] == kept[1] > 0


def test_a_cold_mixture_is_its_leading_candidate():
    rows = torch.randn(4, 20)
    mixed = MixedWeights(weights(rows), rows)
    with torch.no_grad():
        mixed.logits.copy_(torch.tensor([0.0, 2.0, 1.0, 1.5]))
    mixed.temperature = 0.01
    assert mixed.leading() == 1
    torch.testing.assert_close(mixed(rows), mixed.candidates[1](rows))
    assert torch.equal(mixed.grid()[0], mixed.candidates[1].grid()[0])
    assert mixed.codes(rows).bits.tolist() == [3] * 4


def test_entropy_is_one_where_all_is_open_and_none_where_all_is_decided():
    layer = mixed_conv()
    assert entropy(layer).item() == pytest.approx(1)
    with torch.no_grad():
        for mixed in mixtures(layer):
            mixed.logits[2] = 5.0
    assert 0.01 < entropy(layer).item() < 0.2
    set_temperature(layer, 0.05)
    assert entropy(layer).item() < 1e-6


def test_settling_leaves_the_leading_candidates_and_refuses_what_is_settled():
    layer = mixed_conv()
    with torch.no_grad():
        layer.weight_quantizer.logits[1] = layer.input_quantizer.logits[3] = 1.0
    expected = layer.weight_quantizer.candidates[1], layer.input_quantizer.candidates[3]
    assert settle(layer) == {"": ("1", "3")}
    assert (layer.weight_quantizer, layer.input_quantizer) == expected
    assert quant_layers(layer)[""].bias is not None
    with pytest.raises(ValueError, match="holds a MSE, not a mixture"):
        settle(layer)


def test_a_mixture_of_one_is_that_one_and_repeats():
    x = torch.randn(3, 4)
    mixed = MixedInput(inputs(1))
    assert torch.equal(mixed(x), mixed.candidates[0](x))
    assert "MixedInput" in repr(mixed_conv())


def test_what_follows_its_input_does_so_in_a_mixture():
    seen = InputStatistics()
    seen.observe(torch.randn(64, 4))
    mixed = MixedInput({name: INPUTS[name].fitted(seen, 8) for name in ("lsq", "straight-through")})
    before = mixed.candidates[1].most.item()
    mixed.eval()(torch.full((3, 4), 99.0))
    assert mixed.candidates[1].most == before
    mixed.train()(torch.full((3, 4), 99.0))
    assert mixed.candidates[1].most > before


def test_codes_are_those_of_the_leading_candidate():
    rows = torch.randn(3, 8)
    made = {name: WEIGHTS[name](3, 3) for name in ("lsq", "dorefa")}
    for quantizer in made.values():
        quantizer.fit(rows)
    mixed = MixedWeights(made)
    with torch.no_grad():
        mixed.logits[1] = 5.0
    for ours, theirs in zip(mixed.codes(rows), made["dorefa"].codes(rows), strict=True):
        assert torch.equal(ours, theirs)
