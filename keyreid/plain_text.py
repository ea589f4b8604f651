"""Text from data, shown: whatever would steer a terminal or turn the direction of a line is written as an escape."""

import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

_STEERS = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: object, lines: bool = False) -> str:
    r"""The text with `\x1b`, `\r`, `\u202e` and their like spelt out; `lines` keeps line ends and tabs as they are."""
    kept = "\n\t" if lines else ""
    return _STEERS.sub(lambda m: m[0] if m[0] in kept else m[0].encode("unicode_escape").decode(), str(text))


def say(text: object, err: bool = False) -> None:
    """Print lines that may hold names from data."""
    print(visible(text, lines=True), file=sys.stderr if err else sys.stdout, flush=err)


def cell(value: object) -> "Text":
    """A cell or title of rich's tables, which takes brackets in plain strings for markup."""
    from rich.text import Text

    return Text(visible(value))
