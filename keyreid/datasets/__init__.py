"""Datasets by name: every command that takes a dataset's name looks it up here.

A reader is a function `open_NAME(root: Path, ...) -> Dataset` in a module of this package; its other parameters are the
options that users may set, of the types that they are annotated with. To add one, write it and name it in READERS.
"""

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keyreid.datasets.suffixes import naming_strangers
from keyreid.errors import ConfigError, DataError

if TYPE_CHECKING:
    from keyreid.datasets.tracklet import Dataset

# Name of the dataset: the module with its `open_NAME`, which is imported when it is asked for.
READERS = {
    "mars": "mars",
    "ilids_vid": "two_cameras",
    "prid2011": "two_cameras",
    "folder": "folder",
    "mot": "mot",
}


@naming_strangers()
def open_dataset(name: str, root: Path | str, **options: Any) -> "Dataset":
    """Open a dataset by name; docs/datasets.md says how each must lie on disk and which options it takes.

    Raises:
        ConfigError: there is no such dataset, or it has no such option, or an option's value is not of its type.
        DataError: files are missing or wrong.
    """
    import pydantic

    if name not in READERS:
        raise ConfigError(f"no dataset is called {name!r}; there are {', '.join(READERS)} (walkers are read as mars)")
    reader = getattr(importlib.import_module(f"keyreid.datasets.{READERS[name]}"), f"open_{name}")
    known = [option for option in inspect.signature(reader).parameters if option != "root"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"dataset {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    root = Path(root).expanduser()
    try:
        if not root.exists():
            raise DataError(f"{root}: no such dataset folder")
        return pydantic.validate_call(reader, config={"allow_inf_nan": False})(root, **options)
    except OSError as error:  # no permission, names too long, links in a circle
        raise DataError(f"{error.filename or root}: cannot be read: {error.strerror or error}") from None
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(f"dataset {name}, option {wrong['loc'][0]}={wrong['input']!r}: {wrong['msg']}") from None


def parse_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a reader as the command line gives them, NAME=VALUE with a YAML value.

    Raises:
        ConfigError: a text is not of that form.
    """
    from keyreid import plain_yaml
    from keyreid.config import settled

    options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: write NAME=VALUE")
        options[name] = settled(plain_yaml.parse(value, f"--option {text}: the value"), Any)
    return options
