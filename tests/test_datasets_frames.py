"""Pictures of frames: bytes as they are, cuts from pictures and videos, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from keyreid.datasets.frames import read_frame
from keyreid.datasets.tracklet import Frame
from keyreid.errors import DataError


def decoded(content: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


@pytest.fixture
def street(tmp_path: Path) -> Path:
    """A PNG whose pixel (x, y) has blue x and green y."""
    y, x = np.mgrid[:60, :80].astype(np.uint8)
    cv2.imwrite(str(tmp_path / "street.png"), np.dstack([x, y, np.zeros_like(x)]))
    return tmp_path / "street.png"


def test_whole_files_keep_their_bytes(street: Path, tmp_path: Path) -> None:
    assert read_frame(Frame(street)) == (street.read_bytes(), "png")
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((9, 9, 3), np.uint8))
    assert read_frame(Frame(tmp_path / "a.jpg")) == ((tmp_path / "a.jpg").read_bytes(), "jpg")
    cv2.imwrite(str(tmp_path / "a.bmp"), decoded(street.read_bytes()))
    content, encoding = read_frame(Frame(tmp_path / "a.bmp"))
    assert encoding == "png" and (decoded(content) == decoded(street.read_bytes())).all()


def test_boxes_are_clipped_to_the_picture(street: Path) -> None:
    inside, encoding = read_frame(Frame(street, (10.0, 20.0, 5.0, 8.0)))
    assert encoding == "png"
    assert decoded(inside).shape == (8, 5, 3) and decoded(inside)[0, 0].tolist() == [10, 20, 0]
    leaving = decoded(read_frame(Frame(street, (-3.5, 50.0, 10.0, 30.0)))[0])
    assert leaving.shape == (10, 7, 3) and leaving[0, 0].tolist() == [0, 50, 0]
    with pytest.raises(DataError, match=r"street.png: the box .* is outside its 80 x 60 picture"):
        read_frame(Frame(street, (90.0, 0.0, 10.0, 10.0)))


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("not a picture")
    for name, message in (
        ("empty.jpg", "the file is empty"),
        ("text.png", "not a picture"),
        ("none.jpg", "No such file"),
    ):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            read_frame(Frame(tmp_path / name))
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(30))
    with pytest.raises(DataError, match=r"cut.png: not a picture"):
        read_frame(Frame(tmp_path / "cut.png", (0.0, 0.0, 4.0, 4.0)))


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "MJPG"), (".mp4", "mp4v")])
def test_video_frames_forwards_and_backwards(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"street{suffix}"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, (64, 48))
    for number in range(20):
        writer.write(np.full((48, 64, 3), 12 * number, np.uint8))
    writer.release()
    for number in (0, 1, 1, 15, 6, 7, 19, 2):
        content, encoding = read_frame(Frame(path, (8.0, 8.0, 20.0, 30.0), number))
        assert encoding == "jpg" and decoded(content).shape == (30, 20, 3)
        assert abs(decoded(content).mean() - 12 * number) < 6, number
    with pytest.raises(DataError, match="frame 20 was asked for, but it ends after 20"):
        read_frame(Frame(path, None, 20))
    (tmp_path / "fake.mp4").write_text("not a video")
    with pytest.raises(DataError, match=r"fake.mp4: not a video"):
        read_frame(Frame(tmp_path / "fake.mp4", None, 0))
