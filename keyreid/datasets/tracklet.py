"""The record that every dataset reader gives: a tracklet, short sequence of one person from one camera."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True)
class Tracklet:
    """A tracklet of T frames."""

    key: str  # unique in the dataset; letters, digits, `_` and `-`
    identity: int | None  # JUNK_IDENTITY and DISTRACTOR_IDENTITY have their MARS meaning, None is unknown
    camera: int  # its number, as the dataset counts them
    split: Split  # `all` where it depends on which of several splits the user picks (iLIDS-VID, PRID2011)
    frames: tuple[Frame, ...]  # in order of time
    # float32 [T, 17, 3]: x, y in pixels of the frame, confidence; COCO order; confidence 0 is missing
    keypoints: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not KEY_PATTERN.fullmatch(self.key):
            raise DataError(f"tracklet key {self.key!r}: only letters, digits, '_' and '-' are allowed")
        if not self.frames:
            raise DataError(f"tracklet {self.key} has no frames")
        if self.keypoints is not None and self.keypoints.shape != (len(self.frames), 17, 3):
            shape = self.keypoints.shape
            raise DataError(f"tracklet {self.key}: keypoints {shape} do not fit its {len(self.frames)} frames")


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
