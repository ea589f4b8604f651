"""Where the bytes of shards come from, and how they come from the files of a folder."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from keyreid.errors import DataError

AGAIN = "pack the dataset again, whole shards are kept"
DEFAULT_CACHE = Path("~/.cache/keyreid/shards")
OPEN_FILES = 64  # shards of a set that a process keeps open


class ShardFiles(Protocol):
    """The shards of a set, by their position in the card; remote.py has those of a URL. May be sent to a process."""

    def read(self, number: int, size: int, offset: int, right: Callable[[bytes], bool] | None = None) -> bytes:
        """`size` bytes of shard `number`, fewer where it ends; DataError where it is missing or cannot be read.

        Args:
            right: whether bytes are those packed. Where a transfer can damage them, others are asked for again.
        """

    def ahead(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """Fetch what will be read next, (number, size, offset) of each, where that saves time."""

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Begin to fetch whole shards that will be read soon, within the bound of the cache, where there is one."""

    def drop(self, numbers: Sequence[int]) -> None:
        """Let shards go that will not be read soon; before `prefetch`, to which they make room."""


class UnreachableError(DataError):
    """A server that gives nothing: no sample is damaged, so that none is skipped for it."""


class _Descriptor:
    """A file that is closed when nobody reads it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class LocalShardFiles(ShardFiles):
    """Shards in a folder; those read last stay open, because opening takes a round trip on network file systems."""

    @classmethod
    def open(cls, folder: Path, shards: list[dict[str, Any]]) -> "LocalShardFiles":
        """The shards of a card, all of which must be there in their full size, or it is a DataError."""
        paths = [folder / shard["file"] for shard in shards]
        for path, shard in zip(paths, shards, strict=True):
            try:
                found = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}; {AGAIN}") from None
            if found != shard["bytes"]:
                raise DataError(f"{path}: {found} bytes, but {shard['bytes']} were packed; {AGAIN}")
        return cls(paths)

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._opened = functools.lru_cache(OPEN_FILES)(
            lambda number: _Descriptor(os.open(paths[number], os.O_RDONLY | os.O_CLOEXEC))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own."""
        return LocalShardFiles, (self._paths,)

    def read(self, number: int, size: int, offset: int, right: Callable[[bytes], bool] | None = None) -> bytes:
        """See ShardFiles."""
        try:
            file = self._opened(number)  # held while it is read: another thread's opening may push it out
            return read_range(file.number, size, offset)
        except OSError as error:
            raise DataError(f"{self._paths[number]}: {error.strerror}; {AGAIN}") from None


def read_range(descriptor: int, size: int, offset: int) -> bytes:
    """os.pread that goes on until it has all or the file ends; network file systems may give less at a time."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size:
        more = os.pread(descriptor, size - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content
