"""Checkpoints: any tree comes back exactly; what is no whole checkpoint is refused; no pickle anywhere."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sgsc.checkpoint import load_checkpoint, save_checkpoint
from tests.checks import assert_same

ROOT = Path(__file__).parents[1]
ZEROS = "0" * 64


def assert_tree(found, expected, where="tree"):
    """Types, order of keys, bits of tensors and of floats."""
    assert type(found) is type(expected), f"{where}: {type(found)}, expected {type(expected)}"
    if isinstance(expected, torch.Tensor):
        assert_same(found, expected, where)
    elif isinstance(expected, dict):
        assert list(map(repr, found)) == list(map(repr, expected)), where
        for (_, f), (k, e) in zip(found.items(), expected.items(), strict=True):
            assert_tree(f, e, f"{where}.{k}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert_tree(f, e, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert repr(found) == repr(expected), where
    else:
        assert found == expected, where


def round_trip(tree, folder):
    save_checkpoint(folder / "a.safetensors", tree)
    return load_checkpoint(folder / "a.safetensors")


KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool)
TENSORS = st.builds(
    lambda kind, shape, seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(9).to(kind),
    st.sampled_from(KINDS),
    st.sampled_from([(), (0,), (3,), (2, 0, 3), (2, 3)]),
    st.integers(0, 99),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KEYS = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner), max_leaves=3)
TREES = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TREES)
def test_any_tree_comes_back(tmp_path, tree):
    assert_tree(round_trip(tree, tmp_path), tree)


EDGES = {
    "floats": [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308, 0.1],
    "integers": [0, -1, 2**63, -(2**64), 10**300, True, False],
    "keys": {
        0: "int",
        "0": "text",
        1.5: "float",
        None: "none",
        True: "bool",
        (1, ("a", math.inf)): "tuple",
        "": "empty",
    },
    "marks": {"t": "0", "d": [[1, 2]], "l": [], "f": "inf", "u": {}},
    "a-text-like-a-digest": {"a": ZEROS, "b": torch.ones(1), ZEROS: [ZEROS]},
    "text": ["\0", "\ud800", "ü", "\\", '"', "\n"],
    "empty": [{}, [], (), "", ((),), [[]]],
    "one-tensor": torch.arange(3),
    "nothing": None,
    "tensor-nan": torch.tensor([math.nan, -math.inf, -0.0]),
    "generator": torch.Generator().manual_seed(3).get_state(),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_come_back(name, tmp_path):
    assert_tree(round_trip(EDGES[name], tmp_path), EDGES[name])


def test_numpys_floats_come_back_as_plain_ones(tmp_path):
    assert_tree(
        round_trip([np.float64("inf"), np.float64("nan"), np.float64(0.1)], tmp_path), [math.inf, math.nan, 0.1]
    )


def test_an_optimiser_goes_on_where_it_stood(tmp_path):
    def train(model, optimiser, steps):
        for _ in range(steps):
            optimiser.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
            optimiser.step()

    for kind in (torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
        models = [nn.Linear(3, 2), nn.Linear(3, 2)]
        first = kind(models[0].parameters())
        train(models[0], first, 3)
        saved = round_trip({"model": models[0].state_dict(), "optimiser": first.state_dict()}, tmp_path)
        second = kind(models[1].parameters())
        models[1].load_state_dict(saved["model"])
        second.load_state_dict(saved["optimiser"])
        train(models[0], first, 3)
        train(models[1], second, 3)
        assert_same(models[1].weight, models[0].weight)


def test_tensors_that_share_memory_are_stored_each(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tree = {"whole": whole, "row": whole[1], "turned": whole.T, "wide": whole[:, :1].expand(3, 5), "again": whole}
    found = round_trip(tree, tmp_path)
    assert_tree(found, tree)
    found["whole"].zero_()
    assert found["row"].tolist() == [4, 5, 6, 7]


def test_a_parameter_comes_back_as_a_tensor_and_the_tree_is_left_alone(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    found = round_trip([weight], tmp_path)[0]
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    assert weight.requires_grad


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"a": [1, object()]}, r"cannot hold object \(at tree.a\[1\]\)"),
        ({1, 2}, r"cannot hold set \(at tree\)"),
        ({"m": nn.Linear(1, 1)}, r"cannot hold Linear \(at tree.m\); pass its state_dict"),
        ([np.int64(3)], r"cannot hold int64 \(at tree\[0\]\)"),
        (b"bytes", "cannot hold bytes"),
        ([print], "cannot hold builtin_function_or_method"),
        ({frozenset(): 1}, "cannot hold frozenset"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named_and_the_old_one_stays(tree, match, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", [1])
    with pytest.raises(TypeError, match=match):
        save_checkpoint(tmp_path / "a.safetensors", tree)
    assert load_checkpoint(tmp_path / "a.safetensors") == [1]
    assert len(list(tmp_path.iterdir())) == 1


# malformed

TREE = {"settings": {"steps": 3, "rate": math.inf}, "tensors": [torch.arange(5), torch.ones(2)], 7: ("a", None)}


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a", TREE)
    data = (tmp_path / "a").read_bytes()
    for length in range(len(data)):
        (tmp_path / "a").write_bytes(data[:length])
        with pytest.raises(ValueError, match="a is not a whole checkpoint"):
            load_checkpoint(tmp_path / "a")


def test_every_flipped_bit_is_found(tmp_path):
    save_checkpoint(tmp_path / "a", TREE)
    data = (tmp_path / "a").read_bytes()
    whole = int.from_bytes(data, "little")
    for bit in range(8 * len(data)):
        (tmp_path / "a").write_bytes((whole ^ (1 << bit)).to_bytes(len(data), "little"))
        with pytest.raises(ValueError, match="a is not a whole checkpoint"):
            load_checkpoint(tmp_path / "a")


def sealed(metadata, tensors=None):
    data = safetensors.torch.save(tensors or {}, metadata=metadata)
    return data.replace(ZEROS.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def tree(text, tensors=None):
    return sealed({"checkpoint": f'{{"sha256":"{ZEROS}","tree":{text}}}'}, tensors)


MALFORMED = {
    "empty": (b"", "SafetensorError"),
    "text": (b"hello world, this is no checkpoint", "SafetensorError"),
    "pickle": (b"\x80\x04K\x01." + bytes(100), "SafetensorError"),
    "another-file": (safetensors.torch.save({"a": torch.ones(1)}), "KeyError"),
    "metadata-of-others": (sealed({"tree": "1"}), "KeyError"),
    "not-json": (sealed({"checkpoint": "{"}), "JSONDecodeError"),
    "a-list": (sealed({"checkpoint": "[1]"}), "TypeError"),
    "no-digest": (sealed({"checkpoint": '{"tree": 1}'}), "KeyError"),
    "digest-wrong": (sealed({"checkpoint": '{"sha256": "%s", "tree": 1}' % ("a" * 64)}), "the digest is another"),
    "digest-null": (sealed({"checkpoint": '{"sha256": null, "tree": 1}'}), "the digest is another"),
    "no-tree": (sealed({"checkpoint": f'{{"sha256":"{ZEROS}"}}'}), "KeyError: 'tree'"),
    "tensor-missing": (tree('{"t":"0"}'), "KeyError: '0'"),
    "tensor-name-list": (tree('{"t":["0"]}', {"0": torch.ones(1)}), "TypeError"),
    "mark-unknown": (tree('{"x":1}'), "unknown entry 'x'"),
    "two-marks": (tree('{"t":"0","l":[]}'), "ValueError"),
    "no-mark": (tree("{}"), "ValueError"),
    "list-without-mark": (tree('[{"t":"0"}]', {"0": torch.ones(1)}), "a list that is not marked"),
    "list-of-number": (tree('{"l":3}'), "TypeError"),
    "dict-of-odd-pairs": (tree('{"d":[[1,2,3]]}'), "ValueError"),
    "dict-of-numbers": (tree('{"d":[1]}'), "TypeError"),
    "key-unhashable": (tree('{"d":[[{"l":[]},1]]}'), "TypeError: unhashable"),
    "float-odd": (tree('{"f":"1e5"}'), "unknown entry 'f'"),
    "float-list": (tree('{"f":[]}'), "unknown entry 'f'"),
    "nested": (tree('{"l":[' * 5000 + "]}" * 5000), "RecursionError"),
    "long-number": (tree("1" * 5000), "ValueError"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_refused(name, tmp_path):
    data, match = MALFORMED[name]
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.safetensors is not a whole checkpoint \(.*{re.escape(match)}"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_the_builder_of_malformed_ones_builds_whole_ones_too(tmp_path):
    (tmp_path / "a").write_bytes(tree('{"l":[{"t":"0"},1]}', {"0": torch.ones(1)}))
    assert_tree(load_checkpoint(tmp_path / "a"), [torch.ones(1), 1])


def test_a_tree_too_deep_for_json_is_refused_at_saving_or_comes_back(tmp_path):
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(RecursionError, match="recursion"):
        save_checkpoint(tmp_path / "a", deep)
    assert list(tmp_path.iterdir()) == []


def test_no_checkpoint_at_all_is_the_systems_error(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no checkpoint at"):
            load_checkpoint(path)


# nothing that runs code from a file

DANGEROUS = re.compile(
    r"\b(pickle|dill|cloudpickle|joblib|shelve|marshal)\b|(?<!safetensors\.)\btorch\.(load|save)\b|(?<![\w.])(eval|exec)\("
)
SAID = re.compile(r'""".*?"""|#[^\n]*|allow_pickle=False', re.DOTALL)  # documentation may say that there is none


def dangerous(source):
    return [m.group() for m in DANGEROUS.finditer(SAID.sub("", source))]


def test_the_package_holds_nothing_that_runs_code_from_a_file():
    sources = [p for folder in ("sgsc", "kernels", "bench") for p in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 30
    found = {str(p.relative_to(ROOT)): hits for p in sources if (hits := dangerous(p.read_text()))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "torch.load(path)", "torch.save(x, f)", "x = eval(text)", "exec(code)", "np.load(f, pickle=1)\n"],
)
def test_the_search_finds_what_it_looks_for(source):
    assert dangerous(f"x = 1\n{source}\n")
    assert not dangerous('"""No pickle."""\nspec.loader.exec_module(m)\nmodel.eval()  # torch.load is not used\n')


def test_a_checkpoint_is_a_safetensors_file_with_json(tmp_path):
    save_checkpoint(tmp_path / "a", TREE)
    assert sorted(safetensors.torch.load_file(tmp_path / "a")) == ["0", "1"]
    data = (tmp_path / "a").read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(head["__metadata__"]["checkpoint"]).keys() == {"sha256", "tree"}
