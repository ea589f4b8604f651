"""What a search varies: parameters by the configuration key they set, and how each algorithm draws a point of them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import Field, model_validator

from keyreid.config import Section
from keyreid.errors import ConfigError

Point = dict[str, Any]  # value by configuration key, in the order of the space
MUTATION_FACTORS = (0.8, 1.2)  # of population based training (Jaderberg et al. 2017)
DIGITS = 6  # significant ones of a drawn number, so that people can read and repeat it


class Parameter(Section):
    """One parameter: exactly one of `uniform`, `loguniform`, `choice` and `grid`."""

    uniform: tuple[float, float] | None = Field(None, description="least and most")
    loguniform: tuple[float, float] | None = Field(None, description="least and most; each factor equally often")
    choice: list[Any] | None = Field(
        None, min_length=1, description="values; a mapping sets several keys below this one"
    )
    grid: list[Any] | None = Field(None, min_length=1, description="values that are all tried")
    when: dict[str, Any] = Field(
        default_factory=dict,
        description="the parameter exists only where these others have this value, or one of these",
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        names = ", ".join(cls.model_fields)
        if isinstance(values, dict) and (unknown := [name for name in values if name not in cls.model_fields]):
            raise ValueError(f"unknown key {unknown[0]!r}: a parameter has {names}")
        if not isinstance(values, (dict, cls)):
            raise ValueError(f"is a mapping with one of {names}, such as {{uniform: [0.3, 0.9]}}")
        return values

    @model_validator(mode="after")
    def _one_kind(self) -> Parameter:
        kinds = [kind for kind in ("uniform", "loguniform", "choice", "grid") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"needs one of uniform, loguniform, choice and grid; has {' and '.join(kinds) or 'none'}")
        if self.bounds and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"{kinds[0]} needs the least value first, then a larger one")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform needs values above 0")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Least and most of a number."""
        return self.uniform or self.loguniform

    @property
    def values(self) -> list[Any]:
        """Of a choice or a grid."""
        return self.choice or self.grid or []

    @property
    def examples(self) -> list[Any]:
        """All values of a choice or a grid; of a range its ends and a number between, which a whole number is not."""
        if not self.bounds:
            return self.values
        least, most = self.bounds
        return [least, least + (most - least) / math.pi, most]

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether the parameter exists beside those that were drawn before it."""
        return all(
            key in point and point[key] in (wanted if isinstance(wanted, list) else [wanted])
            for key, wanted in self.when.items()
        )

    def sample(self, rng: random.Random) -> Any:
        """A random value."""
        if self.uniform:
            return self._tidy(rng.uniform(*self.uniform))
        if self.loguniform:
            return self._tidy(math.exp(rng.uniform(*map(math.log, self.loguniform))))
        return rng.choice(self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        """What an Optuna trial suggests."""
        if self.bounds:
            return self._tidy(trial.suggest_float(name, *self.bounds, log=self.loguniform is not None))
        return self.values[trial.suggest_categorical(name, range(len(self.values)))]

    def mutate(self, value: Any, rng: random.Random) -> Any:
        """A value near `value`: a factor more or less, or a neighbour in the list; never outside."""
        if self.bounds:
            return self._tidy(value * rng.choice(MUTATION_FACTORS))
        position = self.values.index(value) + rng.choice((-1, 1))
        return self.values[min(max(position, 0), len(self.values) - 1)]

    def _tidy(self, value: float) -> float:
        least, most = self.bounds
        return min(max(float(f"{value:.{DIGITS}g}"), least), most)


Space = dict[str, Parameter]


def walk(space: Space, draw: Callable[[str, Parameter], Any]) -> Point:
    """A point whose values come from `draw`, asked for each parameter that exists, conditions first."""
    drawn: Point = {}
    for key in in_order(space):
        if space[key].applies(drawn):
            drawn[key] = draw(key, space[key])
    return {key: drawn[key] for key in space if key in drawn}


def in_order(space: Space) -> list[str]:
    """The keys, such that those a condition names come before it.

    Raises:
        ConfigError: a condition names no parameter of the space, or conditions go in a circle.
    """
    ordered: list[str] = []
    left = list(space)
    while left:
        ready = [key for key in left if all(other in ordered for other in space[key].when)]
        if not ready:
            unknown = sorted({other for key in left for other in space[key].when} - space.keys())
            what = f"names {', '.join(unknown)}, which the space lacks" if unknown else "goes in a circle"
            raise ConfigError(f"space: `when` of {', '.join(left)} {what}")
        ordered += ready
        left = [key for key in left if key not in ordered]
    return ordered


def random_points(space: Space, samples: int, seed: int) -> list[Point]:
    """`samples` random points for each combination of the grid parameters."""
    rng = random.Random(seed)
    return [
        walk(space, lambda key, parameter, fixed=fixed: fixed[key] if key in fixed else parameter.sample(rng))
        for _ in range(samples)
        for fixed in _combinations(space)
    ]


def grid_points(space: Space) -> list[Point]:
    """Every combination of values once (where a parameter does not exist, its values make no difference)."""
    points: list[Point] = []
    for fixed in _combinations(space):
        point = walk(space, lambda key, _, fixed=fixed: fixed[key])
        if point not in points:
            points.append(point)
    return points


def mutated(space: Space, point: Point, resample: float, rng: random.Random) -> Point:
    """A point near another one: each value drawn anew with probability `resample`, else changed a little."""
    return walk(
        space,
        lambda key, parameter: (
            parameter.sample(rng) if key not in point or rng.random() < resample else parameter.mutate(point[key], rng)
        ),
    )


def _combinations(space: Space) -> Iterator[Point]:
    grids = [key for key in space if space[key].grid]
    for values in itertools.product(*(space[key].grid for key in grids)):
        yield dict(zip(grids, values, strict=True))
