"""A set of shards: what is in it, which tracklets a split holds, and any member's bytes."""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyreid.config import DataConfig, Remote
from keyreid.errors import DataError
from keyreid.files import sha256
from keyreid.shards import members
from keyreid.shards.card import read_card
from keyreid.shards.index_file import ShardIndex, read_index, stranger
from keyreid.shards.storage import LocalShardFiles, ShardFiles

Selection = Literal["train", "query", "gallery", "junk", "all", "holdout_query", "holdout_gallery"]


@dataclass(frozen=True, slots=True, eq=False)
class TrackletRecord:
    """What the index knows about one tracklet; key, identity, camera and split as the dataset gave them."""

    key: str
    identity: int  # UNKNOWN_IDENTITY where it is unknown
    camera: int
    split: str
    frames: int  # T
    sizes: np.ndarray  # uint16 [T, 2], width and height of each frame in pixels
    visible: np.ndarray  # bool [T, P], whether a part has a keypoint in a frame
    shard: int  # position of its shard in the card


class ShardSet:
    """The packed dataset at one location. Reading is thread-safe; another process may be sent a set.

    Attributes:
        location: as it was given.
        card: the dataset card (`dataset.json`).
        files: where the shards' bytes come from.
        index: the columns of all shards, one after the other.
        split_number, holdout: the split that `select` and `label_of` use unless told otherwise.
        parts: heatmaps a frame.
        camera_index: a camera's number in a batch.
    """

    @classmethod
    def open(
        cls,
        location: str | Path,
        cache_dir: str | Path | None = None,
        cache_gigabytes: float | None = None,
        remote: Remote = "auto",
    ) -> "ShardSet":
        """Open a folder, or a URL; for its shards see `remote.open_remote`.

        Raises:
            DataError: no card, or a shard or index that is missing, cut off or does not belong to the card.
        """
        files: ShardFiles
        if re.match(r"[a-z0-9+]+://", str(location)):
            from keyreid.shards.remote import open_remote  # fsspec's protocols only where they are needed

            folder, files = open_remote(str(location), cache_dir, cache_gigabytes, remote)
            card = read_card(folder)
        else:
            folder = Path(location).expanduser()
            card = read_card(folder)
            files = LocalShardFiles.open(folder, card["shards"])
        return cls(str(location), card, _read_indices(folder, card), files)

    @classmethod
    def from_config(cls, data: DataConfig) -> "ShardSet":
        """The shards, split and holdout that a configuration names."""
        shards = cls.open(data.shards, data.cache_dir, data.cache_gigabytes, data.remote)
        shards.split_number, shards.holdout = data.split_number, data.holdout
        return shards

    def __init__(self, location: str, card: dict[str, Any], indices: Sequence[ShardIndex], files: ShardFiles) -> None:
        self.location, self.card, self.files = location, card, files
        self.split_number, self.holdout = 0, 0.0
        self.parts: int = indices[0].header["parts"]
        self.index = ShardIndex.joined({}, indices)
        self.identities, self.cameras = self.index.identity, self.index.camera
        self._shard = np.repeat(np.arange(len(indices)), [len(index.key) for index in indices])
        self.camera_index: dict[int, int] = {camera: number for number, camera in enumerate(card["cameras"])}
        unknown = sorted(set(self.cameras.tolist()) - self.camera_index.keys())
        if unknown:
            raise DataError(f"{location}: the card does not list the cameras {unknown}; pack the dataset again")

    def __len__(self) -> int:
        return len(self.index.key)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew when it is asked for: sending a set to a worker costs its columns alone."""
        derived = {name for name, value in vars(ShardSet).items() if isinstance(value, cached_property)}
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    @cached_property
    def frame_sizes(self) -> np.ndarray:
        """uint16 [F, 2]: width and height of every frame, pixels."""
        return np.stack([self.index.width, self.index.height], 1)

    @cached_property
    def visible(self) -> np.ndarray:
        """bool [F, P]: whether a part has a keypoint in a frame."""
        return (self.index.visible[:, None] >> np.arange(self.parts, dtype=np.uint8) & 1).astype(bool)

    @cached_property
    def tracklets(self) -> list[TrackletRecord]:
        """A record for each tracklet, in the dataset's order; a tracklet's position in it names it everywhere."""
        index = self.index
        columns = (index.key, index.identity, index.camera, index.split, index.frames, self._shard, index.first_frame)
        return [
            TrackletRecord(
                *(key, identity, camera, members.SPLITS[split], frames),
                *(self.frame_sizes[first : first + frames], self.visible[first : first + frames], shard),
            )
            for key, identity, camera, split, frames, shard, first in zip(*(c.tolist() for c in columns), strict=True)
        ]

    @cached_property
    def position(self) -> dict[str, int]:
        """Position of each key; DataError where two tracklets have the same."""
        positions = {key: number for number, key in enumerate(self.index.key.tolist())}
        if len(positions) < len(self):
            raise DataError(f"{self.location}: two shards have a tracklet of the same key; pack the dataset again")
        return positions

    @cached_property
    def label_of(self) -> dict[int, int]:
        """{identity: label} of the training identities of the chosen split, in sorted order."""
        return self.labels(self.split_number, self.holdout)

    def labels(self, split_number: int, holdout: float) -> dict[int, int]:
        """{identity: label} of a split's training identities without those held out, in sorted order."""
        identities = np.unique(self.identities[self.select("train", split_number, holdout)])
        return {identity: label for label, identity in enumerate(identities.tolist())}

    def select(self, split: Selection, split_number: int | None = None, holdout: float | None = None) -> list[int]:
        """Positions of the tracklets of a split, ascending.

        `train` leaves out the identities held out; `holdout_query` and `holdout_gallery` are those identities'
        training tracklets, for choosing hyperparameters without the test set: each identity's first tracklet of each
        camera queries all of them, where the identity was seen by two cameras. Where one camera queries the others
        (iLIDS-VID, PRID2011), it does so here too. Held out are round(holdout x identities), evenly spaced in sorted
        order.

        Raises:
            DataError: there is no such split.
        """
        split_number = self.split_number if split_number is None else split_number
        holdout = self.holdout if holdout is None else holdout
        if split == "all":
            return list(range(len(self)))
        held_out = split.startswith("holdout_")
        chosen = self._in_split("train" if held_out else split, split_number)
        if held_out or (split == "train" and holdout):
            identities = np.unique(self.identities[chosen])
            count = round(holdout * len(identities))
            identities = identities[((np.arange(count) + 0.5) * len(identities) / count).astype(np.int64)]
            chosen = chosen[np.isin(self.identities[chosen], identities) == held_out]
        return (self._queries_or_gallery(split, chosen) if held_out else chosen).tolist()

    def _in_split(self, split: str, number: int) -> np.ndarray:
        """The positions of a split before anybody is held out."""
        splits = self.card["splits"]
        if number and number >= len(splits):
            there = f"its splits are 0 to {len(splits) - 1}" if splits else "the dataset has one split"
            raise DataError(f"{self.location}: data.split_number={number}, but {there}")
        if not splits:
            return np.flatnonzero(self.index.split == members.SPLITS.index(split))
        if split == "junk":
            return np.arange(0)
        chosen = np.isin(self.identities, splits[number]["train" if split == "train" else "test"])
        if split != "train":
            chosen &= (self.cameras == self.card["query_camera"]) == (split == "query")
        return np.flatnonzero(chosen)

    def _queries_or_gallery(self, split: str, positions: np.ndarray) -> np.ndarray:
        """Of the tracklets of identities held out, those of one side."""
        if not len(positions):
            raise DataError(f"{self.location}: no identities are held out; set data.holdout, for example to 0.1")
        identity, camera = self.identities[positions], self.cameras[positions]
        if self.card["query_camera"] is not None:
            return positions[(camera == self.card["query_camera"]) == (split == "holdout_query")]
        if split == "holdout_gallery":
            return positions
        # Each identity's first tracklet of each camera, where two cameras saw it.
        first = np.sort(np.unique(np.stack([identity, camera]), axis=1, return_index=True)[1])
        seen, cameras = np.unique(identity[first], return_counts=True)
        return positions[first[np.isin(identity[first], seen[cameras > 1])]]

    def read_member(self, position: int, member: int) -> bytes:
        """The content of a tracklet's n-th member; DataError where its bytes are not those that were packed."""
        return self._read(position, member, 1)[0]

    def read_frame(self, position: int, frame: int) -> list[bytes]:
        """A frame's picture and its heatmaps, which lie side by side, in one read; both checked."""
        return self._read(position, members.picture_member(frame), 2)

    def ahead(self, frames: Iterable[tuple[int, int]], keypoints: bool) -> None:
        """Say what `read_frame` will be asked for next, (position, frame) of each, and whether `keypoints` will be."""

        def ranges() -> Iterator[tuple[int, int, int]]:
            for position, frame in frames:
                yield self._range(position, members.picture_member(frame), 2)
                if keypoints:
                    yield self._range(position, members.KEYPOINTS, 1)

        self.files.ahead(ranges())

    def metadata(self, position: int) -> dict[str, Any]:
        """A tracklet's JSON."""
        return self._decoded(position, members.JSON, members.decode_tracklet)

    def keypoints(self, position: int) -> np.ndarray:
        """A tracklet's keypoints, float32 [T, 17, 3], in pixels of its frames."""
        return self._decoded(position, members.KEYPOINTS, members.decode_keypoints, int(self.index.frames[position]))

    def picture(self, position: int, frame: int) -> np.ndarray:
        """A frame, uint8 RGB [H, W, 3], as it was packed."""
        return self._decoded(position, members.picture_member(frame), members.decode_picture)

    def heatmaps(self, position: int, frame: int) -> np.ndarray:
        """A frame's part heatmaps, uint8 [P, 64, 32]."""
        return self._decoded(position, members.picture_member(frame) + 1, members.decode_tiles, self.parts)

    def shard_name(self, shard: int) -> str:
        """Where a shard is, for messages."""
        return f"{self.location.rstrip('/')}/{self.card['shards'][shard]['file']}"

    def fault(self, position: int, member: int, what: str) -> DataError:
        """The error for a member that cannot be used."""
        name = f"tracklet {self.index.key[position]}: member {self.index.member_name(position, member)}"
        return DataError(
            f"{self.shard_name(self._shard[position])}: {name}: {what}; "
            "`keyreid inspect DIR --verify` finds all that is damaged; pack the shard again"
        )

    def _decoded(self, position: int, member: int, decode: Callable[..., Any], *args: Any) -> Any:
        """A member's content, decoded; a failure names the shard, the tracklet and the member."""
        try:
            return decode(self.read_member(position, member), *args)
        except ValueError as error:
            raise self.fault(position, member, str(error)) from None

    def _range(self, position: int, member: int, count: int) -> tuple[int, int, int]:
        """Where members that follow each other are: number of the shard, bytes, offset."""
        first = int(self.index.first_member[position]) + member
        start, last = self.index.offset[[first, first + count - 1]].tolist()
        return int(self._shard[position]), last + int(self.index.size[first + count - 1]) - start, start

    def _read(self, position: int, member: int, count: int) -> list[bytes]:
        """Members that follow each other, in one read, each checked."""
        shard, total, start = self._range(position, member, count)
        row = int(self.index.first_member[position]) + member
        columns = self.index.offset, self.index.size, self.index.crc
        rows = list(zip(*(column[row : row + count].tolist() for column in columns), strict=True))

        def right(content: bytes) -> bool:
            return all(zlib.crc32(content[at - start :][:size]) == crc for at, size, crc in rows)

        content = self.files.read(shard, total, start, right)
        pieces = []
        for number, (offset, size, checksum) in enumerate(rows, member):
            pieces.append(content[offset - start :][:size])
            short = size - len(pieces[-1])
            if short or zlib.crc32(pieces[-1]) != checksum:
                what = f"the shard ends {short} bytes early" if short else "its bytes are not those packed"
                raise self.fault(position, number, what)
        return pieces


def _read_indices(folder: Path, card: dict[str, Any]) -> list[ShardIndex]:
    indices = []
    for shard in card["shards"]:
        path = folder / shard["index"]
        indices.append(index := read_index(path))
        if what := stranger(index, sha256(path), shard):
            raise DataError(f"{path}: {what}; pack the dataset again")
    if len({index.header["parts"] for index in indices}) > 1:
        raise DataError(f"{folder}: shards with different numbers of parts; pack the dataset again")
    return indices
