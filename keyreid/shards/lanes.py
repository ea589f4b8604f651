"""Lanes: parts of each batch that choose their tracklets apart, so that whoever holds some plans and reads only those.

`data.lanes` = L cuts a batch into L lanes of P / L identities x K clips. In an epoch every training identity belongs to
one lane, and a sampler of `data.sampler` deals the lane's alone: the P identities of a step differ, and what a sampler
promises (each tracklet its turn) it keeps in each lane. Nothing depends on the number of ranks.

Identities, sorted by their number of tracklets, are shared out in blocks of 2L at random, two for each lane. So lanes
weigh nearly the same, and any two identities meet: in one of about L epochs, within a block in one of 2L - 1.

`data.window` = W gives a lane a place in each epoch: whole shards are shared out, in the same way, instead of
identities, and the lane walks through its shards in an order of its own, so many at a time that they hold about W
identities, a sampler for each such window. Whoever reads for the lane then needs this window, the next, and for some
batches the one before.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from keyreid.config import DataConfig
from keyreid.shards.sampling import Sampler, random_numbers
from keyreid.shards.training_set import TrainingIdentities
from keyreid.shards.windows import Windows

LANES, WINDOWS = 2, 3  # streams of random numbers: who is in which lane, with the lanes' seeds; the order of shards
_AGAIN = 2**32  # epochs between an epoch and the shuffle that fills a lane's last steps


@dataclass(frozen=True)
class Window:
    """A lane's steps `start` .. `start + sampler.steps_per_epoch` - 1 of an epoch."""

    start: int
    sampler: Sampler
    position: np.ndarray  # int64, in the set, of each of the sampler's tracklets
    identities: int
    shards: np.ndarray  # int64, ascending, those that it needs; nothing where there are no windows


class Lanes:
    """The tracklets of each lane's steps; `make` is called as SAMPLERS are, for each epoch, lane and window."""

    def __init__(self, make: Callable[..., Sampler], training: TrainingIdentities, data: DataConfig, seed: int) -> None:
        self._make, self._training, self._lanes, self._seed = make, training, data.lanes, seed
        self._data = data.model_copy(update={"identities": data.identities // data.lanes, "lanes": 1})
        self.size = self._data.batch_size  # clips of a lane in a step
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._only: Window | None = None
        if data.lanes == 1 and not data.window:
            rows = training.tracklets()
            self._only = Window(0, make(rows, data, seed), rows.position, len(rows.count), np.arange(0))
            self.steps_per_epoch = self._only.sampler.steps_per_epoch
            return
        # What is shared out: identities, or shards with theirs.
        self._places = Windows(training, data) if data.window else None
        weight = self._places.groups if self._places else training.count
        # The rank of each weight; of identities below sqrt(2N), and numpy sorts 16 bits without comparing.
        rank = np.unique(-weight, return_inverse=True)[1]
        self._rank = rank.astype(np.uint16) if rank.max() < 1 << 16 else rank
        self._blocks = max(0, len(weight) // (2 * data.lanes) - 1)  # and the rest, fewer than 4L, as a last one
        heaviest = self._heaviest()
        if self._places:
            self.steps_per_epoch = self._places.most_steps(heaviest)
        else:
            self.steps_per_epoch = self._window(heaviest, 0, seed).sampler.steps_per_epoch

    def steps(self, epoch: int, lane: int, first: int, last: int) -> np.ndarray:
        """The tracklets of a lane's steps first .. last - 1, positions in the set: int64 [last - first, P / L * K]."""
        windows = self.windows(epoch, lane)
        starts, parts = [window.start for window in windows], []
        while first < last:
            window = windows[int(np.searchsorted(starts, first, "right")) - 1]
            turn, start = divmod(first - window.start, window.sampler.steps_per_epoch)  # the last one takes turns
            stop = min(start + last - first, window.sampler.steps_per_epoch)
            chosen = window.sampler.steps(epoch + turn * _AGAIN, start, stop)
            if chosen.shape != (stop - start, self.size):
                raise ValueError(f"the sampler gave {chosen.shape} tracklets, not {(stop - start, self.size)}")
            parts.append(window.position[chosen])
            first += stop - start
        return np.concatenate(parts)

    def windows(self, epoch: int, lane: int) -> list[Window]:
        """What a lane walks through in an epoch."""
        return [self._only] if self._only else self._epoch(epoch)(lane)

    def _heaviest(self) -> np.ndarray:
        """The heaviest lane there can be: the heaviest of each block."""
        order = np.argsort(self._rank, kind="stable")
        blocks, rest = np.split(order, [self._blocks * 2 * self._lanes])
        return np.r_[blocks.reshape(-1, 2 * self._lanes)[:, :2].ravel(), rest[: -(-len(rest) // self._lanes)]]

    def _plan_epoch(self, epoch: int) -> Callable[[int], list[Window]]:
        """A function of the lane that makes its windows when it is first asked for; one epoch's go together."""
        random = random_numbers(self._seed, LANES, epoch, 0)
        order = random.permutation(len(self._rank))
        order = order[np.argsort(self._rank[order], kind="stable")]
        blocks, rest = np.split(order, [self._blocks * 2 * self._lanes])
        dealt = np.r_[random.permuted(blocks.reshape(-1, 2 * self._lanes), axis=1).ravel(), random.permutation(rest)]

        @functools.cache
        def lane(number: int) -> list[Window]:
            parts = [dealt[number :: self._lanes]]
            if self._places:
                parts = self._places.of_lane(random_numbers(self._seed, WINDOWS, epoch, number).permutation(parts[0]))
            seeds = random_numbers(self._seed, LANES, 0, 1 + number).integers(2**63, size=len(parts)).tolist()
            windows, start = [], 0
            for part, seed in zip(parts, seeds, strict=True):
                windows.append(self._window(part, start, seed))
                start += windows[-1].sampler.steps_per_epoch
            if start > self.steps_per_epoch:
                steps = f"{start} steps an epoch, the heaviest that can be {self.steps_per_epoch}"
                raise ValueError(f"the sampler gives lane {number} of epoch {epoch} {steps}")
            return windows

        return lane

    def _window(self, part: np.ndarray, start: int, seed: int) -> Window:
        """A window of these identities, or shards."""
        labels = self._places.labels(part) if self._places else np.sort(part)
        shards = self._places.shard[np.sort(part)] if self._places else np.arange(0)
        rows = self._training.tracklets(labels)
        return Window(start, self._make(rows, self._data, seed), rows.position, len(labels), shards)
