"""Servers of one's own, gone at the end: what several hosts share, where they are installed."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from sqlalchemy import create_engine, text

ROOT, OTHER = os.geteuid() == 0, "nobody"  # servers refuse to run as root
AS = {"user": OTHER, "extra_groups": []} if ROOT else {}
PLACES = os.pathsep.join(["/usr/sbin", *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
READY = 60.0  # seconds that a server has to begin in


class Server(ABC):
    """It listens on a socket in its folder, to nobody else."""

    driver: ClassVar[str]  # module that sqlalchemy talks through
    tools: ClassVar[tuple[str, ...]]  # programs that it needs

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def installed(cls) -> bool:
        """Whether it can be run here."""
        return all(map(where, cls.tools)) and importlib.util.find_spec(cls.driver) is not None and _can_run()

    @abstractmethod
    def start(self) -> None:
        """Begin, or begin again with what is there."""

    @abstractmethod
    def stop(self) -> None:
        """End at once, as in a power cut."""

    @abstractmethod
    def url(self, database: str) -> str:
        """Of a database, by a user who may do anything."""

    def database(self, name: str) -> str:
        """The URL of a new database."""
        engine = create_engine(self.url(""), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self.url(name)

    def run(self, tool: str, *arguments: str) -> None:
        """One of its programs, to its end, as who it runs as."""
        command = [str(where(tool)), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **AS)


class PostgreSQL(Server):
    """See `Server`."""

    driver, tools = "psycopg", ("initdb", "pg_ctl")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        how = ("--auth", "trust", "--username", "sgsc", "--locale", "C", "--encoding", "UTF8", "--no-sync")
        self.run("initdb", "-D", str(folder / "data"), *how)

    def start(self) -> None:
        """See `Server`."""
        options = f"-k {self.folder} -h '' -c max_connections=50"
        self._control("start", "--wait", "--options", options, "--log", str(self.folder / "log"))

    def stop(self) -> None:
        """See `Server`."""
        self._control("stop", "--mode", "immediate")

    def url(self, database: str) -> str:
        """See `Server`."""
        return f"postgresql+psycopg://sgsc@/{database or 'postgres'}?host={self.folder}"

    def _control(self, what: str, *arguments: str) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), what, *arguments)


class MariaDB(Server):
    """See `Server`; it speaks MySQL's protocol."""

    driver, tools = "pymysql", ("mariadbd", "mariadb-install-db")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.own = ["--no-defaults", f"--datadir={folder / 'data'}"]
        self.run("mariadb-install-db", *self.own, "--auth-root-authentication-method=normal", "--skip-test-db")

    def start(self) -> None:
        """See `Server`."""
        how = [
            *self.own,
            f"--socket={self.folder / 'socket'}",
            "--skip-networking",
            f"--pid-file={self.folder / 'pid'}",
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([str(where("mariadbd")), *how], stdout=log, stderr=log, **AS)
        began = time.monotonic()
        while not (self.folder / "pid").is_file():  # written once it listens
            if self.process.poll() is not None or time.monotonic() - began > READY:
                raise RuntimeError((self.folder / "log").read_text()[-1000:])
            time.sleep(0.1)

    def stop(self) -> None:
        """See `Server`."""
        self.process.kill()
        self.process.wait()
        (self.folder / "pid").unlink(missing_ok=True)

    def url(self, database: str) -> str:
        """See `Server`."""
        return f"mysql+pymysql://root@/{database}?unix_socket={self.folder / 'socket'}"


KINDS = (PostgreSQL, MariaDB)


def installed() -> list[type[Server]]:
    """Those that can be run here."""
    return [kind for kind in KINDS if kind.installed()]


def where(tool: str) -> str | None:
    """The path of a program."""
    return shutil.which(tool) or shutil.which(tool, path=PLACES)


@contextmanager
def server(kind: type[Server]) -> Iterator[Server]:
    """A server that runs while the block does."""
    with tempfile.TemporaryDirectory(prefix="sgsc-", dir="/tmp") as name:  # a socket's path is short, and others enter
        folder = Path(name)
        if AS:
            shutil.chown(folder, AS["user"])
        made = kind(folder)
        made.start()
        try:
            yield made
        finally:
            made.stop()


def _can_run() -> bool:
    try:
        pwd.getpwnam(OTHER)
    except KeyError:
        return not ROOT
    return True
