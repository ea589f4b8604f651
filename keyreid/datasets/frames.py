"""Pictures of frames: a file's bytes as they are, or a box cut from a picture or from a frame of a video.

What was cut is encoded as JPEG of quality 95, or as PNG where it was cut from one. Files of other formats, and those
that an orientation tag (EXIF) turns, become upright PNG: all that follows sees the same pixels, and boxes are in them.
Every picture from outside is decoded here, and whatever is wrong with it is said, not painted grey.
"""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from keyreid.datasets.tracklet import Frame
from keyreid.errors import ConfigError, DataError

CUT_QUALITY = 95
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # how such files begin
MAX_PIXELS = "KEYREID_MAX_PIXELS"  # environment variable: most pixels of a picture or video, against forged headers
DEFAULT_MAX_PIXELS = 89_478_485  # Pillow's
EIGHTH = cv2.IMREAD_REDUCED_GRAYSCALE_8  # flag of `decode`: small and grey, in half the time, to know that it can be
Encoding = Literal["jpg", "png"]

_TURNS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"irot", b"imir")  # without one of these, no format's picture is turned
# What decoders print of damage that they paint over or refuse, and what means nothing. A few bytes too many before the
# end do no harm, and some cameras write them.
_DAMAGE = re.compile(
    rb"((?:Corrupt JPEG data(?!: \d extraneous bytes before marker 0xd9)|Premature end of JPEG|Invalid SOS"
    rb"|Inconsistent progression|libpng error|libpng warning: IDAT|\[ERROR:).*\n+)|(?:\[ WARN:|libpng warning).*\n+"
)
_ONE_LISTENER = threading.Lock()  # of a process's standard error


def read_frame(frame: Frame) -> tuple[bytes, Encoding]:
    """The encoded picture of a frame, upright.

    Raises:
        DataError: the file is missing or not a picture or video, the video is too short, or the box misses the picture.
    """
    if frame.video_frame is not None:
        return _encode(_cut(_Video(frame.path).picture(frame.video_frame), frame), "jpg")
    if frame.box is not None:
        picture, encoding = _decode(frame.path)
        return _encode(_cut(picture, frame), encoding)
    content = _bytes(frame.path)
    known = "jpg" if content.startswith(JPEG) else "png" if content.startswith(PNG) else None
    with naming(frame.path):
        if known and orientation(content) == 1:
            return content, known
        return _encode(decode(content, cv2.IMREAD_COLOR), "png")  # readers of shards know JPEG and PNG


def content_hash(content: bytes) -> str:
    """What a frame's picture, as `read_frame` gives it, is known by: 128 bits of its SHA-256, hexadecimal."""
    return hashlib.sha256(content).hexdigest()[:32]


def frame_hashes(frames: tuple[Frame, ...]) -> tuple[str, ...]:
    """The `content_hash` of each frame, empty where it cannot be read."""
    hashes = [""] * len(frames)
    for number, frame in enumerate(frames):
        with contextlib.suppress(DataError):
            hashes[number] = content_hash(read_frame(frame)[0])
    return tuple(hashes)


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture file, upright, as its header says; DataError where it is none, or too large."""
    with naming(path):
        width, height, turn = picture_header(_bytes(path))
    return (height, width) if turn > 4 else (width, height)


def picture_header(content: bytes) -> tuple[int, int, int]:
    """Width, height and orientation (EXIF, 1 to 8; 1 is upright) as a picture's header says.

    ValueError where it is no picture, moves, or has more than KEYREID_MAX_PIXELS.
    """
    limit, turn, moves = max_pixels(), 1, False
    Image.MAX_IMAGE_PIXELS = max(limit, Image.MAX_IMAGE_PIXELS or limit)  # Pillow refuses twice as many by itself
    try:
        with Image.open(io.BytesIO(content)) as picture:
            width, height = picture.size
            if width * height <= limit:
                moves = picture.format != "MPO" and getattr(picture, "is_animated", False)
                # Decoders turn TIFF themselves. Damaged tags turn nothing, as elsewhere.
                if picture.format != "TIFF" and any(tag in content for tag in _TURNS):
                    with contextlib.suppress(Exception):
                        turn = picture.getexif().get(0x0112, 1)
    except Image.DecompressionBombError:
        width, height = limit, 2
    except Exception as error:  # Pillow's readers raise many kinds
        raise ValueError(f"not a picture that can be read ({error})") from None
    if width * height > limit or moves:
        much = "several pictures" if moves else f"more pixels than {MAX_PIXELS} allows, {limit}"
        raise ValueError(f"holds {much}")
    return width, height, turn if turn in range(1, 9) else 1


def orientation(content: bytes) -> int:
    """The last of `picture_header`, without reading headers that turn nothing."""
    return picture_header(content)[2] if any(tag in content for tag in _TURNS) else 1


def max_pixels() -> int:
    """Most pixels that a picture may have, as the environment says; ConfigError where that is no number."""
    text = os.environ.get(MAX_PIXELS, str(DEFAULT_MAX_PIXELS))
    if not re.fullmatch("[1-9][0-9]{0,9}", text) or int(text) > 1 << 30:  # OpenCV's own bound
        raise ConfigError(f"{MAX_PIXELS}={text}: a number of pixels, from 1 to {1 << 30}")
    return int(text)


def decode(content: bytes, flags: int = cv2.IMREAD_COLOR_RGB) -> np.ndarray:
    """An encoded picture, upright: uint8 [H, W, 3], RGB unless OpenCV's `flags` say otherwise.

    ValueError where it is none, damaged or too large, or has other data than its header says.
    """
    width, height, turn = picture_header(content)
    if flags == EIGHTH and min(width, height) < 8:
        flags = cv2.IMREAD_COLOR  # an eighth of that is nothing
    with _ONE_LISTENER:  # what libraries print of damage is said nowhere else
        said, screen = os.memfd_create("said"), os.dup(2)
        fcntl.fcntl(said, fcntl.F_SETFL, os.O_APPEND)  # threads do not write over each other's words
        os.dup2(said, 2)
        try:
            picture = cv2.imdecode(np.frombuffer(content, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
        except cv2.error:
            picture = None
        finally:
            os.dup2(screen, 2)
            text = os.pread(said, 1 << 16, 0)
            os.close(said)
            os.close(screen)
    os.write(2, _DAMAGE.sub(b"", text))  # other threads' words, but for those of this very instant
    damage = [" ".join(line.decode(errors="replace").split()) for line in _DAMAGE.findall(text) if line]
    if picture is None or damage:
        raise ValueError(": ".join(["not a picture that decodes", *damage[:1]]))
    if turn > 4:
        picture = picture.swapaxes(0, 1)
    picture = picture[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    return np.ascontiguousarray(picture)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make of a ValueError a DataError that names the file."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{path}: {error}; mend or remove it") from None


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
    with naming(path):
        return decode(content, cv2.IMREAD_COLOR), "png" if content.startswith(PNG) else "jpg"


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
    width, height = (capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
    if width * height > max_pixels():
        raise DataError(f"{path}: frames of {width:.0f} x {height:.0f} pixels; {MAX_PIXELS} is the limit")
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
