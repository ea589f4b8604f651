"""A set of shards: what is in it, which tracklets a split holds, and any member's bytes."""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyreid.config import DataConfig, Remote
from keyreid.errors import DataError
from keyreid.shards import members
from keyreid.shards.card import read_card
from keyreid.shards.set_index import SetIndex
from keyreid.shards.storage import DEFAULT_CACHE, LocalShardFiles, ShardFiles

_BLOCK = 1 << 18  # tracklets that are looked at together
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

    @property
    def facts(self) -> tuple[str, int, int, str, int]:
        """Key, identity, camera, split and number of frames."""
        return self.key, self.identity, self.camera, self.split, self.frames


class Tracklets(Sequence[TrackletRecord]):
    """The tracklets of a set by their position, each a record that is made when somebody looks at it."""

    def __init__(self, index: SetIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index.identity)

    def __getitem__(self, position: int) -> TrackletRecord:
        index, frames = self._index, int(self._index.frames[position])
        own = slice(first := int(index.first_frame[position]), first + frames)
        return TrackletRecord(
            *(str(index.keys([position])[0]), int(index.identity[position]), int(index.camera[position])),
            *(members.SPLITS[index.split[position]], frames, index.sizes(own), index.seen(own)),
            int(index.shard(position)),
        )


class ShardSet:
    """The packed dataset at one location. Reading is thread-safe; another process may be sent a set.

    Attributes:
        location: as it was given.
        card: the dataset card (`dataset.json`).
        files: where the shards' bytes come from.
        index: the columns of all shards, mapped; `identities` and `cameras` are two of them, int64 [N].
        split_number, holdout: the split that `select` and `training_identities` use unless told otherwise.
        parts: heatmaps a frame.
        tracklets: a record for each tracklet, in the dataset's order, made when it is looked at; a tracklet's position
            names it everywhere.
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
        otherwise = Path(cache_dir or DEFAULT_CACHE).expanduser() / "columns"
        return cls(str(location), card, SetIndex.open(folder, card, otherwise), files)

    @classmethod
    def from_config(cls, data: DataConfig) -> "ShardSet":
        """The shards, split and holdout that a configuration names."""
        # Windows fetch whole shards ahead.
        remote = "shards" if data.window and data.remote == "auto" else data.remote
        shards = cls.open(data.shards, data.cache_dir, data.cache_gigabytes, remote)
        shards.split_number, shards.holdout = data.split_number, data.holdout
        return shards

    def __init__(self, location: str, card: dict[str, Any], index: SetIndex, files: ShardFiles) -> None:
        self.location, self.card, self.index, self.files = location, card, index, files
        self.split_number, self.holdout = 0, 0.0
        self.parts = index.parts
        self.identities, self.cameras = index.identity, index.camera
        self.tracklets = Tracklets(index)
        self.camera_index: dict[int, int] = {camera: number for number, camera in enumerate(card["cameras"])}

    def __len__(self) -> int:
        return len(self.identities)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the columns anew."""
        own = {"split_number": self.split_number, "holdout": self.holdout}
        return ShardSet, (self.location, self.card, self.index, self.files), own

    def position_of(self, key: str) -> int:
        """The position of the tracklet with this key; DataError where there is none."""
        position = int(self.index.find([key])[0])
        if position < 0:
            raise DataError(f"{self.location}: no tracklet has the key {key}")
        return position

    def training_identities(self, split_number: int | None = None, holdout: float | None = None) -> np.ndarray:
        """The identities of a split's training tracklets, without those held out, ascending: int64 [C]."""
        return self.index.identities[np.flatnonzero(self.training_counts(split_number, holdout))]

    def training_counts(self, split_number: int | None = None, holdout: float | None = None) -> np.ndarray:
        """How many training tracklets each of `index.identities` has, none where it is held out: int64."""
        counts = self._counts(self.split_number if split_number is None else split_number)
        return np.where(self._held_out(counts, self.holdout if holdout is None else holdout), 0, counts)

    def _counts(self, split_number: int) -> np.ndarray:
        """How many training tracklets each identity has before anybody is held out; in blocks that caches hold."""
        counts = np.zeros(len(self.index.identities), np.int64)
        for start in range(0, len(self), _BLOCK):
            rows = slice(start, start + _BLOCK)
            persons = self.index.person[rows][self.in_split("train", split_number, rows)]
            counts += np.bincount(persons, minlength=len(counts))
        return counts

    def _held_out(self, counts: np.ndarray, holdout: float) -> np.ndarray:
        """Who of the training identities is held out: bool, of `index.identities`."""
        there = np.flatnonzero(counts)
        count = round(holdout * len(there))
        held_out = np.zeros(len(counts), bool)
        held_out[there[((np.arange(count) + 0.5) * len(there) / count).astype(np.int64)]] = True
        return held_out

    def select(self, split: Selection, split_number: int | None = None, holdout: float | None = None) -> np.ndarray:
        """Positions of the tracklets of a split, ascending: int64.

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
            return np.arange(len(self))
        held_out = split.startswith("holdout_")
        part = "train" if held_out else split
        chosen = np.flatnonzero(self.in_split(part, split_number))
        if held_out or (split == "train" and holdout):
            away = self._held_out(self._counts(split_number), holdout)
            chosen = chosen[away[self.index.person[chosen]] == held_out]
        return self._queries_or_gallery(split, chosen) if held_out else chosen

    def in_split(self, split: str, number: int, positions: Any = slice(None)) -> np.ndarray:
        """Whether tracklets are in a split, before anybody is held out: bool."""
        splits = self.card["splits"]
        if number and number >= len(splits):
            there = f"its splits are 0 to {len(splits) - 1}" if splits else "the dataset has one split"
            raise DataError(f"{self.location}: data.split_number={number}, but {there}")
        if not splits:
            return self.index.split[positions] == members.SPLITS.index(split)
        if split == "junk":
            return np.zeros(len(self.identities[positions]), bool)
        people = np.isin(self.index.identities, splits[number]["train" if split == "train" else "test"])
        chosen = people[self.index.person[positions]]
        if split != "train":
            chosen &= (self.cameras[positions] == self.card["query_camera"]) == (split == "query")
        return chosen

    def _queries_or_gallery(self, split: str, positions: np.ndarray) -> np.ndarray:
        """Of the tracklets of identities held out, those of one side."""
        if not len(positions):
            raise DataError(f"{self.location}: no identities are held out; set data.holdout, for example to 0.1")
        person, camera = self.index.person[positions], self.cameras[positions]
        if self.card["query_camera"] is not None:
            return positions[(camera == self.card["query_camera"]) == (split == "holdout_query")]
        if split == "holdout_gallery":
            return positions
        # Each identity's first tracklet of each camera, where two cameras saw it.
        there = np.flatnonzero(np.bincount(person))
        cameras = np.array(sorted(self.camera_index))
        pair = np.searchsorted(there, person) * len(cameras) + np.searchsorted(cameras, camera)
        first = np.full(len(there) * len(cameras), -1)
        first[pair[::-1]] = np.arange(len(pair))[::-1]
        first = np.sort(first[first >= 0])
        return positions[first[np.bincount(person[first])[person[first]] > 1]]

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
                yield self._span(position, self.index.members(position, members.picture_member(frame), 2))
                if keypoints:
                    yield self._span(position, self.index.members(position, members.KEYPOINTS, 1))

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
        name = f"tracklet {self.tracklets[position].key}: member {self.index.member_name(position, member)}"
        return DataError(
            f"{self.shard_name(self.index.shard(position))}: {name}: {what}; "
            "`keyreid inspect DIR --verify` finds all that is damaged; pack the shard again"
        )

    def _decoded(self, position: int, member: int, decode: Callable[..., Any], *args: Any) -> Any:
        """A member's content, decoded; a failure names the shard, the tracklet and the member."""
        try:
            return decode(self.read_member(position, member), *args)
        except ValueError as error:
            raise self.fault(position, member, str(error)) from None

    def _span(self, position: int, rows: list[tuple[int, int, int]]) -> tuple[int, int, int]:
        """Where members of a tracklet (`SetIndex.members`) are: number of the shard, bytes, offset."""
        return int(self.index.shard(position)), rows[-1][0] + rows[-1][1] - rows[0][0], rows[0][0]

    def _read(self, position: int, member: int, count: int) -> list[bytes]:
        """Members that follow each other, in one read, each checked."""
        rows = self.index.members(position, member, count)
        shard, total, start = self._span(position, rows)

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
