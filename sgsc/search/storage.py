"""Where a study lives: opened so that what killed workers left is cleared away, and two hosts never share a file.

SQLite is opened with a write-ahead log and synchronous=NORMAL: an acknowledged trial survives kill -9 of any process (a
power cut may take the last ones, never the file), and a trial costs a third of the time. SQLite's own documentation
rules out a write-ahead log on a network file system, so a study in SQLite belongs to the host that made it; several
hosts share a PostgreSQL or MySQL server through its URL.

Every trial notes the host and process that runs it. Where that process is gone the trial is failed when the study is
opened again; a trial of another host, or of another container of this one, is failed once it was silent for `PATIENCE`
seconds. These are of the server's clock, since clocks of hosts differ.
"""

from __future__ import annotations

import datetime
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, func, literal_column, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from . import processes

HOST, WORKER, BEAT = "host", "worker", "beat"  # attributes of a study, and of a trial
AGAIN = "again"  # attribute of a trial that takes over from one whose worker died
HEARTBEAT, PATIENCE = 60.0, 300.0  # seconds between signs of life, and without one until a trial counts as lost
POLL = 1.0  # seconds between two looks at what other workers still run
GRACE = 2.0  # seconds in which a new trial has noted its worker
WAIT = 30.0  # seconds that a writer waits for another
# no driver, no server, a port that is no number, tables of another version
OTHER_ERRORS = ImportError, OSError, ValueError, RuntimeError
SIGNATURE = b"SQLite format 3\0"


class StorageError(OSError):
    """A storage cannot be opened or written; the study in it, if any, is as it was."""


def open_storage(where: str | Path) -> RDBStorage:
    """The storage of an URL that Optuna knows, or of a file, which is SQLite.

    Raises:
        StorageError: If it cannot be opened, or is a file that is not SQLite.
    """
    text = str(where)
    url = text if "://" in text else f"sqlite:///{text}"
    try:
        if "://" not in text and (odd := [c for c in "?%#" if c in text]):
            raise StorageError(f"the storage {text} cannot be opened: an URL's path holds no {odd[0]!r}; rename it")
        made = sqlalchemy.make_url(url)
        if made.get_backend_name() == "sqlite" and made.database not in (None, "", ":memory:"):
            return _sqlite(url, Path(made.database))
        return _patiently(lambda: RDBStorage(url))
    except StorageError:
        raise
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError, sqlite3.Error, *OTHER_ERRORS) as error:
        raise StorageError(_unopened(url, error)) from None


def _patiently(make: Callable[[], RDBStorage]) -> RDBStorage:
    """What `make` makes; where another worker is making the same tables, or the same file's log, once it has.

    Raises:
        SQLAlchemyError: If it cannot be made, or not within `WAIT`.
        sqlite3.Error: If the file cannot be opened.
    """
    over = time.monotonic() + WAIT
    while True:
        try:
            return make()
        except (SQLAlchemyError, sqlite3.Error) as error:
            if time.monotonic() > over or not _in_the_making(getattr(error, "orig", None) or error):
                raise
            time.sleep(0.2)


def _in_the_making(error: BaseException) -> bool:
    """Whether a driver says that another worker is making the same; SQLite does not wait where it might for ever."""
    said = str(error).lower()
    locked = isinstance(error, sqlite3.Error) and "locked" in said  # a server's blocked host or account stays so
    return locked or any(sign in said for sign in ("already exists", "unique", "duplicate"))


def _sqlite(url: str, path: Path) -> RDBStorage:
    if not path.parent.is_dir():
        raise StorageError(f"the storage {path} cannot be made: there is no folder {path.parent}; make it first")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(SIGNATURE)) != SIGNATURE:
                raise StorageError(f"the storage {path} is not an SQLite file; name another file")
        if not os.access(path, os.W_OK):
            raise StorageError(f"the storage {path} is read-only; make it writable, or name a copy of it and its -wal")
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"the storage {path} is in a folder that is read-only; SQLite keeps its log there")

    def made() -> RDBStorage:
        with closing(sqlite3.connect(path, timeout=WAIT)) as file:
            file.execute("PRAGMA journal_mode=WAL")  # stays with the file; inside a transaction it could not be changed
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": WAIT}})

    storage = _patiently(made)

    def prepare(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.isolation_level = None  # or Python begins a transaction late, with the first write

    def begin(connection: Any) -> None:
        # Optuna reads whether a trial still waits, then takes it: between the two nobody else may write
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", prepare)
    event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()  # connections made so far lack both
    return storage


def open_study(storage: BaseStorage, name: str, sampler: optuna.samplers.BaseSampler, pruner: Any = None) -> Study:
    """The study of that name, minimising, made where it is not there; trials of workers that are gone are failed.

    Raises:
        StorageError: If an SQLite study was made on another host, or the storage cannot be written.
    """
    with writing(storage):
        refuse_other_host(storage)
        study = optuna.create_study(
            storage=storage, study_name=name, sampler=sampler, pruner=pruner, load_if_exists=True
        )
        refuse_other_aim(study)
        if is_sqlite(storage):
            study.set_user_attr(HOST, socket.gethostname())
        fail_stale(study)
        return study


def refuse_other_aim(study: Study) -> None:
    """Refuse a study that is not minimised.

    Raises:
        ValueError: If it is one.
    """
    if study.directions != [StudyDirection.MINIMIZE]:
        raise ValueError(f"study {study.study_name!r} is none that one loss is minimised in; give another --study name")


def refuse_other_host(storage: BaseStorage) -> None:
    """Refuse an SQLite file that another host has written to, whatever the study.

    Raises:
        StorageError: If it is one.
    """
    here = socket.gethostname()
    for study in storage.get_all_studies() if is_sqlite(storage) else ():
        if (host := study.user_attrs.get(HOST, here)) != here:
            raise StorageError(
                f"{describe(storage)} holds a study of host {host!r}, and this is {here!r}: SQLite does not serve "
                "several hosts; give the URL of a PostgreSQL or MySQL server (--storage postgresql+psycopg://…), or "
                "another file"
            )


def fail_stale(study: Study) -> list[int]:
    """Fail trials whose process is gone, or whose host was silent for `PATIENCE`; their numbers.

    Their configurations are given back to the queue, once: a configuration that kills its worker is not tried for ever.
    """
    failed, now = [], clock(study._storage)
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    bare = [trial for trial in running if trial.user_attrs.get(WORKER) is None]
    if bare:  # killed between the trial's creation and its note, or just begun
        youngest = 0.0 if _on_server(study._storage) else min(map(_age, bare))
        time.sleep(min(max(GRACE - youngest, 0.0), GRACE))
    for trial in running:
        trial = study._storage.get_trial(trial._trial_id) if trial in bare else trial
        if trial.state.is_finished() or _alive(trial, now):
            continue
        try:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:  # another worker was faster
            continue
        failed.append(trial.number)
        params = given(trial)
        if params and AGAIN not in trial.user_attrs:
            kept = {key: value for key, value in trial.user_attrs.items() if key not in (WORKER, BEAT)}
            study.enqueue_trial(params, user_attrs={**kept, AGAIN: trial.number})
    return failed


def wait_for_others(study: Study, waiting: Callable[[str], None] = lambda whom: None) -> bool:
    """Wait until what other workers run now has ended; whether some of it came back into the queue.

    What they begin meanwhile is not waited for: they may have been asked for more trials. `waiting` is told whom it is
    waited for, again and again: a worker that hangs is for its user to end.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    here, came_back = processes.this_process(), False
    left = [t for t in running if not _of(t, here)]  # this process runs nothing while it waits
    while left:
        trial = left[0]
        worker = trial.user_attrs.get(WORKER) or {}
        waiting(f"trial {trial.number} of process {worker.get('pid')} on {worker.get('host')}")
        time.sleep(POLL)
        came_back |= bool(fail_stale(study))
        left = [study._storage.get_trial(t._trial_id) for t in left]
        came_back |= any(t.state == TrialState.WAITING for t in left)
        left = [t for t in left if t.state == TrialState.RUNNING]
    return came_back


def _age(trial: FrozenTrial) -> float:
    """Seconds since a trial began, by the clock of its host."""
    return (datetime.datetime.now() - (trial.datetime_start or datetime.datetime.min)).total_seconds()


def _of(trial: FrozenTrial, process: dict[str, Any]) -> bool:
    """Whether a process noted that it runs the trial."""
    return process.items() <= (trial.user_attrs.get(WORKER) or {}).items()


def given(trial: FrozenTrial) -> dict[str, Any]:
    """The parameters of a trial, also of one that was put in the queue and has not begun."""
    return trial.system_attrs.get("fixed_params") or trial.params


def clock(storage: Any) -> float:
    """Seconds on a clock that all workers of a study read: the server's, or this host's where no other may come."""
    engine = _engine(storage)
    if engine is None or not _on_server(storage):
        return time.time()
    mysql = engine.dialect.name in ("mysql", "mariadb")  # its now() is in a time zone that the session sets
    with engine.connect() as connection:
        told = connection.execute(select(func.utc_timestamp(literal_column("6")) if mysql else func.now())).scalar_one()
    return told.replace(tzinfo=told.tzinfo or datetime.timezone.utc).timestamp()


def _alive(trial: FrozenTrial, now: float) -> bool:
    worker, where = trial.user_attrs.get(WORKER), processes.where()
    if worker is None:
        return False
    if worker["host"] == socket.gethostname() and worker.get("where", where) == where:
        return processes.started(worker["pid"]) == worker["started"]
    return now - max(worker["time"], trial.user_attrs.get(BEAT, 0.0)) < PATIENCE


@contextmanager
def working(trial: optuna.Trial) -> Iterator[None]:
    """Note who runs a trial, and give a sign of life every `HEARTBEAT` seconds while it runs."""
    storage = trial.study._storage
    trial.set_user_attr(WORKER, {**processes.this_process(), "time": clock(storage)})
    over = threading.Event()

    def beat() -> None:
        while not over.wait(HEARTBEAT):
            with suppress(Exception):  # a full disk is the main thread's to report, when it writes the result
                trial.set_user_attr(BEAT, clock(storage))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def writing(storage: BaseStorage) -> Iterator[None]:
    """Turn what a storage raises when it is full, read-only, locked or gone into a `StorageError` that says what to do.

    Raises:
        StorageError: As said.
    """
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = error.__cause__ or error
        raise StorageError(
            f"the storage {describe(storage)} cannot be read or written ({_first(cause)}); what was told is in the "
            "study: free space, make it writable or start its server again, and repeat the command to go on"
        ) from error


def is_sqlite(storage: Any) -> bool:
    """Whether the study is in an SQLite file."""
    engine = _engine(storage)
    return engine is not None and engine.dialect.name == "sqlite"


def _on_server(storage: Any) -> bool:
    """Whether workers of other hosts may write too."""
    return _engine(storage) is not None and not is_sqlite(storage)


def _engine(storage: Any) -> sqlalchemy.Engine | None:
    return getattr(getattr(storage, "_backend", storage), "engine", None)


def describe(storage: Any) -> str:
    """The storage's URL without password."""
    engine = _engine(storage)
    return "in memory" if engine is None else _named(engine.url.render_as_string(hide_password=True))


def _named(url: str) -> str:
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True).removeprefix("sqlite:///")
    except (ArgumentError, ValueError):  # and where the password begins and ends is not sure either
        return f"{url.partition('://')[0]}://***"


def _first(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def _unopened(url: str, error: Exception) -> str:
    why = _first(error)
    said = f"the storage {_named(url)} cannot be opened ({why}); "
    if "malformed" in why or "not a database" in why:
        return f"{said}the file is damaged: put a copy of it in its place, or name another file"
    if url.startswith("sqlite") and "locked" in why:
        return f"{said}wait for the program that holds it, or end that"
    if url.startswith("sqlite"):
        return f"{said}name a file in a folder that can be written and has room"
    return f"{said}check the URL, that the server runs, and that its driver is installed (psycopg, PyMySQL)"
