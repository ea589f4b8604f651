"""iLIDS-VID (Wang et al., ECCV 2014): 300 people, one tracklet each in two cameras of an airport hall.

`ROOT/i-LIDS-VID/sequences/cam1/person001/*.png` as the archive unpacks it, and the ten published splits: `ls_set` in
`ROOT/train-test people splits/train_test_splits_ilidsvid.mat` (10 rows of 300 places in the sorted list of people; the
first half of a row is for testing) or a `splits.json` that others have made of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from keyreid.datasets.tracklet import Dataset
from keyreid.datasets.two_cameras import Splits, check_splits, find_folder, read_json_splits, read_people
from keyreid.errors import DataError

SPLITS_MAT = Path("train-test people splits") / "train_test_splits_ilidsvid.mat"


def open_ilids_vid(root: Path, splits: str | None = None) -> Dataset:
    """Read everyone whom both cameras saw; camera 1 queries camera 2.

    Args:
        splits: a file of splits (.mat or .json); default the published .mat, else splits.json, below `root`.

    Raises:
        DataError: a folder or the splits are missing, or they do not fit.
    """
    sequences = find_folder(
        root, ("i-LIDS-VID", "sequences"), "iLIDS-VID unpacks to i-LIDS-VID/sequences/cam1 and cam2"
    )
    tracklets = read_people((sequences / "cam1", sequences / "cam2"), person_number)
    people = sorted({tracklet.identity for tracklet in tracklets})
    path = Path(splits) if splits else _find_splits(root)
    chosen = read_json_splits(path, set(people), person_number) if path.suffix == ".json" else _read_mat(path, people)
    return Dataset("ilids_vid", tuple(tracklets), chosen, query_camera=1)


def person_number(folder: str) -> int:
    """`person017` -> 17."""
    digits = folder.lower().removeprefix("person").lstrip("_")
    if not digits.isdigit():
        raise DataError(f"{folder!r} is not a person's folder such as person001")
    return int(digits)


def _find_splits(root: Path) -> Path:
    for place in (root / SPLITS_MAT, root.parent / SPLITS_MAT, root / "splits.json"):
        if place.is_file():
            return place
    raise DataError(
        f"{root / SPLITS_MAT}: no such file, nor {root / 'splits.json'}; name one with the option splits=FILE"
    )


def _read_mat(path: Path, people: list[int]) -> Splits:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        places = scipy.io.loadmat(path)["ls_set"].astype(np.int64)  # [splits, people], from 1
    except Exception as error:  # SciPy raises many kinds for a damaged file
        raise DataError(f"{path}: not a MATLAB file with ls_set: {error!r}") from None
    if (
        places.ndim != 2
        or places.shape[1] != len(people)
        or any(sorted(row) != list(range(1, len(people) + 1)) for row in places.tolist())
    ):
        raise DataError(
            f"{path}: ls_set is {places.shape}, expected rows that order the {len(people)} people of both cameras"
        )
    numbers = np.array(people)[places - 1]
    half = len(people) // 2
    splits = tuple((tuple(sorted(row[half:].tolist())), tuple(sorted(row[:half].tolist()))) for row in numbers)
    check_splits(splits, set(people), path)
    return splits
