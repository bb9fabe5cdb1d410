"""Packed layers: numerics, state, precision, tracing and threads. That they answer as trained ones: test_layers.py."""

from __future__ import annotations

import copy
import io
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from sgsc import load_into, pack, prepare, save
from sgsc.kernels import NUMERICS, PackedRows, extension, run_form, unpack
from sgsc.kernels.packed_linear import grid
from sgsc.kernels.packing import case
from sgsc.kernels.tiling import untile, widths_and_rows
from sgsc.packed import PackedConv1d, PackedConv2d, PackedEmbedding, PackedLinear, PackedProduct, set_numerics
from tests.checks import assert_close_to, assert_same

U8 = torch.uint8
BITS = torch.arange(9, dtype=U8).repeat(3)  # 27 rows, two tiles of live ones and one of removed ones
SQUARE = {"kernel": [3, 3], "stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1}


def linear(bits: Tensor = BITS, width: int = 40, seed: int = 0, with_bias: bool = True) -> PackedLinear:
    scale, offset, bias = grid(bits, seed)
    return PackedLinear(case(bits, width, seed)[1], scale, offset, bias if with_bias else None)


def conv2d(bits: Tensor = BITS, inputs: int = 6, seed: int = 0, **geometry) -> PackedConv2d:
    geometry = SQUARE | geometry
    width = inputs // geometry["groups"] * geometry["kernel"][0] * geometry["kernel"][1]
    return PackedConv2d(case(bits, width, seed)[1], *grid(bits, seed), **geometry)


def conv1d(bits: Tensor = BITS, seed: int = 0) -> PackedConv1d:
    geometry = {"kernel": [5], "stride": [2], "padding": [2, 1], "dilation": [1], "groups": 1}
    return PackedConv1d(case(bits, 30, seed)[1], *grid(bits, seed), **geometry)


LAYERS = {
    "linear": (linear, lambda: torch.randn(5, 40)),
    "conv1d": (conv1d, lambda: torch.randn(2, 6, 21)),
    "conv2d": (conv2d, lambda: torch.randn(2, 6, 9, 7)),
    "conv2d-groups": (lambda **how: conv2d(inputs=18, groups=3, **how), lambda: torch.randn(2, 18, 9, 7)),
    "depthwise": (lambda **how: conv2d(inputs=27, groups=27, **how), lambda: torch.randn(2, 27, 9, 7)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
both_numerics = pytest.mark.parametrize("numerics", NUMERICS)


def network() -> nn.Sequential:
    return nn.Sequential(conv2d(), nn.ReLU(), nn.Flatten(), linear(width=27 * 20)).eval()


# ---- numerics ----


def test_numerics_are_exact_until_they_are_set():
    model = network()
    layers = [m for m in model.modules() if isinstance(m, PackedProduct)]
    assert [layer.numerics for layer in layers] == ["exact", "exact"]
    assert set_numerics(model, "int8") is model
    assert [layer.numerics for layer in layers] == ["int8", "int8"]
    set_numerics(model, "exact")
    assert [layer.numerics for layer in layers] == ["exact", "exact"]


def test_numerics_that_there_are_not_are_refused():
    model = network()
    with pytest.raises(ValueError, match="numerics 'int4' is not known; choose one of exact, int8"):
        set_numerics(model, "int4")
    assert model[0].numerics == "exact"
    table = PackedEmbedding(case(BITS, 4)[1], *grid(BITS)[:2])
    for without in (nn.Linear(2, 2), nn.Sequential(table)):
        with pytest.raises(ValueError, match="the model holds no packed layer"):
            set_numerics(without, "int8")


@every_layer
def test_int8_stays_within_its_bound_of_exact(kind, level):
    make, inputs = LAYERS[kind]
    layer, x = make(), inputs()
    exact = layer(x)
    y = set_numerics(layer, "int8")(x)
    token = tuple(range(1 if x.dim() > 2 else x.dim() - 1, x.dim()))
    step = x.abs().amax(token, keepdim=True) / 127
    row = layer.weight_rows().abs().sum(1).view(-1, *[1] * (x.dim() - 2))
    assert ((y - exact).abs() <= 1.001 * step / 2 * row).all()
    if kind == "depthwise":
        assert_same(y, exact)
    else:
        assert not torch.equal(y, exact), "int8 changes nothing"


def test_a_packed_model_in_int8_answers_nearly_as_in_exact():
    model = prepare(nn.Sequential(nn.Conv2d(3, 20, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20 * 16, 10))).model
    packed, x = pack(model), torch.randn(4, 3, 6, 6)
    exact = packed(x)
    found = set_numerics(packed, "int8")(x)
    assert not torch.equal(found, exact)
    assert_close_to(found, exact.double(), 0.05)


# ---- state ----


@every_layer
def test_the_state_is_the_disk_form(kind):
    """The run form is made from it: files and checkpoints hold no byte more."""
    layer = LAYERS[kind][0]()
    assert list(layer.state_dict()) == ["data", "bits", "scale", "offset", "bias"]
    assert list(layer.parameters()) == []


def assert_laid_out(layer: PackedProduct) -> None:
    """The run form holds the levels, steps and offsets of the disk form."""
    channels = layer.weight_shape()[1]
    sliding = isinstance(layer, PackedConv2d) and layer.groups > 1 and channels < 4
    tiles = layer.tiles
    levels = untile(*tiles[:2], tiles.rows, layer.width, 1 if sliding else layer.width // channels)
    assert_same(levels, unpack(layer.rows))
    slots = widths_and_rows(tiles.plan)[1]
    held = slots >= 0
    assert_same(tiles.grid[:, held], torch.stack([layer.scale, layer.offset])[:, slots[held].long()])


def test_the_run_form_is_that_of_the_device_that_a_layer_moves_to(monkeypatch):
    for make, inputs in (LAYERS[kind] for kind in LAYERS):
        layer, x = make(), inputs()
        want = layer(x)
        with monkeypatch.context() as other:  # as if .float() went to a GPU
            other.setitem(run_form.FORMS, "cpu", run_form.FRAGMENTS)
            assert layer.float().lines.dtype == torch.int32
            kept = layer.lines
            assert layer.float().lines is kept, "laid out again for nothing"
        assert layer.float().lines.dtype == torch.uint8
        assert_laid_out(layer)
        assert_same(layer(x), want)
        layer.to("meta")  # holds nothing to lay out


@every_layer
@pytest.mark.parametrize("assign", [False, True])
@both_numerics
def test_the_run_form_follows_what_is_loaded(kind, assign, numerics):
    """The widths stand in another order, which takes as many bytes and so passes torch's check of shapes."""
    make, inputs = LAYERS[kind]
    source, target = make(bits=BITS.flip(0), seed=1), make()
    set_numerics(nn.Sequential(source, target), numerics)
    x = inputs()
    want = source(x)
    assert not torch.equal(target(x), want)
    target.load_state_dict(source.state_dict(), assign=assign)
    assert_laid_out(target)
    assert_same(target(x), want)
    assert target.numerics == numerics


def test_state_of_another_size_is_refused():
    layer, x = linear(), torch.randn(3, 40)
    before = layer(x)
    with pytest.raises(RuntimeError, match=r"size mismatch for data"):
        layer.load_state_dict(linear(width=32).state_dict())
    layer = linear()
    layer.load_state_dict({}, strict=False)
    assert_same(layer(x), before)


@every_layer
@both_numerics
def test_copies_answer_alike_and_are_apart(kind, numerics, tmp_path):
    make, inputs = LAYERS[kind]
    layer, x = set_numerics(make(), numerics), inputs()
    want = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    copies = [copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)]
    state = io.BytesIO()
    torch.save(layer.state_dict(), state)
    state.seek(0)
    copies.append(set_numerics(make(seed=2), numerics))
    copies[-1].load_state_dict(torch.load(state, weights_only=True))
    for other in copies:
        assert other.numerics == numerics
        assert_same(other(x), want)
        for t in (other.lines, other.tile_grid, other.data):
            t.zero_()
        assert_same(layer(x), want)


# ---- precision ----


def assert_rounded(y: Tensor, exact: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    """Fail unless y is of `dtype` and within one rounding of the result, and one of the bias, of `exact`."""
    if not extension.LOADED:  # plain PyTorch rounds the weights too
        return assert_close_to(y, exact, 16 * torch.finfo(dtype).eps, dtype=dtype)
    assert y.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    noise = 2.0**-16 * exact.square().mean().sqrt()  # of float sums in another order
    size = exact.abs() + 2 * bias.double().abs().view(-1, *[1] * (exact.dim() - 2))
    assert ((y.double() - exact).abs() <= 1.01 * unit * size + noise).all()


@every_layer
@both_numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_for_activations_and_bias(kind, numerics, dtype):
    """What is stored stays: the answer is that of the float layer to rounded activations, rounded."""
    make, inputs = LAYERS[kind]
    layer, x = set_numerics(make(), numerics), inputs().to(dtype)
    exact = layer(x.float()).double()
    half = copy.deepcopy(layer).to(dtype)
    assert [half.tile_grid.dtype, half.scale.dtype] == [torch.float32] * 2
    assert half.bias.dtype == dtype
    assert_laid_out(half)
    assert_rounded(half(x), exact, layer.bias, dtype)
    half.load_state_dict(half.state_dict())
    assert_rounded(half(x), exact, layer.bias, dtype)
    again = half.float()(x.float())
    assert again.dtype == torch.float32
    assert_rounded(again.to(dtype), exact, layer.bias, dtype)


@every_layer
@both_numerics
def test_a_float_bias_serves_activations_of_half_precision(kind, numerics):
    """As under autocast, which casts what comes in and not the layer."""
    make, inputs = LAYERS[kind]
    layer, x = set_numerics(make(), numerics), inputs().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert layer.bias.dtype == torch.float32
    assert_rounded(y, layer(x.float()).double(), layer.bias, torch.bfloat16)


# ---- shapes ----


@both_numerics
@pytest.mark.parametrize("shape", [(40,), (0, 40), (3, 0, 40), (2, 3, 4, 40)])
def test_linear_takes_any_dimensions_before_the_last(shape, numerics):
    layer, x = set_numerics(linear(), numerics), torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 27)
    for one, of in zip(y.reshape(-1, 27), x.reshape(-1, 40), strict=True):
        assert_close_to(one, layer(of[None])[0].double(), 1e-5)


@both_numerics
def test_convolutions_take_empty_batches_and_single_images(numerics):
    layer, x = set_numerics(conv2d(), numerics), torch.randn(6, 9, 7)
    assert layer(torch.empty(0, 6, 9, 7)).shape == (0, 27, 9, 7)
    assert_same(layer(x), layer(x[None])[0])
    with pytest.raises(ValueError, match=r"PackedConv2d: input \(6, 9\); want 3 or 4 dims"):
        layer(x[:, :, 0])


def test_an_input_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"x is \(2, 39\)( Float)?; want \((2|\.\.\.), 40\)"):
        linear()(torch.randn(2, 39))
    for shape in ((), (39,), (2, 3, 39)):
        with pytest.raises(ValueError, match=r"x is \(.*\)( Float)?; want \(.*40\)"):
            linear()(torch.randn(shape))


@every_layer
@both_numerics
def test_removed_rows_give_the_bias(kind, numerics):
    make, inputs = LAYERS[kind]
    layer, x = set_numerics(make(), numerics), inputs()
    y = layer(x).movedim(1, -1)[..., ::9]  # every ninth row has 0 bits
    assert_same(y.contiguous(), layer.bias[::9].expand_as(y).contiguous())
    if kind == "linear":
        assert (linear(with_bias=False)(x)[:, ::9] == 0).all()


@both_numerics
def test_a_layer_of_removed_rows_alone(numerics):
    layer = set_numerics(linear(torch.zeros(20, dtype=U8)), numerics)
    assert layer.lines.numel() == layer.data.numel() == 0
    assert_same(layer(torch.randn(3, 40)), layer.bias.expand(3, 20).contiguous())


# ---- tracing ----


@both_numerics
def test_compiled_and_exported_are_eager(numerics):
    model, x = set_numerics(network(), numerics), torch.randn(3, 6, 5, 4)
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
def test_a_package_compiled_ahead_answers_as_eager(tmp_path):
    class Both(nn.Module):
        def __init__(self, exact: nn.Module) -> None:
            super().__init__()
            self.exact, self.int8 = exact, set_numerics(copy.deepcopy(exact), "int8")

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.exact(x), self.int8(x)

    table = PackedEmbedding(case(BITS, 4)[1], *grid(BITS)[:2])
    model, x = Both(nn.Sequential(table, *network())).eval(), torch.randint(len(BITS), (3, 6, 5))
    with torch.no_grad():
        exact, int8 = model(x)
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=path)
        found = torch._inductor.aoti_load_package(path)(x)
    assert not torch.equal(exact, int8)
    assert_same(found[0], exact)
    assert_same(found[1], int8)


def test_a_compiled_model_notices_other_numerics():
    model, x = network(), torch.randn(3, 6, 5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for numerics in (*NUMERICS, *NUMERICS):
        set_numerics(model, numerics)
        assert_same(compiled(x), model(x), numerics)


def test_tensors_may_be_swapped_for_a_call():
    """`torch.func` and its kin replace buffers, which the run form is among."""
    layer, x = linear(), torch.randn(3, 40)
    twice = {"tile_grid": layer.tile_grid * torch.tensor([[2.0], [1.0]]), "bias": 2 * layer.bias}
    assert_same(torch.func.functional_call(layer, twice, (x,)), 2 * layer(x))


# ---- threads ----


@both_numerics
def test_calls_from_several_threads_do_not_disturb_each_other(numerics, level):
    model = set_numerics(network(), numerics)
    inputs = [torch.randn(batch, 6, 5, 4) for batch in (1, 2, 17, 5)]
    want = [model(x) for x in inputs]

    def run(start: int) -> None:
        for i in range(20):
            at = (start + i) % len(inputs)
            assert_same(model(inputs[at]), want[at])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))


def test_the_rows_of_a_layer_are_its_disk_form():
    layer = linear()
    assert isinstance(layer.rows, PackedRows)
    assert_laid_out(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_half_precision_looks_up_in_it_packed_and_loaded(dtype, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 5)).to(dtype).eval()
    packed, ids = pack(prepare(net).model), torch.arange(20)
    save(packed, tmp_path / "m.sgsc")
    for model in (packed, load_into(net, tmp_path / "m.sgsc")):
        assert model(ids).dtype == dtype
        torch.testing.assert_close(model(ids), net(ids), rtol=0.05, atol=0.05)
