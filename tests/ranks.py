"""Ranks as processes on this machine, for the tests of what several of them do together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing as mp

from sgsc import load_checkpoint

SECONDS = 240  # after which ranks that wait for one another are ended


def what_ranks_wrote(work: Callable, count: int, folder: Path) -> list[dict]:
    """Run work(rank, folder) in `count` processes; the checkpoint that each wrote to folder / rank."""
    context = mp.start_processes(work, args=(folder,), nprocs=count, join=False, start_method="spawn")
    assert context is not None
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [load_checkpoint(folder / f"{rank}") for rank in range(count)]
