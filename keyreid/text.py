"""Names of files, people and cameras in what is read on a terminal or a picture: they are shown, never obeyed."""

import re

# Control characters and line ends, what turns the direction of writing round, and halves of characters.
_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """The text in one line, with escapes such as `\\x1b` for what a terminal would obey or nobody can encode."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
