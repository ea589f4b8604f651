"""What a search is: its YAML, and the configuration of each of its trials."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from keyreid.config import NAME, Config, Section, check_config, load_config, load_section, with_value
from keyreid.errors import ConfigError
from keyreid.training.recipe import below
from keyreid.tuning import space
from keyreid.tuning.space import Parameter, Point

DEFAULT_HOLDOUT = 0.1
MOST_TRIALS = 10_000
KEPT = ("name", "output", "tracking")  # where a trial is kept: cannot vary
JUDGED = ("evaluation", "schedule.epochs", "data.shards", "data.holdout", "data.split_number")  # how it is judged: too
MUTABLE = ("loss", "optimizer", "data.augment")  # what may change while a network trains
RATES = ("mAP", "mINP", "rank1", "rank5", "rank10", "rank20")


class ResourcesConfig(Section):
    """What one trial takes."""

    ranks: int = Field(1, ge=1, description="processes of a trial, on one or several nodes")
    cpus: int = Field(1, ge=1, description="cores of each rank")
    gpus: float | None = Field(None, ge=0, description="of each rank, shared below 1; default 1 where there are GPUs")


class BudgetConfig(Section):
    """How much the search may take."""

    epochs: int | None = Field(None, ge=1, description="of a trial; default the base configuration's schedule.epochs")
    seconds: float | None = Field(None, gt=0, description="of the search; then running trials are stopped")


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2020)."""

    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before")
    reduction: float = Field(3, gt=1, description="of this many trials one continues at each rung")


class MedianConfig(Section):
    """Stop trials whose best score is worse than the median of the others' running means."""

    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before")
    samples: int = Field(3, ge=1, description="other trials that must have come as far")


class PbtConfig(Section):
    """Population based training (Jaderberg et al. 2017)."""

    interval_epochs: int = Field(2, ge=1, description="epochs between comparisons of all trials")
    quantile: float = Field(0.25, gt=0, le=0.5, description="share of trials replaced by as many of the best")
    resample: float = Field(0.25, ge=0, le=1, description="probability that a value is drawn anew, not just varied")


class Search(Section):
    """All of one search."""

    name: str = Field("search", pattern=NAME, description="names the search and its folder")
    base: str = Field(description="the configuration that trials change; a path relative to this file")
    settings: dict[str, Any] = Field({}, description="changes to it that all trials share, in its own layout")
    space: dict[str, Parameter] = Field(min_length=1, description="parameters by configuration key (`loss.alpha`)")
    algorithm: Literal["random", "grid", "tpe", "pbt"] = Field("random", description="who chooses the points")
    scheduler: Literal["asha", "median", "none"] = Field("none", description="who stops trials early")
    metric: str = Field("mAP", description="a rate of the held-out identities, or train/NAME of the log line")
    mode: Literal["max", "min"] = "max"
    trials: int | None = Field(None, ge=1, description="trials (for each combination of grid values); not for grid")
    concurrency: int | None = Field(None, ge=1, description="trials at a time; default as many as resources allow")
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    holdout: float | None = Field(None, gt=0, lt=1, description="share of the training identities that judge")
    report_epochs: int = Field(1, ge=1, description="epochs between evaluations; each is reported with a checkpoint")
    retries: int = Field(2, ge=0, description="of a trial whose process or node dies")
    seed: int = Field(0, ge=0, description="of the points; the trainings' is in the configuration")
    asha: AshaConfig = AshaConfig()
    median: MedianConfig = MedianConfig()
    pbt: PbtConfig = PbtConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Search":
        space.in_order(self.space)
        grids = [key for key, parameter in self.space.items() if parameter.grid]
        drawn = [key for key in self.space if key not in grids]
        immutable = ", ".join(key for key in self.space if not below(key, MUTABLE))
        stays = f"which {immutable} cannot: only {', '.join(MUTABLE)} can"
        grid, pbt = self.algorithm == "grid", self.algorithm == "pbt"
        points = math.prod(len(parameter.grid or [0]) for parameter in self.space.values()) * (self.trials or 1)
        for wrong, why in (
            (points > MOST_TRIALS, f"would have {points} trials, and {MOST_TRIALS} are the most"),
            (grid and drawn, f"tries every value: give {', '.join(drawn)} as grid too"),
            (grid and self.trials, "has as many trials as combinations: leave trials out"),
            (not grid and not self.trials, "needs a number of trials"),
            (self.algorithm in ("tpe", "pbt") and grids, f"chooses values itself: give {', '.join(grids)} as choice"),
            (pbt and self.scheduler != "none", "replaces bad trials itself: leave scheduler out"),
            (pbt and self.trials == 1, "compares trials: it needs two at least"),
            (pbt and self.concurrency, "takes turns with all its trials: leave concurrency out, resources limit it"),
            (pbt and immutable, f"changes parameters while a network trains, {stays}"),
        ):
            if wrong:
                raise ValueError(f"algorithm {self.algorithm} {why}")
        for key, parameter in self.space.items():
            inner = [f"{key}.{name}" for value in parameter.values if isinstance(value, dict) for name in value]
            if fixed := [name for name in inner or [key] if below(name, KEPT + JUDGED)]:
                raise ValueError(f"{fixed[0]} cannot be searched: trials could not be compared")
        if self.metric not in RATES and not self.metric.startswith("train/"):
            rates = ", ".join(RATES)
            raise ValueError(f"metric {self.metric!r}: one of {rates}, or train/NAME (train/clips_per_second)")
        return self


def load_search(path: Path, overrides: Sequence[str] = ()) -> tuple[Search, Config]:
    """A search and the configuration that its trials change.

    Raises:
        ConfigError: one of the files is missing or wrong, or the space has a key or a value that no trial can have.
    """
    search = load_section(Search, path, overrides)
    base_path = Path(os.path.expanduser(path)).parent / search.base  # noqa: PTH111
    if not os.path.isfile(base_path):  # noqa: PTH113 (it is False for a name that is too long)
        raise ConfigError(f"{path}: base: {base_path} is no file (a path relative to the search's)")
    base = with_point(load_config(base_path), search.settings, f"{path}: settings")
    shared = {
        "data.holdout": search.holdout or base.data.holdout or DEFAULT_HOLDOUT,
        "schedule.epochs": search.budget.epochs or base.schedule.epochs,
        "evaluation.every_epochs": search.report_epochs,
        "training.checkpoint_every_epochs": search.report_epochs,
    }
    base = with_point(base, shared, f"{path}: settings")
    for key, parameter in search.space.items():  # an unknown key or a value out of bounds shows now, not in a trial
        least, most = parameter.bounds or (0, 0)
        for value in parameter.values or (least, least + (most - least) / math.pi, most):  # no whole one between
            with_point(base, {key: value}, f"{path}: space")
    if base.schedule.epochs < search.report_epochs:
        raise ConfigError(f"{path}: report_epochs={search.report_epochs}: a trial has {base.schedule.epochs} epochs")
    return search, base


def with_point(base: Config, point: Point, source: str) -> Config:
    """The configuration of a point: a value that is a mapping changes the keys below its own."""
    values = base.model_dump(mode="json")
    for key, value in point.items():
        values = with_value(values, key, value)
    return check_config(values, source)


def trial_config(base: Config, point: Point, name: str, folder: Path, tracking_uri: str) -> Config:
    """The configuration of a trial: its run is `folder`/`name`."""
    own = {"name": name, "output": str(folder), "tracking.uri": tracking_uri, "evaluation.pictures": 0}
    # The newest checkpoint, to resume from: those that the search needs are in its own store.
    own |= {"training.keep_checkpoints": 1, "training.keep_every_epochs": None}
    return with_point(base, point | own, name)
