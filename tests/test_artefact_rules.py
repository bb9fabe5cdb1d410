"""Manifest and tensors of a file: every rule refuses by itself, with an `ArtefactError` that names the part."""

import json
import re

import pytest
import torch
from torch import nn

from sgsc.artefact import ArtefactError, from_bytes, load_into
from tests.malformed import NORM, SIZES, ZEROS, base, build, floats, gridded, header, payload, refuses, sealed, short


def layer(index, **parts):
    """Replace parts of one entry of layers."""
    places = {"name": 0, "type": 1, "shape": 2, "shift": 3, "settings": 4}

    def change(manifest, tensors):
        for part, value in parts.items():
            manifest["layers"][index][places[part]] = value

    return change


def key(name, value):
    def change(manifest, tensors):
        manifest[name] = value

    return change


def dropped(name):
    def change(manifest, tensors):
        del manifest[name]

    return change


def tensor(name, dtype, content):
    def change(manifest, tensors):
        tensors[name] = (dtype, content)

    return change


def gone(name):
    def change(manifest, tensors):
        del tensors[name]

    return change


def conv(**settings):
    def change(manifest, tensors):
        manifest["layers"][1][4] |= settings

    return change


def value(index, listed, dtype="F32"):
    def change(manifest, tensors):
        manifest["values"][dtype][index] = listed

    return change


def both(*changes):
    def change(manifest, tensors):
        for one in changes:
            one(manifest, tensors)

    return change


def no_norm(manifest, tensors):
    """Without the batch norm's variance."""
    manifest["values"]["F32"].pop()
    tensors["values.F32"] = ("F32", tensors["values.F32"][1][:-8])


def smaller_norm(manifest, tensors):
    """The batch norm with one channel in its variance."""
    manifest["values"]["F32"][-1] = ["2.running_var", [1]]
    tensors["values.F32"] = ("F32", tensors["values.F32"][1][:-4])


def boolean(manifest, tensors):
    manifest["values"]["BOOL"] = [["flag", [2]]]
    tensors["values.BOOL"] = ("BOOL", b"\x01\x02")


def extra_value(name, dtype, content):
    def change(manifest, tensors):
        manifest["values"].setdefault(dtype, []).append([name, [len(content) // SIZES[dtype]]])
        tensors[f"values.{dtype}"] = (dtype, tensors.get(f"values.{dtype}", ("", b""))[1] + content)

    return change


def integer_bias(manifest, tensors):
    del manifest["values"]["F32"][0]
    tensors["values.F32"] = ("F32", tensors["values.F32"][1][12:])
    extra_value("0.bias", "I64", bytes(24))(manifest, tensors)


def scalar_norm(manifest, tensors):
    """Batch norm weight without an axis."""
    manifest["values"]["F32"][1] = ["2.weight", []]
    tensors["values.F32"] = ("F32", tensors["values.F32"][1][:-4])


def moved_to_double(manifest, tensors):
    manifest["values"] = {"F64": manifest["values"]["F32"]}
    content = tensors.pop("values.F32")[1]
    tensors["values.F64"] = (
        "F64",
        torch.frombuffer(bytearray(content), dtype=torch.float32).double().numpy().tobytes(),
    )


def no_layers_left(manifest, tensors):
    manifest["layers"] = []


def one_layer(manifest, tensors):
    """Only the first layer, consistently."""
    manifest["layers"].pop()
    tensors["codes"] = ("U8", tensors["codes"][1][:5])
    tensors["bits"] = ("U8", bytes([0x18, 0x00]))
    tensors["scales"] = ("BF16", tensors["scales"][1][:4])


def twice_by_another_name(manifest, tensors):
    """The first layer again, consistently, called 9."""
    manifest["layers"].append(["9", "Linear", [1, 0], 0, {}])
    tensors["bits"] = ("U8", bytes([0x18, 0x30, 0x02]))


def wraps_around(manifest, tensors):
    """2^17 rows of 2^47 weights at 8 bits are 2^64 bytes: none, for whoever counts in 64 bits."""
    rows = 2**17
    manifest["layers"] = [["0", "Linear", [rows, 2**47 - 1], 0, {}]]
    tensors |= {"bits": ("U8", b"\x88" * (rows // 2)), "scales": ("BF16", short(1.0) * rows)}
    del tensors["codes"]


def one_wide_row(manifest, tensors):
    """2^16 rows of 2^32 - 1 weights, all but one removed, fit every rule but the bytes that are there."""
    rows = 2**15
    manifest["layers"] = [["0", "Linear", [rows, 2**32], 0, {}]]
    tensors |= {"bits": ("U8", b"\x08" + bytes(rows // 2 - 1)), "scales": ("BF16", short(1.0))}


NESTED = json.loads("[" * 500 + "]" * 500)
RULES = {
    "format-3": (key("format", 3), "format 3; this version reads 1 and 2"),
    "format-2.0": (key("format", 2.0), "format 2.0;"),
    "format-0": (key("format", 0), "format 0;"),
    "format-1.0": (key("format", 1.0), "format 1.0;"),
    "format-true": (key("format", True), "format True;"),
    "format-text": (key("format", "1"), "format '1';"),
    **{f"{name}-missing": (dropped(name), f"keys differ .*'{name}'") for name in base()[0] if name != "format"},
    "format-missing": (dropped("format"), "format None;"),
    "another-key": (key("extra", 1), "keys differ .*'extra'"),
    "digest-short": (key("sha256", ZEROS[1:]), "sha256 is not 64 hexadecimal digits"),
    "digest-upper-case": (key("sha256", "A" * 64), "sha256 is not 64 hexadecimal digits"),
    "digest-other-digits": (key("sha256", "٠" * 64), "sha256 is not 64 hexadecimal digits"),
    "digest-number": (key("sha256", 0), "sha256 is not 64 hexadecimal digits"),
    "digest-wrong": (key("sha256", "a" * 64), "digest [0-9a-f]{12}…, but the manifest says aaaaaaaaaaaa…"),
    "architecture-text": (key("architecture", "digits-cnn"), r"architecture is not \[name, arguments\]"),
    "architecture-arguments-list": (key("architecture", ["a", []]), "architecture is not"),
    "architecture-three": (key("architecture", ["a", {}, 1]), "architecture is not"),
    "notes-list": (key("notes", []), "notes and values must be objects"),
    "values-list": (key("values", []), "notes and values must be objects"),
    "layers-empty": (no_layers_left, "layers must be a list of at least one"),
    "layers-object": (key("layers", {}), "layers must be a list of at least one"),
    "layer-short": (key("layers", [["0", "Linear", [3, 4], 0]]), "an entry of layers is not"),
    "layer-object": (key("layers", [{}]), "an entry of layers is not"),
    "layer-name-null": (layer(0, name=None), "an entry of layers is not"),
    "layer-shift-true": (layer(0, shift=True), "an entry of layers is not"),
    "layer-shift-9": (layer(0, shift=9), "layer '0': rows and width .* or shift 9 out of range"),
    "layer-shift-negative": (layer(0, shift=-1), "layer '0': .* shift -1 out of range"),
    "layer-type-unknown": (
        layer(0, type="LSTM"),
        "layer '0': type 'LSTM' is not one of Conv1d, Conv2d, Embedding, Linear",
    ),
    "layer-shape-one": (layer(0, shape=[3]), "layer '0': rows and width"),
    "layer-shape-negative": (layer(0, shape=[3, -4]), "layer '0': rows and width"),
    "layer-shape-float": (layer(0, shape=[3, 4.0]), "layer '0': rows and width"),
    "layer-shape-2-to-the-48": (layer(0, shape=[0, 2**48]), "layer '0': rows and width"),
    "layer-shape-product": (layer(0, shape=[2**24, 2**24]), "layer '0': rows and width"),
    "layer-twice": (layer(1, name="0"), "the name '0' stands twice in the manifest"),
    "value-twice": (value(1, ["0.bias", [2]]), "the name '0.bias' stands twice"),
    "value-called-as-a-layer": (value(1, ["1", [2]]), "the name '1' stands twice"),
    "value-dtype-unknown": (key("values", {"F8": []}), "values of dtype 'F8'"),
    "value-dtype-object": (key("values", {"F32": {}}), "values of dtype 'F32'"),
    "value-entry-short": (value(0, ["0.bias"]), "an entry of values.F32 is not"),
    "value-name-number": (value(0, [0, [3]]), "an entry of values.F32 is not"),
    "value-shape-number": (value(0, ["0.bias", 3]), "an entry of values.F32 is not"),
    "value-shape-negative": (value(0, ["0.bias", [-3]]), "an entry of values.F32 is not"),
    "value-nine-axes": (value(0, ["0.bias", [3] + [1] * 8]), "an entry of values.F32 is not"),
    "value-shape-huge": (value(0, ["0.bias", [2**30, 2**30]]), "an entry of values.F32 is not"),
    "value-empty-with-huge-strides": (value(0, ["0.bias", [0, 2**47, 2**47]]), "an entry of values.F32 is not"),
    "value-longer": (value(0, ["0.bias", [4]]), "'values.F32': 11 elements of F32, but the manifest needs 12"),
    "value-shape": (value(0, ["0.bias", [1, 3]]), r"layer '0': its bias in the file does not fit"),
    "value-missing": (no_norm, "the file holds nothing for '2.running_var' of the model"),
    "value-unknown": (extra_value("else", "F32", bytes(4)), "the file holds 'else', which the model does not have"),
    "value-of-a-packed-layer": (extra_value("0.data", "U8", bytes(4)), "the file holds '0.data', which"),
    "value-weight-beside-the-layer": (extra_value("0.weight", "F32", bytes(48)), "the file holds '0.weight', which"),
    "value-dtype-wrong": (moved_to_double, "layer '0': its bias"),
    "value-bool-2": (boolean, "tensor 'values.BOOL': a byte is neither 0 nor 1"),
    "bias-of-integers": (integer_bias, "layer '0': its bias in the file does not fit the model's"),
    "bias-extra-longer": (extra_value("1.bias", "F32", bytes(12)), r"layer '1': its bias .*'torch.float32', 2\)"),
    "bias-extra-of-doubles": (extra_value("1.bias", "F64", bytes(16)), "layer '1': its bias"),
    "bias-missing": (value(0, ["0.other", [3]]), "layer '0': its bias"),
    "norm-torn": (smaller_norm, r"'2': tensors of \[1, 2\] channels in one BatchNorm2d"),
    "norm-scalar": (scalar_norm, r"'2.weight': torch.float32 \[\] in the file, torch.float32 \[2\] in the model"),
    "tensor-unknown": (tensor("extra", "U8", b"\0"), "tensor 'extra' is not part of the format"),
    "tensor-values-unlisted": (tensor("values.I64", "I64", bytes(8)), "tensor 'values.I64' is not part of the format"),
    "codes-missing": (gone("codes"), "tensor 'codes': 0 bytes of U8, but the layers' widths need 10"),
    "codes-short": (tensor("codes", "U8", bytes(9)), "tensor 'codes': 9 bytes"),
    "codes-long": (tensor("codes", "U8", bytes(11)), "tensor 'codes': 11 bytes"),
    "codes-dtype": (tensor("codes", "BOOL", bytes(10)), "tensor 'codes': 10 bytes of BOOL"),
    "codes-unused-bits": (
        tensor("codes", "U8", bytes([1, 128, 255, 77, 0b11010, 9, 8, 7, 6, 5])),
        "layer '0': the unused bits of a row's last byte are not 0",
    ),
    "bits-missing": (gone("bits"), "tensor 'bits': 0 elements of U8, but the manifest needs 3"),
    "bits-short": (tensor("bits", "U8", bytes(2)), "tensor 'bits': 2 elements"),
    "bits-dtype": (tensor("bits", "BOOL", bytes(3)), "tensor 'bits': 3 elements of BOOL"),
    **{
        f"bits-{n}": (tensor("bits", "U8", bytes([0x10 + n, 0x30, 0x02])), f"layer '0': a row of {n} bits; want 0 to 8")
        for n in range(9, 16)
    },
    "bits-15-in-the-second-layer": (tensor("bits", "U8", bytes([0x18, 0x30, 0x0F])), "layer '1': a row of 15 bits"),
    "bits-unused-half": (tensor("bits", "U8", bytes([0x18, 0x30, 0x12])), "tensor 'bits': the unused half"),
    "scales-missing": (gone("scales"), "tensor 'scales': 0 of F32, but 4 rows have bits"),
    "scales-short": (tensor("scales", "BF16", short(1, 1, 1)), "tensor 'scales': 3 of BF16, but 4 rows have bits"),
    "scales-dtype": (tensor("scales", "F64", bytes(32)), "tensor 'scales': 4 of F64"),
    "scale-nan": (tensor("scales", "BF16", short(1, float("nan"), 1, 1)), "layer '0': a scale is not positive"),
    "scale-inf": (tensor("scales", "F32", floats(1, 1, float("inf"), 1)), "layer '1': a scale is not positive"),
    "scale-zero": (tensor("scales", "F32", floats(0, 1, 1, 1)), "layer '0': a scale is not positive"),
    "scale-minus-zero": (tensor("scales", "F32", floats(1, 1, 1, -0.0)), "layer '1': a scale is not positive"),
    "scale-negative": (tensor("scales", "BF16", short(1, 1, 1, -1)), "layer '1': a scale is not positive"),
    "linear-with-settings": (
        layer(0, settings={"stride": [1]}),
        r"layer '0': a Linear has no settings, got \['stride'\]",
    ),
    "kernel-missing": (layer(1, settings={}), "layer '1': settings {} do not fit a Conv2d"),
    "kernel-null": (conv(kernel=None), "layer '1': settings .* do not fit"),
    "kernel-zero": (conv(kernel=[2, 0]), "layer '1': settings .* do not fit"),
    "kernel-one-axis": (conv(kernel=[4]), "layer '1': settings .* do not fit"),
    "kernel-does-not-divide": (conv(kernel=[3, 1]), "layer '1': 2 rows of 8 do not fit its kernel and groups"),
    "stride-zero": (conv(stride=[1, 0]), "layer '1': settings .* do not fit"),
    "stride-huge": (conv(stride=[1, 2**31]), "layer '1': settings .* do not fit"),
    "stride-true": (conv(stride=[1, True]), "layer '1': settings .* do not fit"),
    "dilation-zero": (conv(dilation=[0, 1]), "layer '1': settings .* do not fit"),
    "padding-two": (conv(padding=[1, 1]), "layer '1': settings .* do not fit"),
    "padding-negative": (conv(padding=[0, 0, 0, -1]), "layer '1': settings .* do not fit"),
    "padding-not-the-models": (conv(padding=[0, 0, 0, 2**40]), r"layer '1': padding \[0, 0, 0, 1099511627776\] in"),
    "groups-zero": (conv(groups=0), "layer '1': settings .* do not fit"),
    "groups-do-not-divide": (conv(groups=3), "layer '1': 2 rows of 8 do not fit its kernel and groups"),
    "groups-not-the-models": (conv(groups=2), "layer '1': groups 2 in the file, 1 in the model"),
    "padding-mode-unknown": (conv(padding_mode="mirror"), "layer '1': settings .* do not fit"),
    "padding-mode-list": (conv(padding_mode=[]), "layer '1': settings .* do not fit"),
    "setting-unknown": (conv(bias=True), "layer '1': settings .* do not fit"),
    "another-type": (layer(0, type="Embedding"), "layer '0': a Embedding in the file, a Linear in the model"),
    "another-shape": (both(layer(0, shape=[4, 3]), layer(1, shape=[1, 8])), r"tensor 'codes'"),
    "layer-missing": (one_layer, "the file holds nothing for '1.weight' of the model"),
    "layer-extra": (twice_by_another_name, "layer '9' of the file is not in the model"),
    "layer-of-another-name": (layer(0, name="7"), "layer '7' of the file is not in the model"),
    "rows-2-to-the-40-without-bits": (layer(0, shape=[2**40, 4]), "tensor 'bits': 3 elements"),
    "width-2-to-the-40": (layer(0, shape=[3, 2**40]), "tensor 'codes': 10 bytes"),
    "bytes-of-rows-overflow": (wraps_around, r"layer '0': rows and width \[131072, 140737488355327\]"),
    "one-wide-row": (one_wide_row, "tensor 'codes': 10 bytes of U8, but the layers' widths need 4294967296"),
    "nested-deep": (key("notes", {"a": NESTED}), None),
}


def inputs(grid, index=0):
    """Another grid of a layer's input."""

    def change(manifest, tensors):
        manifest["layers"][index][5] = grid

    return change


def of_an_embedding(manifest, tensors):
    manifest["layers"][0][1] = "Embedding"


def in_format_1(manifest, tensors):
    manifest["format"] = 1


NOT_THREE = r"layer '0': its input's grid .* is not \[scale, code_min, code_max\]"
NO_SCALE = "layer '0': the input's grid has the scale .*; want a positive, finite float32"
NO_CODES = "layer '0': the input's grid has the codes .*; want 2 to 256 integers, 0 among them"
INPUT_RULES = {
    "in-format-1": (in_format_1, r"an entry of layers is not \[name, type, \[rows, width\], shift, settings\]$"),
    "of-an-embedding": (of_an_embedding, "layer '0': the input of a layer of type Embedding has no grid"),
    "no-list": (inputs({"scale": 1.0}), "entry of layers is not .*, in format 2, the input's grid"),
    "null": (inputs(None), "entry of layers is not"),
    "empty": (inputs([]), NOT_THREE),
    "two": (inputs([1.0, 0]), NOT_THREE),
    "four": (inputs([1.0, 0, 7, 0]), NOT_THREE),
    "text": (inputs(["1.0", 0, 7]), NOT_THREE),
    "true": (inputs([True, 0, 7]), NOT_THREE),
    "codes-true": (inputs([1.0, False, True]), NOT_THREE),
    "codes-real": (inputs([1.0, 0.0, 7]), NOT_THREE),
    "codes-minus-zero": (inputs([1.0, -0.0, 7]), NOT_THREE),
    "scale-zero": (inputs([0, 0, 7]), NO_SCALE),
    "scale-negative": (inputs([-1.0, 0, 7]), NO_SCALE),
    "scale-rounds-to-zero": (inputs([1e-46, 0, 7]), NO_SCALE),
    "scale-rounds-to-infinity": (inputs([1e39, 0, 7]), NO_SCALE),
    "scale-infinite": (inputs([1e400, 0, 7]), "the manifest holds Infinity"),
    "scale-beyond-doubles": (inputs([10**400, 0, 7]), "layer '0': int too large to convert to float"),
    "codes-without-zero": (inputs([1.0, 1, 7]), NO_CODES),
    "codes-below-zero": (inputs([1.0, -7, -1]), NO_CODES),
    "one-code": (inputs([1.0, 0, 0]), NO_CODES),
    "257-codes": (inputs([1.0, -1, 255]), NO_CODES),
    "codes-huge": (inputs([1.0, -(2**200), 2**200]), NO_CODES),
}


@pytest.mark.parametrize("name", INPUT_RULES)
def test_every_rule_of_inputs_refuses_by_itself(name, tmp_path):
    change, match = INPUT_RULES[name]
    manifest, tensors = gridded()
    change(manifest, tensors)
    refuses(build(manifest, tensors), match, tmp_path)


@pytest.mark.parametrize("name", [name for name, (_, match) in RULES.items() if match])
def test_every_rule_refuses_by_itself(name, tmp_path):
    change, match = RULES[name]
    manifest, tensors = base()
    change(manifest, tensors)
    refuses(build(manifest, tensors), match, tmp_path)


def test_a_width_is_free_where_no_row_has_bits(tmp_path):
    """What a file claims at no bytes is shapes only; the model refuses it."""
    manifest, tensors = base()
    manifest["layers"][0] = ["0", "Linear", [3, 2**40], 0, {}]
    tensors["codes"] = ("U8", tensors["codes"][1][5:])
    tensors["bits"] = ("U8", bytes([0x00, 0x30, 0x02]))
    tensors["scales"] = ("BF16", tensors["scales"][1][4:])
    assert from_bytes(build(manifest, tensors)).layers["0"].weight_shape() == (3, 2**40)
    refuses(build(manifest, tensors), r"layer '0': weight \[3, 1099511627776\] in the file, \[3, 4\]", tmp_path)


def test_deep_notes_are_kept_or_refused_and_nothing_else():
    for depth in range(100, 1100, 50):
        manifest, tensors = base()
        data = build(manifest | {"notes": {"a": "MARK"}}, tensors)
        text = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b'\\"MARK\\"', b"[" * depth + b"]" * depth)
        text = re.sub(rb"[0-9a-f]{64}", ZEROS.encode(), text, count=1)
        try:
            from_bytes(sealed(text, payload(tensors)))
        except ArtefactError as error:
            assert "not JSON (RecursionError)" in str(error)  # noqa: PT017


def test_many_names_the_last_of_them_twice_are_refused_at_once(tmp_path):
    """Linear in the names: counting each would take a quarter of an hour."""
    manifest, tensors = base()
    manifest["values"]["I64"] = [*([f"{i:x}", [0]] for i in range(16, 300_000)), ["493df", [0]], ["493df", [0]]]
    refuses(build(manifest, tensors), "the name '493df' stands twice", tmp_path)


def test_the_base_file_is_refused_by_nothing_that_a_writer_may_do():
    """Entries in another order, spaces at the end of the header: still a file of the format."""
    manifest, tensors = base()
    entries = header(manifest, tensors)
    data = sealed(json.dumps(dict(reversed(entries.items())), indent=1) + "    ", payload(tensors))
    assert from_bytes(data).layers.keys() == {"0", "1"}


def test_tensors_may_begin_at_any_byte():
    manifest, tensors = base()
    for spaces in range(8):
        artefact = from_bytes(sealed(json.dumps(header(manifest, tensors)) + " " * spaces, payload(tensors)))
        assert artefact.layers["1"].scale.tolist() == [0.25, 1.5]
        assert [value for name in NORM for value in artefact.values[f"2.{name}"].tolist()] == [1, 1, 0, 0, 0, 0, 1, 1]
        assert artefact.values["0.bias"].tolist() == [1, 2, 3]


def test_attention_that_cannot_be_unfused_is_refused(tmp_path):
    manifest, tensors = base()
    manifest["layers"][0][0] = "q_proj"
    (tmp_path / "a.sgsc").write_bytes(build(manifest, tensors))
    with pytest.raises(ArtefactError, match=r"layer '': .*add_bias_kv"):
        load_into(nn.MultiheadAttention(4, 2, add_bias_kv=True), tmp_path / "a.sgsc")
