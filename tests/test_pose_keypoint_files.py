"""Keypoint files: what is written is read back, and a damaged file says so."""

import numpy as np
import pytest

from keyreid.errors import DataError
from keyreid.pose import keypoint_files
from keyreid.pose.keypoint_files import KeypointFile


def example(frames: int = 3) -> KeypointFile:
    rng = np.random.default_rng(0)
    return KeypointFile(
        keypoints=rng.uniform(0, (200, 200, 1), (frames, 17, 3)).astype(np.float32),
        scores=rng.uniform(0, 1, frames).astype(np.float32),
        frame_names=tuple(f"0001C1T0001F{i:03d}.jpg" for i in range(frames)),
        provenance={"tool": "test", "threshold": 0.15},
    )


def test_round_trip_and_same_bytes(tmp_path):
    path = keypoint_files.path_of(tmp_path / "new", "0001C1T0001")
    file = example()
    keypoint_files.save(path, file)
    loaded = keypoint_files.load(path)
    np.testing.assert_array_equal(loaded.keypoints, file.keypoints)
    np.testing.assert_array_equal(loaded.scores, file.scores)
    assert (loaded.frame_names, loaded.provenance) == (file.frame_names, file.provenance)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing partial stays
    first = path.read_bytes()
    keypoint_files.save(path, loaded)
    assert path.read_bytes() == first


def test_float16_halves_the_file_and_keeps_its_precision(tmp_path):
    file = example(100)
    for dtype in ("float32", "float16"):
        keypoint_files.save(tmp_path / f"{dtype}.npz", file, dtype)
    loaded = keypoint_files.load(tmp_path / "float16.npz")
    np.testing.assert_array_equal(loaded.keypoints, file.keypoints.astype(np.float16).astype(np.float32))
    assert (tmp_path / "float16.npz").stat().st_size < 0.65 * (tmp_path / "float32.npz").stat().st_size


def test_no_frames_name_twice_or_shapes_that_do_not_fit():
    with pytest.raises(DataError, match="do not fit 2 frame names"):
        KeypointFile(np.zeros((3, 17, 3)), np.zeros(3), ("a", "b"))


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "text", "other arrays", "pickle"])
def test_a_bad_file_is_named(tmp_path, damage):
    path = tmp_path / "k.npz"
    keypoint_files.save(path, example(50))
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        path.write_bytes(whole[:300] + bytes(b ^ 255 for b in whole[300:600]) + whole[600:])
    elif damage == "text":
        path.write_text("not an archive")
    elif damage == "other arrays":
        np.savez(path, keypoints=np.zeros((1, 17, 3)))
    else:
        np.savez(path, keypoints=np.array([{}], object), scores=np.zeros(1), frame_names=np.array(["a"]))
    with pytest.raises(DataError, match=r"k\.npz"):
        keypoint_files.load(path)
