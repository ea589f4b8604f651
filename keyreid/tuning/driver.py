"""Runs a search: Ray, MLflow's run of the whole, the trials, and what comes out of them."""

import contextlib
import math
import os
import sys
import time
from dataclasses import dataclass
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
from ray.tune.tune_config import ResumeConfig
from ray.tune.utils import flatten_dict
from rich.live import Live

from keyreid.config import Config
from keyreid.distributed import ray_cluster
from keyreid.distributed.preemption import StopRequest
from keyreid.errors import ConfigError
from keyreid.files import replace_text
from keyreid.tracking import Tracker, store_uri
from keyreid.tuning import algorithms, outcome
from keyreid.tuning.log_book import LogBook
from keyreid.tuning.search import Search
from keyreid.tuning.study import TrialRecord
from keyreid.tuning.trial import KeyreidTrial, TrialSetting

SEARCH, TRIALS, STATE = "search.yaml", "trials", "ray"
FORMAT = 2  # of a search's folder; 1 drew other points from the same seed
KEPT_CHECKPOINTS = 3  # of a trial, so that the state that was saved last names one that is there
KEPT_CHECKPOINTS_PBT = 8  # a good trial may train on for a while before a bad one takes over what it had
PARENT_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """How a search ended.

    Attributes:
        folder: of the search, with what `outcome.write` wrote.
        best: None where no trial has a score.
        interrupted: by a stop signal; `--resume` continues.
    """

    folder: Path
    best: TrialRecord | None
    interrupted: bool
    out_of_time: bool


def run_search(search: Search, base: Config, resume: bool = False, address: str | None = None) -> Result:
    """Run a search to its end, to the end of its time, or to a stop signal.

    Args:
        base: of `load_search`.
        resume: continue what is in the search's folder, if something is.
        address: of a Ray cluster; without it Ray starts on this machine and ends with the search.

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
        uri, parent = store_uri(base.tracking, output), _parent_run(tracker)
        setting = TrialSetting(search, base, gpus, folder / TRIALS, Path.cwd(), uri, parent)
        shared = {"epochs": base.schedule.epochs, "holdout": base.data.holdout, "shards": base.data.shards}
        tracker.params(flatten_dict(search.model_dump(mode="json", exclude_none=True), ".") | shared)
        tracker.artifact(folder / SEARCH)
        scheduler = algorithms.scheduler(search, base.schedule.epochs)
        with StopRequest() as stop:
            log_book = LogBook(search, base.schedule.epochs, scheduler, tracker, resumes, stop)
            with Live(get_renderable=log_book.table) if sys.stdout.isatty() else contextlib.nullcontext():
                _run_trials(setting, drawn, concurrency, scheduler, log_book, resumes)
            interrupted = stop.signal is not None
            trials = log_book.end()
            outcome.close_trials(trials, setting, interrupted or log_book.out_of_time)
            best = outcome.write(search, base, trials, folder, tracker)
            tracker.close("KILLED" if interrupted else "FINISHED")
        return Result(folder, best, interrupted, log_book.out_of_time)
    finally:
        ray.shutdown()


def _prepare_folder(folder: Path, search: Search, base: Config, resume: bool) -> bool:
    """Whether a search is there to resume."""
    started = any((folder / STATE).glob("experiment_state-*.json"))
    if started and not resume:
        raise ConfigError(f"{folder} holds a search already: resume it by --resume, or give this one another name")
    values = {"format": FORMAT, "search": search.model_dump(mode="json"), "base": base.model_dump(mode="json")}
    if started:
        earlier, now = flatten_dict(yaml.safe_load((folder / SEARCH).read_text()), "."), flatten_dict(values, ".")
        if earlier.get("format") != FORMAT:
            raise ConfigError(
                f"{folder} holds a search of another version of keyreid: resume it with that one, "
                "or give this one another name"
            )
        different = {key for key in earlier | now if earlier.get(key) != now.get(key)} - {"search.budget.seconds"}
        if different:
            raise ConfigError(
                f"{folder} holds a search with another {', '.join(sorted(different))}: resume it as it was "
                "(only budget.seconds may change), or give this one another name"
            )
    (folder / TRIALS).mkdir(parents=True, exist_ok=True)
    replace_text(folder / SEARCH, yaml.safe_dump(values, sort_keys=False))
    return started


def _room(search: Search) -> tuple[float, int]:
    """GPUs of each rank, and trials at a time: as many as wanted, or as there is room for."""
    wanted, there = search.resources, ray.cluster_resources()
    gpus = wanted.gpus if wanted.gpus is not None else float(there.get("GPU", 0) > 0)
    rooms = []
    for name, count in (("CPU", wanted.ranks * wanted.cpus), ("GPU", wanted.ranks * gpus)):
        if count > there.get(name, 0):
            raise ConfigError(
                f"a trial of {wanted.ranks} ranks needs {count:g} {name}s, "
                f"there are {there.get(name, 0):g}: change resources"
            )
        rooms.append(there[name] // count if count else math.inf)
    return gpus, search.concurrency or int(min(rooms))


def _parent_run(tracker: Tracker) -> str | None:
    """The search's MLflow run, as soon as there is one; trials of a server that does not answer are tagged only."""
    deadline = time.monotonic() + PARENT_SECONDS
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return tracker.run_id


def _run_trials(
    setting: TrialSetting, drawn: list | None, concurrency: int, scheduler: Any, log_book: LogBook, resumes: bool
) -> None:
    search = setting.search
    rank = {"CPU": search.resources.cpus} | ({"GPU": setting.gpus} if setting.gpus else {})
    pbt = search.algorithm == "pbt"

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
        scheduler=scheduler,
        # The trial itself only waits for its ranks: the first bundle is empty.
        resources_per_trial=tune.PlacementGroupFactory([{}, *[rank] * search.resources.ranks], strategy="PACK"),
        max_concurrent_trials=None if pbt else concurrency,
        checkpoint_config=tune.CheckpointConfig(
            num_to_keep=KEPT_CHECKPOINTS_PBT if pbt else KEPT_CHECKPOINTS, checkpoint_frequency=1
        ),
        max_failures=search.retries,
        trial_name_creator=new_name,
        trial_dirname_creator=str,
        callbacks=[log_book],
        resume=resumes,
        resume_config=ResumeConfig(errored=ResumeConfig.ResumeType.RESUME) if resumes else None,
        raise_on_failed_trial=False,
        reuse_actors=False,
        verbose=0,
    )
