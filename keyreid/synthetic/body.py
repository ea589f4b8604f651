"""How a rendered pedestrian is built, walks, and is seen: joints in space and on the picture.

Body axes: x to the person's left, y forward, z up; the unit is the person's height. A camera at yaw 0 sees the front,
at pi the back; it looks down by `pitch`.
"""

from dataclasses import dataclass

import numpy as np

from keyreid.synthetic import MATERIALS

# The 17 COCO keypoints, in COCO's order, then the points that only drawing needs.
NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR, LEFT_SHOULDER, RIGHT_SHOULDER, LEFT_ELBOW, RIGHT_ELBOW = range(9)
LEFT_WRIST, RIGHT_WRIST, LEFT_HIP, RIGHT_HIP, LEFT_KNEE, RIGHT_KNEE, LEFT_ANKLE, RIGHT_ANKLE = range(9, 17)
CROWN, CHIN, COLLAR, CROTCH, HEM, LEFT_HAND, RIGHT_HAND, LEFT_TOE, RIGHT_TOE = range(17, 26)
NAPE, LOCKS, PACK_TOP, PACK_BOTTOM, BAG_TOP, BAG_BOTTOM, LEFT_HEEL, RIGHT_HEEL = range(26, 34)
KEYPOINTS, POINTS = 17, 34


@dataclass(frozen=True)
class Build:
    """Proportions of a body, in units of its height; what makes people differ beside their clothes."""

    shoulders: float  # half width between the shoulder joints
    hips: float
    girth: float  # factor on the width of torso and limbs
    legs: float  # height of the hip joint
    head: float  # factor on the size of the head

    @staticmethod
    def draw(rng: np.random.Generator) -> "Build":
        """A random adult."""
        return Build(**{name: rng.uniform(*bounds) for name, bounds in MATERIALS["build"].items()})


@dataclass(frozen=True)
class Gait:
    """How a body walks: amplitudes in radians."""

    stride: float
    swing: float
    elbow: float
    lean: float
    cadence: float  # steps a frame, in radians of phase

    @staticmethod
    def draw(rng: np.random.Generator) -> "Gait":
        """A random walk; one in eight people stands or strolls."""
        pace = rng.uniform(0.7, 1.15) if rng.random() < 0.87 else rng.uniform(0.05, 0.3)
        swing, elbow, lean = rng.uniform(0.25, 0.6) * pace, rng.uniform(0.1, 0.55), rng.uniform(0.0, 0.09)
        return Gait(0.48 * pace, swing, elbow, lean, cadence=rng.uniform(0.32, 0.5) * (0.4 + 0.6 * pace))


def walk(build: Build, gait: Gait, phase: np.ndarray) -> np.ndarray:
    """Points [T, POINTS, 3] of the body in body axes, the lower foot on z = 0, at each phase [T] of the gait.

    Phases are radians; the left leg is farthest forward at pi/2.
    """
    points, shoulder = np.zeros((len(phase), POINTS, 3)), 0.815
    shank = 0.47 * (build.legs - 0.05)
    thigh = build.legs - 0.05 - shank
    for side, sign, offset in ((0, 1.0, 0.0), (1, -1.0, np.pi)):
        forward = gait.stride * np.sin(phase + offset)
        flexion = 0.08 + 1.5 * gait.stride * np.maximum(0.0, np.cos(phase + offset)) ** 1.5
        hip = np.broadcast_to([sign * build.hips, 0.0, build.legs], (len(phase), 3))
        knee = hip + _swung(thigh, forward)
        ankle = knee + _swung(shank, forward - flexion)
        pitch = np.clip(forward - flexion, -1.2, 0.25)  # the foot lags the shank
        points[:, LEFT_HIP + side], points[:, LEFT_KNEE + side], points[:, LEFT_ANKLE + side] = hip, knee, ankle
        points[:, LEFT_HEEL + side] = ankle + _swung(0.02, pitch) - 0.6 * _swung(0.045, pitch + np.pi / 2)
        points[:, LEFT_TOE + side] = ankle + _swung(0.028, pitch) + _swung(0.095, pitch + np.pi / 2)
        back = -gait.swing * np.sin(phase + offset)
        bend = gait.elbow + 0.5 * gait.swing * (1 + np.sin(phase + offset + np.pi))
        top = np.broadcast_to([sign * build.shoulders, 0.0, shoulder], (len(phase), 3))
        elbow = top + _swung(0.17, back) + [sign * 0.022, 0.0, 0.0]
        wrist = elbow + _swung(0.145, back + bend) + [sign * 0.004, 0.0, 0.0]
        points[:, LEFT_SHOULDER + side], points[:, LEFT_ELBOW + side], points[:, LEFT_WRIST + side] = top, elbow, wrist
        points[:, LEFT_HAND + side] = wrist + _swung(0.055, back + bend)
    _trunk(points, build, shoulder)
    upper = points[..., 2] > build.legs
    points[..., 1] += np.where(upper, np.tan(gait.lean) * (points[..., 2] - build.legs), 0.0)
    points[..., 2] -= points[:, [LEFT_HEEL, RIGHT_HEEL, LEFT_TOE, RIGHT_TOE], 2].min(axis=1, keepdims=True)
    return points


def _swung(length: float, angle: np.ndarray) -> np.ndarray:
    """[T, 3] step of a segment that hangs down at angle 0 and points forward at pi/2."""
    return length * np.stack([np.zeros_like(angle), np.sin(angle), -np.cos(angle)], axis=-1)


def _trunk(points: np.ndarray, build: Build, shoulder: float) -> None:
    """Fill in head, torso, and where hair and bags hang."""
    for name, (x, y, z) in MATERIALS["head"].items():
        points[:, globals()[name]] = (build.head * x, build.head * y, 0.88 + build.head * (z - 0.88))
    points[:, COLLAR] = (0.0, 0.0, shoulder + 0.03)
    points[:, CROTCH] = (0.0, 0.0, build.legs - 0.03)
    points[:, PACK_TOP] = (0.0, -0.085, shoulder)
    points[:, PACK_BOTTOM] = (0.0, -0.1, build.legs + 0.06)
    points[:, BAG_TOP] = (-build.hips - 0.055, 0.01, build.legs + 0.05)
    points[:, BAG_BOTTOM] = (-build.hips - 0.06, 0.01, build.legs - 0.08)
    knees = 0.5 * (points[:, LEFT_KNEE] + points[:, RIGHT_KNEE])
    points[:, HEM] = points[:, CROTCH] + 0.6 * (knees - points[:, CROTCH])
    points[:, HEM, 2] = build.legs - 0.19


def look(points: np.ndarray, yaw: np.ndarray, pitch: float) -> np.ndarray:
    """Turn points [T, POINTS, 3] from body axes to picture axes: right, down (0 at the ground), near to the camera.

    Yaw [T] and pitch of the camera are radians; the unit stays the person's height.
    """
    cosine, sine = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    across = points[..., 0] * cosine + points[..., 1] * sine
    near = points[..., 1] * cosine - points[..., 0] * sine
    down = -points[..., 2] * np.cos(pitch) + near * np.sin(pitch)
    return np.stack([across, down, near], axis=-1)
