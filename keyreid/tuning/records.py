"""What is known about each trial: where it stands and what it reported. Plain data, kept with the search's state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from keyreid.tuning.space import Point

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Report:
    """One evaluation of a trial.

    Attributes:
        score: the search's metric; NaN where the training broke off.
        numbers: all metrics of the held-out identities, and the training numbers before them.
        point: the values then; population based training changes them.
        donor: the trial whose checkpoint this part of the training began with, if it was another one's.
        seconds: of the search so far, over all its starts.
    """

    epoch: int
    score: float
    numbers: Mapping[str, float]
    point: Point
    donor: str | None
    seconds: float


@dataclass
class TrialRecord:
    """One trial.

    Attributes:
        reports: by epoch; a repeated epoch (after a failure, or from another trial's checkpoint) counts as it was last.
        failures: times that a process of it died.
        fault: why it failed, where it did.
    """

    name: str
    point: Point
    status: Status = "waiting"
    reports: dict[int, Report] = field(default_factory=dict)
    failures: int = 0
    fault: str | None = None

    @property
    def last(self) -> Report | None:
        """The report of the latest epoch."""
        return self.reports[max(self.reports)] if self.reports else None

    @property
    def epoch(self) -> int:
        """Epochs reported."""
        return max(self.reports, default=0)

    @property
    def score(self) -> float:
        """The last score; NaN before the first, or where the training broke off."""
        return self.last.score if self.last and not self.fault else math.nan


def best_trial(trials: Iterable[TrialRecord], mode: Literal["max", "min"]) -> TrialRecord | None:
    """The trial with the best last score: among those that trained to the end, or among all where none did."""
    scored = [trial for trial in trials if not math.isnan(trial.score)]
    whole = [trial for trial in scored if trial.status == "finished"]
    sign = 1 if mode == "max" else -1
    return max(whole or scored, key=lambda trial: sign * trial.score, default=None)


def describe(point: Mapping[str, Any]) -> str:
    """`loss.alpha=0.6 optimizer.lr=0.001`."""
    return " ".join(f"{key}={_short(value)}" for key, value in point.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + " ".join(f"{key}={_short(inner)}" for key, inner in value.items()) + "}"
    return str(value)
