"""Heatmap files: the part heatmaps of one tracklet's frames, as somebody else's pipeline made them, in a small `.npz`.

keyreid itself keeps keypoints and renders heatmaps from them. This is for heatmaps that come without keypoints: the
published pipeline writes one float64 file of 6 x H x W a frame, 1.57 MB at 256 x 128, almost all of it zeros.
`KEY.heatmaps.npz` holds `frame_names`, `pictures` and `provenance` as keypoint files do, and `heatmap_0000`, ...
[P, H, W], read frame by frame.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.datasets.tracklet import Tracklet
from keyreid.files import replacing
from keyreid.pose.keypoint_files import frames_of, reading


def path_of(directory: Path, key: str) -> Path:
    """Where the heatmaps of the tracklet `key` lie below a folder."""
    return directory / f"{key}.heatmaps.npz"


def save(
    path: Path,
    heatmaps: Iterable[np.ndarray],
    frame_names: Iterable[str],
    provenance: dict[str, Any],
    pictures: Iterable[str] = (),
) -> None:
    """Write a whole heatmap file, one frame in memory at a time: [P, H, W] of any size, stored with its own type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for i, heatmap in enumerate(heatmaps):
            _add(archive, f"heatmap_{i:04d}", np.ascontiguousarray(heatmap))
        _add(archive, "frame_names", np.array(list(frame_names), np.str_))
        _add(archive, "pictures", np.array(list(pictures), np.str_))
        _add(archive, "provenance", np.array(json.dumps(provenance, sort_keys=True)))


def load(path: Path, tracklet: Tracklet | None = None, hashes: Sequence[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """Read each frame's name and heatmaps [P, H, W]; arguments and errors as for keypoint files."""
    with reading(path, "heatmap file", "make it with `keyreid pose-import --kind npy`") as arrays:
        for i, name in enumerate(frames_of(arrays, tracklet, hashes)[0]):
            yield name, arrays[f"heatmap_{i:04d}"]


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    member = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed, so that bytes depend on the content alone
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w", force_zip64=True) as stream:
        np.lib.format.write_array(stream, array, allow_pickle=False)
