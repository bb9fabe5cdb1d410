"""What commands print: results on standard output, progress of a long one on standard error."""

from __future__ import annotations

import sys
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn


def plain(value: object) -> str:
    """Text without control characters: what a file says must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def print_json(value: Any) -> None:
    """One document on standard output."""
    from .report import to_json

    print(to_json(value))


class Progress:
    """A bar on a terminal, a line now and then elsewhere; on standard error, so that output can be piped."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True)
        self.terminal = self.console.is_terminal and not quiet
        self.quiet = quiet
        self.bars: dict[str, Any] = {}
        self.said: tuple[str, int] = ("", -1)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = rich.progress.Progress(*columns, TextColumn("{task.fields[values]}"), console=self.console)

    def __enter__(self) -> Progress:
        if self.terminal:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            self.progress.stop()

    def __call__(self, phase: str, step: int, steps: int, values: dict[str, float]) -> None:
        """Show how far a phase is."""
        if self.quiet:
            return
        text = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
        if self.terminal:
            if phase not in self.bars:
                self.bars[phase] = self.progress.add_task(phase, total=steps, values="")
            self.progress.update(self.bars[phase], completed=step, values=text)
        elif self.said != (phase, tenth := 10 * step // steps):
            self.said = (phase, tenth)
            print(f"{phase} {step}/{steps} {text}".rstrip(), file=sys.stderr, flush=True)
