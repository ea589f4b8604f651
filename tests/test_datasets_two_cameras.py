"""iLIDS-VID and PRID2011: people of both cameras, published splits (first half tests), splits drawn by seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from keyreid.datasets import open_dataset
from keyreid.errors import DataError

PEOPLE = [1, 2, 4, 7, 10, 11]  # numbers with holes, as iLIDS-VID has them


def write_people(place: Path, pattern: str, numbers: list[int], frames: int = 3) -> None:
    for number in numbers:
        folder = place / pattern.format(number)
        folder.mkdir(parents=True)
        for frame in range(1, frames + 1):
            (folder / f"{frame:04d}.png").touch()


@pytest.fixture
def ilids(tmp_path: Path) -> Path:
    for camera in ("cam1", "cam2"):
        write_people(tmp_path / "i-LIDS-VID" / "sequences" / camera, "person{:03d}", PEOPLE)
    write_people(tmp_path / "i-LIDS-VID" / "sequences" / "cam2", "person{:03d}", [300])
    folder = tmp_path / "train-test people splits"
    folder.mkdir()
    rows = np.array([[6, 2, 4, 1, 3, 5], [1, 2, 3, 4, 5, 6]])
    scipy.io.savemat(folder / "train_test_splits_ilidsvid.mat", {"ls_set": rows})
    return tmp_path


def test_ilids_first_half_of_a_row_tests(ilids: Path) -> None:
    data = open_dataset("ilids_vid", ilids)
    assert [(t.key, t.identity, t.camera, t.split) for t in data.tracklets[:3]] == [
        ("person001_cam1", 1, 1, "all"),
        ("person001_cam2", 1, 2, "all"),
        ("person002_cam1", 2, 1, "all"),
    ]
    assert len(data.tracklets) == 2 * len(PEOPLE) and data.query_camera == 1
    assert data.splits == (((1, 4, 10), (2, 7, 11)), ((7, 10, 11), (1, 2, 4)))


def test_ilids_opens_from_the_inner_folder_and_with_json(ilids: Path) -> None:
    assert open_dataset("ilids_vid", ilids / "i-LIDS-VID").splits == open_dataset("ilids_vid", ilids).splits
    names = [f"person{number:03d}" for number in PEOPLE]
    path = ilids / "own.json"
    path.write_text(json.dumps([{"train": names[:2], "test": names[2:]}]))
    assert open_dataset("ilids_vid", ilids, splits=str(path)).splits == (((1, 2), (4, 7, 10, 11)),)
    path.write_text(json.dumps([{"train": names[:2], "test": names[1:]}]))
    with pytest.raises(DataError, match="split 0 trains and tests on person 2"):
        open_dataset("ilids_vid", ilids, splits=str(path))
    path.write_text(json.dumps([{"train": ["person300"], "test": names}]))
    with pytest.raises(DataError, match="split 0 names person 300"):
        open_dataset("ilids_vid", ilids, splits=str(path))


def test_ilids_missing_parts_are_named(ilids: Path, tmp_path: Path) -> None:
    (ilids / "train-test people splits" / "train_test_splits_ilidsvid.mat").unlink()
    with pytest.raises(DataError, match=r"train_test_splits_ilidsvid.mat: no such file.*splits=FILE"):
        open_dataset("ilids_vid", ilids)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="sequences: no such folder"):
        open_dataset("ilids_vid", tmp_path / "empty")
    scipy.io.savemat(ilids / "short.mat", {"ls_set": np.array([[1, 2, 3]])})
    with pytest.raises(DataError, match="expected rows that order the 6 people"):
        open_dataset("ilids_vid", ilids, splits=str(ilids / "short.mat"))


def test_prid_keeps_long_sequences_of_shared_people(tmp_path: Path) -> None:
    shots = tmp_path / "prid_2011" / "multi_shot"
    write_people(shots / "cam_a", "person_{:04d}", [1, 2, 3, 4, 5, 250], frames=30)
    write_people(shots / "cam_b", "person_{:04d}", [1, 2, 4, 5, 250], frames=30)
    write_people(shots / "cam_b", "person_{:04d}", [3], frames=26)
    data = open_dataset("prid2011", tmp_path)
    assert {t.identity for t in data.tracklets} == {1, 2, 4, 5}  # 3 is short, 250 are two people
    assert {t.identity for t in open_dataset("prid2011", tmp_path, min_frames=20).tracklets} == {1, 2, 3, 4, 5}
    assert len(data.splits) == 10 and data.splits == open_dataset("prid2011", tmp_path).splits
    assert data.splits != open_dataset("prid2011", tmp_path, seed=1).splits
    for train, test in data.splits:
        assert len(train) == len(test) == 2 and sorted(train + test) == [1, 2, 4, 5]
    (tmp_path / "splits_prid2011.json").write_text(json.dumps([{"train": ["person_0001"], "test": ["person_0002"]}]))
    assert open_dataset("prid2011", tmp_path).splits == (((1,), (2,)),)
    with pytest.raises(DataError, match="0 people have 99 frames"):
        open_dataset("prid2011", tmp_path, min_frames=99)
