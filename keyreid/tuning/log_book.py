"""The search's log book: a Ray Tune callback that keeps the records and shows them while trials run."""

import signal
import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from rich.table import Table

from keyreid.distributed.preemption import StopRequest
from keyreid.errors import KeyreidError
from keyreid.tracking import Tracker
from keyreid.tuning.rank import EPOCH
from keyreid.tuning.search import Search
from keyreid.tuning.study import TrialRecord, best_trial, describe, trial_table
from keyreid.tuning.trial import SCORE

SAVING_SECONDS = 30.0  # that a search which is to end waits for the checkpoints of what was reported


class LogBook(tune.Callback):
    """Records of all trials; what Ray Tune forgets when it is restored is given back from them.

    Args:
        epochs: of a whole trial.
        scheduler: told of all earlier reports when a search resumes, for Ray Tune does not save it.
        tracker: of the search.
        resumes: whether there is a state to resume from.
        stop: asked after every step.

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
        resumes: bool = False,
        stop: StopRequest | None = None,
    ) -> None:
        self._search, self._epochs, self._scheduler, self._tracker = search, epochs, scheduler, tracker
        self._awaits_state = self._reminds = resumes
        self._stop = stop or StopRequest()
        self._start = time.monotonic()  # as if the search had run without a break
        self._ends_by: float | None = None
        self.trials: dict[str, TrialRecord] = {}
        self.out_of_time = False

    @property
    def seconds(self) -> float:
        """Of the search so far, over all its starts."""
        return time.monotonic() - self._start

    def get_state(self) -> dict[str, Any]:
        """What Ray Tune saves with the state of the trials."""
        return {"trials": self.trials, "seconds": self.seconds}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from there."""
        self.trials, self._awaits_state = state["trials"], False
        self._start = time.monotonic() - state["seconds"]
        self.end()

    def end(self) -> list[TrialRecord]:
        """All records; what ran when the search ended waits for the next start."""
        for trial in self.trials.values():
            trial.status = "waiting" if trial.status == "running" else trial.status
        return list(self.trials.values())

    def on_step_begin(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Give the scheduler its memory back, and meet new trials."""
        if self._awaits_state:  # Ray Tune would begin from the first trial again
            raise KeyreidError(f"the state of search {self._search.name} cannot be read; give a new one another name")
        if self._reminds and self._search.algorithm != "pbt":  # which looks at the next reports only
            # The median rule would take a trial that it stops now for one that it had stopped.
            how = "on_trial_complete" if self._search.scheduler == "median" else "on_trial_result"
            for trial in (each for each in trials if each.trial_id in self.trials):
                for epoch, report in sorted(self.trials[trial.trial_id].reports.items()):
                    getattr(self._scheduler, how)(None, trial, {EPOCH: epoch, SCORE: report[SCORE]})
        self._reminds = False
        for trial in trials:
            if trial.trial_id not in self.trials:
                self.trials[trial.trial_id] = TrialRecord(str(trial), trial.config["point"])

    def on_trial_start(self, trial: Trial, **_: Any) -> None:
        """Say what starts."""
        record, donor = self.trials[trial.trial_id], trial.config.get("donor")
        record.point, record.status = trial.config["point"], "running"
        if record.donor != donor:
            how = f"takes over {Path(donor).parent.name}'s weights: {describe(record.point)}"
        else:
            how = "resumes from its checkpoint" if trial.checkpoint else f"starts: {describe(record.point)}"
        record.donor = donor
        print(f"{record.name} {how}", flush=True)

    def on_trial_result(self, trial: Trial, result: dict[str, Any], **_: Any) -> None:
        """Keep a report."""
        record, metric = self.trials[trial.trial_id], self._search.metric
        if "fault" in result:
            record.fault = result["fault"]
            return
        kept = {key: result[key] for key in (SCORE, "numbers", "point", "donor")}
        record.reports[result[EPOCH]] = kept | {"seconds": round(self.seconds, 1)}
        donor = f", from {result['donor']}'s weights" if result["donor"] else ""
        print(f"{record.name} epoch {result[EPOCH]}/{self._epochs}: {metric} {result[SCORE]:.4f}{donor}", flush=True)
        if best := best_trial(self.trials.values(), self._search.mode):
            reports = sum(len(each.reports) for each in self.trials.values())
            self._tracker.metrics({f"best/{metric}": best.score}, reports)

    def on_trial_complete(self, trial: Trial, **_: Any) -> None:
        """Say how a trial ended."""
        record = self.trials[trial.trial_id]
        whole = record.epoch >= self._epochs
        record.status = "failed" if record.fault else "finished" if whole else "stopped"
        why = f": {record.fault}" if record.fault else ""
        print(f"{record.name} {record.status} after epoch {record.epoch}{why}", flush=True)

    def on_trial_recover(self, trial: Trial, **_: Any) -> None:
        """Say that a trial is tried again."""
        self._died(trial, "waiting", f"retry {self.trials[trial.trial_id].failures + 1} of {self._search.retries}")

    def on_trial_error(self, trial: Trial, **_: Any) -> None:
        """Say that a trial is given up."""
        self._died(trial, "failed", "given up")

    def _died(self, trial: Trial, status: str, what_now: str) -> None:
        record = self.trials[trial.trial_id]
        record.failures, record.status = record.failures + 1, status
        print(f"{record.name} died: {what_now}; {Path(trial.path, 'error.txt')}", flush=True)

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """End the search when it is told to, or its time is used up."""
        for trial in trials:
            if trial.status == Trial.PAUSED:
                self.trials[trial.trial_id].status = "paused"
        limit = self._search.budget.seconds
        if limit is not None and self.seconds >= limit and not self.out_of_time:
            self.out_of_time = True
            print(f"the search's {limit:.0f} seconds are used up", flush=True)
        if self.out_of_time or self._stop.signal:
            # Not between a report and its checkpoint, or a resumed search would report it again.
            self._ends_by = self._ends_by or time.monotonic() + SAVING_SECONDS
            if time.monotonic() >= self._ends_by or not any(trial.is_saving for trial in trials):
                signal.raise_signal(signal.SIGUSR1)  # Ray Tune's own way to end in order, its state saved

    def table(self) -> Table:
        """The trials as a table for a terminal; the best one is marked."""
        trials, search = list(self.trials.values()), self._search
        best = best_trial(trials, search.mode)
        head, *rows = trial_table(search, trials)
        table = Table(*head, title=f"{search.name}: {search.metric} of held-out identities, {self.seconds:.0f} s")
        for trial, row in zip(trials, rows, strict=True):
            table.add_row(*row, style="bold green" if trial is best else None)
        return table
