"""The published pipeline's files, in and out: nothing is lost on the way."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.errors import DataError
from keyreid.pose import heatmap_files, imports, keypoint_files
from keyreid.pose.heatmaps import render_heatmaps

SIZES = {"0001C1T0001": (128, 256), "0002C2T0001": (37, 91)}


@pytest.fixture
def dataset(tmp_path) -> tuple[Dataset, Path]:
    """Two tracklets of three and two pictures of different sizes, in MARS's folders."""
    root = tmp_path / "mars"
    tracklets = []
    for key, (width, height) in SIZES.items():
        paths = [root / "bbox_train" / key[:4] / f"{key}F{i:03d}.jpg" for i in range(1, 4 if width == 128 else 3)]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))
        tracklets.append(Tracklet(key, int(key[:4]), int(key[5]), "train", tuple(Frame(path) for path in paths)))
    return Dataset("mars", tuple(tracklets)), root


def published_pose(path: Path, keypoints: np.ndarray) -> None:
    """A .pose file as the published extraction writes it: a JSON list of 17 lists, indented by four."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([[float(value) for value in joint] for joint in keypoints], indent=4))


def random_keypoints(seed: int, width: int, height: int) -> np.ndarray:
    keypoints = np.random.default_rng(seed).uniform([0, 0, 0], [width, height, 1], (17, 3)).astype(np.float32)
    keypoints[3] = 0
    return keypoints


def test_pose_trees_return_byte_for_byte(dataset, tmp_path):
    data, root = dataset
    tree = tmp_path / "keypoints"
    frames = [(tracklet, frame) for tracklet in data.tracklets for frame in tracklet.frames]
    for seed, (tracklet, frame) in enumerate(frames):
        published_pose(
            tree / frame.path.relative_to(root).with_suffix(".pose"), random_keypoints(seed, *SIZES[tracklet.key])
        )
    moved = imports.import_poses(data, root, tree, tmp_path / "files")
    assert (moved.tracklets, moved.frames, moved.missing) == (2, 5, [])
    loaded = keypoint_files.load(tmp_path / "files/0002C2T0001.npz")
    np.testing.assert_array_equal(loaded.keypoints[1], random_keypoints(4, 37, 91))
    assert loaded.frame_names == ("0002C2T0001F001.jpg", "0002C2T0001F002.jpg")

    imports.export_tree(data, root, tmp_path / "files", tmp_path / "back", "pose")
    originals = sorted(path.relative_to(tree) for path in tree.rglob("*.pose"))
    assert sorted(path.relative_to(tmp_path / "back") for path in (tmp_path / "back").rglob("*.*")) == originals
    for path in originals:
        assert (tmp_path / "back" / path).read_bytes() == (tree / path).read_bytes()

    imports.import_poses(data, root, tree, tmp_path / "half", "float16")
    half = keypoint_files.load(tmp_path / "half/0001C1T0001.npz").keypoints
    whole = keypoint_files.load(tmp_path / "files/0001C1T0001.npz").keypoints
    np.testing.assert_array_equal(half, whole.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_heatmap_trees_return_as_they_were(dataset, tmp_path, dtype):
    data, root = dataset
    tree, originals = tmp_path / "heatmaps", {}
    for seed, tracklet in enumerate(data.tracklets):
        for frame in tracklet.frames:
            width, height = SIZES[tracklet.key]
            heatmap = render_heatmaps(random_keypoints(seed, width, height)[None], width, height)[0]
            heatmap = heatmap.astype(np.float64) * 0.987654321  # not a Gaussian of ours, and no float32 either
            path = frame.path.relative_to(root).with_suffix(".npy")
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            np.save(tree / path, heatmap)
            originals[path] = heatmap
    imports.import_heatmaps(data, root, tree, tmp_path / "files", dtype)
    imports.export_tree(data, root, tmp_path / "files", tmp_path / "back", "npy")
    for path, heatmap in originals.items():
        back = np.load(tmp_path / "back" / path)
        assert back.dtype == np.float64
        np.testing.assert_array_equal(back, heatmap.astype(dtype or np.float64).astype(np.float64))
    stored = sum(path.stat().st_size for path in (tmp_path / "files").iterdir())
    assert stored < 0.1 * sum(heatmap.nbytes for heatmap in originals.values())


def test_heatmaps_are_rendered_from_keypoint_files(dataset, tmp_path):
    data, root = dataset
    for tracklet in data.tracklets:
        keypoints = np.stack([random_keypoints(i, *SIZES[tracklet.key]) for i in range(len(tracklet.frames))])
        names = tuple(frame.path.name for frame in tracklet.frames)
        file = keypoint_files.KeypointFile(keypoints, np.ones(len(names), np.float32), names)
        keypoint_files.save(keypoint_files.path_of(tmp_path / "files", tracklet.key), file)
    imports.export_tree(data, root, tmp_path / "files", tmp_path / "back", "npy")
    heatmap = np.load(tmp_path / "back/bbox_train/0002/0002C2T0001F002.npy")
    assert (heatmap.shape, heatmap.dtype) == ((6, 91, 37), np.float64)
    np.testing.assert_allclose(heatmap, render_heatmaps(random_keypoints(1, 37, 91)[None], 37, 91)[0])


def test_what_is_missing_or_broken_is_named(dataset, tmp_path):
    data, root = dataset
    tree = tmp_path / "keypoints"
    for tracklet in data.tracklets:
        for frame in tracklet.frames[1:]:
            published_pose(tree / frame.path.relative_to(root).with_suffix(".pose"), random_keypoints(0, 37, 91))
    with pytest.raises(DataError, match=r"0001C1T0001F001\.pose is missing.*--max-missing allows 0"):
        imports.import_poses(data, root, tree, tmp_path / "files")
    moved = imports.import_poses(data, root, tree, tmp_path / "files", max_missing=2)
    assert len(moved.missing) == 2
    assert not keypoint_files.load(tmp_path / "files/0001C1T0001.npz").keypoints[0].any()

    broken = tree / "bbox_train/0001/0001C1T0001F002.pose"
    for content in ("[[1, 2", "[[1, 2, 3]]", '{"a": 1}'):
        broken.write_text(content)
        with pytest.raises(DataError, match=r"0001C1T0001F002\.pose"):
            imports.import_poses(data, root, tree, tmp_path / "files", max_missing=2)


def test_frames_that_are_no_files_cannot_be_exported(tmp_path):
    data = Dataset("mot", (Tracklet("a", 1, 1, "all", (Frame(tmp_path / "street.jpg", (1, 2, 30, 60)),)),))
    with pytest.raises(DataError, match="one file a picture file"):
        imports.export_tree(data, tmp_path, tmp_path, tmp_path / "tree", "pose")


def test_a_damaged_heatmap_file_is_named(tmp_path):
    path = tmp_path / "k.heatmaps.npz"
    heatmap_files.save(path, [np.zeros((6, 4, 2))], ["a.jpg"], {})
    assert [(name, heatmap.shape) for name, heatmap in heatmap_files.load(path)] == [("a.jpg", (6, 4, 2))]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"k\.heatmaps\.npz"):
        list(heatmap_files.load(path))
