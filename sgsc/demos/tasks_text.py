"""Language models of characters: the standard library or a text of the user's own, names, and Shakespeare."""

from __future__ import annotations

import hashlib
import os
import platform
import string
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from .task import SPLITS, Task, find, make_task

PRINTABLE = "\n\t" + "".join(map(chr, range(32, 127)))  # the 97 characters that char-lm knows
NAME_LETTERS = "\nabcdefghijklmnopqrstuvwxyz"  # the separator is 0
SHAKESPEARE = "\n !$&',-.3:;?" + string.ascii_letters  # the 65 characters of tinyshakespeare
UNKNOWN = "?"  # stands for a character that char-lm does not know
LEAST_WINDOWS = 16  # a smaller split could certify nothing


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


def char_lm(data: Path | None, seed: int, limit: int | None) -> Task:
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
    return make_task("char-lm", ("char-lm", arguments), splits, limit, alphabet=PRINTABLE, sources=sources)


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


def names(data: Path | None, seed: int, limit: int | None) -> Task:
    """The names of SGSC: the last 10 % by position are the test split, the rest gives train, validation and guard.

    The list repeats names, so a name of the test split may stand in the training split too. That is the published
    setting, and it is kept: compare losses only with others of the same setting.

    Raises:
        ValueError: If the file is missing, too short, or holds more than a to z and newlines.
    """
    text = _read_text(find(data, ("text/names.txt", "names.txt"), "names"), "names")
    foreign = sorted(set(text) - set(NAME_LETTERS))
    if foreign:
        raise ValueError(f"names: the file holds {foreign[0]!r}; allowed are a to z, one name a line: convert it first")
    starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
    splits = windows(text, NAME_LETTERS, 32, (0.80, 0.05, 0.05, 0.10), starts)
    sources = "first names, names.txt of makemore, MIT; the list repeats names, so the splits share some, as published"
    task = make_task("names", ("names-lm", {}), splits, limit, alphabet=NAME_LETTERS, sources=sources)
    chosen = "decay, dropout and steps of this task were chosen on these samples and those of validation"
    return replace(task, remark=chosen)


def shakespeare(data: Path | None, seed: int, limit: int | None) -> Task:
    """Plays of Shakespeare, split by position at a line: 80 % train, 5 % validation, 5 % guard, the last 10 % test.

    Raises:
        ValueError: If the file is missing, too short, or holds a character that is not among the 65 of the set.
    """
    text = _read_text(find(data, ("text/tinyshakespeare.txt", "tinyshakespeare.txt"), "shakespeare"), "shakespeare")
    foreign = sorted(set(text) - set(SHAKESPEARE))
    if foreign:
        raise ValueError(
            f"shakespeare: the file holds {foreign[0]!r}; allowed are the {len(SHAKESPEARE)} characters of "
            "tinyshakespeare: take char-lm for a text of your own"
        )
    starts = [0, *accumulate(map(len, text.splitlines(keepends=True)))]
    arguments = {"vocabulary": len(SHAKESPEARE), "context": 128, "width": 160, "layers": 4, "heads": 5}
    splits = windows(text, SHAKESPEARE, arguments["context"], (0.80, 0.05, 0.05, 0.10), starts)
    sources = "plays of Shakespeare, tinyshakespeare.txt of char-rnn, public domain, the last 10 % by position as test"
    return make_task("shakespeare", ("char-lm", arguments), splits, limit, alphabet=SHAKESPEARE, sources=sources)


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
