"""From a search's words to Ray Tune's: who chooses points, and who stops or replaces trials."""

import math
import random
from functools import partial
from typing import Any

import optuna
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from keyreid.config import Config
from keyreid.tuning.rank import EPOCH
from keyreid.tuning.search import Search, with_point
from keyreid.tuning.space import Point, Space, grid_points, mutated, random_points, walk
from keyreid.tuning.trial import SCORE


def points(search: Search, base: Config) -> list[Point] | None:
    """All points of a search, each of them a configuration that can be; None where they depend on the scores.

    Raises:
        ConfigError: a point that does not fit together, such as a batch that its micro-batches do not divide.
    """
    if search.algorithm == "tpe":
        return None
    grid = search.algorithm == "grid"
    drawn = grid_points(search.space) if grid else random_points(search.space, search.trials, search.seed)
    for point in drawn:
        with_point(base, point, f"{search.name}: {point}")
    return drawn


def searcher(search: Search) -> OptunaSearch | None:
    """Optuna's tree-structured Parzen estimator; None where the points are known."""
    if search.algorithm != "tpe":
        return None
    sampler = optuna.samplers.TPESampler(seed=search.seed)
    return OptunaSearch(partial(_suggested, search.space), metric=SCORE, mode=search.mode, sampler=sampler)


def _suggested(parameters: Space, trial: optuna.Trial) -> Point:
    """A point in Optuna's define-by-run style, so that conditions hold; Ray Tune makes {"point": {...}} of it."""
    point = walk(parameters, lambda key, parameter: parameter.suggest(trial, f"point/{key}"))
    return {f"point/{key}": value for key, value in point.items()}


def scheduler(search: Search, epochs: int) -> TrialScheduler:
    """Who stops trials, of so many epochs, early, or replaces them."""
    if search.algorithm == "pbt":
        return Population(search)
    common = {"time_attr": EPOCH, "metric": SCORE, "mode": search.mode}
    if search.scheduler == "asha":
        grace, reduction = min(search.asha.grace_epochs, epochs), search.asha.reduction
        return AsyncHyperBandScheduler(**common, max_t=epochs, grace_period=grace, reduction_factor=reduction)
    if search.scheduler == "median":
        common["min_time_slice"] = math.inf  # its default pauses every trial in turn, and each start costs a minute
        grace, others = search.median.grace_epochs, search.median.samples
        return MedianStoppingRule(**common, grace_period=grace, min_samples_required=others)
    return FIFOScheduler()


class Population(FIFOScheduler):
    """Population based training (Jaderberg et al. 2017): who reports is compared with the others' last reports.

    Ray Tune's own keeps a trial's checkpoint only if it was among the best when it reported, so nobody could take over
    the first one of an interval, and offers no public way to change that. Here each report has its checkpoint already:
    a bad trial is paused with a better one's in its configuration, from which it then starts (see KeyreidTrial).
    """

    def __init__(self, search: Search) -> None:
        super().__init__()
        self._search, self._sign = search, 1 if search.mode == "max" else -1
        self._donors, self._changes = random.Random(search.seed), random.Random(search.seed)
        self._compared: dict[Trial, tuple[int, float]] = {}  # epoch and score

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Let a trial continue, or pause it: for others that wait, or to take over one of the best."""
        pbt, (last, _) = self._search.pbt, self._compared.get(trial, (0, 0))
        if result[EPOCH] - last < pbt.interval_epochs or math.isnan(result[SCORE]):
            return self.CONTINUE
        self._compared[trial] = result[EPOCH], self._sign * result[SCORE]
        alive = [each for each in self._compared if not each.is_finished()]
        ranked = sorted(alive, key=lambda each: self._compared[each][1])
        count = min(math.ceil(len(ranked) * pbt.quantile), len(ranked) // 2)
        donor = self._donors.choice(ranked[-count:]) if trial in ranked[:count] else None
        if donor and donor.checkpoint:
            point = mutated(self._search.space, donor.config["point"], pbt.resample, self._changes)
            trial.set_config({"point": point, "donor": donor.checkpoint.path})
            self._compared[trial] = self._compared[donor][0], self._compared[trial][1]
            return self.PAUSE
        return self.PAUSE if self.choose_trial_to_run(tune_controller) else self.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The trial that is furthest behind, so that all take turns."""
        waiting = [each for each in tune_controller.get_trials() if each.status in (Trial.PENDING, Trial.PAUSED)]
        return min(waiting, key=lambda each: self._compared.get(each, (0, 0))[0], default=None)
