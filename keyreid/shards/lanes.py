"""Lanes: parts of each batch that choose their tracklets apart, so that whoever holds some plans only those.

`data.lanes` = L cuts a batch into L lanes of P / L identities x K clips. In an epoch every training identity belongs to
one lane, and a sampler of `data.sampler` deals the lane's alone: the P identities of a step differ, and what a sampler
promises (each tracklet its turn) it keeps in each lane. Nothing depends on the number of ranks.

Identities, sorted by their number of tracklets, are shared out in blocks of 2L at random, two for each lane. So lanes
weigh nearly the same, and any two identities meet: in one of about L epochs, within a block in one of 2L - 1.
"""

import functools
from collections.abc import Callable

import numpy as np

from keyreid.config import DataConfig
from keyreid.shards.sampling import Sampler, TrainingTracklets, number_within, random_numbers

LANES = 2  # the stream of random numbers: who is in which lane, and the lanes' seeds
_AGAIN = 2**32  # epochs between an epoch and the shuffle that fills a lane's last steps


class Lanes:
    """The tracklets of each lane's steps; `make` is called as SAMPLERS are, for each epoch and lane."""

    def __init__(self, make: Callable[..., Sampler], tracklets: TrainingTracklets, data: DataConfig, seed: int) -> None:
        self._make, self._tracklets, self._lanes, self._seed = make, tracklets, data.lanes, seed
        self._data = data.model_copy(update={"identities": data.identities // data.lanes, "lanes": 1})
        self.size = self._data.batch_size  # clips of a lane in a step
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._only = make(tracklets, data, seed) if data.lanes == 1 else None
        # The rank of each identity's size; below sqrt(2N), and numpy sorts 16 bits without comparing.
        self._rank = np.unique(-tracklets.count, return_inverse=True)[1].astype(np.uint16)
        identities = len(tracklets.count)
        self._blocks = max(0, identities // (2 * data.lanes) - 1)  # and the rest, fewer than 4L, as a last one
        self.steps_per_epoch = (self._only or self._sampler(self._heaviest(), seed)[0]).steps_per_epoch

    def steps(self, epoch: int, lane: int, first: int, last: int) -> np.ndarray:
        """The tracklets of a lane's steps first .. last - 1 of all: int [last - first, P / L * K]; see Sampler."""
        sampler, rows = (self._only, None) if self._only else self._epoch(epoch)(lane)
        parts = []
        while first < last:
            turn, start = divmod(first, sampler.steps_per_epoch)
            stop = min(start + last - first, sampler.steps_per_epoch)
            chosen = sampler.steps(epoch + turn * _AGAIN, start, stop)
            if chosen.shape != (stop - start, self.size):
                raise ValueError(f"the sampler gave {chosen.shape} tracklets, not {(stop - start, self.size)}")
            parts.append(chosen if rows is None else rows[chosen])
            first += stop - start
        return np.concatenate(parts)

    def _heaviest(self) -> np.ndarray:
        """The identities of the heaviest lane there can be: the largest of each block."""
        order = np.argsort(self._rank, kind="stable")
        blocks, rest = np.split(order, [self._blocks * 2 * self._lanes])
        return np.r_[blocks.reshape(-1, 2 * self._lanes)[:, :2].ravel(), rest[: -(-len(rest) // self._lanes)]]

    def _plan_epoch(self, epoch: int) -> Callable[[int], tuple[Sampler, np.ndarray]]:
        """A function of the lane that makes its sampler when it is first asked for; one epoch's go together."""
        random = random_numbers(self._seed, LANES, epoch, 0)
        order = random.permutation(len(self._rank))
        order = order[np.argsort(self._rank[order], kind="stable")]
        blocks, rest = np.split(order, [self._blocks * 2 * self._lanes])
        dealt = np.r_[random.permuted(blocks.reshape(-1, 2 * self._lanes), axis=1).ravel(), random.permutation(rest)]

        @functools.cache
        def lane(number: int) -> tuple[Sampler, np.ndarray]:
            seed = int(random_numbers(self._seed, LANES, 0, 1 + number).integers(2**63))
            sampler, rows = self._sampler(dealt[number :: self._lanes], seed)
            if sampler.steps_per_epoch > self.steps_per_epoch:
                steps = f"{sampler.steps_per_epoch} steps an epoch, the heaviest that can be {self.steps_per_epoch}"
                raise ValueError(f"the sampler gives lane {number} of epoch {epoch} {steps}")
            return sampler, rows

        return lane

    def _sampler(self, identities: np.ndarray, seed: int) -> tuple[Sampler, np.ndarray]:
        """A sampler of these identities alone, and the row of all of each of its rows."""
        every, identities = self._tracklets, np.sort(identities)
        count = every.count[identities]
        label = np.repeat(np.arange(len(count)), count)
        rows = every.start[identities][label] + number_within(count)
        columns = every.position[rows], label, every.camera[rows], every.frames[rows]
        own = TrainingTracklets(*columns, count, np.cumsum(count) - count)
        return self._make(own, self._data, seed), rows
