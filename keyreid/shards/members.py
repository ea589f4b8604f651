"""What a tracklet's members are called and what they hold: JSON, keypoints, pictures and part heatmaps.

`shards/FORMAT.md` specifies the format, version 1. This module, index_file.py and card.py are its only implementation.
Nothing here is ever unpickled.
"""

import functools
import io
import json
import math
import struct
import threading
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import cv2
import numpy as np
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from keyreid.datasets import frames
from keyreid.datasets.tracklet import KEY_PATTERN
from keyreid.errors import DataError, KeyreidError
from keyreid.pose.heatmaps import TILE_HEIGHT, TILE_WIDTH
from keyreid.shards import schema

VERSION = 1
SPLITS = ("train", "query", "gallery", "junk", "all")  # an index stores the position in this tuple
PICTURES = ("jpg", "png")
UNKNOWN_IDENTITY = -2
MAX_KEY_LENGTH = 80  # with the longest member name this fits the 100 bytes of a plain tar header
LARGEST_SIDE = (1 << 16) - 1  # pixels; what the index can say
JSON, KEYPOINTS = 0, 1  # numbers of a tracklet's first members
_ONE_PARSER = threading.Lock()  # NumPy parses headers with ast, which two threads cannot in Python 3.11 (gh-106905)
_BEFORE_FRAMES, _PER_FRAME = 2, 2  # those two, then each frame's picture and heatmaps

Decoder = TypeVar("Decoder", bound=Callable[..., Any])


def refusing(decode: Decoder) -> Decoder:
    """Make `decode` raise ValueError for whatever bytes it cannot read, however the library below it fails.

    Libraries meet forged bytes with RecursionError, MemoryError, OverflowError, struct.error and more.
    """

    @functools.wraps(decode)
    def refused(*args: Any, **kwargs: Any) -> Any:
        try:
            return decode(*args, **kwargs)
        except (ValueError, KeyreidError):
            raise
        except Exception as error:
            raise ValueError(f"{type(error).__name__}: {error}") from None

    return refused


def members_of(frames: Any) -> Any:
    """How many members a tracklet of so many frames has; a number, or an array of them."""
    return _BEFORE_FRAMES + _PER_FRAME * frames


def picture_member(frame: int) -> int:
    """Number of a frame's picture among the tracklet's members; its heatmaps are the next."""
    return _BEFORE_FRAMES + _PER_FRAME * frame


def frame_of(member: int) -> int:
    """The frame that a member belongs to; 0 for those of the whole tracklet."""
    return max(0, member - _BEFORE_FRAMES) // _PER_FRAME


def member_name(member: int, picture: str) -> str:
    """The name after `KEY.` of a tracklet's n-th member; `picture` is the extension of that frame's picture."""
    if member < _BEFORE_FRAMES:
        return ("json", "kp.npy")[member]
    frame = frame_of(member)
    return f"f{frame:04d}.{picture}" if member == picture_member(frame) else f"f{frame:04d}.hm.png"


def check_key(key: str) -> None:
    """Raise DataError for a key that is no safe file name or does not fit a tar header."""
    if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        raise DataError(f"tracklet key {key[:120]!r}: use 1 to {MAX_KEY_LENGTH} letters, digits, '_' and '-'")


def encode_json(values: dict[str, Any]) -> bytes:
    """Compact JSON with sorted keys, so that equal values are equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def encode_keypoints(keypoints: np.ndarray) -> bytes:
    """Keypoints [T, 17, 3] as the bytes of a float32 `.npy` file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(keypoints, "<f4"), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


@refusing
def decode_json(content: bytes) -> Any:
    """Its values; ValueError also where a text in it is half a character, which nobody could write or show."""
    values = json.loads(content)
    if b"\\u" in content:
        encode_json(values)
    return values


@refusing
def decode_tracklet(content: bytes) -> dict[str, Any]:
    """A tracklet's JSON; ValueError where it lacks what readers need."""
    return schema.check(schema.TRACKLET, decode_json(content))


@refusing
def decode_array(content: bytes) -> np.ndarray:
    """The array of a `.npy` file; ValueError where its header promises anything but the bytes that are there.

    Nothing is allocated because a header says so, and nothing is unpickled.
    """
    stream = io.BytesIO(content)
    with _ONE_PARSER:
        first = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(stream)
    array = np.frombuffer(memoryview(content)[stream.tell() :], dtype)
    if any(side < 0 for side in shape) or math.prod(shape) != len(array):
        raise ValueError(f"its header says {shape}, but {len(array)} elements are there")
    return array.reshape(shape, order="F" if columns_first else "C").copy()


@refusing
def decode_keypoints(content: bytes, frames: int) -> np.ndarray:
    """The inverse of `encode_keypoints`; ValueError where it is not a float32 `.npy` file of `frames` poses."""
    keypoints = decode_array(content)
    if keypoints.shape != (frames, 17, 3) or keypoints.dtype != np.float32:
        raise ValueError(f"keypoints are {keypoints.dtype} {keypoints.shape}, not float32 ({frames}, 17, 3)")
    if not np.isfinite(keypoints).all():
        raise ValueError("keypoints that are not finite")
    return keypoints


@refusing
def picture_size(content: bytes, kind: str) -> tuple[int, int]:
    """Width and height that a JPEG's or PNG's header states.

    ValueError where it is none, or the end marker of a JPEG is missing (decoders paint the rest grey).
    """
    stream = io.BytesIO(content)
    try:
        with PngImageFile(stream) if kind == "png" else JpegImageFile(stream) as picture:
            # What stands before is the header, with perhaps a small picture of its own; cameras may write more behind.
            if kind == "jpg" and content.find(b"\xff\xd9", stream.tell()) < 0:
                raise ValueError("the JPEG is cut off: its end marker is missing")
            return picture.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"not a {'PNG' if kind == 'png' else 'JPEG'} ({error})") from None


@refusing
def decode_picture(content: bytes) -> np.ndarray:
    """Decode a JPEG or PNG to uint8 RGB [H, W, 3], or ValueError; packed pictures are upright, tags ignored."""
    picture = _decode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if picture is None:
        raise ValueError("the picture does not decode")
    return picture


@refusing
def check_picture(content: bytes) -> bytes:
    """The same bytes, or ValueError where a picture is damaged, larger than KEYREID_MAX_PIXELS, lies or is not upright.

    For packing and verifying; takes standard error for itself.
    """
    frames.decode(content, frames.EIGHTH)
    if (turn := frames.orientation(content)) != 1:
        raise ValueError(f"is stored sideways (EXIF orientation {turn}); pack the dataset again")
    return content


@refusing
def try_picture(content: bytes) -> bytes:
    """The same bytes, or ValueError: a picture is decoded small and grey, in half the time, to know that it can be."""
    if _decode(content, cv2.IMREAD_REDUCED_GRAYSCALE_8) is None:
        decode_picture(content)  # an eighth of a PNG of fewer than 8 pixels a side is nothing
    return content


def _decode(content: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # some damage gives None, some this
        return None


def encode_tiles(tiles: np.ndarray) -> bytes:
    """A frame's part heatmaps, uint8 [P, 64, 32], as one grey PNG with the P tiles side by side.

    Rows are not filtered and deflate looks for runs only: three times faster than OpenCV's encoder told the same.
    """
    parts = len(tiles)
    rows = np.zeros((TILE_HEIGHT, 1 + parts * TILE_WIDTH), np.uint8)
    rows[:, 1:].reshape(TILE_HEIGHT, parts, TILE_WIDTH)[:] = tiles.transpose(1, 0, 2)
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 8, zlib.Z_RLE)
    pixels = deflate.compress(rows) + deflate.flush()
    header = struct.pack(">IIBBBBB", parts * TILE_WIDTH, TILE_HEIGHT, 8, 0, 0, 0, 0)
    chunks = (png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, content, CRC-32."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@refusing
def decode_tiles(content: bytes, parts: int) -> np.ndarray:
    """The inverse of `encode_tiles`: uint8 [P, 64, 32], of any grey PNG of that size; ValueError for anything else."""
    size = parts * TILE_WIDTH, TILE_HEIGHT
    fits = content[16:24] == struct.pack(">II", *size)  # asked before anything is inflated
    picture = _decode(content, cv2.IMREAD_UNCHANGED) if fits else None
    if picture is None or picture.dtype != np.uint8 or picture.shape != size[::-1]:
        raise ValueError(f"heatmaps are not an 8-bit grey PNG of {size[0]} x {size[1]} pixels")
    return picture.reshape(TILE_HEIGHT, parts, TILE_WIDTH).transpose(1, 0, 2)
