"""The record that every dataset reader gives: a tracklet, short sequence of one person from one camera."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyreid.errors import DataError

JUNK_IDENTITY = -1  # MARS: detections that show no one; never evaluated
DISTRACTOR_IDENTITY = 0  # MARS: people that no query looks for; in the gallery as wrong answers

Split = Literal["train", "query", "gallery", "junk", "all"]
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # no dot: webdataset splits member names at the first one


@dataclass(frozen=True)
class Frame:
    """One picture of a person: a picture file, or a box in a picture or in a frame of a video."""

    path: Path
    box: tuple[float, float, float, float] | None = None  # x, y, width, height in pixels; may leave the picture
    video_frame: int | None = None  # from 0, when `path` is a video

    def __post_init__(self) -> None:
        if self.box is not None and not (np.isfinite(self.box).all() and min(self.box[2:]) > 0):
            raise DataError(f"{self.path}: a box of {self.box} (x, y, width, height); it must have an area")


class Pictures(Sequence[Frame]):
    """Picture files of one folder as frames that are made when they are looked at: names alone are held, 22 bytes each.

    A tuple of frames takes 430 bytes a frame, which a set of ten million tracklets has no room for.
    """

    __slots__ = ("_folder", "_names")

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self._folder, self._names = folder, "\0".join(names)  # no file has this letter in its name

    def __len__(self) -> int:
        return self._names.count("\0") + 1 if self._names else 0

    def __iter__(self) -> Iterator[Frame]:
        return iter(self[:])

    def __getitem__(self, key: int | slice) -> Any:
        names = self._names.split("\0") if self._names else []
        return tuple(self._frame(name) for name in names[key]) if isinstance(key, slice) else self._frame(names[key])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def _frame(self, name: str) -> Frame:
        return Frame(self._folder / name)


@dataclass(frozen=True)
class Tracklet:
    """A tracklet of T frames."""

    key: str  # unique in the dataset; letters, digits, `_` and `-`
    identity: int | None  # JUNK_IDENTITY and DISTRACTOR_IDENTITY have their MARS meaning, None is unknown
    camera: int  # its number, as the dataset counts them
    split: Split  # `all` where it depends on which of several splits the user picks (iLIDS-VID, PRID2011)
    frames: Sequence[Frame]  # in order of time
    # float32 [T, 17, 3]: x, y in pixels of the frame, confidence; COCO order; confidence 0 is missing
    keypoints: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not KEY_PATTERN.fullmatch(self.key):
            raise DataError(f"tracklet key {self.key!r}: only letters, digits, '_' and '-' are allowed")
        if not self.frames:
            raise DataError(f"tracklet {self.key} has no frames")
        if self.keypoints is not None:
            check_keypoints(f"tracklet {self.key}", self.keypoints, len(self.frames))


def check_keypoints(name: str, keypoints: np.ndarray, frames: int) -> None:
    """Raise DataError, with the name, for keypoints that are not numbers [T, 17, 3] or whose confidence is not one."""
    if keypoints.dtype.kind not in "fiu" or keypoints.shape != (frames, 17, 3):
        raise DataError(f"{name}: keypoints {keypoints.dtype} {keypoints.shape} do not fit {frames} frames")
    wrong = ~np.isfinite(keypoints).all((1, 2)) | (np.abs(keypoints[..., 2] - 0.5) > 0.501).any(1)
    if wrong.any():
        raise DataError(f"{name}: frame {wrong.argmax()}: keypoints must be finite, their confidences from 0 to 1")


@dataclass(frozen=True)
class Dataset:
    """All tracklets of a dataset, in its own order, the same on every machine."""

    name: str  # `mars`, `ilids_vid`, ...
    tracklets: tuple[Tracklet, ...]
    # Where there are several train/test splits, each a pair of sorted identities (train, test); then camera
    # `query_camera` queries the others.
    splits: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    query_camera: int | None = None
    # What the numbers stand for, where the dataset uses names: {"identity": {...}, "camera": {...}}.
    names: dict[str, dict[str, int]] = field(default_factory=dict)
    # Of the cameras (by name) whose frames are numbered as in a video of known rate.
    frames_per_second: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, times in Counter(tracklet.key for tracklet in self.tracklets).most_common(1):
            if times > 1:
                raise DataError(f"dataset {self.name}: two tracklets have the key {key}")
