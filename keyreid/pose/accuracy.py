"""How near found keypoints are to true ones."""

from __future__ import annotations

import numpy as np


def errors(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Distance of each found joint from the true one.

    Args:
        found, true: [N, 17, 3] in the same pixels; confidence 0 is missing.

    Returns:
        float [N, 17]: pixels; infinite where a joint was not found, NaN where there is no true one.
    """
    distance = np.linalg.norm(found[..., :2].astype(np.float64) - true[..., :2], axis=-1)
    distance[found[..., 2] <= 0] = np.inf
    distance[true[..., 2] <= 0] = np.nan
    return distance


def pck(distance: np.ndarray, heights: np.ndarray, share: float = 0.05) -> float:
    """Percentage of correct keypoints, as a share in [0, 1]: joints found within `share` of the picture's height.

    Args:
        distance: [N, 17] of `errors`; what was not found counts as wrong, what has no truth not at all.
        heights: [N], of the pictures in pixels.
    """
    judged = ~np.isnan(distance)
    if not judged.any():
        return float("nan")
    return float((distance <= share * np.asarray(heights, np.float64)[:, None])[judged].mean())
