"""Shards in object storage or behind a web server: in a cache on this machine, by ranges, or as streams."""

import hashlib
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from keyreid.config import Remote
from keyreid.errors import DataError
from keyreid.files import replace_text, sha256
from keyreid.shards.cache import CachedShardFiles
from keyreid.shards.card import CARD_NAME, LARGEST_CARD, read_card
from keyreid.shards.storage import DEFAULT_CACHE, ShardFiles
from keyreid.shards.transfer import WholeFileError, fetch, fetch_ranges, given_up, open_stream, reason, tries

CARD_SECONDS = 60  # for which a card is not asked for again: the ranks of a machine that start together have the same
AT_ONCE = 16  # indices
# Bytes between two ranges of a shard up to which both are one request: a request costs 0.3 ms or more
# (benchmarks/remote.py), in which 100 MB/s bring as many.
GAP = 32_768
BATCHES_KEPT = 4  # of what was asked for ahead
_STREAM_BYTES = 1 << 20  # read at once
_STREAM_KEPT = 64 << 20  # behind the place of reading, for a tracklet whose frames repeat
_STAMP = ".verified.json"  # no shard or index can have this name

log = logging.getLogger(__name__)


def open_remote(
    url: str,
    cache_dir: str | Path | None = None,
    cache_gigabytes: float | None = None,
    remote: Remote = "auto",
) -> tuple[Path, ShardFiles]:
    """Fetch the card and the indices of a set of shards: their folder, and the shards, fetched when they are read.

    Whoever comes first fetches and checks them, for all processes of this machine.

    Args:
        url: its folder; whatever fsspec opens (s3://, gs://, https://), with the credentials it finds.
        cache_gigabytes: bound of the whole cache; None: none.
        remote: `shards`: each is fetched whole, into the cache. `ranges`: only what is read is fetched, and not kept.
            `auto`: shards where all fit the cache, so that each is fetched once; otherwise ranges, if the server can.

    Raises:
        DataError: something cannot be fetched or is not what the card says, or there are to be ranges and are none.
    """
    url = url.rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", url.rpartition("/")[2])[-40:]
    cache = Path(cache_dir or DEFAULT_CACHE).expanduser()
    folder = cache / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    card = _known(folder)  # without the lock: the ranks of a machine do not wait for each other
    if card is None:
        with FileLock(folder / "card.lock"):
            card = _known(folder) or _fetch_indices(url, folder)
    total = sum(shard["bytes"] for shard in card["shards"]) / 1e9
    if remote == "shards" or (remote == "auto" and (cache_gigabytes is None or total <= cache_gigabytes)):
        return folder, CachedShardFiles(url, folder, card["shards"], cache_gigabytes)
    with FileLock(folder / "card.lock"):
        stamp = _read_stamp(folder)
        if "ranges" not in stamp:
            stamp["ranges"] = _gives_ranges(url, folder, card)
            replace_text(folder / _STAMP, json.dumps(stamp))
    if stamp["ranges"]:
        return folder, RangeShardFiles(url, card["shards"])
    if remote == "ranges":
        raise DataError(f"{url}: the server does not send ranges of files; set data.remote=shards")
    log.warning(
        "%s: %.3g GB of shards do not fit data.cache_gigabytes=%g, and the server does not send ranges of them: "
        "they will be fetched again and again",
        *(url, total, cache_gigabytes),
    )
    return folder, CachedShardFiles(url, folder, card["shards"], cache_gigabytes)


class RangeShardFiles(ShardFiles):
    """The shards of a URL, of which the bytes are fetched that are read, and nothing is kept on disk."""

    def __init__(self, url: str, shards: list[dict[str, Any]]) -> None:
        self._url, self._shards = url, shards
        self._kept: deque[dict[tuple[int, int, int], bytes]] = deque(maxlen=BATCHES_KEPT)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process has fetched nothing yet."""
        return RangeShardFiles, (self._url, self._shards)

    def ahead(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        """See ShardFiles: all requests at once, one for ranges that are near each other."""
        joined: list[list[tuple[int, int, int]]] = []
        end = 0
        for number, size, offset in sorted(set(ranges), key=lambda wanted: (wanted[0], wanted[2])):
            if not joined or joined[-1][0][0] != number or offset > end + GAP:
                joined.append([])
                end = 0
            joined[-1].append((number, size, offset))
            end = max(end, offset + size)
        spans = [(near[0][2], max(offset + size for _, size, offset in near)) for near in joined]
        wanted = [(self._file(near[0][0]), *span) for near, span in zip(joined, spans, strict=True)]
        kept = {}
        for near, (start, _), content in zip(joined, spans, fetch_ranges(wanted, next(tries())), strict=True):
            if not isinstance(content, Exception):  # `read` tries again
                kept |= {(n, size, offset): content[offset - start :][:size] for n, size, offset in near}
        self._kept.append(kept)

    def read(self, number: int, size: int, offset: int, right: Callable[[bytes], bool] | None = None) -> bytes:
        """See ShardFiles."""
        for kept in tuple(self._kept):
            content = kept.get((number, size, offset))
            if content is not None and (right is None or right(content)):
                return content
        url, why, damaged = self._file(number), "", None
        for end in tries(size):
            if why:
                log.warning("%s: bytes %d to %d: %s; trying again", url, offset, offset + size, why)
            content = fetch_ranges([(url, offset, offset + size)], end)[0]
            if isinstance(content, Exception):
                why = reason(url, content, end)
            elif right is None or right(content):
                return content
            else:
                why, damaged = "they are not those packed", content
        if damaged is not None:
            return damaged  # as a file on disk that is: the caller names what is in it
        raise given_up(f"{url}: bytes {offset} to {offset + size}", why)

    def _file(self, number: int) -> str:
        return f"{self._url}/{self._shards[number]['file']}"


class StreamedShardFiles(ShardFiles):
    """Shards read from front to back, one at a time, nothing kept on disk; for one thread.

    A shard is read through a single time as long as the reads ascend, but for the last 64 MB; a read further back
    opens it again, and so does a transfer that failed.
    """

    def __init__(self, locations: list[str]) -> None:
        self._locations, self._number = locations, -1
        self._stream: BinaryIO | None = None
        self._kept, self._start = bytearray(), 0  # what was read last, and where in the shard it begins

    def read(self, number: int, size: int, offset: int, right: Callable[[bytes], bool] | None = None) -> bytes:
        """See ShardFiles."""
        why = ""
        for end in tries(offset + size):
            try:
                return self._read(number, size, offset, end)
            except Exception as error:  # every protocol has its own
                self.close()
                why = reason(self._locations[number], error, end)
        raise given_up(self._locations[number], why)

    def close(self) -> None:
        """Close the stream."""
        if self._stream is not None:
            self._stream.close()
        self._number, self._stream, self._kept, self._start = -1, None, bytearray(), 0

    def _read(self, number: int, size: int, offset: int, end: float) -> bytes:
        if number != self._number or offset < self._start:
            self.close()
            self._stream, self._number = open_stream(self._locations[number]), number
        while self._start + len(self._kept) < offset + size:
            if time.monotonic() > end:
                raise TimeoutError
            more = self._stream.read(_STREAM_BYTES)
            if not more:
                break
            self._kept += more
            surplus = min(len(self._kept) - _STREAM_KEPT, offset - self._start)
            if surplus > 0:
                del self._kept[:surplus]
                self._start += surplus
        return bytes(self._kept[offset - self._start :][:size])


def _read_stamp(folder: Path) -> dict[str, Any]:
    """What is known of the card and the indices here, or nothing."""
    try:
        return json.loads((folder / _STAMP).read_text())
    except (OSError, ValueError):
        return {}


def _known(folder: Path) -> dict[str, Any] | None:
    """The card, if it and its indices were checked just now and are still the same; the stamp is read first."""
    stamp = _read_stamp(folder)
    if not 0 <= time.time() - stamp.get("asked", 0) < CARD_SECONDS or not (folder / CARD_NAME).is_file():
        return None
    card = read_card(folder)
    return card if stamp["state"] == _state(folder, card) else None


def _fetch_indices(url: str, folder: Path) -> dict[str, Any]:
    """The card, asked for anew, once the indices are here and right."""
    fetch(f"{url}/{CARD_NAME}", folder / CARD_NAME, LARGEST_CARD)
    asked, stamp, card = time.time(), _read_stamp(folder), read_card(folder)
    if stamp.get("state") != _state(folder, card):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda shard: _fetch_index(url, folder, shard), card["shards"]))
        stamp = {"state": _state(folder, card)}
    replace_text(folder / _STAMP, json.dumps(stamp | {"asked": asked}))
    return card


def _state(folder: Path, card: dict[str, Any]) -> str:
    """A hash of the card's content and of the sizes and times of its indices."""
    digest = hashlib.sha256(sha256(folder / CARD_NAME).encode())
    for shard in card["shards"]:
        try:
            about = (folder / shard["index"]).stat()
            digest.update(f"{about.st_size} {about.st_mtime_ns}\n".encode())
        except FileNotFoundError:
            digest.update(b"missing\n")
    return digest.hexdigest()


def _fetch_index(url: str, folder: Path, shard: dict[str, Any]) -> None:
    path = folder / shard["index"]
    if not (path.is_file() and sha256(path) == shard["index_sha256"]):
        fetch(f"{url}/{shard['index']}", path, shard["index_bytes"], shard["index_sha256"])


def _gives_ranges(url: str, folder: Path, card: dict[str, Any]) -> bool:
    """Whether the server sends a range of a file: asked once, with an index that is here."""
    name = card["shards"][0]["index"]
    expected = (folder / name).read_bytes()[8:24]
    for end in tries():
        (answer,) = fetch_ranges([(f"{url}/{name}", 8, 24)], end)
        if answer == expected or isinstance(answer, WholeFileError):
            return answer == expected
    return False
