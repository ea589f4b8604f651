"""One's own pictures: folders in any order of levels, tables, names of any kind, and splits."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from keyreid.datasets import open_dataset
from keyreid.errors import DataError


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_names_are_numbered_once_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "north door/Zoë/2/10.jpg", "north door/Zoë/2/9.jpg", "north door/a 10/1/1.jpg", "lift/a 9/1/1.png")
    data = open_dataset("folder", tmp_path)
    assert data.names == {"identity": {"Zoë": 1, "a 9": 2, "a 10": 3}, "camera": {"lift": 1, "north door": 2}}
    zoe = next(t for t in data.tracklets if t.identity == 1)
    assert zoe.key == "Zo-_north-door_2" and zoe.camera == 2 and zoe.split == "all"
    assert [frame.path.name for frame in zoe.frames] == ["9.jpg", "10.jpg"]


def test_other_layouts(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/p1/c1/1.jpg",
        "test/p2/c1/1.jpg",
        "test/p2/c2/1.jpg",
        "test/distractor/c2/1.jpg",
        "test/junk/c1/1.jpg",
    )
    data = open_dataset("folder", tmp_path, layout="split/identity/camera")
    assert {(t.identity, t.camera, t.split) for t in data.tracklets} == {
        (1, 1, "train"),
        (2, 1, "query"),
        (2, 2, "gallery"),
        (0, 2, "gallery"),
        (-1, 1, "junk"),
    }
    touch(tmp_path / "crops", "cam/t1/1.jpg", "cam/t2/1.jpg")
    unknown = open_dataset("folder", tmp_path / "crops", layout="camera/tracklet")
    assert [(t.identity, t.camera) for t in unknown.tracklets] == [(None, 1), (None, 1)]


def test_layout_that_does_not_fit_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "cam/person/1.jpg")
    with pytest.raises(DataError, match=r"1.jpg: a picture where the layout expects folders of the level 'tracklet'"):
        open_dataset("folder", tmp_path)
    with pytest.raises(DataError, match="person: a folder where the layout expects pictures"):
        open_dataset("folder", tmp_path, layout="camera")
    with pytest.raises(DataError, match="layout=camera/person: its levels are split, camera, identity, tracklet"):
        open_dataset("folder", tmp_path, layout="camera/person")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="void as camera/identity/tracklet: no pictures found"):
        open_dataset("folder", tmp_path / "void")


def test_empty_folders_are_left_out_with_a_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "cam/person/full/1.jpg", "cam/person/hollow/notes.txt")
    (tmp_path / "cam" / "nobody").mkdir()
    assert len(open_dataset("folder", tmp_path).tracklets) == 1
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{tmp_path}/cam/nobody: nothing in it; left out",
        f"{tmp_path}/cam/person/hollow: no pictures in it; left out",
    ]


def test_drawn_split_gives_each_tested_person_a_query_and_an_answer(tmp_path: Path) -> None:
    touch(tmp_path, *(f"c{c}/p{p}/t{t}/1.jpg" for c in (1, 2) for p in range(10) for t in (1, 2)))
    data = open_dataset("folder", tmp_path, test_share=0.3, seed=5)
    tested = {t.identity for t in data.tracklets if t.split != "train"}
    assert len(tested) == 3 and data == open_dataset("folder", tmp_path, test_share=0.3, seed=5)
    for person in tested:
        assert sorted((t.camera, t.split) for t in data.tracklets if t.identity == person) == [
            (1, "gallery"),
            (1, "query"),
            (2, "gallery"),
            (2, "query"),
        ]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_table(tmp_path: Path, kind: str) -> None:
    rows = [
        ("x/b.jpg", "Ada", "hall", "1", "train", 2),
        ("x/a.jpg", "Ada", "hall", "1", "train", 1),
        ("x/c.jpg", None, "hall", "2", "gallery", 1),
    ]
    touch(tmp_path, *(row[0] for row in rows))
    table = pd.DataFrame(rows, columns=["path", "identity", "camera", "tracklet", "split", "frame"])
    path = tmp_path / f"people.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    first, second = open_dataset("folder", path).tracklets
    assert [frame.path.name for frame in first.frames] == ["a.jpg", "b.jpg"] and first.split == "train"
    assert (second.identity, second.split, second.key) == (None, "gallery", "unknown_hall_2")


def test_table_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    for text, message in (
        ("file,identity\na.jpg,1\n", "no column path"),
        ("path,person\na.jpg,1\n", "unknown column person"),
        ("path,identity\na.jpg,1\n", "a.jpg: no such file, named by .*people.csv"),
        ("path,camera\na.jpg,1\n", "need the column tracklet"),
        ("path,identity,split\na.jpg,1,valid\n", "split 'valid'; splits are train"),
        ("path,identity,frame\na.jpg,1,first\n", "row 1 has no frame number"),
    ):
        path.write_text(text)
        (tmp_path / "a.jpg").touch() if "split" in text else (tmp_path / "a.jpg").unlink(missing_ok=True)
        with pytest.raises(DataError, match=message):
            open_dataset("folder", path)
