"""Which files are pictures, by their names; what else lies between pictures is named, never left out in silence."""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif"}
_NEVER_PICTURES = {".txt", ".csv", ".ini", ".json", ".parquet", ".mat", ".db"}
_strangers: set[Path] = set()
log = logging.getLogger(__name__)


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name; one that is none is remembered."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    if path.suffix.lower() not in _NEVER_PICTURES and path.is_file():
        _strangers.add(path)
    return False


@contextlib.contextmanager
def naming_strangers() -> Iterator[None]:
    """Say in a line, after the body, how many files `is_picture` left out."""
    _strangers.clear()
    yield
    if _strangers:
        counts = Counter(path.suffix.lower() or "without a suffix" for path in _strangers)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
        known = ", ".join(sorted(PICTURE_SUFFIXES))
        log.warning("left out, as not named like a picture (%s): %s; for example %s", known, kinds, min(_strangers))
