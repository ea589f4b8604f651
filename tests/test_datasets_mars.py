"""MARS: the layout, the true counts of its index, and what is said when it does not fit."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from keyreid.datasets import open_dataset
from keyreid.datasets.frames import read_frame
from keyreid.datasets.mars import read_index
from keyreid.errors import ConfigError, DataError

TRAIN = ["0001C1T0001F001.jpg", "0001C1T0001F002.jpg", "0001C2T0001F001.jpg"]
TEST = [
    "00-1C1T0001F001.jpg",
    "0000C2T0001F001.jpg",
    "0002C1T0001F001.jpg",
    "0002C2T0001F001.jpg",
    "0002C2T0001F002.jpg",
]


@pytest.fixture
def mars(tmp_path: Path) -> Path:
    """Three training and four test pictures' worth of MARS, without pictures."""
    for split, names in (("train", TRAIN), ("test", TEST)):
        for name in names:
            (tmp_path / f"bbox_{split}" / name[:4]).mkdir(parents=True, exist_ok=True)
    info = tmp_path / "info"
    info.mkdir()
    (info / "train_name.txt").write_bytes("".join(f"{name}\r\n" for name in TRAIN).encode())
    (info / "test_name.txt").write_bytes("".join(f"{name}\r\n" for name in TEST).encode())
    scipy.io.savemat(info / "tracks_train_info.mat", {"track_train_info": np.array([[1, 2, 1, 1], [3, 3, 1, 2]])})
    rows = np.array([[1, 1, -1, 1], [2, 2, 0, 2], [3, 3, 2, 1], [4, 5, 2, 2]])
    scipy.io.savemat(info / "tracks_test_info.mat", {"track_test_info": rows})
    scipy.io.savemat(info / "query_IDX.mat", {"query_IDX": np.array([[3]], np.uint16)})
    return tmp_path


def test_tracklets_splits_and_paths(mars: Path) -> None:
    data = open_dataset("mars", mars)
    found = [(t.key, t.identity, t.camera, t.split, len(t.frames)) for t in data.tracklets]
    assert found == [
        ("0001C1T0001", 1, 1, "train", 2),
        ("0001C2T0001", 1, 2, "train", 1),
        ("00-1C1T0001", -1, 1, "junk", 1),
        ("0000C2T0001", 0, 2, "gallery", 1),
        ("0002C1T0001", 2, 1, "query", 1),
        ("0002C2T0001", 2, 2, "gallery", 2),
    ]
    assert data.tracklets[2].frames[0].path == mars / "bbox_test" / "00-1" / "00-1C1T0001F001.jpg"


def test_real_index_has_its_true_counts(shared: Path, tmp_path: Path) -> None:
    index = read_index(shared / "data" / "mars_info")
    for split, names in (("train", index.train_names), ("test", index.test_names)):
        for folder in {name[:4] for name in names}:
            (tmp_path / f"bbox_{split}" / folder).mkdir(parents=True)
    shutil.copytree(shared / "data" / "mars_info", tmp_path / "info")
    data = open_dataset("mars", tmp_path)
    train = [t for t in data.tracklets if t.split == "train"]
    assert Counter(t.split for t in data.tracklets) == {"train": 8298, "query": 1980, "gallery": 9330, "junk": 870}
    assert len({t.identity for t in train}) == 625 and {t.camera for t in data.tracklets} == set(range(1, 7))
    assert sum(t.split == "gallery" and t.identity == 0 for t in data.tracklets) == 3248
    assert sum(len(t.frames) for t in data.tracklets) == 509_914 + 681_089


def test_names_file_shorter_than_its_index(mars: Path) -> None:
    (mars / "info" / "test_name.txt").write_bytes("\r\n".join(TEST[:4]).encode())
    with pytest.raises(DataError, match=r"tracks_test_info.mat: row 4 is lines 4 to 5 of .*test_name.txt, which has 4"):
        open_dataset("mars", mars)


def test_gzipped_names_and_a_cut_one(mars: Path) -> None:
    path = mars / "info" / "test_name.txt"
    packed = gzip.compress(path.read_bytes())
    path.with_suffix(".txt.gz").write_bytes(packed)
    path.unlink()
    assert len(open_dataset("mars", mars).tracklets) == 6
    path.with_suffix(".txt.gz").write_bytes(packed[:-12])
    with pytest.raises(DataError, match=r"test_name.txt.gz: cannot be read"):
        open_dataset("mars", mars)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "bbox_test"), "bbox_test: no such folder"),
        (lambda root: (root / "bbox_test" / "0002").rmdir(), r"bbox_test/0002: no such folder, named by the index"),
        (lambda root: (root / "info" / "query_IDX.mat").unlink(), "query_IDX.mat: no such file"),
        (lambda root: (root / "info" / "query_IDX.mat").write_bytes(b"x" * 300), "query_IDX.mat: not a MATLAB 5 file"),
        (
            lambda root: scipy.io.savemat(root / "info" / "query_IDX.mat", {"query_IDX": np.array([[3, 9]])}),
            "query 2 is row 9, but there are 4 test tracklets",
        ),
        (
            lambda root: (root / "info" / "train_name.txt").write_text("\n".join([TRAIN[0], *TRAIN[::-1]])),
            "row 1 of the index says identity 1, camera 1, but its pictures are .*0001C2T0001F001",
        ),
    ],
)
def test_what_does_not_fit_is_named(mars: Path, damage, message: str) -> None:
    damage(mars)
    with pytest.raises(DataError, match=message):
        open_dataset("mars", mars)


def test_missing_dataset_unknown_name_and_option(tmp_path: Path, mars: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such dataset folder"):
        open_dataset("mars", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="there are mars, ilids_vid, prid2011, folder, mot"):
        open_dataset("market", mars)
    with pytest.raises(ConfigError, match="dataset mars has no option 'speed'; it has none"):
        open_dataset("mars", mars, speed=1)


def test_missing_picture_is_named_when_read(mars: Path) -> None:
    with pytest.raises(DataError, match=r"0001C1T0001F001.jpg: No such file"):
        read_frame(open_dataset("mars", mars).tracklets[0].frames[0])
