"""To and from the files of the published pipeline.

Its layout is a tree beside the pictures' own: for `ROOT/bbox_train/0001/0001C1T0001F001.jpg` there is
`TREE/bbox_train/0001/0001C1T0001F001.pose`, JSON of 17 lists [x, y, confidence] in pixels of the picture (all zeros:
nobody found), and in a tree of heatmaps `...F001.npy`, float64 [6, H, W] at the picture's size. Both are read into the
files that keyreid keeps, one a tracklet, and written back from them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from keyreid.datasets.tracklet import Dataset, Frame, Tracklet, read_frame
from keyreid.errors import DataError
from keyreid.pose import heatmap_files, keypoint_files
from keyreid.pose.heatmaps import render_heatmaps
from keyreid.pose.keypoint_files import KeypointFile, frame_name
from keyreid.pose.parts import NUM_KEYPOINTS
from keyreid.pose.pictures import decode
from keyreid.progress import track


@dataclass
class Moved:
    """How many tracklets and frames were read or written, and which frames' files were not there."""

    tracklets: int = 0
    frames: int = 0
    missing: list[str] = field(default_factory=list)


def import_poses(
    dataset: Dataset, root: Path, tree: Path, out: Path, dtype: str = "float32", max_missing: int = 0
) -> Moved:
    """Read a tree of `.pose` files into keypoint files; a frame without one gets zeros.

    The published files hold no score; it becomes the mean confidence of the 17 joints.

    Args:
        root: the dataset's folder, which the tree mirrors.
        dtype: of the stored keypoints, `float32` or `float16`.
        max_missing: frames without a file before it is an error.

    Raises:
        DataError: a file is not a pose, frames are not picture files, or too many have none.
    """

    def convert(tracklet: Tracklet, paths: list[Path], moved: Moved) -> None:
        keypoints = np.zeros((len(paths), NUM_KEYPOINTS, 3), np.float32)
        for i, path in enumerate(paths):
            if path.is_file():
                keypoints[i] = _read_pose(path)
            else:
                _miss(path, moved, max_missing)
        scores = keypoints[..., 2].mean(1)
        names = tuple(frame_name(frame) for frame in tracklet.frames)
        file = KeypointFile(keypoints, scores, names, {"tool": "import of .pose files"})
        keypoint_files.save(keypoint_files.path_of(out, tracklet.key), file, dtype)

    return _each(dataset, root, tree, ".pose", "importing poses", convert)


def export_poses(dataset: Dataset, root: Path, files: Path, tree: Path) -> Moved:
    """Write keypoint files as a tree of `.pose` files."""

    def convert(tracklet: Tracklet, paths: list[Path], _moved: Moved) -> None:
        for path, keypoints in zip(paths, _keypoints(files, tracklet), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(keypoints.astype(np.float64).tolist(), indent=4))

    return _each(dataset, root, tree, ".pose", "exporting poses", convert)


def import_heatmaps(
    dataset: Dataset, root: Path, tree: Path, out: Path, dtype: str | None = None, max_missing: int = 0
) -> Moved:
    """Read a tree of `.npy` heatmaps into heatmap files; a frame without one gets [6, 1, 1] zeros.

    Args:
        dtype: of the stored heatmaps, `float16`, `float32` or `float64`; None keeps each file's.
    """

    def convert(tracklet: Tracklet, paths: list[Path], moved: Moved) -> None:
        def heatmaps() -> Iterator[np.ndarray]:
            for path in paths:
                if path.is_file():
                    heatmap = _read_heatmap(path)
                    yield heatmap if dtype is None else heatmap.astype(dtype)
                else:
                    _miss(path, moved, max_missing)
                    yield np.zeros((6, 1, 1), dtype or np.float64)

        names = [frame_name(frame) for frame in tracklet.frames]
        provenance = {"tool": "import of .npy heatmaps", "dtype": dtype}
        heatmap_files.save(heatmap_files.path_of(out, tracklet.key), heatmaps(), names, provenance)

    return _each(dataset, root, tree, ".npy", "importing heatmaps", convert)


def export_heatmaps(dataset: Dataset, root: Path, files: Path, tree: Path) -> Moved:
    """Write a tree of float64 `.npy` heatmaps: from heatmap files where there are, else rendered from keypoints."""

    def convert(tracklet: Tracklet, paths: list[Path], _moved: Moved) -> None:
        stored = heatmap_files.path_of(files, tracklet.key)
        if stored.exists():
            heatmaps = (heatmap for _, heatmap in heatmap_files.load(stored))
        else:
            heatmaps = _rendered(tracklet, _keypoints(files, tracklet))
        for path, heatmap in zip(paths, heatmaps, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, heatmap.astype(np.float64))

    return _each(dataset, root, tree, ".npy", "exporting heatmaps", convert)


def _each(
    dataset: Dataset,
    root: Path,
    tree: Path,
    suffix: str,
    what: str,
    convert: Callable[[Tracklet, list[Path], Moved], None],
) -> Moved:
    moved = Moved()
    for tracklet in track(dataset.tracklets, len(dataset.tracklets), what, "tracklets"):
        convert(tracklet, [_place(frame, root, tree, suffix) for frame in tracklet.frames], moved)
        moved.tracklets += 1
        moved.frames += len(tracklet.frames)
    return moved


def _place(frame: Frame, root: Path, tree: Path, suffix: str) -> Path:
    if frame.box is not None or frame.video_frame is not None:
        raise DataError(f"{frame.path}: the published layout has one file a picture file; this frame is a part of one")
    try:
        return (tree / frame.path.relative_to(root)).with_suffix(suffix)
    except ValueError:
        raise DataError(f"{frame.path} does not lie in {root}, whose folders the tree mirrors") from None


def _read_pose(path: Path) -> np.ndarray:
    try:
        pose = np.array(json.loads(path.read_text()), np.float32)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a .pose file ({error})") from None
    if pose.shape != (NUM_KEYPOINTS, 3):
        raise DataError(f"{path}: a pose of shape {pose.shape}, expected 17 joints of x, y, confidence")
    return pose


def _read_heatmap(path: Path) -> np.ndarray:
    try:
        heatmap = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a heatmap file ({error})") from None
    if heatmap.ndim != 3:
        raise DataError(f"{path}: heatmaps of shape {heatmap.shape}, expected [parts, height, width]")
    return heatmap


def _keypoints(files: Path, tracklet: Tracklet) -> np.ndarray:
    path = keypoint_files.path_of(files, tracklet.key)
    file = keypoint_files.load(path)
    names = tuple(frame_name(frame) for frame in tracklet.frames)
    if file.frame_names != names:
        raise DataError(f"{path}: keypoints of other frames than the tracklet's ({file.frame_names[0]} ... )")
    return file.keypoints


def _rendered(tracklet: Tracklet, keypoints: np.ndarray) -> Iterator[np.ndarray]:
    for frame, joints in zip(tracklet.frames, keypoints, strict=True):
        height, width = decode(read_frame(frame)[0]).shape[:2]
        yield render_heatmaps(joints[None], width, height)[0]


def _miss(path: Path, moved: Moved, limit: int) -> None:
    moved.missing.append(str(path))
    if len(moved.missing) > limit:
        raise DataError(f"{path} is missing, with {len(moved.missing) - 1} before it; --max-missing allows {limit}")
