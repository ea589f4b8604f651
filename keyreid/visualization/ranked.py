"""Ranked lists: a query on the left, its nearest tracklets beside it, right ones framed green and wrong ones red."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from keyreid.visualization import canvas
from keyreid.visualization.canvas import text_width as width_of

PICTURE = (96, 192)  # width and height in pixels
FRAME, GAP = 5, 12
HEADING, CAPTION = 17, 12  # font sizes
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
    tiles_width = tile_width + 2 * GAP + columns * (tile_width + GAP)
    width = max([tiles_width, *(width_of(row.label, canvas.LABEL) for row in rows)])
    groups = [(heading, group) for heading, group in groups if group]
    height = sum(34 + len(group) * row_height for _, group in groups) + canvas.MARGIN
    image, draw, top = canvas.titled(width, height, title, subtitle)
    for heading, group in groups:
        canvas.write(draw, (canvas.MARGIN, top + 4), heading, canvas.INK, canvas.font(HEADING, bold=True))
        top += 34
        for row in group:
            canvas.write(draw, (canvas.MARGIN, top), row.label, canvas.SOFT_INK, canvas.font(canvas.LABEL))
            _draw_tile(image, draw, row.query, canvas.MARGIN, top + LABEL_LINE, tile_width, canvas.QUERY)
            for place, tile in enumerate(row.results):
                left = canvas.MARGIN + tile_width + 2 * GAP + place * (tile_width + GAP)
                colour = canvas.UNKNOWN if tile.right is None else canvas.RIGHT if tile.right else canvas.WRONG
                _draw_tile(image, draw, tile, left, top + LABEL_LINE, tile_width, colour)
            top += row_height
    return image


def _draw_tile(
    image: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int, width: int, colour: tuple
) -> None:
    x = left + (width - PICTURE[0] - 2 * FRAME) // 2
    draw.rectangle((x, top, x + PICTURE[0] + 2 * FRAME - 1, top + PICTURE[1] + 2 * FRAME - 1), fill=colour)
    image.paste(canvas.scaled(tile.picture, *PICTURE), (x + FRAME, top + FRAME))
    for number, line in enumerate(tile.caption):
        y = top + PICTURE[1] + 2 * FRAME + 4 + number * CAPTION_LINE
        text = canvas.fit_text(line, width, CAPTION)
        canvas.write(draw, (left + (width - width_of(text, CAPTION)) // 2, y), text, canvas.INK, canvas.font(CAPTION))
