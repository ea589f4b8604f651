"""One trial as Ray Tune sees it: steps from evaluation to evaluation, and checkpoints that start any trial again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from keyreid.config import Config
from keyreid.errors import KeyreidError
from keyreid.tuning.ranks import RankGroup
from keyreid.tuning.search import Search, metric_key, trial_config

SCORE, EPOCH = "score", "epoch"
ORIGIN = "trial.json"


@dataclass(frozen=True)
class TrialSetting:
    """What all trials of a search share.

    Attributes:
        base: the configuration that a point changes.
        gpus: of each rank.
        folder: holds the trials' run folders; every node sees it.
        directory: where relative paths of the configuration begin.
        tracking_uri: MLflow's store.
        parent: MLflow's run of the search; None while its server could not be reached.
    """

    search: Search
    base: Config
    gpus: float
    folder: Path
    directory: Path
    tracking_uri: str
    parent: str | None


class KeyreidTrial(tune.Trainable):
    """Trains one point. A checkpoint holds the newest keyreid checkpoint of the run and whose it is.

    Ray Tune asks for a step, which is the training up to the next evaluation; the ranks then wait until it asks for
    another one or ends the trial, so what is stopped, paused or copied is always what was reported.
    """

    setting: TrialSetting  # set on a subclass for each search: see driver.py

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing runs before the first step: Ray Tune may load a checkpoint first."""
        self._point, self._takes = config["point"], config.get("donor")  # the path of another trial's checkpoint
        shared = self.setting
        self._config = trial_config(shared.base, self._point, self.trial_name, shared.folder, shared.tracking_uri)
        self._ranks: RankGroup | None = None
        self._checkpoint: Path | None = None
        self._epoch = 0
        self._donor: str | None = None
        shutil.rmtree(self._config.run_dir / "checkpoints", ignore_errors=True)  # of a start that is not resumed

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation."""
        try:
            self._ranks = self._ranks or self._start()
            report = self._ranks.next_report()
        except KeyreidError as error:
            return self._failed(str(getattr(error, "cause", error)))  # without Ray's traceback
        if report is None:  # the checkpoint was the last one
            return {tune.result.RESULT_DUPLICATE: True}
        self._checkpoint, self._epoch, numbers = Path(report["checkpoint"]), report["epoch"], report["numbers"]
        metric = metric_key(self.setting.search, self.setting.base)
        if metric not in numbers:
            return self._failed(f"no {metric} among the trial's numbers: {', '.join(sorted(numbers))}")
        return {
            EPOCH: self._epoch,
            SCORE: numbers[metric],
            "numbers": numbers,
            "done": self._epoch >= self._config.schedule.epochs,
            "point": self._point,
            "donor": self._donor,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Put the files of the newest checkpoint there; Ray Tune copies what the links name."""
        if self._checkpoint is None:
            return
        folder = Path(checkpoint_dir, self._checkpoint.name)
        folder.mkdir()
        for file in self._checkpoint.iterdir():
            (folder / file.name).symlink_to(file)
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
        """End the ranks; the run's tracking is closed in order."""
        if self._ranks is not None:
            self._ranks.end(self._epoch >= self._config.schedule.epochs)

    def _start(self) -> RankGroup:
        shared = self.setting
        ranks, cpus = shared.search.resources.ranks, shared.search.resources.cpus
        tags = {"keyreid.search": shared.search.name, "keyreid.trial": self.trial_name}
        tags |= {"mlflow.parentRunId": shared.parent} if shared.parent else {}
        return RankGroup(self._config, ranks, cpus, shared.gpus, shared.directory, tags)

    def _failed(self, fault: str) -> dict[str, Any]:
        """A last report for what would fail again and is not retried; schedulers and samplers leave such scores out."""
        return {EPOCH: self._epoch, SCORE: float("nan"), "fault": fault, "done": True}


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes, or a copy where file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
