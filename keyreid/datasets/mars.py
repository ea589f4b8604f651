"""MARS (Zheng et al., ECCV 2016): 1261 people, 6 cameras, tracklets of 2 to 920 frames.

`ROOT/bbox_train`, `ROOT/bbox_test` and `ROOT/info`, as the authors publish them (`info` is their evaluation
repository's folder); `keyreid walkers` writes the same layout. The index says which consecutive lines of the name files
form a tracklet; a name's folder is what stands before its camera: `0001C1T0001F001.jpg` lies in `0001`.
"""

import gzip
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keyreid.datasets.mat import read_mat
from keyreid.datasets.tracklet import JUNK_IDENTITY, Dataset, Pictures, Tracklet
from keyreid.errors import DataError

KEY = re.compile(r"(?P<folder>[0-9]{1,9}|00-1)C(?P<camera>[0-9])T[0-9]+")
PICTURE = re.compile(r"F[0-9]+\.(?:jpg|png)")  # follows the key in a name
NAMES_BYTES = 1 << 28  # of a file of names, at most: a gzipped one may be a bomb


class MarsIndex(NamedTuple):
    """What `info/` says, checked."""

    train_names: list[str]  # of pictures
    test_names: list[str]
    train_rows: np.ndarray  # int64 [K, 4]: first and last line of the names (from 1, inclusive), identity, camera
    test_rows: np.ndarray
    queries: np.ndarray  # int64 [Q], positions in `test_rows`, from 0


def open_mars(root: Path) -> Dataset:
    """Read the index and name every picture; pictures are not looked for one by one (there are 1.2 million).

    Raises:
        DataError: a folder or file is missing, or the index does not fit its names.
    """
    for folder in ("bbox_train", "bbox_test", "info"):
        if not (root / folder).is_dir():
            raise DataError(f"{root / folder}: no such folder; MARS has bbox_train, bbox_test and info")
    index = read_index(root / "info")
    train = _tracklets(root / "bbox_train", index.train_names, index.train_rows)
    test = _tracklets(root / "bbox_test", index.test_names, index.test_rows, set(index.queries.tolist()))
    return Dataset("mars", (*train, *test))


def read_index(info: Path) -> MarsIndex:
    """Read `info/` alone; the name files may be gzipped (`.txt.gz`).

    Raises:
        DataError: a file is missing or damaged; a row of the index is beyond its names, or disagrees with them.
    """
    train_names, train_file = _read_names(info, "train_name.txt")
    test_names, test_file = _read_names(info, "test_name.txt")
    train_rows = _read_rows(info / "tracks_train_info.mat", "track_train_info", train_names, train_file)
    test_rows = _read_rows(info / "tracks_test_info.mat", "track_test_info", test_names, test_file)
    path = info / "query_IDX.mat"
    queries = read_mat(path, "query_IDX")
    if queries.size != max(queries.shape):
        raise DataError(f"{path}: query_IDX is {queries.shape}, expected one row of numbers")
    queries = queries.reshape(-1)
    wrong = np.flatnonzero((queries < 1) | (queries > len(test_rows)))
    for at in wrong[:1]:
        raise DataError(f"{path}: query {at + 1} is row {queries[at]}, but there are {len(test_rows)} test tracklets")
    return MarsIndex(train_names, test_names, train_rows, test_rows, queries - 1)


def _read_names(info: Path, name: str) -> tuple[list[str], Path]:
    path = next((path for path in (info / name, info / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise DataError(f"{info / name}: no such file (nor {name}.gz)")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="ascii") as file:
            names = file.read(NAMES_BYTES + 1)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if len(names) > NAMES_BYTES:
        raise DataError(f"{path}: more than {NAMES_BYTES} letters of names; MARS has 14 million")
    return names.split(), path  # split: lines end in CRLF


def _read_rows(path: Path, variable: str, names: list[str], names_file: Path) -> np.ndarray:
    rows = read_mat(path, variable)
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise DataError(f"{path}: {variable} is {rows.shape}, expected rows of start, end, identity, camera")
    wrong = np.flatnonzero((rows[:, 0] < 1) | (rows[:, 1] < rows[:, 0]) | (rows[:, 1] > len(names)))
    if len(wrong):
        start, end = rows[wrong[0], :2]
        lines = f"lines {start} to {end} of {names_file}, which has {len(names)}"
        raise DataError(f"{path}: row {wrong[0] + 1} is {lines}; one of them is cut short or from another release")
    return rows


def _tracklets(folder: Path, names: list[str], rows: np.ndarray, queries: set[int] | None = None) -> list[Tracklet]:
    """Tracklets of the index' rows; without `queries` they are for training."""
    tracklets = []
    for row, (start, end, identity, camera) in enumerate(rows.tolist()):
        own = names[start - 1 : end]
        if (match := KEY.match(own[0])) is None:
            raise DataError(f"{folder}: {own[0]!r} is not a MARS picture name such as 0001C1T0001F001.jpg")
        key = match[0]
        strays = [name for name in own if not (name.startswith(key) and PICTURE.fullmatch(name, len(key)))]
        if strays or int(match["camera"]) != camera or int(match["folder"].replace("00-1", "-1")) != identity:
            said, shown = f"identity {identity}, camera {camera}", f"{own[0]} .. {(strays or own)[-1]}"
            raise DataError(f"{folder}: row {row + 1} of the index says {said}, but its pictures are {shown}")
        tested = "junk" if identity == JUNK_IDENTITY else "query" if row in (queries or ()) else "gallery"
        frames = Pictures(folder / match["folder"], own)
        tracklets.append(Tracklet(key, identity, camera, "train" if queries is None else tested, frames))
    places = {tracklet.frames[0].path.parent for tracklet in tracklets}
    missing = sorted(str(place) for place in places if not place.is_dir())
    if missing:
        raise DataError(f"{missing[0]}: no such folder, named by the index ({len(missing)} are missing)")
    return tracklets
