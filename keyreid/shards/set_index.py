"""The index of a whole set: all columns of its shards' indices one after the other, in one file that is mapped.

It is made once, when the set was packed or is opened first, from the indices beside the shards, each checked by its
SHA-256, and then serves every process of the machine. No process holds an object a tracklet.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.errors import DataError
from keyreid.files import replacing, sha256, writing
from keyreid.ownership import owned
from keyreid.progress import track
from keyreid.shards import columns
from keyreid.shards.card import CARD_NAME
from keyreid.shards.index_file import OF_FRAMES, OF_TRACKLETS, TAR_BLOCK, ShardIndex, index_shape, read_index, stranger
from keyreid.shards.members import PICTURES, frame_of, member_name, members_of
from keyreid.shards.sampling import number_within

FILE = "dataset.columns"
_FORMAT = "keyreid-columns/1"
_LONG = 1000  # shards, from which on the making shows its progress


@dataclass(frozen=True, eq=False)
class SetIndex:
    """Where everything in a set is: N tracklets of C identities in S shards, M members, F frames, in the set's order.

    What the rows of a shard's index say is in `ShardIndex`; the rest follows from them.
    """

    key: np.ndarray  # uint8 [N, W], padded with zeros
    identity: np.ndarray  # int64 [N], UNKNOWN_IDENTITY where not known
    camera: np.ndarray  # int64 [N]
    split: np.ndarray  # uint8 [N], position in SPLITS
    frames: np.ndarray  # int64 [N]
    first_frame: np.ndarray  # int64 [N], position of a tracklet's first frame
    first_byte: np.ndarray  # int64 [N], of the content of its first member, in its shard
    person: np.ndarray  # int32 [N], position of its identity in `identities`
    by_key: np.ndarray  # int64 [N], tracklets in the order of their keys
    by_identity: np.ndarray  # int64 [N], tracklets by identity, those of one in their own order
    identities: np.ndarray  # int64 [C], ascending
    identity_start: np.ndarray  # int64 [C + 1], where each one's begin in `by_identity`
    shard_start: np.ndarray  # int64 [S + 1], the first tracklet of each shard
    size: np.ndarray  # uint32 [M], bytes
    crc: np.ndarray  # uint32 [M], CRC-32
    picture: np.ndarray  # uint8 [F], position in PICTURES
    width: np.ndarray  # uint16 [F], pixels
    height: np.ndarray
    visible: np.ndarray  # uint8 [F]: bit p says that part p has a keypoint
    common: np.ndarray  # int64 [4]: C; parts; width and height of all pictures, zeros where they differ
    path: Path | None = None  # of the file; none where the columns are in memory alone
    made_of: str = ""  # SHA-256 of what it was made from

    @classmethod
    def open(cls, folder: Path, card: dict[str, Any], otherwise: Path) -> "SetIndex":
        """The index of a folder's shards, made if it is not there or of other ones.

        Args:
            otherwise: the folder for its file where nothing can be written beside the shards.

        Raises:
            DataError: the index of a shard is missing, damaged, or not the one that the card names.
            KeyreidError: the file cannot be written.
        """
        made_of = _fingerprint(folder, card)
        place = folder
        if not os.access(folder, os.W_OK):
            place = otherwise / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
        if (index := cls._read(place / FILE, made_of)) is None:
            with writing(place / FILE), owned(place, "the making of a set's columns", FILE, wait=True):
                if (index := cls._read(place / FILE, made_of)) is None:  # or somebody else has made it
                    with replacing(place / FILE, alone=True) as partial:
                        _make(folder, card, partial, made_of)
                    index = cls._read(place / FILE, made_of)
        if index is None:
            raise DataError(f"{folder}: the shards are being packed: open them again when that has ended")
        return index

    @classmethod
    def joined(cls, indices: Sequence[ShardIndex]) -> "SetIndex":
        """The index of a few shards, in memory alone."""
        sizes = [(len(index.key), len(index.picture)) for index in indices]
        forms = _forms(sizes, max(index.key.dtype.itemsize // 4 for index in indices))
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in forms.items()}
        _fill(arrays, indices)
        return cls(**_trimmed(arrays))

    @classmethod
    def _read(cls, path: Path, made_of: str) -> "SetIndex | None":
        with contextlib.suppress(ValueError, TypeError):
            arrays, about = columns.read(path)
            if _about(made_of).items() <= about.items():
                return cls(**_trimmed(arrays), path=path, made_of=made_of)
        return None

    @classmethod
    def fault(cls, folder: Path) -> str:
        """What is wrong with a folder's file, if it has one."""
        if not (folder / FILE).exists():
            return ""
        try:
            whole = columns.read(folder / FILE)[1]["sha256"] == columns.content_sha256(folder / FILE)
            return "" if whole else "its SHA-256 is not the one it states"
        except (OSError, ValueError, KeyError) as error:
            return str(error)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file."""
        if self.path is None:
            return SetIndex, tuple(getattr(self, field.name) for field in fields(self))
        return _reopened, (self.path, self.made_of)

    @property
    def parts(self) -> int:
        """Heatmaps a frame."""
        return int(self.common[1])

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Width and height of all pictures, where they are alike."""
        width, height = self.common[2:].tolist()
        return (width, height) if width else None

    def keys(self, rows: Any = slice(None)) -> np.ndarray:
        """The keys of tracklets, str [n]."""
        return _texts(self.key)[rows].astype(np.str_)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """The position of each key, int64 [n]; -1 where no tracklet has it."""
        width = self.key.shape[1]
        wanted = np.array([key.encode("ascii", "replace")[:width] for key in keys], f"S{width}")
        row = np.searchsorted(_texts(self.key), wanted, sorter=self.by_key)
        row = self.by_key[np.minimum(row, len(self.by_key) - 1)]
        return np.where(self.keys(row) == np.array(keys, np.str_), row, -1)

    def shard(self, rows: Any) -> Any:
        """The shards that tracklets lie in."""
        return np.searchsorted(self.shard_start, rows, "right") - 1

    def of_identities(self, rows: np.ndarray) -> np.ndarray:
        """The tracklets of some of the `identities`, one after the other: int64 [n]."""
        first, count = self.identity_start[rows], self.identity_start[rows + 1] - self.identity_start[rows]
        return self.by_identity[np.repeat(first, count) + number_within(count)]

    def sizes(self, frames: Any) -> np.ndarray:
        """Width and height of frames, uint16 [n, 2]."""
        return np.stack([self.width[frames], self.height[frames]], 1)

    def seen(self, frames: Any) -> np.ndarray:
        """Whether parts have a keypoint in frames, bool [n, P]."""
        return (self.visible[frames][:, None] >> np.arange(self.parts, dtype=np.uint8) & 1).astype(bool)

    def members(self, tracklet: int, member: int, count: int) -> list[tuple[int, int, int]]:
        """Of members that follow each other: where the content of each begins in the shard, its size, its CRC-32."""
        row = _first_member(tracklet, int(self.first_frame[tracklet]))
        sizes = self.size[row : row + member + count].astype(np.int64)
        steps = TAR_BLOCK + -(-sizes // TAR_BLOCK) * TAR_BLOCK
        starts = int(self.first_byte[tracklet]) + np.cumsum(steps) - steps
        crc = self.crc[row + member : row + member + count]
        return list(zip(starts[member:].tolist(), sizes[member:].tolist(), crc.tolist(), strict=True))

    def member_name(self, tracklet: int, member: int) -> str:
        """The name after `KEY.` of a tracklet's n-th member."""
        picture = self.picture[self.first_frame[tracklet] + frame_of(member)]
        return member_name(member, PICTURES[picture])


def _reopened(path: Path, made_of: str) -> SetIndex:
    if (index := SetIndex._read(path, made_of)) is None:
        raise DataError(f"{path}: the shards were packed anew while they were used; start again")
    return index


def _about(made_of: str) -> dict[str, str]:
    return {"format": _FORMAT, "made_of": made_of}


def _fingerprint(folder: Path, card: dict[str, Any]) -> str:
    """SHA-256 of the card, and of sizes and times of the indices; DataError where one is missing."""
    digest = hashlib.sha256((folder / CARD_NAME).read_bytes())
    for shard in card["shards"]:
        try:
            about = (folder / shard["index"]).stat()
        except OSError:
            read_index(folder / shard["index"])  # says what is wrong
            raise
        digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _make(folder: Path, card: dict[str, Any], path: Path, made_of: str) -> None:
    shapes = [index_shape(folder / shard["index"]) for shard in card["shards"]]
    forms = _forms([shape[:2] for shape in shapes], max(width for _, _, width in shapes))
    checked = track(_checked(folder, card), len(shapes), "indexing", "shards", quiet=len(shapes) < _LONG)
    try:
        _fill(columns.create(path, forms, _about(made_of)), checked)
        columns.seal(path)
    except ValueError as error:
        raise DataError(f"{folder}: {error}; pack the dataset again") from None


def _checked(folder: Path, card: dict[str, Any]) -> Iterator[ShardIndex]:
    """The indices that a card names, each found to be its own."""
    parts = set()
    for shard in card["shards"]:
        path = folder / shard["index"]
        index = read_index(path)
        if what := stranger(index, sha256(path), shard):
            raise DataError(f"{path}: {what}; pack the dataset again")
        if not set(index.camera.tolist()) <= set(card["cameras"]):
            raise DataError(f"{path}: the card does not list all of its cameras; pack the dataset again")
        parts.add(index.header["parts"])
        if len(parts) > 1:
            raise DataError(f"{folder}: shards with different numbers of parts; pack the dataset again")
        yield index


def _forms(shapes: Sequence[tuple[int, int]], key_width: int) -> dict[str, columns.Form]:
    """Type and shape of each column of shards with so many tracklets and frames; identities may be fewer."""
    total, frames = map(sum, zip(*shapes, strict=True))
    forms: dict[str, columns.Form] = {"key": ("u1", (total, key_width)), "person": ("i4", (total,))}
    forms |= {name: (kind, (total,)) for name, kind in OF_TRACKLETS.items()}
    forms |= dict.fromkeys(("first_frame", "first_byte", "by_key", "by_identity", "identities"), ("i8", (total,)))
    forms |= {"identity_start": ("i8", (total + 1,)), "shard_start": ("i8", (len(shapes) + 1,)), "common": ("i8", (4,))}
    forms |= dict.fromkeys(("size", "crc"), ("u4", (_first_member(total, frames),)))
    return forms | {name: (kind, (frames,)) for name, kind in OF_FRAMES.items()}


def _texts(key: np.ndarray) -> np.ndarray:
    """Keys as bytes, [N], in the same memory."""
    return key.view(f"S{key.shape[1]}")[:, 0]


def _first_member(tracklets: int, frames: int) -> int:
    """Members of so many tracklets, which have so many frames."""
    return members_of(0) * (tracklets - 1) + members_of(frames)


def _fill(arrays: dict[str, np.ndarray], indices: Iterable[ShardIndex]) -> None:
    """Write what the indices say; ValueError where two tracklets have the same key."""
    tracklet = member = frame = 0
    for number, index in enumerate(indices):
        own, frames = slice(tracklet, tracklet + len(index.key)), slice(frame, frame + len(index.picture))
        _texts(arrays["key"])[own] = index.key.astype(np.bytes_)
        for name in OF_TRACKLETS:
            arrays[name][own] = getattr(index, name)
        arrays["first_frame"][own] = frame + index.first_frame
        arrays["first_byte"][own] = index.offset[index.first_member]
        for name in ("size", "crc"):
            arrays[name][member : member + len(index.size)] = getattr(index, name)
        for name in OF_FRAMES:
            arrays[name][frames] = getattr(index, name)
        tracklet, member, frame = own.stop, member + len(index.size), frames.stop
        arrays["shard_start"][number + 1] = tracklet
        arrays["common"][1] = index.header["parts"]
    key, width, height = _texts(arrays["key"]), arrays["width"], arrays["height"]
    if (width == width[0]).all() and (height == height[0]).all():
        arrays["common"][2:] = width[0], height[0]
    arrays["by_key"][:] = by_key = np.argsort(key, kind="stable")
    if len(same := np.flatnonzero(key[by_key[1:]] == key[by_key[:-1]])):
        raise ValueError(f"two shards have a tracklet of the same key, {key[by_key[same[0]]].decode()}")
    identities, person, count = np.unique(arrays["identity"], return_inverse=True, return_counts=True)
    arrays["person"][:] = person
    arrays["by_identity"][:] = np.argsort(arrays["person"], kind="stable")
    arrays["identities"][: len(identities)] = identities
    arrays["identity_start"][1 : len(identities) + 1] = np.cumsum(count)
    arrays["common"][0] = len(identities)


def _trimmed(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    identities = int(arrays["common"][0])
    shorter = {"identities": identities, "identity_start": identities + 1}
    return {name: array[: shorter.get(name)] for name, array in arrays.items()}
