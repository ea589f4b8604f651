"""Readers of datasets: each turns pictures on disk into tracklets."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pydantic

from keyreid.datasets.tracklet import Dataset
from keyreid.errors import ConfigError, DataError

NAMES = ("mars", "ilids_vid", "prid2011", "folder", "mot")  # each is a module here with a function open_NAME


def open_dataset(name: str, root: Path | str, **options: Any) -> Dataset:
    """Open a dataset by name; docs/datasets.md says how each must lie on disk and which options it takes.

    Rendered walkers have the layout of MARS: open them as `mars`.

    Raises:
        ConfigError: there is no such dataset, or it has no such option, or an option's value is not of its type.
        DataError: files are missing or wrong.
    """
    if name not in NAMES:
        raise ConfigError(f"no dataset is called {name!r}; there are {', '.join(NAMES)} (walkers are read as mars)")
    reader = getattr(importlib.import_module(f"keyreid.datasets.{name}"), f"open_{name}")
    known = [option for option in inspect.signature(reader).parameters if option != "root"]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"dataset {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"{root}: no such dataset folder")
    try:
        return pydantic.validate_call(reader)(root, **options)
    except pydantic.ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(f"dataset {name}, option {wrong['loc'][0]}={wrong['input']!r}: {wrong['msg']}") from None
