"""Ranked lists: a query on the left, its nearest tracklets beside it, right ones framed green and wrong ones red."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from keyreid.visualization.canvas import INK, QUERY, RIGHT, SOFT_INK, UNKNOWN, WRONG, blank, fit_text, font, scaled
from keyreid.visualization.canvas import text_width as width_of

PICTURE = (96, 192)  # width and height in pixels
FRAME, GAP, MARGIN = 5, 12, 24
TITLE, HEADING, LABEL, CAPTION = 22, 17, 13, 12  # font sizes
CAPTION_LINE, LABEL_LINE = 16, 20


@dataclass(frozen=True)
class Tile:
    """A picture uint8 [H, W, 3] RGB, lines of text under it, and whether it is right (None: not known)."""

    picture: np.ndarray
    caption: Sequence[str]
    right: bool | None = None


@dataclass(frozen=True)
class RankedRow:
    """A query and its results, nearest first; `label` stands above them."""

    label: str
    query: Tile
    results: Sequence[Tile]


def draw_ranked(groups: Sequence[tuple[str, Sequence[RankedRow]]], title: str, subtitle: str = "") -> Image.Image:
    """Draw rows in groups (best, worst, ...), each under its heading; no text is cut."""
    rows = [row for _, group in groups for row in group]
    tiles = [tile for row in rows for tile in (row.query, *row.results)]
    captions = [line for tile in tiles for line in tile.caption]
    tile_width = max([PICTURE[0] + 2 * FRAME, *(width_of(line, CAPTION) for line in captions)])
    lines = max((len(tile.caption) for tile in tiles), default=0)
    row_height = LABEL_LINE + PICTURE[1] + 2 * FRAME + 4 + lines * CAPTION_LINE + GAP
    columns = max((len(row.results) for row in rows), default=0)
    width = max(
        [
            tile_width + 2 * GAP + columns * (tile_width + GAP),
            width_of(title, TITLE, bold=True),
            width_of(subtitle, LABEL),
            *(width_of(row.label, LABEL) for row in rows),
        ]
    )
    head = MARGIN + 34 + (24 if subtitle else 0) + 8
    height = head + sum(34 + len(group) * row_height for _, group in groups if group) + MARGIN
    image, draw = blank(width + 2 * MARGIN, height)

    draw.text((MARGIN, MARGIN), title, INK, font(TITLE, bold=True))
    draw.text((MARGIN, MARGIN + 34), subtitle, SOFT_INK, font(LABEL))
    top = head
    for heading, group in groups:
        if not group:
            continue
        draw.text((MARGIN, top + 4), heading, INK, font(HEADING, bold=True))
        top += 34
        for row in group:
            draw.text((MARGIN, top), row.label, SOFT_INK, font(LABEL))
            _draw_tile(image, draw, row.query, MARGIN, top + LABEL_LINE, tile_width, QUERY)
            for place, tile in enumerate(row.results):
                left = MARGIN + tile_width + 2 * GAP + place * (tile_width + GAP)
                colour = UNKNOWN if tile.right is None else RIGHT if tile.right else WRONG
                _draw_tile(image, draw, tile, left, top + LABEL_LINE, tile_width, colour)
            top += row_height
    return image


def _draw_tile(
    image: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int, width: int, colour: tuple
) -> None:
    x = left + (width - PICTURE[0] - 2 * FRAME) // 2
    draw.rectangle((x, top, x + PICTURE[0] + 2 * FRAME - 1, top + PICTURE[1] + 2 * FRAME - 1), fill=colour)
    image.paste(scaled(tile.picture, *PICTURE), (x + FRAME, top + FRAME))
    for number, line in enumerate(tile.caption):
        y = top + PICTURE[1] + 2 * FRAME + 4 + number * CAPTION_LINE
        text = fit_text(line, width, CAPTION)
        draw.text((left + (width - width_of(text, CAPTION)) // 2, y), text, INK, font(CAPTION))
