"""Video datasets of two cameras, each with one tracklet of a person, and ten splits of the people.

**iLIDS-VID** (Wang et al., ECCV 2014): 300 people in an airport hall. `ROOT/i-LIDS-VID/sequences/cam1/person001/*.png`
as the archive unpacks it, and the published splits: `ls_set` in `ROOT/train-test people
splits/train_test_splits_ilidsvid.mat` (10 rows of 300 places in the sorted list of people; the first half of a row is
for testing) or a `splits.json` that others have made of it.

**PRID2011** (Hirzer et al., SCIA 2011), multi-shot: two street cameras, 200 people whom both saw.
`ROOT/prid_2011/multi_shot/cam_a/person_0001/*.png`. The usual protocol keeps the 178 people with enough frames in both
cameras and halves them ten times; there is no official list, so a `splits_prid2011.json` or `splits.json` beside the
data is used where there is one, and otherwise ten splits are drawn by `seed`. Figures of different splits differ.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from keyreid.datasets.listing import folders, pictures
from keyreid.datasets.mat import read_mat
from keyreid.datasets.tracklet import Dataset, Pictures, Tracklet
from keyreid.errors import DataError

SPLITS_MAT = Path("train-test people splits") / "train_test_splits_ilidsvid.mat"
SHARED_PEOPLE = 200  # PRID2011: person_0001 .. person_0200 are the same in both cameras; higher numbers are not
Splits = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (train, test), each sorted identities


def open_ilids_vid(root: Path, splits: str | None = None) -> Dataset:
    """Read everyone whom both cameras saw; camera 1 queries camera 2.

    Args:
        splits: a file of splits (.mat or .json); default the published .mat, else splits.json, below `root`.

    Raises:
        DataError: a folder or the splits are missing, or they do not fit.
    """
    tracklets = _read_people(root, ("i-LIDS-VID", "sequences"), ("cam1", "cam2"), "iLIDS-VID")
    people = sorted({tracklet.identity for tracklet in tracklets})
    path = Path(splits) if splits else _find_splits(root, SPLITS_MAT)
    if path is None:
        missing = f"{root / SPLITS_MAT}: no such file, nor {root / 'splits.json'}"
        raise DataError(f"{missing}; name one with the option splits=FILE")
    chosen = _read_json_splits(path, set(people)) if path.suffix == ".json" else _read_published(path, people)
    return Dataset("ilids_vid", tuple(tracklets), chosen, query_camera=1)


def open_prid2011(root: Path, min_frames: int = 27, splits: str | None = None, seed: int = 0) -> Dataset:
    """Read the people of both cameras; camera 1 (a) queries camera 2 (b).

    Args:
        min_frames: leave out people with fewer frames than this in either camera; 1 keeps all 200.
        splits: a JSON file of splits; default splits_prid2011.json or splits.json below `root`, else drawn by `seed`.

    Raises:
        DataError: a folder is missing, no one is left, or the splits do not fit.
    """
    everyone = _read_people(root, ("prid_2011", "multi_shot"), ("cam_a", "cam_b"), "PRID2011")
    left_out = {t.identity for t in everyone if t.identity > SHARED_PEOPLE or len(t.frames) < min_frames}
    kept = tuple(tracklet for tracklet in everyone if tracklet.identity not in left_out)
    people = {tracklet.identity for tracklet in kept}
    if len(people) < 2:
        raise DataError(f"{root}: {len(people)} people have {min_frames} frames in both cameras; lower min_frames")
    path = Path(splits) if splits else _find_splits(root, "splits_prid2011.json")
    chosen = _read_json_splits(path, people) if path else _draw_splits(people, seed, 10)
    return Dataset("prid2011", kept, chosen, query_camera=1)


def _read_people(root: Path, inner: tuple[str, ...], cameras: tuple[str, str], dataset: str) -> list[Tracklet]:
    """The tracklets of everyone whom both cameras saw, by person, then camera.

    `root` is any of the folders `inner`, or what holds them: people unpack archives at different depths.
    """
    places = [root.joinpath(*inner[skip:]) for skip in range(len(inner))]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise DataError(f"{places[0]}: no such folder; {dataset} unpacks to {'/'.join(inner)}/{' and '.join(cameras)}")
    seen = [{path.name: path for path in folders(place / camera)} for camera in cameras]
    both = [name for name in seen[0] if name in seen[1]]
    if not both:
        raise DataError(f"{place}: {' and '.join(cameras)} have no person's folder in common")
    for number, times in Counter(map(_person_number, both)).most_common(1):
        if times > 1:
            raise DataError(f"{place}: {times} people have the number {number}; rename all but one")
    tracklets = []
    for name in both:
        for camera, people in enumerate(seen, start=1):
            if not (frames := Pictures(people[name], (path.name for path in pictures(people[name])))):
                raise DataError(f"{people[name]}: no pictures in it")
            tracklets.append(Tracklet(f"{name}_cam{camera}", _person_number(name), camera, "all", frames))
    return tracklets


def _person_number(folder: str) -> int:
    """`person017` -> 17."""
    number = re.fullmatch(r"(?:person)?_*([0-9]{1,18})", folder.lower())
    if number is None:
        raise DataError(f"{folder[:80]!r} is not a person's folder such as person001")
    return int(number[1])


def _find_splits(root: Path, name: Path | str) -> Path | None:
    """The file of published splits: `name` at or beside `root`, else `root/splits.json`; None where there is none."""
    places = (root / name, root.parent / name, root / "splits.json")
    return next((place for place in places if place.is_file()), None)


def _read_published(path: Path, people: list[int]) -> Splits:
    places = read_mat(path, "ls_set")  # [splits, people], from 1
    order = np.arange(1, len(people) + 1)
    if places.ndim != 2 or places.shape[1] != len(people) or (np.sort(places, axis=1) != order).any():
        expected = f"expected rows that order the {len(people)} people of both cameras"
        raise DataError(f"{path}: ls_set is {places.shape}, {expected}")
    return _checked(map(_halved, np.array(people)[places - 1]), set(people), path)


def _read_json_splits(path: Path, people: set[int]) -> Splits:
    """Splits as other code bases publish them: a list of {"train": [folder names], "test": [folder names]}."""
    try:
        splits = [
            tuple(tuple(sorted(_person_number(str(name)) for name in split[half])) for half in ("train", "test"))
            for split in json.loads(path.read_text())
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError) as error:
        wanted = '{"train": [...], "test": [...]}'
        raise DataError(f"{path}: not a list of {wanted} of person folders: {error!r}") from None
    return _checked(splits, people, path)


def _draw_splits(people: set[int], seed: int, count: int) -> Splits:
    """`count` random splits of people into halves for training and testing, the same for the same seed."""
    seeds = (np.random.SeedSequence([seed, number]) for number in range(count))
    return tuple(_halved(np.random.Generator(np.random.Philox(each)).permutation(sorted(people))) for each in seeds)


def _halved(order: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(train, test): the first half tests."""
    half = len(order) // 2
    return tuple(np.sort(order[half:]).tolist()), tuple(np.sort(order[:half]).tolist())


def _checked(splits: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], people: set[int], path: Path) -> Splits:
    """The splits; DataError if one names people who are not there, or tests on those it trains on."""
    splits = tuple(splits)
    for number, (train, test) in enumerate(splits):
        strangers, shared = sorted({*train, *test} - people), sorted({*train} & {*test})
        if strangers:
            raise DataError(f"{path}: split {number} names person {strangers[0]}, whom the two cameras do not have")
        if shared:
            raise DataError(f"{path}: split {number} trains and tests on person {shared[0]}")
        if not train or not test:
            raise DataError(f"{path}: split {number} is empty")
    return splits
