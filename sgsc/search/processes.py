"""Which process runs a trial, said so that whoever reads it later can tell whether that process is still there."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Host, boot and container, number and start of this process."""
    return {"host": socket.gethostname(), "where": where(), "pid": (own := os.getpid()), "started": started(own)}


def where() -> str:
    """What a process number is of: this start of this machine, and this container of it; empty where it is not told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def started(pid: int) -> str | None:
    """When a process of this host began, which tells it from a later one of the same number; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie runs no trial
    except OSError:
        pass
    if Path("/proc/self/stat").is_file():
        return None
    try:  # a system without /proc: the number alone
        os.kill(pid, 0)
    except OSError:
        return None
    return "unknown"
