"""A set of shards: what is in it, which tracklets a split holds, and any member's bytes."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from keyreid.config import DataConfig
from keyreid.errors import DataError
from keyreid.pose.parts import part_names
from keyreid.shards import format
from keyreid.shards.storage import LocalShardFiles, ShardFiles

Selection = Literal["train", "query", "gallery", "junk", "all", "holdout_query", "holdout_gallery"]


@dataclass(frozen=True, slots=True, eq=False)
class TrackletRecord:
    """What the index knows about one tracklet.

    Attributes:
        key, identity, camera, split: as the dataset gave them; an unknown identity is UNKNOWN_IDENTITY.
        frames: T.
        sizes: uint16 [T, 2], width and height of each frame in pixels.
        visible: bool [T, P], whether a part has a keypoint in a frame.
        shard: position of its shard in the card.
    """

    key: str
    identity: int
    camera: int
    split: str
    frames: int
    sizes: np.ndarray
    visible: np.ndarray
    shard: int


class ShardSet:
    """The packed dataset at one location. Reading is thread-safe; another process may be sent a set.

    Attributes:
        location: as it was given.
        card: the dataset card (`dataset.json`).
        tracklets: a record for each tracklet, in the dataset's order; a tracklet's position in it names it everywhere.
        split_number, holdout: the split that `select` and `label_of` use unless told otherwise.
        parts: heatmaps a frame.
    """

    @classmethod
    def open(
        cls,
        location: str | Path,
        cache_dir: str | Path | None = None,
        cache_gigabytes: float | None = None,
        split_number: int = 0,
        holdout: float = 0.0,
    ) -> ShardSet:
        """Open a folder, or a URL whose shards are fetched whole into `cache_dir` when they are first read.

        Raises:
            DataError: no card, or a shard or index that is missing, cut off or does not belong to the card.
        """
        if re.match(r"[a-z0-9+]+://", str(location)):
            from keyreid.shards.remote import open_remote  # fsspec's protocols only where they are needed

            folder, files = open_remote(str(location), cache_dir, cache_gigabytes)
            card = read_card(folder)
        else:
            folder = Path(location).expanduser()
            card = read_card(folder)
            paths = [folder / shard["file"] for shard in card["shards"]]
            for path, shard in zip(paths, card["shards"], strict=True):
                _check_size(path, shard["bytes"])
            files = LocalShardFiles(paths)
        return cls(str(location), card, _read_indices(folder, card), files, split_number, holdout)

    @classmethod
    def from_config(cls, data: DataConfig) -> ShardSet:
        """The shards, split and holdout that a configuration names."""
        return cls.open(data.shards, data.cache_dir, data.cache_gigabytes, data.split_number, data.holdout)

    def __init__(
        self,
        location: str,
        card: dict[str, Any],
        indices: list[format.ShardIndex],
        files: ShardFiles,
        split_number: int = 0,
        holdout: float = 0.0,
    ) -> None:
        self.location = location
        self.card = card
        self.files = files
        self.split_number = split_number
        self.holdout = holdout
        self.parts: int = indices[0].header["parts"]
        self._members = _joined(indices, ("offset", "size", "crc"))
        self._frames = _joined(indices, ("picture", "width", "height", "visible"))
        self._columns = _joined(indices, ("key", "identity", "camera", "split", "frames"))
        self._columns["shard"] = np.repeat(np.arange(len(indices)), [len(index.key) for index in indices])
        self.identities, self.cameras = self._columns["identity"], self._columns["camera"]
        counts = self._columns["frames"]
        self._first_frame = np.cumsum(counts) - counts
        members = format.members_of(counts)
        self._first_member = np.cumsum(members) - members
        self.frame_sizes = np.stack([self._frames["width"], self._frames["height"]], 1)
        self.visible = (self._frames["visible"][:, None] >> np.arange(self.parts, dtype=np.uint8) & 1).astype(bool)
        self.tracklets = self._records()
        self.camera_index: dict[int, int] = {camera: number for number, camera in enumerate(card["cameras"])}
        unknown = sorted(set(self.cameras.tolist()) - self.camera_index.keys())
        if unknown:
            raise DataError(f"{location}: the card does not list the cameras {unknown}; pack the dataset again")

    def __len__(self) -> int:
        return len(self.tracklets)

    def __getstate__(self) -> dict[str, Any]:
        """Without the records, which are made anew: sending a set to a worker costs its arrays alone."""
        return {
            name: value for name, value in self.__dict__.items() if name not in ("tracklets", "position", "label_of")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tracklets = self._records()

    @cached_property
    def position(self) -> dict[str, int]:
        """Position of each key."""
        return {record.key: number for number, record in enumerate(self.tracklets)}

    @cached_property
    def label_of(self) -> dict[int, int]:
        """{identity: label} of the training identities of the chosen split, in sorted order."""
        return self.labels(self.split_number, self.holdout)

    def labels(self, split_number: int, holdout: float) -> dict[int, int]:
        """{identity: label} of a split's training identities without those held out, in sorted order."""
        identities = sorted({self.tracklets[p].identity for p in self.select("train", split_number, holdout)})
        return {identity: label for label, identity in enumerate(identities)}

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
            return list(range(len(self.tracklets)))
        if split.startswith("holdout_"):
            return self._holdout(split, split_number, holdout)
        positions = self._whole(split, split_number)
        if split != "train" or not holdout:
            return positions
        out = self._held_out(split_number, holdout)
        return [p for p in positions if self.tracklets[p].identity not in out]

    def read(self, position: int, members: Sequence[str]) -> list[bytes]:
        """The content of members of a tracklet, by the name after `KEY.` (`json`, `kp.npy`, `f0000.hm.png`).

        Raises:
            DataError: there is no such member, or its bytes are not those that were packed.
        """
        record = self.tracklets[position]
        numbers = {self.member_name(position, n): n for n in range(format.members_of(record.frames))}
        contents = []
        for name in members:
            if name not in numbers:
                raise DataError(f"{self.shard_name(record.shard)}: tracklet {record.key} has no member {name}")
            contents.append(self.read_member(position, numbers[name]))
        return contents

    def read_member(self, position: int, member: int) -> bytes:
        """The content of a tracklet's n-th member, checked."""
        row = int(self._first_member[position]) + member
        offset, size = int(self._members["offset"][row]), int(self._members["size"][row])
        content = self.files.read(self.tracklets[position].shard, size, offset)
        return self._checked(content, row, position, member)

    def read_frame(self, position: int, frame: int) -> tuple[bytes, bytes]:
        """A frame's picture and its heatmaps, which lie side by side, in one read; both checked."""
        member = format.MEMBERS_BEFORE_FRAMES + format.MEMBERS_PER_FRAME * frame
        row = int(self._first_member[position]) + member
        start, second = self._members["offset"][row : row + 2].tolist()
        size, heatmap_size = self._members["size"][row : row + 2].tolist()
        content = self.files.read(self.tracklets[position].shard, second + heatmap_size - start, start)
        picture = self._checked(content[:size], row, position, member)
        return picture, self._checked(content[second - start :], row + 1, position, member + 1)

    def metadata(self, position: int) -> dict[str, Any]:
        """A tracklet's JSON."""
        return json.loads(self.read_member(position, 0))

    def keypoints(self, position: int) -> np.ndarray:
        """A tracklet's keypoints, float32 [T, 17, 3], in pixels of its frames."""
        return self.decoded(position, 1, format.decode_keypoints, self.tracklets[position].frames)

    def picture(self, position: int, frame: int) -> np.ndarray:
        """A frame, uint8 RGB [H, W, 3], as it was packed."""
        member = format.MEMBERS_BEFORE_FRAMES + format.MEMBERS_PER_FRAME * frame
        return self.decoded(position, member, format.decode_picture)

    def heatmaps(self, position: int, frame: int) -> np.ndarray:
        """A frame's part heatmaps, uint8 [P, 64, 32]."""
        member = format.MEMBERS_BEFORE_FRAMES + format.MEMBERS_PER_FRAME * frame + 1
        return self.decoded(position, member, format.decode_tiles, self.parts)

    def decoded(self, position: int, member: int, decode: Any, *args: Any) -> Any:
        """A member's content, decoded; a failure names the shard, the tracklet and the member."""
        try:
            return decode(self.read_member(position, member), *args)
        except ValueError as error:
            raise self.fault(position, member, str(error)) from None

    def member_name(self, position: int, member: int) -> str:
        """The name after `KEY.` of a tracklet's n-th member."""
        frame = max(0, member - format.MEMBERS_BEFORE_FRAMES) // format.MEMBERS_PER_FRAME
        return format.member_name(member, format.PICTURES[self._frames["picture"][self._first_frame[position] + frame]])

    def shard_name(self, shard: int) -> str:
        """Where a shard is, for messages."""
        return f"{self.location.rstrip('/')}/{self.card['shards'][shard]['file']}"

    def fault(self, position: int, member: int, what: str) -> DataError:
        """The error for a member that cannot be used."""
        record = self.tracklets[position]
        name = self.member_name(position, member)
        return DataError(
            f"{self.shard_name(record.shard)}: tracklet {record.key}: member {name}: {what}; "
            "`keyreid inspect DIR --verify` finds all that is damaged; pack the shard again"
        )

    def close(self) -> None:
        """Close the shards' files."""
        self.files.close()

    def _records(self) -> list[TrackletRecord]:
        columns = {name: column.tolist() for name, column in self._columns.items()}
        ends = np.cumsum(self._columns["frames"]).tolist()
        return [
            TrackletRecord(
                *(key, identity, camera, format.SPLITS[split], frames),
                *(self.frame_sizes[end - frames : end], self.visible[end - frames : end], shard),
            )
            for key, identity, camera, split, frames, shard, end in zip(*columns.values(), ends, strict=True)
        ]

    def _checked(self, content: bytes, row: int, position: int, member: int) -> bytes:
        if zlib.crc32(content) != self._members["crc"][row] or len(content) != self._members["size"][row]:
            expected = int(self._members["size"][row])
            cut = len(content) < expected
            what = f"the shard ends {expected - len(content)} bytes early" if cut else "its bytes are not those packed"
            raise self.fault(position, member, what)
        return content

    def _whole(self, split: str, split_number: int) -> list[int]:
        """A split with nobody held out."""
        splits = self.card["splits"]
        if not splits:
            if split_number:
                raise DataError(f"{self.location}: data.split_number={split_number}, but the dataset has one split")
            return [p for p, record in enumerate(self.tracklets) if record.split == split]
        if split_number >= len(splits):
            raise DataError(
                f"{self.location}: data.split_number={split_number}, but its splits are 0 to {len(splits) - 1}"
            )
        wanted = set(splits[split_number]["train" if split == "train" else "test"])
        camera = self.card["query_camera"]
        if split == "junk":
            return []
        return [
            p
            for p, record in enumerate(self.tracklets)
            if record.identity in wanted and (split == "train" or (record.camera == camera) == (split == "query"))
        ]

    def _held_out(self, split_number: int, holdout: float) -> set[int]:
        identities = sorted({self.tracklets[p].identity for p in self._whole("train", split_number)})
        count = round(holdout * len(identities))
        return {identities[int((n + 0.5) * len(identities) / count)] for n in range(count)}

    def _holdout(self, split: str, split_number: int, holdout: float) -> list[int]:
        out = self._held_out(split_number, holdout)
        positions = [p for p in self._whole("train", split_number) if self.tracklets[p].identity in out]
        if not positions:
            raise DataError(f"{self.location}: no identities are held out; set data.holdout, for example to 0.1")
        camera = self.card["query_camera"]
        if camera is not None:
            return [p for p in positions if (self.tracklets[p].camera == camera) == (split == "holdout_query")]
        if split == "holdout_gallery":
            return positions
        first: dict[tuple[int, int], int] = {}
        for p in positions:
            first.setdefault((self.tracklets[p].identity, self.tracklets[p].camera), p)
        cameras = {identity: sum(key[0] == identity for key in first) for identity in out}
        return [p for (identity, _), p in first.items() if cameras[identity] > 1]


def read_card(folder: Path) -> dict[str, Any]:
    """Read and check a dataset card.

    Raises:
        DataError: there is none, or it is not one.
    """
    path = folder / format.CARD_NAME
    try:
        card = json.loads(path.read_bytes())
    except FileNotFoundError:
        tars = len(list(folder.glob("*.tar"))) if folder.is_dir() else 0
        hint = (
            f"{tars} shards are there, so packing has not finished: run `keyreid shard` again"
            if tars
            else "make the shards with `keyreid shard`"
        )
        raise DataError(f"{path}: no dataset card; {hint}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a dataset card ({error}); pack the dataset again") from None
    kind = card.get("format") if isinstance(card, dict) else None
    if kind != f"keyreid-dataset/{format.VERSION}":
        raise DataError(f"{path}: dataset format {kind!r}; this version reads keyreid-dataset/{format.VERSION}")
    _check_structure(path, card)
    for shard in card["shards"]:
        for name in (shard["file"], shard["index"]):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise DataError(f"{path}: {name!r} is not the name of a shard")
    if not card["shards"]:
        raise DataError(f"{path}: the dataset has no shards")
    if card.get("card_sha256", digest := format.card_digest(card)) != digest:  # early cards do not state it
        raise DataError(f"{path}: the card is damaged: its SHA-256 is not the one it states; pack the dataset again")
    return card


_CARD = {"name": str, "source": dict, "settings": dict, "counts": dict, "by_split": dict, "cameras": list}
_CARD |= {"splits": list, "shards": list}
_SHARD = {"file": str, "index": str, "sha256": str, "index_sha256": str, "bytes": int, "index_bytes": int}


def _check_structure(path: Path, card: dict[str, Any]) -> None:
    """Refuse a card that lacks what every reader needs."""
    shards = card.get("shards")
    entries = [(card, _CARD), *((shard, _SHARD) for shard in (shards if isinstance(shards, list) else ()))]
    for values, kinds in entries:
        wrong = [n for n, kind in kinds.items() if not isinstance(values, dict) or not isinstance(values.get(n), kind)]
        if wrong:
            what = f"{wrong[0]!r} is missing or no {kinds[wrong[0]].__name__}"
            raise DataError(f"{path}: the card is damaged: {what}; delete it and pack the dataset again")


def _read_indices(folder: Path, card: dict[str, Any]) -> list[format.ShardIndex]:
    indices = []
    for shard in card["shards"]:
        path = folder / shard["index"]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; pack the dataset again, whole shards are kept") from None
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            raise DataError(f"{path}: not the index that the card names; pack the dataset again")
        index = format.read_index(path)
        header = index.header
        if (header["shard"], header["bytes"], header["sha256"]) != (shard["file"], shard["bytes"], shard["sha256"]):
            raise DataError(f"{path}: the index of another shard; pack the dataset again")
        indices.append(index)
    if len({index.header["parts"] for index in indices}) > 1:
        raise DataError(f"{folder}: shards with different numbers of parts; pack the dataset again")
    part_names(indices[0].header["parts"])
    return indices


def _check_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; pack the dataset again, whole shards are kept") from None
    if found != size:
        raise DataError(f"{path}: {found} bytes, but {size} were packed; pack the dataset again, whole shards are kept")


def _joined(indices: list[format.ShardIndex], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([getattr(index, name) for index in indices]) for name in names}
