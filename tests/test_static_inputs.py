"""Layers that round their input to a static grid, packed: they answer as the trained ones, in either numerics."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgsc import QuantConv1d, QuantConv2d, QuantEmbedding, QuantLinear, load_into, pack, prepare, save
from sgsc.coupling import couple
from sgsc.kernels import NUMERICS, Op
from sgsc.layers import QuantLayer, quant_layers
from sgsc.packed import PackedProduct, pack_layer, set_numerics
from sgsc.quantizers import InputQuantizer, StaticInput
from tests.checks import assert_close_to, assert_same

GRIDS = [(0.011, 0, 255), (0.021, -128, 127), (0.017, -37, 218), (0.2, 0, 15), (0.3, -4, 3)]
LAYERS = {
    "linear": (lambda: QuantLinear(40, 27), (5, 40)),
    "linear-of-rank-four": (lambda: QuantLinear(12, 9, bias=False), (2, 3, 4, 12)),
    "conv1d": (lambda: QuantConv1d(6, 10, 5, stride=2, padding=2), (2, 6, 21)),
    "conv1d-same": (lambda: QuantConv1d(3, 4, 4, padding="same"), (2, 3, 13)),
    "conv2d": (lambda: QuantConv2d(6, 20, 3, padding=1), (2, 6, 9, 7)),
    "conv2d-reflect": (lambda: QuantConv2d(4, 7, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 6, 7)),
    "conv2d-circular": (lambda: QuantConv2d(4, 7, 3, padding=1, padding_mode="circular", bias=False), (1, 4, 6, 16)),
    "conv2d-groups": (lambda: QuantConv2d(18, 12, 3, groups=3), (2, 18, 9, 7)),
    "depthwise": (lambda: QuantConv2d(9, 9, 3, padding=1, groups=9), (2, 9, 9, 7)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
both_numerics = pytest.mark.parametrize("numerics", NUMERICS)


def trained(kind: str, grid: tuple[float, int, int]) -> tuple[QuantLayer, Tensor]:
    """A layer of all widths with a grid for its input, and an input that lies on ties and leaves the grid."""
    make, shape = LAYERS[kind]
    layer = make().eval()
    with torch.no_grad():
        depth = layer.weight_quantizer.get_parameter("bit_depth")
        depth.copy_(torch.arange(len(depth)) % 9)
        layer.weight_quantizer.fit(layer.rows())
    layer.input_quantizer = StaticInput(*grid)
    x = torch.randn(shape)
    x.flatten()[::5] = (x.flatten()[::5] / grid[0] * 2).round() * (grid[0] / 2)
    return layer, x


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 16, 5)),
    )
    return prepare(net.eval()).model


def with_grids(model: nn.Module) -> nn.Module:
    for i, layer in enumerate(quant_layers(model).values()):
        layer.input_quantizer = StaticInput(*GRIDS[(i + 1) % 3])
    return model


# ---- answers ----


@every_layer
@every_grid
def test_on_the_reference_path_the_packed_layer_is_the_trained_one_bit_for_bit(kind, grid, monkeypatch):
    layer, x = trained(kind, grid)
    monkeypatch.setattr(Op, "__call__", lambda self, *args: self.reference(*args))
    found = pack_layer(layer)(x)
    assert_same(found, layer(x).detach())
    assert not torch.equal(found, pack_layer(without_grid(layer))(x)), "the grid changes nothing"


def without_grid(layer: QuantLayer) -> QuantLayer:
    other = copy.deepcopy(layer)
    other.input_quantizer = None
    return other


@every_layer
@every_grid
@both_numerics
def test_in_either_numerics_the_answer_is_the_trained_ones_but_for_the_rounding_of_floats(kind, grid, numerics, level):
    layer, x = trained(kind, grid)
    packed = set_numerics(pack_layer(layer), numerics)
    with torch.no_grad():
        q = layer.input_quantizer(x).double()
        weight = layer.quantized_weight().double()
        bias = None if layer.bias is None else layer.bias.double()
        want = F.linear(q, weight, bias) if isinstance(layer, QuantLinear) else layer._conv_forward(q, weight, bias)
    assert_close_to(packed(x).detach(), want, 2e-6)


def test_a_network_on_grids_answers_as_the_trained_one():
    model, x = with_grids(network()), torch.randn(4, 2, 8, 8)
    packed, want = pack(model), model(x).detach()
    assert [m.numerics for m in packed.modules() if isinstance(m, PackedProduct)] == ["exact"] * 4
    assert_close_to(packed(x), want.double(), 1e-5)
    # a float that rounds otherwise may fall to the code beside in the next layer: so much a step is worth at most
    assert_close_to(set_numerics(packed, "int8")(x), want.double(), 1e-2)


def test_attention_on_grids_answers_as_the_trained_one():
    model = prepare(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()).model
    x = torch.randn(2, 3, 8)
    float_answer = model(x).detach()
    for layer in quant_layers(model).values():
        layer.input_quantizer = StaticInput(0.05, -128, 127)
    want, packed = model(x).detach(), pack(model)
    assert len([m for m in packed.modules() if isinstance(m, PackedProduct) and m.input_grid is not None]) == 6
    assert not torch.equal(want, float_answer)
    for numerics in NUMERICS:
        assert_close_to(set_numerics(packed, numerics)(x), want.double(), 1e-3, numerics)


def test_prepared_models_from_float_checkpoints_have_no_grid():
    model = network()
    assert all(layer.input_quantizer is None for layer in quant_layers(model).values())
    assert all(m.input_grid is m.input_form is None for m in pack(model).modules() if isinstance(m, PackedProduct))


# ---- what is refused ----


class Odd(InputQuantizer):
    def __init__(self, *grid: float) -> None:
        super().__init__()
        self.numbers = grid

    def grid(self):
        return tuple(torch.tensor([float(value)]) for value in self.numbers)


@pytest.mark.parametrize(
    ("quantizer", "said"),
    [
        (nn.Identity(), "an input_quantizer of Identity has no packed form on a Linear"),
        (Odd(1, 0, 7, 0.5), r"a shift of 0\.5; want 0"),
        (Odd(0, 0, 7, 0), r"the scale 0\.0; want a positive, finite float32"),
        (Odd(float("inf"), 0, 7, 0), "the scale inf"),
        (Odd(1, 0.5, 7, 0), r"the codes 0\.5 .. 7\.0; want 2 to 256 integers, 0 among them"),
        (Odd(1, 1, 7, 0), r"the codes 1\.0 .. 7\.0"),
        (Odd(1, 0, 256, 0), r"the codes 0\.0 .. 256\.0"),
        (Odd(1, 0, 0, 0), r"the codes 0\.0 .. 0\.0"),
    ],
)
def test_a_grid_without_a_packed_form_is_refused_by_the_layers_name(quantizer, said):
    model = nn.Sequential(QuantLinear(4, 3))
    model[0].input_quantizer = quantizer
    with pytest.raises(ValueError, match=f"layer '0': .*{said}"):
        pack(model, remove=False)


def test_an_embedding_has_no_grid():
    model = nn.Sequential(QuantEmbedding(4, 3))
    model[0].input_quantizer = StaticInput(1.0, 0, 7)
    with pytest.raises(ValueError, match=r"layer '0': .* StaticInput has no packed form on a Embedding; want"):
        pack(model, remove=False)


# ---- channels that go, layers that are shared ----


def test_a_grid_survives_the_removal_of_channels():
    model = with_grids(network())
    with torch.no_grad():
        for at, step in ((0, 3), (3, 3), (5, 4)):
            model[at].weight_quantizer.bit_depth[::step] = 0
    couple(model).silence(model)
    x, grids = torch.randn(4, 2, 8, 8), [GRIDS[(i + 1) % 3] for i in range(4)]
    kept, cut = pack(model, remove=False), pack(model)
    assert cut[8].width < kept[8].width
    for packed in (kept, cut):
        found = [m.input_grid for m in packed.modules() if isinstance(m, PackedProduct)]
        for one, grid in zip(found, grids, strict=True):
            assert_same(one, torch.tensor(grid))
        assert_close_to(packed(x), model(x).detach().double(), 1e-5)
    assert_close_to(set_numerics(cut, "int8")(x), set_numerics(kept, "int8")(x).double(), 1e-2)


def test_a_shared_layer_has_one_grid(tmp_path):
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    net.append(net[0])
    model = with_grids(prepare(net).model)
    packed = pack(model)
    assert packed[0] is packed[2]
    save(packed, tmp_path / "a.sgsc")
    loaded = load_into(net, tmp_path / "a.sgsc")
    assert loaded[0] is loaded[2]
    x = torch.randn(3, 6)
    assert_same(loaded(x), packed(x))
    assert_close_to(packed(x), model(x).detach().double(), 1e-5)


# ---- state ----


@every_layer
@both_numerics
def test_copies_and_loaded_states_answer_alike(kind, numerics):
    layer, x = trained(kind, GRIDS[2])
    packed = set_numerics(pack_layer(layer), numerics)
    want = packed(x)
    assert list(packed.state_dict())[-1] == "input_grid"
    assert_same(copy.deepcopy(packed)(x), want)
    other = pack_layer(trained(kind, GRIDS[0])[0])
    assert not torch.equal(set_numerics(other, numerics)(x), want)
    other.load_state_dict(packed.state_dict())
    assert_same(other(x), want)
    assert "input=0.017 * -37..218" in repr(packed)


def test_a_state_with_a_grid_does_not_load_where_there_is_none():
    layer = trained("linear", GRIDS[0])[0]
    plain = pack_layer(without_grid(layer))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"input_grid\""):
        plain.load_state_dict(pack_layer(layer).state_dict())


@every_layer
@both_numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_grid_as_it_was_stored(kind, numerics, dtype, level):
    layer, x = trained(kind, GRIDS[2])
    packed = set_numerics(pack_layer(layer), numerics)
    half = copy.deepcopy(packed).to(dtype)
    assert half.input_grid.dtype == half.input_form.dtype == torch.float32
    assert_same(half.input_grid, packed.input_grid)
    x = x.to(dtype)
    with torch.no_grad():
        assert_close_to(half(x), packed(x.float()).double(), 16 * torch.finfo(dtype).eps, dtype=dtype)


# ---- tracing ----


@both_numerics
def test_compiled_and_exported_are_eager(numerics):
    model, x = set_numerics(pack(with_grids(network())), numerics), torch.randn(3, 2, 8, 8)
    want = model(x)
    torch._dynamo.reset()
    assert_same(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(model, (x,))
    assert_same(program.module()(x), want)
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    assert_same(torch.export.load(stream).module()(x), want)


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # of torch's own pickling
@both_numerics
def test_a_package_compiled_ahead_answers_as_eager(numerics, tmp_path):
    model, x = set_numerics(pack(with_grids(network())), numerics), torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        want, path = model(x), str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=path)
        assert_same(torch._inductor.aoti_load_package(path)(x), want)
