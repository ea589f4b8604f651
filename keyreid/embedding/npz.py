"""Arrays from `.npz` files of anybody's, without unpickling anything."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keyreid.errors import DataError


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of a file.

    Raises:
        DataError: it is missing, damaged, no such file, or lacks one of them.
    """
    try:
        with path.open("rb") as start:
            if not start.read(6).startswith((b"PK", b"\x93NUMPY")):  # numpy would advise to unpickle it
                raise ValueError("numpy.savez did not write it")
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path}: a single array; an .npz file with {', '.join(names)} is needed")
        with file:
            if missing := [name for name in names if name not in file.files]:
                there = ", ".join(file.files) or "nothing"
                raise DataError(f"{path}: lacks {', '.join(missing)}; it has {there}")
            arrays = {name: file[name] for name in names}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: not an .npz file of plain arrays: {error}") from None
    if unusable := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path}: {unusable[0]} is not an array")
    return arrays
