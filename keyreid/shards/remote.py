"""Shards in object storage or behind a web server: whole shards are fetched into a cache on this machine.

A shard is fetched when it is first read, by one process while the others wait for it, and checked against the card's
SHA-256 before it gets its name. The cache is shared by every process and dataset of the machine; when it is full, the
shards that were not used for longest go. A shard is opened anew for each read (5 us), so what goes really frees disk.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from keyreid.errors import DataError, install_hint
from keyreid.files import replacing, sha256
from keyreid.shards.card import CARD_NAME, LARGEST_CARD, read_card
from keyreid.shards.storage import DEFAULT_CACHE, client_options, read_range, why

TRIES = 4
FIRST_WAIT_SECONDS = 0.5  # doubled for each further try
USE_NOTED_SECONDS = 60  # how often a shard's use is written down
ABANDONED_SECONDS = 3600  # without a change, after which what is half fetched is nobody's

log = logging.getLogger(__name__)


def open_remote(
    url: str, cache_dir: str | Path | None = None, cache_gigabytes: float | None = None
) -> "tuple[Path, CachedShardFiles]":
    """Fetch the card and the indices of a set of shards: their folder, and the shards, fetched when they are read.

    Args:
        url: its folder; whatever fsspec opens (s3://, gs://, https://), with the credentials it finds.
        cache_gigabytes: bound of the whole cache; None: none.

    Raises:
        DataError: something cannot be fetched or is not what the card says.
    """
    url = url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2])[-40:]
    cache = Path(cache_dir or DEFAULT_CACHE).expanduser()
    folder = cache / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "card.lock"):
        _fetch(f"{url}/{CARD_NAME}", folder / CARD_NAME, LARGEST_CARD)
        card = read_card(folder)
        for shard in card["shards"]:
            index = folder / shard["index"]
            if not (index.is_file() and sha256(index) == shard["index_sha256"]):
                _fetch(f"{url}/{shard['index']}", index, shard["index_bytes"], shard["index_sha256"])
    total = sum(shard["bytes"] for shard in card["shards"]) / 1e9
    if cache_gigabytes is not None and total > cache_gigabytes:
        log.warning(
            "%s: %.3g GB of shards do not fit data.cache_gigabytes=%g: they will be fetched again and again",
            *(url, total, cache_gigabytes),
        )
    return folder, CachedShardFiles(url, folder, card["shards"], cache_gigabytes)


class CachedShardFiles:
    """The shards of a URL, in the cache once they were read."""

    def __init__(self, url: str, folder: Path, shards: list[dict[str, Any]], cache_gigabytes: float | None) -> None:
        self._url, self._folder, self._shards = url, folder, shards
        self._bound = None if cache_gigabytes is None else int(cache_gigabytes * 1e9)
        self._noted: dict[int, float] = {}

    def read(self, number: int, size: int, offset: int) -> bytes:
        """See ShardFiles; a shard is fetched if it is not in the cache."""
        shard = self._shards[number]
        path = self._folder / shard["file"]
        while True:
            try:
                with path.open("rb", buffering=0) as file:
                    if time.monotonic() - self._noted.get(number, -1e9) > USE_NOTED_SECONDS:
                        self._noted[number] = time.monotonic()
                        os.utime(file.fileno())
                    return read_range(file.fileno(), size, offset)
            except FileNotFoundError:  # not fetched yet, or some process needed the room
                with FileLock(f"{path}.lock"):
                    if not path.exists():  # or it was fetched while this process waited
                        self._make_room(shard["bytes"])
                        _fetch(f"{self._url}/{shard['file']}", path, shard["bytes"], shard["sha256"])
            except OSError as error:
                raise DataError(f"{path}: {error.strerror}") from None

    def _make_room(self, needed: int) -> None:
        """Remove what killed processes left, and the shards not used for longest until `needed` bytes fit the bound."""
        cache = self._folder.parent
        with FileLock(cache / "room.lock"):
            for partial in cache.glob("*/.*.partial"):
                with contextlib.suppress(FileNotFoundError):  # it was finished
                    if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                        partial.unlink()
            if self._bound is not None:
                stats = [(path, path.stat()) for path in cache.glob("*/*.tar")]
                used = sum(stat.st_size for _, stat in stats)
                for path, stat in sorted(stats, key=lambda pair: pair[1].st_mtime):
                    if used + needed <= self._bound:
                        break
                    path.unlink(missing_ok=True)
                    used -= stat.st_size
            free = shutil.disk_usage(cache).free
            if needed > free:
                raise DataError(f"{cache}: {needed / 1e9:.2f} GB are to be fetched, {free / 1e9:.2f} GB are free")


class _Bound(Callback):
    """Ends a transfer that brings more than was promised."""

    def __init__(self, url: str, most: int) -> None:
        super().__init__()
        self.url, self.most = url, most

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.most:
            raise DataError(f"{self.url}: is larger than the {self.most} bytes that the card says")


def _fetch(url: str, path: Path, size: int, digest: str | None = None) -> None:
    """Fetch a file whole: it has its name only when its hash is right. Tries again where that may help."""
    try:
        system = url_to_fs(url, **client_options(url))[0]  # fsspec keeps one for each process and protocol
    except ImportError as error:
        raise DataError(f"{url}: {error}; {install_hint('remote')}") from None
    except ValueError as error:
        raise DataError(f"{url}: {error}") from None
    reason = ""
    with replacing(path, alone=True) as partial:  # the caller has its lock
        for attempt in range(TRIES):
            if attempt:
                log.warning("%s: %s; trying again", url, reason)
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1))
            try:
                system.get_file(url, str(partial), callback=_Bound(url, size))
                if digest is None or sha256(partial) == digest:
                    return
                reason = f"its SHA-256 is not that of the card ({partial.stat().st_size} of {size} bytes came)"
            except (FileNotFoundError, PermissionError) as error:
                raise DataError(f"{url}: {type(error).__name__}: {error}") from None
            except DataError:
                raise
            except Exception as error:  # every protocol has its own, and networks fail in many ways
                reason = why(error)
        raise DataError(f"{url}: {reason}; given up after {TRIES} tries")
