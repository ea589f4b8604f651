"""What a search varies: YAML's words for Optuna's distributions, points drawn from them, and mutations of a point."""

import itertools
import json
import math
import random
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from pydantic import Field, model_validator

from keyreid.config import Section
from keyreid.errors import ConfigError

optuna.logging.set_verbosity(optuna.logging.WARNING)
Point = dict[str, Any]  # value by configuration key, in the order of the space
MUTATION_FACTORS = (0.8, 1.2)  # of population based training (Jaderberg et al. 2017)
DIGITS = 6  # significant ones of a drawn number, so that people can read and repeat it


class Parameter(Section):
    """One parameter: exactly one of `uniform`, `loguniform`, `choice` and `grid`."""

    uniform: tuple[float, float] | None = Field(None, description="least and most")
    loguniform: tuple[float, float] | None = Field(None, description="least and most; each factor equally often")
    choice: list[Any] | None = Field(None, min_length=1, description="values; a mapping sets several keys below this")
    grid: list[Any] | None = Field(None, min_length=1, description="values that are all tried")
    when: dict[str, Any] = Field({}, description="only where these parameters have this value, or one of these")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        names = ", ".join(cls.model_fields)
        if not isinstance(values, (dict, cls)):
            raise ValueError(f"is a mapping with one of {names}, such as {{uniform: [0.3, 0.9]}}")
        if unknown := [name for name in dict(values) if name not in cls.model_fields]:
            raise ValueError(f"unknown key {unknown[0]!r}: a parameter has {names}")
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> "Parameter":
        kinds = [kind for kind in ("uniform", "loguniform", "choice", "grid") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"needs one of uniform, loguniform, choice and grid; has {' and '.join(kinds) or 'none'}")
        if self.bounds and not (0 if self.loguniform else -math.inf) < self.bounds[0] < self.bounds[1]:
            raise ValueError(f"{kinds[0]} needs the least value first, then a larger one (loguniform: both above 0)")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and most of a number."""
        return self.uniform or self.loguniform

    @property
    def values(self) -> list[Any]:
        """Of a choice or a grid."""
        return self.choice or self.grid or []

    def distribution(self) -> FloatDistribution | CategoricalDistribution:
        """The parameter in Optuna's terms."""
        if self.bounds:
            return FloatDistribution(*self.bounds, log=self.loguniform is not None)
        return CategoricalDistribution([label(value) for value in self.values])

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """A value that Optuna suggests."""
        if self.bounds:
            return self._tidy(trial.suggest_float(name, *self.bounds, log=self.loguniform is not None))
        labels = [label(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(name, labels))]

    def mutate(self, value: Any, rng: random.Random) -> Any:
        """A value near `value`: a factor more or less, or a neighbour in the list; never outside."""
        if self.bounds:
            return self._tidy(value * rng.choice(MUTATION_FACTORS))
        position = self.values.index(value) + rng.choice((-1, 1))
        return self.values[sorted((0, position, len(self.values) - 1))[1]]

    def _tidy(self, value: float) -> float:
        """To few digits, and within the bounds: the middle one of the three."""
        return sorted([*self.bounds, float(f"{value:.{DIGITS}g}")])[1]


Space = dict[str, Parameter]


def label(value: Any) -> bool | int | float | str | None:
    """A value as Optuna can store it among a distribution's choices: lists and mappings as text."""
    return json.dumps(value).replace('"', "") if isinstance(value, (list, dict)) else value


def in_order(space: Space) -> list[str]:
    """The keys, such that those a condition names come before it.

    Raises:
        ConfigError: a condition names no parameter of the space, or conditions go in a circle.
    """
    for key, parameter in space.items():
        if unknown := parameter.when.keys() - space.keys():
            raise ConfigError(f"space: `when` of {key} names {', '.join(sorted(unknown))}, which the space lacks")
    try:
        return list(TopologicalSorter({key: parameter.when for key, parameter in space.items()}).static_order())
    except CycleError as error:
        raise ConfigError(f"space: `when` goes in a circle: {' -> '.join(error.args[1])}") from None


def walk(space: Space, draw: Callable[[str, Parameter], Any]) -> Point:
    """A point whose values come from `draw`, asked for each parameter that exists, conditions first."""
    drawn: Point = {}
    for key in in_order(space):
        wanted = {name: value if isinstance(value, list) else [value] for name, value in space[key].when.items()}
        if all(name in drawn and drawn[name] in values for name, values in wanted.items()):
            drawn[key] = draw(key, space[key])
    return {key: drawn[key] for key in space if key in drawn}


def random_points(space: Space, samples: int, seed: int) -> list[Point]:
    """`samples` random points for each combination of the grid parameters."""
    study = _random_study(seed)
    grids = {key: parameter.grid for key, parameter in space.items() if parameter.grid}
    combinations = [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    return [_drawn(space, fixed, study.ask()) for _ in range(samples) for fixed in combinations]


def grid_points(space: Space) -> list[Point]:
    """Every combination of values once (where a parameter does not exist, its values make no difference)."""
    points = random_points(space, 1, 0)
    return [point for number, point in enumerate(points) if point not in points[:number]]


def mutated(space: Space, point: Point, resample: float, rng: random.Random) -> Point:
    """A point near another one: each value drawn anew with probability `resample`, else changed a little."""
    kept = {key: space[key].mutate(value, rng) for key, value in point.items() if rng.random() >= resample}
    return _drawn(space, kept, _random_study(rng.getrandbits(32)).ask())


def _random_study(seed: int) -> optuna.Study:
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))


def _drawn(space: Space, fixed: Point, trial: optuna.Trial) -> Point:
    return walk(space, lambda key, parameter: fixed[key] if key in fixed else parameter.suggest(trial, key))
