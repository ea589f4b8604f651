"""Check a set of shards, every byte of it, and compare it with the dataset it was packed from.

A tar is never extracted and its headers are never trusted: a shard is walked by its index, whose members must follow
each other without a gap, each behind a plain header that names exactly that member. So links, absolute names, `..`,
sizes that lie and members that hide are all refused, and whatever is damaged is named.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keyreid.datasets.frames import read_frame
from keyreid.datasets.tracklet import Dataset, Tracklet
from keyreid.errors import DataError
from keyreid.files import sha256
from keyreid.shards import format
from keyreid.shards.index import ShardSet, read_card
from keyreid.shards.writer import PackSettings, load_keypoints


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was packed.

    Attributes:
        file: the shard, index or card.
        member: KEY.name inside it, or nothing where the whole file is meant.
    """

    file: str
    member: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.member + ': ' if self.member else ''}{self.what}"


def verify(folder: Path, threads: int = 1) -> Iterator[tuple[str, list[Problem]]]:
    """Check each shard of a folder: sizes, hashes, every header, member and index entry; pictures must decode.

    Yields:
        The name of a shard and its problems, as each is done; last the folder's own ("").

    Raises:
        DataError: there is no card to begin with.
    """
    card = read_card(folder)
    with ThreadPoolExecutor(threads) as pool:
        for shard, problems in zip(
            card["shards"], pool.map(lambda shard: list(_verify_shard(folder, shard)), card["shards"]), strict=True
        ):
            yield shard["file"], problems
    known = {name for shard in card["shards"] for name in (shard["file"], shard["index"])} | {format.CARD_NAME}
    strays = sorted(
        path.name for path in folder.iterdir() if path.name not in known and not path.name.endswith(".lock")
    )
    found = [Problem(name, "", "is no part of the dataset; an older packing left it: delete it") for name in strays]
    if "card_sha256" not in card or (folder / format.CARD_NAME).read_bytes() != format.encode_card(card):
        found.append(Problem(format.CARD_NAME, "", "its bytes are not those that packing writes"))
    yield "", found


def compare(shards: ShardSet, dataset: Dataset, settings: PackSettings) -> Iterator[tuple[str, list[Problem]]]:
    """Compare the shards with the dataset that they were packed from.

    Args:
        settings: how they were packed. Pictures must be the same bytes if they were kept; if they were made JPEG, only
            their number is compared. Keypoints are compared where the settings have them.

    Yields:
        A tracklet's key and its problems.
    """
    keys = [tracklet.key for tracklet in dataset.tracklets]
    for missing in sorted(set(keys) - shards.position.keys()):
        yield missing, [Problem(shards.location, missing, "is in the dataset but was not packed")]
    for extra in sorted(shards.position.keys() - set(keys)):
        yield extra, [Problem(shards.location, extra, "was packed but is not in the dataset")]
    if [key for key in keys if key in shards.position] != [r.key for r in shards.tracklets if r.key in set(keys)]:
        yield "", [Problem(shards.location, "", "the tracklets are in another order than in the dataset")]
    for tracklet in dataset.tracklets:
        if tracklet.key in shards.position:
            yield tracklet.key, list(_compare_tracklet(shards, tracklet, settings))


def _verify_shard(folder: Path, shard: dict[str, Any]) -> Iterator[Problem]:
    tar, name = folder / shard["file"], shard["file"]
    try:
        content = (folder / shard["index"]).read_bytes()
        if hashlib.sha256(content).hexdigest() != shard["index_sha256"]:
            yield Problem(shard["index"], "", "its SHA-256 is not that of the card")
        index = format.read_index(folder / shard["index"])
    except (OSError, DataError) as error:
        yield Problem(shard["index"], "", getattr(error, "strerror", None) or str(error))
        index = None
    try:
        size = tar.stat().st_size
        if size != shard["bytes"]:
            yield Problem(name, "", f"has {size} bytes, {shard['bytes']} were packed")
        whole = sha256(tar) == shard["sha256"]
        if not whole:
            yield Problem(name, "", "its SHA-256 is not that of the card")
        with tar.open("rb") as file:
            if index is not None:
                damaged = 0
                for problem in _walk(file, size, name, index):
                    damaged += 1
                    yield problem
                if not whole and not damaged:
                    yield Problem(name, "", "only tar headers or padding differ; every member is whole")
    except OSError as error:
        yield Problem(name, "", error.strerror or str(error))


def _walk(file: BinaryIO, size: int, name: str, index: format.ShardIndex) -> Iterator[Problem]:
    """Each member of a shard, in the order of its index."""
    end = frame = member = 0
    for at, key in enumerate(index.key.tolist()):
        frames = int(index.frames[at])
        try:
            format.check_key(key)
        except DataError as error:
            yield Problem(name, "", str(error))
            return
        contents: list[bytes | None] = []
        for number in range(format.members_of(frames)):
            within = max(0, number - format.MEMBERS_BEFORE_FRAMES) // format.MEMBERS_PER_FRAME
            kind = format.PICTURES[min(index.picture[frame + within], 1)]
            full = f"{key}.{format.member_name(number, kind)}"
            offset, length = int(index.offset[member]), int(index.size[member])
            if offset != end + format.TAR_BLOCK or offset + length > size:
                cut = f"the shard ends at byte {size}" if offset + length > size else "there is a gap before it"
                yield Problem(name, full, f"bytes {offset} to {offset + length} by the index, but {cut}")
                return
            file.seek(end)
            yield from (Problem(name, full, what) for what in _header_faults(file.read(format.TAR_BLOCK), full, length))
            content = file.read(length)
            if zlib.crc32(content) != index.crc[member]:
                yield Problem(name, full, "its bytes are not those packed")
                contents.append(None)
            else:
                contents.append(content)
            padding = -length % format.TAR_BLOCK
            end = offset + length + padding
            if file.read(padding).strip(b"\0"):
                yield Problem(name, full, "the padding behind it is not empty")
            member += 1
        rows = slice(frame, frame + frames)
        yield from (Problem(name, f"{key}.{part}", what) for part, what in _content_faults(index, at, rows, contents))
        frame += frames
    file.seek(end)
    rest = file.read()
    if len(rest) < 2 * format.TAR_BLOCK or rest.strip(b"\0"):
        yield Problem(name, "", "does not end as a tar does: members that the index does not know, or it is cut off")


def _header_faults(block: bytes, name: str, length: int) -> Iterator[str]:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        yield f"its tar header is damaged ({error})"
        return
    if header.name != name:
        yield f"its tar header names {header.name!r} instead"
    if not header.isreg() or header.linkname:
        yield "its tar header is not that of a plain file"
    if header.size != length:
        yield f"its tar header says {header.size} bytes, the index {length}"


def _content_faults(
    index: format.ShardIndex, at: int, rows: slice, contents: list[bytes | None]
) -> Iterator[tuple[str, str]]:
    """What is wrong inside whole members: JSON that contradicts the index, arrays and pictures that do not decode."""
    frames, parts = int(index.frames[at]), index.header["parts"]
    if contents[0] is not None:
        try:
            described = json.loads(contents[0])
            identity = format.UNKNOWN_IDENTITY if described["identity"] is None else described["identity"]
            found = (described["key"], identity, described["camera"], described["split"], described["frames"])
        except (ValueError, KeyError, TypeError):
            found = None
        split = format.SPLITS[min(index.split[at], len(format.SPLITS) - 1)]
        if found != (index.key[at], index.identity[at], index.camera[at], split, frames):
            yield "json", "contradicts the index"
    if contents[1] is not None:
        try:
            format.decode_keypoints(contents[1], frames)
        except ValueError as error:
            yield "kp.npy", str(error)
    sizes = zip(index.width[rows].tolist(), index.height[rows].tolist(), strict=True)
    for frame, (kind, visible, size) in enumerate(zip(index.picture[rows], index.visible[rows], sizes, strict=True)):
        picture, heatmap = contents[2 + 2 * frame : 4 + 2 * frame]
        name = format.PICTURES[min(kind, 1)]
        try:
            if picture is not None:
                if format.picture_size(picture, name) != size:
                    raise ValueError("its size is not that of the index")
                format.check_picture(picture)
        except ValueError as error:
            yield f"f{frame:04d}.{name}", str(error)
        try:
            if heatmap is not None:
                drawn = format.decode_tiles(heatmap, parts).any((1, 2))
                # A joint at the very edge may be seen and yet round to nothing in its tile.
                if (drawn & ~(visible >> np.arange(parts) & 1).astype(bool)).any():
                    raise ValueError("shows a part that the index calls missing")
        except ValueError as error:
            yield f"f{frame:04d}.hm.png", str(error)


def _compare_tracklet(shards: ShardSet, tracklet: Tracklet, settings: PackSettings) -> Iterator[Problem]:
    position = shards.position[tracklet.key]
    record = shards.tracklets[position]
    shard = shards.shard_name(record.shard)
    identity = format.UNKNOWN_IDENTITY if tracklet.identity is None else tracklet.identity
    for name, packed, wanted in (
        ("identity", record.identity, identity),
        ("camera", record.camera, tracklet.camera),
        ("split", record.split, tracklet.split),
        ("number of frames", record.frames, len(tracklet.frames)),
    ):
        if packed != wanted:
            yield Problem(shard, tracklet.key, f"{name} is {packed}, in the dataset {wanted}")
            if name == "number of frames":
                return
    try:
        for number, frame in enumerate(tracklet.frames):
            content, kind = read_frame(frame)
            if settings.image == "keep" and shards.read_member(position, 2 + 2 * number) != content:
                yield Problem(shard, f"{tracklet.key}.f{number:04d}.{kind}", f"is not {frame.path}")
        known = settings.keypoints is not None or tracklet.keypoints is not None
        if known and not np.array_equal(shards.keypoints(position), load_keypoints(tracklet, settings)):
            yield Problem(shard, f"{tracklet.key}.kp.npy", "keypoints are not those of the source")
    except DataError as error:
        yield Problem(shard, tracklet.key, str(error))
