"""What a search may say, and the points that each algorithm draws from it."""

import math
import pickle
import random
from collections import Counter

import pytest
import yaml
from packed import make_config

pytest.importorskip("optuna")
pytest.importorskip("ray.tune")

from keyreid.config import load_config, save_config
from keyreid.errors import ConfigError
from keyreid.tuning.search import Search, load_search, trial_config, with_point
from keyreid.tuning.space import Parameter, grid_points, mutated, random_points
from keyreid.tuning.study import TrialRecord, best_configuration, best_trial

SPACE = {
    "model.tcss.shift": Parameter(choice=[0, 2, 4], when={"model.tcss.enabled": True}),
    "model.tcss.enabled": Parameter(choice=[True, False]),
    "optimizer.lr": Parameter(loguniform=(1e-4, 1e-1)),
    "loss.alpha": Parameter(uniform=(0.3, 0.9)),
}


@pytest.fixture
def search_file(tmp_path):
    """Write a search beside a small base configuration; gives its path."""
    save_config(make_config("shards", schedule__epochs=5), tmp_path / "base.yaml")

    def write(**values):
        values = {"base": "base.yaml", "trials": 4, "space": {"loss.alpha": {"uniform": [0.3, 0.9]}}, **values}
        path = tmp_path / "search.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_random_points_keep_bounds_and_conditions():
    points = random_points(SPACE, 400, seed=1)
    assert all(0.3 <= point["loss.alpha"] <= 0.9 and 1e-4 <= point["optimizer.lr"] <= 1e-1 for point in points)
    assert all(("model.tcss.shift" in point) == point["model.tcss.enabled"] for point in points)
    assert all(list(point) == [key for key in SPACE if key in point] for point in points)
    # Each factor of ten equally often: a third of the points in each; 400 draws deviate by 9.4 (one sigma).
    decades = Counter(int(-1e-9 - math.log10(point["optimizer.lr"])) for point in points)
    assert all(abs(count - 400 / 3) < 40 for count in decades.values())
    assert len(decades) == 3
    assert points == random_points(SPACE, 400, seed=1) != random_points(SPACE, 400, seed=2)


def test_grid_tries_every_combination_once():
    space = {
        "loss.alpha": Parameter(grid=[0.5, 0.7]),
        "model.tcss.enabled": Parameter(grid=[True, False]),
        "model.tcss.shift": Parameter(grid=[0, 2, 4], when={"model.tcss.enabled": True}),
    }
    points = grid_points(space)
    assert len(points) == 2 * (3 + 1)
    assert len({tuple(point.items()) for point in points}) == len(points)


def test_random_search_crosses_grid_parameters():
    space = {"loss.alpha": Parameter(uniform=(0, 1)), "model.parts": Parameter(grid=[3, 6])}
    assert Counter(point["model.parts"] for point in random_points(space, 5, 0)) == {3: 5, 6: 5}


def test_mutation_stays_inside_and_moves_a_little():
    rng = random.Random(0)
    point = {"model.tcss.enabled": True, "model.tcss.shift": 2, "optimizer.lr": 1e-2, "loss.alpha": 0.85}
    changed = [mutated(SPACE, point, 0.0, rng) for _ in range(200)]
    assert {round(each["optimizer.lr"], 9) for each in changed} == {0.008, 0.012}
    assert {each["loss.alpha"] for each in changed} == {0.68, 0.9}  # 0.85 x 1.2 would be outside
    assert {each["model.tcss.shift"] for each in changed if each["model.tcss.enabled"]} == {0, 4}
    assert all("model.tcss.shift" not in each for each in changed if not each["model.tcss.enabled"])


def test_optuna_suggests_by_condition_and_learns():
    from keyreid.tuning import algorithms

    search = Search(base="b", space=SPACE, algorithm="tpe", trials=60, seed=3)
    searcher = algorithms.searcher(search)
    points = []
    for number in range(60):
        point = searcher.suggest(str(number))["point"]
        points.append(point)
        assert ("model.tcss.shift" in point) == point["model.tcss.enabled"]
        score = -abs(point["loss.alpha"] - 0.4)
        searcher.on_trial_result(str(number), {"score": score, "training_iteration": 1})
        searcher.on_trial_complete(str(number), {"score": score})
    late = [abs(point["loss.alpha"] - 0.4) for point in points[-20:]]
    assert sum(late) / 20 < 0.09  # at random: 0.18


def test_a_saved_optuna_search_goes_on_as_it_would_have(tmp_path):
    from keyreid.tuning import algorithms

    search = Search(base="b", space=SPACE, algorithm="tpe", trials=20, seed=3)
    one, other = algorithms.searcher(search), algorithms.searcher(search)
    for number in range(12):
        point = one.suggest(str(number))["point"]
        one.on_trial_complete(str(number), {"score": point["loss.alpha"]})
    one.save(str(tmp_path / "state"))
    other.restore(str(tmp_path / "state"))
    assert [one.suggest(f"n{n}") for n in range(3)] == [other.suggest(f"n{n}") for n in range(3)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"space": {"loss.alhpa": {"uniform": [0.3, 0.9]}}}, "unknown key 'loss.alhpa'.*'loss.alpha'"),
        ({"space": {"loss.alpha": {"uniform": [0.3, 1.9]}}}, "loss.alpha.*less than or equal to 1"),
        ({"space": {"loss.alpha": {"uniform": [0.3, 0.9], "grid": [1]}}}, "has uniform and grid"),
        ({"space": {"loss.alpha": {"normal": [0.3, 0.9]}}}, "unknown key 'normal': a parameter has uniform"),
        ({"space": {"loss.alpha": 0.5}}, "is a mapping with one of uniform"),
        ({"space": {"loss.centre": {"loguniform": [0, 1]}}}, "above 0"),
        ({"space": {"model.tcss.shift": {"uniform": [0, 4]}}}, "model.tcss.shift.*valid integer"),
        ({"base": "absent.yaml"}, "base: .*absent.yaml is no file"),
        ({"trials": "many"}, "trials: .*valid integer.*'many'"),
        ({"space": {"evaluation.clips": {"choice": [1, 2]}}}, "could not be compared"),
        ({"space": {"data": {"choice": [{"identities": 2, "holdout": 0.5}]}}}, "data.holdout cannot be searched"),
        ({"space": {"loss.alpha": {"uniform": [0, 1], "when": {"loss.beta": 1}}}}, "loss.beta, which the space lacks"),
        ({"algorithm": "grid", "trials": None}, "give loss.alpha as grid"),
        ({"algorithm": "random", "trials": None}, "needs a number of trials"),
        (
            {"algorithm": "pbt", "space": {"model.parts": {"choice": [3, 6]}}},
            "while a network trains, which model.parts",
        ),
        ({"algorithm": "pbt", "scheduler": "asha"}, "leave scheduler out"),
        ({"metric": "map"}, "metric 'map': one of mAP"),
        ({"budgets": {"epochs": 2}}, "unknown key 'budgets'.*'budget'"),
        ({"report_epochs": 9}, "a trial has 5 epochs"),
    ],
)
def test_a_wrong_search_is_refused_with_the_reason(search_file, values, message):
    with pytest.raises(ConfigError, match=message):
        load_search(search_file(**values))


def test_trials_never_see_the_test_set(search_file):
    _, base = load_search(search_file())
    assert base.data.holdout == 0.1
    _, base = load_search(search_file(holdout=0.3))
    assert base.data.holdout == 0.3


def test_settings_and_overrides_reach_the_trials(search_file, tmp_path):
    path = search_file(settings={"schedule": {"warmup_epochs": 1}})
    search, base = load_search(path, ["settings.data.tracklets=4", "budget.epochs=7", "trials=2"])
    assert (base.schedule.warmup_epochs, base.data.tracklets, base.schedule.epochs, search.trials) == (1, 4, 7, 2)
    config = trial_config(base, {"loss.alpha": 0.5}, "trial-003", tmp_path, "sqlite:///x")
    assert (config.loss.alpha, config.run_dir, config.tracking.uri) == (0.5, tmp_path / "trial-003", "sqlite:///x")


def test_a_mapping_sets_several_keys():
    config = with_point(make_config("shards"), {"data": {"identities": 3, "tracklets": 5}}, "point")
    assert config.data.batch_size == 15
    assert config.data.shards == "shards"


def trial(name, status, *scores):
    known = {"numbers": {}, "point": {"loss.alpha": 0.5}, "donor": None, "seconds": 1.0}
    reports = {epoch: {"score": score, **known} for epoch, score in enumerate(scores, 1)}
    return TrialRecord(name, {"loss.alpha": 0.5}, status, reports)


def test_the_best_trial_trained_to_the_end_and_counts_by_its_last_score():
    early = trial("early", "stopped", 0.9)
    fell = trial("fell", "finished", 0.8, 0.4)
    rose = trial("rose", "finished", 0.2, 0.5)
    diverged = trial("diverged", "failed", 0.95)
    diverged.fault = "loss nan"
    assert best_trial([early, fell, rose, diverged], "max") is rose
    assert best_trial([early, fell, rose, diverged], "min") is fell
    assert best_trial([early, diverged], "max") is early
    assert best_trial([diverged, trial("new", "running")], "max") is None


def test_the_best_configuration_is_one_that_train_takes(search_file, tmp_path):
    search, base = load_search(search_file())
    text = best_configuration(search, base, trial("trial-007", "finished", *[0.1] * 5), tmp_path)
    (tmp_path / "best.yaml").write_text(text)
    config = load_config(tmp_path / "best.yaml")
    assert (config.loss.alpha, config.data.holdout, config.name) == (0.5, 0.1, "search-best")
    assert config.output == base.output


def test_a_search_that_goes_on_remembers_what_ray_tune_forgets():
    """Its schedulers are not saved: a restored ASHA must still compare with the trials before."""
    from types import SimpleNamespace

    from keyreid.tuning import algorithms
    from keyreid.tuning.driver import LogBook

    search = Search(base="b", space=SPACE, scheduler="asha", trials=9, asha={"grace_epochs": 1, "reduction": 3})
    before = LogBook(search, 9, None, None)
    for number in range(6):
        before.trials[f"id{number}"] = trial(f"trial-{number}", "stopped", number / 10)
    scheduler = algorithms.scheduler(search, 9)
    after = LogBook(search, 9, scheduler, None, resumes=True)
    after.set_state(pickle.loads(pickle.dumps(before.get_state())))
    assert after.trials == before.trials
    old = [SimpleNamespace(trial_id=f"id{number}", config={}) for number in range(6)]
    new = [SimpleNamespace(trial_id=name, config={"point": {}}) for name in ("bad", "good")]
    for each in old + new:
        scheduler.on_trial_add(None, each)
    after.on_step_begin(0, old + new)
    decide = [
        scheduler.on_trial_result(None, each, {"epoch": 1, "score": s}) for each, s in zip(new, (0.3, 0.6), strict=True)
    ]
    assert decide == ["STOP", "CONTINUE"]


def test_only_the_same_search_of_the_same_version_is_resumed(search_file, tmp_path):
    from keyreid.tuning.driver import SEARCH, STATE, _prepare_folder

    search, base = load_search(search_file())
    folder = tmp_path / "runs"
    assert not _prepare_folder(folder, search, base, resume=True)
    (folder / STATE).mkdir()
    (folder / STATE / "experiment_state-2026.json").touch()
    with pytest.raises(ConfigError, match="holds a search already: resume it by --resume"):
        _prepare_folder(folder, search, base, resume=False)
    assert _prepare_folder(folder, *load_search(search_file(), ["budget.seconds=60"]), resume=True)
    with pytest.raises(ConfigError, match=r"another base\.loss\.alpha, search\.seed, search\.settings\.loss\.alpha:"):
        _prepare_folder(folder, *load_search(search_file(), ["seed=1", "settings.loss.alpha=0.9"]), resume=True)
    earlier = yaml.safe_load((folder / SEARCH).read_text())
    (folder / SEARCH).write_text(yaml.safe_dump({name: earlier[name] for name in ("search", "base")}))
    with pytest.raises(ConfigError, match="of another version of keyreid: resume it with that one"):
        _prepare_folder(folder, search, base, resume=True)


def test_a_study_has_all_trials_as_optuna_knows_them(tmp_path):
    import optuna

    from keyreid.tuning.study import save_study

    search = Search(base="b", name="s", space=SPACE, trials=5)
    trials = [
        trial("trial-000", "finished", 0.2, 0.5),
        trial("trial-001", "stopped", 0.1),
        trial("trial-002", "failed", 0.3),
        trial("trial-003", "finished", 0.3, math.nan),
        trial("trial-004", "waiting"),
    ]
    trials[2].fault = "loss nan"
    for _ in range(2):  # a second time it replaces the first
        save_study(search, trials, tmp_path / "study.db")
    study = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [each.state.name for each in study.trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "RUNNING"]
    assert study.best_trial.user_attrs["name"] == "trial-000"
    assert study.best_trial.params == {"loss.alpha": 0.5}
    assert study.best_trial.intermediate_values == {1: 0.2, 2: 0.5}
    assert study.trials[2].user_attrs["fault"] == "loss nan"
