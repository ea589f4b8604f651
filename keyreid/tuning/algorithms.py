"""From a search's words to Ray Tune's: who chooses points, and who stops or replaces trials."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from keyreid.config import Config
from keyreid.tuning import space
from keyreid.tuning.search import Search, with_point
from keyreid.tuning.space import Point, Space
from keyreid.tuning.trial import EPOCH, SCORE


def points(search: Search, base: Config) -> list[Point] | None:
    """All points of a search, each of them a configuration that can be; None where they depend on the scores.

    Raises:
        ConfigError: a point that does not fit together, such as a batch that its micro-batches do not divide.
    """
    if search.algorithm == "tpe":
        return None
    grid = search.algorithm == "grid"
    drawn = space.grid_points(search.space) if grid else space.random_points(search.space, search.trials, search.seed)
    for point in drawn:
        with_point(base, point, f"{search.name}: {point}")
    return drawn


def parameters(drawn: list[Point] | None) -> dict[str, Any]:
    """Ray Tune's search space: the points one by one, or nothing where the searcher brings them."""
    return {"point": tune.grid_search(drawn)} if drawn is not None else {}


def searcher(search: Search) -> Searcher | None:
    """Optuna's tree-structured Parzen estimator; None where the points are known."""
    if search.algorithm != "tpe":
        return None
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    logging.getLogger("optuna").setLevel(logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=search.seed)
    return OptunaSearch(_Suggestion(search.space), metric=SCORE, mode=search.mode, sampler=sampler)


class _Suggestion:
    """A point in Optuna's define-by-run style, so that conditions hold; saved with the searcher."""

    def __init__(self, space: Space) -> None:
        self._space = space

    def __call__(self, trial: Any) -> dict[str, Any]:
        point = space.walk(self._space, lambda key, parameter: parameter.suggest(trial, f"point/{key}"))
        return {f"point/{key}": value for key, value in point.items()}  # Ray Tune makes {"point": {...}} of it


def scheduler(search: Search, epochs: int) -> TrialScheduler:
    """Who stops trials early, or replaces them.

    Args:
        epochs: of a whole trial.
    """
    common = {"time_attr": EPOCH, "metric": SCORE, "mode": search.mode}
    if search.algorithm == "pbt":
        rng = random.Random(search.seed)

        def explore(config: dict[str, Any]) -> dict[str, Any]:
            return {**config, "point": space.mutated(search.space, config["point"], search.pbt.resample, rng)}

        return _Population(
            **common,
            perturbation_interval=search.pbt.interval_epochs,
            quantile_fraction=search.pbt.quantile,
            custom_explore_fn=explore,
            log_config=False,
        )
    if search.scheduler == "asha":
        grace = min(search.asha.grace_epochs, epochs)
        return AsyncHyperBandScheduler(
            **common, max_t=epochs, grace_period=grace, reduction_factor=search.asha.reduction
        )
    if search.scheduler == "median":
        return MedianStoppingRule(
            **common,
            grace_period=search.median.grace_epochs,
            min_samples_required=search.median.samples,
            min_time_slice=math.inf,  # its default pauses every trial in turn, and each start costs a minute
        )
    return FIFOScheduler()


class _Population(PopulationBasedTraining):
    """Ray Tune's, which keeps a trial's checkpoint only if it was compared when it reported: so nobody could take over
    the first ones of an interval that all reach. Here each report has its checkpoint already.
    """

    def _checkpoint_or_exploit(
        self, trial: Trial, tune_controller: Any, upper_quantile: list[Trial], lower_quantile: list[Trial]
    ) -> None:
        for good in upper_quantile:
            state = self._trial_state[good]
            state.last_checkpoint = state.last_checkpoint or good.checkpoint
        super()._checkpoint_or_exploit(trial, tune_controller, upper_quantile, lower_quantile)
