"""Whole shards of a URL in a cache on this machine, shared by all its processes and sets, bounded.

A shard is fetched when it is first read, or before, by one process while the others wait for it, and checked against
the card's SHA-256 before it gets its name. When the cache is full, the shards that were let go and those not used for
longest are removed. What is on its way counts in full. A shard is opened anew for each read, so what goes really frees
disk, and a process that is reading it still has it.
"""

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from keyreid.errors import DataError
from keyreid.shards.storage import ShardFiles, read_range
from keyreid.shards.transfer import fetch, partial_of

USE_NOTED_SECONDS = 60  # how often a shard's use is written down
WAIT_SECONDS = 0.1  # between looks at whether there is room now

log = logging.getLogger(__name__)


class CachedShardFiles(ShardFiles):
    """The shards of a URL, in the cache once they were read."""

    def __init__(self, url: str, folder: Path, shards: list[dict[str, Any]], cache_gigabytes: float | None) -> None:
        self._url, self._folder, self._shards, self._gigabytes = url, folder, shards, cache_gigabytes
        self._wanted: set[int] = set()  # asked for ahead, and not yet let go

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process wants nothing ahead yet."""
        return CachedShardFiles, (self._url, self._folder, self._shards, self._gigabytes)

    def read(self, number: int, size: int, offset: int, right: Callable[[bytes], bool] | None = None) -> bytes:
        """See ShardFiles; a shard is fetched if it is not in the cache."""
        path = self._path(number)
        while True:
            try:
                with path.open("rb", buffering=0) as file:
                    if time.time() - os.fstat(file.fileno()).st_mtime > USE_NOTED_SECONDS:
                        os.utime(file.fileno())
                    return read_range(file.fileno(), size, offset)
            except FileNotFoundError:  # not fetched yet, or some process needed the room
                self._fetch(number)
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}") from None

    def prefetch(self, numbers: Sequence[int]) -> None:
        """See ShardFiles. A thread fetches one after the other, of one process of this machine at a time.

        It stops where another would not fit beside those wanted, or cannot be fetched: `read` then says why.
        """
        self._wanted.update(numbers)
        threading.Thread(target=self._ahead, args=(list(numbers),), name="keyreid-prefetch", daemon=True).start()

    def drop(self, numbers: Sequence[int]) -> None:
        """See ShardFiles. Those let go are the first to be removed; a process that is behind may still read them."""
        self._wanted.difference_update(numbers)
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._path(number), (0, 0))

    def _path(self, number: int) -> Path:
        return self._folder / self._shards[number]["file"]

    def _ahead(self, numbers: list[int]) -> None:
        for number in numbers:
            try:
                with FileLock(self._folder.parent / "ahead.lock"):
                    if number in self._wanted and not self._fetch(number, ahead=True):
                        return
            except DataError as error:
                log.info("not fetched ahead: %s", error)
                return

    def _fetch(self, number: int, ahead: bool = False) -> bool:
        """Fetch a shard, unless another process does while this one waits; whether there was room, if `ahead`."""
        path, shard = self._path(number), self._shards[number]
        with FileLock(f"{path}.lock"):
            if path.exists():
                os.utime(path)  # it shall not go before its turn
                return True
            partial_of(path, shard["bytes"]).unlink(missing_ok=True)  # a killed process left it
            while not self._make_room(path, shard["bytes"], ahead):
                if ahead:
                    return False
                time.sleep(WAIT_SECONDS)
            fetch(f"{self._url}/{shard['file']}", path, shard["bytes"], shard["sha256"])
        return True

    def _make_room(self, new: Path, needed: int, ahead: bool) -> bool:
        """Set `needed` bytes aside, for which others go; false where none can go: wanted, if `ahead`, or on their way.

        What is set aside is an unfinished file, whose name says how large it will be.
        """
        cache = self._folder.parent
        with FileLock(cache / "room.lock"):
            coming = sum(map(_coming, cache.glob("*/.*.tar*.partial")))
            if self._gigabytes is not None:
                bound = self._gigabytes * 1e9
                wanted = {self._path(number) for number in tuple(self._wanted)}
                stats = [(path in wanted, path.stat(), path) for path in cache.glob("*/*.tar")]
                used = coming + sum(stat.st_size for _, stat, _ in stats)
                for spared, stat, path in sorted(stats, key=lambda found: (found[0], found[1].st_mtime)):
                    if used + needed <= bound or (ahead and spared):
                        break
                    path.unlink()
                    used -= stat.st_size
                if used + needed > bound:
                    if coming or ahead:
                        return False
                    raise DataError(
                        f"data.cache_gigabytes={self._gigabytes:g} is less than {self._url}/{new.name}, "
                        f"{needed / 1e9:.3g} GB; raise it, or set data.remote=ranges, which needs no cache"
                    )
            free = shutil.disk_usage(cache).free
            if needed > free:
                raise DataError(f"{cache}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free")
            partial_of(new, needed).touch()
        return True


def _coming(partial: Path) -> int:
    """Bytes that an unfinished shard will have; none if the process that fetched it is gone: it is removed."""
    found = re.fullmatch(r"\.(.+\.tar)(?:\.(\d+))?\.partial", partial.name)
    if found:
        try:
            with FileLock(partial.with_name(f"{found[1]}.lock"), timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            return int(found[2] or 0)
    return 0
