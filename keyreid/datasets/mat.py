"""Tables of whole numbers in MATLAB 5 files.

SciPy reads them too, but crashes the process on some damaged ones. Format: "MAT-File Format", MathWorks.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from keyreid.errors import DataError

LARGEST = 1 << 28  # bytes of a variable: a compressed one may be a bomb
MATRIX, COMPRESSED, COMPLEX = 14, 15, 0x0800
CLASSES = dict(enumerate(("", "cell", "struct", "object", "char", "sparse", "numbers"))) | {17: "opaque"}
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read_mat(path: Path, variable: str) -> np.ndarray:
    """A variable of a MATLAB 5 file, int64; DataError where it is missing, damaged or not of whole numbers."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        content = path.read_bytes()
        if (order := {b"IM": "<", b"MI": ">"}.get(content[126:128])) is None:
            raise DataError(f"{path}: not a MATLAB 5 file (save it with -v7)")
        for kind, body in _elements(content[128:], order):
            if kind == COMPRESSED:
                unpacked = zlib.decompressobj()
                kind, body = next(_elements(unpacked.decompress(body, LARGEST), order))
            if kind == MATRIX and (found := _matrix(body, order))[0] == variable:
                break
        else:
            raise DataError(f"{path}: has no variable {variable}")
    except (OSError, ValueError, LookupError, StopIteration, struct.error, zlib.error) as error:
        raise DataError(f"{path}: not a whole MATLAB 5 file (save it with -v7): {error!r}") from None
    _, kind, values = found
    with np.errstate(invalid="ignore"):
        whole = values.astype(np.int64)
    if kind != "numbers" or (whole != values).any():
        raise DataError(f"{path}: {variable} is {kind} {values.shape}, expected a table of whole numbers")
    return whole


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of one element after the other."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        small = kind >> 16  # then type and size share four bytes, and four of content follow
        start, size = (at + 4, small) if small else (at + 8, size)
        if start + size > len(data):
            raise ValueError("it is cut short")
        yield kind & 0xFFFF, data[start : start + size]
        at = at + 8 if small else start + size + (0 if kind == COMPRESSED else -size % 8)


def _matrix(body: bytes, order: str) -> tuple[str, str, np.ndarray]:
    """Name, kind and content; of what is not real numbers only its shape."""
    parts = _elements(body, order)
    flags = struct.unpack_from(f"{order}I", next(parts)[1])[0]
    shape = np.frombuffer(next(parts)[1], f"{order}i4").tolist()
    name = next(parts)[1].decode("latin-1")
    kind = "complex numbers" if flags & COMPLEX else CLASSES.get(flags & 0xFF, "numbers")
    if kind != "numbers":
        return name, kind, np.empty(0)
    kind_of_number, content = next(parts)
    return name, kind, np.frombuffer(content, order + TYPES[kind_of_number]).reshape(shape, order="F")
