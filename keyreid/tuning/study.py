"""What is known of each trial: plain data, kept with Ray Tune's state; and the same as an Optuna study, with pictures.

A study's finished trials cannot change any more, which a search that resumes from an earlier state must be able to do.
So the study is written from the records.
"""

import contextlib
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna

from keyreid.tuning.search import Search
from keyreid.tuning.space import Point, label

STUDY = "study.db"
IMPORTANCE_TRIALS = 4  # with fewer, all parameters matter equally
OPTUNA_STATES = {"finished": "COMPLETE", "stopped": "PRUNED", "failed": "FAIL"}


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        reports: by epoch, a repeated one as it was last: `score` (NaN where the training broke off), `numbers` (all
            metrics), `point` (the values then, which population based training changes), `donor` (whose checkpoint
            this part of the training began with, if another trial's) and `seconds` of the search so far.
        failures: times that a process of it died.
        fault: why it failed, where it did.
        donor: the last checkpoint of another trial that it took over.
    """

    name: str
    point: Point
    status: Literal["waiting", "running", "paused", "finished", "stopped", "failed"] = "waiting"
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: int = 0
    fault: str | None = None
    donor: str | None = None

    @property
    def epoch(self) -> int:
        """Epochs reported."""
        return max(list(self.reports), default=0)  # a copy: a terminal's table is drawn in another thread

    @property
    def score(self) -> float:
        """The last score; NaN before the first, or where the training broke off."""
        return self.reports[self.epoch]["score"] if self.reports and not self.fault else math.nan


def best_trial(trials: Iterable[TrialRecord], mode: Literal["max", "min"]) -> TrialRecord | None:
    """The trial with the best last score: among those that trained to the end, or among all where none did."""
    scored = [trial for trial in trials if not math.isnan(trial.score)]
    whole = [trial for trial in scored if trial.status == "finished"]
    sign = 1 if mode == "max" else -1
    return max(whole or scored, key=lambda trial: sign * trial.score, default=None)


def describe(point: Mapping[str, Any]) -> str:
    """`loss.alpha=0.6 optimizer.lr=0.001`."""
    return " ".join(f"{key}={short(value)}" for key, value in point.items())


def short(value: Any) -> str:
    """A value, with four digits of a number."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{{{describe(value)}}}" if isinstance(value, Mapping) else str(value)


def trial_table(search: Search, trials: Sequence[TrialRecord]) -> list[list[str]]:
    """A head and a row for each trial."""
    rows = [["trial", "status", "epoch", search.metric, *search.space, "died", "fault"]]
    for trial in trials:
        score = "" if math.isnan(trial.score) else f"{trial.score:.4f}"
        values = [short(trial.point.get(key, "")) for key in search.space]
        failures, fault = str(trial.failures or ""), trial.fault or ""
        rows.append([trial.name, trial.status, str(trial.epoch), score, *values, failures, fault])
    return rows


def save_study(search: Search, trials: Sequence[TrialRecord], path: Path) -> None:
    """Write all trials as an Optuna study in SQLite, which optuna-dashboard opens; an earlier one is replaced."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name=search.name, storage=storage)
    study = optuna.create_study(study_name=search.name, storage=storage, direction=f"{search.mode}imize")
    study.add_trials([_optuna_trial(search, trial, OPTUNA_STATES.get(trial.status, "RUNNING")) for trial in trials])


def _optuna_trial(search: Search, trial: TrialRecord, state: str) -> optuna.trial.FrozenTrial:
    state = "FAIL" if state in ("COMPLETE", "PRUNED") and math.isnan(trial.score) else state
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState[state],
        value=trial.score if state in ("COMPLETE", "PRUNED") else None,
        params={key: label(value) for key, value in trial.point.items()},
        distributions={key: search.space[key].distribution() for key in trial.point},
        user_attrs={name: getattr(trial, name) for name in ("name", "status", "failures", "fault")},
        intermediate_values={epoch: report["score"] for epoch, report in trial.reports.items()},
    )


def draw_study(search: Search, trials: Sequence[TrialRecord], folder: Path) -> dict[str, Path]:
    """Write Optuna's pictures of the trials that have a score, each with its last one; gives them by title."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as drawn

    study = optuna.create_study(direction=f"{search.mode}imize")
    study.add_trials([_optuna_trial(search, trial, "COMPLETE") for trial in trials])
    target = {"target_name": search.metric}
    pictures = {
        f"Best {search.metric} so far": ("history", drawn.plot_optimization_history, target),
        f"{search.metric} against each parameter, one dot per trial": ("parameters", drawn.plot_slice, target),
        "All parameters of each trial": ("parallel", drawn.plot_parallel_coordinate, target),
        "Learning curves": ("curves", drawn.plot_intermediate_values, {}),
    }
    if sum(trial.value is not None for trial in study.trials) >= IMPORTANCE_TRIALS:
        title = f"How much each parameter matters for {search.metric}"
        pictures[title] = ("importances", drawn.plot_param_importances, target)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these functions count as experimental
        for name, draw, options in pictures.values():
            draw(study, **options)
            if name == "parallel":
                pyplot.gcf().set_size_inches(4 + 2 * len(search.space), 5)  # or labels cover each other
            pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
            pyplot.close("all")
    return {title: folder / f"{name}.png" for title, (name, _, _) in pictures.items()}
