"""What iLIDS-VID and PRID2011 share: a tracklet of each person in each of two cameras, and ten splits of the people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from keyreid.datasets.listing import folders, pictures
from keyreid.datasets.tracklet import Frame, Tracklet
from keyreid.errors import DataError

Splits = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # (train, test), each sorted identities


def read_people(root: Path, inner: tuple[str, ...], cameras: tuple[str, str], dataset: str) -> list[Tracklet]:
    """The tracklets of everyone whom both cameras saw, by person, then camera.

    Args:
        root: any of the folders `inner`, or what holds them: people unpack archives at different depths.
        cameras: names of the cameras' folders, with a folder for each person in it.

    Raises:
        DataError: a folder is missing, or the cameras share no one, or someone has no pictures.
    """
    places = [root.joinpath(*inner[skip:]) for skip in range(len(inner))]
    place = next((place for place in places if place.is_dir()), None)
    if place is None:
        raise DataError(f"{places[0]}: no such folder; {dataset} unpacks to {'/'.join(inner)}/{' and '.join(cameras)}")
    seen = [{path.name: path for path in folders(place / camera)} for camera in cameras]
    both = [name for name in seen[0] if name in seen[1]]
    if not both:
        raise DataError(f"{place}: {' and '.join(cameras)} have no person's folder in common")
    tracklets = []
    for name in both:
        for camera, people in enumerate(seen, start=1):
            frames = tuple(Frame(path) for path in pictures(people[name]))
            if not frames:
                raise DataError(f"{people[name]}: no pictures in it")
            tracklets.append(Tracklet(f"{name}_cam{camera}", person_number(name), camera, "all", frames))
    return tracklets


def person_number(folder: str) -> int:
    """`person017` -> 17."""
    digits = folder.lower().removeprefix("person").lstrip("_")
    if not digits.isdigit():
        raise DataError(f"{folder!r} is not a person's folder such as person001")
    return int(digits)


def find_splits(root: Path, name: Path | str) -> Path | None:
    """The file of published splits: `name` at or beside `root`, else `root/splits.json`; None where there is none."""
    places = (root / name, root.parent / name, root / "splits.json")
    return next((place for place in places if place.is_file()), None)


def read_json_splits(path: Path, people: set[int]) -> Splits:
    """Splits as other code bases publish them: a list of {"train": [folder names], "test": [folder names]}.

    Raises:
        DataError: not of that form, or it names someone who is not there.
    """
    try:
        listed = json.loads(path.read_text())
        splits = tuple(
            tuple(tuple(sorted(person_number(str(n)) for n in s[half])) for half in ("train", "test")) for s in listed
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path}: not a list of {{"train": [...], "test": [...]}} of person folders: {error!r}'
        ) from None
    check_splits(splits, people, path)
    return splits


def draw_splits(people: set[int], seed: int, count: int) -> Splits:
    """`count` random splits of people into halves for training and testing, the same for the same seed."""
    ordered, half, splits = np.array(sorted(people)), len(people) // 2, []
    for number in range(count):
        order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number]))).permutation(len(people))
        splits.append(tuple(tuple(np.sort(ordered[part]).tolist()) for part in (order[half:], order[:half])))
    return tuple(splits)


def check_splits(splits: Splits, people: set[int], path: Path) -> None:
    """Raises DataError if a split names people who are not there, or tests on those it trains on."""
    for number, (train, test) in enumerate(splits):
        strangers, shared = sorted({*train, *test} - people), sorted({*train} & {*test})
        if strangers:
            raise DataError(f"{path}: split {number} names person {strangers[0]}, whom the two cameras do not have")
        if shared:
            raise DataError(f"{path}: split {number} trains and tests on person {shared[0]}")
        if not train or not test:
            raise DataError(f"{path}: split {number} is empty")
