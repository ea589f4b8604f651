"""The shard format, version 1: names of members, the JSON of a tracklet, heatmap pictures, and the index of a shard.

`shards/FORMAT.md` is the specification; this module is its only implementation. Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from keyreid.datasets.tracklet import KEY_PATTERN
from keyreid.errors import DataError
from keyreid.pose.heatmaps import TILE_HEIGHT, TILE_WIDTH

VERSION = 1
CARD_NAME = "dataset.json"
SPLITS = ("train", "query", "gallery", "junk", "all")  # an index stores the position in this tuple
PICTURES = ("jpg", "png")
UNKNOWN_IDENTITY = -2
MAX_KEY_LENGTH = 80  # with the longest member name this fits the 100 bytes of a plain tar header
MEMBERS_BEFORE_FRAMES = 2  # KEY.json and KEY.kp.npy
MEMBERS_PER_FRAME = 2  # the picture and its heatmaps
TAR_BLOCK = 512
LARGEST_SIDE = (1 << 16) - 1  # pixels; what the index can say


def member_name(member: int, picture: str) -> str:
    """The name after `KEY.` of a tracklet's n-th member; `picture` is the extension of that frame's picture."""
    if member < MEMBERS_BEFORE_FRAMES:
        return ("json", "kp.npy")[member]
    frame, heatmap = divmod(member - MEMBERS_BEFORE_FRAMES, MEMBERS_PER_FRAME)
    return f"f{frame:04d}.hm.png" if heatmap else f"f{frame:04d}.{picture}"


def members_of(frames: int) -> int:
    """How many members a tracklet of so many frames has."""
    return MEMBERS_BEFORE_FRAMES + MEMBERS_PER_FRAME * frames


def check_key(key: str) -> None:
    """Raise DataError for a key that is no safe file name or does not fit a tar header."""
    if not KEY_PATTERN.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        raise DataError(f"tracklet key {key[:120]!r}: use 1 to {MAX_KEY_LENGTH} letters, digits, '_' and '-'")


def picture_size(content: bytes, kind: str) -> tuple[int, int]:
    """Width and height that a JPEG's or PNG's header states.

    Raises:
        ValueError: the content does not begin (or a JPEG does not end) as such a file does.
    """
    if kind == "png":
        if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 33:
            raise ValueError("not a PNG")
        return struct.unpack(">II", content[16:24])
    if content[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG")
    size, place = None, 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker == 0xDA:  # pixels begin, among which no marker can stand by chance; cameras may write more behind
            if content.find(b"\xff\xd9", place) < 0:
                break
            if size is None:
                raise ValueError("the JPEG states no size")
            return size
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", content[place + 5 : place + 9])
            size = width, height
        place += 2 + struct.unpack(">H", content[place + 2 : place + 4])[0]
    raise ValueError("the JPEG is cut off: its end marker is missing")


def decode_picture(content: bytes) -> np.ndarray:
    """Decode a JPEG or PNG to uint8 RGB [H, W, 3]; orientation tags are ignored, as every reader here does.

    Raises:
        ValueError: it does not decode.
    """
    picture = _decode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if picture is None:
        raise ValueError("the picture does not decode")
    return picture


def check_picture(content: bytes) -> None:
    """Decode a picture small and grey, in half the time, to know that it can be; ValueError where it cannot."""
    if _decode(content, cv2.IMREAD_REDUCED_GRAYSCALE_8) is None:
        decode_picture(content)  # an eighth of a PNG of fewer than 8 pixels a side is nothing


def _decode(content: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # some damage gives None, some this
        return None


_PNG_START = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encode_tiles(tiles: np.ndarray) -> bytes:
    """A frame's part heatmaps, uint8 [P, 64, 32], as one grey PNG with the P tiles side by side.

    Rows are not filtered and deflate looks for runs only: 3 times faster and a quarter smaller than libpng's defaults.
    """
    parts = len(tiles)
    rows = np.zeros((TILE_HEIGHT, 1 + parts * TILE_WIDTH), np.uint8)
    rows[:, 1:].reshape(TILE_HEIGHT, parts, TILE_WIDTH)[:] = tiles.transpose(1, 0, 2)
    deflate = zlib.compressobj(6, zlib.DEFLATED, 15, 8, zlib.Z_RLE)
    content = deflate.compress(rows) + deflate.flush()
    header = struct.pack(">IIBBBBB", parts * TILE_WIDTH, TILE_HEIGHT, 8, 0, 0, 0, 0)
    return b"".join(
        (_PNG_START[:8], _png_chunk(b"IHDR", header), _png_chunk(b"IDAT", content), _png_chunk(b"IEND", b""))
    )


def decode_tiles(content: bytes, parts: int) -> np.ndarray:
    """The inverse of `encode_tiles`: uint8 [P, 64, 32]. Any grey PNG of that size is read; ours five times faster.

    Raises:
        ValueError: it is no such picture.
    """
    width = parts * TILE_WIDTH
    picture = None
    if content[:16] == _PNG_START and content[37:41] == b"IDAT":
        if struct.unpack(">IIBBBBB", content[16:29]) != (width, TILE_HEIGHT, 8, 0, 0, 0, 0):
            raise ValueError(f"heatmaps are not an 8-bit grey PNG of {width} x {TILE_HEIGHT} pixels")
        length = struct.unpack(">I", content[33:37])[0]
        size = TILE_HEIGHT * (width + 1)
        if content[45 + length : 53 + length] == b"\0\0\0\0IEND":  # one chunk of pixels
            try:
                inflate = zlib.decompressobj()
                rows = np.frombuffer(inflate.decompress(content[41 : 41 + length], size), np.uint8)
            except zlib.error as error:
                raise ValueError(f"heatmaps do not decode: {error}") from None
            if len(rows) != size:
                raise ValueError("heatmaps are cut off")
            rows = rows.reshape(TILE_HEIGHT, width + 1)
            if not rows[:, 0].any():  # no row is filtered
                picture = rows[:, 1:]
    if picture is None:
        picture = _decode(content, cv2.IMREAD_UNCHANGED)
        if picture is None or picture.dtype != np.uint8 or picture.shape != (TILE_HEIGHT, width):
            raise ValueError(f"heatmaps are not an 8-bit grey PNG of {width} x {TILE_HEIGHT} pixels")
    return picture.reshape(TILE_HEIGHT, parts, TILE_WIDTH).transpose(1, 0, 2)


def encode_keypoints(keypoints: np.ndarray) -> bytes:
    """Keypoints [T, 17, 3] as the bytes of a float32 `.npy` file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(keypoints, "<f4"), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def decode_keypoints(content: bytes, frames: int) -> np.ndarray:
    """The inverse of `encode_keypoints`.

    Raises:
        ValueError: not a float32 `.npy` file of `frames` poses.
    """
    keypoints = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if keypoints.shape != (frames, 17, 3) or keypoints.dtype != np.float32:
        raise ValueError(f"keypoints are {keypoints.dtype} {keypoints.shape}, not float32 ({frames}, 17, 3)")
    return keypoints


def encode_json(values: dict[str, Any]) -> bytes:
    """Compact JSON with sorted keys, so that equal values are equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def card_digest(card: dict[str, Any]) -> str:
    """SHA-256 of a card without its own entry for it."""
    rest = {name: value for name, value in card.items() if name != "card_sha256"}
    return hashlib.sha256(encode_card(rest)).hexdigest()


def encode_card(card: dict[str, Any]) -> bytes:
    """A dataset card as readable JSON."""
    return (json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in one shard is: N tracklets, M members, F frames, in the shard's order.

    Attributes:
        header: format, name, size and SHA-256 of the shard, its number of parts, the fingerprint of its settings.
        key: str [N]. identity: int64 [N], UNKNOWN_IDENTITY where not known. camera: int64 [N].
        split: uint8 [N], position in SPLITS. frames: int64 [N].
        offset: int64 [M], of a member's content in the shard. size: uint32 [M], bytes. crc: uint32 [M], CRC-32.
        picture: uint8 [F], position in PICTURES. width, height: uint16 [F], pixels.
        visible: uint8 [F]: bit p says that part p has a keypoint (its heatmap is not all zero).
    """

    header: dict[str, Any]
    key: np.ndarray
    identity: np.ndarray
    camera: np.ndarray
    split: np.ndarray
    frames: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    picture: np.ndarray
    width: np.ndarray
    height: np.ndarray
    visible: np.ndarray

    def first_members(self) -> np.ndarray:
        """int64 [N]: position of each tracklet's first member."""
        counts = MEMBERS_BEFORE_FRAMES + MEMBERS_PER_FRAME * self.frames
        return np.cumsum(counts) - counts

    @property
    def heatmap_bytes(self) -> int:
        """Bytes that the heatmaps take in the shard, tar headers and padding included."""
        members = self.first_members()
        heatmaps = np.ones(len(self.size), bool)
        heatmaps[members] = heatmaps[members + 1] = False
        sizes = self.size[np.flatnonzero(heatmaps)[1::2]].astype(np.int64)
        return int((TAR_BLOCK + -(-sizes // TAR_BLOCK) * TAR_BLOCK).sum())


_COLUMNS = {
    **{"identity": "<i8", "camera": "<i8", "split": "u1", "frames": "<i8"},
    **{"offset": "<i8", "size": "<u4", "crc": "<u4"},
    **{"picture": "u1", "width": "<u2", "height": "<u2", "visible": "u1"},
}


def encode_index(index: ShardIndex) -> bytes:
    """An index as the bytes of an uncompressed `.npz` file; the same index gives the same bytes."""
    arrays = {name: np.asarray(getattr(index, name)).astype(dtype) for name, dtype in _COLUMNS.items()}
    arrays["key"] = np.asarray(index.key).astype(np.str_)
    arrays["header"] = np.frombuffer(encode_json(index.header), np.uint8)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # numpy dates every entry 1980-01-01
    return stream.getvalue()


def read_index(path: Path) -> ShardIndex:
    """Read and check the index of a shard.

    Raises:
        DataError: it is missing, damaged, of another version, or contradicts itself.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its arrays are compressed")  # and might grow without bound
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            index = ShardIndex(header, arrays["key"], **{name: arrays[name] for name in _COLUMNS})
    except FileNotFoundError:
        raise DataError(f"{path}: the index is missing; pack the dataset again, whole shards are kept") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a shard index ({error}); delete it and pack the dataset again") from None
    if header.get("format") != f"keyreid-index/{VERSION}":
        raise DataError(f"{path}: index format {header.get('format')!r}; this version reads keyreid-index/{VERSION}")
    total, frames = len(index.key), int(index.frames.sum())
    lengths = {name: len(getattr(index, name)) for name in _COLUMNS}
    members = total * MEMBERS_BEFORE_FRAMES + MEMBERS_PER_FRAME * frames
    expected = dict.fromkeys(("identity", "camera", "split", "frames"), total)
    expected |= dict.fromkeys(("offset", "size", "crc"), members)
    expected |= dict.fromkeys(("picture", "width", "height", "visible"), frames)
    right_types = all(getattr(index, name).dtype == dtype for name, dtype in _COLUMNS.items())
    if lengths != expected or not right_types or (index.frames < 1).any() or (index.offset < 0).any():
        raise DataError(f"{path}: the index contradicts itself; delete it and pack the dataset again")
    return index
