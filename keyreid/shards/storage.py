"""Shard files in a folder: opened once, read a range of bytes at a time, from any thread."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Protocol

from keyreid.errors import DataError

_SPARE_FILES = 256  # for everything else a training process opens


class ShardFiles(Protocol):
    """Where the bytes of the shards come from; remote.py has the other kind."""

    def read(self, number: int, size: int, offset: int) -> bytes:
        """`size` bytes of shard `number`; fewer where it ends."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


class LocalShardFiles:
    """Shards in a folder."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def read(self, number: int, size: int, offset: int) -> bytes:
        """`size` bytes of a shard, which is opened at its first use; fewer where it ends.

        Raises:
            DataError: it is missing or cannot be read.
        """
        try:
            descriptor = self._descriptors.get(number)
            if descriptor is None:
                descriptor = self._open(number)
            return read_range(descriptor, size, offset)
        except OSError as error:
            raise DataError(
                f"{self._paths[number]}: {error.strerror}; pack the dataset again, whole shards are kept"
            ) from None

    def close(self) -> None:
        """Close every open shard."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __getstate__(self) -> list[Path]:
        """Another process opens its own."""
        return self._paths

    def __setstate__(self, paths: list[Path]) -> None:
        self.__init__(paths)  # type: ignore[misc]

    def _open(self, number: int) -> int:
        with self._lock:
            if number not in self._descriptors:
                _allow_open_files(len(self._paths))
                self._descriptors[number] = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[number]


def read_range(descriptor: int, size: int, offset: int) -> bytes:
    """os.pread that goes on until it has all or the file ends; network file systems may give less at a time."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size:
        more = os.pread(descriptor, size - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content


def _allow_open_files(count: int) -> None:
    """Raise the process's own limit of open files where so many shards need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
