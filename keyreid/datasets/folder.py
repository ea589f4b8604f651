"""One's own pictures: folders of camera, identity and tracklet in any order, or a table of paths (CSV or Parquet).

Names may be anything. They are numbered once, in natural order from 1, and the dataset keeps the list. The identity
names `distractor` and `junk` keep the meaning they have in MARS.

What `keyreid import` writes is such a table with a card, by which names keep their numbers when sources are added:

    OUT/manifest.parquet    path, split, camera, identity, tracklet, frame
    OUT/imported.json       numbers of the names, frame rates, and where each source's pictures came from
    OUT/crops/...           pictures that were cut from videos
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from keyreid.datasets.listing import RESERVED, folders, inside, keys_of, numbered, pictures, plain_name, plain_names
from keyreid.datasets.table import read_table
from keyreid.datasets.tracklet import JUNK_IDENTITY, Dataset, Frame, Pictures, Tracklet
from keyreid.errors import DataError

log = logging.getLogger(__name__)

LEVELS = ("split", "camera", "identity", "tracklet")
NAMED = {"identity", "camera"}  # the levels whose names have numbers
SPLITS = ("train", "test", "query", "gallery", "junk", "all")
MANIFEST, CARD = "manifest.parquet", "imported.json"
CARD_FORMAT = "keyreid-imported/1"
LIKE_RESERVED = re.compile(
    r"-1|0+|00-1|junk|distractor", re.IGNORECASE
)  # what other datasets call nobody in particular


@dataclass(frozen=True)
class ImportCard:
    """What an imported folder says of itself."""

    names: dict[str, dict[str, int]] = field(default_factory=lambda: {"identity": {}, "camera": {}})  # name: number
    frames_per_second: dict[str, float] = field(default_factory=dict)  # of a camera, if all of its sources agree
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)  # where from, by which settings, how much was kept


def open_folder(
    root: Path, layout: str = "camera/identity/tracklet", test_share: float = 0.0, seed: int = 0
) -> Dataset:
    """Read a folder of folders, a table when `root` is a file, or what `keyreid import` wrote.

    A table has the column `path` (below the table's folder, or absolute) and any of identity, camera, tracklet, split
    and frame (the order within a tracklet; otherwise the order of the rows). An empty identity is unknown. Without a
    tracklet, the pictures of one identity and one camera are one.

    Args:
        layout: what each level of folders means: `split`, `camera`, `identity`, `tracklet`, in any order, as many as
            there are levels; the last one holds the frames. Without `camera` there is one; without `identity` people
            are unknown.
        test_share: without splits, the share of the identities that becomes test data, drawn by `seed`. Split names are
            train, query, gallery, junk, all, and test: then a person's first tracklet at a camera is a query.

    Raises:
        DataError: a folder, file or column is missing, or a name is not as the layout says.
    """
    if not 0 <= test_share < 1 or seed < 0:
        raise DataError(f"test_share={test_share}, seed={seed}: from 0 to below 1, and from 0")
    card = ImportCard()
    if is_imported(root):
        card, root = read_import_card(root), root / MANIFEST
    if root.is_file():
        records, origin = _read_table(root), f"{root}"
    else:
        levels = layout.split("/")
        if not set(levels) <= set(LEVELS) or len(set(levels)) < len(levels):
            raise DataError(f"layout={layout}: its levels are {', '.join(LEVELS)}, each at most once")
        records, origin = list(_walk(root, levels, {}, root)), f"{root} as {layout}"
    if not records:
        raise DataError(f"{origin}: no pictures found")
    return _dataset(records, origin, test_share, seed, card)


Record = tuple[dict[str, str], Sequence[Frame]]  # names of LEVELS -> frames of one tracklet


def _walk(place: Path, levels: Sequence[str], names: dict[str, str], root: Path) -> list[Record]:
    if levels:
        inner = folders(place)
        if stray := pictures(place):
            expected = f"folders of the level {levels[0]!r}"
            raise DataError(f"{stray[0]}: a picture where the layout expects {expected}; set layout=...")
        if not inner and place != root:
            log.warning("%s: nothing in it; left out", place)
        return [
            record for folder in inner for record in _walk(folder, levels[1:], {**names, levels[0]: folder.name}, root)
        ]
    if deeper := [folder for folder in folders(place) if any(folder.iterdir())]:
        raise DataError(f"{deeper[0]}: a folder where the layout expects pictures; set layout=... with a level for it")
    if not (frames := Pictures(place, (path.name for path in pictures(place)))):
        log.warning("%s: no pictures in it; left out", place)
    return [(names, frames)] if frames else []


def _read_table(path: Path) -> list[Record]:
    table = read_table(path)
    unknown = [name for name in table.columns if name not in (*LEVELS, "path", "frame")]
    if unknown or "path" not in table.columns:
        wrong = f"unknown column {unknown[0]}" if "path" in table.columns else "no column path"
        raise DataError(f"{path}: {wrong}; the columns are path, {', '.join(LEVELS)}, frame")
    if "frame" in table.columns:
        table = table.assign(frame=pd.to_numeric(table["frame"], errors="coerce").replace([np.inf, -np.inf], np.nan))
    for column, what in (("path", "path"), ("camera", "camera"), ("frame", "frame number")):
        if column in table.columns and (blank := table[column].isna() | (table[column] == "")).any():
            raise DataError(f"{path}: row {table.index[blank][0] + 1} has no {what}")
    if "frame" in table.columns:
        table = table.sort_values("frame", kind="stable")
    levels = [level for level in LEVELS if level in table.columns]
    names = table[levels].apply(lambda column: column.map(plain_names(column, f"{path}, column {column.name}")))
    if (names[names.columns.intersection(["identity", "tracklet"])] == "").all(axis=1).any():
        raise DataError(f"{path}: pictures without an identity need the column tracklet, to say which belong together")
    groups: dict[tuple[str, ...], list[Path]] = {}
    for values, picture in zip(names.itertuples(index=False, name=None), table["path"], strict=True):
        groups.setdefault(values, []).append(_picture(path, picture))
    for frames in groups.values():
        if not frames[0].is_file():
            raise DataError(f"{frames[0]}: no such file, named by {path}")
    own = ({name: value for name, value in zip(levels, values, strict=True) if value} for values in groups)
    return [(names, tuple(map(Frame, frames))) for names, frames in zip(own, groups.values(), strict=True)]


def _picture(table: Path, name: str) -> Path:
    """A picture of a table; an absolute path is the user's own word, a relative one stays below the table's folder."""
    plain = Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    return Path(name) if plain else inside(table.parent, name, table)


def _dataset(records: list[Record], origin: str, test_share: float, seed: int, card: ImportCard) -> Dataset:
    plain = {
        level: plain_names((names[level] for names, _ in records if level in names), f"{origin}, {level}")
        for level in NAMED
    }
    plain["camera"].setdefault("1", "1")  # where the layout has none
    identities = numbered(plain["identity"].values(), card.names["identity"] | RESERVED)
    cameras = numbered((plain["camera"][names.get("camera", "1")] for names, _ in records), card.names["camera"])
    if odd := sorted(name for name in identities if name not in RESERVED and LIKE_RESERVED.fullmatch(name)):
        meant = "rename those that are `distractor` (whom no query looks for) or `junk` (shows nobody)"
        log.warning("%s: identity %s is taken for a person like others; %s", origin, ", ".join(odd), meant)
    wanted = {names["split"] for names, _ in records if "split" in names}
    if wanted - set(SPLITS):
        raise DataError(f"{origin}: split {sorted(wanted - set(SPLITS))[0]!r}; splits are {', '.join(SPLITS)}")
    drawn = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed])))
    drawn = drawn.permutation(sorted(n for n in identities.values() if n > 0)).tolist()
    testers = {None, 0, JUNK_IDENTITY, *drawn[: round(test_share * len(drawn))]}
    people = [identities[plain["identity"][names["identity"]]] if "identity" in names else None for names, _ in records]
    places = [cameras[plain["camera"][names.get("camera", "1")]] for names, _ in records]
    undecided = ["all" if not test_share else "test" if person in testers else "train" for person in people]
    splits = [names.get("split") or split for (names, _), split in zip(records, undecided, strict=True)]
    asking = _queries([at for at, split in enumerate(splits) if split == "test"], people, places)
    parts = [(n.get("identity", "unknown"), n.get("camera", "1"), n.get("tracklet", "0")) for n, _ in records]
    keys = keys_of(
        [part[-1:] for part in parts] if card.sources else parts
    )  # an import's tracklets have their own names
    tracklets = []
    for at, (_, frames) in enumerate(records):
        split = splits[at] if splits[at] != "test" else "query" if at in asking else "gallery"
        split = "junk" if people[at] == JUNK_IDENTITY else split
        tracklets.append(Tracklet(keys[at], people[at], places[at], split, frames))
    numbers = {"identity": identities, "camera": cameras}
    return Dataset("folder", tuple(tracklets), names=numbers, frames_per_second=card.frames_per_second)


def _queries(tests: list[int], people: list[int | None], cameras: list[int]) -> set[int]:
    """Of the test records, those that ask: as in MARS the first of a person at each camera.

    Except where that would leave no answers: a camera with one tracklet only asks if it is the person's first.
    """
    at_camera: dict[tuple[int, int], list[int]] = {}
    for at in tests:
        if people[at] and people[at] > 0:
            at_camera.setdefault((people[at], cameras[at]), []).append(at)
    asking, known = set(), set()
    for (person, _), records in at_camera.items():
        if len(records) > 1 or person not in known:
            asking.add(records[0])
        known.add(person)
    return asking


def is_imported(root: Path) -> bool:
    """Whether `keyreid import` wrote this folder."""
    return (root / MANIFEST).is_file() and (root / CARD).is_file()


def read_import_card(root: Path) -> ImportCard:
    """The card of an imported folder, an empty one where there is none; DataError if damaged or of another version."""
    path = root / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != CARD_FORMAT:
            raise ValueError(f"its format is not {CARD_FORMAT}")
        card = TypeAdapter(ImportCard).validate_python(values)
        if any(len(set(names.values())) < len(names) for names in card.names.values()) or card.names.keys() != NAMED:
            raise ValueError("names are missing, or two have one number")
    except FileNotFoundError:
        return ImportCard()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{path}: not the card of an imported folder ({why}); import into another folder") from None
    # Names that an earlier version told apart have the lower number.
    names = {kind: sorted(known.items(), key=lambda item: -item[1]) for kind, known in card.names.items()}
    return replace(card, names={kind: {plain_name(name): number for name, number in names[kind]} for kind in names})
