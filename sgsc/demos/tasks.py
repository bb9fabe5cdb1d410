"""What the demos learn: data in four splits, the network for it, and how long to train.

`train` is what the weights and the preservation set are taken from, `validation` serves choices while training,
`guard` is held out for the certificate, and `test` is read once, at the end.

Images are (N, 1, H, W) float32 in 0..1 with labels (N,) int64. Text is cut into windows (N, context) int64 of
character numbers; the targets (N, context) are the characters one place later. It is split by position, at the start
of a file or a line where there is one, and the last `context` characters before a cut are dropped: no window reaches
into another split, and the neighbours of a cut do not share a phrase.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from .models import ARCHITECTURES

PRINTABLE = "\n\t" + "".join(map(chr, range(32, 127)))  # the 97 characters that char-lm knows
NAME_LETTERS = "\nabcdefghijklmnopqrstuvwxyz"  # the separator is 0
UNKNOWN = "?"  # stands for a character that char-lm does not know
SPLITS = ("train", "validation", "guard", "test")
LEAST_WINDOWS = 16  # a smaller split could certify nothing
# The next character is often a near tie, which any change flips: texts start with a tolerance, pictures with none.
SCHEDULES = {
    "digits": {"float_steps": 500, "compress_steps": 1000, "batch_size": 64, "learning_rate": 3e-3, "tolerance": 0.0},
    "char-lm": {"float_steps": 900, "compress_steps": 900, "batch_size": 32, "learning_rate": 3e-3, "tolerance": 0.03},
    "mnist": {"float_steps": 1500, "compress_steps": 3000, "batch_size": 128, "learning_rate": 2e-3, "tolerance": 0.0},
    "names": {"float_steps": 1500, "compress_steps": 3000, "batch_size": 64, "learning_rate": 2e-3, "tolerance": 0.03},
}


@dataclass(frozen=True, eq=False)
class Task:
    """One demo: data, network and schedule.

    Attributes:
        name: Key in TASKS.
        architecture: Name in ARCHITECTURES and keyword arguments.
        train: Samples x and targets y, shaped as the head of this file says; so are validation and guard.
        validation: For choices while training.
        guard: Held out, for the certificate.
        test: Returns the test split; a second call raises RuntimeError, for whoever looks twice is choosing by it.
        alphabet: The character of each number, or empty where samples are images.
        sources: What the data is, with licence or citation.
        float_steps: Optimiser steps of the float model.
        compress_steps: Optimiser steps suggested for the compression.
        batch_size: Samples a step.
        learning_rate: Peak of the schedule, for AdamW.
        tolerance: Share of the preservation samples that may regress, unless the user says otherwise.
    """

    name: str
    architecture: tuple[str, dict]
    train: TensorDataset
    validation: TensorDataset
    guard: TensorDataset
    test: Callable[[], TensorDataset]
    alphabet: str
    sources: str
    float_steps: int
    compress_steps: int
    batch_size: int
    learning_rate: float
    tolerance: float

    @property
    def text(self) -> bool:
        """Whether samples are text."""
        return bool(self.alphabet)

    def build(self) -> nn.Module:
        """A network of this task's architecture, freshly initialised from torch's global generator."""
        name, arguments = self.architecture
        return ARCHITECTURES[name](**arguments)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats: (..., classes) float and (...) int64 -> a scalar."""
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def show(self, x: Tensor) -> str | list[list[float]]:
        """One sample for a reader: (T,) int64 -> a str, (1, H, W) -> H lists of W floats."""
        return "".join(self.alphabet[i] for i in x.tolist()) if self.text else x[0].tolist()


def load(name: str, data: Path | str | None = None, seed: int = 0, limit: int | None = None) -> Task:
    """The task `name` of TASKS.

    Args:
        name: "digits", "char-lm", "mnist" or "names".
        data: File or folder to read; mnist and names need it, char-lm takes a text of the user's own, digits none.
        seed: Decides which samples go to which split; of a user's text and of names the position decides alone.
        limit: At most so many samples in each split, for quick runs.

    Raises:
        ValueError: If there is no such task, or its data is missing, malformed or too small.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no sample; give 1 or more, or None for all")
    return TASKS[name](None if data is None else Path(data), seed, limit)


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


def windows(
    text: str, alphabet: str, context: int, shares: Sequence[float], starts: Sequence[int] | None = None
) -> list[TensorDataset]:
    """Split `text` by position, at the nearest of `starts` where they are given, and cut the splits into windows.

    Raises:
        ValueError: If a split would hold fewer than LEAST_WINDOWS windows of `context` characters.
    """
    number = {c: i for i, c in enumerate(alphabet)}
    codes = torch.tensor([number.get(c, number.get(UNKNOWN, 0)) for c in text])
    cuts = [round(share * len(text)) for share in accumulate(shares, initial=0.0)]
    if starts is not None:
        cuts = [min(starts, key=lambda start, cut=cut: abs(start - cut)) for cut in cuts]
    ends = [max(cut - context, 0) for cut in cuts[1:-1]] + [len(text)]
    splits = []
    for name, start, end in zip(SPLITS, cuts[:-1], ends, strict=True):
        count = max(end - start - 1, 0) // context
        if count < LEAST_WINDOWS:
            needed = round((context * (LEAST_WINDOWS + 1) + 1) / min(shares)) + 1
            raise ValueError(
                f"{len(text)} characters leave {count} windows of {context} in the {name} split, the least is "
                f"{LEAST_WINDOWS}; give a text of about {needed} characters or more"
            )
        shape = (count, context)
        x, y = (codes[start + shift :][: count * context].view(shape).clone() for shift in (0, 1))
        splits.append(TensorDataset(x, y))
    return splits


def _task(
    name: str, architecture: tuple[str, dict], splits: Sequence[TensorDataset], limit: int | None, **more: str
) -> Task:
    """A task whose test split is given out once."""
    train, validation, guard, last = (TensorDataset(*split[:limit]) for split in splits)
    left = [last]

    def test() -> TensorDataset:
        if not left:
            raise RuntimeError(f"the test split of {name} has been read once already; choose by validation or guard")
        return left.pop()

    return Task(name, architecture, train, validation, guard, test, **more, **SCHEDULES[name])  # pyright: ignore


def _digits(data: Path | None, seed: int, limit: int | None) -> Task:
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
    return _task("digits", ("digits-cnn", {}), splits, limit, alphabet="", sources=sources)


def _mnist(data: Path | None, seed: int, limit: int | None) -> Task:
    """MNIST: the official test split; of the official training split 10/12 train, 1/12 validation, 1/12 guard."""
    arrays = {
        name: torch.from_numpy(array) for name, array in _mnist_arrays(_find(data, ("mnist.npz",), "mnist")).items()
    }
    rows = [("train", rows) for rows in stratified(arrays["y_train"], (10 / 12, 1 / 12, 1 / 12), seed)]
    splits = [
        TensorDataset(arrays[f"x_{part}"][some][:, None].float() / 255, arrays[f"y_{part}"][some].long())
        for part, some in [*rows, ("test", torch.arange(10_000))]
    ]
    sources = "MNIST: LeCun, Cortes & Burges 1998, official test split, CC BY-SA 3.0"
    return _task("mnist", ("mnist-cnn", {}), splits, limit, alphabet="", sources=sources)


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


def _char_lm(data: Path | None, seed: int, limit: int | None) -> Task:
    """Sources of Python's standard library, or the user's own text: 80 % train, 6 % validation, 7 % guard, 7 % test.

    Raises:
        ValueError: If the text is missing, too short, or not in the alphabet.
    """
    if data is None:
        files = _library_sources(seed)
        text, starts = "".join(files), [0, *accumulate(map(len, files))]
        sources = f"standard library of Python {platform.python_version()}, {len(files)} modules, PSF License 2.0"
    else:
        text, starts, sources = _read_text(data, "char-lm"), None, f"the user's own text, {data.name}"
    foreign = sum(map(text.count, set(text) - set(PRINTABLE)))
    if foreign > 0.1 * len(text):
        raise ValueError(
            f"{foreign} of the {len(text)} characters of {sources} are not printable ASCII, which is all that char-lm "
            f"knows; at most 10 % may be replaced by {UNKNOWN!r}: transliterate the text first"
        )
    arguments = {"vocabulary": len(PRINTABLE), "context": 64}
    splits = windows(text, PRINTABLE, arguments["context"], (0.80, 0.06, 0.07, 0.07), starts)
    return _task("char-lm", ("char-lm", arguments), splits, limit, alphabet=PRINTABLE, sources=sources)


def _library_sources(seed: int) -> list[str]:
    """About 2 MB of the standard library's own modules, in an order that only their names and the seed decide.

    Modules of more than 64 kB are left out, so that no split is one file.

    Raises:
        ValueError: If this Python came without sources.
    """
    folder = Path(os.__file__).parent
    names = sorted(  # by hash: each split then holds modules from the whole alphabet
        (path.name for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names),
        key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest(),
    )
    files, total = [], 0
    for name in names:
        text = (folder / name).read_text(encoding="utf-8", errors="replace")
        if len(text) <= 64_000 and total + len(text) <= 2_000_000:
            files.append(text)
            total += len(text)
    if not total:
        raise ValueError("this Python carries no sources of its standard library; give a text with --data PATH")
    return files


def _names(data: Path | None, seed: int, limit: int | None) -> Task:
    """The names of SGSC: the last 10 % by position are the test split, the rest gives train, validation and guard.

    The list repeats names, so a name of the test split may stand in the training split too. That is the published
    setting, and it is kept: compare losses only with others of the same setting.

    Raises:
        ValueError: If the file is missing, too short, or holds more than a to z and newlines.
    """
    text = _read_text(_find(data, ("text/names.txt", "names.txt"), "names"), "names")
    foreign = sorted(set(text) - set(NAME_LETTERS))
    if foreign:
        raise ValueError(f"names: the file holds {foreign[0]!r}; allowed are a to z, one name a line: convert it first")
    starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
    splits = windows(text, NAME_LETTERS, 32, (0.80, 0.05, 0.05, 0.10), starts)
    sources = "first names, names.txt of makemore, MIT; the list repeats names, so the splits share some, as published"
    return _task("names", ("names-lm", {}), splits, limit, alphabet=NAME_LETTERS, sources=sources)


def _find(data: Path | None, names: Sequence[str], task: str) -> Path:
    """The file that `data` is, or the first of `names` in the folder that it is.

    Raises:
        ValueError: If there is none.
    """
    if data is None:
        raise ValueError(f"{task} is not bundled; name the folder that holds {names[0]}, or the file, with --data PATH")
    for path in (data, *(data / name for name in names)):
        if path.is_file():
            return path
    raise ValueError(f"{task}: no {' or '.join(names)} in {str(data)!r}; --data names the folder or the file itself")


def _read_text(path: Path, task: str) -> str:
    """A UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: If the file is missing, empty or in another encoding.
    """
    if not path.is_file():
        raise ValueError(f"{task}: {str(path)!r} is not a file; --data takes one text file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{task}: {path.name} is not UTF-8 (byte {error.start}); convert it, or name another"
        ) from None
    if not text:
        raise ValueError(f"{task}: {path.name} is empty; give a file with text in it")
    return text


TASKS: dict[str, Callable[[Path | None, int, int | None], Task]] = {
    "digits": _digits,
    "char-lm": _char_lm,
    "mnist": _mnist,
    "names": _names,
}
