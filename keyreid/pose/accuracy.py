"""How near found keypoints are to true ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from keyreid.pose.parts import KEYPOINT_NAMES


def judge_keypoints(found: np.ndarray, true: np.ndarray, heights: np.ndarray) -> dict[str, Any]:
    """PCK of all true joints, of those in plain sight (true confidence 1) and of each; median error of the found ones.

    Args:
        found, true: [N, 17, 3] in the same pixels; confidence 0 is missing.
        heights: [N], of the pictures in pixels.
    """
    distance = errors(found, true)
    near = distance[np.isfinite(distance)]
    return {
        "frames": len(true),
        "pck_0.05": pck(distance, heights),
        "pck_0.05_in_plain_sight": pck(np.where(true[..., 2] == 1, distance, np.nan), heights),
        "median_pixels": float(np.median(near)) if len(near) else None,
        "pck_0.05_by_joint": {name: pck(distance[:, j : j + 1], heights) for j, name in enumerate(KEYPOINT_NAMES)},
    }


def describe(accuracy: dict[str, Any]) -> str:
    """What `judge_keypoints` gives, in a line."""
    return (
        f"PCK@0.05 of the height {accuracy['pck_0.05']:.3f} of all true joints, "
        f"{accuracy['pck_0.05_in_plain_sight']:.3f} of those in plain sight; "
        f"median error {accuracy['median_pixels'] or float('nan'):.2f} pixels"
    )


def errors(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Distance of each found joint from the true one, pixels [N, 17].

    Infinite where a joint was not found, NaN where there is no true one.
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
