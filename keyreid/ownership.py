"""One owner for a folder: whoever reads, changes and writes it has it alone, on whatever machine the others run."""

import contextlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from keyreid.errors import KeyreidError
from keyreid.files import replace_text, writing

LOCK, OWNER = ".keyreid.lock", ".keyreid.owner"
LEASE_SECONDS = 60.0  # without a sign of life from an owner on another machine, after which it is taken for dead
PATIENCE_SECONDS = 5.0  # with an owner on this machine that lives: it may be about to end


@contextlib.contextmanager
def owned(folder: Path, verb: str, file: str = "", wait: bool = False) -> Iterator[None]:
    """Have `folder` (of it only `file`, if that is named) alone while the body runs; it is made where it is missing.

    A dead owner's claim is taken over: at once on its own machine, elsewhere when its lease has run out, by this
    machine's clock alone. An owner that lost its claim (a file system that stood still) gets SIGTERM.

    Args:
        verb: what the owner does, as a refused one reads it: `keyreid train`.
        wait: for a live owner's end, however long, instead of refusing.

    Raises:
        KeyreidError: a live process has it; names the process, host and Slurm job. Or the folder cannot be written.
    """
    new = not folder.exists()
    lock, said = (folder / (f".{file}{name}" if file else name) for name in (LOCK, OWNER))
    lease = SoftFileLease(
        lock, lease_duration=LEASE_SECONDS, on_compromise=_lost, thread_local=False, poll_interval=0.2
    )
    with writing(folder / file):
        while not lease.is_locked:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # its owner has left nothing in it and taken it away
                _acquire(lease, folder / file, said, wait)
    try:
        about = {"verb": verb, "pid": os.getpid(), "host": platform.node(), "job": os.environ.get("SLURM_JOB_ID")}
        replace_text(said, json.dumps(about | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}))
        yield
    finally:
        said.unlink(missing_ok=True)
        lease.release()
        if new:
            with contextlib.suppress(OSError):  # something was written, as it should be
                folder.rmdir()


def _acquire(lease: SoftFileLease, claimed: Path, said: Path, wait: bool) -> None:
    """Take the lease; from an owner on another machine only after waiting for a sign of life."""
    try:
        lease.acquire(timeout=PATIENCE_SECONDS)
    except Timeout:
        owner = _owner(said)
        if wait:
            print(f"{claimed}: {_text(owner)} has it: waiting for its end", file=sys.stderr, flush=True)
            lease.acquire(timeout=-1)
            return
        if owner.get("host") != platform.node():
            seconds = LEASE_SECONDS * 1.5
            print(
                f"{claimed}: {_text(owner)} has it, or died: waiting {seconds:.0f} s for a sign of life",
                file=sys.stderr,
            )
            with contextlib.suppress(Timeout):
                lease.acquire(timeout=seconds)
                return
        raise KeyreidError(
            f"{claimed}: {_text(_owner(said))} has it. Wait for its end, stop it, or name another folder"
        ) from None


def _owner(said: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(said.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _text(owner: dict[str, object]) -> str:
    job = f", Slurm job {owner['job']}" if owner.get("job") else ""
    return "{} (pid {} on {}{}, since {})".format(
        *(owner.get(key, "?") for key in ("verb", "pid", "host")), job, owner.get("since", "?")
    )


def _lost(compromise: object) -> None:
    print(f"keyreid: the claim on a folder was lost, stopping: {compromise}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
