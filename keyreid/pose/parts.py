"""Joints and body parts: the COCO order of keypoints, and how they are grouped into 3, 4 or 6 parts."""

import numpy as np

from keyreid.errors import ConfigError

KEYPOINT_NAMES = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)
NUM_KEYPOINTS = len(KEYPOINT_NAMES)
KEYPOINT_FLIP = np.array([0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15])  # left <-> right
SKELETON = (  # bones, as pairs of keypoints; what pictures draw
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (7, 9)),
    *((6, 8), (8, 10), (0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)

# The published six parts; the coarser groupings are unions of them, so that their heatmaps are maxima of the six.
_JOINTS = {
    "head": (0, 1, 2, 3, 4),
    "torso": (5, 6, 11, 12),
    "left_arm": (7, 9),
    "right_arm": (8, 10),
    "left_leg": (13, 15),
    "right_leg": (14, 16),
}
_SIX = tuple(_JOINTS)
_GROUPINGS: dict[int, dict[str, tuple[str, ...]]] = {
    3: {"head": ("head",), "upper_body": _SIX[1:4], "legs": _SIX[4:]},
    4: {"head": ("head",), "torso": ("torso",), "arms": _SIX[2:4], "legs": _SIX[4:]},
    6: {name: (name,) for name in _SIX},
}


def part_names(parts: int) -> tuple[str, ...]:
    """Names of the P parts, in the order of every array with a part axis."""
    return tuple(_grouping(parts))


def part_joints(parts: int) -> tuple[tuple[int, ...], ...]:
    """For each part, the keypoints (COCO numbers) whose Gaussians make its heatmap."""
    return tuple(tuple(j for name in names for j in _JOINTS[name]) for names in _grouping(parts).values())


def joint_parts(parts: int) -> np.ndarray:
    """int [17]: the part that each keypoint belongs to; every keypoint belongs to exactly one."""
    result = np.empty(NUM_KEYPOINTS, np.int64)
    for part, joints in enumerate(part_joints(parts)):
        result[list(joints)] = part
    return result


def merged_parts(parts: int) -> tuple[tuple[int, ...], ...]:
    """For each of the P parts, which of the six it unites: maximum over them turns six heatmaps into P."""
    return tuple(tuple(_SIX.index(name) for name in names) for names in _grouping(parts).values())


def flip_permutation(parts: int) -> np.ndarray:
    """int [P]: `heatmaps[flip_permutation(P)]` are the parts of the mirrored picture (left <-> right)."""
    names = part_names(parts)
    swap = {"left": "right", "right": "left"}
    mirrored = ["_".join(swap.get(word, word) for word in name.split("_")) for name in names]
    return np.array([names.index(name) for name in mirrored])


def _grouping(parts: int) -> dict[str, tuple[str, ...]]:
    if parts not in _GROUPINGS:
        raise ConfigError(f"{parts} body parts: only 3, 4 and 6 are defined")
    return _GROUPINGS[parts]
