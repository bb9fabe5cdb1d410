"""Images: scikit-learn's digits, MNIST and CIFAR-10 (JPEG q75)."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from .jpeg import cifar10_arrays
from .models import ResNet20
from .task import Task, find, make_task

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that the pretrained network was trained with
PRETRAINED = "models/cifar10_resnet20_jpeg.safetensors"


def digits(data: Path | None, seed: int, limit: int | None) -> Task:
    """scikit-learn's 1,797 digits, stratified: 55 % train, 10 % validation, 15 % guard, 20 % test.

    Raises:
        ValueError: If a path is given.
    """
    if data is not None:
        raise ValueError(f"digits comes with scikit-learn and reads no file, got data={str(data)!r}; leave it out")
    from sklearn.datasets import load_digits  # here, so that the other tasks do not wait for scikit-learn

    pixels, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
    x, y = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels).long()
    splits = [TensorDataset(x[rows], y[rows]) for rows in stratified(y, (0.55, 0.10, 0.15, 0.20), seed)]
    sources = "scikit-learn digits: UCI Optical Recognition of Handwritten Digits, Alpaydin & Kaynak 1998, CC BY 4.0"
    return make_task("digits", ("digits-cnn", {}), splits, limit, alphabet="", sources=sources)


def stratified(labels: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Row numbers of disjoint splits that hold each class in the given shares (which add up to 1), in random order.

    labels (N,) int64; every row lands in exactly one split.
    """
    make = torch.Generator().manual_seed(seed)
    splits: list[list[Tensor]] = [[] for _ in shares]
    for label in labels.unique():
        rows = torch.nonzero(labels == label)[:, 0]
        rows = rows[torch.randperm(len(rows), generator=make)]
        ends = [round(share * len(rows)) for share in accumulate(shares, initial=0.0)]
        for split, start, end in zip(splits, ends[:-1], ends[1:], strict=True):
            split.append(rows[start:end])
    joined = [torch.cat(split) for split in splits]
    return [rows[torch.randperm(len(rows), generator=make)] for rows in joined]


def mnist(data: Path | None, seed: int, limit: int | None) -> Task:
    """MNIST: the official test split; of the official training split 10/12 train, 1/12 validation, 1/12 guard."""
    arrays = {
        name: torch.from_numpy(array) for name, array in _mnist_arrays(find(data, ("mnist.npz",), "mnist")).items()
    }
    rows = [("train", rows) for rows in stratified(arrays["y_train"], (10 / 12, 1 / 12, 1 / 12), seed)]
    splits = [
        TensorDataset(arrays[f"x_{part}"][some][:, None].float() / 255, arrays[f"y_{part}"][some].long())
        for part, some in [*rows, ("test", torch.arange(10_000))]
    ]
    sources = "MNIST: LeCun, Cortes & Burges 1998, official test split, CC BY-SA 3.0"
    return make_task("mnist", ("mnist-cnn", {}), splits, limit, alphabet="", sources=sources)


def _mnist_arrays(path: Path) -> dict[str, np.ndarray]:
    """The four arrays of mnist.npz, checked; nothing in the file is ever unpickled.

    Raises:
        ValueError: If the file is not that set.
    """
    shapes = {"x_train": (60_000, 28, 28), "y_train": (60_000,), "x_test": (10_000, 28, 28), "y_test": (10_000,)}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in shapes}
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"mnist: cannot read {path.name} ({error}); expected an npz of {', '.join(shapes)}") from None
    for name, shape in shapes.items():
        got, high = arrays[name], 255 if name.startswith("x") else 9
        if got.shape != shape or got.dtype != np.uint8 or got.max() > high:
            raise ValueError(
                f"mnist: {name} is {got.dtype} {got.shape} up to {got.max()}, expected uint8 {shape} up to {high}; "
                "take the official set"
            )
    return arrays


def cifar10(data: Path | None, seed: int, limit: int | None) -> Task:
    """CIFAR-10 (JPEG q75) and the network of arXiv 2301.13142."""
    return _cifar10("cifar10", "resnet9", data, seed, limit)


def resnet20(data: Path | None, seed: int, limit: int | None) -> Task:
    """CIFAR-10 (JPEG q75) and ResNet-20, from pretrained weights where the folder of the data holds them."""
    task = _cifar10("resnet20", "resnet20", data, seed, limit)
    assert data is not None  # or there would be no task
    weights = (data if data.is_dir() else data.parent) / PRETRAINED
    if not weights.is_file():
        return task
    seen = "float weights trained on the whole training split before, its validation and guard parts included"
    remark = "these samples are held out from the compression alone: the float model was trained on them before"
    return replace(task, start=lambda: pretrained_resnet20(weights), sources=f"{task.sources}; {seen}", remark=remark)


def _cifar10(name: str, network: str, data: Path | None, seed: int, limit: int | None) -> Task:
    """The test split; of the training split 45,000 train, 2,000 validation and 3,000 guard."""
    path = find(data, ("cifar10_jpeg.npz",), name)
    arrays = cifar10_arrays(path)
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (MEAN, DEVIATION))

    def split(part: str, rows: Tensor) -> TensorDataset:
        rows = rows[:limit]  # before the pixels become four times as large
        x, y = (torch.from_numpy(array[rows.numpy()]) for array in arrays[part])
        return TensorDataset(((x.permute(0, 3, 1, 2).float() / 255 - mean) / deviation).contiguous(), y.long())

    parts = stratified(torch.from_numpy(arrays["train"][1].copy()).long(), (0.90, 0.04, 0.06), seed)
    splits = [split("train", rows) for rows in parts]
    splits.append(split("test", torch.arange(len(arrays["test"][1]))))
    sources = "CIFAR-10 (JPEG q75): Krizhevsky 2009, images stored as JPEG of quality 75, its test split"
    colours = {"mean": MEAN, "deviation": DEVIATION}
    return make_task(name, (network, {}), splits, limit, alphabet="", sources=sources, **colours)


def pretrained_resnet20(path: Path) -> dict[str, Tensor]:
    """The state dict of `models.ResNet20` from one of the usual ResNet-20 with option A, whose shortcut is padded.

    There the shortcut reaches the middle half of a block's channels, here the first: all that reads or writes the
    channels of a stage is put into that order.

    Raises:
        ValueError: If the file holds another network.
    """
    try:
        theirs = safetensors.torch.load_file(path)
        ours = {}
        for key in ResNet20().state_dict():
            names = key.split(".")
            kind = {"conv": "conv", "norm": "bn"}.get(names[-2], "")
            if names[0] == "head":
                ours[key] = theirs[f"linear.{names[1]}"]
            elif names[0] == "stem":
                ours[key] = theirs[f"{kind}1.{names[-1]}"]
            else:
                layer, block = divmod(int(names[1]), 3)
                number = 1 if names[2] == "first" else 2
                ours[key] = theirs[f"layer{layer + 1}.{block}.{kind}{number}.{names[-1]}"]
        return {key: _reordered(key, value) for key, value in ours.items()}
    except (safetensors.SafetensorError, OSError, KeyError, IndexError) as error:
        raise ValueError(f"resnet20: {path.name} does not hold ResNet-20 with option A ({error})") from None


def _reordered(key: str, value: Tensor) -> Tensor:
    """A tensor of the pretrained network, its channels in our order, and of those only what `key` has."""
    if value.dim() == 0:
        return value
    names = key.split(".")
    if names[0] == "stem":
        return value
    if names[0] == "head":
        return value[:, _order(64)] if value.dim() == 2 else value
    channels, widens = 16 << int(names[1]) // 3, names[1] in ("3", "6")
    if names[2] == "first":  # its own channels are in no shortcut; it reads those of the block before
        return value[:, _order(channels // 2 if widens else channels)] if value.dim() == 4 else value
    rows = _order(channels)
    half = channels // 2
    return value[{"second": rows, "reached": rows[:half], "others": rows[half:]}[names[2]]]


def _order(channels: int) -> Tensor:
    """Where each of our channels of a stage stands in a network whose shortcuts are padded on both sides."""
    if channels == 16:
        return torch.arange(16)
    quarter = channels // 4
    inner = _order(channels // 2) + quarter
    return torch.cat([inner, torch.arange(quarter), torch.arange(3 * quarter, channels)])
