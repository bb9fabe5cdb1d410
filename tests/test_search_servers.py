"""Studies on real servers: several workers, kills, clocks of other hosts, and a server that goes away."""

import gc
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from optuna.trial import TrialState

from sgsc.search import processes
from sgsc.search import storage as storages
from sgsc.search.kmeans_tpe import KMeansTPESampler
from sgsc.search.storage import StorageError, clock, describe, fail_stale, open_storage, open_study, working, writing
from tests import servers
from tests.search_worker import SPACE
from tests.test_search_storage import close, killed

pytestmark = [
    pytest.mark.usefixtures("quiet_optuna"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # PyMySQL leaves it where nobody answers
]


@pytest.fixture(scope="module", params=servers.KINDS, ids=lambda kind: kind.__name__)
def server(request):
    if not request.param.installed():
        pytest.skip(f"no {request.param.__name__} server, or no {request.param.driver}")
    with servers.server(request.param) as made:
        yield made


@pytest.fixture
def url(server):
    """A database of its own, empty."""
    return server.database(f"d{time.monotonic_ns()}")


@pytest.fixture
def study(url):
    made = opened(url)
    yield made
    close(made)


def opened(url):
    return open_study(open_storage(url), "study", KMeansTPESampler(space=SPACE))


def workers(url, *trials):
    """The numbers of the trials that workers acknowledge, which run at the same time."""
    command = [sys.executable, "-m", "tests.search_worker", url]
    running = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in trials]
    told = [process.communicate()[0].splitlines() for process in running]
    assert [process.returncode for process in running] == [0] * len(trials)
    return [[int(line.split()[1]) for line in lines if line.startswith("told")] for lines in told]


def test_kills_lose_no_acknowledged_trial_and_leave_no_zombie(url):
    rng, told = random.Random(0), {}
    for kill in range(40):  # a busy machine gets less done before a kill
        if kill >= 5 and told:
            break
        told |= killed(url, rng.uniform(0.2, 1.0))[0]
    study = opened(url)
    values = {t.number: t.value for t in study.get_trials(states=(TrialState.COMPLETE,))}
    assert told
    assert {number: values.get(number) for number in told} == told
    assert not study.get_trials(states=(TrialState.RUNNING,))
    close(study)


def test_workers_that_come_together_make_one_study_and_share_its_queue(url):
    told = workers(url, 1, 1, 1)  # none of them finds tables
    study = opened(url)
    for number in range(24):
        study.enqueue_trial(dict.fromkeys(SPACE, 2), user_attrs={"given": number})
    told += workers(url, 10, 10, 10)
    numbers = [number for worker in told for number in worker]
    assert sorted(numbers) == list(range(33))
    assert set(Counter(t.user_attrs["given"] for t in study.trials if "given" in t.user_attrs).values()) == {1}
    close(study)


def test_five_and_five_are_ten(url, server):
    workers(url, 12)
    workers(url, 12)
    workers(whole := server.database("whole"), 24)
    ours, once = opened(url), opened(whole)
    assert [t.params for t in ours.trials] == [t.params for t in once.trials]
    close(ours)
    close(once)


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_living_worker_of_a_host_whose_clock_is_wrong_keeps_its_trial(study, monkeypatch, hours):
    trial = study.ask(SPACE)
    with monkeypatch.context() as there:
        there.setattr(storages.socket, "gethostname", lambda: "elsewhere")
        there.setattr(storages.time, "time", lambda right=time.time: right() + 3600 * hours)
        with working(trial):
            pass
    assert study.trials[0].user_attrs[storages.WORKER]["host"] == "elsewhere"
    assert fail_stale(study) == []
    monkeypatch.setattr(storages, "PATIENCE", 0.0)
    assert fail_stale(study) == [0]


def test_the_clock_is_the_servers(study):
    first = clock(study._storage)
    assert abs(first - time.time()) < 60  # of this host too, here
    time.sleep(0.05)
    assert 0 < clock(study._storage) - first < 30


def test_a_trial_that_another_host_has_just_begun_is_given_time_whatever_its_clock(study, monkeypatch):
    trial, slept = study.ask(SPACE), []
    monkeypatch.setattr(storages, "_age", lambda trial: 3600.0)  # as its host's clock has it

    def sleep(seconds):
        slept.append(seconds)
        trial.set_user_attr(storages.WORKER, {**processes.this_process(), "time": clock(study._storage)})

    monkeypatch.setattr(storages.time, "sleep", sleep)
    assert fail_stale(study) == []
    assert slept == [storages.GRACE]


def test_a_server_that_goes_away_is_said_without_password_and_what_was_told_stays(url, server):
    study = opened(url)
    study.tell(study.ask(SPACE), 1.0)
    server.stop()
    try:
        with pytest.raises(StorageError, match=r"read or written .*start its server again"), writing(study._storage):
            study.tell(study.ask(SPACE), 2.0)
        with pytest.raises(StorageError, match=r"cannot be opened .*check the URL, that the server runs"):
            open_storage(url)
    finally:
        server.start()
    gc.collect()  # what the driver left is not another test's
    again = opened(url)
    assert again.trials[0].value == 1.0
    with writing(again._storage):
        again.tell(again.ask(SPACE), 3.0)
    assert server.driver in describe(again._storage)
    close(again)
    close(study)
