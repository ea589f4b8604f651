"""Pictures of frames: a file's bytes as they are, or a box cut from a picture or from a frame of a video.

What was cut is encoded as JPEG of quality 95, or as PNG where it was cut from one; files of other formats become PNG.
"""

import functools
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from keyreid.datasets.tracklet import Frame
from keyreid.errors import DataError

CUT_QUALITY = 95
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # how such files begin
Encoding = Literal["jpg", "png"]


def read_frame(frame: Frame) -> tuple[bytes, Encoding]:
    """The encoded picture of a frame.

    Raises:
        DataError: the file is missing or not a picture or video, the video is too short, or the box misses the picture.
    """
    if frame.video_frame is not None:
        return _encode(_cut(_Video(frame.path).picture(frame.video_frame), frame), "jpg")
    if frame.box is not None:
        picture, encoding = _decode(frame.path)
        return _encode(_cut(picture, frame), encoding)
    content = _bytes(frame.path)
    if content.startswith(JPEG):
        return content, "jpg"
    # BMP, WebP, TIFF become PNG: readers of shards know JPEG and PNG.
    return (content, "png") if content.startswith(PNG) else _encode(_decoded(content, frame.path), "png")


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file, of which only the header is read; DataError where it is none."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except OSError as error:
        raise DataError(f"{path}: not a picture: {error}; mend or remove it") from None


def video_property(path: Path, number: int) -> float:
    """A property in a video's header (`cv2.CAP_PROP_...`), 0 if unknown; DataError where OpenCV cannot open it."""
    return _capture(path).get(number)


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not content:
        raise DataError(f"{path}: the file is empty")
    return content


@functools.lru_cache(maxsize=2)
def _decode(path: Path) -> tuple[np.ndarray, Encoding]:
    """Cached: the people of one street picture are cut from it one after the other."""
    content = _bytes(path)
    return _decoded(content, path), "png" if content.startswith(PNG) else "jpg"


def _decoded(content: bytes, path: Path) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise DataError(f"{path}: not a picture that can be read")
    return picture


def _cut(picture: np.ndarray, frame: Frame) -> np.ndarray:
    """The part of the box that lies in the picture."""
    if frame.box is None:
        return picture
    height, width = picture.shape[:2]
    x, y, wide, high = frame.box
    left, top = max(int(np.floor(x)), 0), max(int(np.floor(y)), 0)
    right, bottom = min(int(np.ceil(x + wide)), width), min(int(np.ceil(y + high)), height)
    if right <= left or bottom <= top:
        box = f"the box {frame.box} (x, y, width, height)"
        raise DataError(f"{frame.path}: {box} is outside its {width} x {height} picture")
    return picture[top:bottom, left:right]


def _encode(picture: np.ndarray, encoding: Encoding) -> tuple[bytes, Encoding]:
    options = [cv2.IMWRITE_JPEG_QUALITY, CUT_QUALITY] if encoding == "jpg" else []
    return cv2.imencode(f".{encoding}", picture, options)[1].tobytes(), encoding


def _capture(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise DataError(f"{path}: not a video that OpenCV can read")
    return capture


@functools.lru_cache(maxsize=4)
class _Video:
    """A video read forwards where possible; the last picture is kept, for the other people in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._times: list[float] = []  # of the frames seen so far, milliseconds
        self._capture, self._next, self._last = _capture(path), 0, None

    def picture(self, number: int) -> np.ndarray:
        """Frame `number`, from 0."""
        if number < self._next - 1:
            # Seeking is not exact in every container: start over where the frame's time says that it was not.
            self._capture.set(cv2.CAP_PROP_POS_FRAMES, number)
            if self._capture.grab() and abs(self._capture.get(cv2.CAP_PROP_POS_MSEC) - self._times[number]) < 0.5:
                self._next, self._last = number + 1, None
            else:
                self._capture, self._next, self._last = _capture(self.path), 0, None
        while self._next <= number:
            if not self._capture.grab():
                raise DataError(f"{self.path}: frame {number} was asked for, but it ends after {self._next}")
            self._next, self._last = self._next + 1, None
            if self._next > len(self._times):
                self._times.append(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        if self._last is None:
            good, self._last = self._capture.retrieve()
            if not good:
                raise DataError(f"{self.path}: frame {number} does not decode")
        return self._last
