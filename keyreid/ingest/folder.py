"""Bring folders and tables of pictures into an imported folder; and what each source adds to its manifest and card."""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from keyreid.datasets import open_dataset
from keyreid.datasets.folder import CARD, CARD_FORMAT, MANIFEST, ImportCard, is_imported, read_import_card
from keyreid.datasets.frames import picture_size
from keyreid.datasets.listing import RESERVED, keys_of, numbered, safe_key
from keyreid.errors import DataError
from keyreid.files import replace_text, replacing
from keyreid.ownership import owned
from keyreid.progress import track

SOURCE_LENGTH, NAME_LENGTH = 32, 44  # keys have at most 80 characters


class Row(NamedTuple):
    """A picture in the manifest."""

    path: Path | str
    split: str  # empty where it is not decided
    camera: str
    identity: str  # empty when unknown
    tracklet: str  # unique in its source
    frame: int


class Imported(NamedTuple):
    """What an import kept, and what it left out and why."""

    tracklets: int
    pictures: int
    cameras: list[str]
    left_out: dict[str, int]


def import_folder(
    source: Path,
    out: Path,
    layout: str = "camera/identity/tracklet",
    test_share: float = 0.0,
    seed: int = 0,
    min_width: int = 1,
    min_height: int = 1,
    min_length: int = 1,
    name: str | None = None,
) -> Imported:
    """Add the tracklets of a folder or a CSV or Parquet table to an imported folder; pictures stay where they are.

    Args:
        source, layout, test_share, seed: see `datasets.folder.open_folder`. Splits are drawn here, once.
        min_width, min_height: least size of a picture, pixels; smaller ones are left out.
        min_length: least pictures of a tracklet, after that.
        name: of the source; the same name replaces what it imported before. Default the file's.

    Raises:
        DataError: files are missing, are no pictures, or nothing is kept.
    """
    if out.resolve() == source.resolve():
        raise DataError(f"{out}: import into another folder than the source's own")
    with importing(out, source, name) as name:
        settings = {"layout": layout, "test_share": test_share, "seed": seed}
        data = open_dataset("folder", source, **settings)
        cameras, people = ({n: text for text, n in data.names[kind].items()} for kind in ("camera", "identity"))
        rows: list[Row] = []
        left_out: Counter[str] = Counter()
        for tracklet in track(data.tracklets, len(data.tracklets), "importing", "tracklets"):
            sizes = np.array([picture_size(frame.path) for frame in tracklet.frames])
            frames = list(compress(tracklet.frames, (sizes >= (min_width, min_height)).all(axis=1)))
            left_out["pictures too small"] += len(tracklet.frames) - len(frames)
            if len(frames) < min_length:
                left_out["tracklets too short"] += 1
                continue
            split = "" if tracklet.split == "all" else tracklet.split
            names = split, cameras[tracklet.camera], people.get(tracklet.identity, ""), tracklet.key
            rows += [Row(frame.path, *names, number) for number, frame in enumerate(frames)]
        settings |= {"min_width": min_width, "min_height": min_height, "min_length": min_length}
        about = {"kind": "folder", "file": str(source.resolve()), "settings": settings}
        return add_source(out, name, rows, about, left_out)


@contextlib.contextmanager
def importing(root: Path, file: Path, name: str | None) -> Iterator[str]:
    """Have an imported folder alone, after whoever has it now; gives the source's name, by default its file's.

    Raises:
        DataError: `root` holds other things, or by default another file's pictures would be replaced.
    """
    check_target(root)
    if name is not None and not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_-]{{,{SOURCE_LENGTH - 1}}}", name):
        raise DataError(f"--name {name!r}: 1 to {SOURCE_LENGTH} letters, digits, `_` and `-`")
    with owned(root, "keyreid import", wait=True):
        source = name or safe_key(file.resolve().stem)[:SOURCE_LENGTH]
        earlier = read_import_card(root).sources.get(source, {}).get("file")
        if name is None and earlier not in (None, str(file.resolve())):
            raise DataError(f"{root}: {source} is {earlier}; --name OTHER adds {file}, --name {source} replaces that")
        yield source


def check_target(root: Path) -> None:
    """Raise DataError where a folder holds things that `keyreid import` did not write."""
    if root.exists() and not root.is_dir():
        raise DataError(f"{root}: not a folder")
    if (
        root.is_dir()
        and not (root / CARD).is_file()
        and any(path.name != "crops" and not path.name.startswith(".") for path in root.iterdir())
    ):
        raise DataError(f"{root}: not empty, and not an imported folder; name a new folder with --out")


def add_source(
    root: Path,
    source: str,
    rows: Sequence[Row],
    about: Mapping[str, Any],
    left_out: Mapping[str, int],
    frames_per_second: Mapping[str, float | None] | None = None,
) -> Imported:
    """Write a source's pictures into the manifest and the card; what the same source had there before is replaced.

    Args:
        root: the imported folder; it may be new.
        about: where the source came from and how it was read, for the card.
        left_out: how much was not kept, by reason.
        frames_per_second: of its cameras, where it is known.

    Raises:
        DataError: `root` holds other things, or nothing was kept.
    """
    if not rows:
        raise DataError(f"{source}: nothing is left to import; lower the bounds of size, length or visibility")
    tracklets = list(dict.fromkeys((row.tracklet,) for row in rows))
    short = dict(zip(tracklets, keys_of(tracklets, NAME_LENGTH), strict=True))
    stored = [row._replace(path=_stored(row.path, root), tracklet=f"{source}/{short[(row.tracklet,)]}") for row in rows]
    own = table = pd.DataFrame(stored, columns=Row._fields)
    if is_imported(root):
        others = pd.read_parquet(root / MANIFEST)
        table = pd.concat([others[~others["tracklet"].str.startswith(f"{source}/")], own], ignore_index=True)
    card = read_import_card(root)
    kept = {"identity": card.names["identity"] | RESERVED, "camera": card.names["camera"]}
    names = {kind: known | numbered(set(own[kind]) - {""}, kept[kind]) for kind, known in card.names.items()}
    rates = dict(card.frames_per_second)
    for camera, rate in (frames_per_second or {}).items():
        if rate and rates.setdefault(camera, rate) != rate:  # none where two sources of a camera differ
            del rates[camera]
    imported = Imported(own["tracklet"].nunique(), len(own), sorted(set(own["camera"])), dict(left_out))
    about = {**about, "left_out": dict(left_out), "tracklets": imported.tracklets, "pictures": imported.pictures}
    with replacing(root / MANIFEST) as partial:
        table.to_parquet(partial, index=False)
        # The card first: names without pictures do no harm.
        card = asdict(ImportCard(names, rates, card.sources | {source: about}))
        replace_text(root / CARD, json.dumps({"format": CARD_FORMAT, **card}, indent=1, ensure_ascii=False) + "\n")
    return imported


def _stored(path: Path, root: Path) -> str:
    """Relative where the picture lies in the imported folder, so that the folder can be moved; else absolute."""
    path, root = path.resolve(), root.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)
