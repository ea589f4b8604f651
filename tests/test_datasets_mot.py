"""Tracks in street pictures and videos, made ones and real ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from keyreid.datasets import open_dataset
from keyreid.datasets.frames import read_frame
from keyreid.errors import ConfigError, DataError


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    """Ten pictures; person 3 walks through all but frame 6, person 8 is small, 9 is a car, 5 is hidden or ignored."""
    folder = tmp_path / "S1"
    (folder / "img1").mkdir(parents=True)
    (folder / "gt").mkdir()
    lines = []
    for frame in range(1, 11):
        cv2.imwrite(str(folder / "img1" / f"{frame:06d}.jpg"), np.full((120, 160, 3), 20 * frame, np.uint8))
        if frame != 6:
            lines.append(f"{frame},3,{10 * frame},20,30,60,1,1,0.9")
        lines += [f"{frame},8,5,5,6,12,1,1,1", f"{frame},9,5,5,60,60,1,3,1"]
        lines.append(f"{frame},5,50,20,30,60,{int(frame > 2)},1,{0.1 if frame < 9 else 0.8}")
    (folder / "gt" / "gt.txt").write_text("\n".join(lines))
    return folder


def test_tracks_are_cut_at_gaps_and_into_equal_tracklets(sequence: Path) -> None:
    data = open_dataset("mot", sequence, max_frames=3, min_visibility=0.5, min_size=[12, 24])  # as YAML gives it
    assert [(t.key, t.identity, len(t.frames), t.split) for t in data.tracklets] == [
        ("S1_3_0", 1, 3, "query"),
        ("S1_3_1", 1, 2, "gallery"),
        ("S1_3_2", 1, 2, "gallery"),
        ("S1_3_3", 1, 2, "gallery"),
        ("S1_5_0", 2, 2, "gallery"),
    ]
    assert data.names == {"camera": {"S1": 1}, "identity": {"S1/3": 1, "S1/5": 2}}
    bridged = open_dataset("mot", sequence, max_gap=2, min_length=3)
    assert Counter((t.identity, len(t.frames)) for t in bridged.tracklets) == {(1, 9): 1, (2, 8): 1}
    assert all(t.identity is None for t in open_dataset("mot", sequence, identified=False).tracklets)


def test_crops_are_padded_and_clipped(sequence: Path) -> None:
    data = open_dataset("mot", sequence, padding=0.1)
    frame = data.tracklets[0].frames[0]
    assert frame.box == (7.0, 14.0, 36.0, 72.0)
    crop = cv2.imdecode(np.frombuffer(read_frame(frame)[0], np.uint8), cv2.IMREAD_COLOR)
    assert crop.shape == (72, 36, 3) and abs(crop.mean() - 20) < 2


def test_video_with_a_named_table_of_tracks(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "door.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for number in range(6):
        writer.write(np.full((120, 160, 3), 40 * number, np.uint8))
    writer.release()
    (tmp_path / "own.csv").write_text("id,frame,w,h,x,y\nred coat,2,40,90,10,10\nred coat,1,40,90,10,10\n")
    (tracklet,) = open_dataset("mot", tmp_path / "door.avi", tracks=str(tmp_path / "own.csv"), camera="door").tracklets
    assert tracklet.key == "door_red-coat_0" and [frame.video_frame for frame in tracklet.frames] == [0, 1]
    crops = [cv2.imdecode(np.frombuffer(read_frame(frame)[0], np.uint8), cv2.IMREAD_COLOR) for frame in tracklet.frames]
    assert [round(crop.mean() / 40) for crop in crops] == [0, 1] and crops[0].shape == (90, 40, 3)


def test_what_does_not_fit_is_named(sequence: Path, tmp_path: Path) -> None:
    tracks = sequence / "gt" / "gt.txt"
    for text, message in (
        ("1,3,10,20\n", "no column width"),
        ("1,3,10,20,?,60\n", "not a table of tracks"),
        ("1,-1,10,20,30,60\n2,-1,10,20,30,60\n", "these are detections, not tracks"),
        ("1,3,10,20,3,6\n", "no box of the tracks is left"),
    ):
        tracks.write_text(text)
        with pytest.raises(DataError, match=message):
            open_dataset("mot", sequence)
    tracks.unlink()
    with pytest.raises(DataError, match=r"gt/gt.txt: no such file; name the tracks with the option tracks=FILE"):
        open_dataset("mot", sequence)
    with pytest.raises(DataError, match="neither pictures, nor a MOTChallenge sequence"):
        open_dataset("mot", sequence / "gt")
    with pytest.raises(ConfigError, match=r"dataset mot, option max_frames='many': Input should be a valid integer"):
        open_dataset("mot", sequence, max_frames="many")
    with pytest.raises(ConfigError, match=r"dataset mot, option split='test': Input should be 'retrieval', 'all' or"):
        open_dataset("mot", sequence, split="test")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"notes.txt: not a video"):
        open_dataset("mot", tmp_path / "notes.txt")


def test_real_street_pictures(shared: Path) -> None:
    data = open_dataset("mot", shared / "data" / "mot17_mini", max_frames=2, min_visibility=0.3)
    assert data == open_dataset("mot", shared / "data" / "mot17_mini" / "train", max_frames=2, min_visibility=0.3)
    assert len(data.names["camera"]) == 7 and len(data.names["identity"]) == 119
    assert Counter(t.split for t in data.tracklets) == {"query": 115, "gallery": 258}
    assert sum(len(t.frames) for t in data.tracklets) == 687
    for tracklet in data.tracklets[::40]:
        crop = cv2.imdecode(np.frombuffer(read_frame(tracklet.frames[0])[0], np.uint8), cv2.IMREAD_COLOR)
        assert crop.shape[0] >= 24 and crop.std() > 5
