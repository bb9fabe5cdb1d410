"""Dead channels: what the graph proves, what it does not, and that cutting changes nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgsc import pack, prepare
from sgsc.coupling import couple
from sgsc.cutting import remove_channels
from sgsc.demos import models
from sgsc.layers import quant_layers
from sgsc.size import nominal_bits
from tests.checks import assert_close_to


class Residual(nn.Module):
    """Residual sum, concatenation, depthwise, grouped, batch norm, pooling, flatten and a Linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.n2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise, self.n3 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)
        self.grouped = nn.Conv2d(9, 6, 1, groups=3)
        self.after = nn.Conv2d(6, 4, 3)
        self.hidden, self.n4 = nn.Linear(4 * 9, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.n1(self.stem(x)))
        x = F.relu(x + self.n2(self.inner(x)))
        x = F.relu(self.n3(self.depthwise(x)))
        x = torch.cat([self.left(x), F.gelu(self.right(x))], dim=1)
        x = F.max_pool2d(F.relu(self.after(self.grouped(x))), 2)
        return self.head(F.relu(self.n4(self.hidden(x.flatten(1)))))


def prepared(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Residual()
    net(torch.randn(32, 1, 8, 8))  # batch norms with statistics of their own
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.bias.normal_()
    return prepare(net.eval()).model.eval()


def kill(model: nn.Module, **rows: list[int]) -> None:
    with torch.no_grad():
        for name, index in rows.items():
            model.get_submodule(name).weight_quantizer.bit_depth[index] = 0.0


def cut(model: nn.Module) -> dict[str, int]:
    couple(model).silence(model)
    want = model(torch.ones(2, 1, 8, 8) * torch.linspace(-1, 1, 8)).detach()
    small = copy.deepcopy(model)
    gone = remove_channels(small)
    assert_close_to(small(torch.ones(2, 1, 8, 8) * torch.linspace(-1, 1, 8)).detach(), want.double(), 1e-5)
    assert_close_to(pack(model)(torch.ones(2, 1, 8, 8) * torch.linspace(-1, 1, 8)), want.double(), 1e-5)
    return gone


def test_hidden_features_go():
    model = prepared()
    kill(model, hidden=[0, 5])
    assert cut(model) == {"hidden": 2}


def test_a_flattened_channel_takes_all_its_features_along():
    model = prepared()
    kill(model, after=[1])
    assert cut(model) == {"after": 1}
    couple(model).silence(model)
    remove_channels(model)
    assert model.hidden.in_features == 3 * 9


def test_a_residual_channel_goes_only_when_dead_on_every_path():
    model = prepared()
    kill(model, stem=[2])
    assert cut(model) == {}
    kill(model, inner=[2])
    assert cut(model) == {}  # the depthwise row still makes something of its bias and batch norm
    kill(model, depthwise=[2])
    assert cut(model) == {"stem": 1, "inner": 1, "depthwise": 1}


def test_what_a_grouped_convolution_reads_keeps_its_place():
    model = prepared()
    kill(model, left=[0, 1], right=[3], grouped=[0])
    assert cut(model) == {}


def test_outputs_keep_their_place():
    model = prepared()
    kill(model, head=[1])
    assert cut(model) == {}
    assert pack(model)(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


def test_the_last_channel_of_a_layer_stays():
    model = prepared()
    kill(model, hidden=list(range(8)))
    assert cut(model) == {"hidden": 7}


@pytest.mark.parametrize("what", ["own bias", "batch-norm shift", "running mean"])
def test_a_channel_that_is_not_silent_stays(what):
    model = prepared()
    kill(model, hidden=[3])
    couple(model).silence(model)
    value = {"own bias": model.hidden.bias, "batch-norm shift": model.n4.bias, "running mean": model.n4.running_mean}
    with torch.no_grad():
        value[what][3] = 0.1
    assert remove_channels(model) == {}


def test_silence_leaves_the_living_alone():
    model = prepared()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kill(model, hidden=[3], stem=[0])
    couple(model).silence(model)
    assert model.hidden.bias[3] == 0
    assert model.n4.bias[3] == 0
    keep = torch.arange(8) != 3
    assert torch.equal(model.hidden.bias[keep], before["hidden.bias"][keep])
    assert torch.equal(model.n1.bias, before["n1.bias"])  # alive on the other path
    assert torch.equal(model.stem.bias, before["stem.bias"])


def test_random_deaths_never_change_the_function():
    for seed in range(12):
        model = prepared(seed)
        make = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in quant_layers(model).values():
                depth = layer.weight_quantizer.bit_depth
                depth.copy_(torch.randint(0, 3, depth.shape, generator=make))
            dead = torch.randperm(6, generator=make)[:2]
            for name in ("stem", "inner", "depthwise"):
                model.get_submodule(name).weight_quantizer.bit_depth[dead] = 0
        gone = cut(model)
        assert gone.get("stem", 0) >= 2


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


def test_a_model_that_cannot_be_traced_keeps_every_place_and_says_why():
    model = prepare(Branching()).model
    assert "cannot be traced (TraceError" in couple(model).why
    kill(model, a=[0, 1])
    assert remove_channels(model) == {}
    assert pack(model)(torch.ones(3, 4)).shape == (3, 2)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, activation=None):
        h = self.a(x)
        return self.b(torch.sigmoid(h) if activation is None else activation(h))


def test_optional_arguments_take_the_way_of_their_defaults():
    model = prepare(Optional(), skip=["extra"]).model.eval()
    kill(model, a=[1])
    couple(model).silence(model)
    x = torch.randn(5, 4)
    assert_close_to(pack(model)(x), model(x).detach().double(), 1e-5)
    assert remove_channels(model) == {}  # a sigmoid of zero is not zero


def test_a_layer_that_the_trace_does_not_reach_stops_the_proof():
    model = prepare(Optional()).model
    assert "layer 'extra' is not reached" in couple(model).why


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.relu(self.a(F.relu(self.a(x)))))


class Sigmoid(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))


class Reshaped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(36, 2)

    def forward(self, x):
        return self.b(self.a(x).view(-1, 36))


@pytest.mark.parametrize("net", [Twice(), Sigmoid(), Reshaped()], ids=lambda n: type(n).__name__)
def test_what_cannot_be_proved_stays(net):
    model = prepare(net).model
    first = next(iter(quant_layers(model).values()))
    with torch.no_grad():
        first.weight_quantizer.bit_depth[1] = 0
        first.bias.zero_()
    assert remove_channels(model) == {}


@pytest.mark.parametrize(
    ("make", "x", "proved"),
    [
        (models.DigitsCNN, torch.rand(2, 1, 8, 8), None),
        (lambda: models.CharLM(97, 16, 32, 2, 2), torch.randint(97, (2, 16)), 2),
        (models.MnistCNN, torch.rand(2, 1, 28, 28), 4),
    ],
    ids=["digits", "char-lm", "mnist"],
)
def test_the_demo_networks_can_lose_channels(make, x, proved):
    model = prepare(make().eval()).model.eval()
    with torch.no_grad():
        for layer in quant_layers(model).values():
            layer.weight_quantizer.bit_depth[1::4] = 0
    couple(model).silence(model)
    want = model(x).detach()
    gone = remove_channels(model)
    assert gone
    assert proved in (None, len(gone))
    assert_close_to(model(x).detach(), want.double(), 1e-5)


def test_nominal_size_charges_live_inputs_only():
    model = prepare(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))).model
    coupling = couple(model)
    assert nominal_bits(model) == 8 * (20 + 12)
    with torch.no_grad():
        model[0].weight_quantizer.bit_depth.copy_(torch.tensor([0.0, 1.0, 3.0, 8.0]))
    assert nominal_bits(model) == 12 * 5 + 8 * 12
    assert nominal_bits(model, coupling) == 12 * 5 + 8 * 9


def test_the_last_bit_of_a_channel_is_worth_what_its_readers_store():
    model = prepare(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))).model
    with torch.no_grad():
        model[0].weight_quantizer.bit_depth.copy_(torch.tensor([1.0, 2.0, 2.0, 2.0]))
    nominal_bits(model, couple(model)).backward()
    assert model[0].weight_quantizer.bit_depth.grad.tolist() == [5 + 24, 5, 5, 5]


class Scores(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.inner, self.skip, self.head, self.end = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3), end

    def forward(self, x):
        return self.end(self.head(F.relu(self.inner(x) + self.skip(x))))


@pytest.mark.parametrize("end", [nn.Identity(), nn.LogSoftmax(-1), nn.Softmax(-1)])
def test_rows_that_alone_give_an_answer(end):
    answers = couple(prepare(Scores(end)).model).answers()
    assert {name: mask.tolist() for name, mask in answers.items()} == {"head": [True] * 3}


def test_a_sum_is_an_answer_of_no_row_alone():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

        def forward(self, x):
            return self.a(x) + self.b(x)

    assert couple(prepare(Sum()).model).answers() == {}
