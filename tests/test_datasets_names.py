"""Names are text and stay different; numbers are read by one rule; nobody leads out of a dataset's folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
from PIL import Image

from keyreid.datasets import open_dataset
from keyreid.datasets.listing import keys_of, natural, plain_name, whole_number
from keyreid.errors import DataError

MISSING_TO_PANDAS = ["NA", "None", "nan", "null", "N/A", "NaN", "#N/A", "n/a", "<NA>"]


def pictures(folder: Path, count: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (8, 16)).save(folder / f"{number}.png")
    return [f"{number}.png" for number in range(count)]


def sequence(folder: Path, *lines: str, info: str = "", frames: int = 3) -> Path:
    (folder / "gt").mkdir(parents=True)
    (folder / "gt" / "gt.txt").write_text("\n".join(lines))
    (folder / "img1").mkdir()
    for frame in range(1, frames + 1):
        Image.new("L", (200, 200)).save(folder / "img1" / f"{frame:06d}.jpg")
    if info:
        (folder / "seqinfo.ini").write_text(f"[Sequence]\n{info}\n")
    return folder


def test_one_rule_for_numbers() -> None:
    whole = {
        "7": 7,
        "007": 7,
        "7.0": 7,
        "7.": 7,
        "7.000e+00": 7,
        "-1.00": -1,
        "1700000000000000001": 1700000000000000001,
    }
    assert {text: whole_number(text) for text in whole} == whole
    assert [whole_number(text) for text in ("1²", "①", "１", "7.5", "1_0", "nan", "1e999", "9" * 30, "", "0x7")] == [
        None
    ] * 10
    assert list(map(plain_name, ("7.0", "-1.00", "007", "1²", "①", "1.10", " Ada ", "e\u0301", "NA"))) == [
        *("7", "-1", "007", "1²", "①", "1.10", "Ada", "é", "NA")
    ]


def test_natural_order_takes_any_text() -> None:
    names = ["a²", "a10", "a9", "a" + "9" * 6000, "a１１", "a2", "a002", "a①"]
    assert sorted(names, key=natural) == ["a002", "a2", "a9", "a10", "a１１", "a" + "9" * 6000, "a²", "a①"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_names_that_pandas_takes_for_missing_are_names(tmp_path: Path, kind: str) -> None:
    names = MISSING_TO_PANDAS
    table = pd.DataFrame({"path": pictures(tmp_path, len(names)), "identity": names, "camera": names[::-1]})
    path = tmp_path / f"people.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    data = open_dataset("folder", path)
    assert set(data.names["identity"]) == set(data.names["camera"]) == set(names)
    assert len({tracklet.key.lower() for tracklet in data.tracklets}) == len(names)


def test_a_number_is_one_name_however_a_table_holds_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = pictures(tmp_path, 4)
    pd.DataFrame({"path": files, "identity": [7, None, 8, 7], "tracklet": [1, 2, 3, 4]}).to_parquet(
        tmp_path / "a.parquet"
    )
    data = open_dataset("folder", tmp_path / "a.parquet")  # pandas has made 7.0 of 7
    assert data.names["identity"] == {"7": 1, "8": 2} and [t.identity for t in data.tracklets] == [1, None, 2, 1]
    (tmp_path / "b.csv").write_text("path,identity,camera\n0.png,7,1\n1.png,7.0,1.0\n2.png,007,1\n3.png,1²,01\n")
    data = open_dataset("folder", tmp_path / "b.csv")
    assert data.names == {"identity": {"1²": 1, "007": 2, "7": 3}, "camera": {"01": 1, "1": 2}}
    assert len(data.tracklets) == 3 and "column identity: '7', '7.0' are one name" in caplog.text


def test_what_an_empty_cell_means(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    path = tmp_path / "people.csv"
    for text, message in (
        ("path,identity,camera\n0.png,Ada,east\n1.png,Ada,\n", "row 2 has no camera"),
        ("path,identity,tracklet\n0.png,,a\n1.png,,\n", "need the column tracklet"),
        ("path,identity\n0.png,Ada\n,Ada\n", "row 2 has no path"),
        ("path,identity\n0.png,Ada,more\n", "not a CSV or Parquet table: Length of header"),
        ("path,frame,identity\n0.png,1²,Ada\n", "row 1 has no frame number"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            open_dataset("folder", path)
    path.write_text("path," + ",".join(f"c{number}" for number in range(20_000)) + "\n")
    with pytest.raises(DataError, match="unknown column c0"):
        open_dataset("folder", path)


def test_keys_stay_different_and_belong_to_their_names(tmp_path: Path) -> None:
    for name in ("李四", "张三", "ada.b", "ada-b", "Ada", "ada", "①", "p" * 90, "p" * 90 + "q", "e\u0301v", "m²"):
        pictures(tmp_path / "cam" / name / "1", 1)
    data = open_dataset("folder", tmp_path)
    assert len({tracklet.key.lower() for tracklet in data.tracklets}) == 11
    assert max(len(tracklet.key) for tracklet in data.tracklets) <= 80
    of = {tracklet.frames[0].path.parent.parent.name: tracklet.key for tracklet in data.tracklets}
    pictures(tmp_path / "cam" / "一" / "1", 1)  # sorts before the others, and would be the same in letters
    again = {t.frames[0].path.parent.parent.name: t.key for t in open_dataset("folder", tmp_path).tracklets}
    assert {name: again[name] for name in of} == of
    assert keys_of([("yard/7_0",), ("Zoë", "north door", "2")]) == ["yard-7_0", "Zo-_north-door_2"]  # as they were


def test_people_named_like_nobody_are_people_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("-1", "0000", "Junk", "DISTRACTOR", "0002"):
        pictures(tmp_path / "cam" / name / "1", 1)
    data = open_dataset("folder", tmp_path)
    assert min(data.names["identity"].values()) == 1
    assert "identity -1, 0000, DISTRACTOR, Junk is taken for a person like others" in caplog.text


def test_an_id_is_one_person_however_it_is_written(tmp_path: Path) -> None:
    for camera, number in (("A", "7"), ("B", "7.0"), ("C", "7.000e+00"), ("D", "007")):
        sequence(tmp_path / camera, *(f"{t},{number},10,10,60,160,1" for t in (1, 2)))
    data = open_dataset("mot", tmp_path)
    assert list(data.names["identity"]) == ["A/7", "B/7", "C/7", "D/7"]
    assert [tracklet.key for tracklet in data.tracklets] == ["A_7_0", "B_7_0", "C_7_0", "D_7_0"]


def test_tracks_that_are_none_are_refused_with_their_line(tmp_path: Path) -> None:
    tracks = sequence(tmp_path / "S", "") / "gt" / "gt.txt"
    for text, message in (
        ("1,-1.00,10,10,60,160,1\n2,-1.0,10,10,60,160,1\n", "every id is -1: these are detections"),
        ("1,1,10,10,60,160\n\n1,1.0,90,10,60,160\n", r"gt.txt: line 3: id 1 is in frame 1 already"),
        ("frame,id,x,y,w,h\n1,a,1,1,60,160\n1,a,90,1,60,160\n", "line 3: id a is in frame 1 already"),
        ("1²,1,10,10,60,160\n", "not a table of tracks|no column"),
        ("1,1,10,10,60,160\n①,1,10,10,60,160\n", "not a table of tracks"),
        ("1,1,10,10,60,160\n2.5,1,10,10,60,160\n", "line 2 has no whole frame, id and box"),
        ("1,1,10,10,60,160\n2,,10,10,60,160\n", "line 2 has no whole frame, id and box"),
        ("1,1,10,10,60,160\n2,1,10,1e300,60,160\n", "line 2 has no whole frame, id and box"),
        ("frame,id,x,left,y,w,h\n1,1,10,10,10,60,160\n", "two columns of one name"),
        (",".join("1" * 20_000), "line|no box"),
    ):
        tracks.write_text(text)
        with pytest.raises(DataError, match=message):
            open_dataset("mot", tmp_path / "S", min_size=(500, 500) if "1,1,1,1" in text else (12, 24))


def test_two_sequences_or_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("A", "B"):
        sequence(tmp_path / "both" / name, "1,7,10,10,60,160,1", info="name=yard")
    with pytest.raises(DataError, match="2 sequences are called 'yard'; give each its own"):
        open_dataset("mot", tmp_path / "both")
    folder = sequence(tmp_path / "C", "1,7,10,10,60,160,1")
    Image.new("L", (200, 200)).save(folder / "img1" / "1.jpg")
    with pytest.raises(DataError, match="two pictures are of one frame"):
        open_dataset("mot", folder)


@pytest.mark.parametrize("place", ["..", "../B/img1", "/etc", "img1/../../B/img1"])
def test_a_sequence_stays_in_its_folder(tmp_path: Path, place: str) -> None:
    sequence(tmp_path / "B", "1,7,10,10,60,160,1")
    folder = sequence(tmp_path / "A", "1,7,10,10,60,160,1", info=f"imDir={place}")
    with pytest.raises(DataError, match=rf"A/seqinfo.ini: '{place}' leads out of .*/A"):
        open_dataset("mot", folder)


def test_a_table_stays_below_its_folder_unless_a_path_is_absolute(tmp_path: Path) -> None:
    pictures(tmp_path / "elsewhere", 1)
    (tmp_path / "t").mkdir()
    table = tmp_path / "t" / "people.csv"
    absolute = tmp_path / "elsewhere" / "0.png"
    for path in ("../elsewhere/0.png", f"{tmp_path}/t/../elsewhere/0.png", "x\0.png"):
        pd.DataFrame({"path": [path], "identity": ["Ada"]}).to_parquet(tmp_path / "t" / "p.parquet")
        with pytest.raises(DataError, match=r"p.parquet: '.*' leads out of .*/t"):
            open_dataset("folder", tmp_path / "t" / "p.parquet")
    table.write_text(f"path,identity\n{absolute},Ada\n")
    assert open_dataset("folder", table).tracklets[0].frames[0].path == absolute  # the user's own list


def test_mars_names_and_index_are_what_they_should_be(tmp_path: Path) -> None:
    names = ["0001C1T0001F001.jpg", "0001C1T0001F002.jpg"]
    rows = np.array([[1, 2, 1, 1]])
    for split in ("train", "test"):
        (tmp_path / f"bbox_{split}" / "0001").mkdir(parents=True)
    info = tmp_path / "info"
    info.mkdir()

    def refused(message: str, train: list[str] = names, index: object = rows, queries: object = ((1,),)) -> None:
        (info / "train_name.txt").write_text("\n".join(train))
        (info / "test_name.txt").write_text("0001C2T0001F001.jpg")
        scipy.io.savemat(info / "tracks_train_info.mat", {"track_train_info": index})
        scipy.io.savemat(info / "tracks_test_info.mat", {"track_test_info": np.array([[1, 1, 1, 2]])})
        scipy.io.savemat(info / "query_IDX.mat", {"query_IDX": queries})
        with pytest.raises(DataError, match=message):
            open_dataset("mars", tmp_path)

    for name in ("0-1C1T0001F001.jpg", "..C1T0001F001.jpg", "0001C１T0001F001.jpg".encode("ascii", "replace").decode()):
        refused("is not a MARS picture name", [name, name])
    refused("but its pictures are", [names[0], "0001C1T0001F001/../../../secret.jpg"])
    refused("but its pictures are", [names[0], "0001C1T00010F002.jpg"])  # of tracklet 10
    for index in (
        ["text"],
        [["a"], ["b"]],
        np.array([[1, "x"]], object),
        {"a": rows},
        rows * 1.5,
        rows * 1j,
        rows * np.nan,
    ):
        refused(r"tracks_train_info.mat: track_train_info is .*, expected a table of whole numbers", index=index)
    refused(r"tracks_train_info.mat: track_train_info is sparse", index=scipy.sparse.csc_matrix(rows))
    refused(r"expected rows of start, end, identity, camera", index=rows.T)
    refused(r"query_IDX is \(2, 2\), expected one row", queries=[[1, 1], [1, 1]])


def test_names_and_links_that_a_disk_does_not_bear(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        open_dataset("folder", tmp_path / ("n" * 300))
    with pytest.raises(DataError, match="no such dataset folder"):
        open_dataset("folder", "with\0nul")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="loop"):
        open_dataset("folder", tmp_path / "loop")
    (tmp_path / "data" / "cam").mkdir(parents=True)
    (tmp_path / "data" / "cam" / "round").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cam" / "self").symlink_to(tmp_path / "data" / "cam" / "self")
    with pytest.raises(DataError):
        open_dataset("folder", tmp_path / "data")
    (tmp_path / "file").write_text("")
    for name in ("mars", "ilids_vid", "prid2011"):
        with pytest.raises(DataError):
            open_dataset(name, tmp_path / "file")


def test_people_of_one_number_are_refused(tmp_path: Path) -> None:
    for camera in ("cam1", "cam2"):
        for person in ("person1", "person001"):
            pictures(tmp_path / "i-LIDS-VID" / "sequences" / camera / person, 1)
    (tmp_path / "splits.json").write_text(json.dumps([{"train": ["person1"], "test": ["person001"]}]))
    with pytest.raises(DataError, match="2 people have the number 1"):
        open_dataset("ilids_vid", tmp_path)
