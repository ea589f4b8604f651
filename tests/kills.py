"""A fault injector: the process kills itself at its n-th file operation below a folder."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

NAMES = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link"}


def die() -> None:
    """As a machine does: no cleaning up, nothing is flushed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Counts opening for writing, fsync, mkdir, rename, unlink, rmdir below `folder`; SIGKILL before the `at`-th.

    Args:
        torn: a file that would be opened for writing, or written by safetensors, is there with half its bytes.
    """

    def __init__(self, folder: Path, at: int | None = None, torn: bool = False) -> None:
        self.folder, self.at, self.torn, self.count = str(folder), at, torn, itertools.count(1)
        self.done = 0
        self._save = safetensors.torch.serialize_file
        os.fsync = self._sync
        safetensors.torch.serialize_file = self._serialize
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event not in NAMES or not isinstance(arguments[0], (str, os.PathLike)):
            return
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event != "open" or writes:
            self._operation(os.fspath(arguments[0]), b"torn" if writes and arguments[2] & os.O_TRUNC else None)

    def _serialize(self, tensors: object, path: str, **rest: object) -> None:
        whole = safetensors.serialize(tensors, **rest)
        self._operation(os.fspath(path), whole[: len(whole) // 2])
        self._save(tensors, path, **rest)

    def _sync(self, descriptor: int) -> None:
        self._operation(str(Path(f"/proc/self/fd/{descriptor}").readlink()))  # counted, not waited for

    def _operation(self, path: str, left: bytes | None = None) -> None:
        if not path.startswith(self.folder):
            return
        self.done = next(self.count)
        if self.done != self.at:
            return
        if self.torn and left is not None:
            self.at = None
            Path(path).write_bytes(left)
        die()


def in_child(work: Callable[..., object], *arguments: object) -> int:
    """Do it in a fork; the status: what it gave, or -9."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        status = int(work(*arguments) or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)
