"""Check a set of shards, every byte of it, and compare it with the dataset it was packed from.

A tar is never extracted and its headers are never trusted: a shard is walked by its index, whose members must follow
each other without a gap, each behind a plain header that names exactly that member. So links, absolute names, `..`,
sizes that lie and members that hide are all refused, and whatever is damaged is named.
"""

import stat
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
from keyreid.shards import members
from keyreid.shards.card import CARD_NAME, encode_card, read_card
from keyreid.shards.index_file import TAR_BLOCK, ShardIndex, read_index, stranger
from keyreid.shards.layout import ordered
from keyreid.shards.members import PICTURES, SPLITS, UNKNOWN_IDENTITY
from keyreid.shards.set_index import FILE as COLUMNS
from keyreid.shards.set_index import SetIndex
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings, index_facts, load_keypoints

_LONGEST_END = 2 * TAR_BLOCK + 10_240  # a tar ends with two empty blocks, and with more up to a multiple of 10,240
_CLAIMS = (".lock", ".owner")  # of files that say who has the folder, or what they left
_COMPARED = ("identity", "camera", "split", "number of frames")


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was packed."""

    file: str  # the shard, index or card
    member: str  # KEY.name inside it, or nothing where the whole file is meant
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.member + ': ' if self.member else ''}{self.what}"


def verify(folder: Path, threads: int = 1, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, list[Problem]]]:
    """Check each shard of a folder: sizes, hashes, every header, member and index entry; pictures must decode.

    Args:
        share: (i, n): of shards i, i + n, ... alone; what belongs to no shard is checked with the first share.

    Yields:
        The name of a shard and its problems, as each is done; last the folder's own ("").

    Raises:
        DataError: there is no card to begin with.
    """
    card = read_card(folder)
    with ThreadPoolExecutor(threads) as pool:
        whole = True
        own = card["shards"][share[0] :: share[1]]
        found = pool.map(lambda shard: _all_of(shard["file"], _verify_shard(folder, shard)), own)
        for shard, problems in zip(own, found, strict=True):
            whole &= not problems
            yield shard["file"], problems
    if share[0] == 0:
        yield "", _all_of(CARD_NAME, _verify_folder(folder, card, whole))


def compare(shards: ShardSet, dataset: Dataset, settings: PackSettings) -> Iterator[tuple[str, list[Problem]]]:
    """Compare the shards with the dataset that they were packed from.

    Args:
        settings: how they were packed. Pictures must be the same bytes if they were kept; if they were made JPEG, only
            their number is compared. Keypoints are compared where the settings have them.

    Yields:
        A tracklet's key and its problems.
    """
    tracklets = ordered(dataset.tracklets, settings)
    keys = [tracklet.key for tracklet in tracklets]
    positions = shards.index.find(keys)
    for row in np.flatnonzero(positions < 0).tolist():
        yield keys[row], [Problem(shards.location, keys[row], "is in the dataset but was not packed")]
    packed = positions[positions >= 0]
    shard = shards.index.shard(packed)
    for extra in shards.index.keys(np.setdiff1d(np.arange(len(shards)), packed)).tolist():
        yield extra, [Problem(shards.location, extra, "was packed but is not in the dataset")]
    if ((np.diff(packed) < 0) & (np.diff(shard) == 0)).any():  # what was appended later follows it all
        yield "", [Problem(shards.location, "", "the tracklets are in another order than in the dataset")]
    for tracklet, position in zip(tracklets, positions.tolist(), strict=True):
        if position >= 0:
            yield tracklet.key, list(_compare_tracklet(shards, position, tracklet, settings))


def _all_of(file: str, problems: Iterator[Problem]) -> list[Problem]:
    """All that is found; what ends the search for more is a problem too: nothing in one file hides another's."""
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except Exception as error:  # no list of errors would hold all that forged bytes and bad disks cause
        found.append(Problem(file, "", f"cannot be checked to its end ({type(error).__name__}: {error})"))
    return found


def _verify_folder(folder: Path, card: dict[str, Any], whole: bool) -> Iterator[Problem]:
    """What is wrong beside the shards; `whole`: nothing was found in them."""
    known = {name for shard in card["shards"] for name in (shard["file"], shard["index"])} | {CARD_NAME, COLUMNS}
    for name in sorted(path.name for path in folder.iterdir() if path.name not in known and path.suffix not in _CLAIMS):
        yield Problem(name, "", "is no part of the dataset; an older packing left it: delete it")
    if what := SetIndex.fault(folder):
        yield Problem(COLUMNS, "", f"{what}; delete it, it is made anew")
    if "card_sha256" not in card or (folder / CARD_NAME).read_bytes() != encode_card(card):
        yield Problem(CARD_NAME, "", "its bytes are not those that packing writes")
    if whole:
        try:
            ShardSet.open(folder)  # do the shards fit each other and the card?
        except DataError as error:
            yield Problem(CARD_NAME, "", str(error))


def _verify_shard(folder: Path, shard: dict[str, Any]) -> Iterator[Problem]:
    tar, name = folder / shard["file"], shard["file"]
    try:
        index = read_index(folder / shard["index"])
        if what := stranger(index, sha256(folder / shard["index"]), shard):
            yield Problem(shard["index"], "", what)
    except (DataError, OSError) as error:
        yield Problem(shard["index"], "", str(error))
        index = None
    try:
        about = tar.stat()
        size = about.st_size
        if not stat.S_ISREG(about.st_mode):
            yield Problem(name, "", "is no plain file")
            return
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


def _walk(file: BinaryIO, size: int, name: str, index: ShardIndex) -> Iterator[Problem]:
    """Each member of a shard, in the order of its index."""
    end = row = 0
    for at, (key, frames) in enumerate(zip(index.key.tolist(), index.frames.tolist(), strict=True)):
        for number in range(members.members_of(frames)):
            full = f"{key}.{index.member_name(at, number)}"
            offset, length = int(index.offset[row]), int(index.size[row])
            if offset + length > size:
                yield Problem(name, full, f"ends at byte {offset + length} by the index, the shard at byte {size}")
                return
            file.seek(end)
            yield from (Problem(name, full, what) for what in _header_faults(file.read(TAR_BLOCK), full, length))
            content = file.read(length)
            try:
                if zlib.crc32(content) != index.crc[row]:
                    raise ValueError("its bytes are not those packed")
                _check_content(index, at, number, content)
            except ValueError as error:
                yield Problem(name, full, str(error))
            padding = -length % TAR_BLOCK
            end = offset + length + padding
            if file.read(padding).strip(b"\0"):
                yield Problem(name, full, "the padding behind it is not empty")
            row += 1
    file.seek(end)
    rest = file.read(_LONGEST_END + 1)
    if not 2 * TAR_BLOCK <= len(rest) <= _LONGEST_END or rest.strip(b"\0"):
        yield Problem(name, "", "does not end as a tar does: members that the index does not know, or it is cut off")


def _header_faults(block: bytes, name: str, length: int) -> Iterator[str]:
    try:
        header = members.refusing(tarfile.TarInfo.frombuf)(block, "utf-8", "surrogateescape")
    except ValueError as error:
        yield f"its tar header is damaged ({error})"
        return
    if header.name != name:
        yield f"its tar header names {header.name!r} instead"
    if not header.isreg() or header.linkname:
        yield "its tar header is not that of a plain file"
    if header.size != length:
        yield f"its tar header says {header.size} bytes, the index {length}"


@members.refusing
def _check_content(index: ShardIndex, at: int, number: int, content: bytes) -> None:
    """Refuse (ValueError) the n-th member of tracklet `at`, whose bytes are those packed, where they make no sense."""
    frame = index.first_frame[at] + members.frame_of(number)
    if number == members.JSON:
        facts = index.key[at], index.identity[at], index.camera[at], SPLITS[index.split[at]], index.frames[at]
        said = members.decode_tracklet(content)
        identity = UNKNOWN_IDENTITY if said["identity"] is None else said["identity"]
        if (said["key"], identity, said["camera"], said["split"], said["frames"]) != facts:
            raise ValueError("contradicts the index")
    elif number == members.KEYPOINTS:
        members.decode_keypoints(content, int(index.frames[at]))
    elif number == members.picture_member(members.frame_of(number)):
        size = members.picture_size(content, PICTURES[index.picture[frame]])
        if size != (index.width[frame], index.height[frame]):
            raise ValueError("its size is not that of the index")
        members.check_picture(content)
    else:
        parts = index.header["parts"]
        drawn = members.decode_tiles(content, parts).any((1, 2))
        # A joint at the very edge may be seen and yet round to nothing in its tile.
        if (drawn & ~(index.visible[frame] >> np.arange(parts) & 1).astype(bool)).any():
            raise ValueError("shows a part that the index calls missing")


def _compare_tracklet(shards: ShardSet, position: int, tracklet: Tracklet, settings: PackSettings) -> Iterator[Problem]:
    record = shards.tracklets[position]
    shard = shards.shard_name(record.shard)
    for name, packed, wanted in zip(_COMPARED, record.facts[1:], index_facts(tracklet)[1:], strict=True):
        if packed != wanted:
            yield Problem(shard, tracklet.key, f"{name} is {packed}, in the dataset {wanted}")
    if record.frames != len(tracklet.frames):
        return
    try:
        for number, frame in enumerate(tracklet.frames):
            content, kind = read_frame(frame)
            if settings.image == "keep" and shards.read_member(position, members.picture_member(number)) != content:
                yield Problem(shard, f"{tracklet.key}.f{number:04d}.{kind}", f"is not {frame.path}")
        known = settings.keypoints is not None or tracklet.keypoints is not None
        if known and not np.array_equal(shards.keypoints(position), load_keypoints(tracklet, settings)):
            yield Problem(shard, f"{tracklet.key}.kp.npy", "keypoints are not those of the source")
    except DataError as error:
        yield Problem(shard, tracklet.key, str(error))
