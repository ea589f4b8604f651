"""The order of an epoch: which tracklets, which frames, and how each frame is changed.

A plan is a pure function of (seed, epoch, step). Its random numbers come from Philox, a generator that is keyed and
counted instead of advanced, so any step of any epoch is planned at once, without planning those before it, and every
rank and worker that plans it gets the same. Readers only carry it out.

**An epoch** gives every training tracklet its turn. An identity's tracklets, shuffled, are dealt into groups of K; the
last group is filled from the first (an identity with fewer than K tracklets repeats its own). A step takes P groups of
P different identities; where the groups do not fill the last step, identities that are drawn at random give one more.
Identities therefore come in proportion to their tracklets, as in the published sampler, which however leaves out what
does not fill a group. MARS: 2,307 groups, 577 steps of 4 x 4.

The other draws change the K tracklets of a group, and nothing else: `frames` draws them by their number of frames,
`camera` takes them from as many cameras as the identity has.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from keyreid.config import AugmentConfig, ClipConfig, DataConfig
from keyreid.errors import ConfigError, DataError
from keyreid.guidance import MODES, Guidance
from keyreid.shards.batch import ClipPlan
from keyreid.shards.index import ShardSet

_ORDER, _FRAMES = 0, 1  # the two streams of random numbers
_BLOCK_STEPS = 64  # steps whose frames are drawn together, for speed
_ERASE_TRIES = 8
_MIXING = 4  # rounds of swaps, times log2 of the steps


class TrainingPlan:
    """The order of training.

    Attributes:
        num_identities: training identities, which are labelled in sorted order.
        steps_per_epoch: the same in every epoch.
        batch_size: clips a step, over all ranks: P x K.
    """

    def __init__(
        self, shards: ShardSet, data: DataConfig, clip: ClipConfig, model_parts: int = 6, seed: int = 0
    ) -> None:
        """Prepare the plan of a run.

        Args:
            model_parts: parts of the model; the plan is the same for any number.

        Raises:
            ConfigError: fewer identities than a step needs.
        """
        positions = np.array(shards.select("train", data.split_number, data.holdout), np.int64)
        if not len(positions):
            raise DataError(f"{shards.location}: split {data.split_number} has no training tracklets")
        identities, labels = np.unique(shards.identities[positions], return_inverse=True)
        if data.identities > len(identities):
            raise ConfigError(
                f"data.identities={data.identities}, but {shards.location} has {len(identities)} training identities"
            )
        self.num_identities = len(identities)
        self.batch_size = data.batch_size
        self._data, self._clip, self._seed = data, clip, seed
        # Tracklets lie by label; everything below counts in this order.
        order = np.argsort(labels, kind="stable")
        self._position, self._label = positions[order], labels[order]
        self._camera = shards.cameras[self._position]
        self._frames = np.array([shards.tracklets[p].frames for p in self._position], np.int64)
        self._count = np.bincount(labels)
        self._start = np.cumsum(self._count) - self._count
        groups = -(-self._count // data.tracklets)
        self.steps_per_epoch = int(max(-(-groups.sum() // data.identities), groups.max()))
        self._groups = groups
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)
        self._block = functools.lru_cache(maxsize=4)(self._plan_block)

    def step(self, epoch: int, step: int) -> list[ClipPlan]:
        """The global batch of a step: P x K clips, the K of an identity together."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        block, within = divmod(step, _BLOCK_STEPS)
        tracklets, *per_frame = self._block(epoch, block)
        rows = slice(within * self.batch_size, (within + 1) * self.batch_size)
        tracklets = tracklets[rows]
        positions, labels = self._position[tracklets].tolist(), self._label[tracklets].tolist()
        blank = _nothing(self._clip.frames)
        changes = (values[rows] for values in per_frame)
        return [ClipPlan(*values, blank) for values in zip(positions, labels, *changes, strict=True)]

    def batches(
        self, epoch: int, step: int, rank: int = 0, world_size: int = 1, steps_per_epoch: int | None = None
    ) -> Iterator[list[ClipPlan]]:
        """A rank's clips from a step on, for ever: its contiguous part of each global batch.

        Args:
            steps_per_epoch: shorter epochs leave out the rest of the plan's; longer ones take in the next.

        Raises:
            ConfigError: the ranks do not divide the batch.
        """
        if self.batch_size % world_size:
            raise ConfigError(
                f"{world_size} ranks do not divide the batch of {self.batch_size} clips "
                "(data.identities x data.tracklets)"
            )
        share = self.batch_size // world_size
        length = steps_per_epoch or self.steps_per_epoch
        for number in itertools.count(epoch * length + step):
            epoch, step = divmod(number, length)
            if length > self.steps_per_epoch:  # what is called an epoch has no meaning to the order then
                epoch, step = divmod(number, self.steps_per_epoch)
            yield self.step(epoch, step)[rank * share : (rank + 1) * share]

    def _generator(self, stream: int, epoch: int, block: int) -> np.random.Generator:
        """Random numbers of their own for each (seed, stream, epoch, block)."""
        return np.random.Generator(np.random.Philox(key=[self._seed, stream], counter=[0, 0, block, epoch]))

    def _plan_epoch(self, epoch: int) -> np.ndarray:
        """The tracklets of every step, int [steps, P * K], as numbers in the order of labels."""
        random = self._generator(_ORDER, epoch, 0)
        group_label, group_number = self._with_fillers(random)
        draws = {"identity": self._each_in_turn, "frames": self._by_frames, "camera": self._by_camera}
        members = draws[self._data.sampler](random, group_label, group_number)
        dealt = _deal(random, group_label, self.steps_per_epoch)
        return members[dealt].reshape(self.steps_per_epoch, self.batch_size)

    def _with_fillers(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The groups of an epoch: label and number within the label, as many as fill the steps; by label."""
        counts = self._groups.copy()
        missing = self.steps_per_epoch * self._data.identities - counts.sum()
        while missing:
            able = np.flatnonzero(counts < self.steps_per_epoch)
            chosen = random.permutation(able)[:missing]
            counts[chosen] += 1
            missing -= len(chosen)
        labels = np.repeat(np.arange(len(counts)), counts)
        return labels, _number_within(counts)

    def _each_in_turn(self, random: np.random.Generator, label: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Groups [G, K]: an identity's shuffled tracklets, K at a time, round and round."""
        shuffled = np.lexsort((random.random(len(self._label)), self._label))
        turn = number[:, None] * self._data.tracklets + np.arange(self._data.tracklets)
        return shuffled[self._start[label][:, None] + turn % self._count[label][:, None]]

    def _by_frames(self, random: np.random.Generator, label: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Groups [G, K]: drawn without replacement, each draw in proportion to the number of frames."""
        counts = self._count[label]
        group = np.repeat(np.arange(len(label)), counts)
        candidate = self._start[label][group] + _number_within(counts)
        # The K least of Exp(1) / weight are such a draw (Efraimidis and Spirakis).
        keys = random.standard_exponential(len(candidate)) / self._frames[candidate]
        candidate = candidate[np.lexsort((keys, group))]
        first = np.cumsum(counts) - counts
        return candidate[first[:, None] + np.arange(self._data.tracklets) % counts[:, None]]

    def _by_camera(self, random: np.random.Generator, label: np.ndarray, number: np.ndarray) -> np.ndarray:
        """Groups [G, K]: the identity's cameras in turn, and each camera's tracklets in turn."""
        order = np.lexsort((random.random(len(self._label)), self._camera, self._label))
        pair = np.stack([self._label[order], self._camera[order]], 1)
        first = np.flatnonzero(np.r_[True, (pair[1:] != pair[:-1]).any(1)])  # where a (label, camera) begins
        size = np.diff(np.r_[first, len(order)])
        owner = pair[first, 0]
        cameras = np.bincount(owner, minlength=self.num_identities)
        shuffled = np.lexsort((random.random(len(first)), owner))  # cameras in a random order for each label
        start = np.cumsum(cameras) - cameras
        turn = number[:, None] * self._data.tracklets + np.arange(self._data.tracklets)
        visit, camera = np.divmod(turn, cameras[label][:, None])
        chosen = shuffled[start[label][:, None] + camera]
        return order[first[chosen] + visit % size[chosen]]

    def _plan_block(self, epoch: int, block: int) -> tuple[np.ndarray, ...]:
        """Tracklets, frames, flips, crops and erasures of some steps in a row."""
        steps = slice(block * _BLOCK_STEPS, (block + 1) * _BLOCK_STEPS)
        tracklets = self._epoch(epoch)[steps].reshape(-1)
        random = self._generator(_FRAMES, epoch, block)
        shape = (len(tracklets), self._clip.frames)
        frames = _restricted_random(random, self._frames[tracklets], self._clip.frames)
        return tracklets, frames, *_augment(random, shape, self._data.augment, self._clip)


def evaluation_clips(
    shards: ShardSet,
    positions: Sequence[int],
    frames: int,
    clips: int | None = None,
    mode: Guidance = MODES["aligned"],
) -> list[ClipPlan]:
    """Clips of T consecutive frames that cover tracklets, in order, unchanged.

    The last clip is filled by repeating its frames.

    Args:
        frames: T.
        clips: so many evenly spaced ones of each tracklet instead of all.
        mode: how many clips it looks at, and whether repeated frames have guidance.
    """
    plans = []
    no_flip, no_crop, no_erase = _nothing(frames), np.zeros((frames, 2), np.int64), np.zeros((frames, 4), np.int64)
    for position in positions:
        total = shards.tracklets[position].frames
        numbers = np.arange(-(-total // frames))
        numbers = numbers[: mode.most_clips]
        if clips is not None and clips < len(numbers):
            numbers = numbers[((np.arange(clips) + 0.5) * len(numbers) / clips).astype(np.int64)]
        for number in numbers.tolist():
            start = number * frames
            real = min(frames, total - start)
            chosen = start + np.arange(frames) % real
            blank = (np.arange(frames) >= real) & mode.blanks_repeats
            plans.append(ClipPlan(position, -1, chosen, no_flip, no_crop, no_erase, blank))
    return plans


def _deal(random: np.random.Generator, labels: np.ndarray, steps: int) -> np.ndarray:
    """Deal groups to steps at random, so that no step has two of one label.

    Args:
        labels: int [steps * P], ascending; no label more than `steps` times.

    Returns:
        Positions in `labels`, int [steps, P].
    """
    width = len(labels) // steps
    # Labels in a random order, laid out column by column: the same label is never twice in a row of the table.
    by_label = random.permutation(labels[-1] + 1)[labels]
    table = np.argsort(by_label, kind="stable").reshape(width, steps).T.copy()
    # Then rows are paired at random and swap cells with each other wherever both stay without repetition. Rounds in
    # proportion to log(steps) carry every group to every step about equally often.
    half = steps // 2
    for _ in range(_MIXING * max(1, steps - 1).bit_length()):
        rows = random.permutation(steps)
        one, other = table[rows[:half]], table[rows[half : 2 * half]]
        wish = random.random((width, half)) < 0.5
        for column in range(width):
            mine, yours = labels[one[:, column]], labels[other[:, column]]
            free = ~(labels[other] == mine[:, None]).any(1) & ~(labels[one] == yours[:, None]).any(1)
            swap = wish[column] & (free | (mine == yours))
            one[swap, column], other[swap, column] = other[swap, column], one[swap, column]
        # Columns take turns, so that a group may also meet those that began in its own column.
        table[rows[:half]] = np.roll(one, 1, axis=1)
        table[rows[half : 2 * half]] = other
    return table


def _restricted_random(random: np.random.Generator, totals: np.ndarray, frames: int) -> np.ndarray:
    """Restricted random sampling: T equal chunks of a tracklet, a random frame of each; int [N, T].

    A tracklet of fewer than T frames repeats some, in order.
    """
    bounds = np.arange(frames + 1) * totals[:, None] // frames
    low, high = bounds[:, :-1], np.maximum(bounds[:, 1:], bounds[:, :-1] + 1)
    return low + (random.random(low.shape) * (high - low)).astype(np.int64)


def _augment(
    random: np.random.Generator, shape: tuple[int, int], augment: AugmentConfig, clip: ClipConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flip, crop and erasure of frames, each frame by itself: bool [*shape], int [*shape, 2], int [*shape, 4]."""
    flip = random.random(shape) < augment.flip_probability
    crop = random.integers(-augment.pad_pixels, augment.pad_pixels + 1, (*shape, 2))
    wanted = random.random(shape) < augment.erase_probability
    area = random.uniform(*augment.erase_area, (_ERASE_TRIES, *shape)) * clip.height * clip.width
    aspect = random.uniform(*augment.erase_aspect, (_ERASE_TRIES, *shape))
    height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (height < clip.height) & (width < clip.width) & (height > 0) & (width > 0)
    first = fits.argmax(0)[None]
    wanted &= fits.any(0)
    height, width = (np.take_along_axis(sides, first, 0)[0] for sides in (height, width))
    top = (random.random(shape) * (clip.height - height + 1)).astype(np.int64)
    left = (random.random(shape) * (clip.width - width + 1)).astype(np.int64)
    return flip, crop, np.stack([top, left, height, width], -1) * wanted[..., None]


def _number_within(counts: np.ndarray) -> np.ndarray:
    """0 .. count - 1 for each count, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


@functools.cache
def _nothing(frames: int) -> np.ndarray:
    nothing = np.zeros(frames, bool)
    nothing.flags.writeable = False
    return nothing
