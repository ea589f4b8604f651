"""Files that are whole or absent: hashing, syncing and atomic replacement."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from keyreid.errors import KeyreidError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_plain(path: Path, most: int) -> Path:
    """The same path; OSError where it is missing, larger than `most` bytes, or no plain file: opening might wait."""
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) or about.st_size > most:
        raise OSError("no plain file" if about.st_size <= most else f"{about.st_size} bytes, more than {most}")
    return path


def read_whole(path: Path, most: int) -> bytes:
    """A file's content; OSError as for `check_plain`."""
    return check_plain(path, most).read_bytes()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder of `path`; what cannot be written there (a full disk, a folder that is a file) is named.

    Raises:
        KeyreidError: instead of OSError.
    """
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise KeyreidError(f"{path}: cannot be written: {error.strerror or error}") from None


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a folder, last through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """Where to write a file that shall be whole or absent: it takes the place of `path` at the end, not after an error.

    Args:
        alone: no other process writes this file at the same time, so that what a killed one left is written over.
    """
    partial = path.with_name(f".{path.name}.partial" if alone else f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a small file so that readers see the old content or the new one, whenever the machine stops."""
    with replacing(path) as partial:
        partial.write_bytes(content)
        sync(partial)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """The same for UTF-8 text."""
    replace_bytes(path, text.encode())
