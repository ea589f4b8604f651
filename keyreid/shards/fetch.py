"""What all readers share: a clip's bytes from the shards, checked, its guidance, and what is done with faults.

**Faults.** Whatever cannot be read is a DataError that names the shard, the tracklet and the member, or the URL. Under
`data.on_fault: skip` a frame that cannot be used is replaced by the nearest frame of its tracklet that can, the earlier
one first, up to 16 frames away; after that, in training, by the middle of the identity's next tracklet. That depends on
the shards alone, so it too is the same in every reader and on any ranks.
"""

import abc
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from keyreid.backbones import patch_grid
from keyreid.config import Config
from keyreid.errors import ConfigError, DataError
from keyreid.guidance import named
from keyreid.pose.heatmaps import render_heatmaps, scale_keypoints
from keyreid.pose.parts import flip_permutation, merged_parts
from keyreid.shards import members
from keyreid.shards.batch import ClipBatch, ClipPlan
from keyreid.shards.pooling import pool
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.storage import UnreachableError

NEAREST_FRAMES = 16  # how far away a damaged frame's replacement may be

log = logging.getLogger(__name__)
_LATER = torch.empty(0, dtype=torch.uint8)


@dataclass
class FetchedClip:
    """A clip's bytes: what is left to do is decoding its pictures."""

    pictures: list[Any]  # T, encoded, or what `decode` made of them
    heatmaps: np.ndarray  # uint8 [T, P, 64, 32], or float32 [T, P, H, W] where they are rendered anew
    visible: np.ndarray  # bool [T, P]
    sizes: np.ndarray  # uint16 [T, 2], width and height
    rows: list[tuple[int, int]]  # (position, frame) of each picture that was really read
    faults: dict[str, str]  # what could not be read, as messages by member


@dataclass
class Faults:
    """The members that could not be read so far, and how many may be skipped."""

    policy: str  # stop, or skip
    limit: int  # with skip, how many different members
    messages: dict[str, str] = field(default_factory=dict)  # by member; its length is the count

    def __len__(self) -> int:
        return len(self.messages)

    def add(self, faults: dict[str, str]) -> None:
        """Note what a clip's reading found; DataError where that makes more than the limit."""
        for member, message in faults.items():
            if member not in self.messages:
                self.messages[member] = message
                log.warning("skipped (%d of at most %d): %s", len(self.messages), self.limit, message)
        if len(self.messages) > self.limit:
            raise DataError(
                f"{len(self.messages)} members could not be read, data.max_faults is {self.limit}; the last: {message}"
            )


class Reader(abc.ABC):
    """What every reader is: an iterator of batches, one for each list of clips; `keyreid.shards.open_reader` opens one.

    Attributes:
        wait_seconds: how long the consumer has waited for batches.
        faults: what could not be read (`data.on_fault: skip`).
    """

    def __init__(self, config: Config, device: str) -> None:
        self.device = torch.device(device)
        self.faults = Faults(config.data.on_fault, config.data.max_faults)
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        start = time.perf_counter()
        batch = self._next()
        self.wait_seconds += time.perf_counter() - start
        return batch.to(self.device)

    @abc.abstractmethod
    def _next(self) -> ClipBatch:
        """The next batch, wherever it lies."""

    @abc.abstractmethod
    def close(self) -> None:
        """End its threads or processes."""


class ClipFetcher:
    """Reads the clips of a plan, for one model's patch grid. Thread-safe; may be sent to another process."""

    def __init__(self, shards: ShardSet, config: Config) -> None:
        """Prepare for a configuration; ConfigError where the heatmaps are not of the parts that the model wants."""
        self.grid = patch_grid(config.model, config.clip)  # refuses patches that do not tile the clip
        self.shards = shards
        self.height, self.width = config.clip.height, config.clip.width
        self.parts = config.model.parts
        self.from_keypoints = config.data.guidance_from == "keypoints"
        self.swap = flip_permutation(self.parts) if named(config.model.guidance).swaps_sides else None
        self.skip = config.data.on_fault == "skip"
        if self.parts != shards.parts and shards.parts != 6:
            raise ConfigError(f"model.parts={self.parts}, but {shards.location} has heatmaps of {shards.parts} parts")
        self._last: tuple[int, np.ndarray] | None = None
        self._merged = None if self.parts == shards.parts else [list(united) for united in merged_parts(self.parts)]

    def ahead(self, clips: list[ClipPlan]) -> None:
        """Ask for the bytes of all these clips at once, where the shards are far away; then `fetch` each."""
        frames = ((clip.tracklet, frame) for clip in clips for frame in clip.frames.tolist())
        self.shards.ahead(frames, self.from_keypoints)

    def fetch(self, clip: ClipPlan, decode: Callable[[bytes], Any] | None = None) -> FetchedClip:
        """Read a clip's members; DataError where one cannot be used or replaced.

        Args:
            decode: applied to each picture, its result taken instead of the bytes; a ValueError is a fault.
        """
        pictures, heatmaps, rows, faults = [], [], [], {}
        for frame in clip.frames.tolist():
            for position, candidate in self._candidates(clip, frame):
                try:
                    picture, heatmap = self._frame(position, candidate, decode)
                except DataError as error:
                    faults[f"{self.shards.tracklets[position].key} {candidate}"] = str(error)
                    if not self.skip or isinstance(error, UnreachableError):
                        raise
                    continue
                pictures.append(picture)
                heatmaps.append(heatmap)
                rows.append((position, candidate))
                break
            else:
                raise DataError("nothing is left to replace it: " + next(iter(faults.values())))
        at = [int(self.shards.index.first_frame[position]) + candidate for position, candidate in rows]
        visible, sizes = self.shards.index.seen(at), self.shards.index.sizes(at)
        stacked = np.stack(heatmaps)
        if self.from_keypoints:
            stacked = scale_keypoints(stacked, sizes[:, 0], sizes[:, 1], self.width, self.height)
            stacked = render_heatmaps(stacked, self.width, self.height, self.parts)
        if self._merged:
            visible = np.stack([visible[:, united].any(1) for united in self._merged], 1)
            if not self.from_keypoints:
                stacked = np.stack([stacked[:, united].max(1) for united in self._merged], 1)
        return FetchedClip(pictures, stacked, visible, sizes, rows, faults)

    def batch(self, clips: list[ClipPlan], fetched: list[FetchedClip], images: torch.Tensor = _LATER) -> ClipBatch:
        """A batch of clips of the same length; `images`, uint8 [B, T, 3, H, W], may be put in later."""
        changes = ("flip", "crop", "erase", "blank")
        flip, crop, erase, blank = (np.stack([getattr(clip, name) for clip in clips]) for name in changes)
        total, frames = flip.shape
        heatmaps = np.concatenate([clip.heatmaps for clip in fetched], dtype=np.float32, casting="unsafe")
        one = 1.0 if self.from_keypoints else 255.0
        grid = pool(heatmaps, self.grid, flip.reshape(-1), crop.reshape(-1, 2), erase.reshape(-1, 4), one)
        grid = grid.reshape(total, frames, *grid.shape[1:])
        visible = np.stack([clip.visible for clip in fetched])
        if self.swap is not None:
            grid = np.where(flip[..., None, None, None], grid[:, :, self.swap], grid)
            visible = np.where(flip[..., None], visible[:, :, self.swap], visible)
        grid[blank] = 0
        visible = visible & ~blank[..., None]
        positions = np.array([clip.rows[0][0] for clip in fetched])  # the plan's, unless it was replaced
        shards = self.shards
        return ClipBatch(
            images=images,
            guidance=torch.from_numpy(grid),
            erase=torch.from_numpy(erase.astype(np.int32)),
            visibility=torch.from_numpy(visible.mean(1, dtype=np.float32)),
            labels=torch.tensor([clip.label for clip in clips]),
            identities=torch.from_numpy(shards.identities[positions]),
            cameras=torch.tensor([shards.camera_index[camera] for camera in shards.cameras[positions].tolist()]),
            tracklets=torch.from_numpy(positions),
            keys=shards.index.keys(positions).tolist(),
        )

    def _frame(self, position: int, frame: int, decode: Callable[[bytes], Any] | None) -> tuple[Any, np.ndarray]:
        member = members.picture_member(frame)
        picture, heatmap = self.shards.read_frame(position, frame)
        try:
            decoded = picture if decode is None else decode(picture)
            if self.from_keypoints:
                return decoded, self._keypoints(position)[frame]
            member += 1
            return decoded, members.decode_tiles(heatmap, self.shards.parts)
        except ValueError as error:
            raise self.shards.fault(position, member, str(error)) from None

    def _keypoints(self, position: int) -> np.ndarray:
        """A tracklet's keypoints; the frames of a clip come one after the other, so the last tracklet's are kept."""
        last = self._last  # other threads may replace it at any time
        if last is None or last[0] != position:
            last = self._last = position, self.shards.keypoints(position)
        return last[1]

    def _candidates(self, clip: ClipPlan, frame: int) -> Iterator[tuple[int, int]]:
        """The frame that is wanted, then those that may replace it."""
        yield clip.tracklet, frame
        if not self.skip:
            return
        total = int(self.shards.index.frames[clip.tracklet])
        for away in range(1, NEAREST_FRAMES + 1):
            yield from ((clip.tracklet, f) for f in (frame - away, frame + away) if 0 <= f < total)
        if clip.label < 0:
            return
        same = self.shards.index.of_identities(self.shards.index.person[[clip.tracklet]])
        for other in np.roll(same, -1 - int(np.searchsorted(same, clip.tracklet)))[:-1].tolist():
            record = self.shards.tracklets[other]
            if record.split == self.shards.tracklets[clip.tracklet].split:
                yield other, record.frames // 2
