"""One trial as Ray Tune sees it: steps from evaluation to evaluation, and checkpoints that start any trial again."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from keyreid.config import Config
from keyreid.errors import KeyreidError
from keyreid.tuning.ranks import RankGroup
from keyreid.tuning.search import trial_config

SCORE, EPOCH = "score", "epoch"
ORIGIN = "trial.json"


@dataclass(frozen=True)
class Plan:
    """What all trials of a search share.

    Attributes:
        search: its name.
        base: the configuration that a point changes.
        metric: the score among a report's numbers.
        gpus: of each rank.
        folder: holds the trials' run folders; every node sees it.
        directory: where relative paths of the configuration begin.
        tracking_uri: MLflow's store.
        parent: MLflow's run of the search; None while its server could not be reached.
    """

    search: str
    base: Config
    metric: str
    ranks: int
    cpus: int
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

    plan: Plan  # set on a subclass for each search: see run.py

    def setup(self, config: dict[str, Any]) -> None:
        """Nothing runs before the first step: Ray Tune may load a checkpoint first."""
        self._point = config["point"]
        plan = self.plan
        self._config = trial_config(plan.base, self._point, self.trial_name, plan.folder, plan.tracking_uri)
        self._ranks: RankGroup | None = None
        self._checkpoint: Path | None = None
        self._epoch = 0
        self._donor: str | None = None
        shutil.rmtree(self._config.run_dir / "checkpoints", ignore_errors=True)  # of a start that is not gone on from

    def step(self) -> dict[str, Any]:
        """Train up to the next evaluation."""
        try:
            self._ranks = self._ranks or self._start()
            report = self._ranks.next_report()
        except KeyreidError as error:
            return self._failed(str(getattr(error, "cause", error)))  # without Ray's traceback
        if report is None:  # the checkpoint was the last one
            return {tune.result.RESULT_DUPLICATE: True}
        self._checkpoint = Path(report["checkpoint"])
        self._epoch = report["epoch"]
        numbers = report["numbers"]
        if self.plan.metric not in numbers:
            return self._failed(f"no {self.plan.metric} among the trial's numbers: {', '.join(sorted(numbers))}")
        return {
            EPOCH: self._epoch,
            SCORE: numbers[self.plan.metric],
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
        Path(checkpoint_dir, ORIGIN).write_text(json.dumps({"trial": self.trial_name, EPOCH: self._epoch}))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Make a trial's checkpoint, its own or a better one's, the only one of this run, which goes on from it."""
        origin = json.loads(Path(checkpoint_dir, ORIGIN).read_text())
        self._epoch = origin[EPOCH]
        self._donor = origin["trial"] if origin["trial"] != self.trial_name else None
        for folder in Path(checkpoint_dir).glob("step-*"):
            shutil.copytree(folder, self._config.run_dir / "checkpoints" / folder.name, copy_function=_link)

    def cleanup(self) -> None:
        """End the ranks; the run's tracking is closed in order."""
        if self._ranks is not None:
            self._ranks.end(self._epoch >= self._config.schedule.epochs)

    def _start(self) -> RankGroup:
        plan = self.plan
        tags = {"keyreid.search": plan.search, "keyreid.trial": self.trial_name}
        if plan.parent:
            tags["mlflow.parentRunId"] = plan.parent
        return RankGroup(
            self._config.model_dump(mode="json"),
            plan.ranks,
            plan.cpus,
            plan.gpus,
            ray.util.get_current_placement_group(),
            str(plan.directory),
            tags,
        )

    def _failed(self, fault: str) -> dict[str, Any]:
        """A last report for what would fail again and is not retried; schedulers and samplers leave such scores out."""
        return {EPOCH: self._epoch, SCORE: float("nan"), "fault": fault, "done": True}


def _link(source: str, target: str) -> None:
    """A second name for a file that nobody changes, or a copy where file systems differ."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
