"""The index of a shard: where everything in it is and what it holds, as columns in one file beside the tar."""

import contextlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.errors import DataError, KeyreidError
from keyreid.files import check_plain, read_whole
from keyreid.pose.parts import part_names
from keyreid.shards import members, schema
from keyreid.shards.members import members_of

TAR_BLOCK = 512
LARGEST_INDEX = 1 << 31  # bytes
OF_TRACKLETS = {"identity": "<i8", "camera": "<i8", "split": "u1", "frames": "<i8"}
_OF_MEMBERS = {"offset": "<i8", "size": "<u4", "crc": "<u4"}
OF_FRAMES = {"picture": "u1", "width": "<u2", "height": "<u2", "visible": "u1"}
_OF_CARD = {"shard": "file", "bytes": "bytes", "sha256": "sha256"}  # entries of the header, and the card's for them
_NUMBERS = {**OF_TRACKLETS, **_OF_MEMBERS, **OF_FRAMES}
_ARRAYS = ("header", "key", *_NUMBERS)


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
    with _naming(path):
        return _checked(_decoded(read_whole(path, LARGEST_INDEX)))


def index_shape(path: Path) -> tuple[int, int, int]:
    """How many tracklets and frames an index says it has, and the width of its keys; DataError as for `read_index`."""
    with _naming(path):
        key, picture = _arrays(check_plain(path, LARGEST_INDEX), ("key", "picture")).values()
        return key.size, picture.size, max(1, key.dtype.itemsize // 4)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: the index is missing; pack the dataset again, whole shards are kept") from None
    except (OSError, ValueError, KeyreidError) as error:
        raise DataError(f"{path}: not a shard index ({error}); delete it and pack the dataset again") from None


def stranger(index: ShardIndex, content_sha256: str, shard: dict[str, Any]) -> str:
    """Why an index, whose file has this SHA-256, is not the one that a card names for a shard; or nothing."""
    if content_sha256 != shard["index_sha256"]:
        return "not the index that the card names: its SHA-256 is another"
    fits = all(index.header[name] == shard[entry] for name, entry in _OF_CARD.items())
    return "" if fits else "the index of another shard"


@members.refusing
def _arrays(file: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its arrays are compressed")  # and might grow without bound
        if sorted(archive.namelist()) != sorted(f"{name}.npy" for name in _ARRAYS):
            raise ValueError("its arrays are not those of an index")
        return {name: members.decode_array(archive.read(f"{name}.npy")) for name in names}


@members.refusing
def _decoded(content: bytes) -> ShardIndex:
    arrays = _arrays(io.BytesIO(content), _ARRAYS)
    header = members.decode_json(arrays.pop("header").tobytes())
    version = f"keyreid-index/{members.VERSION}"
    if not isinstance(header, dict) or header.get("format") != version:
        raise ValueError(f"it is not of the format {version}, which this version reads")
    return ShardIndex(schema.check(schema.INDEX, header), **arrays)


@members.refusing
def _checked(index: ShardIndex) -> ShardIndex:
    """The same index, or ValueError where its columns do not fit each other, or no shard can have them."""
    part_names(index.header["parts"])
    lengths = dict.fromkeys(OF_TRACKLETS, index.key.size) | dict.fromkeys(OF_FRAMES, index.picture.size)
    lengths |= dict.fromkeys(_OF_MEMBERS, 2 * index.key.size + 2 * index.picture.size)
    for name, dtype in _NUMBERS.items():
        column = getattr(index, name)
        if column.dtype != dtype or column.shape != (lengths[name],):
            raise ValueError(f"its array {name!r} is {column.dtype} {column.shape}, not {dtype} ({lengths[name]},)")
    width = index.key.dtype.itemsize // 4  # all keys of a set become as wide as the widest
    if index.key.shape != index.frames.shape or index.key.dtype.kind != "U" or width > members.MAX_KEY_LENGTH:
        raise ValueError(f"its keys are {index.key.dtype}, not texts of at most {members.MAX_KEY_LENGTH} characters")
    keys = index.key.tolist()
    for key in keys:
        members.check_key(key)
    if len(set(keys)) < len(keys):
        raise ValueError("two tracklets have the same key")
    # Each count is at most the whole first, so that their sum cannot wrap around.
    right = [(index.frames >= 1).all(), (index.frames <= index.picture.size).all()]
    right += [index.frames.sum() == index.picture.size, (index.split < len(members.SPLITS)).all()]
    right += [(index.picture < len(members.PICTURES)).all(), index.width.all(), index.height.all()]
    if not all(right):
        raise ValueError("the index contradicts itself")
    ends = index.offset + -(-index.size.astype(np.int64) // TAR_BLOCK) * TAR_BLOCK
    wrong = np.flatnonzero(index.offset != np.concatenate([[0], ends[:-1]]) + TAR_BLOCK)
    if len(wrong):
        at = int(np.searchsorted(index.first_member, wrong[0], "right")) - 1
        name = index.member_name(at, int(wrong[0] - index.first_member[at]))
        raise ValueError(f"tracklet {keys[at]}: member {name} does not lie where the one before it ends")
    if ends[-1] + 2 * TAR_BLOCK > index.header["bytes"]:
        raise ValueError(f"its members end at byte {ends[-1]} of a shard of {index.header['bytes']}")
    return index
