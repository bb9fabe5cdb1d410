"""What the size term charges, its gradient, and that it follows what files hold."""

import pytest
import torch
from torch import nn

from sgsc import pack, prepare, stored_size
from sgsc.coupling import couple
from sgsc.layers import quant_layers
from sgsc.size import SizeModel, file_bits, nominal_bits


class Residual(nn.Module):
    """Two paths into one sum, batch norms, a depthwise layer, a head: every kind of tie between channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.left, self.right = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(12, 10, 1, bias=False)
        self.depthwise, self.last = nn.Conv2d(10, 10, 3, groups=10, bias=False), nn.Linear(10, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.depthwise((self.left(x) + self.right(x)).relu()).mean((2, 3)))


def with_widths(seed: int, least: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = prepare(Residual()).model.eval()
    with torch.no_grad():
        for layer in quant_layers(model).values():
            depth = layer.weight_quantizer.bit_depth
            depth.copy_(
                torch.randint(least, 9, depth.shape, generator=torch.Generator().manual_seed(seed + len(depth)))
            )
        model.last.weight_quantizer.bit_depth.clamp_(min=1)
    return model


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_that_of_the_value(seed, file):
    model = with_widths(seed, least=1)
    size = SizeModel(model, couple(model), file=file)
    widths = torch.cat([layer.weight_quantizer.bit_cost().detach() for layer in quant_layers(model).values()]).double()
    widths[widths == 1] = 0.6  # within the last bit, where the value is smooth, and no two rows of a sum are equal
    widths += 0.01 * torch.rand(len(widths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value, gradient = size(widths)
    for i in range(len(widths)):
        nudged = widths.clone()
        nudged[i] += 1e-4
        assert (size(nudged)[0] - value).item() / 1e-4 == pytest.approx(gradient[i].item(), rel=1e-3, abs=1e-6), i


@pytest.mark.parametrize("seed", range(5))
def test_it_follows_what_files_hold_to_the_byte_of_each_row(seed):
    some, other = with_widths(seed), with_widths(seed + 100, least=5)
    for model in (some, other):
        couple(model).silence(model)
    said = (file_bits(some, couple(some)) - file_bits(other, couple(other))).item() / 8
    held = stored_size(pack(some)) - stored_size(pack(other))
    rows = sum(len(layer.weight) for layer in quant_layers(some).values())
    assert abs(said) > 2 * rows  # else this would show nothing
    assert abs(held - said) <= rows + 64  # a row's codes end on a byte; the header's numbers differ in length


def test_a_model_that_proves_nothing_is_charged_whole():
    model = prepare(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1), nn.Linear(3, 2))).model
    assert nominal_bits(model, couple(model)) == nominal_bits(model) == 8 * (12 + 6)
    assert file_bits(model) == 8 * (12 + 6) + 16 * 5  # a channel that cannot leave costs its width and bias anyway


class Shown(nn.Module):
    """What one layer reads is shown to the caller too: its channels cannot be cut out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 24), nn.Linear(24, 8)

    def forward(self, x):
        h = self.a(x).relu()
        return self.b(h), h


def test_a_dead_channel_that_must_stay_still_has_readers():
    torch.manual_seed(0)
    model = prepare(Shown()).model
    before = file_bits(model, couple(model)).item(), stored_size(pack(model))
    with torch.no_grad():
        model.a.weight_quantizer.bit_depth[:16] = 0
    couple(model).silence(model)
    said, held = (before[0] - file_bits(model, couple(model)).item()) / 8, before[1] - stored_size(pack(model))
    assert said == 16 * (6 + 2)
    assert abs(held - said) <= 16


def test_sizes_are_differentiable_in_the_users_own_loop():
    model = with_widths(0, least=2)
    (nominal_bits(model, couple(model)) * 2.0).backward()
    assert (model.depthwise.weight_quantizer.bit_depth.grad == 18).all()
