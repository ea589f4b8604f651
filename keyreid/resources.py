"""Where the files are that travel with keyreid: configurations, batch files and launch scripts.

In a clone they lie in configs/, slurm/ and launch/; an installed package holds folders of the same names (setup.py).
"""

import os
import re
from pathlib import Path

from keyreid.errors import KeyreidError
from keyreid.version import CLONE


def home() -> Path:
    """The folder that holds configs/, slurm/ and launch/: what KEYREID_HOME names, else the clone, else the package."""
    if named := os.environ.get("KEYREID_HOME"):
        return Path(named).absolute()
    return CLONE if (CLONE / "pyproject.toml").is_file() else Path(__file__).parent


def shipped(name: str) -> Path:
    """The file that travels with keyreid as `name`, for example slurm/train.sbatch; KeyreidError where none does."""
    path = home() / name
    if not path.is_file():
        raise KeyreidError(f"{path} is missing: set KEYREID_HOME to a clone of keyreid, or leave it unset")
    return path


def own_or_shipped(path: str | Path, folder: Path = Path()) -> Path:
    """A configuration file: the user's own `folder/path`; without one, what travels with keyreid as configs/..."""
    own = folder / path
    inside = Path(os.path.normpath(path))  # of configs/tune/../mars.yaml too
    if inside.parts[:1] == ("configs",) and not own.exists() and (home() / inside).is_file():
        return home() / inside
    return own


def configurations() -> dict[str, str]:
    """Those that travel with keyreid: the name to give to a command -> the file's first words, its purpose."""
    files = sorted((home() / "configs").rglob("*.yaml"))
    return {str(file.relative_to(home())): re.split("[;.]\\s", file.read_text())[0].strip("# ") for file in files}
