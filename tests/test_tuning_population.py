"""Population based training as Ray Tune calls it: who takes over whom, and whose turn it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.tune")
pytest.importorskip("optuna")

from ray.tune.experiment import Trial

from keyreid.tuning.algorithms import scheduler
from keyreid.tuning.search import Search
from keyreid.tuning.space import Parameter


class FakeTrial:
    """As much of Ray Tune's trial as a scheduler asks for."""

    def __init__(self, name: str, alpha: float) -> None:
        self.config = {"point": {"loss.alpha": alpha}}
        self.status = Trial.RUNNING
        self.checkpoint = SimpleNamespace(path=f"ray/{name}/checkpoint_000001")

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def set_config(self, config: dict) -> None:
        self.config = config


def population(count: int, **values):
    space = {"loss.alpha": Parameter(uniform=(0.1, 0.9))}
    pbt = {"interval_epochs": 2, "resample": 0.0}
    search = Search(base="b", space=space, algorithm="pbt", trials=count, pbt=pbt, **values)
    trials = [FakeTrial(f"trial-{number:03}", 0.5) for number in range(count)]
    return scheduler(search, 10), trials, SimpleNamespace(get_trials=lambda: trials)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_worst_takes_over_the_best_even_where_that_reported_first(mode):
    compares, trials, controller = population(4, mode=mode)
    scores = [0.9, 0.8, 0.7, 0.1] if mode == "max" else [0.1, 0.7, 0.8, 0.9]
    reports = [{"epoch": 2, "score": score} for score in scores]
    decisions = [compares.on_trial_result(controller, *each) for each in zip(trials, reports, strict=True)]
    # When the second reports, it is the worse of two; then there is always one that is worse.
    assert decisions == ["CONTINUE", "PAUSE", "PAUSE", "PAUSE"]
    assert {trial.config["donor"] for trial in trials[1:]} == {"ray/trial-000/checkpoint_000001"}
    assert {trial.config["point"]["loss.alpha"] for trial in trials[1:]} <= {0.4, 0.6}
    assert "donor" not in trials[0].config


def test_nobody_takes_over_between_intervals_from_a_finished_trial_or_without_a_number():
    compares, (good, bad), controller = population(2)
    assert compares.on_trial_result(controller, good, {"epoch": 1, "score": 0.9}) == "CONTINUE"
    assert compares.on_trial_result(controller, good, {"epoch": 2, "score": 0.9}) == "CONTINUE"
    assert compares.on_trial_result(controller, bad, {"epoch": 2, "score": float("nan")}) == "CONTINUE"
    assert compares.on_trial_result(controller, good, {"epoch": 4, "score": 0.9}) == "CONTINUE"
    good.status = Trial.TERMINATED
    assert compares.on_trial_result(controller, bad, {"epoch": 2, "score": 0.1}) == "CONTINUE"
    assert "donor" not in bad.config
    assert "donor" not in good.config


def test_trials_take_turns_where_there_is_no_room_for_all():
    compares, (first, second, third), controller = population(3)
    second.status = third.status = Trial.PENDING
    assert compares.on_trial_result(controller, first, {"epoch": 2, "score": 0.5}) == "PAUSE"
    first.status = Trial.PAUSED
    assert compares.choose_trial_to_run(controller) is second
    second.status = third.status = Trial.RUNNING
    assert compares.choose_trial_to_run(controller) is first
