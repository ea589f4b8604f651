"""What the readers share: folders and pictures in a fixed order, names and numbers, keys."""

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from itertools import count
from pathlib import Path

from keyreid.datasets.suffixes import is_picture
from keyreid.errors import DataError

RESERVED = {"distractor": 0, "junk": -1}  # identity names with the meaning they have in MARS
KEY_LENGTH = 80  # of a tracklet's key, at most: what shards take
NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,3})?", re.IGNORECASE)

log = logging.getLogger(__name__)


def folders(parent: Path) -> list[Path]:
    """Sub-folders in natural order of their names, never in the file system's; DataError where `parent` is none."""
    return [path for path in _visible(parent) if path.is_dir()]


def pictures(parent: Path) -> list[Path]:
    """Picture files in natural order (`2.jpg` before `10.jpg`); DataError where `parent` is not a folder."""
    return [path for path in _visible(parent) if is_picture(path)]


def _visible(parent: Path) -> list[Path]:
    if not parent.is_dir():
        raise DataError(f"{parent}: no such folder")
    found = (path for path in parent.iterdir() if not path.name.startswith("."))
    return sorted(found, key=lambda path: natural(path.name))


def inside(folder: Path, name: str, said_by: Path) -> Path:
    """What a file of a dataset names below a folder; DataError where it leads out, which only a user may say."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise DataError(f"{said_by}: {name!r} leads out of {folder}; paths in a dataset stay below its folder")
    return folder / name


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorting key: runs of decimal digits count as numbers, ties go by the name itself."""
    plain = name if name.isascii() else "".join(str(unicodedata.decimal(letter, letter)) for letter in name)
    runs = re.findall(r"[0-9]+|[^0-9]+", plain)
    pieces = [(len(run.lstrip("0")), run.lstrip("0")) if "0" <= run[0] <= "9" else (-1, run) for run in runs]
    return (*pieces, (-2, name))


def whole_number(text: str) -> int | None:
    """The whole number that a text says, as any program writes it (`7`, `007`, `7.0`, `7.00e+00`); else None."""
    if len(text) > 40 or not NUMBER.fullmatch(text):
        return None
    value = Decimal(text)
    return int(value) if abs(value) < 2**63 and value % 1 == 0 else None


def plain_name(name: str) -> str:
    """A name as it is compared: text, so `007`, `NA` and `1²` are what they are, but a program's `7.0` is `7`.

    Space around it and Unicode's several forms of one letter (NFC) do not count.
    """
    text = unicodedata.normalize("NFC", name).strip()
    number = whole_number(text) if "." in text else None
    return text if number is None else str(number)


def plain_names(names: Iterable[str], where: object) -> dict[str, str]:
    """Each spelling of a name and the name; a line where one name has several."""
    plain = {name: plain_name(name) for name in sorted(set(names))}
    for name, times in Counter(plain.values()).most_common(1):
        if times > 1:
            log.warning("%s: %s are one name", where, ", ".join(repr(each) for each in plain if plain[each] == name))
    return plain


def safe_key(*names: str) -> str:
    """A tracklet key of names that may hold anything: other characters become `-`."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", "_".join(names)).lstrip("_-") or "tracklet"


def keys_of(names: Collection[tuple[str, ...]], length: int = KEY_LENGTH) -> list[str]:
    """A tracklet key for each of these names, that joins its parts.

    Where several would be one, also to file systems that know no case, and where one is too long, keys end in a hash of
    the names themselves: nobody takes the key that another has had.
    """
    wished = [safe_key(*parts) for parts in names]
    times = Counter(key.lower() for key in wished)
    hashes = (hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:12] for parts in names)
    return [
        key if times[key.lower()] == 1 and len(key) <= length else f"{key[: length - 13]}-{own}"
        for key, own in zip(wished, hashes, strict=True)
    ]


def numbered(names: Iterable[str], kept: Mapping[str, int]) -> dict[str, int]:
    """Names in natural order, numbered from 1; `kept` ones have their numbers, new ones follow."""
    new = count(max([0, *kept.values()]) + 1)
    return {name: kept[name] if name in kept else next(new) for name in sorted(set(names), key=natural)}
