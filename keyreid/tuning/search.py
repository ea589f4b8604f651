"""What a search is: its YAML, and the configuration of each of its trials."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from keyreid.config import Config, Section, check_config, load_config, load_section
from keyreid.errors import ConfigError
from keyreid.tuning import space
from keyreid.tuning.space import Parameter, Point

DEFAULT_HOLDOUT = 0.1
# What a trial may not vary: where it is kept, what it is judged by, and how long it may train.
FIXED = (
    "name",
    "output",
    "tracking",
    "evaluation",
    "schedule.epochs",
    "data.shards",
    "data.holdout",
    "data.split_number",
)
MUTABLE = ("loss", "optimizer", "data.augment")  # what may change while a network trains
RATES = ("mAP", "mINP", "rank1", "rank5", "rank10", "rank20")


class ResourcesConfig(Section):
    """What one trial takes."""

    ranks: int = Field(1, ge=1, description="processes of a trial, on one or several nodes")
    cpus: int = Field(1, ge=1, description="cores of each rank")
    gpus: float | None = Field(
        None, ge=0, description="of each rank; below 1 trials share a GPU; default 1 where the cluster has GPUs, else 0"
    )


class BudgetConfig(Section):
    """How much the search may take."""

    epochs: int | None = Field(None, ge=1, description="of a trial; default the base configuration's schedule.epochs")
    seconds: float | None = Field(None, gt=0, description="of the search; then running trials are stopped")


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2020)."""

    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before")
    reduction: float = Field(3, gt=1, description="of this many trials one goes on at each rung")


class MedianConfig(Section):
    """Stop trials whose best score is worse than the median of the others' running means."""

    grace_epochs: int = Field(1, ge=1, description="no trial is stopped before")
    samples: int = Field(3, ge=1, description="other trials that must have come as far")


class PbtConfig(Section):
    """Population based training (Jaderberg et al. 2017)."""

    interval_epochs: int = Field(2, ge=1, description="epochs between a trial's comparisons with the others")
    quantile: float = Field(
        0.25, gt=0, le=0.5, description="share of the trials that are replaced by as many of the best"
    )
    resample: float = Field(
        0.25, ge=0, le=1, description="probability that a value is drawn anew, not changed a little"
    )


class Search(Section):
    """All of one search."""

    name: str = Field("search", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the search and its folder")
    base: str = Field(description="the configuration that trials change; a path relative to this file")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="changes to the base configuration that all trials share, in its own layout"
    )
    space: dict[str, Parameter] = Field(min_length=1, description="parameters by configuration key (`loss.alpha`)")
    algorithm: Literal["random", "grid", "tpe", "pbt"] = Field("random", description="who chooses the points")
    scheduler: Literal["asha", "median", "none"] = Field("none", description="who stops trials early")
    metric: str = Field(
        "mAP", description="mAP, mINP, rank1 ... of the held-out identities, or train/NAME of the log line"
    )
    mode: Literal["max", "min"] = "max"
    trials: int | None = Field(None, ge=1, description="trials (for each combination of grid values); not for grid")
    concurrency: int | None = Field(None, ge=1, description="trials at a time; default as many as resources allow")
    resources: ResourcesConfig = ResourcesConfig()
    budget: BudgetConfig = BudgetConfig()
    holdout: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"share of the training identities that judge; default the base's, else {DEFAULT_HOLDOUT}",
    )
    report_epochs: int = Field(1, ge=1, description="epochs between evaluations; each is reported with a checkpoint")
    retries: int = Field(2, ge=0, description="of a trial whose process or node dies")
    seed: int = Field(0, ge=0, description="of the points; the trainings' is in the configuration")
    asha: AshaConfig = AshaConfig()
    median: MedianConfig = MedianConfig()
    pbt: PbtConfig = PbtConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Search:
        space.in_order(self.space)
        grids = [key for key in self.space if self.space[key].grid]
        if self.algorithm == "grid":
            others = [key for key in self.space if not self.space[key].grid]
            if others:
                raise ValueError(f"algorithm grid tries every value: give {', '.join(others)} as grid too")
            if self.trials is not None:
                raise ValueError("algorithm grid has as many trials as combinations: leave trials out")
        elif self.trials is None:
            raise ValueError(f"algorithm {self.algorithm} needs a number of trials")
        if self.algorithm in ("tpe", "pbt") and grids:
            raise ValueError(f"algorithm {self.algorithm} chooses values itself: give {', '.join(grids)} as choice")
        if self.algorithm == "pbt":
            self._check_population()
        set_keys = [key for name, parameter in self.space.items() for key in _keys(name, parameter)]
        for key in set_keys:
            if _below(key, FIXED):
                raise ValueError(f"{key} cannot be searched: trials could not be compared")
        return self

    def _check_population(self) -> None:
        if self.scheduler != "none":
            raise ValueError("algorithm pbt replaces bad trials itself: leave scheduler out")
        if self.trials == 1:
            raise ValueError("algorithm pbt compares trials: it needs two at least")
        if self.concurrency is not None:
            raise ValueError("algorithm pbt takes turns with all its trials: leave concurrency out, resources limit it")
        fixed = [key for key in self.space if not _below(key, MUTABLE)]
        if fixed:
            raise ValueError(
                f"algorithm pbt changes parameters while a network trains, which {', '.join(fixed)} cannot: "
                f"only {', '.join(MUTABLE)} can"
            )


def load_search(path: Path, overrides: Sequence[str] = ()) -> tuple[Search, Config]:
    """A search and the configuration that its trials change.

    Raises:
        ConfigError: one of the files is missing or wrong, or the space has a key or a value that no trial can have.
    """
    search = load_section(Search, path, overrides)
    base_path = path.expanduser().parent / search.base
    if not base_path.is_file():
        raise ConfigError(f"{path}: base: {base_path} is no file (a path relative to the search's)")
    base = load_config(base_path)
    values = _merged(base.model_dump(mode="json"), search.settings)
    values["data"]["holdout"] = search.holdout or values["data"]["holdout"] or DEFAULT_HOLDOUT
    values["schedule"]["epochs"] = search.budget.epochs or values["schedule"]["epochs"]
    values["evaluation"]["every_epochs"] = search.report_epochs
    values["training"]["checkpoint_every_epochs"] = search.report_epochs
    base = check_config(values, f"{path}: settings")
    for key, parameter in search.space.items():  # an unknown key or a value out of bounds shows now, not in a trial
        for value in parameter.examples:
            with_point(base, {key: value}, f"{path}: space")
    metric_key(search, base)
    if base.schedule.epochs < search.report_epochs:
        raise ConfigError(
            f"{path}: report_epochs={search.report_epochs}, but a trial has {base.schedule.epochs} epochs"
        )
    return search, base


def with_point(base: Config, point: Point, source: str) -> Config:
    """The configuration of a point: a value that is a mapping changes the keys below its own."""
    values = base.model_dump(mode="json")
    for key, value in point.items():
        change: Any = value
        for name in reversed(key.split(".")):
            change = {name: change}
        values = _merged(values, change)
    return check_config(values, source)


def trial_config(base: Config, point: Point, name: str, folder: Path, tracking_uri: str) -> Config:
    """The configuration of a trial: its run is `folder`/`name`."""
    config = with_point(base, point, name)
    tracking = config.tracking.model_copy(update={"uri": tracking_uri})
    # Resuming needs the newest checkpoint alone: those that the search needs are in the search's own store.
    training = config.training.model_copy(update={"keep_checkpoints": 1, "keep_every_epochs": None})
    evaluation = config.evaluation.model_copy(update={"pictures": 0})
    return config.model_copy(
        update={
            "name": name,
            "output": str(folder),
            "tracking": tracking,
            "training": training,
            "evaluation": evaluation,
        }
    )


def metric_key(search: Search, base: Config) -> str:
    """The metric's name among a trial's numbers.

    Raises:
        ConfigError: there is no such metric.
    """
    if search.metric in RATES:
        return f"{base.evaluation.protocol}/{search.metric}"
    if search.metric.startswith("train/"):
        return search.metric
    raise ConfigError(f"metric {search.metric!r}: one of {', '.join(RATES)}, or train/NAME (train/clips_per_second)")


def _keys(key: str, parameter: Parameter) -> list[str]:
    """The keys that a parameter sets: its own, or those of the mappings among its values."""
    below = [f"{key}.{name}" for value in parameter.values if isinstance(value, Mapping) for name in value]
    return below or [key]


def _below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _merged(values: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(values))
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else copy.deepcopy(value)
    return merged
