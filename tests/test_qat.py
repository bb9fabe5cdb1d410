"""The uniform baseline: widths as asked, seeded, trained on what the compression is trained on."""

import copy
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from torch.utils.data import TensorDataset

from sgsc.config import CompressionConfig
from sgsc.demos import evaluate, load, qat, train
from sgsc.demos.job import FLOAT, compress
from sgsc.demos.search import Schedule
from sgsc.layers import quant_layers
from sgsc.packed import PackedLayer, pack


@pytest.fixture(scope="module")
def trained():
    task = replace(load("digits"), batch_size=32)
    return task, train(task, 0, steps=150)


def widths(model):
    return {n: set(m.bits.tolist()) for n, m in model.named_modules() if isinstance(m, PackedLayer)}


def test_every_layer_has_the_width_but_the_first_and_the_last(trained):
    found = widths(pack(qat.uniform(copy.deepcopy(trained[1]), 3)))
    first, *middle, last = found
    assert (first, last) == ("stem.0", "head")
    assert found[first] == found[last] == {8}
    assert all(found[name] == {3} for name in middle)


def test_training_brings_back_what_two_bits_cost(trained):
    task, network = trained
    before = evaluate(pack(qat.uniform(copy.deepcopy(network), 2)), task.validation)
    packed = qat.train_uniform(task, copy.deepcopy(network), 2, steps=60, seed=0)
    after = evaluate(packed, task.validation)
    assert after["loss"] < 0.7 * before["loss"]
    assert after["accuracy"] > before["accuracy"]


def test_the_steps_of_the_quantizers_move_and_the_widths_do_not(trained):
    task, network = trained
    start = qat.uniform(copy.deepcopy(network), 4)
    packed = qat.train_uniform(task, copy.deepcopy(network), 4, steps=30, seed=0)
    for name, layer in quant_layers(start).items():
        start_at = layer.weight_quantizer.get_parameter("step").detach().bfloat16().float()
        moved = packed.get_submodule(name).scale / start_at
        assert (moved != 1).any()
        assert (moved - 1).abs().max() < 0.1  # 30 relative steps of at most 1e-3, and bfloat16
    assert widths(packed) == widths(pack(start))


def test_a_point_is_seeded_and_counts_the_whole_file(trained, tmp_path):
    from sgsc.artefact import save

    task, network = trained
    fresh = [replace(task, test=lambda: task.guard) for _ in range(3)]
    first, again, other = (
        qat.run(one, copy.deepcopy(network), 3, 3, seed) for one, seed in zip(fresh, (0, 0, 1), strict=True)
    )
    drop = {"seconds"}
    assert {k: v for k, v in first.items() if k not in drop} == {k: v for k, v in again.items() if k not in drop}
    assert first["packed_loss"] != other["packed_loss"]
    assert first["float_loss"] == other["float_loss"]
    packed = qat.train_uniform(task, copy.deepcopy(network), 3, 3, 0)
    assert first["stored_bytes"] == save(packed, tmp_path / "q.sgsc", architecture=task.architecture)
    assert first["stored_ratio"] == first["stored_bytes"] / first["float_bytes"]
    assert first["packed_loss"] == evaluate(packed, task.guard)["loss"]
    assert first["validation_loss"] == evaluate(packed, task.validation)["loss"]


def test_no_steps_are_refused(trained):
    with pytest.raises(ValueError, match="steps=0 trains nothing"):
        qat.train_uniform(trained[0], copy.deepcopy(trained[1]), 3, 0, 0)


def test_text_is_served_too():
    task = load("char-lm", limit=16)
    torch.manual_seed(0)
    found = widths(qat.train_uniform(task, task.build(), 4, steps=1, seed=0))
    assert found["token"] == found["head"] == {8}
    assert found["blocks.0.up"] == found["position"] == {4}


def unlabelled(task):
    """The same inputs, each named as another class."""
    x, y = task.train.tensors
    return replace(task, train=TensorDataset(x, (y + 1) % 10))


def test_a_task_that_is_distilled_learns_the_float_answers_and_no_labels(trained):
    task, network = trained
    wrong = unlabelled(task)
    taught = qat.train_uniform(replace(wrong, distilled=True), copy.deepcopy(network), 2, steps=60, seed=0)
    assert evaluate(taught, task.validation)["accuracy"] > 0.9
    assert evaluate(qat.train_uniform(wrong, copy.deepcopy(network), 2, 60, 0), task.validation)["accuracy"] < 0.5


def test_candidates_and_winners_of_a_search_learn_the_float_answers(trained):
    task, network = trained
    for fit in (Schedule.short, Schedule.long):
        model = qat.uniform(copy.deepcopy(network), 2)
        how = Schedule(unlabelled(task), "cpu", 0, 60, 60, network)
        fit(how, model, lambda loss: None)
        assert evaluate(model, task.validation)["accuracy"] > 0.9


@pytest.mark.parametrize("distilled", [False, True])
def test_a_compression_learns_the_float_answers_where_its_task_says_so(trained, distilled, tmp_path):
    task, network = trained
    safetensors.torch.save_file(network.state_dict(), tmp_path / FLOAT)
    task = replace(unlabelled(task), distilled=distilled, start=network.state_dict)
    config = CompressionConfig(target_size=0.1, steps=60, preservation_weight=0.0, tolerance=0.9, margin_tolerance=1.0)
    found = compress(task, config, tmp_path)
    accuracy = found.report["history"][-1]["accuracy"]
    assert accuracy > 0.9 if distilled else accuracy < 0.5
