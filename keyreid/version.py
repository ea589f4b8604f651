"""Which keyreid this is: its version, and the commit where it runs from a clone."""

import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

CLONE = Path(__file__).resolve().parents[1]  # of the repository, where keyreid was installed from one in place


def version() -> str:
    """`0.1.0`, with the commit behind it where that is known."""
    own, hash_ = metadata.version("keyreid"), commit()
    return f"{own} ({hash_})" if hash_ else own


@cache
def commit() -> str | None:
    """The clone's commit, with `-dirty` where files differ from it; None where keyreid is installed without a clone."""
    if not (CLONE / ".git").exists():
        return None
    command = ["git", "-C", str(CLONE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or it does not trust the folder's owner
        return None
