"""To and from the files of the published pipeline.

Its layout is a tree beside the pictures' own: for `ROOT/bbox_train/0001/0001C1T0001F001.jpg` there is
`TREE/bbox_train/0001/0001C1T0001F001.pose`, JSON of 17 lists [x, y, confidence] in pixels of the picture (all zeros:
nobody found), and in a tree of heatmaps `...F001.npy`, float64 [6, H, W] at the picture's size. Both are read into the
files that keyreid keeps, one for each tracklet, and written back from them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from keyreid.datasets.frames import frame_hashes, read_frame
from keyreid.datasets.tracklet import Dataset, Tracklet, check_keypoints
from keyreid.errors import DataError
from keyreid.pose import heatmap_files, keypoint_files
from keyreid.pose.heatmaps import check_heatmaps, render_heatmaps
from keyreid.pose.keypoint_files import KeypointFile, frame_names
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
    dataset: Dataset, root: Path, tree: Path, out: Path, dtype: str | None = None, max_missing: int = 0
) -> Moved:
    """Read a tree of `.pose` files into keypoint files; a frame without one gets zeros.

    The published files hold no score; it becomes the mean confidence of the 17 joints.

    Args:
        root: the dataset's folder, which the tree mirrors.
        dtype: of the stored keypoints, `float16` or, without one, `float32`.
        max_missing: frames without a file before it is an error.

    Raises:
        DataError: a file is not a pose, frames are not picture files, or too many have none.
    """
    moved, nobody = Moved(), np.zeros((NUM_KEYPOINTS, 3), np.float32)
    made = {"tool": "import of .pose files", "tree": tree.resolve().name}
    for tracklet, paths in _walk(dataset, root, tree, ".pose", "importing poses", moved):
        keypoints = np.stack(list(_read(paths, _read_pose, nobody, moved, max_missing)))
        names, pictures = frame_names(tracklet), frame_hashes(tracklet.frames)
        file = KeypointFile(keypoints, keypoints[..., 2].mean(1), names, made, pictures)
        keypoint_files.save(keypoint_files.path_of(out, tracklet.key), file, dtype or "float32")
    return moved


def import_heatmaps(
    dataset: Dataset, root: Path, tree: Path, out: Path, dtype: str | None = None, max_missing: int = 0
) -> Moved:
    """Read a tree of `.npy` heatmaps into heatmap files; a frame without one gets [6, 1, 1] zeros.

    `dtype` of what is stored is `float16`, `float32` or `float64`; None keeps each file's.
    """
    moved, nobody = Moved(), np.zeros((6, 1, 1))
    provenance = {"tool": "import of .npy heatmaps", "tree": tree.resolve().name, "dtype": dtype}
    for tracklet, paths in _walk(dataset, root, tree, ".npy", "importing heatmaps", moved):
        heatmaps = _read(paths, _read_heatmap, nobody, moved, max_missing)
        stored = (heatmap.astype(dtype or heatmap.dtype) for heatmap in heatmaps)
        names, pictures = frame_names(tracklet), frame_hashes(tracklet.frames)
        heatmap_files.save(heatmap_files.path_of(out, tracklet.key), stored, names, provenance, pictures)
    return moved


def export_tree(dataset: Dataset, root: Path, files: Path, tree: Path, kind: Literal["pose", "npy"]) -> Moved:
    """Write a tree of `.pose` files, or of float64 `.npy` from heatmap files or else rendered from keypoint files."""
    moved = Moved()
    for tracklet, paths in _walk(dataset, root, tree, f".{kind}", "exporting", moved):
        frames = _keypoints(files, tracklet) if kind == "pose" else _heatmaps(files, tracklet)
        for path, frame in zip(paths, frames, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "pose":
                path.write_text(json.dumps(frame.astype(np.float64).tolist(), indent=4))
            else:
                np.save(path, frame.astype(np.float64))
    return moved


def _walk(
    dataset: Dataset, root: Path, tree: Path, suffix: str, doing: str, moved: Moved
) -> Iterator[tuple[Tracklet, list[Path]]]:
    """Each tracklet with its frames' files in the tree; counts those that were dealt with."""
    for tracklet in track(dataset.tracklets, len(dataset.tracklets), doing, "tracklets"):
        for frame in tracklet.frames:
            if frame.box is not None or frame.video_frame is not None:
                raise DataError(f"{frame.path}: the published layout has one file a picture file; this is part of one")
            if not frame.path.is_relative_to(root):
                raise DataError(f"{frame.path} does not lie in {root}, whose folders the tree mirrors")
        yield tracklet, [(tree / frame.path.relative_to(root)).with_suffix(suffix) for frame in tracklet.frames]
        moved.tracklets += 1
        moved.frames += len(tracklet.frames)


def _read(
    paths: list[Path], read: Callable[[Path], np.ndarray], nobody: np.ndarray, moved: Moved, max_missing: int
) -> Iterator[np.ndarray]:
    """What the files hold, and `nobody` for those that are missing."""
    for path in paths:
        if path.is_file():
            yield read(path)
        elif (before := len(moved.missing)) >= max_missing:
            raise DataError(f"{path} is missing, with {before} before it; --max-missing allows {max_missing}")
        else:
            moved.missing.append(str(path))
            yield nobody


def _read_pose(path: Path) -> np.ndarray:
    try:
        pose = np.array(json.loads(path.read_text()), np.float32)
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{path}: not a .pose file ({error})") from None
    check_keypoints(str(path), pose[None], 1)
    return pose


def _read_heatmap(path: Path) -> np.ndarray:
    try:
        heatmap = np.asarray(np.load(path, allow_pickle=False))  # not an .npz
    except Exception as error:  # NumPy raises many kinds
        raise DataError(f"{path}: not a heatmap file ({error})") from None
    check_heatmaps(path, heatmap)
    return heatmap


def _keypoints(files: Path, tracklet: Tracklet) -> np.ndarray:
    path = keypoint_files.path_of(files, tracklet.key)
    return keypoint_files.load(path, tracklet, frame_hashes(tracklet.frames)).keypoints


def _heatmaps(files: Path, tracklet: Tracklet) -> Iterator[np.ndarray]:
    stored = heatmap_files.path_of(files, tracklet.key)
    if stored.exists():
        yield from (heatmap for _, heatmap in heatmap_files.load(stored, tracklet, frame_hashes(tracklet.frames)))
    else:
        for frame, joints in zip(tracklet.frames, _keypoints(files, tracklet), strict=True):
            height, width = decode(read_frame(frame)[0]).shape[:2]
            yield render_heatmaps(joints[None], width, height)[0]
