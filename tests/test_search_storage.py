"""Studies survive what happens to their workers, their disks and their users."""

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from sgsc.search import processes
from sgsc.search import storage as storages
from sgsc.search.kmeans_tpe import KMeansTPESampler
from sgsc.search.storage import StorageError, fail_stale, open_storage, open_study, working, writing
from tests.search_worker import SPACE

pytestmark = pytest.mark.usefixtures("quiet_optuna")


def opened(path):
    return open_study(open_storage(path), "study", KMeansTPESampler(space=SPACE))


def close(study):
    study._storage._backend.engine.dispose()


@pytest.fixture
def study(tmp_path):
    made = opened(tmp_path / "s.db")
    yield made
    close(made)


def fill(study):
    with writing(study._storage):
        for _ in range(50):
            study.tell(study.ask(SPACE), 2.0)


def killed(path, seconds):
    """Run a worker for some time; what it acknowledged, and how long opening took (None where it did not get there)."""
    command = [sys.executable, "-m", "tests.search_worker", str(path), "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline().split()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        lines = process.stdout.read().splitlines()
    told = [line.split() for line in lines if line.startswith("told") and len(line.split()) == 3]
    return {int(number): float(value) for _, number, value in told}, float(first[1]) if first else None


@pytest.mark.parametrize("said", ["database is locked", "table studies already exists"])
def test_opening_waits_for_who_makes_the_same_study(tmp_path, monkeypatch, said):
    real, refused = storages.RDBStorage, []

    def made(*args, **how):
        if len(refused) < 2:
            refused.append(said)
            raise OperationalError("CREATE TABLE", {}, sqlite3.OperationalError(said))
        return real(*args, **how)

    monkeypatch.setattr(storages, "RDBStorage", made)
    close(opened(tmp_path / "s.db"))
    assert len(refused) == 2
    monkeypatch.setattr(storages, "WAIT", 0.0)
    refused.clear()
    with pytest.raises(StorageError, match=said):
        opened(tmp_path / "s.db")


@pytest.mark.parametrize("said", ["Host 'a' is blocked because of many connection errors", "no room for a TABLE"])
def test_what_waiting_does_not_mend_is_said_at_once(tmp_path, monkeypatch, said):
    tried = []

    def made(*_, **__):
        tried.append(said)
        raise OperationalError("CREATE TABLE x (UNIQUE (y))", {}, Exception(said))

    monkeypatch.setattr(storages, "RDBStorage", made)
    with pytest.raises(StorageError, match=said):
        opened(tmp_path / "s.db")
    assert len(tried) == 1


@pytest.mark.timeout(280)
def test_ten_kills_and_more_lose_no_acknowledged_trial_and_leave_no_zombie(tmp_path):
    rng, told, openings = random.Random(0), {}, []
    while len(openings) < 10 or (len(told) < 8 and len(openings) < 40):  # a busy machine gets less done before a kill
        more, seconds = killed(tmp_path / "s.db", rng.uniform(0, 0.8))
        told |= more
        openings.append(seconds)
    study = opened(tmp_path / "s.db")
    values = {t.number: t.value for t in study.get_trials() if t.state == TrialState.COMPLETE}
    assert len(told) >= 8
    assert {number: values.get(number) for number in told} == told
    assert not study.get_trials(states=(TrialState.RUNNING,))
    assert all(openings)  # bench.search says how long they took
    close(study)
    with sqlite3.connect(tmp_path / "s.db") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize("prefix", ["", "sqlite:///", "sqlite+pysqlite:///"])
def test_the_log_is_written_ahead(tmp_path, prefix):
    study = opened(f"{prefix}{tmp_path / 's.db'}")
    with study._storage._backend.engine.connect() as connection:
        ask = connection.exec_driver_sql
        assert ask("PRAGMA journal_mode").scalar() == "wal"
        assert ask("PRAGMA synchronous").scalar() == 1  # NORMAL
    close(study)


def test_a_trial_of_a_living_worker_stays(study):
    trial = study.ask()
    with working(trial):
        assert fail_stale(study) == []
        assert study.trials[0].state == TrialState.RUNNING


def test_a_process_that_took_over_the_number_of_a_dead_one_does_not_answer_for_it(study):
    trial = study.ask(SPACE)
    note = {"host": storages.socket.gethostname(), "pid": os.getpid(), "started": "1"}
    trial.set_user_attr(storages.WORKER, note)
    assert fail_stale(study) == [0]


def test_what_a_dead_worker_had_is_tried_once_more(study):
    for expected in (True, False):
        trial = study.ask(SPACE)
        trial.set_user_attr(storages.WORKER, {"host": storages.socket.gethostname(), "pid": 2**22 + 1, "started": "1"})
        fail_stale(study)
        assert bool(study.get_trials(states=(TrialState.WAITING,))) is expected
    assert study.trials[0].params == study.trials[1].params


def test_a_silent_host_loses_its_trials(study, monkeypatch):
    trial = study.ask(SPACE)
    note = {"host": "elsewhere", "pid": 1, "started": "1", "time": time.time()}
    trial.set_user_attr(storages.WORKER, note)
    assert fail_stale(study) == []  # it has just begun
    trial.set_user_attr(storages.WORKER, {**note, "time": 0.0})
    trial.set_user_attr(storages.BEAT, time.time())
    assert fail_stale(study) == []
    monkeypatch.setattr(storages, "PATIENCE", -1.0)
    assert fail_stale(study) == [0]


def test_a_process_of_another_container_on_a_host_of_the_same_name_is_not_looked_up_here(study, monkeypatch):
    trial = study.ask(SPACE)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "where", lambda: "another")
        note = {**processes.this_process(), "pid": 2**22 + 1}  # there is none here
    trial.set_user_attr(storages.WORKER, {**note, "time": time.time()})
    assert fail_stale(study) == []
    trial.set_user_attr(storages.WORKER, {**note, "time": time.time() - storages.PATIENCE})
    assert fail_stale(study) == [0]


def test_a_worker_gives_signs_of_life(study, monkeypatch):
    monkeypatch.setattr(storages, "HEARTBEAT", 0.05)
    trial = study.ask()
    with working(trial):
        time.sleep(0.4)
        first = study.trials[0].user_attrs[storages.BEAT]
        time.sleep(0.3)
        assert study.trials[0].user_attrs[storages.BEAT] > first


def test_sqlite_on_a_second_host_is_refused(tmp_path, monkeypatch):
    close(opened(tmp_path / "s.db"))
    monkeypatch.setattr(storages.socket, "gethostname", lambda: "other")
    storage = open_storage(tmp_path / "s.db")
    with pytest.raises(StorageError, match=r"holds a study of host .* and this is 'other'.* PostgreSQL or MySQL"):
        open_study(storage, "study", KMeansTPESampler())
    with pytest.raises(StorageError, match=r"holds a study of host"):  # it is the file that two may not share
        open_study(storage, "another", KMeansTPESampler())
    assert [study.study_name for study in storage.get_all_studies()] == ["study"]  # nothing was written
    storage._backend.engine.dispose() if hasattr(storage, "_backend") else storage.engine.dispose()


def test_a_study_that_is_maximised_is_refused(tmp_path):
    storage = open_storage(tmp_path / "s.db")
    optuna.create_study(storage=storage, study_name="study", direction="maximize")
    with pytest.raises(ValueError, match="study 'study' is none that one loss is minimised in"):
        open_study(storage, "study", KMeansTPESampler())
    storage.engine.dispose()


@pytest.mark.parametrize("name", ["a?b.db", "a%20b.db", "a#b.db"])
def test_a_path_that_an_url_reads_otherwise_is_refused(name, tmp_path):
    with pytest.raises(StorageError, match=r"an URL's path holds no '[?%#]'; rename it"):
        open_storage(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_whom_it_waits_for_is_told(study, monkeypatch):
    monkeypatch.setattr(storages, "POLL", 0.01)
    trial = study.ask()
    note = {"host": "elsewhere", "pid": 7, "started": "1", "time": time.time()}
    trial.set_user_attr(storages.WORKER, note)
    told = []

    def waiting(whom):
        told.append(whom)
        if len(told) == 3:
            study.tell(trial, 1.0)

    assert not storages.wait_for_others(study, waiting)
    assert told == [f"trial {trial.number} of process 7 on elsewhere"] * 3


def test_what_is_no_sqlite_file_is_refused(tmp_path):
    (tmp_path / "s.db").write_text("a text that somebody keeps here")
    with pytest.raises(StorageError, match=r"s\.db is not an SQLite file; name another"):
        open_storage(tmp_path / "s.db")
    with pytest.raises(StorageError, match=r"there is no folder .*nowhere; make it first"):
        open_storage(tmp_path / "nowhere" / "s.db")


def test_a_read_only_file_is_named(tmp_path, monkeypatch):
    close(opened(tmp_path / "s.db"))
    monkeypatch.setattr(storages.os, "access", lambda path, how: False)  # root may write whatever the mode says
    with pytest.raises(StorageError, match=r"s\.db is read-only; make it writable"):
        open_storage(tmp_path / "s.db")


@pytest.mark.parametrize("url", ["nonsense://x/y", "postgresql+nodriver://u:secret@h/d"])
def test_an_url_that_leads_nowhere_is_named_without_its_password(url):
    with pytest.raises(StorageError, match=r"the storage .* cannot be opened .*; check the URL") as raised:
        open_storage(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "why"),
    {
        "no driver": ("mysql+nodriver://u:secret@h/d", "nodriver"),
        "nobody answers": ("postgresql+psycopg://u:secret@127.0.0.1:1/d", r"psycopg|refused"),
        "the default driver": ("mysql://u:secret@127.0.0.1:1/d", r"DB access module|connect"),
        "no url": ("postgresql://u:secret@h:port/d", "port"),
    }.values(),
    ids=("no driver", "nobody answers", "the default driver", "no url"),
)
def test_a_server_that_cannot_be_reached_is_named_without_its_password(url, why):
    with pytest.raises(StorageError, match=f"(?s)(?=.*({why})).*check the URL, that the server runs") as raised:
        open_storage(url)
    assert "secret" not in str(raised.value)


def test_a_server_serves_several_hosts(study, monkeypatch):
    """What tells a server from a file is the dialect alone."""
    assert storages.is_sqlite(study._storage)
    monkeypatch.setattr(storages, "is_sqlite", lambda storage: False)
    monkeypatch.setattr(storages.socket, "gethostname", lambda: "other")
    assert open_study(study._storage, "study", KMeansTPESampler()).study_name == "study"


def test_a_full_disk_is_said_and_the_study_stays(tmp_path):
    study = opened(tmp_path / "s.db")
    study.tell(study.ask(SPACE), 1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(StorageError, match=r"s\.db cannot be read or written .*free space"):
            fill(study)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    close(study)
    again = opened(tmp_path / "s.db")
    assert again.trials[0].value == 1.0
    again.tell(again.ask(SPACE), 3.0)
    close(again)


def test_five_and_five_in_two_processes_are_ten(tmp_path):
    def told(path, *trials):
        for count in trials:
            subprocess.run(
                [sys.executable, "-m", "tests.search_worker", str(path), str(count)], check=True, capture_output=True
            )
        study = opened(path)
        params = [t.params for t in study.trials]
        close(study)
        return params

    assert told(tmp_path / "a.db", 10, 10) == told(tmp_path / "b.db", 20)
