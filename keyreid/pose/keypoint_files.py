"""Keypoint files: one `.npz` a tracklet, `DIR/KEY.npz`, that holds what was found in its frames and by what.

Arrays: `keypoints` [T, 17, 3] (float32, or float16 where half the size matters more than a pixel: float16 moves 6 %
of joints of a 256 x 128 picture across a pixel's border), `scores` float32 [T], `frame_names` [T], `provenance` (a
JSON object). No pickle. Bytes depend on the content alone, so two runs can be compared by their files.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.datasets.tracklet import Frame, Tracklet
from keyreid.errors import DataError
from keyreid.files import replacing
from keyreid.pose.parts import NUM_KEYPOINTS


@dataclass(frozen=True)
class KeypointFile:
    """Keypoints of one tracklet."""

    keypoints: np.ndarray  # [T, 17, 3]: x, y in pixels of the frame, confidence; COCO order; confidence 0 is missing
    scores: np.ndarray  # [T], of the poses; 0 where no person was found (then the frame's keypoints are zeros)
    frame_names: tuple[str, ...]  # file names, in order, so that a file is never joined to other frames
    provenance: dict[str, Any] = field(default_factory=dict)  # tool, checkpoint and its hash, settings

    def __post_init__(self) -> None:
        frames, shapes = len(self.frame_names), (self.keypoints.shape, self.scores.shape)
        if shapes != ((frames, NUM_KEYPOINTS, 3), (frames,)):
            given = f"keypoints {shapes[0]} and scores {shapes[1]} do not fit {frames} frame names"
            raise DataError(f"{given}; expected [T, {NUM_KEYPOINTS}, 3] and [T]")


def frame_name(frame: Frame) -> str:
    """What a frame is called in keypoint files: its file's name, with the video frame and the box where it has them."""
    name = frame.path.name
    if frame.video_frame is not None:
        name += f"#{frame.video_frame}"
    if frame.box is not None:
        name += "@" + ",".join(f"{value:g}" for value in frame.box)
    return name


def frame_names(tracklet: Tracklet) -> tuple[str, ...]:
    """The names of a tracklet's frames, in order."""
    return tuple(frame_name(frame) for frame in tracklet.frames)


def path_of(directory: Path, key: str) -> Path:
    """Where the keypoints of the tracklet `key` lie below a folder of keypoint files."""
    return directory / f"{key}.npz"


def save(path: Path, file: KeypointFile, dtype: str = "float32", durable: bool = True) -> None:
    """Write a keypoint file, keypoints as `float32` or `float16`; it is whole or absent, whenever it is killed.

    With `durable`, wait (milliseconds) until it is on the disk, so that it outlives a machine that loses its power.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            keypoints=file.keypoints.astype(dtype),
            scores=file.scores.astype(np.float32),
            frame_names=np.array(file.frame_names, dtype=np.str_),
            provenance=np.array(json.dumps(file.provenance, sort_keys=True)),
        )
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def load(path: Path) -> KeypointFile:
    """Read a keypoint file; DataError where it is missing, damaged or not one."""
    with reading(path, "keypoint file", "make it with `keyreid pose`") as arrays:
        return KeypointFile(
            keypoints=arrays["keypoints"].astype(np.float32),
            scores=arrays["scores"].astype(np.float32),
            frame_names=tuple(arrays["frame_names"].tolist()),
            provenance=json.loads(str(arrays["provenance"])),
        )


@contextlib.contextmanager
def reading(path: Path, kind: str, mend: str) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an `.npz` of which a tracklet has one; whatever is wrong in it is a DataError that names it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except FileNotFoundError:
        raise DataError(f"{path}: no such {kind}; {mend}") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # NumPy, zipfile and zlib raise many kinds for damaged and forged files
        raise DataError(f"{path}: not a {kind} ({error}); delete it and {mend} again") from None
