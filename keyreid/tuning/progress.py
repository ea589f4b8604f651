"""The search's log book: a Ray Tune callback that keeps the records and shows them while trials run."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import MedianStoppingRule, PopulationBasedTraining, TrialScheduler
from rich.console import Console
from rich.live import Live
from rich.table import Table

from keyreid.errors import KeyreidError
from keyreid.tracking import Tracker
from keyreid.tuning.records import Report, TrialRecord, best_trial, describe
from keyreid.tuning.search import Search
from keyreid.tuning.trial import EPOCH, SCORE

REDRAW_SECONDS = 0.5
SAVING_SECONDS = 30.0  # that a search which is to end waits for the checkpoints of what was reported


class LogBook(tune.Callback):
    """Records of all trials; what Ray Tune forgets when it is restored is given back from them.

    Args:
        epochs: of a whole trial.
        scheduler: told of all earlier reports when a search goes on, for Ray Tune does not save it.
        tracker: of the search.
        goes_on: whether there is a state to go on from.
        stopping: asked after every step whether the search is to end.

    Attributes:
        trials: records by Ray Tune's id, oldest first.
        out_of_time: the search ended because its seconds were used up.
    """

    def __init__(
        self,
        search: Search,
        epochs: int,
        scheduler: TrialScheduler,
        tracker: Tracker,
        goes_on: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.trials: dict[str, TrialRecord] = {}
        self.out_of_time = False
        self._search = search
        self._epochs = epochs
        self._scheduler = scheduler
        self._tracker = tracker
        self._earlier_seconds = 0.0
        self._start = time.monotonic()
        self._awaits_state = goes_on
        self._reminds = goes_on
        self._stopping = stopping
        self._ends_by: float | None = None
        self._drawn = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> LogBook:
        if sys.stdout.isatty():
            self._live = Live(console=Console(), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        for trial in self.trials.values():  # of a search that was cut short
            trial.status = "waiting" if trial.status == "running" else trial.status
        if self._live:
            self._live.update(self.table(), refresh=True)
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Of the search so far, over all its starts."""
        return self._earlier_seconds + time.monotonic() - self._start

    def get_state(self) -> dict[str, Any]:
        """What Ray Tune saves with the state of the trials."""
        trials = {key: dataclasses.asdict(trial) for key, trial in self.trials.items()}
        return {"trials": trials, "seconds": self.seconds}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for key, values in state["trials"].items():
            reports = {epoch: Report(**report) for epoch, report in values.pop("reports").items()}
            record = self.trials[key] = TrialRecord(**values, reports=reports)
            record.status = "waiting" if record.status == "running" else record.status
        self._earlier_seconds = state["seconds"]
        self._awaits_state = False

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Give the scheduler its memory back, and meet new trials."""
        if self._awaits_state:  # Ray Tune would begin from the first trial again
            raise KeyreidError(f"the state of search {self._search.name} cannot be read; give a new one another name")
        if self._reminds:
            self._reminds = False
            self._remind_scheduler(trials)
        for trial in trials:
            if trial.trial_id not in self.trials:
                self.trials[trial.trial_id] = TrialRecord(str(trial), trial.config["point"])

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say what starts."""
        record = self.trials[trial.trial_id]
        record.point, record.status = trial.config["point"], "running"
        owner = Path(trial.checkpoint.path).parent.name if trial.checkpoint else None
        if owner is None:
            self._say(f"{record.name} starts: {describe(record.point)}")
        elif owner == record.name:
            self._say(f"{record.name} goes on from its checkpoint")
        else:
            self._say(f"{record.name} takes over {owner}'s weights: {describe(record.point)}")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep a report."""
        record = self.trials[trial.trial_id]
        if "fault" in result:
            record.fault = result["fault"]
            return
        report = Report(
            epoch=result[EPOCH],
            score=result[SCORE],
            numbers=result["numbers"],
            point=result["point"],
            donor=result["donor"],
            seconds=self.seconds,
        )
        record.reports[report.epoch] = report
        donor = f", from {report.donor}'s weights" if report.donor else ""
        self._say(f"{record.name} epoch {report.epoch}/{self._epochs}: {self._search.metric} {report.score:.4f}{donor}")
        best = best_trial(self.trials.values(), self._search.mode)
        if best is not None:
            reports = sum(len(each.reports) for each in self.trials.values())
            self._tracker.metrics({f"best/{self._search.metric}": best.score}, reports)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say how a trial ended."""
        record = self.trials[trial.trial_id]
        if record.fault:
            record.status = "failed"
            self._say(f"{record.name} failed after epoch {record.epoch}: {record.fault}")
        elif record.epoch >= self._epochs:
            record.status = "finished"
            self._say(f"{record.name} finished")
        else:
            record.status = "stopped"
            self._say(f"{record.name} stopped after epoch {record.epoch}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial is tried again."""
        record = self.trials[trial.trial_id]
        record.failures += 1
        record.status = "waiting"
        self._say(f"{record.name} died: retry {record.failures} of {self._search.retries}; {_error_file(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Say that a trial is given up."""
        record = self.trials[trial.trial_id]
        record.failures += 1
        record.status = "failed"
        self._say(f"{record.name} died once more and is given up: {_error_file(trial)}")

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Redraw, and end the search when its time is used up."""
        for trial in trials:
            if trial.status == Trial.PAUSED:
                self.trials[trial.trial_id].status = "paused"
        limit = self._search.budget.seconds
        if limit is not None and self.seconds >= limit and not self.out_of_time:
            self.out_of_time = True
            self._say(f"the search's {limit:.0f} seconds are used up")
        if self.out_of_time or self._stopping():
            self._end(trials)
        if self._live and time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(self.table(), refresh=True)

    def _end(self, trials: list[Trial]) -> None:
        """End the search, but not between a report and its checkpoint, or a resumed one would report it again."""
        if self._ends_by is None:
            self._ends_by = time.monotonic() + SAVING_SECONDS
        if time.monotonic() >= self._ends_by or not any(trial.is_saving for trial in trials):
            signal.raise_signal(signal.SIGUSR1)  # Ray Tune's own way to end in order, its state saved

    def table(self) -> Table:
        """The trials as a table; the best one is marked."""
        best = best_trial(self.trials.values(), self._search.mode)
        table = Table(
            title=f"{self._search.name}: {self._search.metric} of held-out training identities, {self.seconds:.0f} s"
        )
        for name in ("trial", "status", "epoch", self._search.metric, *self._search.space, "died"):
            table.add_column(name)
        for trial in self.trials.values():
            score = "" if math.isnan(trial.score) else f"{trial.score:.4f}"
            values = (describe({"": trial.point[key]})[1:] if key in trial.point else "" for key in self._search.space)
            cells = (
                trial.name,
                trial.status,
                f"{trial.epoch}/{self._epochs}",
                score,
                *values,
                str(trial.failures or ""),
            )
            table.add_row(*cells, style="bold green" if trial is best else None)
        return table

    def _say(self, text: str) -> None:
        if self._live:
            self._live.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def _remind_scheduler(self, trials: list[Trial]) -> None:
        scheduler = self._scheduler
        if isinstance(scheduler, PopulationBasedTraining):  # looks at the next reports only
            return
        # The median rule would take a trial that it stops now for one that it had stopped.
        tell = scheduler.on_trial_complete if isinstance(scheduler, MedianStoppingRule) else scheduler.on_trial_result
        for trial in trials:
            record = self.trials.get(trial.trial_id)
            for epoch in sorted(record.reports) if record else ():
                tell(None, trial, {EPOCH: epoch, SCORE: record.reports[epoch].score})


def _error_file(trial: Trial) -> Path:
    return Path(trial.path, "error.txt")
