"""Keypoint files: one `.npz` a tracklet, `DIR/KEY.npz`, that holds what was found in its frames and by what.

Arrays: `keypoints` [T, 17, 3] (float32, or float16 where half the size matters more than a pixel: float16 moves 6 %
of joints of a 256 x 128 picture across a pixel's border), `scores` float32 [T], `frame_names` [T], `pictures` [T],
`provenance` (a JSON object). No pickle. Bytes depend on the content alone, so two runs can be compared by their files.

A file is joined to a tracklet by its key, the names of its frames and what their pictures were.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.datasets.tracklet import Frame, Tracklet, check_keypoints
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
    # What the keypoints were found in: `frames.frame_hashes`. None in files of versions that did not record it.
    pictures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        frames, shapes = len(self.frame_names), (self.keypoints.shape, self.scores.shape)
        if shapes != ((frames, NUM_KEYPOINTS, 3), (frames,)):
            given = f"keypoints {shapes[0]} and scores {shapes[1]} do not fit {frames} frame names"
            raise DataError(f"{given}; expected [T, {NUM_KEYPOINTS}, 3] and [T]")
        if not np.isfinite(self.scores).all():
            raise DataError("scores that are not finite")


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


def shared_names(tracklets: Iterable[Tracklet]) -> set[str]:
    """Names that frames of several tracklets have, and which therefore do not tell whose a file is."""
    counts = Counter(name for tracklet in tracklets for name in set(frame_names(tracklet)))
    return {name for name, count in counts.items() if count > 1}


def _check_joined(tracklet: Tracklet, hashes: Sequence[str], names: Sequence[str], pictures: Sequence[str]) -> None:
    """Refuse (DataError) a file with these names and pictures for a tracklet of other frames, or of other `hashes`."""
    again, own = "make it again (keyreid pose, pose-import)", frame_names(tracklet)
    if len(names) != len(own):
        raise DataError(f"keypoints of {len(names)} frames; its tracklet has {len(own)}; {again}")
    for number, (name, now) in enumerate(zip(names, own, strict=True)):
        frame = f"frame {number} of tracklet {tracklet.key}, {tracklet.frames[number].path}"
        if name != now:
            raise DataError(f"was made from {name}, which is not {frame} ({now}); {again}")
        if pictures and hashes and pictures[number] != hashes[number]:
            raise DataError(f"was made from another picture than {frame} now is; {again}")


def path_of(directory: Path, key: str) -> Path:
    """Where the keypoints of the tracklet `key` lie below a folder of keypoint files."""
    return directory / f"{key}.npz"


def save(path: Path, file: KeypointFile, dtype: str = "float32", durable: bool = True) -> None:
    """Write a keypoint file, keypoints as `float32` or `float16`; it is whole or absent, whenever it is killed.

    With `durable`, wait (milliseconds) until it is on the disk, so that it outlives a machine that loses its power.
    """
    keypoints = file.keypoints.astype(dtype)
    check_keypoints(str(path), keypoints, len(file.frame_names))
    pictures = {"pictures": np.array(file.pictures, np.str_)} if file.pictures else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as stream:
        np.savez_compressed(
            stream,
            **pictures,
            keypoints=keypoints,
            scores=file.scores.astype(np.float32),
            frame_names=np.array(file.frame_names, dtype=np.str_),
            provenance=np.array(json.dumps(file.provenance, sort_keys=True)),
        )
        if durable:
            stream.flush()
            os.fsync(stream.fileno())


def load(path: Path, tracklet: Tracklet | None = None, hashes: Sequence[str] = ()) -> KeypointFile:
    """Read a keypoint file; DataError where it is missing, damaged or not one.

    Args:
        tracklet: to which the file shall be joined: DataError where it was made from frames of other names.
        hashes: `frames.frame_hashes` of the tracklet: DataError where it says that it was made from others.
    """
    with reading(path, "keypoint file", "make it with `keyreid pose`") as arrays:
        (names, pictures), keypoints = frames_of(arrays, tracklet, hashes), arrays["keypoints"]
        check_keypoints("it", keypoints, len(names))
        return KeypointFile(
            keypoints=keypoints.astype(np.float32),
            scores=arrays["scores"].astype(np.float32),
            frame_names=names,
            provenance=json.loads(str(arrays["provenance"])),
            pictures=pictures,
        )


def frames_of(
    arrays: np.lib.npyio.NpzFile, tracklet: Tracklet | None = None, hashes: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of frames, and what their pictures were, in a file of one tracklet; the others as for `load`."""
    names, pictures = (tuple(map(str, arrays[n].tolist())) if n in arrays else () for n in ("frame_names", "pictures"))
    if pictures and len(pictures) != len(names):
        raise DataError(f"{len(pictures)} pictures for {len(names)} frames")
    if tracklet is not None:
        _check_joined(tracklet, hashes, names, pictures)
    return names, pictures


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
