"""Drop-in layers, and that the packed layer answers as the trained one."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sgsc import QuantConv1d, QuantConv2d, QuantEmbedding, QuantLinear, QuantMultiheadAttention, pack, prepare
from sgsc.kernels import Op
from sgsc.layers import QUANTIZED, quant_layers
from tests.checks import assert_close_to


def set_random_widths(model: nn.Module, seed: int = 0) -> None:
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in quant_layers(model).values():
            depth = layer.weight_quantizer.get_parameter("bit_depth")
            depth.copy_(torch.randint(0, 9, depth.shape, generator=make))
            layer.weight_quantizer.fit(layer.rows())


@pytest.fixture
def reference_path(monkeypatch):
    """Every operation takes its plain PyTorch meaning, whatever is built."""
    monkeypatch.setattr(Op, "__call__", lambda self, *args: self.reference(*args))


CONV = st.fixed_dictionaries(
    {
        "inputs": st.integers(1, 5),
        "outputs": st.integers(1, 9),
        "kernel": st.integers(1, 4),
        "stride": st.integers(1, 3),
        "padding": st.one_of(st.integers(0, 3), st.sampled_from(["same", "valid"])),
        "dilation": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        "bias": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def conv(kind, c: dict):
    if c["padding"] == "same":
        c = c | {"stride": 1}
    return kind(
        c["inputs"] * c["groups"],
        c["outputs"] * c["groups"],
        c["kernel"],
        stride=c["stride"],
        padding=c["padding"],
        dilation=c["dilation"],
        groups=c["groups"],
        padding_mode=c["mode"],
        bias=c["bias"],
    )


def answers_alike(layer: nn.Module, x: torch.Tensor, seed: int) -> None:
    set_random_widths(layer, seed)
    layer.eval()
    want = layer(x).detach()
    packed = pack(layer)
    assert torch.equal(packed(x), want)


class TestPackedEqualsFakeQuantizedBitForBit:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(c=CONV)
    @pytest.mark.parametrize("axes", [1, 2])
    def test_convolutions(self, axes, c):
        kind = {1: QuantConv1d, 2: QuantConv2d}[axes]
        x = torch.randn(
            2, c["inputs"] * c["groups"], *(11, 9)[:axes], generator=torch.Generator().manual_seed(c["seed"])
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Op, "__call__", lambda self, *args: self.reference(*args))
            answers_alike(conv(kind, c), x, c["seed"])

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(
        inputs=st.integers(0, 40),
        outputs=st.integers(0, 12),
        lead=st.lists(st.integers(0, 4), max_size=3),
        bias=st.booleans(),
        seed=st.integers(0, 1000),
    )
    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    def test_linear(self, inputs, outputs, lead, bias, seed):
        x = torch.randn(*lead, inputs, generator=torch.Generator().manual_seed(seed))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Op, "__call__", lambda self, *args: self.reference(*args))
            answers_alike(QuantLinear(inputs, outputs, bias=bias), x, seed)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(entries=st.integers(1, 12), width=st.integers(1, 30), seed=st.integers(0, 1000))
    def test_embedding_also_on_the_fast_path(self, entries, width, seed):
        x = torch.randint(entries, (3, 5), generator=torch.Generator().manual_seed(seed))
        answers_alike(QuantEmbedding(entries, width), x, seed)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(c=CONV)
def test_the_fast_path_stays_within_its_bound(c):
    layer = conv(QuantConv2d, c)
    set_random_widths(layer, c["seed"])
    x = torch.randn(2, c["inputs"] * c["groups"], 11, 9, generator=torch.Generator().manual_seed(c["seed"]))
    with torch.no_grad():
        found = pack(layer)(x)
        exact = copy.deepcopy(layer).double()(x.double())
        magnitude = copy.deepcopy(layer).double()
        magnitude.weight.abs_()
    width = layer.weight[0].numel()
    top = magnitude.weight.flatten(1).abs().sum(1).max() * x.abs().max() * 1.5
    assert (found.double() - exact).abs().max() <= max(width, 2) * 2**-23 * top + 1e-6


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(6, 4), nn.Conv1d(3, 5, 3), nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Embedding(7, 5)],
    ids=lambda layer: type(layer).__name__,
)
class TestDropIn:
    def test_loads_a_float_checkpoint(self, layer):
        quantized = prepare(copy.deepcopy(layer)).model
        other = copy.deepcopy(layer)
        with torch.no_grad():
            other.weight.mul_(50)
        assert quantized.load_state_dict(other.state_dict()) == ([], [])
        assert torch.equal(quantized.weight, other.weight)
        error = (quantized.quantized_weight() - other.weight).square().mean().sqrt()
        assert error <= other.weight.abs().max() / 100  # the grid was fitted anew to what came

    def test_its_own_checkpoint_keeps_the_grid(self, layer):
        first, second = prepare(layer).model, prepare(layer).model
        set_random_widths(first)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first.quantized_weight(), second.quantized_weight())

    def test_is_the_float_layers_subclass_and_leaves_it_alone(self, layer):
        before = copy.deepcopy(layer.state_dict())
        quantized = prepare(layer).model
        assert isinstance(quantized, type(layer))
        assert quantized.weight is not layer.weight
        with torch.no_grad():
            quantized.weight.zero_()
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())

    def test_shows_its_width(self, layer):
        assert "mean_bits=8.00" in repr(prepare(layer).model)

    def test_a_copy_is_independent(self, layer):
        first = prepare(layer).model
        second = copy.deepcopy(first)
        set_random_widths(second)
        assert (first.weight_quantizer.bits() == 8).all()


def test_layers_can_be_constructed_directly():
    made = QuantLinear(3, 2, bias=False, quantizer="published")
    assert made(torch.ones(4, 3)).shape == (4, 2)
    for float_type, quant_type in QUANTIZED.items():
        assert issubclass(quant_type, float_type)


def test_half_precision_follows_the_weight():
    layer = QuantLinear(16, 8)
    grid = [t.clone() for t in layer.weight_quantizer.grid()]
    x = torch.randn(3, 16)
    exact = layer(x).detach()
    packed = pack(layer).bfloat16()
    assert packed.scale.dtype == torch.float32
    layer = layer.bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(layer.weight_quantizer.grid(), grid, strict=True))
    for half in (layer, packed):
        assert_close_to(half(x.bfloat16()).detach(), exact.double(), 0.03, dtype=torch.bfloat16)


def test_packed_models_run_under_autocast_and_in_half_precision():
    model = prepare(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), skip=["1"]).model
    x = torch.randint(9, (4, 5))
    packed = pack(model.eval())
    exact = packed(x).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close_to(packed(x), exact, 0.03, dtype=torch.bfloat16)
    assert_close_to(packed.bfloat16()(x), exact, 0.03, dtype=torch.bfloat16)


def test_what_an_embedding_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="serves neither max_norm nor sparse gradients"):
        QuantEmbedding(4, 4, max_norm=1.0)


@pytest.mark.parametrize("fullgraph_backend", ["aot_eager"])
def test_compiles_whole_and_trains(fullgraph_backend):
    torch._dynamo.reset()
    model = prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))).model
    set_random_widths(model)
    x = torch.randn(2, 2, 6, 6)
    compiled = torch.compile(model, fullgraph=True, backend=fullgraph_backend)
    eager = model(x)
    assert_close_to(compiled(x), eager.detach().double(), 1e-5)
    eager.square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    compiled(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, want[name], rtol=1e-4, atol=1e-6), name
    packed = pack(model)
    assert_close_to(torch.compile(packed, fullgraph=True, backend=fullgraph_backend)(x), packed(x).double(), 1e-6)


def test_packed_layers_export():
    packed = pack(prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3))).model)
    x = torch.randn(2, 2, 6, 6)
    program = torch.export.export(packed, (x,))
    assert torch.equal(program.module()(x), packed(x))


# ---- attention ----

OPTIONS = [
    dict(zip(("batch_first", "bias", "kdim", "vdim"), values, strict=True))
    for values in itertools.product((True, False), (True, False), (None, 6), (None, 10))
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_answers_as_torchs(options):
    source = nn.MultiheadAttention(8, 2, **options).eval()
    with torch.no_grad():
        if source.in_proj_bias is not None:
            source.in_proj_bias.normal_()
    ours = QuantMultiheadAttention(source).eval()
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 7, options["kdim"] or 8), torch.randn(3, 7, options["vdim"] or 8)
    if not options["batch_first"]:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    causal = torch.ones(5, 7, dtype=torch.bool).triu(1)
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, -2:] = True
    for arguments in (
        {},
        {"attn_mask": causal},
        {"key_padding_mask": padding},
        {"attn_mask": torch.randn(3 * 2, 5, 7), "key_padding_mask": torch.zeros(3, 7).masked_fill(padding, -1e9)},
        {"average_attn_weights": False},
        {"need_weights": False},
    ):
        want, want_weights = source(q, k, v, **arguments)
        found, weights = ours(q, k, v, **arguments)
        assert torch.allclose(found, want, atol=1e-5), arguments
        assert (weights is None) == (want_weights is None)
        if weights is not None:
            assert torch.allclose(weights, want_weights, atol=1e-6)


def test_attention_without_a_batch():
    source = nn.MultiheadAttention(8, 2).eval()
    x = torch.randn(5, 8)
    want, want_weights = source(x, x, x)
    found, weights = QuantMultiheadAttention(source).eval()(x, x, x)
    assert torch.allclose(found, want, atol=1e-6)
    assert torch.allclose(weights, want_weights, atol=1e-6)


@pytest.mark.parametrize("same", [True, False])
def test_attention_loads_torchs_checkpoint(same):
    options = {} if same else {"kdim": 6}
    one, two = nn.MultiheadAttention(8, 2, **options), nn.MultiheadAttention(8, 2, **options)
    ours = QuantMultiheadAttention(one)
    ours.load_state_dict(two.state_dict())
    q, k = torch.randn(5, 3, 8), torch.randn(7, 3, options.get("kdim", 8))
    v = torch.randn(7, 3, 8)
    assert torch.allclose(ours(q, k, v)[0], two(q, k, v)[0], atol=1e-6)


def test_an_encoder_layer_really_runs_on_the_swapped_attention():
    # nn.TransformerEncoderLayer has a fast path that would bypass our projections
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    prepared = prepare(encoder).model.eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        near = prepared(x)
        assert torch.allclose(near, encoder(x), atol=0.05)
        prepared.self_attn.v_proj.weight_quantizer.bit_depth.zero_()
        assert not torch.allclose(prepared(x), near, atol=1e-3)


def test_attention_that_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match=r"layer '0': nn.MultiheadAttention with add_bias_kv .* cannot be quantized"):
        prepare(nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="is_causal needs attn_mask"):
        QuantMultiheadAttention(nn.MultiheadAttention(8, 2))(*[torch.randn(5, 1, 8)] * 3, is_causal=True)
