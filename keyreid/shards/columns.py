"""Named arrays in one file, mapped into memory: a process holds what it looks at, and all of a machine share that.

The file is a safetensors file, which numpy maps without a copy. The widest numbers come first, so that all are aligned.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from keyreid.files import check_plain
from keyreid.shards.members import refusing

_NAMES = {"I64": "<i8", "I32": "<i4", "U32": "<u4", "U16": "<u2", "U8": "|u1"}  # from the widest to the narrowest
_LARGEST, _LARGEST_HEADER = 1 << 44, 1 << 20  # bytes
_UNSEALED = "0" * 64


Form = tuple[str, tuple[int, ...]]  # type and shape


def create(path: Path, forms: Mapping[str, Form], about: dict[str, str]) -> dict[str, np.ndarray]:
    """Make a file of arrays, zero until they are written.

    Args:
        forms: the type (a value of `_NAMES`, or i8 for <i8) and the shape of each.
        about: what `read` gives with them; `seal` adds the SHA-256 of the numbers when they are there.
    """
    header, end = {"__metadata__": {"sha256": _UNSEALED, **about}}, 0
    for name, dtype in _NAMES.items():
        for column, (kind, shape) in forms.items():
            if np.dtype(kind) == np.dtype(dtype):
                start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
                header[column] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    return read(path, writable=True)[0]


def seal(path: Path) -> None:
    """Note the SHA-256 of the numbers that were written; then the file is finished."""
    with path.open("r+b") as file:
        place = file.read(_LARGEST_HEADER).index(_UNSEALED.encode())
        digest = content_sha256(path)
        file.seek(place)
        file.write(digest.encode())


def content_sha256(path: Path) -> str:
    """SHA-256 of the numbers of a file."""
    with path.open("rb") as file:
        file.seek(8 + struct.unpack("<Q", file.read(8))[0])
        return hashlib.file_digest(file, "sha256").hexdigest()


@refusing
def read(path: Path, writable: bool = False) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a file, and what it says about them; OSError or ValueError where it cannot be such a file."""
    try:
        raw = np.memmap(check_plain(path, _LARGEST), mode="r+" if writable else "r").view(np.ndarray)
    except OSError as error:
        raise ValueError(str(error)) from None
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    if start > 8 + _LARGEST_HEADER:
        raise ValueError("its header is too long")
    header = json.loads(raw[8:start].tobytes())
    about = header.pop("__metadata__")
    arrays = {}
    for column, form in header.items():
        first, last = form["data_offsets"]
        if not 0 <= first <= last <= len(raw) - start:
            raise ValueError(f"it ends before {column}")
        arrays[column] = raw[start + first : start + last].view(_NAMES[form["dtype"]]).reshape(form["shape"])
    return arrays, about
