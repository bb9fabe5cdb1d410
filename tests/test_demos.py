"""The embedded tasks: what the networks hold, that splits stay apart, and that training is seeded and learns."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

from sgsc.demos import ARCHITECTURES, TASKS, accuracy, batches, evaluate, load, train
from sgsc.demos.models import CharLM, MnistCNN, NamesLM
from sgsc.demos.qat import tune, uniform
from sgsc.demos.tasks import NAME_LETTERS, PRINTABLE, stratified, windows
from sgsc.demos.training import crops, from_file, peak, shift

DATA = Path(os.environ.get("SGSC_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_mnist = pytest.mark.skipif(not (DATA / "mnist.npz").is_file(), reason="no mnist.npz in SGSC_DATA")
needs_names = pytest.mark.skipif(not (DATA / "text/names.txt").is_file(), reason="no text/names.txt in SGSC_DATA")

ARGUMENTS = {"char-lm": {"vocabulary": 97}}
INPUTS = {
    "digits-cnn": lambda n: torch.rand(n, 1, 8, 8),
    "char-lm": lambda n: torch.randint(97, (n, 64)),
    "mnist-cnn": lambda n: torch.rand(n, 1, 28, 28),
    "names-lm": lambda n: torch.randint(27, (n, 32)),
    "resnet9": lambda n: torch.rand(n, 3, 32, 32),
    "resnet20": lambda n: torch.rand(n, 3, 32, 32),
}


def build(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name](**ARGUMENTS.get(name, {})).eval()


def weights(model, kind):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, kind))


def prose(length):
    """Seeded text without repeats to speak of."""
    letters = np.random.default_rng(0).integers(32, 127, length)
    return "".join(map(chr, letters))


# networks


def test_the_cnn_of_the_paper_has_its_81696_convolution_weights_and_no_others():
    model = MnistCNN()
    assert weights(model, nn.Conv2d) == 81_696
    assert sum(p.numel() for p in model.parameters()) == 81_696 + 576 * 10 + 10


def test_the_language_model_of_the_paper_has_its_198336_linear_weights():
    model = NamesLM()
    assert weights(model, nn.Linear) == 198_336
    assert weights(model, nn.Embedding) == (27 + 32) * 64


@pytest.mark.parametrize(("name", "low", "high"), [("digits-cnn", 100_000, 250_000), ("char-lm", 250_000, 400_000)])
def test_the_demo_networks_are_neither_toys_nor_slow(name, low, high):
    assert low <= sum(p.numel() for p in build(name).parameters()) <= high


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_symbolic_trace_answers_as_the_network(name):
    model = build(name)
    traced = torch.fx.symbolic_trace(model)
    for count in (1, 3):
        x = INPUTS[name](count)
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
        assert model(x).shape[0] == count


@pytest.mark.parametrize("name", ["char-lm", "names-lm"])
def test_a_character_changes_no_answer_before_it_and_short_inputs_are_prefixes(name):
    model = build(name)
    x = INPUTS[name](2)
    other = x.clone()
    other[:, 10] = (x[:, 10] + 1) % 27
    same = (model(x) == model(other)).all(-1)
    assert same[:, :10].all()
    assert not same[:, 10:].any()
    torch.testing.assert_close(model(x[:, :10]), model(x)[:, :10], rtol=1e-4, atol=1e-5)


def test_each_place_has_a_position_of_its_own():
    model = build("names-lm")
    same = torch.zeros(1, 32, dtype=torch.long)
    before = model(same)
    with torch.no_grad():
        model.position.weight[7] += 1
    changed = (model(same) != before).any(-1)[0]
    assert changed.tolist() == [False] * 7 + [True] * 25


def test_digits_has_a_sum_of_convolution_paths_and_groups():
    convs = [m for m in build("digits-cnn").modules() if isinstance(m, nn.Conv2d)]
    assert any(c.groups == c.in_channels > 1 for c in convs)
    traced = torch.fx.symbolic_trace(build("digits-cnn"))
    assert any(node.op == "call_function" and node.target.__name__ == "add" for node in traced.graph.nodes)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"width=10 does not divide into heads=4; choose a multiple"):
        CharLM(27, width=10)


# splits


def test_stratified_splits_are_disjoint_cover_everything_and_keep_the_classes():
    labels = torch.arange(1000) % 7
    splits = stratified(labels, (0.55, 0.10, 0.15, 0.20), seed=3)
    assert sorted(torch.cat(splits).tolist()) == list(range(1000))
    for rows, share in zip(splits, (0.55, 0.10, 0.15, 0.20), strict=True):
        counts = labels[rows].bincount(minlength=7)
        assert (counts - share * 1000 / 7).abs().max() <= 1.5
        assert not torch.equal(labels[rows], labels[rows].sort().values), "a limit would cut classes off"


def test_digits_uses_every_sample_once():
    task = load("digits", seed=1)
    splits = [task.train, task.validation, task.guard, task.test()]
    assert [round(len(s) / 1797, 2) for s in splits] == [0.55, 0.10, 0.15, 0.20]
    rows = torch.cat([s.tensors[0].flatten(1) for s in splits])
    assert sum(map(len, splits)) == 1797
    from sklearn.datasets import load_digits

    ours, theirs = (sorted(map(tuple, np.asarray(a).round(4).tolist())) for a in (rows * 16, load_digits().data))
    assert ours == theirs
    assert rows.min() == 0
    assert rows.max() == 1


@pytest.mark.parametrize("name", ["digits", "char-lm"])
def test_the_seed_decides_the_splits(name):
    first, again, other = (load(name, seed=seed, limit=50).guard.tensors[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_test_split_is_read_once():
    task = load("digits")
    assert len(task.test()) == 359
    with pytest.raises(RuntimeError, match="test split of digits has been read once already"):
        task.test()


def test_windows_stay_within_their_split_and_targets_follow():
    context, text = 8, "".join(map(chr, range(1000, 3000)))  # each character occurs once and tells its place
    splits = windows(text, text, context, (0.5, 0.2, 0.1, 0.2))
    reach = []
    for split in splits:
        x, y = split.tensors
        assert torch.equal(x + 1, y), "a target is the character one place later"
        assert torch.equal(x.flatten(), x.flatten()[0] + torch.arange(x.numel())), "windows neither overlap nor skip"
        reach.append((int(x.min()), int(y.max())))
    assert reach[0][0] == 0
    assert [start for start, _ in reach[1:]] == [1000, 1400, 1600]
    for (_, end), (start, _) in itertools.pairwise(reach):
        assert start - end > context, "a gap lies before each cut"
    assert 2000 - reach[3][1] <= context, "nothing is dropped at the end"


def test_cuts_move_to_the_nearest_start():
    text = "".join(map(chr, range(1000, 3000)))
    starts = [0, 900, 1390, 1700, 2000]
    splits = windows(text, text, 8, (0.5, 0.2, 0.1, 0.2), starts)
    assert [int(split.tensors[0].min()) for split in splits] == [0, 900, 1390, 1700]


def test_the_standard_library_is_plenty_and_printable():
    task = load("char-lm")
    x, y = task.train.tensors
    assert x.shape[1] == 64
    assert 800_000 < x.numel() < 2_000_000
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert "import" in "".join(task.show(row) for row in x[:200])
    held = {tuple(row) for split in (task.validation, task.guard, task.test()) for row in split.tensors[0].tolist()}
    shared = len(held & set(map(tuple, x.tolist())))
    assert shared <= 0.002 * len(held), f"{shared} windows of {len(held)} also stand in the training split"


def test_a_limit_cuts_every_split():
    task = load("digits", limit=7)
    assert [len(split) for split in (task.train, task.validation, task.guard, task.test())] == [7, 7, 7, 7]


def test_a_users_own_text_is_read_and_shown(tmp_path):
    path = tmp_path / "own.txt"
    text = "caf\u00e9 " + prose(40_000)
    path.write_text(text, encoding="utf-8")
    task = load("char-lm", path)
    assert task.text
    assert task.show(task.train[0][0]) == text[:64].replace("\u00e9", "?")
    assert "own.txt" in task.sources
    assert str(tmp_path) not in task.sources


def test_a_digit_is_shown_as_rows_of_floats():
    task = load("digits", limit=1)
    shown = task.show(task.train[0][0])
    assert len(shown) == 8
    assert all(isinstance(value, float) and 0 <= value <= 1 for row in shown for value in row)


# errors


def test_unknown_names_and_limits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no task is called 'digit'; there are digits, char-lm, mnist, names"):
        load("digit")
    with pytest.raises(ValueError, match="limit=0 leaves no sample"):
        load("digits", limit=0)
    with pytest.raises(ValueError, match="digits comes with scikit-learn and reads no file"):
        load("digits", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "own.txt is empty; give a file"),
        (b"caf\xe9", r"own.txt is not UTF-8 \(byte 3\); convert it"),
        (
            b"too short " * 30,
            "300 characters leave 2 windows of 64 in the train split, the least is 16; give a text of",
        ),
        ("\u4f60\u597d".encode() * 20_000, "40000 of the 40000 characters of .* are not printable ASCII"),
    ],
    ids=["empty", "latin-1", "short", "chinese"],
)
def test_a_text_that_cannot_serve_is_refused(tmp_path, content, message):
    path = tmp_path / "own.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("char-lm", path)


@pytest.mark.parametrize("short", range(4))
def test_each_split_must_hold_enough_windows(short):
    shares = [0.3] * 4
    shares[short] = 0.1
    name = ("train", "validation", "guard", "test")[short]
    with pytest.raises(ValueError, match=f"windows of 8 in the {name} split.* of about 1371 characters"):
        windows(prose(1000), PRINTABLE, 8, shares)
    windows(prose(1371), PRINTABLE, 8, shares)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.txt' is not a file; --data takes one text file"):
        load("char-lm", tmp_path / "nothing.txt")
    for name, file in [("mnist", r"mnist\.npz"), ("names", r"text/names\.txt")]:
        with pytest.raises(ValueError, match=f"{name} is not bundled; name the folder that holds {file}"):
            load(name)
        with pytest.raises(ValueError, match=f"{name}: no {file}.* in .*; --data names the folder"):
            load(name, tmp_path)


def test_names_takes_letters_only(tmp_path):
    (tmp_path / "names.txt").write_text("emma\nO'Neil\n")
    with pytest.raises(ValueError, match='names: the file holds "\'"; allowed are a to z'):
        load("names", tmp_path)


def write_mnist(folder, **changes):
    arrays = {
        "x_train": np.zeros((60_000, 28, 28), np.uint8),
        "y_train": (np.arange(60_000) % 10).astype(np.uint8),
        "x_test": np.zeros((10_000, 28, 28), np.uint8),
        "y_test": np.zeros(10_000, np.uint8),
    }
    np.savez(folder / "mnist.npz", **{k: v for k, v in (arrays | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None}, r"cannot read mnist.npz \(.*x_test.*\); expected an npz of x_train"),
        ({"y_test": np.array([None] * 10_000)}, r"cannot read mnist.npz \(Object arrays cannot be loaded"),
        ({"x_test": np.zeros((10_000, 784), np.uint8)}, r"x_test is uint8 \(10000, 784\) up to 0, expected uint8"),
        ({"y_test": np.zeros(10_000, np.int64)}, r"y_test is int64 \(10000,\)"),
        ({"y_test": np.full(10_000, 10, np.uint8)}, r"y_test is uint8 \(10000,\) up to 10, expected .* up to 9"),
    ],
    ids=["absent", "pickle", "shape", "dtype", "label"],
)
def test_a_wrong_mnist_is_refused(tmp_path, changes, message):
    write_mnist(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)


def test_an_mnist_file_of_noise_is_refused(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match=r"cannot read mnist\.npz"):
        load("mnist", tmp_path / "mnist.npz")


# data that is not bundled


@needs_mnist
def test_mnist_keeps_the_official_test_split():
    task = load("mnist", DATA)
    assert len(task.train) + len(task.validation) + len(task.guard) == 60_000
    assert abs(len(task.train) - 50_000) < 20
    x, y = task.test().tensors
    with np.load(DATA / "mnist.npz", allow_pickle=False) as stored:
        assert np.array_equal(y.numpy(), stored["y_test"])
        assert np.array_equal((x[:, 0] * 255).round().numpy(), stored["x_test"])
    assert x.shape == (10_000, 1, 28, 28)


@needs_names
def test_names_is_split_90_to_10_at_a_name():
    task = load("names", DATA)
    text = (DATA / "text/names.txt").read_text()
    x, _ = task.test().tensors
    start = text.index(task.show(x[0]))
    assert abs(start - 0.9 * len(text)) < 16
    assert text[start - 1] == "\n"
    assert task.alphabet == NAME_LETTERS
    assert len(task.alphabet) == 27
    assert task.build()(x[:2]).shape == (2, 32, 27)


# training


def test_batches_resume_from_the_generators_state():
    images = TensorDataset(torch.rand(50, 1, 8, 8), torch.arange(50))
    make = torch.Generator().manual_seed(5)
    stream = batches(images, 16, make, shift)
    for _ in range(3):
        next(stream)
    state = make.get_state()
    expected = [next(stream) for _ in range(3)]
    resumed = batches(images, 16, torch.Generator().set_state(state), shift)
    for (x, y), (again_x, again_y) in zip(expected, resumed, strict=False):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)
    assert not torch.equal(expected[0][1], expected[1][1])


def test_text_is_cut_at_any_character_and_goes_on_from_a_state():
    letters = torch.arange(61)
    windows = TensorDataset(letters[:60].view(6, 10), letters[1:].view(6, 10))
    make = torch.Generator().manual_seed(0)
    stream, begun = crops(windows, 40, make), set()
    for _ in range(20):
        x, y = next(stream)
        assert x.shape == y.shape == (40, 10)
        assert torch.equal(x - x[:, :1], torch.arange(10).expand(40, 10))  # a piece of the text as it stands
        assert torch.equal(y, x + 1)
        begun |= set(x[:, 0].tolist())
    assert begun == set(range(51))  # 50 is the last that has a character after it
    state = make.get_state()
    expected = next(stream)
    again = next(crops(windows, 40, torch.Generator().set_state(state)))
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_batches_of_nothing_are_refused_at_once():
    with pytest.raises(ValueError, match="batch_size=0 of 1 samples; both must be 1 or more"):
        batches(TensorDataset(torch.rand(1)), 0, torch.Generator())
    with pytest.raises(ValueError, match="batch_size=4 of 0 samples"):
        batches(TensorDataset(torch.rand(0)), 4, torch.Generator())


def test_a_shift_moves_by_at_most_one_pixel_and_fills_with_zeros():
    x = torch.zeros(4000, 2, 5, 5)
    x[:, :, 2, 2] = torch.arange(1.0, 4001)[:, None]
    moved = shift(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    assert torch.equal(moved.sum((2, 3)), x.sum((2, 3))), "each image keeps its own pixel, in both channels"
    seen = (moved[:, 0] > 0).float().mean(0)
    inner = torch.tensor([0.25, 0.5, 0.25])
    torch.testing.assert_close(seen[1:4, 1:4], torch.outer(inner, inner), rtol=0, atol=0.03)  # 4 standard errors
    assert shift(torch.ones(100, 1, 5, 5), torch.Generator().manual_seed(0)).min() == 0


@pytest.mark.parametrize(("name", "steps"), [("digits", 20), ("char-lm", 12)])
def test_a_short_training_learns_is_seeded_and_leaves_the_global_generator_alone(name, steps):
    torch.use_deterministic_algorithms(False)  # the promise holds without; the suite turns it on
    task = load(name, limit=300)
    seen = []
    before = torch.random.get_rng_state()
    model = train(task, seed=0, steps=steps, progress=lambda *report: seen.append(report))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert [(step, total) for step, total, _ in seen] == [(i + 1, steps) for i in range(steps)]
    classes = 10 if name == "digits" else 97
    assert seen[-1][2]["loss"] < 0.85 * math.log(classes), "far below chance"
    torch.rand(1)  # another global state must change nothing
    again, other = train(task, seed=0, steps=steps).state_dict(), train(task, seed=1, steps=steps).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, again[key]), key
        assert value.ndim < 2 or not torch.equal(value, other[key]), key


def test_matrices_and_filters_decay_as_the_task_says_and_nothing_else(monkeypatch):
    task, made = load("digits", limit=32), []
    real = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, **k: made.append(groups) or real(groups, **k))
    train(task, 0, steps=1)
    (groups,) = made
    assert [group["weight_decay"] for group in groups] == [task.weight_decay, 0.0]
    assert [{p.ndim > 1 for p in group["params"]} for group in groups] == [{True}, {False}]
    assert sum(len(group["params"]) for group in groups) == len(list(task.build().parameters()))


def test_training_in_bfloat16_learns_as_well_and_keeps_float32_weights():
    task = load("digits", limit=200)
    plain, mixed = (from_file(task, None, 30, precision) for precision in ("float32", "bfloat16"))
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, x, y: seen.append(y.dtype))
    with hook:
        model = train(mixed, 0)
    assert torch.bfloat16 in seen
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    losses = [evaluate(m, task.validation)["loss"] for m in (train(plain, 0), model)]
    assert losses[0] != losses[1]
    assert max(losses) < 1.5 < evaluate(task.build(), task.validation)["loss"]
    assert losses[1] < losses[0] + 0.1
    with pytest.raises(ValueError, match="precision='int8': want float32 or bfloat16"):
        from_file(task, None, None, "int8")


def test_the_learning_rate_warms_up_and_ends_near_zero():
    rates = []
    train(load("digits", limit=8), 0, 30, lambda step, total, values: rates.append(values["learning_rate"]))
    highest = max(rates)
    assert highest == pytest.approx(load("digits", limit=8).learning_rate)
    assert rates[0] == pytest.approx(highest / 3)
    assert 0 < rates[-1] < 0.02 * highest


def test_few_steps_on_answers_have_a_lower_peak():
    task = load("digits", limit=8)
    assert [peak(task, steps, distilled=True) / task.learning_rate for steps in (2000, 1000, 500, 250, 20)] == (
        pytest.approx([1, 1, 0.5, 0.25, 0.25])
    )
    assert peak(task, 20, distilled=False) == task.learning_rate
    network = train(task, 0, 1)
    for teacher, highest in ((network, task.learning_rate / 4), (None, task.learning_rate)):
        rates = []
        hook = register_optimizer_step_post_hook(lambda o, *_, of=rates: of.append(o.param_groups[0]["lr"]))
        tune(task, uniform(network, 4), 10, 0, teacher=teacher)
        hook.remove()
        assert max(rates) == pytest.approx(highest)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps=0 trains nothing"):
        train(load("digits", limit=8), 0, 0)


class Table(nn.Module):
    """Answers each number with a row of logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[x]


def test_accuracy_and_loss_count_samples_or_positions():
    model = Table(torch.eye(3) * 2.0).train()
    right, wrong = -math.log(math.e**2 / (math.e**2 + 2)), -math.log(1 / (math.e**2 + 2))
    images = TensorDataset(torch.tensor([0, 1, 2, 2, 1]), torch.tensor([0, 1, 2, 0, 0]))
    found = evaluate(model, images, batch_size=2)
    assert found["accuracy"] == accuracy(model, images) == 0.6
    assert found["loss"] == pytest.approx((3 * right + 2 * wrong) / 5)
    text = TensorDataset(torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0, 1], [2, 0]]))
    found = evaluate(model, text)
    assert found["accuracy"] == 0.75
    assert found["loss"] == pytest.approx((3 * right + wrong) / 4)
    assert model.training, "the mode is left as it was"


def test_evaluation_runs_in_eval_mode():
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2), nn.Dropout(1.0))
    images = TensorDataset(torch.ones(4, 1), torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-5.0], [5.0]]))
    model.train()
    assert accuracy(model, images) == 0.0  # dropped, all logits would tie and class 0 would win


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="the dataset holds 0 samples"):
        evaluate(nn.Identity(), TensorDataset(torch.rand(0, 2), torch.rand(0)))


def test_the_loss_of_a_task_takes_any_leading_dimensions():
    task = load("digits", limit=1)
    outputs, targets = torch.randn(2, 3, 4, 5), torch.randint(5, (2, 3, 4))
    expected = -outputs.log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(task.loss(outputs, targets), expected)


@pytest.mark.parametrize("name", ["digits", "char-lm"])
def test_a_task_names_an_architecture_that_fits_its_samples(name):
    task = load(name, limit=2)
    x, y = task.train[:2]
    outputs = task.build()(x)
    assert outputs.shape[:-1] == y.shape
    assert set(TASKS) == {"digits", "char-lm", "mnist", "names", "cifar10", "resnet20", "shakespeare"}
