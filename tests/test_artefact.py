"""Saved and loaded: the same answers, bit for bit; the same model, the same bytes; and the golden file.

tests/golden/v1.sgsc was written once, from `golden()` below, by

    save(golden(), "tests/golden/v1.sgsc", notes={"recipe": "tests/test_artefact.py"})

Its levels count 0, 3, 6, … modulo what a row's width holds, its scales are powers of two and its inputs small whole
numbers, so that every sum is exact in float32 in whatever order. It must load for ever, with the answers written here.
tests/golden/v2.sgsc is the same with grids of inputs, and was written alike from `golden(GOLDEN_INPUTS)`.
"""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgsc.artefact import ARCHITECTURES, ArtefactError, from_bytes, load, load_into, read, save, stored_size, to_bytes
from sgsc.coupling import couple
from sgsc.kernels import pack as pack_rows
from sgsc.kernels.packing import unpack
from sgsc.layers import quant_layers
from sgsc.packed import PACKED, PackedLayer, PackedProduct, input_grid, pack, set_numerics
from sgsc.preparation import prepare
from tests.checks import assert_same

GOLDEN = Path(__file__).parent / "golden" / "v1.sgsc"
GOLDEN_2 = GOLDEN.with_name("v2.sgsc")


def compressed(model, widths=None, quantizer="integer", remove=True):
    """Pack `model` at seeded widths a row; `widths`: layer name -> widths."""
    prepared = prepare(model.eval(), quantizer=quantizer).model
    for name, layer in quant_layers(prepared).items():
        depth = layer.weight_quantizer.bit_depth
        given = (widths or {}).get(name)
        depth.data.copy_(torch.randint(0, 9, depth.shape) if given is None else torch.tensor(given))
        layer.weight_quantizer.fit(layer.rows())
    couple(prepared).silence(prepared)
    return pack(prepared, remove=remove)


def answer(model, inputs):
    out = model(*inputs)
    return out[0] if isinstance(out, tuple) else out


class Residual(nn.Module):
    """Batch norm in front of a sum, so that channels go from several layers at once."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.branch(x) + x)
        return self.head(F.max_pool2d(F.relu(self.depthwise(x)), 2).flatten(1))


class Tied(nn.Module):
    """Two modules that stand in two places each, one inside the other's parent."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.b = self.a
        self.c = self.a[0]

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Buffers(nn.Module):
    """A value of every dtype that the format holds, and names that mean something elsewhere."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
        for kind in kinds:
            self.register_buffer(str(kind).replace("torch.", "a_"), torch.tensor([3, -2]).to(kind))
        self.register_buffer("a_uint8", torch.tensor([[200], [7]], dtype=torch.uint8))
        self.register_buffer("a_bool", torch.tensor([True, False, True]))
        self.register_buffer("a_scalar", torch.tensor(2.5))
        self.register_buffer("an_empty", torch.zeros(0, 3))
        self.register_buffer("num_batches_tracked", torch.tensor(7))
        self.register_buffer("offset", torch.tensor([float("nan"), float("-inf"), -0.0]))

    def forward(self, x):
        return self.layer(x) * self.a_scalar + self.num_batches_tracked


def trained_norms(model):
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            for value in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                value.copy_(torch.rand_like(value) + 0.5)
    return model


def conv(*shape, size=(9, 8), **settings):
    kind = nn.Conv2d if len(size) == 2 else nn.Conv1d
    return lambda: (nn.Sequential(kind(*shape, **settings)), (torch.randn(2, shape[0], *size),))


def of(make, *shapes):
    return lambda: (make(), tuple(torch.randn(*shape) for shape in shapes))


CASES = {
    "linear": of(lambda: nn.Sequential(nn.Linear(11, 7)), (3, 11)),
    "linear-without-bias": of(lambda: nn.Sequential(nn.Linear(5, 9, bias=False)), (2, 5)),
    "a-layer-is-the-model": of(lambda: nn.Linear(4, 3), (2, 4)),
    "conv1d": conv(3, 5, 4, size=(13,), stride=2, padding=3, dilation=2, bias=False),
    "conv1d-grouped-circular": conv(4, 6, 3, size=(9,), groups=2, padding=2, padding_mode="circular"),
    "conv1d-same": conv(2, 3, 4, size=(9,), padding="same"),
    "conv2d-everything-unusual": conv(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3), groups=2),
    "conv2d-same-even-kernel": conv(3, 4, (4, 2), padding="same"),
    "conv2d-reflect": conv(2, 3, 3, padding=(2, 1), padding_mode="reflect"),
    "conv2d-replicate": conv(2, 3, 3, padding=1, padding_mode="replicate", bias=False),
    "conv2d-circular": conv(2, 3, 3, padding=(1, 2), padding_mode="circular"),
    "conv2d-depthwise": conv(5, 5, 3, groups=5),
    "conv2d-depthwise-multiplied": conv(3, 6, 3, groups=3),
    "embedding": lambda: (nn.Sequential(nn.Embedding(12, 5), nn.Linear(5, 2)), (torch.randint(12, (2, 4)),)),
    "attention": of(lambda: nn.MultiheadAttention(8, 2), (3, 2, 8), (3, 2, 8), (3, 2, 8)),
    "attention-of-other-widths": of(
        lambda: nn.MultiheadAttention(8, 4, kdim=5, vdim=6, bias=False, batch_first=True),
        (2, 3, 8),
        (2, 4, 5),
        (2, 4, 6),
    ),
    "encoder-layer": of(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8)),
    "encoder": of(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2), (2, 3, 8)),
    "residual": of(lambda: trained_norms(Residual()), (2, 2, 4, 4)),
    "instance-norm": of(
        lambda: trained_norms(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        ),
        (2, 1, 5, 5),
    ),
    "batch-norm-without-scale": of(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False, momentum=None)), (2, 1, 5, 5)
    ),
    "batch-norm-without-statistics": of(
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (2, 1, 5, 5)
    ),
    "bfloat16": lambda: (nn.Sequential(nn.Linear(6, 4)).bfloat16(), (torch.randn(2, 6).bfloat16(),)),
    "half": lambda: (nn.Sequential(nn.Linear(6, 4)).half(), (torch.randn(2, 6).half(),)),
    "buffers": of(Buffers, (2, 4)),
    "tied": of(Tied, (2, 6)),
    "no-rows": of(lambda: nn.Sequential(nn.Linear(4, 0)), (2, 4)),
    "no-columns": of(lambda: nn.Sequential(nn.Linear(0, 4)), (2, 0)),
    "a-list-of-parameters": of(lambda: nn.Sequential(nn.Linear(3, 3), WithList()), (2, 3)),
}


class WithList(nn.Module):
    def __init__(self):
        super().__init__()
        self.list = nn.ParameterList([torch.randn(3), torch.randn(3)])
        self.dict = nn.ParameterDict({"scale": torch.randn(3)})

    def forward(self, x):
        return (x + self.list[0]) * self.dict["scale"] - self.list[1]


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    if request.param in ("no-rows", "no-columns"):
        with pytest.warns(UserWarning, match="zero-element"):
            return CASES[request.param]()
    return CASES[request.param]()


@pytest.mark.parametrize("quantizer", ["integer", "half-steps", "ternary", "published", "lsq3", "static"])
def test_a_loaded_model_answers_as_the_saved_one_and_saves_to_the_same_bytes(case, quantizer, tmp_path):
    model, inputs = case
    packed = compressed(model, quantizer="integer" if quantizer == "static" else quantizer)
    if quantizer == "static":
        for i, layer in enumerate(m for m in packed.modules() if isinstance(m, PackedProduct)):
            layer.input_grid = input_grid(0.03 + 0.01 * i, -7 * i, 127)
            layer.lay_out()
    before = copy.deepcopy(model.state_dict())
    size = save(packed, tmp_path / "a.sgsc", notes={"n": [1, None, "é"]})
    assert size == stored_size(packed, notes={"n": [1, None, "é"]}) == (tmp_path / "a.sgsc").stat().st_size
    loaded = load_into(model, tmp_path / "a.sgsc")
    assert_same(answer(loaded, inputs), answer(packed, inputs))
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    save(loaded, tmp_path / "b.sgsc", notes={"n": [1, None, "é"]})
    assert (tmp_path / "b.sgsc").read_bytes() == (tmp_path / "a.sgsc").read_bytes()
    for name, value in model.state_dict().items():  # the caller's model is left as it was
        assert_same(value, before[name], name)


def test_a_known_architecture_loads_by_itself(case, tmp_path, monkeypatch):
    model, inputs = case
    monkeypatch.setitem(ARCHITECTURES, "a", lambda **how: copy.deepcopy(model).to(how.get("device", "meta")))
    packed = compressed(model)
    save(packed, tmp_path / "a.sgsc", architecture=("a", {}))
    assert_same(answer(load(tmp_path / "a.sgsc"), inputs), answer(packed, inputs))


def test_the_same_model_gives_the_same_bytes(case):
    model, _ = case
    packed = compressed(model)
    assert to_bytes(packed) == to_bytes(packed) == to_bytes(copy.deepcopy(packed))


def test_every_width_and_every_value_comes_back(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 13), nn.Linear(13, 9))
    packed = compressed(model, {"0": range(9), "1": range(9)}, remove=False)
    save(packed, tmp_path / "a.sgsc")
    for name, layer in read(tmp_path / "a.sgsc").layers.items():
        was = packed.get_submodule(name)
        assert layer.bits.tolist() == list(range(9))
        alive = was.bits > 0
        assert_same(layer.data, was.data)
        assert_same(layer.scale[alive], was.scale[alive])
        assert_same(layer.offset, was.offset)
        assert_same(layer.weight_rows(), was.weight_rows())


@pytest.mark.parametrize("how", ["as-usual", "no-huge-pages", "refused-huge-pages", "small-pieces"])
def test_however_a_file_is_read_its_codes_stand_in_memory_once(how, tmp_path, monkeypatch):
    reading = sys.modules["sgsc.artefact.read"]  # the module; the package has a function of that name
    if how == "no-huge-pages":
        monkeypatch.delattr(reading.mmap, "MADV_HUGEPAGE", raising=False)
    elif how == "refused-huge-pages":
        monkeypatch.setattr(reading.mmap, "MADV_HUGEPAGE", 12345, raising=False)
    elif how == "small-pieces":
        monkeypatch.setattr(reading, "CHUNK", 13)
    packed = compressed(nn.Sequential(nn.Linear(13, 9), nn.Linear(9, 5)), {"0": range(9), "1": range(5)}, remove=False)
    size = save(packed, tmp_path / "a.sgsc")
    layers = read(tmp_path / "a.sgsc").layers
    for name, layer in layers.items():
        assert_same(layer.data, packed.get_submodule(name).data, name)
        assert layer.data.untyped_storage().nbytes() == size
    assert len({layer.data.untyped_storage().data_ptr() for layer in layers.values()}) == 1


def test_removed_channels_are_cut_out_of_every_layer_that_held_them(tmp_path):
    torch.manual_seed(0)
    model = trained_norms(Residual())
    widths = {
        "stem": [4, 0, 4, 0, 4, 4],
        "branch": [4, 0, 4, 0, 4, 4],
        "depthwise": [3, 0, 3, 3, 3, 3],
        "head": [5] * 3,
    }
    packed, kept = compressed(model, widths), compressed(model, widths, remove=False)
    save(packed, tmp_path / "a.sgsc")
    loaded = load_into(model, tmp_path / "a.sgsc")
    assert loaded.norm.num_features == 5  # channel 3 has bits in the depthwise layer
    assert loaded.depthwise.groups == 5
    assert loaded.head.weight_shape() == (3, 5 * 4)
    x = torch.randn(3, 2, 4, 4)
    assert_same(loaded(x), packed(x))
    torch.testing.assert_close(loaded(x), kept(x))
    assert stored_size(packed) < stored_size(kept)


def test_a_shared_module_is_stored_once_and_stays_one(tmp_path):
    model = Tied()
    packed = compressed(model)
    save(packed, tmp_path / "a.sgsc")
    artefact = read(tmp_path / "a.sgsc")
    assert list(artefact.layers) == ["a.0"]
    assert sorted(artefact.values) == ["a.0.bias", "a.1.bias", "a.1.weight"]
    loaded = load_into(model, tmp_path / "a.sgsc")
    assert loaded.c is loaded.a[0] is loaded.b[0]
    assert isinstance(loaded.c, PackedLayer)


def test_scales_take_two_bytes_where_that_loses_nothing():
    model = nn.Sequential(nn.Linear(8, 6))
    for quantizer in ("integer", "published", "lsq4"):  # rounded to bfloat16, powers of two, rounded again
        assert scale_dtype(to_bytes(compressed(model, {"0": [4] * 6}, quantizer))) == "BF16"
    packed = compressed(model, {"0": [4] * 6})
    packed[0].scale[2] = 1 + 2.0**-20
    data = to_bytes(packed)
    assert scale_dtype(data) == "F32"
    assert_same(from_bytes(data).layers["0"].scale, packed[0].scale)


def scale_dtype(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["scales"]["dtype"]


def test_one_bit_is_plus_minus_half_a_step_or_the_published_zero_and_minus_one():
    model = nn.Sequential(nn.Linear(8, 2))
    assert from_bytes(to_bytes(compressed(model, {"0": [1, 2]}))).layers["0"].offset.tolist() == [-0.5, -2.0]
    published = compressed(model, {"0": [1, 2]}, "published")
    assert from_bytes(to_bytes(published)).layers["0"].offset.tolist() == [-1.0, -2.0]


def test_the_payload_has_no_byte_to_spare():
    model = nn.Sequential(nn.Linear(7, 3))
    data = to_bytes(compressed(model, {"0": [3, 0, 8]}))
    header = 8 + int.from_bytes(data[:8], "little")
    # codes ceil(21 / 8) + 0 + 7, bits two a byte, scales of two rows, a bias of three
    assert len(data) - header == (3 + 7) + 2 + 2 * 2 + 3 * 4


# what the writer refuses, since it could not be read back


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        return self.layer(x)


class Renaming(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_state_dict_post_hook(lambda m, state, prefix, meta: state.update(other=torch.ones(1)) and None)
        self.register_state_dict_post_hook(
            lambda m, state, prefix, meta: state.update({"elsewhere.w": torch.ones(1)}) and None
        )

    def forward(self, x):
        return self.layer(x)


def with_buffer(value):
    packed = compressed(nn.Sequential(nn.Linear(2, 2)), {"0": [2, 2]})
    packed.register_buffer("odd", value)
    return packed


def with_grid(part, value):
    packed = compressed(nn.Sequential(nn.Linear(2, 2)), {"0": [1, 1]})
    getattr(packed[0], part)[1] = value
    return packed


REFUSED = {
    "no-packed-layer": (lambda: nn.Linear(2, 2), {}, "holds no packed layer"),
    "complex": (lambda: with_buffer(torch.ones(1, dtype=torch.complex64)), {}, "'odd' is torch.complex64"),
    "nine-axes": (lambda: with_buffer(torch.ones([1] * 9)), {}, "'odd' is torch.float32 with 9 axes"),
    "extra-state": (lambda: compressed(Stateful()), {}, "'_extra_state' is dict"),
    "no-module": (lambda: compressed(Renaming()), {}, "'elsewhere.w' of the state dict belongs to no module"),
    "scale-nan": (lambda: with_grid("scale", float("nan")), {}, "layer '0': a scale"),
    "scale-zero": (lambda: with_grid("scale", 0.0), {}, "layer '0': a scale"),
    "offset": (lambda: with_grid("offset", -0.25), {}, "layer '0': its offsets"),
    "mixed-shift": (lambda: with_grid("offset", -1.0), {}, "layer '0': its offsets"),
    "notes-nan": (lambda: with_buffer(torch.ones(1)), {"notes": {"a": float("nan")}}, "cannot be written as JSON"),
    "notes-object": (lambda: with_buffer(torch.ones(1)), {"notes": {"a": object()}}, "cannot be written as JSON"),
    "notes-list": (lambda: with_buffer(torch.ones(1)), {"notes": [1]}, "a dict of notes"),
    "notes-twice": (lambda: with_buffer(torch.ones(1)), {"notes": {1: "a", "1": "b"}}, "a key twice"),
    "notes-long": (lambda: with_buffer(torch.ones(1)), {"notes": {"a": "x" * (1 << 24)}}, "shorten the notes"),
    "architecture": (lambda: with_buffer(torch.ones(1)), {"architecture": ("a", [1])}, "want architecture="),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_read_back_is_not_written(name, tmp_path):
    make, how, match = REFUSED[name]
    packed = make()
    with pytest.raises(ValueError, match=match):
        save(packed, tmp_path / "a.sgsc", **how)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_in_double_precision_that_float32_does_not_hold_is_refused():
    packed = compressed(nn.Sequential(nn.Linear(2, 2)), {"0": [2, 2]}).double()
    assert scale_dtype(to_bytes(packed)) == "BF16"
    packed[0].scale[0] = 1 + 2.0**-40
    with pytest.raises(ValueError, match="not a positive and finite float32"):
        to_bytes(packed)


# the golden file


class GoldenNet(nn.Module):
    """Every layer type, (N, 4) int64 -> (N, 3)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.mix = nn.Conv1d(4, 3, 3, padding=1)
        self.norm = nn.BatchNorm1d(3, eps=0.25)
        self.pair = nn.Conv2d(3, 3, (1, 2), stride=(1, 2), groups=3, bias=False)
        self.head = nn.Linear(6, 3)
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([False, False]))

    def forward(self, tokens):
        x = F.relu(self.norm(self.mix(self.embed(tokens).transpose(1, 2))))
        return self.head(self.pair(x.unsqueeze(2)).flatten(1))


GOLDEN_LAYERS = {
    "embed": ([8, 4, 0, 2, 1], [0.125, 0.5, 1.0, 0.25], 1),
    "mix": ([3, 5, 7], [0.5, 0.25, 0.125], 0),
    "pair": ([6, 2, 3], [0.25, 1.0, 0.5], 0),
    "head": ([1, 8, 0], [2.0, 0.0625], 0),
}
GOLDEN_TOKENS = [[0, 1, 2, 3], [4, 3, 2, 1], [1, 1, 4, 0]]
GOLDEN_ANSWERS = [
    [1052.0625, 3682.23046875, 1.0],
    [19.5390625, 921.22509765625, 1.0],
    [144.0703125, 1561.39501953125, 1.0],
]


# Each meets ties and values beyond its ends; the scales are powers of two, so that sums stay exact.
GOLDEN_INPUTS = {"mix": (0.25, -13, 14), "pair": (0.5, 0, 29), "head": (2.0, -37, 4)}
GOLDEN_ROUNDED = [[147.0, 549.625, 1.0], [11.0, 489.375, 1.0], [131.0, 548.125, 1.0]]


def golden(inputs=()):
    model = GoldenNet().eval().requires_grad_(False)
    for name, (widths, scales, shift) in GOLDEN_LAYERS.items():
        layer = model.get_submodule(name)
        bits = torch.tensor(widths, dtype=torch.uint8)
        columns = layer.weight[0].numel()
        levels = 3 * torch.arange(len(bits) * columns).view(len(bits), columns) % (1 << bits.int())[:, None]
        alive = bits > 0
        scale = torch.ones(len(bits)).masked_scatter(alive, torch.tensor(scales))
        offset = torch.where(alive, -torch.exp2(bits.float() - 1), 0.0) + (bits == 1) * 0.5 * shift
        bias = getattr(layer, "bias", None)
        bias = None if bias is None else torch.arange(len(bits)) - 1.0
        if name in ("mix", "pair"):
            settings = {
                "mix": {"kernel": [3], "stride": [1], "padding": [1, 1], "dilation": [1], "groups": 1},
                "pair": {"kernel": [1, 2], "stride": [1, 2], "padding": [0] * 4, "dilation": [1, 1], "groups": 3},
            }[name]
        else:
            settings = {}
        rows = pack_rows(levels.to(torch.uint8), bits)
        if name in inputs:
            settings = settings | {"input_grid": torch.tensor(inputs[name]).float()}
        model.set_submodule(name, PACKED[type(layer).__name__](rows, scale, offset, bias, **settings))
    for value, numbers in (
        (model.norm.weight, [1.0, 2.0, 0.5]),
        (model.norm.bias, [0.5, -0.25, 8.0]),
        (model.norm.running_mean, [1.0, -2.0, 0.0]),
        (model.norm.running_var, [0.75, 0.75, 3.75]),
        (model.step, 12345678901),
        (model.flags, [True, False]),
    ):
        value.copy_(torch.tensor(numbers))
    return model


def test_the_golden_file_loads_for_ever():
    assert GOLDEN.stat().st_size < 2048
    artefact = read(GOLDEN)
    assert artefact.manifest["notes"] == {"recipe": "tests/test_artefact.py"}
    assert artefact.manifest["format"] == 1
    loaded = load_into(GoldenNet(), GOLDEN)
    was = golden()
    for name, (widths, _, _) in GOLDEN_LAYERS.items():
        layer = loaded.get_submodule(name)
        assert layer.bits.tolist() == widths
        assert_same(unpack(layer.rows), unpack(was.get_submodule(name).rows), name)
        assert_same(layer.scale, was.get_submodule(name).scale, name)
        assert_same(layer.offset, was.get_submodule(name).offset, name)
    assert (loaded.step.item(), loaded.flags.tolist()) == (12345678901, [True, False])
    assert loaded(torch.tensor(GOLDEN_TOKENS)).tolist() == GOLDEN_ANSWERS


@pytest.mark.parametrize("numerics", ["exact", "int8"])
def test_the_golden_file_of_inputs_loads_for_ever(numerics):
    assert GOLDEN_2.stat().st_size < 2048
    assert read(GOLDEN_2).manifest["format"] == 2
    loaded = load_into(GoldenNet(), GOLDEN_2)
    for name, grid in GOLDEN_INPUTS.items():
        assert_same(loaded.get_submodule(name).input_grid, torch.tensor(grid).float(), name)
    set_numerics(loaded, numerics)
    assert loaded(torch.tensor(GOLDEN_TOKENS)).tolist() == GOLDEN_ROUNDED


def test_the_golden_answers_of_inputs_are_those_of_plain_torch():
    plain = plain_golden()
    for name, (scale, low, high) in GOLDEN_INPUTS.items():
        plain.get_submodule(name).register_forward_pre_hook(
            lambda _, args, s=scale, a=low, b=high: ((args[0] / s).clamp(a, b).round() * s,)
        )
    assert plain(torch.tensor(GOLDEN_TOKENS)).tolist() == GOLDEN_ROUNDED


def test_without_grids_of_inputs_the_format_is_the_first():
    packed = compressed(nn.Sequential(nn.Linear(8, 6)), {"0": [4] * 6})
    data = to_bytes(packed)
    assert from_bytes(data).manifest["format"] == 1
    packed[0].input_grid = torch.tensor([0.1, 0.0, 255.0])
    assert from_bytes(to_bytes(packed)).manifest["format"] == 2
    more = stored_size(packed) - len(data)
    assert abs(more - len(",[0.1,0,255]")) < 8  # a header ends on a multiple of eight bytes


def test_every_float32_scale_of_an_input_comes_back():
    packed = compressed(nn.Sequential(nn.Linear(8, 6)), {"0": [4] * 6})
    make = torch.Generator().manual_seed(0)
    ends = [1.4e-45, 1.1754944e-38, 3.4028235e38, 1 / 3]
    for scale in [*ends, *torch.exp2(200 * torch.rand(200, generator=make) - 100).tolist()]:
        packed[0].input_grid = torch.tensor([scale, -37.0, 218.0])
        assert_same(from_bytes(to_bytes(packed)).layers["0"].input_grid, packed[0].input_grid)


def test_a_grid_of_an_input_that_a_file_cannot_say_is_not_written():
    packed = compressed(nn.Sequential(nn.Linear(8, 6)), {"0": [4] * 6})
    wrong = {"scale 0.0": (0.0, 0, 7), "scale nan": (float("nan"), 0, 7), "codes 0.*300": (1.0, 0, 300)}
    for said, grid in wrong.items():
        packed[0].input_grid = torch.tensor(grid)
        with pytest.raises(ValueError, match=f"layer '0': the input's grid has the {said}"):
            to_bytes(packed)
    packed[0].input_grid = torch.tensor([1.0, -0.5, 7.0])
    with pytest.raises(ValueError, match=r"layer '0': its input's grid .* is not of float32 and integers"):
        to_bytes(packed)


def test_the_golden_answers_are_those_of_plain_torch():
    """From the float weights that the rows stand for, in float64: the constants are not merely what came out once."""
    assert plain_golden()(torch.tensor(GOLDEN_TOKENS)).tolist() == GOLDEN_ANSWERS


def plain_golden():
    plain, was = GoldenNet().eval(), golden()
    state = plain.state_dict()
    for name, value in was.state_dict().items():
        if name in state:
            state[name] = value
    for name in GOLDEN_LAYERS:
        state[f"{name}.weight"] = was.get_submodule(name).weight_rows().view(state[f"{name}.weight"].shape)
    plain.load_state_dict(state)
    return plain.double()


# models that are not the file's


def small():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("file") / "a.sgsc"
    save(compressed(small(), {"0": [4, 0, 2, 3], "3": [5] * 3}), path)
    return path


def changed(index, layer):
    model = small()
    model[index] = layer
    return model


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.net(x)


STRANGERS = {
    "layer-missing": (lambda: small()[:3], "layer '3' of the file is not in the model"),
    "layer-extra": (lambda: small().append(nn.Linear(3, 3)), "the file holds nothing for '4.weight'"),
    "value-extra": (lambda: changed(1, nn.Identity()), "the file holds '1.bias', which the model does not have"),
    "other-type": (lambda: changed(3, nn.Conv1d(16, 3, 1)), "layer '3': a Linear in the file, a Conv1d in the model"),
    "namesake": (
        lambda: changed(3, type("Linear", (nn.Identity,), {})()),
        "a Linear in the file, a Linear in the model",
    ),
    "fewer-rows": (lambda: changed(3, nn.Linear(16, 2)), r"layer '3': weight \[3, 12\] in the file, \[2, 16\]"),
    "fewer-inputs": (lambda: changed(3, nn.Linear(8, 3)), r"layer '3': weight \[3, 12\] in the file, \[3, 8\]"),
    "other-kernel": (lambda: changed(0, nn.Conv2d(2, 4, 5)), r"layer '0': weight \[3, 2, 3, 3\] in the file"),
    "other-stride": (lambda: changed(0, nn.Conv2d(2, 4, 3, 2, 1)), r"layer '0': stride \[1, 1\] in the file, \[2, 2\]"),
    "other-padding": (lambda: changed(0, nn.Conv2d(2, 4, 3)), r"layer '0': padding \[1, 1, 1, 1\] in the file"),
    "other-dilation": (
        lambda: changed(0, nn.Conv2d(2, 4, 3, padding=1, dilation=2)),
        r"layer '0': dilation \[1, 1\] in the file, \[2, 2\]",
    ),
    "other-mode": (
        lambda: changed(0, nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")),
        "layer '0': padding_mode zeros in the file, circular in the model",
    ),
    "other-groups": (lambda: changed(0, nn.Conv2d(4, 4, 3, padding=1, groups=2)), r"layer '0': weight \[3, 2, 3, 3\]"),
    "depthwise": (lambda: changed(0, nn.Conv2d(4, 4, 3, padding=1, groups=4)), r"layer '0': weight \[3, 2, 3, 3\]"),
    "bias-of-another-dtype": (lambda: small().double(), "layer '0': its bias"),
    "fewer-norm-channels": (lambda: changed(1, nn.BatchNorm2d(2)), r"'1.weight': torch.float32 \[3\] in the file"),
    "norm-of-another-kind": (lambda: changed(1, nn.GroupNorm(1, 4)), r"'1.weight': torch.float32 \[3\] in the file"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_model_that_is_not_the_files_is_refused_by_the_name_of_the_part(file, name):
    make, match = STRANGERS[name]
    with pytest.raises(ArtefactError, match=match):
        load_into(make(), file)


def test_a_file_brings_a_bias_that_the_model_lacks(file):
    loaded, whole = load_into(changed(3, nn.Linear(16, 3, bias=False)), file), load_into(small(), file)
    assert torch.equal(loaded[3].bias, whole[3].bias)
    assert_same(loaded[3].weight_rows(), whole[3].weight_rows())


def test_the_bias_must_be_there_where_the_model_has_one(tmp_path):
    save(compressed(nn.Sequential(nn.Linear(4, 3, bias=False)), {"0": [2] * 3}), tmp_path / "a.sgsc")
    with pytest.raises(ArtefactError, match="layer '0': its bias"):
        load_into(nn.Sequential(nn.Linear(4, 3)), tmp_path / "a.sgsc")


def test_an_embedding_and_a_grouped_convolution_never_shrink(tmp_path):
    save(compressed(nn.Sequential(nn.Embedding(5, 4)), {"0": [2] * 5}), tmp_path / "a.sgsc")
    with pytest.raises(ArtefactError, match=r"weight \[5, 4\] in the file, \[6, 4\] in the model"):
        load_into(nn.Sequential(nn.Embedding(6, 4)), tmp_path / "a.sgsc")
    save(compressed(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), {"0": [2] * 4}), tmp_path / "a.sgsc")
    with pytest.raises(ArtefactError, match=r"weight \[4, 2, 1, 1\] in the file, \[6, 2, 1, 1\] in the model"):
        load_into(nn.Sequential(nn.Conv2d(4, 6, 1, groups=2)), tmp_path / "a.sgsc")


def test_a_buffer_outside_the_state_dict_survives_load_into_and_stops_load(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "masked", Masked)
    save(compressed(Masked()), tmp_path / "a.sgsc", architecture=("masked", {}))
    assert load_into(Masked(), tmp_path / "a.sgsc").mask.tolist() == [1, 1]
    with pytest.raises(ArtefactError, match="'mask' is not saved with a state dict"):
        load(tmp_path / "a.sgsc")


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        (None, "names no architecture"),
        (("nobody's", {}), re.escape('names the architecture "nobody\'s"; known here: ')),
        (("picky", {"b": 1}), r"architecture 'picky' cannot be built from \{'b': 1\}: .*unexpected keyword"),
        (("picky", {"a": 1}), r"architecture 'picky' cannot be built from \{'a': 1\}: no"),
    ],
)
def test_an_architecture_that_is_not_known_or_not_built_is_named(architecture, match, tmp_path, monkeypatch):
    def picky(a):
        raise RuntimeError("no")

    monkeypatch.setitem(ARCHITECTURES, "picky", picky)
    save(compressed(nn.Sequential(nn.Linear(2, 2))), tmp_path / "a.sgsc", architecture=architecture)
    with pytest.raises(ArtefactError, match=match):
        load(tmp_path / "a.sgsc")


def test_what_cannot_be_opened_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match="directory"):
        read(tmp_path)
