"""A folder that `keyreid import` wrote: a manifest with a row a picture, and a card with what the names stand for.

    OUT/manifest.parquet    path, split, camera, identity, tracklet, frame: a table as `folder` reads it
    OUT/imported.json       numbers of the names, frame rates, and where each source's pictures came from
    OUT/crops/...           pictures that were cut from videos or copied

A name keeps its number for ever, however many sources are added later.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from keyreid.errors import DataError
from keyreid.files import replace_text

MANIFEST, CARD = "manifest.parquet", "imported.json"
FORMAT = "keyreid-imported/1"


@dataclass(frozen=True)
class ImportCard:
    """What an imported folder says of itself."""

    names: dict[str, dict[str, int]] = field(default_factory=lambda: {"identity": {}, "camera": {}})  # name: number
    frames_per_second: dict[str, float] = field(default_factory=dict)  # of a camera, if all of its sources agree
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)  # where from, by which settings, how much was kept


def is_imported(root: Path) -> bool:
    """Whether a folder was written by `keyreid import`."""
    return (root / MANIFEST).is_file() and (root / CARD).is_file()


def read_import_card(root: Path) -> ImportCard:
    """The card of an imported folder; an empty one where there is none.

    Raises:
        DataError: it is damaged or of another version.
    """
    path = root / CARD
    try:
        values = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return ImportCard(**values)
    except FileNotFoundError:
        return ImportCard()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the card of an imported folder ({error}); import into another folder") from None


def write_import_card(root: Path, card: ImportCard) -> None:
    """Write the card; it is the old one or the new one whenever the process is stopped."""
    replace_text(root / CARD, json.dumps({"format": FORMAT, **asdict(card)}, indent=1, ensure_ascii=False) + "\n")
