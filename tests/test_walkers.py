"""Rendered walkers: MARS's layout, the same pictures from any number of processes, and true keypoints."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io

from keyreid.datasets import open_dataset
from keyreid.datasets.frames import read_frame
from keyreid.datasets.tracklet import Tracklet
from keyreid.errors import DataError
from keyreid.pose import keypoint_files
from keyreid.synthetic import body, scene
from keyreid.synthetic.clothes import Person, Piece, dress
from keyreid.synthetic.filming import random_stream, render_tracklet
from keyreid.synthetic.walkers import Walkers, render

SMALL = {"cameras": 3, "seed": 4, "frames": (2, 4), "height": 128, "width": 64, "quiet": True}


@pytest.fixture(scope="module")
def walkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("walkers") / "data"
    render(root, 8, distractors=6, junk=3, **SMALL)
    return root


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pictures(tracklet: Tracklet) -> list[np.ndarray]:
    return [cv2.imdecode(np.frombuffer(read_frame(f)[0], np.uint8), cv2.IMREAD_COLOR) for f in tracklet.frames]


def test_layout_is_what_the_mars_reader_reads(walkers: Path) -> None:
    data = open_dataset("mars", walkers)
    splits = Counter(t.split for t in data.tracklets)
    assert splits["junk"] == 3 and sum(t.identity == 0 for t in data.tracklets) == 6
    assert {t.identity for t in data.tracklets if t.split == "train"} == {1, 2, 3, 4}
    assert {t.identity for t in data.tracklets if t.split == "query"} == {5, 6, 7, 8}
    for t in data.tracklets:
        assert all(picture.shape == (128, 64, 3) for picture in pictures(t)) and 2 <= len(t.frames) <= 4
    for person in range(1, 9):  # everyone is seen by two cameras at least, and is one query at each
        cameras = {t.camera for t in data.tracklets if t.identity == person}
        assert len(cameras) >= 2
        if person > 4:
            assert [t.camera for t in data.tracklets if t.identity == person and t.split == "query"] == sorted(cameras)
    assert b"\r\n" in (walkers / "info" / "train_name.txt").read_bytes()
    assert scipy.io.loadmat(walkers / "info" / "query_IDX.mat")["query_IDX"].dtype == np.uint16
    assert scipy.io.loadmat(walkers / "info" / "tracks_test_info.mat")["track_test_info"].dtype == np.int32


def test_any_number_of_processes_draws_the_same(walkers: Path, tmp_path: Path) -> None:
    script = tmp_path / "draw.py"  # worker processes import the script that starts them
    script.write_text(
        "from keyreid.synthetic.walkers import render\n"
        "if __name__ == '__main__':\n"
        f"    render({str(tmp_path / 'two')!r}, 8, distractors=6, junk=3, processes=2, **{SMALL})\n"
    )
    subprocess.run([sys.executable, script], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert digest(tmp_path / "two") == digest(walkers)


def test_more_people_change_no_one(walkers: Path, tmp_path: Path) -> None:
    render(tmp_path, 12, test_share=0.25, distractors=0, junk=0, **SMALL)
    before, after = digest(walkers / "bbox_train"), digest(tmp_path / "bbox_train")
    assert before.items() <= after.items() and len(after) > len(before)


def test_second_call_keeps_and_other_settings_are_refused(walkers: Path, tmp_path: Path) -> None:
    times = {path: path.stat().st_mtime_ns for path in walkers.rglob("*")}
    assert render(walkers, 8, distractors=6, junk=3, **SMALL).train_identities == 4
    assert times == {path: path.stat().st_mtime_ns for path in walkers.rglob("*")}
    with pytest.raises(DataError, match=r"holds walkers of other settings \(.*walkers.json\)"):
        render(walkers, 9, **SMALL)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="is not empty and not a folder of walkers"):
        render(tmp_path, 8, **SMALL)
    with pytest.raises(DataError, match="cameras=10: 2 to 9"):
        Walkers(identities=8, cameras=10)


def test_stopped_drawing_goes_on_to_the_same(walkers: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(walkers, stopped)
    (stopped / "walkers.json").unlink()
    shutil.rmtree(stopped / "info")
    shutil.rmtree(stopped / "bbox_test" / "0006")
    render(stopped, 8, distractors=6, junk=3, **SMALL)
    assert digest(stopped) == digest(walkers)


def test_keypoint_files_belong_to_their_frames(walkers: Path) -> None:
    data = open_dataset("mars", walkers)
    for tracklet in data.tracklets:
        file = keypoint_files.load(keypoint_files.path_of(walkers / "keypoints", tracklet.key))
        assert file.frame_names == tuple(frame.path.name for frame in tracklet.frames)
        assert file.keypoints.shape == (len(tracklet.frames), 17, 3)
        assert set(np.unique(file.keypoints[..., 2])) <= {0.0, 0.5, 1.0}
        seen = file.keypoints[file.keypoints[..., 2] > 0]
        assert (seen[:, :2] >= 0).all() and (seen[:, :2] < (64, 128)).all()


# Each keypoint must lie on the part of its own colour: a person dyed part by part, before a faithful camera.
DYED = {
    "head": ((0, 0, 1), (body.NOSE, body.LEFT_EYE, body.RIGHT_EYE)),
    "torso": ((0, 1, 0), (body.LEFT_SHOULDER, body.RIGHT_SHOULDER, body.LEFT_HIP, body.RIGHT_HIP)),
    "left_forearm": ((1, 0, 0), (body.LEFT_WRIST,)),
    "right_forearm": ((1, 1, 0), (body.RIGHT_WRIST,)),
    "left_shank": ((0, 1, 1), (body.LEFT_KNEE, body.LEFT_ANKLE)),
    "right_shank": ((1, 0, 1), (body.RIGHT_KNEE, body.RIGHT_ANKLE)),
}
BORDERS = {*DYED["torso"][1], *DYED["left_shank"][1], *DYED["right_shank"][1]}  # joints that grey parts share


@pytest.mark.parametrize("yaw", [0.0, 1.2, 2.6])
def test_keypoints_lie_on_the_body(yaw: float) -> None:
    person = dress(random_stream(3))
    person.pieces.pop("skirt", None)
    plain = {name: Piece(np.full_like(p.texture, 0.5), p.widths, p.depth, p.round) for name, p in person.pieces.items()}
    for name, (colour, _) in DYED.items():
        plain[name] = Piece(np.ones_like(plain[name].texture) * np.float32(colour), *_shape(plain[name]))
    street = np.full((400, 1600, 3), 0, np.uint8)
    camera = scene.Camera(yaw, 0.1, np.eye(3, 4), 1.0, 0.0, 1.0, 0.0, 95, 0.9, np.array([0.0, 0.0, 1.0]), 0.9, street)
    hits = total = 0
    for number in range(12):
        rendered = render_tracklet(
            Person(person.build, person.gait, plain), camera, 4, random_stream(8, number), 256, 128
        )
        for content, keypoints in zip(rendered.pictures, rendered.keypoints, strict=True):
            picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR).astype(int)
            for colour, joints in DYED.values():
                for joint in joints:
                    x, y, confidence = keypoints[joint]
                    if confidence == 1:
                        total += 1
                        hits += _is_dyed(picture[int(y), int(x)], colour, joint in BORDERS)
    assert total > 200 and hits / total > 0.97


def _shape(part: Piece) -> tuple:
    return part.widths, part.depth, part.round


def _is_dyed(pixel: np.ndarray, colour: tuple[int, ...], or_grey: bool) -> bool:
    wanted = np.array(colour, bool)
    if or_grey and pixel.min() > 40 and np.ptp(pixel) < 40:
        return True
    return bool(pixel[wanted].min() > 1.15 * pixel[~wanted].max(initial=0) + 4)


def test_hidden_joints_have_no_confidence() -> None:
    camera = scene.camera(1, random_stream(1), 128, 64)
    confidences = np.concatenate(
        [
            render_tracklet(dress(random_stream(2, n)), camera, 2, random_stream(5, n), 128, 64).keypoints[..., 2]
            for n in range(40)
        ]
    )
    assert 0.005 < (confidences == 0).mean() < 0.2  # behind an occluder, or outside
    assert 0.05 < (confidences == 0.5).mean() < 0.4  # behind the own body
    junk = np.concatenate(
        [render_tracklet(None, camera, 2, random_stream(6, n), 128, 64).keypoints[..., 2] for n in range(20)]
    )
    assert (junk == 0).mean() > 0.3
