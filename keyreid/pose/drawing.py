"""Pictures of poses: a skeleton and part heatmaps over a crop, and sheets of many crops."""

from collections.abc import Sequence

import cv2
import numpy as np

from keyreid.pose.heatmaps import MIN_CONFIDENCE, render_heatmaps
from keyreid.pose.parts import SKELETON, joint_parts

# Okabe and Ito's colours, which people with colour-vision deficiency tell apart; RGB, in the order of the six parts.
PART_COLOURS = np.array(
    [(240, 228, 66), (0, 158, 115), (86, 180, 233), (213, 94, 0), (0, 114, 178), (204, 121, 167)], np.float32
)


def draw_skeleton(picture: np.ndarray, keypoints: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Draw bones and joints on a copy, enlarged by `scale`, of a picture (uint8 [H, W, 3], RGB).

    Keypoints are [17, 3] in pixels of the picture; joints at confidence <= 0.1 are left out, as heatmaps leave them.
    """
    canvas = _enlarge(picture, scale)
    shown = keypoints[:, 2] > MIN_CONFIDENCE
    places = ((keypoints[:, :2] + 0.5) * scale * 16).round().astype(int)  # 4 bits of sub-pixels
    colours = PART_COLOURS[joint_parts(6)].tolist()
    for one, other in SKELETON:
        if shown[one] and shown[other]:
            cv2.line(canvas, places[one].tolist(), places[other].tolist(), (255, 255, 255), 1, cv2.LINE_AA, 4)
    for joint in np.flatnonzero(shown):
        for colour, thickness in ((colours[joint], -1), ((0, 0, 0), 1)):
            cv2.circle(canvas, places[joint].tolist(), 3 * 16, colour, thickness, cv2.LINE_AA, 4)
    return canvas


def draw_heatmaps(picture: np.ndarray, keypoints: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Lay the six part heatmaps, each in its colour, over a darkened grey copy of the picture (uint8 [H, W, 3])."""
    height, width = picture.shape[:2]
    heatmaps = render_heatmaps(keypoints[None], width, height)[0]
    grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) * np.float32(0.55)
    weight = heatmaps.sum(0)[..., None]
    colour = np.tensordot(heatmaps, PART_COLOURS, (0, 0)) / np.maximum(weight, 1e-6)
    strength = heatmaps.max(0)[..., None] * 0.85
    return _enlarge((grey * (1 - strength) + colour * strength).astype(np.uint8), scale)


def sheet(pictures: Sequence[np.ndarray], columns: int, cell: tuple[int, int], gap: int = 4) -> np.ndarray:
    """Lay pictures out in rows of `columns`, each centred in a cell of (height, width) on white."""
    rows = -(-len(pictures) // columns)
    canvas = np.full((rows * (cell[0] + gap) + gap, columns * (cell[1] + gap) + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (cell[0] + gap) + gap, (i % columns) * (cell[1] + gap) + gap
        top += (cell[0] - picture.shape[0]) // 2
        left += (cell[1] - picture.shape[1]) // 2
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _enlarge(picture: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1.0:
        return picture.copy()
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA)
