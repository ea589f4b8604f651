"""Where the bytes of shards come from: files of a folder, from any thread, or one stream after the other."""

import importlib.util
import os
import resource
import threading
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from keyreid.errors import DataError

AGAIN = "pack the dataset again, whole shards are kept"
DEFAULT_CACHE = Path("~/.cache/keyreid/shards")
IDLE_SECONDS = 60.0  # without a byte, after which a transfer has failed; as a whole it may take as long as it likes
_SPARE_FILES = 256  # for everything else a training process opens
_STREAM_BYTES = 1 << 20  # read at once
_STREAM_KEPT = 64 << 20  # behind the place of reading, for a tracklet whose frames repeat


def client_options(url: str) -> dict[str, Any]:
    """What fsspec's client for this URL is told: by default one ends every transfer after 300 s, another never.

    Those of other protocols than these have limits of their own (S3: 60 s without a byte).
    """
    protocol = url.partition("://")[0]
    if protocol not in ("http", "https", "gs", "gcs") or importlib.util.find_spec("aiohttp") is None:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=IDLE_SECONDS, sock_read=IDLE_SECONDS)
    return {"client_kwargs": {"timeout": timeout}} if protocol.startswith("http") else {"requests_timeout": timeout}


def why(error: Exception) -> str:
    """Why a transfer failed; what ends a stalled one has no words of its own."""
    silent = isinstance(error, TimeoutError)
    return f"no byte came for {IDLE_SECONDS:g} s" if silent else f"{type(error).__name__}: {error}"


class ShardFiles(Protocol):
    """The shards of a set, by their position in the card; remote.py has those of a URL."""

    def read(self, number: int, size: int, offset: int) -> bytes:
        """`size` bytes of shard `number`, fewer where it ends; DataError where it is missing or cannot be read."""


class LocalShardFiles:
    """Shards in a folder, each opened at its first use."""

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
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < len(paths) + _SPARE_FILES:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own."""
        return LocalShardFiles, (self._paths,)

    def read(self, number: int, size: int, offset: int) -> bytes:
        """See ShardFiles."""
        try:
            with self._lock:
                if number not in self._descriptors:
                    self._descriptors[number] = os.open(self._paths[number], os.O_RDONLY | os.O_CLOEXEC)
            return read_range(self._descriptors[number], size, offset)
        except OSError as error:
            raise DataError(f"{self._paths[number]}: {error.strerror}; {AGAIN}") from None


class StreamedShardFiles:
    """Shards read from front to back, one at a time, nothing kept on disk; for one thread.

    A shard is read through a single time as long as the reads ascend, but for the last 64 MB; a read further back
    opens it again.
    """

    def __init__(self, locations: list[str]) -> None:
        self._locations, self._number = locations, -1
        self._stream: BinaryIO | None = None
        self._kept, self._start = bytearray(), 0  # what was read last, and where in the shard it begins

    def read(self, number: int, size: int, offset: int) -> bytes:
        """See ShardFiles."""
        location = self._locations[number]
        try:
            if number != self._number or offset < self._start:
                self.close()
                import fsspec  # a stream alone needs it

                self._stream, self._number = fsspec.open(location, "rb", **client_options(location)).open(), number
            while self._start + len(self._kept) < offset + size:
                more = self._stream.read(_STREAM_BYTES)
                if not more:
                    break
                self._kept += more
                surplus = min(len(self._kept) - _STREAM_KEPT, offset - self._start)
                if surplus > 0:
                    del self._kept[:surplus]
                    self._start += surplus
        except Exception as error:  # every protocol has its own
            raise DataError(f"{location}: {why(error)}") from None
        return bytes(self._kept[offset - self._start :][:size])

    def close(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
        self._number, self._stream, self._kept, self._start = -1, None, bytearray(), 0


def read_range(descriptor: int, size: int, offset: int) -> bytes:
    """os.pread that goes on until it has all or the file ends; network file systems may give less at a time."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size:
        more = os.pread(descriptor, size - len(content), offset + len(content))
        if not more:
            break
        content += more
    return content
