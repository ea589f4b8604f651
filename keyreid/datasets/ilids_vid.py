"""iLIDS-VID (Wang et al., ECCV 2014): 300 people, one tracklet each in two cameras of an airport hall.

`ROOT/i-LIDS-VID/sequences/cam1/person001/*.png` as the archive unpacks it, and the ten published splits: `ls_set` in
`ROOT/train-test people splits/train_test_splits_ilidsvid.mat` (10 rows of 300 places in the sorted list of people; the
first half of a row is for testing) or a `splits.json` that others have made of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keyreid.datasets.listing import read_mat
from keyreid.datasets.tracklet import Dataset
from keyreid.datasets.two_cameras import Splits, check_splits, find_splits, read_json_splits, read_people
from keyreid.errors import DataError

SPLITS_MAT = Path("train-test people splits") / "train_test_splits_ilidsvid.mat"


def open_ilids_vid(root: Path, splits: str | None = None) -> Dataset:
    """Read everyone whom both cameras saw; camera 1 queries camera 2.

    Args:
        splits: a file of splits (.mat or .json); default the published .mat, else splits.json, below `root`.

    Raises:
        DataError: a folder or the splits are missing, or they do not fit.
    """
    tracklets = read_people(root, ("i-LIDS-VID", "sequences"), ("cam1", "cam2"), "iLIDS-VID")
    people = sorted({tracklet.identity for tracklet in tracklets})
    path = Path(splits) if splits else find_splits(root, SPLITS_MAT)
    if path is None:
        raise DataError(
            f"{root / SPLITS_MAT}: no such file, nor {root / 'splits.json'}; name one with the option splits=FILE"
        )
    chosen = read_json_splits(path, set(people)) if path.suffix == ".json" else _read_published(path, people)
    return Dataset("ilids_vid", tuple(tracklets), chosen, query_camera=1)


def _read_published(path: Path, people: list[int]) -> Splits:
    places = read_mat(path, "ls_set").astype(np.int64)  # [splits, people], from 1
    order = np.arange(1, len(people) + 1)
    if places.ndim != 2 or places.shape[1] != len(people) or (np.sort(places, axis=1) != order).any():
        raise DataError(
            f"{path}: ls_set is {places.shape}, expected rows that order the {len(people)} people of both cameras"
        )
    numbers, half = np.array(people)[places - 1], len(people) // 2
    splits = tuple((tuple(sorted(row[half:].tolist())), tuple(sorted(row[:half].tolist()))) for row in numbers)
    check_splits(splits, set(people), path)
    return splits
