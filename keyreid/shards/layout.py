"""How a dataset is cut into shards, and how what is new in it is appended to those that are there.

Which tracklet goes to which shard follows from the dataset and the settings alone.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from keyreid.datasets.tracklet import Dataset, Tracklet
from keyreid.errors import DataError
from keyreid.pose import keypoint_files
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.writer import PackSettings, fingerprint, index_facts

log = logging.getLogger(__name__)

_PICTURES_MEASURED = 1000  # file sizes are looked up for so many, evenly spaced
_BYTES_OF_A_CROP = 8000  # guess for frames that are boxes in a picture or a video
_BYTES_BESIDE_A_PICTURE = 512 + 256 + 1536 + 204  # header and padding, heatmaps, keypoints
_BYTES_OF_A_TRACKLET = 3072
_TOGETHER = ("train", "all")  # splits whose identities are not cut, in an order of identities


@dataclass(frozen=True)
class ShardLayout:
    """How a dataset is cut into shards."""

    dataset: Dataset
    settings: PackSettings
    shards: tuple[tuple[str, list[Tracklet]], ...]  # name of the tar and its tracklets, in the order that is asked for
    bytes: tuple[float, ...]  # estimated size of each shard
    before: tuple[dict[str, Any], ...] = ()  # the card's entries of shards that these are appended to

    @cached_property
    def digest(self) -> str:
        """A hash of which tracklets go to which shard."""
        known = [[name, *(f"{t.key} {len(t.frames)}" for t in tracklets)] for name, tracklets in self.shards]
        return hashlib.sha256(json.dumps([known, self.settings.described()]).encode()).hexdigest()

    def fingerprints(self, numbers: Iterable[int]) -> dict[str, str]:
        """What some finished shards are known by, by their names.

        DataError where keypoint files are of other frames, or nothing in them says that they are not.
        """
        hashes, unsaid = {}, []
        for number in numbers:
            hashes[self.shards[number][0]], unknown = fingerprint(*self.shards[number], self.settings)
            unsaid += unknown
        shared = keypoint_files.shared_names(self.dataset.tracklets) if unsaid else set()
        for tracklet in unsaid:
            if shared.issuperset(keypoint_files.frame_names(tracklet)):
                raise DataError(
                    f"{keypoint_files.path_of(self.settings.keypoints, tracklet.key)}: does not say which pictures it "
                    "was made from, and other tracklets have frames of the same names; delete it and run `keyreid pose`"
                )
        if unsaid:
            log.warning(
                "%s: %d keypoint files of an earlier version do not say which pictures they were made from; only the "
                "names of frames were compared",
                self.settings.keypoints,
                len(unsaid),
            )
        return hashes


def plan_shards(dataset: Dataset, settings: PackSettings, target_bytes: int = 256_000_000) -> ShardLayout:
    """Cut a dataset, in the order of the settings, into shards of about `target_bytes`."""
    if not dataset.tracklets:
        raise DataError(f"dataset {dataset.name} has no tracklets")
    a_frame = _bytes_of_a_picture(dataset) + _BYTES_BESIDE_A_PICTURE
    shards: list[list[Tracklet]] = []
    sizes: list[float] = []
    for tracklet in ordered(dataset.tracklets, settings):
        size = _BYTES_OF_A_TRACKLET + a_frame * len(tracklet.frames)
        full = not shards or sizes[-1] + size / 2 > target_bytes
        if settings.order is not None and shards:
            before = shards[-1][-1]
            same = before.split == tracklet.split
            full = not same or (full and (tracklet.split not in _TOGETHER or before.identity != tracklet.identity))
        if full:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tracklet)
        sizes[-1] += size
    return ShardLayout(dataset, settings, tuple(_named(dataset, shards)), tuple(sizes))


def plan_append(
    dataset: Dataset, settings: PackSettings, packed: ShardSet, target_bytes: int = 256_000_000
) -> ShardLayout | None:
    """Cut what is new in a dataset, since it was packed, into shards that follow; None where nothing is.

    Raises:
        DataError: what was packed is another than it was, or was packed otherwise.
    """
    card, index = packed.card, packed.index
    now = {"settings": settings.described(), "splits": splits_of(dataset), "query_camera": dataset.query_camera}
    for name, value in now.items():
        if card[name] != value:
            raise DataError(f"{packed.location}: was packed with other {name}: {card[name]!s:.200}, now {value!s:.200}")
    for kind, known in dataset.names.items():
        for name, number in card["names"].get(kind, {}).items():
            if known.get(name, number) != number:
                raise DataError(
                    f"{packed.location}: {kind} {name} has the number {number} there and {known[name]} now; gather the "
                    "sources with `keyreid import`, where names keep their numbers, or pack the dataset anew"
                )
    positions = index.find([tracklet.key for tracklet in dataset.tracklets]).tolist()
    for tracklet, position in zip(dataset.tracklets, positions, strict=True):
        if position >= 0 and packed.tracklets[position].facts != index_facts(tracklet):
            raise DataError(
                f"{packed.location}: tracklet {tracklet.key} was packed as {packed.tracklets[position].facts[1:]} "
                f"(identity, camera, split, frames) and is {index_facts(tracklet)[1:]} now; pack the dataset anew"
            )
    new = [tracklet for tracklet, position in zip(dataset.tracklets, positions, strict=True) if position < 0]
    if not new:
        return None
    names = {kind: {**card["names"].get(kind, {}), **dataset.names.get(kind, {})} for kind in dataset.names}
    rates = {**card["frames_per_second"], **dataset.frames_per_second}
    grown = replace(dataset, tracklets=tuple(new), names=names, frames_per_second=rates)
    layout = plan_shards(grown, settings, target_bytes)
    shards = tuple(_named(dataset, [tracklets for _, tracklets in layout.shards], len(card["shards"])))
    return replace(layout, shards=shards, before=tuple(card["shards"]))


def _named(dataset: Dataset, shards: list[list[Tracklet]], first: int = 0) -> Iterator[tuple[str, list[Tracklet]]]:
    for number, tracklets in enumerate(shards, first):
        yield f"{dataset.name}-{number:05d}.tar", tracklets


def ordered(tracklets: Iterable[Tracklet], settings: PackSettings) -> list[Tracklet]:
    """Tracklets in the order in which they are packed: the dataset's, or by `settings.order`.

    Then splits follow each other, and in a split identities in an order drawn by that seed, which depends on nobody
    else; an identity's tracklets stay together, in the dataset's order.
    """
    if settings.order is None:
        return list(tracklets)
    splits: dict[str, int] = {}

    @functools.cache
    def drawn(identity: int | None) -> bytes:
        return hashlib.sha256(f"{settings.order} {identity}".encode()).digest()

    return sorted(tracklets, key=lambda t: (splits.setdefault(t.split, len(splits)), drawn(t.identity)))


def splits_of(dataset: Dataset) -> list[dict[str, list[int]]]:
    """A dataset's splits as the card has them."""
    return [{"train": list(map(int, train)), "test": list(map(int, test))} for train, test in dataset.splits]


def _bytes_of_a_picture(dataset: Dataset) -> float:
    total = sum(len(tracklet.frames) for tracklet in dataset.tracklets)
    every = max(1, total // _PICTURES_MEASURED)
    sizes, number = [], 0
    for tracklet in dataset.tracklets:
        for frame in tracklet.frames[-number % every :: every]:
            whole = frame.box is None and frame.video_frame is None
            try:
                sizes.append(frame.path.stat().st_size if whole else _BYTES_OF_A_CROP)
            except OSError as error:
                raise DataError(f"{frame.path}: {error.strerror} (tracklet {tracklet.key})") from None
        number += len(tracklet.frames)
    return sum(sizes) / len(sizes)
