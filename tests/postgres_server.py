"""A PostgreSQL server of one's own, gone at the end: what several hosts share, where it is installed."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

TOOLS = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
ROOT, OTHER = os.geteuid() == 0, "nobody"  # PostgreSQL refuses to run as root
AS = {"user": OTHER, "extra_groups": []} if ROOT else {}


def _can_run() -> bool:
    try:
        pwd.getpwnam(OTHER)
    except KeyError:
        return not ROOT
    return True


INSTALLED = TOOLS is not None and importlib.util.find_spec("psycopg") is not None and _can_run()


class Server:
    """It listens on a socket in its folder, to nobody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        how = ("--auth", "trust", "--username", "sgsc", "--locale", "C", "--encoding", "UTF8", "--no-sync")
        self._tool("initdb", *how)

    def start(self) -> None:
        """Begin, or begin again with what is there."""
        options = f"-k {self.folder} -h '' -c max_connections=50"
        self._tool("pg_ctl", "start", "--wait", "--options", options, "--log", str(self.folder / "log"))

    def stop(self) -> None:
        """End at once, as in a power cut."""
        self._tool("pg_ctl", "stop", "--mode", "immediate")

    def database(self, name: str) -> str:
        """The URL of a new database."""
        url = f"postgresql+psycopg://sgsc@/{{}}?host={self.folder}"
        engine = create_engine(url.format("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return url.format(name)

    def _tool(self, name: str, *arguments: str) -> None:
        command = [str(Path(str(TOOLS)).with_name(name)), "-D", str(self.folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **AS)


@contextmanager
def server() -> Iterator[Server]:
    """A server that runs while the block does."""
    with tempfile.TemporaryDirectory(prefix="sgsc-", dir="/tmp") as name:  # a socket's path is short, and others enter
        folder = Path(name)
        if AS:
            shutil.chown(folder, AS["user"])
        made = Server(folder)
        try:
            made.start()
            yield made
        finally:
            made.stop()
