"""A trial's rank: a Ray actor that trains. In a module of its own, so that its process does not import Ray Tune."""

import queue
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keyreid.config import Config
from keyreid.distributed.ray_cluster import RayProcess

EPOCH = "epoch"


class Rank(RayProcess):
    """One process of a trial. An actor with threads: `train` runs in one while another takes reports and answers."""

    def __init__(self, *process: Any) -> None:
        super().__init__(*process)
        self._reports, self._answers = queue.SimpleQueue(), queue.SimpleQueue()

    def train(
        self, config: Config, tags: Mapping[str, str], meeting_point: tuple[str, int], change: Sequence[str] = ()
    ) -> None:
        """Run the trial's training until its end, or until an answer ends it (errors: keyreid.training.run.train)."""
        self._meet_at(meeting_point)
        from keyreid.distributed.preemption import StopRequest
        from keyreid.evaluation.judging import VECTORS
        from keyreid.training.run import train

        def report(epoch: int, numbers: Mapping[str, float], checkpoint: Path) -> bool:
            # Hundreds of megabytes that no search looks at
            (config.run_dir / "evaluation" / VECTORS).unlink(missing_ok=True)
            self._reports.put({EPOCH: epoch, "numbers": dict(numbers), "checkpoint": str(checkpoint.absolute())})
            return self._answers.get()

        try:
            # Not in the main thread, where alone signals are heard; the search ends trials by its answers.
            train(config, tags=tags, stop=StopRequest(), on_evaluation=report, change=change)
        finally:
            self._reports.put(None)

    def next_report(self) -> dict[str, Any] | None:
        """The next evaluation's epoch, numbers and checkpoint, once there is one; None when the run has ended."""
        return self._reports.get()

    def answer(self, continues: bool) -> None:
        """Let the run continue after a report, or end."""
        self._answers.put(continues)
