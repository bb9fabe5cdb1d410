"""Where a number was measured: versions, machine and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from . import __version__


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for reports and bench results."""
    return {
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "sgsc": __version__},
        "machine": f"{_processor()}, {torch.get_num_threads()} threads, {platform.system()}",
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _commit() -> str:
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return os.environ.get("SGSC_COMMIT", "unknown")
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        # what a bench writes does not change what the next one measures
        changed = _git(here, "status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
        return f"{commit}-dirty" if changed else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
