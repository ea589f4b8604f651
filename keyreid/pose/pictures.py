"""Pictures on their way into a pose network, and the poses on their way back into the pictures' own pixels.

What is done to a picture is what OpenPifPaf's predictor does to one: resized so that the longer side has `long_edge`
pixels (bilinear), padded on all sides to a multiple of 16 plus 1. Unlike there, pictures that get the same size make
one batch, and none is padded to a square.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np

from keyreid.datasets import frames
from keyreid.errors import DataError

PADDING_COLOUR = (124, 116, 104)  # the mean that OpenPifPaf normalises by
Selection = Literal["score", "centre"]


class Pose(NamedTuple):
    """One person found in a picture."""

    keypoints: np.ndarray  # float32 [17, 3]: x, y in pixels of the picture, confidence (0: not found)
    score: float  # of the whole pose


@dataclass(frozen=True)
class Fitted:
    """A picture as a network takes it."""

    pixels: np.ndarray  # uint8 [H, W, 3], RGB; H and W are multiples of 16 plus 1
    scale: tuple[float, float]  # x and y pixels of `pixels` for one of the picture
    offset: tuple[int, int]  # x and y of the picture's first pixel in `pixels`
    size: tuple[int, int]  # width and height of the picture

    def to_picture(self, pose: Pose) -> Pose:
        """A pose found in `pixels`, in pixels of the picture; joints found outside it become zeros, that is missing."""
        width, height = self.size
        moved = pose.keypoints.copy()
        moved[:, :2] = (moved[:, :2] - self.offset) / self.scale
        pixel = np.trunc(moved[:, :2])  # as heatmaps place it: (-1, 0) still is pixel 0
        inside = ((pixel >= 0) & (pixel < (width, height))).all(1)
        moved[:, :2] = np.maximum(moved[:, :2], 0)
        moved[~(inside & (moved[:, 2] > 0))] = 0  # also where something is no number
        return Pose(moved, pose.score)


def decode(data: bytes) -> np.ndarray:
    """An encoded picture to uint8 [H, W, 3], RGB; DataError where it is none, or too small to hold a person."""
    try:
        pixels = frames.decode(data)
    except ValueError as error:
        raise DataError(str(error)) from None
    if min(pixels.shape[:2]) < 2:
        raise DataError(f"a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels")
    return pixels


def fit(picture: np.ndarray, long_edge: int | None) -> Fitted:
    """Resize a picture, uint8 [H, W, 3], to `long_edge` pixels on the longer side (None: as it is), and pad it."""
    height, width = picture.shape[:2]
    scale, resized = (1.0, 1.0), picture
    if long_edge is not None:
        ratio = long_edge / max(height, width)
        new_width = max(2, int(width * ratio)) if height > width else long_edge
        new_height = long_edge if height > width else max(2, int(height * ratio))
        resized = cv2.resize(picture, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
        scale = ((new_width - 1) / (width - 1), (new_height - 1) / (height - 1))
    pad_x, pad_y = (math.ceil((size - 1) / 16) * 16 + 1 - size for size in (resized.shape[1], resized.shape[0]))
    left, top = pad_x // 2, pad_y // 2
    pads = top, pad_y - top, left, pad_x - left
    pixels = cv2.copyMakeBorder(resized, *pads, cv2.BORDER_CONSTANT, value=PADDING_COLOUR)
    return Fitted(pixels, scale, (left, top), (width, height))


def choose(people: Sequence[Pose], size: tuple[int, int], selection: Selection) -> Pose | None:
    """Which of the people found in a crop of that width and height it was cut for; None where there is nobody.

    `score` selects the best score (the published rule); `centre` the middle of whose joints' box is nearest the crop's.
    """

    def distance(person: Pose) -> float:
        joints = person[0][person[0][:, 2] > 0, :2]
        return math.dist((joints.min(0) + joints.max(0)) / 2, ((size[0] - 1) / 2, (size[1] - 1) / 2))

    people = [person for person in people if (person[0][:, 2] > 0).any()]
    if selection == "score":
        return max(people, key=lambda person: person[1], default=None)
    return min(people, key=distance, default=None)
