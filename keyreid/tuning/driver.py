"""Runs a search: Ray, MLflow's run of the whole, the trials, and the log book that Ray Tune calls back."""

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before Ray is imported: the state is saved within a second of what happens, and what Ray Tune would print, write for
# other tools or take from Ctrl-C is ours.
os.environ.update(
    RAY_CHDIR_TO_TRIAL_DIR="0",
    RAY_AIR_NEW_OUTPUT="0",
    TUNE_GLOBAL_CHECKPOINT_S="1",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_PRINT_ALL_TRIAL_ERRORS="0",
    TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
)

import ray
import yaml
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.tune_config import ResumeConfig
from ray.tune.utils import flatten_dict
from rich.live import Live
from rich.table import Table

from keyreid.config import Config
from keyreid.distributed import ray_cluster
from keyreid.distributed.preemption import StopRequest
from keyreid.errors import ConfigError, KeyreidError
from keyreid.files import replace_text
from keyreid.plain_text import cell
from keyreid.tracking import TRACKING, Tracker, store_uri
from keyreid.tuning import algorithms, study
from keyreid.tuning.rank import EPOCH
from keyreid.tuning.search import Search
from keyreid.tuning.study import TrialRecord, best_trial, describe, trial_table
from keyreid.tuning.trial import SCORE, KeyreidTrial, TrialSetting

SEARCH, TRIALS, STATE = "search.yaml", "trials", "ray"
FORMAT = 2  # of a search's folder; 1 drew other points from the same seed
KEPT_CHECKPOINTS = 3  # of a trial, so that the state that was saved last names one that is there
KEPT_CHECKPOINTS_PBT = 8  # a good trial may train on for a while before a bad one takes over what it had
PARENT_SECONDS = 60.0
SAVING_SECONDS = 30.0  # that a search which is to end waits for the checkpoints of what was reported
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


@dataclass(eq=False)
class LogBook(tune.Callback):
    """Records of all trials, shown while they run; from them a restored Ray Tune gets back what it forgets."""

    search: Search
    epochs: int  # of a whole trial
    scheduler: TrialScheduler  # told of all earlier reports when a search resumes, for Ray Tune does not save it
    tracker: Tracker  # of the search
    resumes: bool = False  # whether there is a state to resume from
    stop: StopRequest = field(default_factory=StopRequest)  # asked after every step
    trials: dict[str, TrialRecord] = field(default_factory=dict)  # by Ray Tune's id, oldest first
    start: float = field(default_factory=time.monotonic)  # as if the search had run without a break
    restored: bool = False
    out_of_time: bool = False  # the search ended because its seconds were used up
    ends_by: float | None = None

    @property
    def seconds(self) -> float:
        """Of the search so far, over all its starts."""
        return time.monotonic() - self.start

    def get_state(self) -> dict[str, Any]:
        """What Ray Tune saves with the state of the trials."""
        return {"trials": self.trials, "seconds": self.seconds}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resume from there."""
        self.trials, self.restored = state["trials"], True
        self.start = time.monotonic() - state["seconds"]
        self.end()

    def end(self) -> list[TrialRecord]:
        """All records; what ran when the search ended waits for the next start."""
        for trial in self.trials.values():
            trial.status = "waiting" if trial.status == "running" else trial.status
        return list(self.trials.values())

    def on_step_begin(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Give the scheduler its memory back, and meet new trials."""
        if self.resumes and not self.restored:  # Ray Tune would begin from the first trial again
            raise KeyreidError(f"the state of search {self.search.name} cannot be read; give a new one another name")
        if self.resumes and self.search.algorithm != "pbt":  # which looks at the next reports only
            # The median rule would take a trial that it stops now for one that it had stopped.
            how = "on_trial_complete" if self.search.scheduler == "median" else "on_trial_result"
            for trial in (each for each in trials if each.trial_id in self.trials):
                for epoch, report in sorted(self.trials[trial.trial_id].reports.items()):
                    getattr(self.scheduler, how)(None, trial, {EPOCH: epoch, SCORE: report[SCORE]})
        self.resumes = False
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
        record, metric = self.trials[trial.trial_id], self.search.metric
        if "fault" in result:
            record.fault = result["fault"]
            return
        kept = {key: result[key] for key in (SCORE, "numbers", "point", "donor")}
        record.reports[result[EPOCH]] = kept | {"seconds": round(self.seconds, 1)}
        donor = f", from {result['donor']}'s weights" if result["donor"] else ""
        print(f"{record.name} epoch {result[EPOCH]}/{self.epochs}: {metric} {result[SCORE]:.4f}{donor}", flush=True)
        if best := best_trial(self.trials.values(), self.search.mode):
            reports = sum(len(each.reports) for each in self.trials.values())
            self.tracker.metrics({f"best/{metric}": best.score}, reports)

    def on_trial_complete(self, trial: Trial, **_: Any) -> None:
        """Say how a trial ended."""
        record = self.trials[trial.trial_id]
        whole = record.epoch >= self.epochs
        record.status = "failed" if record.fault else "finished" if whole else "stopped"
        why = f": {record.fault}" if record.fault else ""
        print(f"{record.name} {record.status} after epoch {record.epoch}{why}", flush=True)

    def on_trial_recover(self, trial: Trial, **_: Any) -> None:
        """Say that a trial is tried again."""
        self._died(trial, "waiting", f"retry {self.trials[trial.trial_id].failures + 1} of {self.search.retries}")

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
        limit = self.search.budget.seconds
        if limit is not None and self.seconds >= limit and not self.out_of_time:
            self.out_of_time = True
            print(f"the search's {limit:.0f} seconds are used up", flush=True)
        if self.out_of_time or self.stop.signal:
            # Not between a report and its checkpoint, or a resumed search would report it again.
            self.ends_by = self.ends_by or time.monotonic() + SAVING_SECONDS
            if time.monotonic() >= self.ends_by or not any(trial.is_saving for trial in trials):
                signal.raise_signal(signal.SIGUSR1)  # Ray Tune's own way to end in order, its state saved

    def table(self) -> Table:
        """The trials as a table for a terminal; the best one is marked."""
        trials, search = list(self.trials.values()), self.search
        best = best_trial(trials, search.mode)
        head, *rows = trial_table(search, trials)
        title = cell(f"{search.name}: {search.metric} of held-out identities, {self.seconds:.0f} s")
        table = Table(*map(cell, head), title=title)
        for trial, row in zip(trials, rows, strict=True):
            table.add_row(*map(cell, row), style="bold green" if trial is best else None)
        return table


def run_search(
    search: Search, base: Config, resume: bool, address: str | None
) -> tuple[Path, TrialRecord | None, bool, bool]:
    """Run a search to its end, to the end of its time, or to a stop signal.

    Args:
        base: of `load_search`.
        resume: continue what is in the search's folder, if something is.
        address: of a Ray cluster; without it Ray starts on this machine and ends with the search.

    Returns:
        The search's folder, with what `study.write` wrote; the best trial, None where none has a score; whether a stop
        signal interrupted the search, which `--resume` continues; and whether its time is used up.

    Raises:
        ConfigError: the folder holds another search, a point is no configuration, or a trial needs more than there is.
    """
    output = Path(base.output).expanduser()
    folder = output.absolute() / search.name
    drawn = algorithms.points(search, base)
    resumes = _prepare_folder(folder, search, base, resume)
    ray_cluster.start(address)
    try:
        gpus, concurrency = _room(search)
        tracker = Tracker(base.tracking, output, folder, search.name, {"keyreid.search": search.name})
        deadline = time.monotonic() + PARENT_SECONDS
        # Trials without this parent are tagged only; one that is lost is made anew before anything is sent.
        while not (tracker.run_id and tracker.all_sent) and time.monotonic() < deadline:
            time.sleep(0.1)
        uri = store_uri(base.tracking, output)
        setting = TrialSetting(search, base, gpus, folder / TRIALS, Path.cwd(), uri, tracker.run_id)
        epochs = base.schedule.epochs
        shared = {"epochs": epochs, "holdout": base.data.holdout, "shards": base.data.shards}
        tracker.params(flatten_dict(search.model_dump(mode="json", exclude_none=True), ".") | shared)
        tracker.artifact(folder / SEARCH)
        with StopRequest() as stop:
            log_book = LogBook(search, epochs, algorithms.scheduler(search, epochs), tracker, resumes, stop)
            with Live(get_renderable=log_book.table) if sys.stdout.isatty() else contextlib.nullcontext():
                _run_trials(setting, drawn, concurrency, log_book)
            interrupted, trials = stop.signal is not None, log_book.end()
            _close_trials(trials, setting, interrupted or log_book.out_of_time)
            best = study.write(search, base, trials, folder, tracker)
            tracker.close("KILLED" if interrupted else "FINISHED")
        return folder, best, interrupted, log_book.out_of_time
    finally:
        ray.shutdown()


def _prepare_folder(folder: Path, search: Search, base: Config, resume: bool) -> bool:
    """Whether a search is there to resume."""
    started = any((folder / STATE).glob("experiment_state-*.json"))
    values = {"format": FORMAT, "search": search.model_dump(mode="json"), "base": base.model_dump(mode="json")}
    now = flatten_dict(values, ".")
    earlier = flatten_dict(yaml.safe_load((folder / SEARCH).read_text()), ".") if started else now
    different = {key for key in earlier | now if earlier.get(key) != now.get(key)} - {"search.budget.seconds"}
    as_it_was = f"with another {', '.join(sorted(different))}: resume it as it was (only budget.seconds may change)"
    for wrong, why in (
        (started and not resume, "already: resume it by --resume"),
        ("format" in different, "of another version of keyreid: resume it with that one"),
        (different, as_it_was),
    ):
        if wrong:
            raise ConfigError(f"{folder} holds a search {why}, or give this one another name")
    (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    replace_text(folder / SEARCH, yaml.safe_dump(values, sort_keys=False))
    return started


def _room(search: Search) -> tuple[float, int]:
    """GPUs of each rank, and trials at a time: as many as wanted, or as there is room for."""
    wanted, there = search.resources, {"CPU": 0.0, "GPU": 0.0} | ray.cluster_resources()
    gpus = float(there["GPU"] > 0) if wanted.gpus is None else wanted.gpus
    needs = {"CPU": wanted.ranks * wanted.cpus, "GPU": wanted.ranks * gpus}
    for name, count in needs.items():
        if count > there[name]:
            what = f"{count:g} {name}s, there are {there[name]:g}: change resources"
            raise ConfigError(f"a trial of {wanted.ranks} ranks needs {what}")
    return gpus, search.concurrency or int(min(there[name] // count for name, count in needs.items() if count))


def _run_trials(setting: TrialSetting, drawn: list | None, concurrency: int, log_book: LogBook) -> None:
    search, pbt = setting.search, setting.search.algorithm == "pbt"
    kept = KEPT_CHECKPOINTS_PBT if pbt else KEPT_CHECKPOINTS
    rank = {"CPU": search.resources.cpus} | ({"GPU": setting.gpus} if setting.gpus else {})

    def new_name(_: Any) -> str:
        name = f"trial-{len(list(setting.folder.iterdir())):03}"
        (setting.folder / name).mkdir()
        return name

    tune.run(
        type(KeyreidTrial.__name__, (KeyreidTrial,), {"setting": setting}),
        name=STATE,
        storage_path=str(setting.folder.parent),
        config={} if drawn is None else {"point": tune.grid_search(drawn)},
        num_samples=search.trials if drawn is None else 1,
        search_alg=algorithms.searcher(search),
        scheduler=log_book.scheduler,
        # The trial itself only waits for its ranks: the first bundle is empty.
        resources_per_trial=tune.PlacementGroupFactory([{}, *[rank] * search.resources.ranks], strategy="PACK"),
        max_concurrent_trials=None if pbt else concurrency,
        checkpoint_config=tune.CheckpointConfig(num_to_keep=kept, checkpoint_frequency=1),
        max_failures=search.retries,
        trial_name_creator=new_name,
        trial_dirname_creator=str,
        callbacks=[log_book],
        resume=log_book.resumes,
        resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if log_book.resumes else None,
        raise_on_failed_trial=False,
        reuse_actors=False,
        verbose=0,
    )


def _close_trials(trials: list[TrialRecord], setting: TrialSetting, cut_short: bool) -> None:
    """Say in each trial's MLflow run how it ended, after its processes; what they could not send is sent now."""
    config = setting.base.tracking.model_copy(update={"uri": setting.tracking_uri, "system_metrics": False})
    for trial in trials:
        run_dir = setting.folder / trial.name
        if not (run_dir / TRACKING).is_dir():
            continue
        tracker = Tracker(config, setting.folder, run_dir, trial.name)
        for name in ("status", "failures", "fault"):
            if (value := getattr(trial, name)) is not None:
                tracker.tag(f"keyreid.{name}", str(value)[:4000])
        for epoch, report in sorted(trial.reports.items()):
            values = (report["point"] | {SCORE: report[SCORE]}).items()
            numbers = {f"search/{key}": value for key, value in values if isinstance(value, (int, float))}
            tracker.metrics(numbers, epoch)
        # Where the search was cut short, trials without an end may continue later.
        tracker.close(MLFLOW_STATUS.get(trial.status, "KILLED" if cut_short else "FINISHED"))
