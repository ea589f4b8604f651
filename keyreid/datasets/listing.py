"""What the readers share: folders and pictures in a fixed order, keys, names turned into numbers, MATLAB files."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import scipy.io

from keyreid.errors import DataError

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
RESERVED = {"distractor": 0, "junk": -1}  # identity names with the meaning they have in MARS


def folders(parent: Path) -> list[Path]:
    """Sub-folders in natural order of their names, hidden ones left out; the order never depends on the file system.

    Raises:
        DataError: `parent` is not a folder.
    """
    return _sorted(parent, lambda path: path.is_dir())


def pictures(parent: Path) -> list[Path]:
    """Picture files in natural order (`2.jpg` before `10.jpg`).

    Raises:
        DataError: `parent` is not a folder.
    """
    return _sorted(parent, lambda path: path.suffix.lower() in PICTURE_SUFFIXES)


def _sorted(parent: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    if not parent.is_dir():
        raise DataError(f"{parent}: no such folder")
    found = (path for path in parent.iterdir() if not path.name.startswith(".") and wanted(path))
    return sorted(found, key=lambda path: natural(path.name))


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorting key: runs of digits count as numbers, ties go by the name itself."""
    pieces = [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.findall(r"[0-9]+|[^0-9]+", name)]
    return (*pieces, (-2, name))


def safe_key(*names: str) -> str:
    """A tracklet key of names that may hold anything: other characters become `-`."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", "_".join(names)).lstrip("_-") or "tracklet"


class Keys:
    """Gives each tracklet a key of its own, also where names differ only in characters that keys may not have."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def give(self, *names: str) -> str:
        """A key not given before."""
        wished = key = safe_key(*names)
        number = 2
        while key in self._given:
            key, number = f"{wished}-{number}", number + 1
        self._given.add(key)
        return key


def numbered(
    names: Iterable[str], reserved: dict[str, int] | None = None, known: dict[str, int] | None = None
) -> dict[str, int]:
    """Names in natural order, numbered from 1; `reserved` and `known` names keep their numbers, new ones follow."""
    kept = {**(known or {}), **(reserved or {})}
    plain = sorted(set(names), key=natural)
    first = max(0, *kept.values()) + 1 if kept else 1
    numbers = {name: number for number, name in enumerate((n for n in plain if n not in kept), start=first)}
    return {name: numbers.get(name, kept.get(name, 0)) for name in plain}


def read_mat(path: Path, variable: str) -> np.ndarray:
    """A variable of a MATLAB 5 file.

    Raises:
        DataError: the file is missing or damaged, or has no such variable.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return scipy.io.loadmat(path)[variable]
    except KeyError:
        raise DataError(f"{path}: has no variable {variable}") from None
    except Exception as error:  # SciPy raises many kinds for a damaged file
        raise DataError(f"{path}: not a MATLAB 5 file: {error}") from None
