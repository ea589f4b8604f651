"""Any distance matrix, from an `.npz` file: read, checked, judged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.embedding.npz import read_arrays
from keyreid.errors import DataError
from keyreid.evaluation.protocols import JUNK_IDENTITY, Side, judge, protocol_named
from keyreid.evaluation.scores import combine

ARRAYS = ("distance", "query_ids", "gallery_ids", "query_cameras", "gallery_cameras")
FRAME_ARRAYS = ("query_frames", "gallery_frames")  # only `released` needs them
_LARGEST_FLOAT = 2**53  # beyond it a float is no longer one whole number


def judge_file(path: Path, protocols: Sequence[str]) -> dict[str, Any]:
    """Judge the matrix in a file by each protocol; gives `scores.combine`'s object.

    The gallery is taken as the file has it: for `official` and `inclusive` it should hold the queries.

    Args:
        path: an `.npz` with `distance` [Q, G], `query_ids` and `query_cameras` [Q], `gallery_ids` and
            `gallery_cameras` [G]; for `released` also `query_frames` [Q] and `gallery_frames` [G], frames a tracklet.

    Raises:
        DataError: the file or one of its arrays cannot be used, or no query has a match.
        ConfigError: a protocol is unknown.
    """
    rules = [protocol_named(name) for name in protocols]  # all of them, so that any unknown one is refused
    frames_needed = any(rule.cameras_by_frame for rule in rules)
    arrays = read_arrays(path, (*ARRAYS, *FRAME_ARRAYS) if frames_needed else ARRAYS)
    distance = arrays["distance"]
    if distance.ndim != 2:
        raise DataError(f"{path}: distance {distance.shape} is not a matrix [queries, gallery]")
    if distance.dtype.kind not in "fiub":
        raise DataError(f"{path}: distance is {distance.dtype}, not real numbers")
    if not distance.size:
        raise DataError(f"{path}: distance {distance.shape} is empty: there is nothing to judge")
    sides = []
    for side, axis in (("query", 0), ("gallery", 1)):
        names = [f"{side}_{name}" for name in ("ids", "cameras", "frames")]
        columns = [_checked_column(path, name, arrays, axis) for name in names if name in arrays]
        if frames_needed and columns[2].min() < 1:
            raise DataError(f"{path}: {names[2]} holds {columns[2].min()}; a tracklet has at least one frame")
        sides.append(Side(*columns))
    try:
        scores = {name: judge(distance, *sides, name).as_dict() for name in protocols}
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return combine(scores, path.stem)


def junk_note(result: dict[str, Any]) -> str:
    """What to say when a protocol that knows no junk met identity -1; empty otherwise."""
    unaware = [name for name in result["protocols"] if not protocol_named(name).junk_left_out]
    if not unaware or not result["junk"]:
        return ""
    note = f"note: {result['junk']} gallery entries have identity {JUNK_IDENTITY}, which {', '.join(unaware)} counts as"
    return f"{note} wrong answers; leave them out of the file, as MARS's readers do"


def _checked_column(path: Path, name: str, arrays: dict[str, np.ndarray], axis: int) -> np.ndarray:
    """int64 [Q] or [G]; whole numbers stored as floats, as MATLAB does, are taken up to 2^53."""
    distance, column = arrays["distance"], arrays[name]
    if column.shape != (distance.shape[axis],):
        raise DataError(
            f"{path}: distance {distance.shape} and {name} {column.shape} do not fit each other: "
            f"{name} must be ({distance.shape[axis]},)"
        )
    kind = column.dtype.kind
    if not (kind in "iu" or (kind == "f" and np.isfinite(column).all() and np.array_equal(column, np.trunc(column)))):
        hint = "; number the names, the same in both" if kind in "US" else ""
        raise DataError(f"{path}: {name} is {column.dtype}; whole numbers are needed{hint}")
    largest = _LARGEST_FLOAT if kind == "f" else np.iinfo(np.int64).max
    if kind in "fu" and (abs(column) > largest).any():
        raise DataError(f"{path}: {name} holds {column[abs(column) > largest][0]}, which is too large")
    return column.astype(np.int64)
