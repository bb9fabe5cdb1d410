"""The search as a whole, on a problem that trains in milliseconds."""

import math
import socket
import subprocess
import sys
from contextlib import contextmanager

import optuna
import pytest
import torch
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from torch import nn

from sgsc import pack, prepare, save
from sgsc.layers import quant_layers
from sgsc.quantizers import Diverged
from sgsc.search import processes
from sgsc.search import storage as storage_module
from sgsc.search import study as study_module
from sgsc.search import trials as trials_module
from sgsc.search.candidates import as_float
from sgsc.search.cost import Budget, CostModel
from sgsc.search.kmeans_tpe import KMeansTPESampler
from sgsc.search.problem import prepare_search
from sgsc.search.remembered import digest
from sgsc.search.storage import StorageError, given, open_storage, working
from sgsc.search.study import search_network
from tests.small import blobs, loss

pytestmark = pytest.mark.usefixtures("quiet_optuna")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    x, y = blobs()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss(net, (x.float(), y)).backward()
        optimizer.step()
    return net.eval()


BATCH = (blobs()[0].float()[:120], blobs()[1][:120])
HELD_OUT = (blobs()[0].float()[120:], blobs()[1][120:])


def train(model, report, steps=2):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, BATCH).backward()
        optimizer.step()
        if step == 0:
            report(validate(model))


def validate(model):
    with torch.no_grad():
        return float(loss(model, HELD_OUT))


def search(network, budget=None, trials=25, train=train, validate=validate, **more):
    how = {"loss": loss, "batches": [BATCH], **more}
    return search_network(network, train, validate, budget or Budget(mean_bits=3.5), trials=trials, **how)


def rows(found):
    return [(t["params"], t["loss"], t["state"]) for t in found.report["trials"]]


def test_the_result_is_within_the_budget_and_no_worse_than_any_baseline(network, tmp_path):
    found = search(network, Budget(bytes=3000, mean_bits=4))
    judged = [t for t in found.report["trials"] if t["loss"] is not None]
    assert found.loss == min(t["loss"] for t in judged)
    assert found.cost["mean_bits"] <= 4
    assert save(pack(found.model, remove=False), tmp_path / "m.sgsc") == found.cost["bytes"] <= 3000
    assert validate(pack(found.model, remove=False)) == pytest.approx(found.loss)
    names = [t["baseline"] for t in found.report["trials"] if t["baseline"]]
    assert {"uniform 2", "uniform 3"} <= set(names)
    assert {"uniform 6", "uniform 8"} <= set(found.report["baselines_over_budget"])
    assert not {"uniform 2", "uniform 3", "uniform 4"} & set(found.report["baselines_over_budget"])
    assert all(t["cost"]["mean_bits"] <= 4 for t in judged)


def test_whether_a_proposal_is_within_the_budget_costs_only_what_is_limited(network, monkeypatch):
    problem = prepare_search(network, Budget(mean_bits=3.5), loss, [BATCH])
    monkeypatch.setattr(CostModel, "_bytes", lambda *_: pytest.fail("bytes are counted"))
    assert problem.feasible(problem.space.smallest())


def test_each_allocation_within_the_budget_is_a_trial_under_its_name_or_that_of_an_equal_width(network):
    budget = Budget(bytes=3000, mean_bits=4)
    problem = prepare_search(network, budget, loss, [BATCH])
    tried = {t["baseline"]: t["params"] for t in search(network, budget, trials=14).report["trials"] if t["baseline"]}
    for name in ("greedy", "integer program"):
        params = problem.space.params(problem.baselines[name], problem.structure.sizes)
        assert problem.feasible(params)
        assert params in tried.values()
        assert tried.get(name, params) == params


def test_a_baseline_that_is_best_wins(network):
    def prefers_three(model):
        return sum(abs(float(m.weight_quantizer.bits().float().mean()) - 3) for m in quant_layers(model).values())

    found = search(network, trials=8, validate=prefers_three, widths=False)
    assert (found.origin, found.loss) == ("uniform 3", 0)


def test_finish_takes_the_best_of_a_few_of_the_search_and_the_best_baseline(network):
    calls = []

    def finish(model, report):
        calls.append(1)
        train(model, report, steps=10)
        if len(calls) < 4:  # the last is the baseline
            with torch.no_grad():
                model[0].weight.mul_(0)

    found = search(network, finish=finish)
    assert len(calls) == len(found.report["finalists"]) == 4
    trials = found.report["trials"]
    searched = sorted(t["loss"] for t in trials if t["loss"] is not None and not t["baseline"])[:3]
    best = min((t for t in trials if t["baseline"] and t["loss"] is not None), key=lambda t: t["loss"])
    ends = {f["trial"] for f in found.report["finalists"]}
    assert ends == {best["number"]} | {t["number"] for t in trials if t["loss"] in searched}
    assert found.origin == best["baseline"]
    assert found.loss == min(f["loss"] for f in found.report["finalists"]) < best["loss"]


def test_a_longer_training_that_makes_networks_worse_costs_nothing(network):
    def finish(model, report):
        with torch.no_grad():
            model[0].weight.mul_(0)

    found = search(network, finish=finish, trials=16)
    assert found.loss == min(t["loss"] for t in found.report["trials"] if t["loss"] is not None)
    assert [f["long"] for f in found.report["finalists"]] == [False, True, True, True, True]
    assert validate(found.model) == found.loss


def test_the_network_of_the_best_trial_is_the_one_that_was_judged(network):
    """A training that does not repeat itself, as on a GPU, would else give a worse one."""
    count = []

    def varying(model, report):
        count.append(1)
        train(model, report, steps=1 + len(count) % 3)

    found = search(network, train=varying, trials=16)
    assert found.loss == min(t["loss"] for t in found.report["trials"] if t["loss"] is not None)
    assert validate(found.model) == found.loss
    assert len(count) == 16
    assert not found.report["reason"]


def test_a_best_trial_that_comes_out_worse_when_it_is_trained_again_is_told(network, tmp_path):
    storage = open_storage(tmp_path / "s.db")
    best = search(network, trials=12, storage=storage).loss

    def worse(model, report):
        train(model, report)
        with torch.no_grad():
            model[0].weight.mul_(0)

    found = search(network, train=worse, trials=12, storage=storage)  # all trials were another process's
    assert found.loss > best
    assert (
        f"the best trial, of {best:.6g}, came out at {found.loss:.6g} when it was trained again"
        in (found.report["reason"])
    )


def test_a_finalist_is_of_the_search_where_a_baseline_leads(network):
    def prefers_three(model):
        return sum(abs(float(m.weight_quantizer.bits().float().mean()) - 3) for m in quant_layers(model).values())

    found = search(network, trials=14, validate=prefers_three, widths=False, finish=train)
    assert found.origin == "uniform 3"
    assert sum(f["baseline"] is None for f in found.report["finalists"]) == 3


def test_interrupted_and_resumed_is_the_same_study(network, tmp_path):
    whole = search(network, trials=16)
    storage = open_storage(tmp_path / "s.db")
    search(network, trials=11, storage=storage)
    storage.engine.dispose()
    storage = open_storage(tmp_path / "s.db")
    again = search(network, trials=16, storage=storage)
    assert rows(again) == rows(whole)
    with pytest.raises(ValueError, match=r"study 'search' is of another budget, seed: .*; give the settings"):
        search(network, Budget(mean_bits=3), trials=16, storage=storage, seed=1)
    with pytest.raises(ValueError, match=r"study 'search' is of another space: "):
        search(network, trials=16, storage=storage, widths=False)
    storage.engine.dispose()


def test_candidates_that_diverge_are_handled(network):
    def sometimes(model):
        return math.nan if quant_layers(model)["0"].weight.shape[0] != 64 else validate(model)

    found = search(network, validate=sometimes, trials=30)
    states = [t["state"] for t in found.report["trials"]]
    assert "diverged" in states
    assert quant_layers(found.model)["0"].weight.shape[0] == 64
    with pytest.raises(
        ValueError, match="none of the 5 trials gave a finite validation loss within the budget; train the par"
    ):
        search(network, validate=lambda model: math.nan, trials=5)


def test_divergence_is_told_by_its_class_and_wherever_it_shows(network):
    def part_of_the_way(model, report):
        report(math.inf if quant_layers(model)["0"].weight.shape[0] > 64 else 1.0)

    def packing(model, report):
        if quant_layers(model)["0"].weight.shape[0] > 64:
            raise Diverged("weights hold NaN")

    for diverging in (part_of_the_way, packing):
        found = search(network, train=diverging, trials=16)
        wide = [t["state"] for t in found.report["trials"] if t["params"]["width.0"] > 64]
        assert wide == ["diverged"] * len(wide) != []

    def wrong(model, report):
        raise ValueError("the data has diverged from its schema")

    with pytest.raises(ValueError, match="its schema"):
        search(network, train=wrong, trials=3)


@pytest.mark.parametrize("reported", [False, True], ids=["before its report", "after it"])
def test_a_trial_that_ctrl_c_ends_goes_on_under_its_number(network, reported):
    calls = []

    def interrupted(model, report):
        calls.append(1)
        if len(calls) < 10 or reported:
            train(model, report)  # may be stopped by its report
        if len(calls) >= 10:
            raise KeyboardInterrupt

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(KeyboardInterrupt):
        search(network, train=interrupted, trials=20, storage=storage)
    waiting = optuna.load_study(study_name="search", storage=storage).trials[-1]
    assert waiting.state == TrialState.WAITING
    assert bool(waiting.intermediate_values) is reported
    assert rows(search(network, trials=20, storage=storage)) == rows(search(network, trials=20))


def test_hopeless_candidates_are_stopped_early(network):
    def trained_to_the_end(model, report):
        channels = quant_layers(model)["0"].weight.shape[0]
        report(10.0 if channels > 64 else 1.0)
        ended.append(channels)

    ended = []
    found = search(network, train=trained_to_the_end, trials=40)
    stopped = [t for t in found.report["trials"] if t["state"] == "pruned"]
    assert stopped
    assert all(t["params"]["width.0"] > 64 and t["number"] >= 8 for t in stopped)
    assert not [t for t in found.report["trials"] if t["state"] == "pruned" and t["baseline"]]


def test_a_constant_objective_is_searched(network):
    found = search(network, validate=lambda model: 1.0, trials=20)
    assert found.loss == 1.0
    assert len({str(t["params"]) for t in found.report["trials"]}) == 20


def test_a_budget_below_the_smallest_network_is_named(network):
    with pytest.raises(ValueError, match=r"the budget is below the smallest network .*bytes 100 < [\d,]+, with 2 bits"):
        search(network, Budget(bytes=100))


def test_a_space_of_one_point_ends(network):
    found = search(network, Budget(mean_bits=2), widths=False, trials=30)
    assert set(found.configuration.bits.values()) == {2}
    assert found.report["reason"] == "nothing new within the budget was left to try"
    assert len([t for t in found.report["trials"] if t["loss"] is not None]) == 1


def test_a_proposal_that_another_worker_was_first_to_make_does_not_end_a_search(network, monkeypatch):
    propose = KMeansTPESampler.sample_relative

    def as_the_other(self, study, trial, space):
        return propose(self, study, trial, space) if trial.number not in (9, 11, 12) else study.trials[8].params

    monkeypatch.setattr(KMeansTPESampler, "sample_relative", as_the_other)
    found = search(network, trials=12)
    assert found.report["reason"] == ""
    assert [t["state"] for t in found.report["trials"]].count("fail") == 3
    assert len([t for t in found.report["trials"] if t["state"] in ("complete", "pruned")]) == 12


@pytest.mark.parametrize("when", ["begun", "trained", "judged"])
def test_a_trial_that_was_taken_for_lost_is_left_to_the_queue(network, monkeypatch, when):
    def lost(at):
        if at == when and not taken:
            study = optuna.load_study(study_name="search", storage=storage)
            (trial,) = study.get_trials(states=(TrialState.RUNNING,))
            taken.append(trial.number)
            storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            study.enqueue_trial(given(trial), user_attrs={"baseline": trial.user_attrs["baseline"]})

    @contextmanager
    def begun(trial):
        lost("begun")
        with working(trial):
            yield

    def trained(model, report):
        lost("trained")  # before it reports
        train(model, report)

    def judged(model):
        found = validate(model)
        lost("judged")
        return found

    monkeypatch.setattr(trials_module, "working", begun)
    storage, taken = optuna.storages.InMemoryStorage(), []
    found = search(network, train=trained, validate=judged, trials=12, storage=storage)
    assert [t["number"] for t in found.report["trials"] if t["state"] == "fail"] == taken == [0]
    assert "uniform 2" in baselines(storage, TrialState.COMPLETE)


@pytest.mark.parametrize("trials", [10, 500], ids=["trials", "nothing-new"])
@pytest.mark.parametrize("fate", ["told", "dead", "given-back"])
def test_what_another_worker_still_runs_is_waited_for(network, tmp_path, monkeypatch, fate, trials):
    storage, tiny = open_storage(tmp_path / "s.db"), {"budget": Budget(mean_bits=2.3), "widths": False}
    search(network, trials=4, storage=storage, **tiny)  # of nine or so that there are
    study = optuna.load_study(study_name="search", storage=storage)
    problem = prepare_search(network, tiny["budget"], loss, [BATCH], widths=False)
    theirs, waited = study.ask(), []
    small = problem.space.smallest()
    others = ({**small, name: bits} for name in small for bits in (3, 4, 6, 8))
    tried = [t.params for t in study.trials]
    params = next(p for p in others if p not in tried and problem.feasible(p))  # that nobody has tried
    for name, distribution in problem.space.distributions().items():
        storage.set_trial_param(theirs._trial_id, name, distribution.to_internal_repr(params[name]), distribution)

    def sleep(seconds):
        if not waited and fate == "told":
            study.tell(theirs, -1.0)  # better than all
        elif not waited and fate == "dead":
            theirs.set_user_attr("worker", {**theirs.user_attrs["worker"], "started": "long ago"})
        elif not waited:
            trials_module._give_back(study, theirs)
        waited.append(seconds)

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as other:
        try:
            started = processes.started(other.pid)
            note = {"host": socket.gethostname(), "pid": other.pid, "started": started, "time": 0}
            theirs.set_user_attr("worker", note)
            monkeypatch.setattr(storage_module.time, "sleep", sleep)
            found = search(network, trials=trials, storage=storage, **tiny)
        finally:
            other.kill()  # or what fails here would end with its sleep
    assert waited == [storage_module.POLL]
    print([(t["number"], t["params"], t["state"], t["baseline"]) for t in found.report["trials"]], params)
    judged = [t for t in found.report["trials"] if t["params"] == params and t["state"] in ("complete", "pruned")]
    if fate == "told":
        assert theirs.number in [end["trial"] for end in found.report["finalists"]]
        assert "the best trial, of -1, came out at" in found.report["reason"]
    else:  # its trial is run by this worker
        assert len(judged) == 1
    storage.engine.dispose()


def test_a_process_does_not_wait_for_itself(network, monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    search(network, trials=4, storage=storage)
    study = optuna.load_study(study_name="search", storage=storage)
    study.ask().set_user_attr("worker", {**processes.this_process(), "time": 0})  # it could not even tell a failure
    monkeypatch.setattr(storage_module.time, "sleep", lambda seconds: pytest.fail("waits"))
    search(network, trials=6, storage=storage)


def test_an_error_in_training_leaves_a_readable_study(network, tmp_path):
    def broken(model, report):
        raise RuntimeError("out of memory")

    storage = open_storage(tmp_path / "s.db")
    with pytest.raises(RuntimeError, match="out of memory"):
        search(network, train=broken, storage=storage)
    study = optuna.load_study(study_name="search", storage=storage)
    assert study.trials[0].state == TrialState.FAIL
    assert search(network, trials=10, storage=storage).loss < 1
    storage.engine.dispose()


def baselines(storage, *states):
    study = optuna.load_study(study_name="search", storage=storage)
    return [t.user_attrs["baseline"] for t in study.trials if t.state in states and "baseline" in t.user_attrs]


def test_no_baseline_is_lost_to_an_error_in_training_or_to_a_kill_while_they_are_put_in_the_queue(network, monkeypatch):
    def broken(model, report):
        raise RuntimeError("out of memory")

    def killed(self, *arguments, **more):
        if len(self.trials) == 3:
            raise SystemExit
        return enqueue(self, *arguments, **more)

    whole, failed, torn = (optuna.storages.InMemoryStorage() for _ in range(3))
    search(network, trials=14, storage=whole)
    with pytest.raises(RuntimeError, match="out of memory"):
        search(network, train=broken, storage=failed)
    search(network, trials=14, storage=failed)
    enqueue = optuna.Study.enqueue_trial
    monkeypatch.setattr(optuna.Study, "enqueue_trial", killed)
    with pytest.raises(SystemExit):
        search(network, storage=torn)
    monkeypatch.undo()
    search(network, trials=14, storage=torn)
    wanted = baselines(whole, TrialState.COMPLETE)
    assert len(wanted) == len(set(wanted)) == 4
    assert set(wanted) == set(baselines(failed, TrialState.COMPLETE))
    assert wanted == baselines(torn, TrialState.COMPLETE)


def test_a_baseline_that_fails_each_time_is_left_out_in_the_end(network):
    def no_two_bits(model, report):
        if {int(m.weight_quantizer.bits()[0]) for m in quant_layers(model).values()} == {2}:
            raise RuntimeError("no kernel")

    storage, failures = optuna.storages.InMemoryStorage(), 0
    while failures < 4:
        try:
            search(network, train=no_two_bits, trials=14, storage=storage)
            break
        except RuntimeError:
            failures += 1
    assert failures == 3
    assert baselines(storage, TrialState.FAIL) == ["uniform 2"] * 3


def test_wrong_arguments_are_named(network):
    with pytest.raises(ValueError, match="trials=0: want a whole number of trials, 1 or more"):
        search(network, trials=0)
    with pytest.raises(ValueError, match="sampler='x' is not known; choose one of kmeans-tpe"):
        search(network, sampler="x")
    with pytest.raises(ValueError, match="seed=-1: a seed is a whole number, 0 or more"):
        search(network, seed=-1)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_other_samplers_keep_to_the_budget(network, sampler):
    found = search(network, sampler=sampler, trials=25)
    assert all(t["cost"]["mean_bits"] <= 3.5 for t in found.report["trials"] if t["cost"])
    assert found.report["sampler"] == sampler


def test_the_winner_goes_on_into_sgsc(network):
    found = search(network, trials=12)
    float_again = as_float(found.model)
    layers = quant_layers(found.model)
    assert {n: m.weight.shape for n, m in layers.items()} == {
        n: float_again.get_submodule(n).weight.shape for n in layers
    }
    assert not quant_layers(float_again)
    assert validate(prepare(float_again).model) < 1.0


def test_what_was_measured_before_the_trials_is_kept_with_the_study(network, tmp_path, monkeypatch):
    said = []
    how = {"progress": lambda phase, *_: said.append(phase), "latency": True, "budget": Budget(seconds=1.0)}
    storage = open_storage(tmp_path / "s.db")
    first = search(network, trials=4, storage=storage, **how)
    assert "sensitivity" in said
    said.clear()
    monkeypatch.setattr(CostModel, "measure", lambda *_: pytest.fail("the latency is measured again"))
    again = search(network, trials=5, storage=storage, **how)
    assert "sensitivity" not in said
    assert again.report["sensitivity"] == first.report["sensitivity"]
    other = (BATCH[0] + 0.1, BATCH[1])
    search(network, trials=5, storage=storage, **{**how, "latency": False}, batches=[other])
    assert "sensitivity" in said  # other data, other sensitivity
    storage.engine.dispose()


def test_a_digest_tells_weights_shapes_data_and_settings_apart():
    net, x = nn.Linear(4, 2).bfloat16(), torch.zeros(2, 4)
    found = {
        digest(net, [(x,)], 0),
        digest(net, [(x + 1,)], 0),
        digest(net, [(x.view(4, 2),)], 0),
        digest(net, [(x,)], 1),
    }
    with torch.no_grad():
        net.weight[0, 0] += 1
    assert len(found | {digest(net, [(x,)], 0)}) == 5
    assert digest(net, [(x,)], 0) == digest(net, [(x.clone(),)], 0)


def test_two_workers_that_begin_together_judge_by_one_latency_table(network, tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "s.db")
    budget, how = Budget(seconds=1.0), {"trials": 10, "storage": storage, "latency": True}
    real, found = study_module.prepare_search, []

    def prepare(*args, known=None, **more):
        problem = real(*args, known=known, **more)
        if known is None and not found:  # another worker is faster
            found.append(None)
            found[0] = search(network, budget, **how)
        found.append(problem)
        return problem

    monkeypatch.setattr(study_module, "prepare_search", prepare)
    search(network, budget, **{**how, "trials": 14})
    _, theirs, first, used = found
    assert first.cost.times != theirs.cost.times
    assert used.cost.times == theirs.cost.times


def test_a_study_of_something_else_is_refused(network, tmp_path):
    storage = open_storage(tmp_path / "s.db")
    study = optuna.create_study(storage=storage, study_name="search")
    study.add_trial(optuna.create_trial(value=1.0))
    with pytest.raises(ValueError, match="study 'search' holds trials of something else; give another name"):
        search(network, storage=storage)


def test_a_network_of_bfloat16_has_settings_too(network):
    weights = [study_module.bytes_of(p) for p in (network[0].weight.bfloat16(), network[0].weight)]
    assert 2 * len(weights[0]) == len(weights[1])


def test_nothing_to_measure_sensitivity_on_is_named(network):
    for batches in ([], [(BATCH[0][:0], BATCH[1][:0])]):
        with pytest.raises(ValueError, match="no batches of training data: want at least one"):
            search(network, batches=batches)


def test_a_latency_budget_is_held_and_refused_where_nothing_is_fast_enough(network):
    found = search(network, Budget(seconds=10.0), trials=12, latency=True)
    assert 0 < found.cost["seconds"] <= 10
    roofline = search(network, Budget(seconds=10.0), trials=12)
    assert (found.report["latency"], roofline.report["latency"]) == ("measured", "roofline")
    (least,) = (t["cost"]["seconds"] for t in roofline.report["trials"] if t["baseline"] == "uniform 2")
    limit = least * 1.0001  # by the roofline
    found = search(network, Budget(seconds=limit), trials=14)
    assert found.cost["seconds"] <= limit
    assert "uniform 8" in found.report["baselines_over_budget"]
    with pytest.raises(ValueError, match=r"the budget is below the smallest network of the space \(seconds 1e-12 <"):
        search(network, Budget(seconds=1e-12), trials=3, latency=True)


def test_a_trial_too_many_goes_back_to_the_queue(network, tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "s.db")
    search(network, trials=10, storage=storage)
    monkeypatch.setattr(study_module, "_done", lambda study: 9 if len(study.trials) == 10 else 10)  # a moment ago
    search(network, trials=10, storage=storage)
    monkeypatch.undo()
    study = optuna.load_study(study_name="search", storage=storage)
    assert [t.state.name for t in study.trials[10:]] == ["WAITING"]
    again, whole = search(network, trials=12, storage=storage), search(network, trials=12)
    assert rows(again) == rows(whole)  # and is what it would have been
    storage.engine.dispose()


@pytest.mark.parametrize("read", ["recall", "_done", "_best_so_far", "last_trainings"])
def test_a_storage_that_cannot_be_read_is_named(network, monkeypatch, read):
    def locked(*_):
        raise OperationalError("SELECT", {}, Exception("database is locked"))

    monkeypatch.setattr(study_module, read, locked)
    with pytest.raises(StorageError, match=r"the storage in memory cannot be read or written \(database is locked\)"):
        search(network, trials=1)


def test_where_the_time_went(network):
    found = search(network, trials=3, finish=train)
    assert found.report["seconds_by_phase"].keys() == {"preparation", "search", "finish"}


def test_optuna_s_tpe_does_not_stop_at_its_first_repetition(network):
    found = search(network, sampler="tpe", trials=32, widths=False)
    tried = [str(t["params"]) for t in found.report["trials"]]
    assert len(set(tried)) == len(tried) == 32  # of 38


def test_a_baseline_is_never_stopped(network, monkeypatch):
    monkeypatch.setattr(study_module, "STARTUP", 1)
    calls = []

    def ever_worse(model, report):
        calls.append(1)
        report(float(len(calls)))

    found = search(network, train=ever_worse, trials=14)
    states = {(t["state"], t["baseline"] is not None) for t in found.report["trials"]}
    assert states == {("complete", True), ("pruned", False)}
