"""Shard files as numbers: open once, read a range of bytes at a time, from any thread or forked process."""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Protocol

from keyreid.errors import DataError

_SPARE_FILES = 256  # for everything else a training process opens


class ShardFiles(Protocol):
    """Where the bytes of the shards come from."""

    def open(self, number: int) -> int:
        """A file descriptor of shard `number`, for os.pread; it stays valid."""
        ...

    def close(self) -> None:
        """Close all of them."""
        ...


class LocalShardFiles:
    """Shards in a folder."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def open(self, number: int) -> int:
        """Open a shard at its first use.

        Raises:
            DataError: it is missing or may not be read.
        """
        descriptor = self._descriptors.get(number)
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get(number)
                if descriptor is None:
                    descriptor = self._descriptors[number] = self._open(number)
        return descriptor

    def path(self, number: int) -> Path:
        """The shard's path on this machine."""
        return self.paths[number]

    def close(self) -> None:
        """Close every open shard."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _open(self, number: int) -> int:
        allow_open_files(len(self.paths))
        path = self.path(number)
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; pack the dataset again, whole shards are kept") from None


def allow_open_files(count: int) -> None:
    """Raise the process's own limit of open files where so many shards need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        if most > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
