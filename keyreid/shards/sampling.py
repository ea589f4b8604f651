"""How the tracklets of each step are chosen: the interface of a sampler, and those that `data.sampler` names.

A sampler is any object with the two names of `Sampler`. To add one, write it in a new file, name it in `SAMPLERS` of
plan.py and in `data.sampler` of keyreid/config.py.

**The samplers here** give every training tracklet its turn. An identity's tracklets, shuffled, are dealt into groups of
K; the last group is filled from the first (an identity with fewer than K tracklets repeats its own). A step takes P
groups of P different identities; where the groups do not fill the last step, identities that are drawn at random give
one more. Identities therefore come in proportion to their tracklets, as in the published sampler, which however leaves
out what does not fill a group. MARS: 2,307 groups, 577 steps of 4 x 4. `ByFrames` and `ByCamera` change the K tracklets
of a group, and nothing else.
"""

import functools
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from keyreid.config import DataConfig

ORDER, FRAMES = 0, 1  # the two streams of random numbers: tracklets, and what is done to their frames
_MIXING = 4  # rounds of swaps, times log2 of the steps


@dataclass(frozen=True)
class TrainingTracklets:
    """The N training tracklets of C identities, sorted by label; all int64."""

    position: np.ndarray  # [N], in the set of shards
    label: np.ndarray  # [N]
    camera: np.ndarray  # [N]
    frames: np.ndarray  # [N]
    count: np.ndarray  # [C], how many tracklets an identity has
    start: np.ndarray  # [C], its first


class Sampler(Protocol):
    """Chooses the tracklets of each step; made by `SAMPLERS[data.sampler](tracklets, data, seed)`.

    Once a run; where there are lanes, for each epoch and lane, from the lane's tracklets and share of P.
    """

    steps_per_epoch: int  # the same in every epoch

    def steps(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The tracklets of the steps first .. last - 1, as rows of `TrainingTracklets`: int [last - first, P * K].

        The K of an identity stand together. A pure function: all ranks ask, in any order, and resuming asks in the
        middle. `random_numbers` gives numbers for it.
        """


def random_numbers(seed: int, stream: int, epoch: int, block: int) -> np.random.Generator:
    """Random numbers of their own for each (seed, stream, epoch, block): Philox is keyed and counted, not advanced."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, block, epoch]))


class EachInTurn:
    """`identity`: an identity's shuffled tracklets, K at a time, round and round."""

    def __init__(self, tracklets: TrainingTracklets, data: DataConfig, seed: int) -> None:
        self.tracklets, self.data, self.seed = tracklets, data, seed
        self._groups = -(-tracklets.count // data.tracklets)
        self.steps_per_epoch = int(max(-(-self._groups.sum() // data.identities), self._groups.max()))
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def steps(self, epoch: int, first: int, last: int) -> np.ndarray:
        """See Sampler."""
        return self._epoch(epoch)[first:last]

    def members(self, random: np.random.Generator, label: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The tracklets of groups, int [G, K], from their labels and numbers within the label, both int [G]."""
        rows = self.tracklets
        shuffled = np.lexsort((random.random(len(rows.label)), rows.label))
        return shuffled[rows.start[label][:, None] + self._turns(number) % rows.count[label][:, None]]

    def _turns(self, number: np.ndarray) -> np.ndarray:
        return number[:, None] * self.data.tracklets + np.arange(self.data.tracklets)

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """The tracklets of every step, int [steps, P * K]."""
        random = random_numbers(self.seed, ORDER, epoch, 0)
        counts = self._groups.copy()  # of each label, then as many as fill the steps
        while missing := self.steps_per_epoch * self.data.identities - counts.sum():
            able = np.flatnonzero(counts < self.steps_per_epoch)
            counts[random.permutation(able)[:missing]] += 1
        label = np.repeat(np.arange(len(counts)), counts)
        members = self.members(random, label, number_within(counts))
        dealt = _deal(random, label, self.steps_per_epoch)
        return members[dealt].reshape(self.steps_per_epoch, self.data.batch_size)


class ByFrames(EachInTurn):
    """`frames`: drawn without replacement, each draw in proportion to the number of frames."""

    def members(self, random: np.random.Generator, label: np.ndarray, number: np.ndarray) -> np.ndarray:
        """See EachInTurn."""
        counts = self.tracklets.count[label]
        group = np.repeat(np.arange(len(label)), counts)
        candidate = self.tracklets.start[label][group] + number_within(counts)
        # The K least of Exp(1) / weight are such a draw (Efraimidis and Spirakis).
        keys = random.standard_exponential(len(candidate)) / self.tracklets.frames[candidate]
        candidate = candidate[np.lexsort((keys, group))]
        first = np.cumsum(counts) - counts
        return candidate[first[:, None] + np.arange(self.data.tracklets) % counts[:, None]]


class ByCamera(EachInTurn):
    """`camera`: the identity's cameras in turn, and each camera's tracklets in turn."""

    def members(self, random: np.random.Generator, label: np.ndarray, number: np.ndarray) -> np.ndarray:
        """See EachInTurn."""
        rows = self.tracklets
        order = np.lexsort((random.random(len(rows.label)), rows.camera, rows.label))
        pair = np.stack([rows.label[order], rows.camera[order]], 1)
        first = np.flatnonzero(np.r_[True, (pair[1:] != pair[:-1]).any(1)])  # where a (label, camera) begins
        size = np.diff(np.r_[first, len(order)])
        owner = pair[first, 0]
        cameras = np.bincount(owner, minlength=len(rows.count))
        shuffled = np.lexsort((random.random(len(first)), owner))  # cameras in a random order for each label
        start = np.cumsum(cameras) - cameras
        visit, camera = np.divmod(self._turns(number), cameras[label][:, None])
        chosen = shuffled[start[label][:, None] + camera]
        return order[first[chosen] + visit % size[chosen]]


def _deal(random: np.random.Generator, labels: np.ndarray, steps: int) -> np.ndarray:
    """Deal groups to steps at random, so that no step has two of one label: positions in `labels`, int [steps, P].

    `labels` is int [steps * P], ascending; no label more than `steps` times.
    """
    width = len(labels) // steps
    # Labels in a random order, laid out row by row: the same label is never twice in a column of the table.
    by_label = random.permutation(labels[-1] + 1)[labels]
    order = np.argsort(by_label, kind="stable")
    table = np.stack([order, labels[order]]).astype(np.int32).reshape(2, width, steps)  # groups, and their labels
    # Then columns, the steps, are paired at random and swap cells with each other wherever both stay without
    # repetition. Rounds in proportion to log(steps) carry every group to every step about equally often.
    half = steps // 2
    for _ in range(_MIXING * max(1, steps - 1).bit_length()):
        columns = random.permutation(steps)
        one, other = table[:, :, columns[:half]], table[:, :, columns[half : 2 * half]]
        wish = random.random((width, half)) < 0.5
        for row in range(width):
            mine, yours = one[1, row], other[1, row]
            free = ~((other[1] == mine) | (one[1] == yours)).any(0)
            swap = wish[row] & (free | (mine == yours))
            change = (one[:, row] ^ other[:, row]) * swap
            one[:, row] ^= change
            other[:, row] ^= change
        # Rows take turns, so that a group may also meet those that began in its own row.
        table[:, :, columns[:half]] = np.roll(one, 1, axis=1)
        table[:, :, columns[half : 2 * half]] = other
    return table[0].T


def number_within(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
