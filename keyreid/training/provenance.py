"""Who started a run, with which command, from which code: a line in its folder for each start."""

import contextlib
import getpass
import json
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from keyreid.files import replace_text
from keyreid.version import commit, version

PROVENANCE = "provenance.json"


def record_start(run_dir: Path, command: Sequence[str], ranks: int) -> dict[str, str]:
    """Add this start to `RUN/provenance.json`, a list with the newest last; gives what was added."""
    program = "keyreid" if Path(command[0]).name == "cli.py" else command[0]
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([program, *command[1:]]),
        "directory": str(Path.cwd()),
        "user": _user(),
        "host": platform.node(),
        "ranks": str(ranks),
        "version": version(),
        "commit": commit() or "",
    }
    path = run_dir / PROVENANCE
    earlier: list[dict[str, str]] = []
    with contextlib.suppress(OSError, ValueError):  # none yet, or cut off by hand: no reason not to train
        earlier = json.loads(path.read_text())
    replace_text(path, json.dumps([*earlier, start], indent=1))
    return start


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        return ""
