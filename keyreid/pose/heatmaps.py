"""From keypoints to part heatmaps, as the published pipeline describes them.

A joint at (x, y) of a picture of width w becomes a Gaussian of peak 1 on a square kernel of 2r + 1 pixels, r =
int(w / 11), standard deviation a quarter of the kernel, centred on the pixel (int(x), int(y)) and cut at the
border. A part's heatmap is the maximum over its joints. A joint of confidence <= 0.1, or whose pixel lies outside
the picture, is left out; int() rounds towards zero, so x = -0.9 still is pixel 0.

What shards store is a **tile**: the frame's keypoints scaled to a picture of 256 x 128, its heatmap as above (r =
11), the mean over each 4 x 4 pixels, and floor(255 mean + 0.5) as uint8 [P, 64, 32]. It is the same whatever size
the frame has.

A maximum cannot be pooled joint by joint where joints are close, so every path draws pixels; but only a joint's 23
x 23 are touched, on one canvas that stays in the cache. Measured in benchmarks/pose.py.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyreid.errors import DataError
from keyreid.pose.parts import NUM_KEYPOINTS, joint_parts, part_joints

MIN_CONFIDENCE = 0.1
TOLERANCE = 1e-6  # how far a published heatmap may leave [0, 1]
PICTURE_HEIGHT, PICTURE_WIDTH = 256, 128  # what tiles are rendered at
TILE_HEIGHT, TILE_WIDTH = 64, 32
_CELL = PICTURE_HEIGHT // TILE_HEIGHT


def render_heatmaps(keypoints: NDArray, width: int, height: int, parts: int = 6) -> NDArray[np.float32]:
    """Part heatmaps float32 [N, P, H, W] in [0, 1], at the size of the pictures that keypoints [N, 17, 3] lie in."""
    heatmaps = np.empty((len(keypoints), len(part_joints(parts)), height, width), np.float32)
    for heatmap, canvas in zip(heatmaps, _canvases(keypoints, width, height, parts), strict=True):
        heatmap[:] = canvas
    return heatmaps


def render_tiles(keypoints: NDArray, width: ArrayLike, height: ArrayLike, parts: int = 6) -> NDArray[np.uint8]:
    """The tiles that shards store (defined above), uint8 [N, P, 64, 32]; 255 is 1.

    Args:
        keypoints: [N, 17, 3] in pixels of frames of `width` x `height`.
        width, height: one number, or one a frame [N].
    """
    scaled = scale_keypoints(keypoints, width, height, PICTURE_WIDTH, PICTURE_HEIGHT)
    tiles = np.empty((len(scaled), len(part_joints(parts)), TILE_HEIGHT, TILE_WIDTH), np.uint8)
    rows = np.empty((tiles.shape[1], TILE_HEIGHT, PICTURE_WIDTH), np.float32)
    cells = np.empty(tiles.shape[1:], np.float32)
    for tile, picture in zip(tiles, _canvases(scaled, PICTURE_WIDTH, PICTURE_HEIGHT, parts), strict=True):
        _sum_every(picture, axis=1, out=rows)
        _sum_every(rows, axis=2, out=cells)
        cells *= 255 / _CELL**2
        cells += 0.5
        tile[:] = cells
    return tiles


def visibility(keypoints: NDArray, width: ArrayLike, height: ArrayLike, parts: int = 6) -> NDArray[np.bool_]:
    """bool [N, P]: whether a part has a joint that is drawn; arguments as for `render_tiles`."""
    present = _centres(keypoints, width, height)[2]
    return np.stack([present[:, list(joints)].any(1) for joints in part_joints(parts)], axis=1)


def scale_keypoints(
    keypoints: NDArray, width: ArrayLike, height: ArrayLike, to_width: int, to_height: int
) -> NDArray[np.float32]:
    """Keypoints [N, 17, 3] of `width` x `height` frames, as they lie in frames resized to `to_width` x `to_height`."""
    keypoints = np.asarray(keypoints, np.float32)
    ratio = np.ones((len(keypoints), 1, 3), np.float32)
    ratio[:, 0, 0] = to_width / np.asarray(width, np.float64)
    ratio[:, 0, 1] = to_height / np.asarray(height, np.float64)
    return keypoints * ratio


def check_heatmaps(path: Path, heatmaps: NDArray) -> None:
    """Raise DataError, with the path, for part heatmaps that are not numbers [P, H, W] from 0 to 1."""
    if heatmaps.ndim != 3 or not heatmaps.size or heatmaps.dtype.kind not in "fiu":
        raise DataError(f"{path}: heatmaps {heatmaps.dtype} {heatmaps.shape}, expected numbers [parts, height, width]")
    low, high = float(heatmaps.min()), float(heatmaps.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # false of NaN
        raise DataError(f"{path}: heatmap values from {low:.3g} to {high:.3g}; they must lie in [0, 1]")


def _centres(keypoints: NDArray, width: ArrayLike, height: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """Columns, rows and presence, each [N, 17], of the pixels that joints are drawn at."""
    keypoints = np.asarray(keypoints)
    if keypoints.ndim != 3 or keypoints.shape[1:] != (NUM_KEYPOINTS, 3):
        raise ValueError(f"keypoints have the shape {keypoints.shape}, not [N, {NUM_KEYPOINTS}, 3]")
    width, height = (np.broadcast_to(np.asarray(size), len(keypoints))[:, None] for size in (width, height))
    x, y = np.trunc(keypoints[..., 0]), np.trunc(keypoints[..., 1])
    # Every comparison is false for a NaN, so such a joint counts as missing.
    present = (keypoints[..., 2] > MIN_CONFIDENCE) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return np.where(present, x, 0).astype(np.int64), np.where(present, y, 0).astype(np.int64), present


@cache
def _gaussian(radius: int) -> NDArray[np.float32]:
    """The kernel [2r + 1, 2r + 1] of peak 1."""
    side = np.exp(-0.5 * (np.arange(-radius, radius + 1) / ((2 * radius + 1) / 4)) ** 2)
    kernel = np.outer(side, side).astype(np.float32)
    kernel.flags.writeable = False
    return kernel


def _canvases(keypoints: NDArray, width: int, height: int, parts: int) -> Iterator[NDArray[np.float32]]:
    """Render frame after frame on one canvas: yields float32 [P, H, W], valid until the next one is asked for."""
    columns, rows, present = _centres(keypoints, width, height)
    radius, part_of = int(width / 11), joint_parts(parts)
    gaussian = _gaussian(radius)
    # A margin of the kernel's radius lets every window be whole; it is drawn on and never read.
    canvas = np.zeros((len(part_joints(parts)), height + 2 * radius, width + 2 * radius), np.float32)
    picture = canvas[:, radius : radius + height, radius : radius + width]
    side = 2 * radius + 1
    for x, y, shown in zip(columns, rows, present, strict=True):
        joints = np.flatnonzero(shown)
        places = zip(part_of[joints].tolist(), y[joints].tolist(), x[joints].tolist(), strict=True)
        windows = [canvas[part, top : top + side, left : left + side] for part, top, left in places]
        for window in windows:
            np.maximum(window, gaussian, out=window)
        yield picture
        for window in windows:
            window.fill(0)


def _sum_every(values: NDArray, axis: int, out: NDArray) -> None:
    """Sum each `_CELL` neighbours along an axis; slices are several times quicker here than a reduction."""
    strided = [values[(slice(None),) * axis + (slice(start, None, _CELL),)] for start in range(_CELL)]
    np.add(strided[0], strided[1], out=out)
    for addend in strided[2:]:
        out += addend
