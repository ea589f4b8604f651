"""The ranks of a trial: Ray actors that run `keyreid.training.run.train` in the trial's placement group.

Ray places and ends the processes, on one node or several. Ray Train is left out on purpose: its trainers bring a
controller process for each trial and a checkpoint store of their own, and all that a rank needs of it is the six
environment variables set below. Every start has new processes, because DeepSpeed keeps its process groups in module
globals and cannot join another run.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from keyreid.distributed.ray_cluster import RayProcess, start_processes

END_SECONDS = 60.0  # for a run that was told to end: writing its log, sending what MLflow lacks


class Rank(RayProcess):
    """One process of a trial. An actor with threads: `train` runs in one while another takes reports and answers."""

    def __init__(self, rank: int, world_size: int, threads: int, directory: str) -> None:
        super().__init__(rank, world_size, threads, directory)
        self._reports: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def train(self, values: dict[str, Any], tags: Mapping[str, str], meeting_point: tuple[str, int]) -> None:
        """Run the trial's training until its end, or until an answer ends it.

        Raises:
            KeyreidError: see keyreid.training.run.train.
        """
        self._meet_at(meeting_point)
        from keyreid.config import check_config
        from keyreid.distributed.preemption import StopRequest
        from keyreid.training.run import train

        config = check_config(values, values["name"])

        def report(epoch: int, numbers: Mapping[str, float], checkpoint: Path) -> bool:
            # Hundreds of megabytes that no search looks at
            (config.run_dir / "evaluation" / "vectors.parquet").unlink(missing_ok=True)
            self._reports.put({"epoch": epoch, "numbers": dict(numbers), "checkpoint": str(checkpoint.absolute())})
            return self._answers.get()

        try:
            # Not in the main thread, where alone signals are heard; the search ends trials by its answers.
            train(config, tags=tags, stop=StopRequest(), on_evaluation=report)
        finally:
            self._reports.put(None)

    def next_report(self) -> dict[str, Any] | None:
        """The next evaluation's epoch, numbers and checkpoint, once there is one; None when the run has ended."""
        return self._reports.get()

    def answer(self, goes_on: bool) -> None:
        """Let the run go on after a report, or end."""
        self._answers.put(goes_on)


class RankGroup:
    """All ranks of one run, seen from the trial.

    Args:
        values: the run's configuration.
        group: the trial's placement group; its bundles are the ranks'.
        gpus: of each rank.
        directory: where relative paths of the configuration begin.
        tags: of the MLflow run.
    """

    def __init__(
        self,
        values: dict[str, Any],
        ranks: int,
        cpus: int,
        gpus: float,
        group: PlacementGroup,
        directory: str,
        tags: Mapping[str, str],
    ) -> None:
        self._waiting = False
        self._actors, meeting_point = start_processes(
            Rank, ranks, group, cpus, gpus, threads=cpus, calls=3, directory=directory
        )
        self._runs = [actor.train.remote(values, tags, meeting_point) for actor in self._actors]

    def next_report(self) -> dict[str, Any] | None:
        """Let the ranks go on to their next evaluation and give its report, None if they ended without one.

        Raises:
            KeyreidError: the training failed in a way that it would again.
            ray.exceptions.RayError: a rank's process died, or its training failed otherwise.
        """
        first = self._actors[0]
        if self._waiting:
            self._waiting = False
            first.answer.remote(True)
        report, pending = first.next_report.remote(), list(self._runs)
        while True:
            done, _ = ray.wait([*pending, report])  # a failure before the report that will never come
            for finished in done:
                if finished is not report:
                    ray.get(finished)
                    pending.remove(finished)
            if report in done:
                found = ray.get(report)
                if found is None:
                    ray.get(self._runs)
                self._waiting = found is not None
                return found

    def end(self, whole: bool) -> None:
        """End the run in order if it waits for an answer, and then the processes.

        Args:
            whole: its epochs are done.
        """
        if self._waiting:
            self._actors[0].answer.remote(whole)
            ray.wait(self._runs, num_returns=len(self._runs), timeout=END_SECONDS)
        for actor in self._actors:
            ray.kill(actor)
