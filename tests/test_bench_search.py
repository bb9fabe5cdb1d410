"""The bench of the search: its surrogates, its claims, its tables, and that it goes on."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution
from scipy.stats import spearmanr

from bench import readme, record, runs, search, search_claims, search_networks, search_surrogates
from bench.search_surrogates import MEASURED, METHODS, Measured, Surrogate, measure
from tests import servers

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def commit(monkeypatch):
    for module in (runs, record):
        monkeypatch.setattr(module, "environment", lambda: {"machine": "m", "commit": "c0ffee"})


def test_a_surrogate_behaves_as_bit_widths_do():
    problem = Surrogate(12, 0)
    rng = np.random.default_rng(0)
    drawn = problem.random(rng, 200)
    assert drawn.shape == (200, 12)
    assert (problem.excess(drawn) <= 0).all()
    levels = [float(problem.value(np.full((1, 12), bits))[0]) for bits in range(5)]
    assert levels == sorted(levels, reverse=True)  # more bits, less loss
    assert 0 < levels[-1] < levels[0] < 1
    assert problem.excess(np.full((1, 12), 2))[0] == pytest.approx(0)  # uniform 4 bits are the budget
    assert Surrogate(12, 1).target() != problem.target() == Surrogate(12, 0).target()


def test_the_measured_surrogate_ranks_as_the_network_does():
    problem = Measured()
    assert problem.layers == MEASURED
    assert problem.agreement() > 0.8  # of 60 configurations; chance is below 0.33 in 99 of 100
    pair = np.full((1, MEASURED), 4)
    pair[0, [2, 7]] = 0
    said = json.loads((search_surrogates.FILE).read_text())
    alone, pairs = np.array(said["alone"]), np.array(said["pairs"])
    assert problem.loss(pair)[0] == pytest.approx(alone[2, 0] + alone[7, 0] + pairs[2, 7])  # as it was measured
    assert problem.excess(np.full((1, MEASURED), 2))[0] == pytest.approx(0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_an_easy_target_within_the_budget(method):
    problem = Surrogate(12, 0)
    easy = float(np.median(problem.value(problem.random(np.random.default_rng(1), 500))))
    row = measure(12, 0, method, easy, 50)
    assert row["reached"]
    assert row["trials"] <= 50
    assert measure(12, 0, method, -1.0, 3)["trials"] == 4  # never


def test_random_needs_a_thousand_trials_by_definition():
    found = [measure(12, seed, "random", Surrogate(12, 0).target(), 10_000)["trials"] for seed in (0,)]
    assert found[0] > 50
    values = Surrogate(12, 0).value(Surrogate(12, 0).random(np.random.default_rng(9), 40_000))
    assert 0.3e-3 < (values <= Surrogate(12, 0).target()).mean() < 3e-3


def test_rows_of_this_commit_are_not_measured_again(tmp_path, commit, monkeypatch):
    calls = []

    def fake(layers, seed, method, target, most):
        calls.append((layers, seed, method))
        trials = {"random": 1000, "k-means TPE": 40}.get(method, 60)
        return {"trials": trials, "most": most, "reached": True, "over_budget": 0, "target": target}

    monkeypatch.setattr(search, "measure", fake)
    arguments = ["surrogates", "--seeds", "6", "--results", str(tmp_path)]
    monkeypatch.setitem(search.FEW_SEEDS, "TPE, independent", 5)
    assert search.main(arguments) == search.main(arguments) == 0
    assert len(calls) == len(set(calls)) == 4 * (6 * len(METHODS) - 1)
    assert min(seed for _, seed, _ in calls) >= 100  # constants were chosen on those before
    said = json.loads((tmp_path / "search.json").read_text())
    assert [c["measured"] for c in said["claims"][:3]] == [25.0, 1.5, 1.5]
    assert all(c["holds"] for c in said["claims"])
    shown = readme.tables(said)
    assert (
        "| 12 layers | 6 | 1,000 (1,000 to 1,000) | 40 (40 to 40) | 60 (60 to 60) | 60 (60 to 60), 5 seeds |" in shown
    )


def test_claims_fail_where_the_numbers_do():
    rows = [
        {"layers": 12, "seed": seed, "method": method, "trials": trials + seed, "most": 1000}
        for method, trials in (
            *(("random", 1000), ("k-means TPE", 100), ("TPE, multivariate", 50)),
            ("TPE, independent", 301),
        )
        for seed in range(6)
    ]
    assert [c["holds"] for c in search_claims.surrogate_claims(rows)] == [False, False, True]
    few = [row for row in rows if row["seed"] < 3]  # three wins of three come by chance in one of eight
    assert [c["holds"] for c in search_claims.surrogate_claims(few)] == [False, False, False]
    wide = [row | {"trials": 1300 if row["seed"] % 2 else 900} if row["method"] == "random" else row for row in rows]
    wide = [row | {"trials": 80} if row["method"] == "k-means TPE" else row for row in wide]
    (against_random, *_) = search_claims.surrogate_claims(wide)
    assert against_random["measured"] > 12  # in the medians; over the seeds by chance
    assert not against_random["holds"]
    kills = {"method": "SQLite", "kills": 3, "acknowledged": 9, "lost": 1, "zombies": 2, "slowest_opening_seconds": 6.0}
    assert [c["holds"] for c in search_claims.kill_claims([kills])] == [False] * 3
    assert not search_claims.proposal_claims([{"method": "k-means TPE", "milliseconds": 51.0}])[0]["holds"]
    ours = {"schedule": "reduced", "task": "mnist", "method": "kmeans-tpe", "seed": 0, "short_loss": 2.0}
    ours |= {"within": "11%", "precision": "float32"}
    ours |= {"stored_bytes": 81, "validation_samples": 10_000}
    ours |= {"validation_accuracy": 0.90, "validation_wrong": [*range(1000)]}
    other = {**ours, "method": "uniform", "stored_bytes": 100}
    other |= {"validation_accuracy": 0.91, "validation_wrong": [*range(900)]}
    tpe = {**ours, "method": "tpe", "short_loss": 1.0}
    assert [c["holds"] for c in search_claims.network_claims([ours, other, tpe])] == [False, False, True, False]
    better = {**tpe, "validation_accuracy": 0.91, "validation_wrong": [*range(900)]}
    assert [c["holds"] for c in search_claims.network_claims([ours, better])] == [False, False]
    ours |= {"stored_bytes": 80, "validation_accuracy": 0.9095, "short_loss": 1.0}
    ours |= {"validation_wrong": [*range(905)]}  # five more than theirs, and no other: one error is 0.0002
    assert [c["holds"] for c in search_claims.network_claims([ours, other, tpe])] == [True, False, True, True]
    ours |= {"validation_wrong": [*range(50, 955)]}  # 55 that they have right, 50 the other way: it is 0.001
    assert [c["holds"] for c in search_claims.network_claims([ours, other, tpe])] == [True] * 4
    assert search_claims.network_claims([ours, {**tpe, "distilled": True}]) == []  # losses of other kinds
    judged = ({**row, "distilled": True, "judged_by": "answers"} for row in (ours, tpe))
    assert len(search_claims.network_claims([*judged])) == 2
    program = {**other, "method": "integer program", "seed": 1}  # another seed is no pair
    assert len(search_claims.network_claims([ours, program])) == 0
    for part in (
        {"within": "20%"},
        {"precision": "bfloat16"},
        {"schedule": "full"},
    ):  # and so is another size or training
        assert len(search_claims.network_claims([ours, other | part])) == 0


def test_a_rank_correlation_has_the_interval_that_simulated_ones_have():
    make, inside = np.random.default_rng(0), 0
    for _ in range(300):
        pairs = make.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], (2, 12))  # two seeds of 12 configurations
        found = [float(np.asarray(spearmanr(*one.T))[0]) for one in pairs]
        low, high = search_claims.rank_interval(found, [12, 12])
        inside += low <= 0.4826 <= high  # 6 / pi * asin(0.5 / 2)
    assert 0.91 <= inside / 300 <= 0.99
    assert search_claims.rank_interval([1.0], [3])[0] < 0.999


def test_a_kill_run_and_a_proposal_are_measured(monkeypatch):
    monkeypatch.setattr(search, "KILLS", 2)
    found = {"method": "SQLite"} | search._kills_of_a_file(0)
    assert (found["kills"], found["lost"], found["zombies"]) == (2, 0, 0)
    for kind in servers.installed():
        assert search._kills_of_a_server(0, kind)["lost"] == 0
    monkeypatch.setattr(search, "TRIALS", 20)
    assert search._proposal(0, "k-means TPE")["milliseconds"] > 0
    assert "| SQLite | 2 |" in search_claims.kill_table([found])


def test_proxies_are_drawn_from_the_choices_that_a_search_has():
    names = {"a": CategoricalDistribution((2, 3, 4, 6, 8)), "b": CategoricalDistribution((8, 16))}
    space = SimpleNamespace(distributions=lambda: names, windows={"a": (3, 4), "b": (8, 16)}, configuration=dict)
    found = search_networks.drawn(SimpleNamespace(space=space, feasible=lambda params: True), 4, 0)
    assert {(of["a"], of["b"]) for of in found} == {(3, 8), (3, 16), (4, 8), (4, 16)}


def cut_off(monkeypatch):
    """Time is up after the first training of a row, and in the middle of the first command: what is trained."""
    trainings, commands = [], []
    real_kept, real_called = runs.Section.kept, search_networks.called

    def kept(section, path, of, measure):
        def once():
            if path.parent not in {training.parent for training in trainings}:
                section.settings.deadline = 0.0
            trainings.append(path)
            return measure()

        return real_kept(section, path, of, once)

    def called(command, seconds=None):
        commands.append(command)
        if len(commands) > 1:
            return real_called(command, seconds)
        fewer = [*command]
        fewer[fewer.index("--trials") + 1] = "4"
        real_called(fewer, seconds)
        raise runs.OutOfTime

    monkeypatch.setattr(runs.Section, "kept", kept)
    monkeypatch.setattr(search_networks, "called", called)
    return trainings


def test_network_rows_are_runs_on_one_float_network(monkeypatch, tmp_path, commit):
    monkeypatch.setitem(search_networks.REDUCED, "digits", search_networks.Plan(("11%",), 9, 2, 3, 20, 3))
    monkeypatch.chdir(tmp_path)  # where float networks lie between runs
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    trainings = cut_off(monkeypatch)
    arguments = ["search-digits", "--reduced", "--seeds", "1", "--results", str(tmp_path)]
    for _ in range(5):
        assert not list(tmp_path.glob("search.json")) or "proxy" not in (tmp_path / "search.json").read_text()
        assert search.main(arguments) == 0
    said = json.loads((tmp_path / "search.json").read_text())
    assert len(trainings) == len(set(trainings)), "what was trained once is trained again"
    rows = {row["method"]: row for row in said["rows"]}
    assert list(rows) == ["uniform", "integer program", "kmeans-tpe", "tpe", "proxy"]
    assert [row.get("resumed", False) for row in rows.values()] == [False, False, True, False, False]
    assert not [path for path in Path("runs/bench").iterdir() if "proxy" in path.name or "tpe" in path.name]
    for method in ("uniform", "integer program"):
        assert rows[method]["stored_bytes"] <= 0.11 * rows[method]["float_bytes"]
    assert {"uniform 2", "uniform 2, ends 8", "uniform 3"} <= set(rows["uniform"]["tried"])
    least = min(rows["uniform"]["stored_bytes"], rows["integer program"]["stored_bytes"])
    for method in ("kmeans-tpe", "tpe"):
        assert rows[method]["stored_bytes"] <= 0.8 * least
        assert rows[method]["float_accuracy"] == rows["uniform"]["float_accuracy"]
    for row in (rows[method] for method in ("uniform", "integer program", "kmeans-tpe", "tpe")):
        right = row["validation_samples"] - len(row["validation_wrong"])
        assert right == round(row["validation_accuracy"] * row["validation_samples"])
    assert rows["kmeans-tpe"]["trials"] == 9 < rows["tpe"]["trials"]
    assert len(rows["proxy"]["short_losses"]) == 3
    assert -1 <= rows["proxy"]["spearman"] <= 1
    shown = search_claims.network_table(said["rows"])
    assert "| kmeans-tpe | 11% | reduced | 1 |" in shown
    assert "3 random configurations after 2 and 3 steps (reduced, beside 11%, seeds: 1)" in shown
    assert len(said["claims"]) == 6


def test_an_unknown_section_is_named(capsys):
    with pytest.raises(SystemExit):
        search.main(["nothing"])
    assert "no section is called 'nothing'; there are surrogates" in capsys.readouterr().err
