"""The index of a shard: where everything in it is and what it holds, as columns in one file beside the tar."""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.errors import DataError
from keyreid.shards import members
from keyreid.shards.members import members_of

TAR_BLOCK = 512
_OF_TRACKLETS = {"identity": "<i8", "camera": "<i8", "split": "u1", "frames": "<i8"}
_OF_MEMBERS = {"offset": "<i8", "size": "<u4", "crc": "<u4"}
_OF_FRAMES = {"picture": "u1", "width": "<u2", "height": "<u2", "visible": "u1"}
_NUMBERS = {**_OF_TRACKLETS, **_OF_MEMBERS, **_OF_FRAMES}


@dataclass(frozen=True)
class ShardIndex:
    """Where everything in one shard is: N tracklets, M members, F frames, in the shard's order."""

    header: dict[str, Any]  # format, the shard's name, size and SHA-256, its number of parts, its settings' fingerprint
    key: np.ndarray  # str [N]
    identity: np.ndarray  # int64 [N], UNKNOWN_IDENTITY where not known
    camera: np.ndarray  # int64 [N]
    split: np.ndarray  # uint8 [N], position in SPLITS
    frames: np.ndarray  # int64 [N]
    offset: np.ndarray  # int64 [M], of a member's content in the shard
    size: np.ndarray  # uint32 [M], bytes
    crc: np.ndarray  # uint32 [M], CRC-32
    picture: np.ndarray  # uint8 [F], position in PICTURES
    width: np.ndarray  # uint16 [F], pixels
    height: np.ndarray
    visible: np.ndarray  # uint8 [F]: bit p says that part p has a keypoint (its heatmap is not all zero)

    @classmethod
    def joined(cls, header: dict[str, Any], pieces: "Sequence[ShardIndex]") -> "ShardIndex":
        """One index of the pieces' columns, one after the other."""
        return cls(header, *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("key", *_NUMBERS)))

    @cached_property
    def first_member(self) -> np.ndarray:
        """int64 [N]: position of each tracklet's first member."""
        counts = members_of(self.frames)
        return np.cumsum(counts) - counts

    @cached_property
    def first_frame(self) -> np.ndarray:
        """int64 [N]: position of each tracklet's first frame."""
        return np.cumsum(self.frames) - self.frames

    def member_name(self, tracklet: int, member: int) -> str:
        """The name after `KEY.` of a tracklet's n-th member."""
        picture = self.picture[self.first_frame[tracklet] + members.frame_of(member)]
        return members.member_name(member, members.PICTURES[picture])

    @property
    def heatmap_bytes(self) -> int:
        """Bytes that the heatmaps take in the shard, tar headers and padding included."""
        of_frames = np.ones(len(self.size), bool)
        of_frames[self.first_member] = of_frames[self.first_member + 1] = False
        sizes = self.size[of_frames][1::2].astype(np.int64)
        return int((TAR_BLOCK + -(-sizes // TAR_BLOCK) * TAR_BLOCK).sum())


def index_path(tar: Path) -> Path:
    """The index of a shard lies beside it."""
    return tar.with_suffix(".index.npz")


def encode_index(index: ShardIndex) -> bytes:
    """An index as the bytes of an uncompressed `.npz` file; the same index gives the same bytes."""
    arrays = {name: getattr(index, name).astype(dtype) for name, dtype in _NUMBERS.items()}
    arrays["key"] = index.key.astype(np.str_)
    arrays["header"] = np.frombuffer(members.encode_json(index.header), np.uint8)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # numpy dates every entry 1980-01-01
    return stream.getvalue()


def read_index(path: Path) -> ShardIndex:
    """Read a shard's index; DataError where it is missing, damaged, of another version, or contradicts itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its arrays are compressed")  # and might grow without bound
        with np.load(path, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            index = ShardIndex(header, arrays["key"], **{name: arrays[name] for name in _NUMBERS})
    except FileNotFoundError:
        raise DataError(f"{path}: the index is missing; pack the dataset again, whole shards are kept") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not a shard index ({error}); delete it and pack the dataset again") from None
    version = f"keyreid-index/{members.VERSION}"
    if header.get("format") != version:
        raise DataError(f"{path}: index format {header.get('format')!r}; this version reads {version}")
    lengths = dict.fromkeys(_OF_TRACKLETS, len(index.key)) | dict.fromkeys(_OF_FRAMES, index.frames.sum())
    lengths |= dict.fromkeys(_OF_MEMBERS, members_of(index.frames).sum())
    columns = ((getattr(index, name), dtype, lengths[name]) for name, dtype in _NUMBERS.items())
    right = all(len(column) == length and column.dtype == dtype for column, dtype, length in columns)
    codes = (index.split < len(members.SPLITS)).all() and (index.picture < len(members.PICTURES)).all()
    if not right or not codes or (index.frames < 1).any() or (index.offset < 0).any():
        raise DataError(f"{path}: the index contradicts itself; delete it and pack the dataset again")
    return index
