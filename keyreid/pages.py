"""One HTML page for every report: a title, then sections of text, tables and pictures; a file that needs no server."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from keyreid.files import writing
from keyreid.plain_text import visible


@dataclass(frozen=True)
class Section:
    """A part of a page; whatever is empty is left out. All text is escaped."""

    title: str = ""  # its heading
    text: Sequence[str] = ()  # paragraphs, a string each
    preformatted: str = ""  # text whose columns are aligned
    table: Sequence[Sequence[object]] = ()  # rows of cells; the first row is the head
    highlight: int = 0  # the row of the table that stands out; 0 for none
    pictures: Sequence[tuple[str, str]] = ()  # a file beside the page or a PNG as a data URL, and its caption
    items: Sequence[str] = ()  # a list


def _shown(value: object) -> object:
    return visible(value, lines=True) if isinstance(value, str) else value


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page; KeyreidError where the file cannot be written."""
    template = resources.files("keyreid").joinpath("assets/page.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown).from_string(template)
    with writing(path):
        path.write_text(page.render(title=title, sections=sections), encoding="utf-8")
