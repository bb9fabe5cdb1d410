"""The tasks by name.

Images are (N, 1, H, W) float32 in 0..1 with labels (N,) int64, in colour (N, 3, H, W) with mean and deviation taken
out. Text is cut into windows (N, context) int64 of character numbers; the targets (N, context) are the characters one
place later. It is split by position, at the start of a file or a line where there is one, and the last `context`
characters before a cut are dropped: no window reaches into another split, and the neighbours of a cut do not share a
phrase.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .task import SCHEDULES as SCHEDULES
from .task import Task as Task
from .tasks_images import cifar10, digits, mnist, resnet20
from .tasks_images import stratified as stratified
from .tasks_text import NAME_LETTERS as NAME_LETTERS
from .tasks_text import PRINTABLE as PRINTABLE
from .tasks_text import char_lm, names, shakespeare
from .tasks_text import windows as windows


def load(name: str, data: Path | str | None = None, seed: int = 0, limit: int | None = None) -> Task:
    """The task `name` of TASKS.

    Args:
        name: A key of TASKS.
        data: File or folder to read; char-lm takes a text of the user's own, digits none, the others need it.
        seed: Decides which samples go to which split; where a text is read from a file its position decides alone.
        limit: At most so many samples in each split, for quick runs.

    Raises:
        ValueError: If there is no such task, or its data is missing, malformed or too small.
    """
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} leaves no sample; give 1 or more, or leave it out")
    return TASKS[name](None if data is None else Path(data), seed, limit)


TASKS: dict[str, Callable[[Path | None, int, int | None], Task]] = {
    "digits": digits,
    "char-lm": char_lm,
    "mnist": mnist,
    "names": names,
    "cifar10": cifar10,
    "resnet20": resnet20,
    "shakespeare": shakespeare,
}
