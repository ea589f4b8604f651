"""One trial as Ray Tune sees it: steps from evaluation to evaluation, and checkpoints that start any trial again.

Ray Train is left out on purpose: its trainers bring a controller process for each trial and a checkpoint store of their
own. Every start has new ranks, because DeepSpeed keeps its process groups in module globals and cannot join another.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune

from keyreid.config import Config
from keyreid.distributed.ray_cluster import start_processes
from keyreid.errors import KeyreidError
from keyreid.tuning.rank import EPOCH, Rank
from keyreid.tuning.search import MUTABLE, Search, trial_config

SCORE = "score"
ORIGIN = "trial.json"
END_SECONDS = 60.0  # for a run that was told to end: writing its log, sending what MLflow lacks


class TrialSetting(NamedTuple):
    """What all trials of a search share."""

    search: Search
    base: Config  # which a point changes
    gpus: float  # of each rank
    folder: Path  # of the trials' run folders; every node sees it
    directory: Path  # where relative paths of the configuration begin
    tracking_uri: str  # MLflow's store
    parent: str | None  # MLflow's run of the search; None while its server could not be reached


class KeyreidTrial(tune.Trainable):
    """Trains one point. A checkpoint holds the newest keyreid checkpoint of the run and whose it is.

    Ray Tune asks for a step, which is the training up to the next evaluation; the ranks then wait until it asks for
    another one or ends the trial, so what is stopped, paused or copied is always what was reported.
    """

    setting: TrialSetting  # set on a subclass for each search: see driver.py

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing runs before the first step: Ray Tune may load a checkpoint first."""
        shared = self.setting
        self._point, self._takes = config["point"], config.get("donor")  # the path of another trial's checkpoint
        self._config = trial_config(shared.base, self._point, self.trial_name, shared.folder, shared.tracking_uri)
        self._actors, self._runs = [], []
        self._waiting = False  # whether the ranks wait for an answer to their last report
        self._epoch, self._checkpoint, self._donor = 0, None, None
        shutil.rmtree(self._config.run_dir / "checkpoints", ignore_errors=True)  # of a start that is not resumed

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation; the report of a failure that would come again is the last one."""
        fault, metric = None, self.setting.search.metric
        try:
            report = self._next_report()
            if report is None:  # the checkpoint was the last one
                return {tune.result.RESULT_DUPLICATE: True}
            self._checkpoint, self._epoch, numbers = Path(report["checkpoint"]), report[EPOCH], report["numbers"]
            key = metric if metric.startswith("train/") else f"{self._config.evaluation.protocol}/{metric}"
            if key not in numbers:
                fault = f"no {key} among the trial's numbers: {', '.join(sorted(numbers))}"
        except KeyreidError as error:
            fault = str(getattr(error, "cause", error))  # without Ray's traceback
        if fault:  # not retried; schedulers and samplers leave such scores out
            return {EPOCH: self._epoch, SCORE: float("nan"), "fault": fault, "done": True}
        about = {"numbers": numbers, "point": self._point, "donor": self._donor}
        return about | {EPOCH: self._epoch, SCORE: numbers[key], "done": self._whole}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Link the newest checkpoint there, which Ray Tune copies."""
        if self._checkpoint:
            shutil.copytree(self._checkpoint, Path(checkpoint_dir, self._checkpoint.name), copy_function=os.symlink)
            origin = {"trial": self.trial_name, EPOCH: self._epoch, "took": self._takes}
            Path(checkpoint_dir, ORIGIN).write_text(json.dumps(origin))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Make a trial's checkpoint, its own or a better one's, the only one of this run, which resumes from it."""
        origin = json.loads(Path(checkpoint_dir, ORIGIN).read_text())
        if origin["took"] != self._takes:  # Ray Tune's is from before the trial was told to take over another's
            checkpoint_dir = self._takes
            origin = json.loads(Path(checkpoint_dir, ORIGIN).read_text())
            self._donor = origin["trial"]
        self._epoch = origin[EPOCH]
        for folder in Path(checkpoint_dir).glob("step-*"):
            shutil.copytree(folder, self._config.run_dir / "checkpoints" / folder.name, copy_function=_link)

    def cleanup(self) -> None:
        """End the ranks: in order, their tracking closed, where they wait."""
        if self._waiting:
            self._actors[0].answer.remote(self._whole)
            ray.wait(self._runs, num_returns=len(self._runs), timeout=END_SECONDS)
        for actor in self._actors:
            ray.kill(actor)

    @property
    def _whole(self) -> bool:
        return self._epoch >= self._config.schedule.epochs

    def _next_report(self) -> dict[str, Any] | None:
        """Let the ranks train to their next evaluation; None if they ended without one.

        Raises:
            KeyreidError: the training failed in a way that it would again.
            ray.exceptions.RayError: a rank's process died, or its training failed otherwise.
        """
        if not self._actors:
            shared, resources = self.setting, self.setting.search.resources
            tags = {"keyreid.search": shared.search.name, "keyreid.trial": self.trial_name}
            tags |= {"mlflow.parentRunId": shared.parent} if shared.parent else {}
            held = ray.util.get_current_placement_group(), resources.cpus, shared.gpus
            process = {"threads": resources.cpus, "calls": 3, "directory": str(shared.directory)}
            self._actors, meeting_point = start_processes(Rank, resources.ranks, *held, **process)
            self._runs = [actor.train.remote(self._config, tags, meeting_point, MUTABLE) for actor in self._actors]
        if self._waiting:
            self._actors[0].answer.remote(True)
        self._waiting = False
        pending, report = list(self._runs), self._actors[0].next_report.remote()
        while (done := ray.wait([*pending, report])[0][0]) != report:  # a failure comes before what never will
            ray.get(done)
            pending.remove(done)
        found = ray.get(report)
        if found is None:
            ray.get(self._runs)
        self._waiting = found is not None
        return found


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes, or a copy where file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
