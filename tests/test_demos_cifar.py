"""CIFAR-10 (JPEG q75), its two networks, and Shakespeare: the files are not trusted, and every channel can go."""

import hashlib
import io
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sgsc import pack, prepare
from sgsc.coupling import couple
from sgsc.demos import ARCHITECTURES, job, load
from sgsc.demos import jpeg as container
from sgsc.demos.job import float_model
from sgsc.demos.models import ResNet20
from sgsc.demos.tasks_images import pretrained_resnet20
from sgsc.demos.training import from_file, mirror_and_shift, train, usable
from sgsc.layers import quant_layers
from tests.checks import assert_close_to

DATA = Path(os.environ.get("SGSC_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_cifar = pytest.mark.skipif(not (DATA / "cifar10_jpeg.npz").is_file(), reason="no cifar10_jpeg.npz in SGSC_DATA")
needs_plays = pytest.mark.skipif(not (DATA / "text/tinyshakespeare.txt").is_file(), reason="no tinyshakespeare.txt")


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path, monkeypatch):
    """What is kept between runs is this test's alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(container.tempfile, "tempdir", str(folder))
    return folder


# ---- a small container ----


def encoded(pixels):
    """One JPEG of quality 75; images of one size share the first HEAD bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=75)
    return out.getvalue()


HEAD = 600


def write_cifar(folder, train=500, test=50, side=32, **changes):
    """A container of blots, one colour a class; `changes` replace arrays, None drops one."""
    make = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        colours = np.stack([labels * 25, 255 - labels * 25, labels * 10], 1)[:, None, None]
        pixels = np.clip(colours + make.integers(-8, 9, (count, side, side, 3)), 0, 255).astype(np.uint8)
        images = [encoded(p) for p in pixels]
        assert len({image[:HEAD] for image in images}) == 1
        arrays |= {
            f"head_{split}": np.frombuffer(images[0][:HEAD], np.uint8),
            f"body_{split}": np.frombuffer(b"".join(image[HEAD:] for image in images), np.uint8),
            f"len_{split}": np.array([len(image) - HEAD for image in images], np.uint16),
            f"y_{split}": labels,
        }
    np.savez(folder / "cifar10_jpeg.npz", **{k: v for k, v in (arrays | changes).items() if v is not None})
    return arrays


def test_images_are_decoded_split_and_normalised(tmp_path):
    arrays = write_cifar(tmp_path)
    task = load("cifar10", tmp_path)
    assert "CIFAR-10 (JPEG q75)" in task.sources
    assert [len(split) for split in (task.train, task.validation, task.guard)] == [450, 20, 30]
    assert task.train.tensors[1].bincount().tolist() == [45] * 10
    x, y = task.test().tensors
    assert x.shape == (50, 3, 32, 32)
    assert torch.equal(y, torch.arange(50) % 10)
    first = arrays["head_test"].tobytes() + arrays["body_test"][: arrays["len_test"][0]].tobytes()
    truth = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
    mean, deviation = np.array(task.mean), np.array(task.deviation)
    np.testing.assert_allclose(x[0].permute(1, 2, 0).numpy(), (truth / 255 - mean) / deviation, atol=1e-5)
    shown = np.array(task.show(x[0]))
    assert shown.shape == (32, 32, 3)
    np.testing.assert_allclose(shown, truth / 255, atol=6e-4)  # three digits
    assert shown.min() >= 0
    assert shown.max() <= 1
    assert task.build()(x[:2]).shape == (2, 10)


def test_a_limit_cuts_every_split(tmp_path):
    write_cifar(tmp_path)
    task = load("resnet20", tmp_path / "cifar10_jpeg.npz", limit=7)
    assert [len(split) for split in (task.train, task.validation, task.guard, task.test())] == [7] * 4


def test_what_was_decoded_is_kept_and_a_torn_copy_is_not_believed(tmp_path, own_temporary_folder, monkeypatch):
    write_cifar(tmp_path)
    path = tmp_path / "cifar10_jpeg.npz"
    fresh = container.cifar10_arrays(path)
    (kept,) = own_temporary_folder.glob("sgsc-*/cifar10-jpeg-*.pixels")
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    decoded = []
    real = container._decode
    monkeypatch.setattr(container, "_decode", lambda *a: decoded.append(a[2]) or real(*a))

    def same():
        for split, (x, y) in container.cifar10_arrays(path).items():
            assert np.array_equal(x, fresh[split][0])
            assert np.array_equal(y, fresh[split][1])

    same()
    assert decoded == []
    whole = kept.read_bytes()
    for wrong in (whole[:-1], whole[:-1] + b"\x07", b"", whole + b"x"):
        kept.write_bytes(wrong)
        decoded.clear()
        same()
        assert decoded == ["train", "test"]
        assert kept.read_bytes() == whole


@pytest.mark.parametrize("kind", ["open", "link", "another-user"])
def test_a_folder_that_others_could_write_to_is_not_used(tmp_path, own_temporary_folder, kind, monkeypatch):
    write_cifar(tmp_path)
    if kind == "another-user":  # then we are that other one
        user = os.getuid() + 1
        monkeypatch.setattr(container.os, "getuid", lambda: user)
    path = tmp_path / "cifar10_jpeg.npz"
    folder = own_temporary_folder / f"sgsc-{os.getuid()}"
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o700)
    folder.symlink_to(target) if kind == "link" else folder.mkdir(mode=0o700)
    if kind == "open":
        folder.chmod(0o777)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    pixels = bytes(550 * 32 * 32 * 3)  # black, with a digest that fits
    (folder / f"cifar10-jpeg-{digest[:32]}.pixels").write_bytes(hashlib.sha256(pixels).digest() + pixels)
    assert container.cifar10_arrays(path)["train"][0].max() > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"cannot read cifar10_jpeg.npz \(.*y_test.*\); expected an npz of head"),
        ({"y_test": np.array([None] * 50)}, r"y_test.npy is object \(50,\), expected uint8 of at most 10000"),
        ({"y_test": np.zeros(50, np.int64)}, r"y_test.npy is int64"),
        ({"y_test": np.full(50, 10, np.uint8)}, "split test: a class is 10, the largest is 9"),
        ({"y_test": np.zeros(49, np.uint8)}, "split test: 50 lengths and 49 classes"),
        ({"len_test": np.ones(50, np.uint16)}, r"split test: the lengths add up to 50, but the body has \d+ bytes"),
        ({"len_train": np.ones(50_001, np.uint16)}, r"len_train.npy is uint16 \(50001,\), expected .* at most 50000"),
        ({"head_test": np.zeros(HEAD, np.uint8)}, "split test, image 0: cannot identify image file"),
    ],
    ids=["absent", "pickle", "dtype", "class", "counts", "lengths", "many", "noise"],
)
def test_a_wrong_container_is_refused(tmp_path, changes, message):
    write_cifar(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load("cifar10", tmp_path)


def test_a_cut_image_is_named(tmp_path):
    arrays = write_cifar(tmp_path)
    lengths = arrays["len_test"].copy()
    cut = int(lengths[49]) - 20
    lengths[49] -= cut
    write_cifar(tmp_path, len_test=lengths, body_test=arrays["body_test"][:-cut])
    with pytest.raises(ValueError, match="split test, image 49: "):
        load("cifar10", tmp_path)


def test_a_picture_of_another_size_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    write_cifar(tmp_path, side=40)
    monkeypatch.setattr(Image.Image, "convert", lambda *a: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="split train, image 0: it has 40 x 40 pixels, expected 32 x 32"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("count", [40_000_000, 100])
def test_a_header_that_promises_another_size_than_is_there_is_refused(tmp_path, count):
    write_cifar(tmp_path)
    path = tmp_path / "cifar10_jpeg.npz"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (count,)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, head.getvalue() + data[128:] if name == "body_test.npy" else data)
    with pytest.raises(ValueError, match=rf"body_test.npy names {count} elements and holds \d+ bytes"):
        load("cifar10", tmp_path)


def test_without_pillow_the_way_out_is_named(tmp_path, monkeypatch):
    write_cifar(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ValueError, match=r"decoded by Pillow, which is not installed; pip install 'sgsc\[images\]'"):
        load("cifar10", tmp_path)


def test_a_missing_file_is_named(tmp_path):
    for name, file in [
        ("cifar10", r"cifar10_jpeg\.npz"),
        ("resnet20", r"cifar10_jpeg\.npz"),
        ("shakespeare", r"text/tinyshakespeare\.txt"),
    ]:
        with pytest.raises(ValueError, match=f"{name} is not bundled; name the folder that holds {file}"):
            load(name)
        with pytest.raises(ValueError, match=f"{name}: no {file}.* in .*; --data names the folder"):
            load(name, tmp_path)


# ---- networks ----


@pytest.mark.parametrize(("name", "parameters"), [("resnet9", 6_573_130), ("resnet20", 269_722)])
def test_only_the_answers_are_held_in_place(name, parameters):
    """Every other channel can be cut out, shortcuts included."""
    net = ARCHITECTURES[name]()
    assert sum(p.numel() for p in net.parameters()) == parameters
    found = couple(prepare(net).model)
    assert found.why == ""
    assert found.pinned.sum() == 10
    assert found.pinned[found.produced["head"]].all()
    assert set(found.read) == set(found.produced) - {"stem.conv"}


@pytest.mark.parametrize("name", ["resnet9", "resnet20"])
def test_dead_channels_go_through_shortcuts_and_nothing_changes(name):
    torch.manual_seed(0)
    net = ARCHITECTURES[name]()
    net(torch.randn(8, 3, 32, 32))  # batch norms with statistics of their own
    model = prepare(net.eval()).model.eval()
    found = couple(model)
    make = torch.Generator().manual_seed(0)
    dying = torch.rand(len(found.pinned), generator=make) < 0.4
    with torch.no_grad():
        for layer, ids in found.produced.items():
            gone = dying[ids] & ~found.pinned[ids]
            quant_layers(model)[layer].weight_quantizer.get_parameter("bit_depth")[gone] = 0.0
    found.silence(model)
    x = torch.randn(4, 3, 32, 32)
    packed = pack(model)
    for layer, ids in found.produced.items():
        kept = int((~dying[ids] | found.pinned[ids]).sum())
        assert packed.get_submodule(layer).channels == kept
    assert_close_to(packed(x), model(x).detach().double(), 1e-5)


class Padded(nn.Module):
    """ResNet-20 as it is usually written, its shortcut padded; keys as in the pretrained file."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
            self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
            self.stride = stride

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            side = (y.shape[1] - x.shape[1]) // 2
            return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, side)))

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            first = self.Block(inputs, outputs, 1 if i == 1 else 2)
            setattr(
                self,
                f"layer{i}",
                nn.Sequential(first, self.Block(outputs, outputs, 1), self.Block(outputs, outputs, 1)),
            )
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.fixture
def padded(tmp_path):
    """A padded network with statistics of its own, in models/ beside a container."""
    torch.manual_seed(0)
    net = Padded()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    net(torch.randn(16, 3, 32, 32))
    write_cifar(tmp_path)
    (tmp_path / "models").mkdir()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "models/cifar10_resnet20_jpeg.safetensors")
    return net.eval()


def test_pretrained_weights_answer_as_they_did(padded, tmp_path):
    task = load("resnet20", tmp_path)
    assert "its validation and guard parts included" in task.sources
    ours = task.build().eval()
    ours.load_state_dict(task.start())
    x = torch.randn(5, 3, 32, 32)
    assert_close_to(ours(x).detach(), padded(x).detach().double(), 1e-5)
    path = tmp_path / "models/cifar10_resnet20_jpeg.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"cifar10_resnet20_jpeg.safetensors does not hold ResNet-20 with option A"):
        pretrained_resnet20(path)
    safetensors.torch.save_file({"linear.bias": torch.zeros(10)}, path)
    with pytest.raises(ValueError, match=r"does not hold ResNet-20 with option A \('conv1.weight'\)"):
        pretrained_resnet20(path)


def test_a_task_that_starts_from_weights_trains_nothing(padded, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "train", lambda *a, **k: pytest.fail("trained"))
    task = load("resnet20", tmp_path, limit=8)
    model = float_model(task, 0, tmp_path, lambda *a: None)
    assert not model.training
    x = torch.randn(2, 3, 32, 32)
    assert_close_to(model(x).detach(), padded(x).detach().double(), 1e-5)
    again = from_file(load("resnet20", tmp_path, limit=8), tmp_path / job.FLOAT, None)
    (tmp_path / "second").mkdir()
    assert torch.equal(float_model(again, 0, tmp_path / "second", lambda *a: None)(x), model(x))
    other = replace(again, architecture=("resnet9", {}))
    (tmp_path / "third").mkdir()
    with pytest.raises(ValueError, match="the weights to start resnet20 from are not of its network"):
        float_model(other, 0, tmp_path / "third", lambda *a: None)


def test_without_pretrained_weights_it_trains(tmp_path):
    write_cifar(tmp_path)
    task = replace(load("resnet20", tmp_path, limit=16), batch_size=8)
    assert task.start is None
    model = train(task, 0, steps=2)
    assert isinstance(model, ResNet20)


# ---- augmentation and Shakespeare ----


def test_colour_is_mirrored_and_moved_by_up_to_four_pixels():
    x = torch.zeros(6000, 3, 16, 16)
    x[:, :, 6, 5] = torch.arange(1.0, 6001)[:, None]
    moved = mirror_and_shift(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved.sum((2, 3)), x.sum((2, 3))), "each image keeps its own pixel, in every colour"
    seen = (moved[:, 0] > 0).float().mean(0)
    rows, columns = seen.sum(1), seen.sum(0)
    expected = torch.zeros(16).index_fill_(0, torch.arange(2, 11), 1 / 9)
    torch.testing.assert_close(rows, expected, rtol=0, atol=0.02)  # 4 standard errors
    plain, mirrored = (torch.zeros(16).index_fill_(0, torch.arange(c - 4, c + 5), 1 / 18) for c in (5, 10))
    torch.testing.assert_close(columns, plain + mirrored, rtol=0, atol=0.02)
    again = mirror_and_shift(x, torch.Generator().manual_seed(0))
    assert torch.equal(moved, again)


def plays(lines=4000):
    make = np.random.default_rng(0)
    letters = np.array(list("abcdefghij klmnop,.'A"))
    return "".join("".join(make.choice(letters, 30)) + "\n" for _ in range(lines))


def test_plays_are_split_at_lines_and_the_last_tenth_is_the_test(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text(plays())
    task = load("shakespeare", tmp_path)
    x, _ = task.test().tensors
    text = plays()
    start = text.index(task.show(x[0]))
    assert abs(start - 0.9 * len(text)) < 31
    assert text[start - 1] == "\n"
    assert x.shape[1] == 128
    model = task.build()
    assert sum(p.numel() for p in model.parameters()) >= 1_000_000
    assert model(x[:2]).shape == (2, 128, 65)
    (tmp_path / "tinyshakespeare.txt").write_text("caf\u00e9")
    with pytest.raises(ValueError, match="shakespeare: the file holds '\u00e9'; allowed are the 65 characters"):
        load("shakespeare", tmp_path)


@needs_plays
def test_the_alphabet_is_that_of_the_plays():
    task = load("shakespeare", DATA)
    text = (DATA / "text/tinyshakespeare.txt").read_text()
    assert set(task.alphabet) == set(text)
    assert len(task.alphabet) == 65


@needs_cifar
def test_the_real_container_and_the_pretrained_network_fit(monkeypatch):
    monkeypatch.undo()  # decoded once a machine, which takes a while
    task = load("resnet20", DATA, limit=500)
    model = task.build().eval()
    model.load_state_dict(task.start())
    x, y = task.test().tensors
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
    assert 0.82 < right < 0.94  # 87.91 % on all of the test split; 500 samples have a standard error of 1.5 points


def test_a_device_that_is_not_there_is_refused():
    assert usable("cpu") == "cpu"
    assert usable("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "cuda:97"):
        with pytest.raises(ValueError, match=f"device '{wrong}' cannot be used here .*; take cpu, cuda or auto"):
            usable(wrong)
