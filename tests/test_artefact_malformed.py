"""Files that are damaged, or whose header is: refused with an `ArtefactError` that names the part."""

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sgsc.artefact import ArtefactError, from_bytes, load_into, read, to_bytes
from tests.checks import assert_same
from tests.malformed import NORM, ZEROS, base, build, gridded, header, loaded_base, model, payload, refuses, sealed

reading = sys.modules["sgsc.artefact.read"]  # the module; the package has a function of that name


def test_the_file_that_all_others_are_made_from_is_whole():
    artefact = from_bytes(build(*base()))
    assert artefact.layers["0"].bits.tolist() == [8, 1, 0]
    assert artefact.layers["0"].offset.tolist() == [-128, -0.5, 0]
    assert artefact.layers["1"].scale.tolist() == [0.25, 1.5]
    assert sorted(artefact.values) == ["0.bias", *sorted(f"2.{n}" for n in NORM)]


def test_the_file_that_all_others_are_made_from_fits_the_model(tmp_path):
    data = build(*base())
    (tmp_path / "a.sgsc").write_bytes(data)
    loaded = load_into(model(), tmp_path / "a.sgsc")
    assert loaded[0].bias.tolist() == [1, 2, 3]
    again = from_bytes(to_bytes(loaded))
    assert again.manifest["layers"] == from_bytes(data).manifest["layers"]


def test_the_same_with_grids_of_inputs_is_whole(tmp_path):
    artefact = from_bytes(build(*gridded()))
    assert_same(artefact.layers["0"].input_grid, torch.tensor([0.0123, 0, 255]))
    assert_same(artefact.layers["1"].input_grid, torch.tensor([2.0, -128, 127]))
    assert from_bytes(build(*base())).layers["0"].input_grid is None
    (tmp_path / "a.sgsc").write_bytes(build(*gridded()))
    again = to_bytes(load_into(model(), tmp_path / "a.sgsc"))
    assert from_bytes(again).manifest["layers"] == artefact.manifest["layers"]


def test_a_reader_that_knows_no_grids_of_inputs_says_so(monkeypatch):
    monkeypatch.setattr("sgsc.artefact.header.FORMATS", (1,))  # as released before
    with pytest.raises(ArtefactError, match=r"^format 2; this version reads 1$"):
        from_bytes(build(*gridded()))


# damage


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    data = to_bytes(loaded_base(tmp_path))
    for length in range(len(data)):
        with pytest.raises(ArtefactError, match=r"cut short|begins at|bytes for|takes? \d+ bytes"):
            from_bytes(data[:length])
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ArtefactError, match=r"^cut: .*cut short"):
            read(tmp_path / "cut")


def test_every_flipped_bit_is_found(tmp_path):
    data = to_bytes(loaded_base(tmp_path))
    whole = int.from_bytes(data, "little")
    from_bytes(data)
    for bit in range(8 * len(data)):
        with pytest.raises(ArtefactError):  # whatever notices first
            from_bytes((whole ^ (1 << bit)).to_bytes(len(data), "little"))


def test_bytes_that_follow_are_refused():
    with pytest.raises(ArtefactError, match="followed by bytes that no tensor owns"):
        from_bytes(build(*base()) + b"\0")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """The header is read, and fits the size that the file had; then the rest is shorter."""
    data = build(*base())
    (tmp_path / "a").write_bytes(data[:-1])

    class Said:
        st_size = len(data)

    monkeypatch.setattr(reading.os, "fstat", lambda handle: Said)
    with pytest.raises(ArtefactError, match=f"{len(data)} bytes when it was opened, {len(data) - 1} when it was read"):
        read(tmp_path / "a")


def damaged(data):
    """A width of 9 in `bits`, which no reader takes."""
    at = len(data) - len(payload(base()[1])) + 10
    return data[:at] + bytes([0x19]) + data[at + 1 :]


def test_a_damaged_file_is_called_damaged_whatever_its_bytes_say():
    with pytest.raises(ArtefactError, match="the file is damaged") as caught:
        from_bytes(damaged(build(*base())))
    assert caught.value.__suppress_context__
    with pytest.raises(ArtefactError, match="a row of 9 bits"):
        from_bytes(build(base()[0], base()[1] | {"bits": ("U8", bytes([0x19, 0x30, 0x02]))}))


def test_no_thread_is_left_whatever_happens(tmp_path, monkeypatch):
    before, data, path = threading.active_count(), build(*base()), tmp_path / "a"
    path.write_bytes(data)
    read(path)
    assert threading.active_count() == before
    for wrong in (damaged(data), build(base()[0], base()[1] | {"bits": ("U8", bytes(3))})):
        with pytest.raises(ArtefactError):
            from_bytes(wrong)
        assert threading.active_count() == before
    for name, error in (("parse_contents", KeyboardInterrupt), ("_memory", MemoryError)):

        def fails(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(reading, name, fails)
            with pytest.raises(error):
                read(path)
        assert threading.active_count() == before


def test_several_threads_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 7)
    whole = build(*base())
    torn = damaged(whole)
    (tmp_path / "whole").write_bytes(whole)
    (tmp_path / "torn").write_bytes(torn)

    def act(i):
        try:
            return read(tmp_path / ("whole", "torn")[i % 2]).layers["1"].data.tolist()
        except ArtefactError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(act, range(200)))
    assert all(answer == [9, 8, 7, 6, 5] for answer in answers[::2])
    assert all("the file is damaged" in answer for answer in answers[1::2])


# the header's bytes


def entry(name, **parts):
    """The base file's header, with parts of one tensor's entry replaced."""

    def text():
        manifest, tensors = base()
        entries = header(manifest, tensors)
        entries[name] |= parts
        return json.dumps(entries)

    return text


def replaced(old, new, count=1):
    def text():
        was = json.dumps(header(*base()))
        assert old in was
        return was.replace(old, new, count)

    return text


def without(name, part):
    def text():
        entries = header(*base())
        del entries[name][part]
        return json.dumps(entries)

    return text


def meta(value):
    def text():
        return json.dumps(header(*base()) | {"__metadata__": value})

    return text


HEADERS = {
    "empty": ("", "does not begin with '{'"),
    "a-list": ("[1]", "does not begin with '{'"),
    "a-space-first": (" {}", "does not begin with '{'"),
    "not-json": ("{]", r"the header is not JSON \(JSONDecodeError\)"),
    "not-utf-8": (b'{"\xff": 1}', r"the header is not JSON \(UnicodeDecodeError\)"),
    "utf-16": ('{"a": 1}'.encode("utf-16-le"), r"the header is not JSON"),
    "two-objects": ("{}{}", "the header is not JSON"),
    "long-number": ('{"a": ' + "1" * 5000 + "}", r"the header is not JSON \(ValueError\)"),
    "nan": ('{"a": NaN}', "the header holds NaN, which is not JSON"),
    "infinity": ('{"a": [-Infinity]}', "the header holds -Infinity"),
    "nested": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", r"the header is not JSON \(RecursionError\)"),
    "key-twice": ('{"a": 1, "a": 1}', "the header: the key 'a' stands twice"),
    "no-metadata": (replaced('"__metadata__"', '"__metadata"'), "tensor '__metadata': want a flat tensor"),
    "nothing": ("{}", "the tensors take 0 bytes, the payload has 65"),
    "metadata-list": (meta([]), "no manifest"),
    "metadata-more": (meta({"sgsc": "{}", "b": "c"}), "no manifest"),
    "metadata-number": (meta({"sgsc": 1}), "no manifest"),
    "manifest-not-json": (meta({"sgsc": "nope"}), r"the manifest is not JSON \(JSONDecodeError\)"),
    "manifest-list": (meta({"sgsc": "[]"}), "the manifest is not a JSON object"),
    "manifest-nan": (meta({"sgsc": '{"format": NaN}'}), "the manifest holds NaN"),
    "manifest-key-twice": (meta({"sgsc": '{"format": 1, "format": 1}'}), "the manifest: the key 'format' stands twice"),
    "entry-list": (replaced('"codes": {', '"codes": [], "other": {'), "tensor 'codes': want a flat tensor"),
    "dtype-missing": (without("codes", "dtype"), "tensor 'codes': want a flat tensor"),
    "dtype-list": (entry("codes", dtype=[]), "tensor 'codes': want a flat tensor"),
    "dtype-unknown": (entry("codes", dtype="F8_E4M3"), "tensor 'codes': dtype 'F8_E4M3' is not one of"),
    "shape-rank-two": (entry("codes", shape=[2, 5]), "tensor 'codes': want a flat tensor"),
    "shape-rank-none": (entry("codes", shape=[]), "tensor 'codes': want a flat tensor"),
    "shape-negative": (entry("codes", shape=[-10]), "tensor 'codes': want a flat tensor"),
    "shape-float": (entry("codes", shape=[10.0]), "tensor 'codes': want a flat tensor"),
    "shape-true": (entry("codes", shape=[True], data_offsets=[0, 1]), "tensor 'codes': want a flat tensor"),
    "shape-huge": (entry("codes", shape=[2**64 + 10]), "tensor 'codes': want a flat tensor"),
    "shape-times-size-overflows": (
        entry("values.F32", shape=[2**47]),
        r"tensor 'values.F32': 44 bytes for \d+ elements",
    ),
    "shape-wrong": (entry("codes", shape=[9]), "tensor 'codes': 10 bytes for 9 elements of U8"),
    "more-keys": (entry("codes", extra=1), "tensor 'codes': want a flat tensor"),
    "offsets-one": (entry("codes", data_offsets=[0]), r"tensor 'codes': data_offsets \[0\]"),
    "offsets-negative": (entry("codes", data_offsets=[-10, 0]), "tensor 'codes': data_offsets"),
    "offsets-backwards": (entry("codes", data_offsets=[10, 0]), "tensor 'codes': -10 bytes for 10"),
    "offsets-text": (entry("codes", data_offsets=["0", "10"]), "tensor 'codes': data_offsets"),
    "offsets-huge": (entry("codes", data_offsets=[2**63, 2**63 + 10]), "tensor 'codes': data_offsets"),
    "overlap": (entry("bits", data_offsets=[9, 12]), "tensor 'bits' begins at byte 9 of the payload, not at 10"),
    "hole": (
        entry("codes", shape=[9], data_offsets=[0, 9]),
        "tensor 'bits' begins at byte 10 of the payload, not at 9",
    ),
    "same-bytes-twice": (
        entry("bits", data_offsets=[0, 3]),
        r"tensor 'codes' begins at byte 0 of the payload, not at 3",
    ),
    "beyond-the-end": (
        entry("values.F32", shape=[12], data_offsets=[21, 69]),
        "take 69 bytes, the payload has 65: it is cut",
    ),
    "before-the-end": (entry("values.F32", shape=[10], data_offsets=[21, 61]), "followed by bytes that no tensor owns"),
    "an-empty-tensor": (
        lambda: json.dumps(header(*base()) | {"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        "tensor 'a' is empty",
    ),
    "minus-zero": (
        replaced('"data_offsets": [0, 10]', '"data_offsets": [-0, 10]'),
        r"data_offsets \[-0.0, 10\] are not",
    ),
    "lone-surrogate-in-the-manifest": (
        replaced('\\"notes\\": {', '\\"notes\\": {\\"a\\": \\"\\ud800\\"'),
        r"the manifest is not JSON \(UnicodeDecodeError\)",
    ),
    "lone-surrogate": (replaced('"__metadata__": {', '"__metadata__": {"\\ud800": 1, '), "no manifest"),
    "digest-written-with-escapes": (replaced(f'{ZEROS}\\"', f'{ZEROS[1:]}\\\\u0030\\"'), "digest"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_header_is_refused(name, tmp_path):
    text, match = HEADERS[name]
    refuses(sealed(text() if callable(text) else text, payload(base()[1])), match, tmp_path)


@pytest.mark.parametrize(
    ("length", "match"),
    [
        (2**64 - 1, "header length 18446744073709551615 is over the limit of 16777216"),
        (2**63, "is over the limit"),
        (16 * 2**20 + 1, "header length 16777217 is over the limit"),
        (16 * 2**20, r"header length 16777216, but only \d+ bytes follow"),
        (0, "the header does not begin with '{'"),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(length, match, tmp_path):
    refuses(length.to_bytes(8, "little") + build(*base())[8:], match, tmp_path)
