"""Bytes from object storage or a web server: whole files and ranges, tried again where that may help, never for ever.

A try ends when no byte came for a minute. All tries of one file together end after four, or when five minutes have
passed and a second for every 100 kB of it, so that a server that trickles is given up as well as one that is silent.
"""

import importlib.util
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fsspec import AbstractFileSystem
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from keyreid.errors import DataError, install_hint
from keyreid.files import sha256
from keyreid.shards.storage import UnreachableError

TRIES = 4
FIRST_WAIT_SECONDS = 0.5  # doubled for each further try; half of it is drawn, so that ranks do not come back together
IDLE_SECONDS = 60.0  # without a byte, after which a try has failed
PATIENCE_SECONDS = 300.0  # for all tries of a file, and
SLOWEST = 100_000  # bytes a second more
_FINAL_STATUS = (401, 403, 410)  # what the same request will be answered again

log = logging.getLogger(__name__)


class WholeFileError(Exception):
    """A server knows no ranges."""


def client_options(url: str) -> dict[str, Any]:
    """What fsspec's client for this URL is told: by default one ends every transfer after 300 s, another never.

    Those of other protocols than these have limits of their own (S3: 60 s without a byte).
    """
    protocol = url.partition("://")[0]
    if protocol not in ("http", "https", "gs", "gcs") or importlib.util.find_spec("aiohttp") is None:
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=IDLE_SECONDS, sock_read=IDLE_SECONDS)
    if not protocol.startswith("http"):
        return {"requests_timeout": timeout}
    return {"client_kwargs": {"timeout": timeout, "middlewares": (_no_more_than_asked,)}}


def tries(size: int = 0) -> Iterator[float]:
    """The tries of a file of `size` bytes: waits before each but the first; gives the time.monotonic() of its end."""
    end = time.monotonic() + PATIENCE_SECONDS + size / SLOWEST
    for attempt in range(TRIES):
        if attempt:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        if time.monotonic() < end:
            yield end


def reason(url: str, error: Exception, end: float) -> str:
    """Why a try failed that had time until `end`; DataError where another would fail in the same way."""
    if isinstance(error, DataError):
        raise error
    if hasattr(error.__cause__, "status"):  # fsspec calls all failures FileNotFoundError, when it asks for a size
        error = error.__cause__
    if isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in _FINAL_STATUS:
        raise DataError(f"{url}: {type(error).__name__}: {error!s:.300}") from None
    if isinstance(error, TimeoutError):  # has no words of its own
        return "it comes too slowly" if time.monotonic() > end else f"no byte came for {IDLE_SECONDS:g} s"
    return f"{type(error).__name__}: {error!s:.300}"  # aiohttp puts what it could not parse into the message


def given_up(url: str, why: str) -> DataError:
    """The error after the last try."""
    return UnreachableError(f"{url}: {why}; given up after {TRIES} tries or {PATIENCE_SECONDS:g} s")


def fetch(url: str, path: Path, size: int, digest: str | None = None) -> None:
    """Fetch a file whole: it has its name only when its hash is right. The caller has its lock.

    Args:
        size: bytes that it has, or at most where `digest` is None.

    Raises:
        DataError: it cannot be fetched, or is not what was promised.
    """
    system, why, partial = _system(url), "", partial_of(path, size)
    try:
        for end in tries(size if digest else 0):
            if why:
                log.warning("%s: %s; trying again", url, why)
            try:
                system.get_file(url, str(partial), callback=_Bound(url, size, end), **_limit(system, end))
                if digest is None or sha256(partial) == digest:
                    partial.replace(path)
                    return
                why = f"its SHA-256 is not that of the card ({partial.stat().st_size} of {size} bytes came)"
            except Exception as error:  # every protocol has its own, and networks fail in many ways
                why = reason(url, error, end)
        raise given_up(url, why)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path, size: int) -> Path:
    """Where a file of so many bytes is written until it is whole."""
    return path.with_name(f".{path.name}.{size}.partial")


def fetch_ranges(wanted: Sequence[tuple[str, int, int]], end: float) -> list[bytes | Exception]:
    """The bytes of each (url, start, stop), all asked for at once; what failed, or came in another length, is an error.

    Args:
        end: the time.monotonic() at which all have failed.
    """
    if not wanted:
        return []
    system, (urls, starts, stops) = _system(wanted[0][0]), map(list, zip(*wanted, strict=True))
    try:
        answers = system.cat_ranges(urls, starts, stops, on_error="return", **_limit(system, end))
    except Exception as error:  # the time is up
        answers = [error] * len(wanted)
    for number, (answer, start, stop) in enumerate(zip(answers, starts, stops, strict=True)):
        if not isinstance(answer, Exception) and len(answer) != stop - start:
            answers[number] = OSError(f"{len(answer)} of {stop - start} bytes came")
    return answers


def open_stream(url: str) -> BinaryIO:
    """A file, to be read from front to back."""
    return _system(url).open(url, "rb")


class _Bound(Callback):
    """Ends a transfer that brings more than was promised, or takes longer than it may."""

    def __init__(self, url: str, most: int, end: float) -> None:
        super().__init__()
        self.url, self.most, self.end = url, most, end

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.most:
            raise DataError(f"{self.url}: is larger than the {self.most} bytes that the card says")
        if time.monotonic() > self.end:  # for clients that know no limit
            raise TimeoutError


async def _no_more_than_asked(request: Any, handler: Any) -> Any:
    """Refuse the whole file where a range was asked for: some servers send it, and it may be 256 MB each time."""
    response = await handler(request)
    if "Range" in request.headers and response.status == 200:
        response.close()
        raise WholeFileError("the server sends the whole file where a range was asked for")
    return response


def _limit(system: AbstractFileSystem, end: float) -> dict[str, float]:
    """What ends a call of it at `end`, where it knows how."""
    return {"timeout": max(0.001, end - time.monotonic())} if system.async_impl else {}


def _system(url: str) -> AbstractFileSystem:
    """The file system of a URL; fsspec keeps one for each process and protocol."""
    try:
        return url_to_fs(url, **client_options(url))[0]
    except ImportError as error:
        raise DataError(f"{url}: {error}; {install_hint('remote')}") from None
    except ValueError as error:
        raise DataError(f"{url}: {error}") from None
