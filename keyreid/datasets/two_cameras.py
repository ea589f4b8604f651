"""What iLIDS-VID and PRID2011 share: a tracklet of each person in each of two cameras, and ten splits of the people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from keyreid.datasets.listing import folders, pictures
from keyreid.datasets.tracklet import Frame, Tracklet
from keyreid.errors import DataError

Splits = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def find_folder(root: Path, inner: tuple[str, ...], what: str) -> Path:
    """The first of root/inner, root/inner[1:], ... that is a folder: people unpack archives at different depths.

    Raises:
        DataError: none is.
    """
    for skip in range(len(inner)):
        place = root.joinpath(*inner[skip:])
        if place.is_dir():
            return place
    raise DataError(f"{root.joinpath(*inner)}: no such folder; {what}")


def read_people(cameras: tuple[Path, Path], number_of: Callable[[str], int]) -> list[Tracklet]:
    """The tracklets of everyone whom both cameras saw, by person, then camera.

    Raises:
        DataError: a folder is missing, or the cameras share no one, or someone has no pictures.
    """
    seen = [{path.name: path for path in folders(camera)} for camera in cameras]
    both = [name for name in seen[0] if name in seen[1]]
    if not both:
        raise DataError(f"{cameras[0]} and {cameras[1]} have no person's folder in common")
    tracklets = []
    for name in both:
        for camera, people in enumerate(seen, start=1):
            frames = tuple(Frame(path) for path in pictures(people[name]))
            if not frames:
                raise DataError(f"{people[name]}: no pictures in it")
            tracklets.append(Tracklet(f"{name}_cam{camera}", number_of(name), camera, "all", frames))
    return tracklets


def read_json_splits(path: Path, people: set[int], number_of: Callable[[str], int]) -> Splits:
    """Splits as other code bases publish them: a list of {"train": [folder names], "test": [folder names]}.

    Raises:
        DataError: not of that form, or it names someone who is not there.
    """
    try:
        listed = json.loads(path.read_text())
        splits = tuple(
            tuple(tuple(sorted(number_of(str(n)) for n in s[half])) for half in ("train", "test")) for s in listed
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path}: not a list of {{"train": [...], "test": [...]}} of person folders: {error!r}'
        ) from None
    check_splits(splits, people, path)
    return splits


def check_splits(splits: Splits, people: set[int], path: Path) -> None:
    """Raises DataError if a split names people who are not there, or tests on those it trains on."""
    for number, (train, test) in enumerate(splits):
        strangers = sorted(set(train + test) - people)
        if strangers:
            raise DataError(f"{path}: split {number} names person {strangers[0]}, whom the two cameras do not have")
        shared = sorted(set(train) & set(test))
        if shared or not train or not test:
            raise DataError(
                f"{path}: split {number} trains and tests on person {shared[0]}"
                if shared
                else f"{path}: split {number} is empty"
            )
