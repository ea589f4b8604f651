"""What the readers share: folders and pictures in a fixed order, keys, names turned into numbers, MATLAB files."""

import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path

import numpy as np
import scipy.io

from keyreid.datasets.suffixes import is_picture
from keyreid.errors import DataError

RESERVED = {"distractor": 0, "junk": -1}  # identity names with the meaning they have in MARS


def folders(parent: Path) -> list[Path]:
    """Sub-folders in natural order of their names, never in the file system's; DataError where `parent` is none."""
    return [path for path in _visible(parent) if path.is_dir()]


def pictures(parent: Path) -> list[Path]:
    """Picture files in natural order (`2.jpg` before `10.jpg`); DataError where `parent` is not a folder."""
    return [path for path in _visible(parent) if is_picture(path)]


def _visible(parent: Path) -> list[Path]:
    if not parent.is_dir():
        raise DataError(f"{parent}: no such folder")
    found = (path for path in parent.iterdir() if not path.name.startswith("."))
    return sorted(found, key=lambda path: natural(path.name))


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorting key: runs of digits count as numbers, ties go by the name itself."""
    pieces = [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.findall(r"[0-9]+|[^0-9]+", name)]
    return (*pieces, (-2, name))


def safe_key(*names: str) -> str:
    """A tracklet key of names that may hold anything: other characters become `-`."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", "_".join(names)).lstrip("_-") or "tracklet"


def new_key(given: set[str], *names: str) -> str:
    """A key not `given` yet, also where names differ only in characters that keys may not have; it joins those."""
    wished = key = safe_key(*names)
    number = 2
    while key in given:
        key, number = f"{wished}-{number}", number + 1
    given.add(key)
    return key


def numbered(names: Iterable[str], kept: Mapping[str, int]) -> dict[str, int]:
    """Names in natural order, numbered from 1; `kept` ones have their numbers, new ones follow."""
    new = count(max([0, *kept.values()]) + 1)
    return {name: kept[name] if name in kept else next(new) for name in sorted(set(names), key=natural)}


def read_mat(path: Path, variable: str) -> np.ndarray:
    """A variable of a MATLAB 5 file; DataError where it is missing or damaged, or has no such variable."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return scipy.io.loadmat(path)[variable]
    except KeyError:
        raise DataError(f"{path}: has no variable {variable}") from None
    except Exception as error:  # SciPy raises many kinds for a damaged file
        raise DataError(f"{path}: not a MATLAB 5 file: {error}") from None
