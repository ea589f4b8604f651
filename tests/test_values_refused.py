"""Numbers that cannot be are refused where they enter, with the file and the sample that they are of."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from packed import make_config, make_dataset, pack_dataset

from keyreid.config import check_config
from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.errors import ConfigError, DataError
from keyreid.pose import heatmap_files, imports, keypoint_files
from keyreid.shards import members

WRONG = {
    "NaN": (0, np.nan),
    "infinite": (1, np.inf),
    "confidence NaN": (2, np.nan),
    "confidence 2": (2, 2.0),
    "confidence below 0": (2, -0.5),
}


def keypoints(what: str) -> np.ndarray:
    """[3, 17, 3] of which frame 1 has something wrong."""
    right = np.full((3, 17, 3), 0.5, np.float32)
    column, value = WRONG[what]
    right[1, 4, column] = value
    return right


@pytest.mark.parametrize("what", WRONG)
def test_keypoint_files(tmp_path, what):
    path = tmp_path / "0001C1T0001.npz"
    wrong = keypoints(what)
    file = keypoint_files.KeypointFile(wrong, np.ones(3), ("a", "b", "c"))
    with pytest.raises(DataError, match=r"0001C1T0001\.npz: frame 1: keypoints must be finite"):
        keypoint_files.save(path, file)
    np.savez(path, keypoints=wrong, scores=np.ones(3), frame_names=["a", "b", "c"], provenance="{}")
    with pytest.raises(DataError, match=r"0001C1T0001\.npz: .*frame 1: keypoints must be finite"):
        keypoint_files.load(path)
    with pytest.raises(DataError, match="tracklet 0001C1T0001: frame 1: keypoints must be finite"):
        Tracklet("0001C1T0001", 1, 1, "train", tuple(Frame(Path(name)) for name in "abc"), wrong)


def test_float16_that_overflows_and_scores(tmp_path):
    far = np.full((1, 17, 3), 1e5, np.float32)
    far[..., 2] = 1
    file = keypoint_files.KeypointFile(far, np.ones(1), ("a",))
    keypoint_files.save(tmp_path / "a.npz", file)
    with pytest.raises(DataError, match=r"b\.npz: frame 0"), np.errstate(over="ignore"):
        keypoint_files.save(tmp_path / "b.npz", file, "float16")
    with pytest.raises(DataError, match="scores that are not finite"):
        keypoint_files.KeypointFile(far, np.array([np.nan]), ("a",))


@pytest.mark.parametrize("what", WRONG)
def test_pose_files(tmp_path, what):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((64, 32, 3), np.uint8))
    dataset = Dataset("own", (Tracklet("t", 1, 1, "train", (Frame(tmp_path / "a.jpg"),)),))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a.pose").write_text(json.dumps(keypoints(what)[1].tolist()))
    with pytest.raises(DataError, match=r"tree/a\.pose: .*keypoints must be finite"):
        imports.import_poses(dataset, tmp_path, tmp_path / "tree", tmp_path / "kp")
    (tmp_path / "tree/a.pose").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"tree/a\.pose: not a \.pose file"):
        imports.import_poses(dataset, tmp_path, tmp_path / "tree", tmp_path / "kp")


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5, 1 + 0.5j, "text"])
def test_heatmaps(tmp_path, value):
    dataset = make_dataset(tmp_path / "source", identities=1, tracklets=1, frames=(1, 1))
    name = dataset.tracklets[0].frames[0].path.relative_to(tmp_path / "source").with_suffix(".npy")
    (tmp_path / "npy" / name).parent.mkdir(parents=True)
    heatmap = np.zeros((6, 8, 4)).astype(type(value))
    heatmap[2, 3, 1] = value
    np.save(tmp_path / "npy" / name, heatmap)
    with pytest.raises(DataError, match=rf"{name.name}: heatmap"):
        pack_dataset(dataset, tmp_path / "source", tmp_path / "out", heatmaps=tmp_path / "npy")
    with pytest.raises(DataError, match=rf"{name.name}: heatmap"):
        imports.import_heatmaps(dataset, tmp_path / "source", tmp_path / "npy", tmp_path / "kp")
    names = keypoint_files.frame_names(dataset.tracklets[0])
    heatmap_files.save(heatmap_files.path_of(tmp_path / "kp", dataset.tracklets[0].key), [heatmap], names, {})
    with pytest.raises(DataError, match=r"T0000\.heatmaps\.npz: heatmap"):
        pack_dataset(dataset, tmp_path / "source", tmp_path / "out", heatmaps=tmp_path / "kp")


def test_keypoints_in_shards():
    wrong = members.encode_keypoints(keypoints("NaN"))
    with pytest.raises(ValueError, match="not finite"):
        members.decode_keypoints(wrong, 3)


@pytest.mark.parametrize("box", [(0, 0, -5, 9), (0, 0, 5, 0), (0, 0, 0, 0), (np.nan, 0, 5, 9), (0, 0, np.inf, 9)])
def test_boxes_without_an_area(box):
    with pytest.raises(DataError, match=r"street\.jpg: a box of .*it must have an area"):
        Frame(Path("street.jpg"), box)


@pytest.mark.parametrize(
    "setting",
    [
        {"optimizer": {"betas": [2, 3]}},
        {"optimizer": {"betas": [0.9, 1.0]}},
        {"optimizer": {"betas": [-0.1, 0.9]}},
        {"data": {"shards": "x", "augment": {"erase_area": [-0.2, 0.4]}}},
        {"data": {"shards": "x", "augment": {"erase_area": [0.02, 1.5]}}},
        {"data": {"shards": "x", "augment": {"erase_aspect": [0, 3]}}},
    ],
)
def test_settings(setting):
    make_config("x", optimizer__betas=(0.0, 0.5))
    with pytest.raises(ConfigError, match=r"betas|erase_area|erase_aspect"):
        check_config({"data": {"shards": "x"}, **setting}, "test")
