"""A search of networks, data, machines and studies that are not the usual ones."""

import numpy as np
import optuna
import pytest
import torch
import torch.nn.functional as F
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
from torch import nn

from sgsc import prepare
from sgsc.search import finals
from sgsc.search import study as study_module
from sgsc.search import trials as trials_module
from sgsc.search.candidates import as_float
from sgsc.search.cost import Budget, CostModel
from sgsc.search.kmeans_tpe import KMeansTPESampler
from sgsc.search.storage import WORKER, fail_stale, open_storage, open_study
from sgsc.search.study import search_network
from tests.small import blobs, loss

pytestmark = pytest.mark.usefixtures("quiet_optuna")
BATCH = (blobs()[0].float()[:60], blobs()[1][:60])


def train(model, report):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    optimizer.zero_grad()
    loss(model, BATCH).backward()
    optimizer.step()


@torch.no_grad()
def validate(model):
    return loss(model, BATCH).item()


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def search(network, budget=None, trials=8, **more):
    how = {"train": train, "validate": validate, "loss": loss, "batches": [BATCH]} | more
    return search_network(network, budget=budget or Budget(mean_bits=4.0), trials=trials, **how)


class Tied(nn.Module):
    """Reads the weight of a layer beside calling it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 32), nn.Linear(32, 40), nn.Linear(32, 4)

    def forward(self, x):
        z = torch.relu(self.b(torch.relu(self.a(x))))
        return self.out(F.linear(z, self.b.weight.t()))


def test_a_layer_whose_weight_is_read_beside_it_keeps_its_channels():
    found = search(Tied().eval(), trials=12)
    assert not any("width.b" in name or "width.a" in name for name in found.report["windows"])
    assert np.isfinite(found.loss)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again, self.out = self.first, nn.Linear(12, 4)

    def forward(self, x):
        return self.out(self.again(torch.relu(self.first(x))))


def test_the_winner_goes_on_where_one_module_has_two_names():
    found = search(Twice().eval())
    floats = as_float(found.model)
    assert floats.first is floats.again
    assert type(floats.first) is nn.Linear
    assert prepare(floats).swapped == ("first", "out")


class Tables(nn.Module):
    """Two layers that share one weight: refused, unless both are skipped."""

    def __init__(self):
        super().__init__()
        self.e, self.middle, self.o = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.o.weight = self.e.weight

    def forward(self, x):
        return self.o(torch.relu(self.middle(self.e(x)))).mean(1)


def test_layers_may_be_left_float():
    ids = torch.randint(20, (24, 5), generator=torch.Generator().manual_seed(0))
    batch = (ids, ids[:, 0])
    how = {"batches": [batch], "validate": lambda m: loss(m, batch).item(), "train": lambda m, report: None}
    with pytest.raises(ValueError, match=r"leave both float with skip=\['e', 'o'\]"):
        search(Tables().eval(), **how)
    found = search(Tables().eval(), skip=["e", "o"], **how)
    assert list(found.configuration.bits) == ["middle"]


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(12, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.out(torch.relu(self.a(x)) if x.sum() > -1e9 else self.a(x))


def test_why_no_channel_changes_is_told():
    assert "cannot be traced" in search(Branching().eval()).report["channels_fixed"]
    with pytest.raises(ValueError, match=r"in every layer and all channels, for the model cannot be traced"):
        search(Branching().eval(), Budget(macs=400.0))
    assert search(plain()).report["channels_fixed"] == ""


def test_where_all_channels_cost_too_much_baselines_have_fewer():
    network = plain()
    found = search(network, Budget(macs=0.9 * (12 * 32 + 32 * 32 + 32 * 4)), trials=6)
    given = [trial["baseline"] for trial in found.report["trials"] if trial["baseline"]]
    assert given == ["uniform 8, 75 % of the channels"]  # of 32 channels there are 24 or all


class Named(nn.Module):
    """Calls a layer by keyword."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(input=torch.relu(self.a(x)))


def test_a_layer_that_is_called_by_keyword_is_timed():
    assert search(Named().eval(), Budget(seconds=1.0), trials=3, latency=True).cost["seconds"] > 0


# ---- what is no data, no budget, no seed ----


@pytest.mark.parametrize(
    ("given", "said"),
    {
        "a loader": ({"batches": iter([BATCH])}, r"batches is a list_iterator; want a list of tuples .*islice"),
        "dictionaries": ({"batches": [{"x": BATCH[0]}]}, r"batches holds dict; want a list of tuples"),
        "bare tensors": ({"batches": [BATCH[0]]}, r"batches holds Tensor; want a list of tuples"),
        "nothing": ({"batches": []}, r"no batches of training data"),
        "a number": ({"budget": 4.0}, r"budget=4\.0: want a Budget"),
        "a seed": ({"seed": 1.5}, r"seed=1\.5: a seed is a whole number"),
    }.values(),
    ids=("a loader", "dictionaries", "bare tensors", "nothing", "a number", "a seed"),
)
def test_what_cannot_serve_is_named(given, said):
    with pytest.raises(ValueError, match=said):
        search(plain(), **given)


def test_a_budget_is_of_numbers():
    with pytest.raises(ValueError, match="budget bytes='50kB': want a number"):
        Budget(bytes="50kB")  # pyright: ignore
    assert type(Budget(bytes=np.int64(4000)).bytes) is float


# ---- studies ----


def test_a_storage_may_be_a_path(tmp_path):
    first = search(plain(), trials=4, storage=str(tmp_path / "s.db"))
    again = search(plain(), trials=4, storage=tmp_path / "s.db")
    assert again.report["trials"] == first.report["trials"]


def test_a_table_of_a_slower_machine_does_not_let_old_trials_win(tmp_path, monkeypatch):
    pace = [1e-6]

    def measured(self, model, example, bits, repeats=20):
        self.times = {(name, b): pace[0] * b for name in self.shapes for b in bits}

    monkeypatch.setattr(CostModel, "measure", measured)
    best = {"validate": lambda m: -float(sum(p.weight_quantizer.bits().float().mean() for p in (m[0], m[2], m[4])))}
    how = {"storage": tmp_path / "s.db", "latency": True, "widths": False, **best}
    first = search(plain(), Budget(seconds=15e-6), **how)
    assert first.loss == -15
    pace[0] = 2e-6
    other = (BATCH[0] + 1e-4, BATCH[1])  # other data: sensitivity and table are measured anew
    second = search(plain(), Budget(seconds=15e-6), trials=12, **how, batches=[other])
    assert second.cost["seconds"] <= 15e-6
    assert second.loss > first.loss


def test_a_worker_that_began_at_the_same_moment_with_other_settings_stops_one_of_both(tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "s.db")
    done = study_module._done

    def late(study):
        if not done(study):  # after this one has looked, and before its first trial
            study.set_user_attr(study_module.SETTINGS, {**study.user_attrs[study_module.SETTINGS], "seed": 7})
        return done(study)

    monkeypatch.setattr(study_module, "_done", late)
    with pytest.raises(ValueError, match=r"is of another seed: \{'seed': 7\}"):
        search(plain(), storage=storage)
    storage.engine.dispose()


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_study_is_of_all_weights(tmp_path, where):
    network = plain()
    search(network, trials=3, storage=tmp_path / "s.db")
    with torch.no_grad():
        getattr(network[2], where).add_(1.0)
    with pytest.raises(ValueError, match=r"is of another .*weights.* --start float.safetensors of the first one's"):
        search(network, trials=4, storage=tmp_path / "s.db")


def test_where_a_best_trial_comes_out_worse_the_best_baseline_is_trained_again_too(tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "s.db")
    search(plain(), trials=14, storage=storage)
    study = optuna.load_study(study_name="search", storage=storage)
    best = min((t for t in study.trials if not t.user_attrs.get("baseline")), key=lambda t: t.value or np.inf)
    baseline = min((t for t in study.trials if t.user_attrs.get("baseline")), key=lambda t: t.value)
    once = finals.trained

    def trained(problem, of, *rest):
        made = once(problem, of, *rest)
        if of == problem.space.configuration(best.params):  # it was luck, and does not come again
            made[4].bias.data.add_(torch.tensor([50.0, 0.0, 0.0, 0.0]))
        return made

    monkeypatch.setattr(finals, "trained", trained)
    monkeypatch.setattr(
        finals, "judged", lambda study, problem: [t for t in study.trials if t.number in (best.number, baseline.number)]
    )
    first = sorted((best, baseline), key=lambda t: t.value)[0]
    found = search(plain(), trials=14, storage=storage)
    assert first is best
    assert found.report["result"]["trial"] == baseline.number
    assert found.loss <= baseline.value + 1e-6
    storage.engine.dispose()


def test_a_loss_that_is_not_finite_is_nobodys_best():
    values = iter([-np.inf, *[1.0] * 7])  # one a trial: the best network is kept, and not trained again
    assert search(plain(), validate=lambda m: next(values)).loss == 1.0
    assert next(values, None) is None


def test_ctrl_c_right_after_a_trial_began_gives_it_back(monkeypatch):
    storage = optuna.storages.InMemoryStorage()
    search(plain(), trials=4, storage=storage)
    study = optuna.load_study(study_name="search", storage=storage)
    real, calls = optuna.study.Study.get_trials, []

    def get_trials(self, *how, **named):
        calls.append(1)
        if named.get("states") == trials_module.TAKEN and len(real(self, deepcopy=False)) == 5 and "hit" not in calls:
            calls.append("hit")
            raise KeyboardInterrupt
        return real(self, *how, **named)

    monkeypatch.setattr(optuna.study.Study, "get_trials", get_trials)
    with pytest.raises(KeyboardInterrupt):
        search(plain(), trials=6, storage=storage)
    assert [t.state for t in real(study)][4:] == [TrialState.WAITING]
    resumed = search(plain(), trials=6, storage=storage)
    assert [t["params"] for t in resumed.report["trials"]] == [
        t["params"] for t in search(plain(), trials=6).report["trials"]
    ]


def test_trials_without_a_note_are_waited_for_once(tmp_path, monkeypatch):
    study = open_study(open_storage(tmp_path / "s.db"), "study", KMeansTPESampler())
    for _ in range(4):
        study.ask()
    slept = []
    monkeypatch.setattr("sgsc.search.storage.time.sleep", slept.append)
    assert fail_stale(study) == [0, 1, 2, 3]
    assert len(slept) == 1
    assert all(WORKER not in t.user_attrs for t in study.trials)
    study._storage._backend.engine.dispose()


# ---- the sampler by itself ----


@pytest.mark.parametrize(
    "space",
    [
        {"x": IntDistribution(1, 60)},
        {"x": IntDistribution(1, 48, log=True)},
        {"x": FloatDistribution(0.0, 5.0, step=0.1), "y": IntDistribution(0, 1)},
    ],
    ids=["many", "logarithmic", "steps"],
)
def test_no_value_of_a_long_row_is_proposed_twice(space):
    study = optuna.create_study(sampler=KMeansTPESampler(space=space))
    study.optimize(
        lambda t: (
            abs(
                t.suggest_float("x", 0, 5, step=0.1)
                if "y" in space
                else t.suggest_int("x", space["x"].low, space["x"].high, log=space["x"].log)
            )
            + (t.suggest_int("y", 0, 1) if "y" in space else 0)
        ),
        36,
    )
    assert len({tuple(t.params.values()) for t in study.trials}) == 36


def test_a_budget_sees_parameters_of_one_choice():
    space = {"x": IntDistribution(0, 5), "one": IntDistribution(3, 3)}
    sampler = KMeansTPESampler(feasible=lambda params: params["x"] * params["one"] <= 9, space=space)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda t: -t.suggest_int("x", 0, 5) * t.suggest_int("one", 3, 3), 4)
    assert study.best_value == -9
    assert all(t.params["x"] <= 3 for t in study.trials)


class Part(nn.Module):
    """Its last layer alone is of float64."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 4).double()

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).double())


def test_dtypes_that_cannot_serve_are_named():
    with pytest.raises(ValueError, match=r"the model's 0.weight is torch.float64, .* by .float\(\)"):
        search(plain().double())
    with pytest.raises(ValueError, match=r"the model's last.weight is torch.float64"):
        search(Part())
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(ValueError, match=rf"does not take the batches' inputs, {dtype} of shape \(60, 12\): "):
            search(plain(), batches=[(BATCH[0].to(dtype), BATCH[1])])


@pytest.mark.parametrize("loss", [None, torch.zeros(2), "low"])
def test_a_validation_that_gives_no_number_is_named(loss):
    with pytest.raises(ValueError, match=r"validate returned .*; want the validation loss, one number"):
        search(plain(), validate=lambda model: loss)


@pytest.mark.parametrize("trials", [2.5, float("nan"), "5", 0])
def test_trials_are_a_whole_number(trials):
    with pytest.raises(ValueError, match="want a whole number of trials, 1 or more"):
        search(plain(), trials=trials)


def test_a_damaged_file_is_called_damaged(tmp_path):
    path = tmp_path / "s.db"
    open_study(open_storage(path), "search", optuna.samplers.RandomSampler())
    path.write_bytes(path.read_bytes()[:5000])
    for log in tmp_path.glob("s.db-*"):
        log.unlink()
    with pytest.raises(OSError, match=r"cannot be opened .*the file is damaged: put a copy of it in its place"):
        open_storage(path)
