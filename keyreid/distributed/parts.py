"""Which numbers of a whole tensor a rank holds: all, a run of them (ZeRO), or every S-th row (owned_rows.py).

Checkpoints name whole tensors, ranks save and need parts of them, and the parts of one run are not those of the next.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_BLOCK = 16_000_000  # numbers that travel at once


@dataclass(frozen=True)
class Part:
    """Of a tensor's rows first, first + every, ... laid end to end, the numbers start to stop.

    Rows lie along the last dimension but one: tables of rows are [C, W] or [P, C, W]. With `every` 1, all numbers of a
    tensor of any shape are laid end to end.
    """

    shape: tuple[int, ...]
    start: int
    stop: int
    first: int = 0
    every: int = 1

    @classmethod
    def whole(cls, shape: Iterable[int]) -> "Part":
        """All of a tensor of this shape."""
        shape = tuple(shape)
        return cls(shape, 0, math.prod(shape))

    @classmethod
    def rows(cls, shape: tuple[int, ...], first: int, every: int) -> "Part":
        """All of its rows first, first + every, ..."""
        rows = len(range(first, shape[-2], every))
        return cls(shape, 0, math.prod(shape[:-2]) * rows * shape[-1], first, every)

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return len(self) == math.prod(self.shape)

    @property
    def is_sound(self) -> bool:
        """Whether such a tensor can have such a part."""
        if not 0 <= self.first < self.every or (self.every > 1 and len(self.shape) < 2):
            return False
        of = Part.whole(self.shape) if self.every == 1 else Part.rows(self.shape, self.first, self.every)
        return 0 <= self.start <= self.stop <= of.stop

    def cut(self, start: int, stop: int) -> "Part":
        """Of the numbers of this part those from `start` to `stop`, as far as it has them."""
        start, stop = (min(max(at, 0), len(self)) for at in (start, stop))
        return Part(self.shape, self.start + start, self.start + stop, self.first, self.every)

    def blocks(self) -> Iterator["Part"]:
        """The same numbers in parts that are not too large to travel, cut between rows."""
        width = self.shape[-1] if self.shape else 1
        size = max(_BLOCK // width, 1) * width
        return (self.cut(start, start + size) for start in range(0, len(self), size))

    def meets(self, other: "Part") -> bool:
        """Whether another part of the same tensor has some of the same numbers; may say so where it has none."""
        if not len(self) or not len(other) or (self.first - other.first) % math.gcd(self.every, other.every):
            return False
        return self.every != other.every or max(self.start, other.start) < min(self.stop, other.stop)

    def fill(self, own: Tensor, other: "Part", values: Tensor) -> None:
        """Copy what the other part has of this one: `own` [len(self)], `values` [len(other)]."""
        if (self.first, self.every) == (other.first, other.every):
            start, stop = max(self.start, other.start), min(self.stop, other.stop)
            if start < stop:
                own[start - self.start : stop - self.start] = values[start - other.start : stop - other.start]
            return
        # Runs of `unit` numbers lie together in both.
        unit = math.gcd(self.shape[-1], self.start, self.stop, other.start, other.stop)
        place, here = self._places(other._numbers(unit), unit)
        own.view(-1, unit)[place[here]] = values.view(-1, unit)[here]

    def _numbers(self, unit: int) -> Tensor:
        """Where in the whole each of this part's runs of `unit` numbers is, counted in such runs."""
        row, column = _divmod(torch.arange(self.start // unit, self.stop // unit), self.shape[-1] // unit)
        table, row = _divmod(row, len(range(self.first, self.shape[-2], self.every)))
        row = table * self.shape[-2] + self.first + row * self.every
        return row * (self.shape[-1] // unit) + column

    def _places(self, numbers: Tensor, unit: int) -> tuple[Tensor, Tensor]:
        """Where in this part runs of the whole are, and which of them it has."""
        row, column = _divmod(numbers, self.shape[-1] // unit)
        table, row = _divmod(row, self.shape[-2])
        here = row % self.every == self.first
        row = table * len(range(self.first, self.shape[-2], self.every)) + row // self.every
        place = row * (self.shape[-1] // unit) + column - self.start // unit
        return place, here & (place >= 0) & (place < len(self) // unit)


@dataclass(frozen=True)
class Held:
    """A part that this rank holds, as the `number`-th of `of` ranks that hold the same."""

    part: Part
    get: Callable[[], Tensor]  # its numbers, in any shape: where they are held, unless an engine keeps them elsewhere
    number: int = 0
    of: int = 1

    @classmethod
    def by_all(cls, tensor: Tensor) -> "Held":
        """A whole tensor of which every rank of the run has a copy."""
        together = dist.is_available() and dist.is_initialized()
        alike = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        return cls(Part.whole(tensor.shape), tensor.detach, *alike)

    def put(self, values: Tensor) -> None:
        """Take these numbers of the part, where they are held."""
        own = self.get()
        own.copy_(values.view_as(own))


def shared_out(held: Iterable[Held]) -> list[Part]:
    """What of each this rank saves, so that all is saved once: ranks that hold the same save equally much of it."""
    held, total, done, own = list(held), Counter(), Counter(), []
    for each in held:
        total[each.number, each.of] += len(each.part)
    for each in held:
        alike = each.number, each.of
        first, last = (total[alike] * number // each.of - done[alike] for number in (each.number, each.number + 1))
        own.append(each.part.cut(first, last))
        done[alike] += len(each.part)
    return own


def _divmod(numbers: Tensor, by: int) -> tuple[Tensor, Tensor]:
    return numbers // by, numbers % by
