"""Guidance at the patch grid, from part heatmaps, with a frame's flip, crop and erasure; one function for all readers.

Flip, shift, erasure of a rectangle and the mean over a patch are all linear, and each is a product of one matter of
rows and one of columns. So a frame's guidance is two small matrix products,

    Y(rows) . heatmap . X(columns)^T  -  the same with rows and columns inside the erased rectangle,

where Y[i, r] is the share of patch i's pixel rows that heatmap row r covers after the shift. This is exact in area: no
picture of the heatmap is drawn, shifted or rounded.
"""

import numpy as np

from keyreid.backbones import PatchGrid


def pool(
    heatmaps: np.ndarray, grid: PatchGrid, flip: np.ndarray, crop: np.ndarray, erase: np.ndarray, one: float = 1.0
) -> np.ndarray:
    """Mean of each part's heatmap over each patch, after flip, crop and erasure.

    Args:
        heatmaps: float32 [N, P, h, w]; whatever h and w, they cover the frame that is resized to the grid's picture.
        flip: bool [N], mirrored left to right (parts keep their names here).
        crop: int [N, 2], top and left of the crop relative to the flipped frame; outside is zero.
        erase: int [N, 4], top, left, height, width of the rectangle set to zero, in pixels of the cropped picture.
        one: the heatmaps' value that stands for 1.

    Returns:
        float32 [N, P, Hp, Wp].
    """
    total, parts, rows, columns = heatmaps.shape
    high, wide = grid.shape
    # [N, 2, cells, w]: for the whole patch, and for its part inside the erased rectangle.
    across = _shares(grid.width, wide, grid, columns, crop[:, 1], erase[:, 1], erase[:, 3])
    across = np.where(flip[:, None, None, None], across[..., ::-1], across)
    down = _shares(grid.height, high, grid, rows, crop[:, 0], erase[:, 0], erase[:, 2])
    across = across.reshape(total, 2 * wide, columns) / np.float32(one)
    halves = heatmaps.reshape(total, parts * rows, columns) @ across.transpose(0, 2, 1)
    halves = halves.reshape(total, parts, rows, 2, wide)
    whole = down[:, None, 0] @ halves[:, :, :, 0]
    erased = down[:, None, 1] @ halves[:, :, :, 1]
    return np.maximum(whole - erased, 0)  # rounding may leave -1e-8 where all is erased


def _shares(
    side: int, cells: int, grid: PatchGrid, samples: int, shift: np.ndarray, start: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """How much of each patch each heatmap row (or column) covers: float32 [N, 2, cells, samples].

    The second of the two counts only the pixels within [start, start + length).
    """
    first = np.arange(cells) * grid.stride
    ranges = np.stack([first, first + grid.patch])[:, None].repeat(len(shift), 1)  # [2, N, cells]
    inside = np.clip(ranges, start[:, None], (start + length)[:, None])
    low, high = np.stack([ranges, inside], 2)  # [N, 2, cells] each
    edges = np.arange(samples + 1, dtype=np.float32) * (side / samples)
    # Pixel y of the cropped picture is pixel y + shift of the frame.
    begin, end = (bound.astype(np.float32)[..., None] + shift[:, None, None, None] for bound in (low, high))
    covered = np.clip(edges, begin, end)
    return np.diff(covered, axis=-1).astype(np.float32) / np.float32(grid.patch)
