"""What all pictures share: fonts, colours, and text that never leaves its place."""

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from keyreid.files import writing

RIGHT, WRONG, UNKNOWN, QUERY = (22, 163, 74), (220, 38, 38), (148, 163, 184), (37, 99, 235)
INK, SOFT_INK, PAPER = (17, 24, 39), (100, 116, 139), (255, 255, 255)
MARGIN, TITLE, LABEL = 24, 22, 13  # pixels, and font sizes


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def text_width(text: str, size: int, bold: bool = False) -> int:
    """Pixels that a line of text takes."""
    return int(np.ceil(font(size, bold).getlength(text)))


def fit_text(text: str, width: int, size: int, bold: bool = False) -> str:
    """The text, with its middle left out where it is wider than `width` pixels."""
    if text_width(text, size, bold) <= width:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if text_width(shorter, size, bold) <= width:
            return shorter
    return ""


def titled(width: int, height: int, title: str, subtitle: str) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A white picture with a title and room below: the picture, what draws on it, and the y where the room starts."""
    top = MARGIN + 34 + (24 if subtitle else 0) + 8
    width = max(width, text_width(title, TITLE, bold=True), text_width(subtitle, LABEL))
    image = Image.new("RGB", (width + 2 * MARGIN, top + height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((MARGIN, MARGIN), title, INK, font(TITLE, bold=True))
    draw.text((MARGIN, MARGIN + 34), subtitle, SOFT_INK, font(LABEL))
    return image, draw, top


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a PNG, whatever its name; KeyreidError where it cannot be written."""
    with writing(path):
        image.save(path, "png")


def scaled(picture: np.ndarray, width: int, height: int) -> Image.Image:
    """A uint8 RGB picture [H, W, 3] at another size; its proportions are kept, the rest is grey."""
    return ImageOps.pad(Image.fromarray(picture), (width, height), Image.Resampling.BICUBIC, (226, 232, 240))
