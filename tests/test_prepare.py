"""What `prepare` swaps, leaves and refuses."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sgsc import prepare
from sgsc.layers import QuantLayer, quant_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.norm = nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 9)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        h = self.norm(self.embed(x))
        return self.head(self.scale * h + self.attend(h, h, h, need_weights=False)[0])


def test_says_what_it_swapped_and_what_it_left():
    prepared = prepare(Net())
    assert prepared.swapped == (
        *("embed", "attend.q_proj", "attend.k_proj", "attend.v_proj", "attend.out_proj", "head"),
    )
    assert set(prepared.left) == {"", "norm"}
    assert "LayerNorm has no quantized form" in prepared.left["norm"]
    assert prepared.swapped == tuple(quant_layers(prepared.model))


def test_output_is_the_float_models_within_the_first_grid():
    net = Net().eval()
    x = torch.randint(9, (4, 6))
    near, want = prepare(net).model.eval()(x), net(x)
    assert (near - want).abs().max() < 0.03 * want.abs().max()
    assert not torch.equal(near, want)


def test_the_float_model_is_left_as_it_was():
    net = Net()
    before = copy.deepcopy(net.state_dict())
    model = prepare(net).model
    assert not any(isinstance(m, QuantLayer) for m in net.modules())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_a_float_checkpoint_loads():
    one, two = Net().eval(), Net().eval()
    model = prepare(one).model.eval()
    model.load_state_dict(two.state_dict())
    x = torch.randint(9, (4, 6))
    assert torch.equal(model(x), prepare(two).model.eval()(x))


def test_train_and_eval_carry_over():
    assert not prepare(Net().eval()).model.head.training
    assert prepare(Net()).model.head.training


def test_skip_takes_names_patterns_and_parents():
    assert prepare(Net(), skip=["head"]).left["head"] == "named in skip"
    prepared = prepare(Net(), skip=[r"attend", r"e\w+d"])
    assert prepared.swapped == ("head",)
    assert isinstance(prepared.model.attend, nn.MultiheadAttention)


def test_a_shared_layer_is_swapped_once_and_stays_shared():
    shared = nn.Linear(4, 4)
    prepared = prepare(nn.Sequential(shared, nn.ReLU(), shared))
    assert prepared.swapped == ("0",)
    assert prepared.model[0] is prepared.model[2]


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Named(nn.Linear):
    pass


def test_subclasses_are_found_and_those_that_compute_otherwise_are_left():
    prepared = prepare(nn.Sequential(Named(2, 2), Scaled(2, 2)))
    assert prepared.swapped == ("0",)
    assert prepared.left["1"] == "Scaled overrides Linear.forward"


def test_an_embedding_that_writes_to_its_table_is_left():
    prepared = prepare(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 2)))
    assert "changes its table outside autograd" in prepared.left["0"]


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(2, 2, 3), nn.LSTM(2, 2), nn.Conv3d(2, 2, 3)])
def test_layers_that_cannot_be_served_are_refused_by_name(layer):
    net = nn.Sequential(nn.Linear(2, 2), layer)
    kind = type(layer).__name__
    with pytest.raises(ValueError, match=rf"layer '1' is a {kind}, which has no quantized form here; .* skip=\['1'\]"):
        prepare(net)
    assert prepare(net, skip=["1"]).swapped == ("0",)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ValueError, match="nothing to quantize: the model has no Conv1d, Conv2d, Embedding, Linear"):
        prepare(nn.Sequential(nn.ReLU(), nn.LayerNorm(3)))


def test_preparing_twice_is_an_error():
    with pytest.raises(ValueError, match="already prepared; prepare its float version"):
        prepare(prepare(nn.Linear(2, 2)).model)


def test_a_skip_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"skip='heda' matches no module; names look like embed"):
        prepare(Net(), skip=["heda"])


def test_an_unknown_quantizer_is_an_error():
    with pytest.raises(ValueError, match="quantizer 'int4' is not known"):
        prepare(Net(), quantizer="int4")


def test_layers_that_share_a_weight_are_refused_by_name():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"layers '0' and '1' share one weight, .* skip=\['0', '1'\]"):
        prepare(net)


def test_a_shared_attention_stays_shared():
    shared = nn.MultiheadAttention(8, 2)
    model = prepare(nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(2, 2)})).model
    assert model["a"] is model["b"]
    assert type(model["a"]).__name__ == "QuantMultiheadAttention"


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_weight_that_is_computed_is_left(wrap):
    prepared = prepare(nn.Sequential(wrap(nn.Linear(3, 3)), nn.Linear(3, 2)))
    assert prepared.swapped == ("1",)
    assert any("its weight is computed" in why or "no quantized form" in why for why in prepared.left.values())


def test_a_layer_with_hooks_is_left():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    net[0].register_forward_hook(lambda module, args, output: 2 * output)
    prepared = prepare(net)
    assert "forward hooks" in prepared.left["0"]
    x = torch.randn(4, 3)
    assert torch.allclose(prepared.model(x), net(x), atol=0.05)


class Causal(nn.MultiheadAttention):
    def forward(self, query, key, value, **how):
        return super().forward(query, key, value, need_weights=False)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


def hooked():
    made = nn.MultiheadAttention(8, 2, batch_first=True)
    made.register_forward_hook(lambda module, given, made: (made[0] * 2, made[1]))
    return made


def computed():
    made = nn.MultiheadAttention(8, 2, batch_first=True)
    parametrizations.weight_norm(made.out_proj)
    return made


def replaced():
    made = nn.Linear(8, 8)
    before = made.forward
    made.forward = lambda x: before(x) * 2
    return made


@pytest.mark.parametrize(
    ("layer", "shape", "why"),
    [
        (lambda: Causal(8, 2, batch_first=True), (3, 4, 8), "overrides MultiheadAttention.forward"),
        (hooked, (3, 4, 8), "it carries forward hooks"),
        (lambda: Standardised(2, 3, 3), (3, 2, 8, 8), "overrides Conv2d._conv_forward"),
        (computed, (3, 4, 8), "its weight is computed"),
        (replaced, (3, 8), "its forward was replaced"),
    ],
)
def test_a_layer_that_does_more_than_its_type_is_left_whole(layer, shape, why):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = layer(), nn.LazyLinear(2)

        def forward(self, x):
            y = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
            return self.head(y)

    torch.manual_seed(0)
    x, net = torch.randn(shape), Around().eval()
    wanted = net(x)
    prepared = prepare(net)
    assert prepared.swapped == ("head",)
    assert why in prepared.left["layer"]
    assert (prepared.model(x) - wanted).norm() < 0.02 * wanted.norm()


def test_layers_whose_weights_are_computed_do_not_share_them():
    net = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(3)), nn.Linear(4, 4))
    assert prepare(net).swapped == ("3",)
