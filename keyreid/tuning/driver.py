"""Runs a search: Ray, MLflow's run of the whole, the trials, and what comes out of them."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

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
from keyreid.tracking import TRACKING, Tracker, store_uri
from keyreid.tuning import algorithms, study
from keyreid.tuning.log_book import LogBook
from keyreid.tuning.search import Search
from keyreid.tuning.study import TrialRecord
from keyreid.tuning.trial import KeyreidTrial, TrialSetting

SEARCH, TRIALS, STATE = "search.yaml", "trials", "ray"
FORMAT = 2  # of a search's folder; 1 drew other points from the same seed
KEPT_CHECKPOINTS = 3  # of a trial, so that the state that was saved last names one that is there
KEPT_CHECKPOINTS_PBT = 8  # a good trial may train on for a while before a bad one takes over what it had
PARENT_SECONDS = 60.0
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}


class Result(NamedTuple):
    """How a search ended."""

    folder: Path  # of the search, with what `study.write` wrote
    best: TrialRecord | None  # none where no trial has a score
    interrupted: bool  # by a stop signal; `--resume` continues
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
        deadline = time.monotonic() + PARENT_SECONDS
        while tracker.run_id is None and time.monotonic() < deadline:  # trials without this parent are tagged only
            time.sleep(0.1)
        uri = store_uri(base.tracking, output)
        setting = TrialSetting(search, base, gpus, folder / TRIALS, Path.cwd(), uri, tracker.run_id)
        shared = {"epochs": base.schedule.epochs, "holdout": base.data.holdout, "shards": base.data.shards}
        tracker.params(flatten_dict(search.model_dump(mode="json", exclude_none=True), ".") | shared)
        tracker.artifact(folder / SEARCH)
        scheduler = algorithms.scheduler(search, base.schedule.epochs)
        with StopRequest() as stop:
            log_book = LogBook(search, base.schedule.epochs, scheduler, tracker, resumes, stop)
            with Live(get_renderable=log_book.table) if sys.stdout.isatty() else contextlib.nullcontext():
                _run_trials(setting, drawn, concurrency, scheduler, log_book, resumes)
            interrupted, trials = stop.signal is not None, log_book.end()
            _close_trials(trials, setting, interrupted or log_book.out_of_time)
            best = study.write(search, base, trials, folder, tracker)
            tracker.close("KILLED" if interrupted else "FINISHED")
        return Result(folder, best, interrupted, log_book.out_of_time)
    finally:
        ray.shutdown()


def _prepare_folder(folder: Path, search: Search, base: Config, resume: bool) -> bool:
    """Whether a search is there to resume."""
    started = any((folder / STATE).glob("experiment_state-*.json"))
    values = {"format": FORMAT, "search": search.model_dump(mode="json"), "base": base.model_dump(mode="json")}
    now = flatten_dict(values, ".")
    earlier = flatten_dict(yaml.safe_load((folder / SEARCH).read_text()), ".") if started else now
    different = {key for key in earlier | now if earlier.get(key) != now.get(key)} - {"search.budget.seconds"}
    refusal = None
    if started and not resume:
        refusal = "already: resume it by --resume"
    elif "format" in different:
        refusal = "of another version of keyreid: resume it with that one"
    elif different:
        names = ", ".join(sorted(different))
        refusal = f"with another {names}: resume it as it was (only budget.seconds may change)"
    if refusal:
        raise ConfigError(f"{folder} holds a search {refusal}, or give this one another name")
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


def _run_trials(
    setting: TrialSetting, drawn: list | None, concurrency: int, scheduler: Any, log_book: LogBook, resumes: bool
) -> None:
    search, pbt = setting.search, setting.search.algorithm == "pbt"
    rank = {"CPU": search.resources.cpus} | ({"GPU": setting.gpus} if setting.gpus else {})

    def new_name(_: Any) -> str:
        name = f"trial-{len(list(setting.folder.iterdir())):03}"
        (setting.folder / name).mkdir()
        return name

    kept = KEPT_CHECKPOINTS_PBT if pbt else KEPT_CHECKPOINTS
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
        checkpoint_config=tune.CheckpointConfig(num_to_keep=kept, checkpoint_frequency=1),
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


def _close_trials(trials: list[TrialRecord], setting: TrialSetting, cut_short: bool) -> None:
    """Say in each trial's MLflow run how it ended, after its processes; what they could not send is sent now.

    `cut_short`: trials without an end may continue later.
    """
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
            numbers = report["point"] | {"score": report["score"]}
            numbers = {f"search/{key}": value for key, value in numbers.items() if isinstance(value, (int, float))}
            tracker.metrics(numbers, epoch)
        tracker.close(MLFLOW_STATUS.get(trial.status, "KILLED" if cut_short else "FINISHED"))
