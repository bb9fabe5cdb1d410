"""A PostgreSQL server of one's own, gone at the end: what several hosts share, where it is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
TOOLS = shutil.which("initdb") or (str(DEBIAN[-1]) if DEBIAN else None)
INSTALLED = TOOLS is not None and importlib.util.find_spec("psycopg") is not None
AS = {"user": "nobody", "extra_groups": []} if os.geteuid() == 0 else {}  # PostgreSQL refuses to run as root


class Server:
    """It listens on a socket in its folder, to nobody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tool("initdb", "--auth", "trust", "--username", "sgsc", "--no-sync")
        self.start()

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
    with tempfile.TemporaryDirectory(prefix="sgsc-") as name:
        folder = Path(name)
        if AS:
            shutil.chown(folder, AS["user"])
        made = Server(folder)
        try:
            yield made
        finally:
            made.stop()
