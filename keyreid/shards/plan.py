"""Which clips each step sees: which tracklets, which frames, and how each frame is changed.

A plan is a pure function of (seed, epoch, step): any step of any epoch is planned at once, without planning those
before it, and every rank and worker that plans it gets the same. Readers only carry it out.
"""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from keyreid.config import AugmentConfig, ClipConfig, DataConfig
from keyreid.errors import ConfigError
from keyreid.guidance import MODES, Guidance
from keyreid.shards.batch import ClipPlan
from keyreid.shards.lanes import Lanes, Window
from keyreid.shards.sampling import FRAMES, ByCamera, ByFrames, EachInTurn, Sampler, random_numbers
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.storage import ShardFiles
from keyreid.shards.training_set import TrainingIdentities

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "identity": EachInTurn,
    "frames": ByFrames,
    "camera": ByCamera,
}
_BLOCK_STEPS = 64  # steps whose frames are drawn together, for speed
_ERASE_TRIES = 8


class TrainingPlan:
    """The order of training."""

    def __init__(self, shards: ShardSet, data: DataConfig, clip: ClipConfig, seed: int = 0) -> None:
        """Prepare the plan of a run; ConfigError where there are fewer identities than a step needs."""
        self._training = TrainingIdentities(shards, data)
        self._lanes = Lanes(SAMPLERS[data.sampler], self._training, data, seed)
        self.num_identities = len(self._training.count)  # of training; labelled in sorted order
        self.steps_per_epoch = self._lanes.steps_per_epoch  # the same in every epoch
        self.batch_size = data.batch_size  # clips a step, over all ranks: P x K
        self._unit = data.tracklets if data.lanes > 1 else data.batch_size  # clips a step that are drawn together
        # Steps that readers, also those of other ranks, may be behind the plan; nothing is let go without windows.
        self._ahead = 2 * data.prefetch * data.workers + 2 if data.window else 0
        self._augment, self._clip, self._seed = data.augment, clip, seed
        self._block = functools.lru_cache(maxsize=4)(self._plan_block)

    def step(self, epoch: int, step: int) -> list[ClipPlan]:
        """The global batch of a step: P x K clips, the K of an identity together."""
        return self._clips(epoch, step, 0, self.batch_size)

    def _clips(self, epoch: int, step: int, first: int, last: int) -> list[ClipPlan]:
        """Clips first .. last - 1 of a step's global batch; only the lanes and units that hold them are planned."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        block, within = divmod(step, _BLOCK_STEPS)
        low, high = first // self._unit * self._unit, -(-last // self._unit) * self._unit
        planned = self._block(epoch, block, low, high)
        positions, *changes = (values[within, first - low : last - low] for values in planned)
        labels, blank = self._training.labels(positions).tolist(), _nothing(self._clip.frames)
        return [ClipPlan(*values, blank) for values in zip(positions.tolist(), labels, *changes, strict=True)]

    def windows(self, epoch: int, lane: int) -> list[Window]:
        """What a lane walks through in an epoch."""
        return self._lanes.windows(epoch, lane)

    def places(self, epoch: int, step: int, rank: int = 0, world_size: int = 1) -> tuple[list[int], list[int]]:
        """The shards that a rank reads from at a step, and those of its next windows; none where there are no windows.

        They are positions in the card, window after window.
        """
        share, size = self.batch_size // world_size, self._lanes.size
        now, then = [], []
        for lane in range(rank * share // size, -(-(rank + 1) * share // size)):
            windows = self.windows(epoch, lane)
            at = int(np.searchsorted([window.start for window in windows], step, "right"))
            following = windows[at] if at < len(windows) else self.windows(epoch + 1, lane)[0]
            now += windows[at - 1].shards.tolist()
            then += following.shards.tolist()
        return now, then

    def batches(
        self,
        epoch: int,
        step: int,
        rank: int = 0,
        world_size: int = 1,
        steps_per_epoch: int | None = None,
        files: ShardFiles | None = None,
    ) -> Iterator[list[ClipPlan]]:
        """A rank's clips from a step on, for ever: its contiguous part of each global batch.

        Args:
            steps_per_epoch: shorter epochs leave out the rest of the plan's; longer ones take in the next.
            files: told what to fetch when a window begins, and what to let go when readers are over its beginning.

        Raises:
            ConfigError: the ranks do not divide the batch.
        """
        if self.batch_size % world_size:
            batch = f"{self.batch_size} clips (data.identities x data.tracklets)"
            raise ConfigError(f"{world_size} ranks do not divide the batch of {batch}")
        share = self.batch_size // world_size
        length = steps_per_epoch or self.steps_per_epoch
        if length > self.steps_per_epoch:  # what is called an epoch has no meaning to the order then
            epoch, step = divmod(epoch * length + step, length := self.steps_per_epoch)
        fetched: list[int] = []
        recent: deque[list[int]] = deque(maxlen=self._ahead)  # what readers that are behind still read
        for number in itertools.count(epoch * length + step):
            if files is not None and self._ahead:
                now, then = self.places(*divmod(number, length), rank, world_size)
                recent.append(now)
                if (needed := list(dict.fromkeys(itertools.chain(*recent, then)))) != fetched:
                    files.drop(sorted(set(fetched) - set(needed)))
                    files.prefetch(needed)
                    fetched = needed
            yield self._clips(*divmod(number, length), rank * share, (rank + 1) * share)

    def _plan_block(self, epoch: int, block: int, low: int, high: int) -> tuple[np.ndarray, ...]:
        """Tracklets, frames, flips, crops and erasures of whole units of a block of steps: [steps, high - low, ...]."""
        first, last = block * _BLOCK_STEPS, min((block + 1) * _BLOCK_STEPS, self.steps_per_epoch)
        size = self._lanes.size
        lanes = [self._lanes.steps(epoch, lane, first, last) for lane in range(low // size, -(-high // size))]
        tracklets = np.concatenate(lanes, 1)[:, low % size :]
        units = []
        for column in range(low, high, self._unit):
            chosen = tracklets[:, column - low : column - low + self._unit]
            # A stream for each unit of a block, whoever draws it.
            random = random_numbers(self._seed, FRAMES, epoch, (block * self.batch_size + column) // self._unit)
            frames = _restricted_random(random, self._training.frames(chosen.reshape(-1)), self._clip.frames)
            drawn = frames, *_augment(random, frames.shape, self._augment, self._clip)
            units.append([chosen, *(values.reshape(*chosen.shape, *values.shape[1:]) for values in drawn)])
        return tuple(np.concatenate(values, 1) for values in zip(*units, strict=True))


def evaluation_clips(
    shards: ShardSet, positions: Sequence[int], frames: int, clips: int | None = None, mode: Guidance = MODES["aligned"]
) -> list[ClipPlan]:
    """Clips of T consecutive frames that cover tracklets, in order, unchanged; the last one repeats frames to be full.

    Args:
        frames: T.
        clips: so many evenly spaced ones of each tracklet instead of all.
        mode: how many clips it looks at, and whether repeated frames have guidance.
    """
    plans = []
    no_flip, no_crop, no_erase = _nothing(frames), np.zeros((frames, 2), np.int64), np.zeros((frames, 4), np.int64)
    for position in positions:
        total = int(shards.index.frames[position])
        numbers = np.arange(-(-total // frames))[: mode.most_clips]
        if clips is not None and clips < len(numbers):
            numbers = numbers[((np.arange(clips) + 0.5) * len(numbers) / clips).astype(np.int64)]
        for number in numbers.tolist():
            start = number * frames
            real = min(frames, total - start)
            chosen = start + np.arange(frames) % real
            blank = (np.arange(frames) >= real) & mode.blanks_repeats
            plans.append(ClipPlan(position, -1, chosen, no_flip, no_crop, no_erase, blank))
    return plans


def evaluation_clip_counts(
    totals: np.ndarray, frames: int, clips: int | None = None, mode: Guidance = MODES["aligned"]
) -> np.ndarray:
    """How many clips `evaluation_clips` makes of tracklets of so many frames: int64 [N] -> int64 [N]."""
    most = min(limit for limit in (mode.most_clips, clips, np.iinfo(np.int64).max) if limit is not None)
    return np.minimum(-(-totals.astype(np.int64) // frames), most)


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


@functools.cache
def _nothing(frames: int) -> np.ndarray:
    nothing = np.zeros(frames, bool)
    nothing.flags.writeable = False
    return nothing
