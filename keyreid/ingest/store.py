"""Add sources to an imported folder: the rows of its manifest, and its card."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from keyreid.datasets.folder import CARD, MANIFEST, ImportCard, is_imported, read_import_card, write_import_card
from keyreid.datasets.listing import RESERVED, numbered, safe_key
from keyreid.errors import DataError
from keyreid.files import replacing

COLUMNS = ("path", "split", "camera", "identity", "tracklet", "frame")
SOURCE_LENGTH, NAME_LENGTH = 32, 44  # keys have at most 80 characters


@dataclass(frozen=True)
class ImportedTracklet:
    """A tracklet as it goes into the manifest."""

    name: str  # unique in its source
    camera: str
    identity: str  # a person's name; empty when unknown
    split: str  # train, query, gallery, junk, or empty where it is not decided
    pictures: tuple[tuple[Path, int], ...]  # (path, frame number), in order


@dataclass(frozen=True)
class Imported:
    """What an import kept, and what it left out and why."""

    tracklets: int
    pictures: int
    cameras: list[str]
    left_out: dict[str, int]


def source_name(path: Path) -> str:
    """What a source is called in manifest and folders: its file's name in letters, digits, `_` and `-`."""
    return safe_key(path.resolve().stem)[:SOURCE_LENGTH]


def add_source(
    root: Path,
    source: str,
    tracklets: list[ImportedTracklet],
    about: Mapping[str, Any],
    left_out: Mapping[str, int],
    frames_per_second: Mapping[str, float | None] | None = None,
) -> Imported:
    """Write a source's tracklets into the manifest and the card; what the same source had there before is replaced.

    Args:
        root: the imported folder; it may be new.
        about: where the source came from and how it was read, for the card.
        left_out: how much was not kept, by reason.
        frames_per_second: of its cameras, where it is known.

    Raises:
        DataError: `root` holds other things, or nothing was kept.
    """
    if not tracklets:
        raise DataError(f"{source}: nothing is left to import; lower the bounds of size, length or visibility")
    check_target(root)
    root.mkdir(parents=True, exist_ok=True)
    rows = [
        (_stored(path, root), t.split, t.camera, t.identity, f"{source}/{_short(t.name)}", frame)
        for t in tracklets
        for path, frame in t.pictures
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    if is_imported(root):
        others = pd.read_parquet(root / MANIFEST)
        others = others[~others["tracklet"].str.startswith(f"{source}/")]
        table = pd.concat([others, table], ignore_index=True)
    card = read_import_card(root)
    cameras = sorted({t.camera for t in tracklets})
    people = numbered((t.identity for t in tracklets if t.identity), RESERVED, card.names["identity"])
    card = ImportCard(
        names={
            "identity": card.names["identity"] | people,
            "camera": card.names["camera"] | numbered(cameras, known=card.names["camera"]),
        },
        frames_per_second=_rates(card, frames_per_second or {}),
        sources=card.sources
        | {source: {**about, "left_out": dict(left_out), "tracklets": len(tracklets), "pictures": len(rows)}},
    )
    with replacing(root / MANIFEST) as partial:
        table.to_parquet(partial, index=False)
        write_import_card(root, card)  # first: names without pictures do no harm
    return Imported(len(tracklets), len(rows), cameras, dict(left_out))


def check_target(root: Path) -> None:
    """Raise DataError where a folder holds things that `keyreid import` did not write."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: not a folder")
    if root.is_dir() and not (root / CARD).is_file() and any(path.name != "crops" for path in root.iterdir()):
        raise DataError(f"{root}: not empty, and not an imported folder; name a new folder with --out")


def _stored(path: Path, root: Path) -> str:
    """Relative where the picture lies in the imported folder, so that the folder can be moved; else absolute."""
    path, root = path.resolve(), root.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _short(name: str) -> str:
    """A name that, with its source's, is no longer than a key may be."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 9]}-{zlib.crc32(name.encode()):08x}"


def _rates(card: ImportCard, new: Mapping[str, float | None]) -> dict[str, float]:
    """Rates by camera; none where two sources of a camera differ."""
    rates = dict(card.frames_per_second)
    for camera, rate in new.items():
        if rate and rates.setdefault(camera, rate) != rate:
            del rates[camera]
    return rates
