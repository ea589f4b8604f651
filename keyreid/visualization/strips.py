"""Strips of frames: tracklets under each other, for each one rows of pictures over time, a label before each row."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

from keyreid.visualization.canvas import INK, LABEL, MARGIN, SOFT_INK, font, scaled, text_width, titled, write

PICTURE = (72, 144)  # width and height in pixels
GAP, HEADING_LINE, COLUMN_LINE = 4, 32, 20
HEADING = 15  # font size


@dataclass(frozen=True)
class Strip:
    """A tracklet: names of the columns (frames), and rows of (label, one uint8 RGB picture [H, W, 3] a column)."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[np.ndarray]]]


def draw_strips(strips: Sequence[Strip], title: str, subtitle: str) -> Image.Image:
    """Draw strips side by side in two columns, or in one where there is one; no text is cut."""
    label_width = max(text_width(label, LABEL) for strip in strips for label, _ in strip.rows) + 10
    widths = [
        max(label_width + len(strip.columns) * (PICTURE[0] + GAP), text_width(strip.heading, HEADING, bold=True))
        for strip in strips
    ]
    heights = [HEADING_LINE + COLUMN_LINE + len(strip.rows) * (PICTURE[1] + GAP) + MARGIN for strip in strips]
    side_by_side, column_width = min(2, len(strips)), max(widths)
    pairs = [heights[n : n + side_by_side] for n in range(0, len(strips), side_by_side)]
    width = side_by_side * column_width + (side_by_side - 1) * 2 * MARGIN
    image, draw, head = titled(width, sum(max(pair) for pair in pairs), title, subtitle)
    for number, strip in enumerate(strips):
        line, place = divmod(number, side_by_side)
        left = MARGIN + place * (column_width + 2 * MARGIN)
        top = head + sum(max(pair) for pair in pairs[:line])
        write(draw, (left, top), strip.heading, INK, font(HEADING, bold=True))
        for column, name in enumerate(strip.columns):
            middle = left + label_width + column * (PICTURE[0] + GAP) + PICTURE[0] // 2
            write(draw, (middle, top + HEADING_LINE), name, SOFT_INK, font(LABEL - 1), anchor="ma")
        for row, (label, pictures) in enumerate(strip.rows):
            y = top + HEADING_LINE + COLUMN_LINE + row * (PICTURE[1] + GAP)
            write(draw, (left, y + PICTURE[1] // 2), label, INK, font(LABEL), anchor="lm")
            for column, picture in enumerate(pictures):
                image.paste(scaled(picture, *PICTURE), (left + label_width + column * (PICTURE[0] + GAP), y))
    return image


def overlay(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Lay weights in [0, 1], of any size, over a picture uint8 [H, W, 3]: the higher, the more of their colour."""
    height, width = picture.shape[:2]
    grown = Image.fromarray(weights.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    opacity = np.clip(np.asarray(grown), 0, 1)[..., None]
    colours = (matplotlib.colormaps["turbo"](opacity[..., 0])[..., :3] * 255).astype(np.uint8)  # blue, yellow, red
    faded = 0.6 * picture + 0.4 * 255 * 0.5  # so that colours of the clothes do not pass for weights
    return (faded * (1 - 0.85 * opacity) + colours * 0.85 * opacity).astype(np.uint8)
