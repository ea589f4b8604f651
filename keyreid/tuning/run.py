"""Runs a search: Ray, MLflow's run of the whole, the trials, and what comes out of them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
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
from ray.tune.tune_config import ResumeConfig

from keyreid.config import Config
from keyreid.distributed import ray_cluster
from keyreid.errors import ConfigError
from keyreid.files import replace_text
from keyreid.tracking import Tracker, store_uri
from keyreid.tuning import algorithms, outcome
from keyreid.tuning.progress import LogBook
from keyreid.tuning.search import Search, metric_key
from keyreid.tuning.trial import KeyreidTrial, Plan

SEARCH, TRIALS, STATE = "search.yaml", "trials", "ray"
KEPT_CHECKPOINTS = 3  # of a trial, so that the state that was saved last names one that is there
KEPT_CHECKPOINTS_PBT = 8  # a good trial may go on for a while before a bad one takes over what it had
PARENT_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """How a search ended.

    Attributes:
        folder: of the search.
        interrupted: by a stop signal; `--resume` goes on.
        outcome: what was written; None where no trial has a score.
    """

    folder: Path
    interrupted: bool
    out_of_time: bool
    outcome: outcome.Outcome | None


def run_search(search: Search, base: Config, resume: bool = False, address: str | None = None) -> Result:
    """Run a search to its end, to the end of its time, or to a stop signal.

    Args:
        base: of `load_search`.
        resume: go on with what is in the search's folder, if something is.
        address: of a Ray cluster; without it Ray starts on this machine and ends with the search.

    Raises:
        ConfigError: the folder holds another search, a point is no configuration, or a trial needs more than there is.
    """
    folder = Path(base.output).expanduser().absolute() / search.name
    drawn = algorithms.points(search, base)
    goes_on = _prepare_folder(folder, search, base, resume)
    ray_cluster.start(address)
    try:
        gpus = _gpus_of_a_rank(search)
        tracker = Tracker(
            base.tracking, Path(base.output).expanduser(), folder, search.name, {"keyreid.search": search.name}
        )
        plan = Plan(
            search=search.name,
            base=base,
            metric=metric_key(search, base),
            ranks=search.resources.ranks,
            cpus=search.resources.cpus,
            gpus=gpus,
            folder=folder / TRIALS,
            directory=Path.cwd(),
            tracking_uri=store_uri(base.tracking, Path(base.output).expanduser()),
            parent=_parent_run(tracker),
        )
        tracker.params(_summary(search, base))
        tracker.artifact(folder / SEARCH)
        scheduler = algorithms.scheduler(search, base.schedule.epochs)
        with (
            _StopSignals() as stop,
            LogBook(search, base.schedule.epochs, scheduler, tracker, goes_on, stop.requested) as log_book,
        ):
            _run_trials(search, plan, drawn, scheduler, log_book, goes_on)
        trials = list(log_book.trials.values())
        interrupted = stop.requested()
        outcome.close_trials(trials, plan, interrupted or log_book.out_of_time)
        written = outcome.write(search, base, trials, folder, plan.folder, tracker)
        tracker.close("KILLED" if interrupted else "FINISHED")
        return Result(folder, interrupted, log_book.out_of_time, written)
    finally:
        ray.shutdown()


def _prepare_folder(folder: Path, search: Search, base: Config, resume: bool) -> bool:
    """Whether a search is there to go on with."""
    started = any((folder / STATE).glob("experiment_state-*.json"))
    if started and not resume:
        raise ConfigError(f"{folder} holds a search already: go on with it by --resume, or give this one another name")
    values = {"search": search.model_dump(mode="json"), "base": base.model_dump(mode="json")}
    if started:
        earlier = yaml.safe_load((folder / SEARCH).read_text())
        different = sorted(set(_differences(earlier, values)) - {"search.budget.seconds"})
        if different:
            raise ConfigError(
                f"{folder} holds a search with another {', '.join(different)}: go on with it as it was "
                "(only budget.seconds may change), or give this one another name"
            )
    (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    replace_text(folder / SEARCH, yaml.safe_dump(values, sort_keys=False))
    return started


def _gpus_of_a_rank(search: Search) -> float:
    wanted, there = search.resources, ray.cluster_resources()
    gpus = wanted.gpus if wanted.gpus is not None else float(there.get("GPU", 0) > 0)
    for name, count in (("CPU", wanted.cpus), ("GPU", gpus)):
        if wanted.ranks * count > there.get(name, 0):
            raise ConfigError(
                f"a trial of {wanted.ranks} ranks needs {wanted.ranks * count:g} {name}s, "
                f"there are {there.get(name, 0):g}: change resources"
            )
    return gpus


def _parent_run(tracker: Tracker) -> str | None:
    """The search's MLflow run, as soon as there is one; trials of a server that does not answer are tagged only."""
    deadline = time.monotonic() + PARENT_SECONDS
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return tracker.run_id


def _run_trials(search: Search, plan: Plan, drawn: list | None, scheduler, log_book: LogBook, goes_on: bool) -> None:
    trial_class = type(KeyreidTrial.__name__, (KeyreidTrial,), {"plan": plan})
    rank = {"CPU": plan.cpus} | ({"GPU": plan.gpus} if plan.gpus else {})
    names = _TrialNames(plan.folder)
    pbt = search.algorithm == "pbt"
    tune.run(
        trial_class,
        name=STATE,
        storage_path=str(plan.folder.parent),
        config=algorithms.parameters(drawn),
        num_samples=search.trials if drawn is None else 1,
        search_alg=algorithms.searcher(search),
        scheduler=scheduler,
        # The trial itself only waits for its ranks: the first bundle is empty.
        resources_per_trial=tune.PlacementGroupFactory([{}, *[rank] * plan.ranks], strategy="PACK"),
        max_concurrent_trials=None if pbt else _concurrency(search, plan),
        checkpoint_config=tune.CheckpointConfig(
            num_to_keep=KEPT_CHECKPOINTS_PBT if pbt else KEPT_CHECKPOINTS,
            checkpoint_frequency=1,
            checkpoint_at_end=False,
        ),
        max_failures=search.retries,
        trial_name_creator=names,
        trial_dirname_creator=str,
        callbacks=[log_book],
        resume=goes_on,
        resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if goes_on else None,
        raise_on_failed_trial=False,
        reuse_actors=False,
        verbose=0,
    )


def _concurrency(search: Search, plan: Plan) -> int:
    """As wanted, or as many trials as there is room for."""
    if search.concurrency is not None:
        return search.concurrency
    there = ray.cluster_resources()
    rooms = [there[name] // (plan.ranks * count) for name, count in (("CPU", plan.cpus), ("GPU", plan.gpus)) if count]
    return int(min(rooms))


class _TrialNames:
    """`trial-000`, `trial-001` ...: the first name whose folder is not there yet; so none is given twice."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, _trial: Trial) -> str:
        number = 0
        while True:
            try:
                (self._folder / f"trial-{number:03}").mkdir()
                return f"trial-{number:03}"
            except FileExistsError:
                number += 1


class _StopSignals:
    """The first signal ends the search in order, its state saved; the second at once."""

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether one came."""
        return self._requested

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True


def _summary(search: Search, base: Config) -> dict[str, object]:
    values = search.model_dump(mode="json", exclude={"space", "settings", "asha", "median", "pbt"}, exclude_none=True)
    space = {f"space.{key}": parameter.model_dump(exclude_defaults=True) for key, parameter in search.space.items()}
    return {**values, **space, "epochs": base.schedule.epochs, "holdout": base.data.holdout, "shards": base.data.shards}


def _differences(one: Any, other: Any, place: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            each for key in keys for each in _differences(one.get(key), other.get(key), f"{place}.{key}".lstrip("."))
        ]
    return [] if one == other else [place]
