"""Drawing a rendered pedestrian: every body part is baked once a tracklet and then moved from frame to frame.

Baking unrolls a part's texture as the camera at this yaw sees it, shades it by the light and gives it a soft outline.
A frame then costs one small affine warp a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from keyreid.synthetic import body
from keyreid.synthetic.clothes import COLUMNS, ROWS, Part, Person

LEFT, RIGHT = "left_", "right_"
# Part: the two points that its axis joins, how much nearer to the camera than its middle it is drawn (in body heights),
# and which keypoints it carries.
SPANS: dict[str, tuple[int, int, float, tuple[int, ...]]] = {
    "locks": (body.NAPE, body.LOCKS, 0.0, ()),
    "bun": (body.CROWN, body.NAPE, -0.03, ()),
    "backpack": (body.PACK_TOP, body.PACK_BOTTOM, 0.0, ()),
    "neck": (body.COLLAR, body.CHIN, 0.0, ()),
    "head": (body.CROWN, body.CHIN, 0.012, (0, 1, 2, 3, 4)),
    "skirt": (body.CROTCH, body.HEM, 0.075, (11, 12)),
    "torso": (body.COLLAR, body.CROTCH, 0.08, (5, 6, 11, 12)),
    "shoulder_bag": (body.BAG_TOP, body.BAG_BOTTOM, 0.03, ()),
    "hand_bag": (body.RIGHT_WRIST, body.RIGHT_HAND, 0.05, ()),
    "left_thigh": (body.LEFT_HIP, body.LEFT_KNEE, 0.0, (11, 13)),
    "right_thigh": (body.RIGHT_HIP, body.RIGHT_KNEE, 0.0, (12, 14)),
    "left_shank": (body.LEFT_KNEE, body.LEFT_ANKLE, 0.0, (13, 15)),
    "right_shank": (body.RIGHT_KNEE, body.RIGHT_ANKLE, 0.0, (14, 16)),
    "left_foot": (body.LEFT_HEEL, body.LEFT_TOE, 0.0, (15,)),
    "right_foot": (body.RIGHT_HEEL, body.RIGHT_TOE, 0.0, (16,)),
    "left_upper_arm": (body.LEFT_SHOULDER, body.LEFT_ELBOW, 0.085, (5, 7)),
    "right_upper_arm": (body.RIGHT_SHOULDER, body.RIGHT_ELBOW, 0.085, (6, 8)),
    "left_forearm": (body.LEFT_ELBOW, body.LEFT_HAND, 0.09, (7, 9)),
    "right_forearm": (body.RIGHT_ELBOW, body.RIGHT_HAND, 0.09, (8, 10)),
}
OWNER = {name: number for number, name in enumerate(SPANS, start=1)}  # 0 is background, 255 an occluder
OCCLUDER = 255
# owner -> which keypoints it shows
SHOWS = np.zeros((256, body.KEYPOINTS), bool)
for _name, (_, _, _, _joints) in SPANS.items():
    SHOWS[OWNER[_name], list(_joints)] = True


@dataclass(frozen=True)
class Sprite:
    """A baked part: premultiplied BGRA and where the axis begins and ends in it."""

    pixels: np.ndarray
    centre: float
    start: float
    end: float


def bake(person: Person, yaw: float, light: np.ndarray, ambient: float, scale: float) -> dict[str, Sprite]:
    """Bake all parts of a person for one tracklet.

    Args:
        yaw: the camera's, radians.
        light: unit vector towards the light in picture axes (right, down, near).
        ambient: light from everywhere, as a share.
        scale: pixels of a body's height.
    """
    lengths = np.linalg.norm(
        np.diff(_resting(person)[[[s, e] for s, e, _, _ in SPANS.values()]], axis=1)[:, 0], axis=-1
    )
    return {
        name: _bake(part, yaw, light, ambient, scale * max(length, 0.02), scale)
        for (name, length) in zip(SPANS, lengths, strict=True)
        if (part := person.parts.get(name)) is not None
    }


def _resting(person: Person) -> np.ndarray:
    return body.walk(person.build, person.gait, np.zeros(1))[0]


def _bake(part: Part, yaw: float, light: np.ndarray, ambient: float, length: float, scale: float) -> Sprite:
    # The part's cross-section is an ellipse: seen at `yaw` it is `wide` times its side-to-side width.
    wide = np.hypot(np.cos(yaw), part.depth * np.sin(yaw))
    turned = np.arctan2(part.depth * np.sin(yaw), np.cos(yaw))
    radii = wide * scale * np.asarray(part.widths)
    caps = (radii[0], radii[-1]) if part.round else (0.0, 0.0)
    height, half = int(np.ceil(length + sum(caps))) + 4, int(np.ceil(radii.max())) + 2
    down = np.arange(height, dtype=np.float32) - 1.5 - caps[0]  # pixels below the axis' start
    share = np.clip((down + caps[0]) / (length + sum(caps)), 0, 1)
    radius = np.interp(np.clip(down / length, 0, 1), np.linspace(0, 1, len(radii)), radii)
    if part.round:
        above, below = np.maximum(-down, 0), np.maximum(down - length, 0)
        radius = np.where(above > 0, np.sqrt(np.maximum(caps[0] ** 2 - above**2, 0)), radius)
        radius = np.where(below > 0, np.sqrt(np.maximum(caps[1] ** 2 - below**2, 0)), radius)
        edge = np.ones_like(down)
    else:
        edge = np.clip(np.minimum(down, length - down) + 0.5, 0, 1)
    across = np.arange(2 * half + 1, dtype=np.float32)[None] - half
    sine = np.clip(across / np.maximum(radius, 0.5)[:, None], -1, 1)
    cover = np.clip(radius[:, None] - np.abs(across) + 0.5, 0, 1) * edge[:, None]
    azimuth = np.arcsin(sine) - turned
    columns = ((azimuth / (2 * np.pi) + 0.5) % 1 * COLUMNS - 0.5).astype(np.float32)
    rows = np.broadcast_to((share * ROWS - 0.5).astype(np.float32)[:, None], columns.shape)
    colour = cv2.remap(
        part.texture, columns, np.ascontiguousarray(rows), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    facing = light[0] * sine + light[2] * np.sqrt(1 - sine**2) + light[1] * (share[:, None] - 0.5) * 0.5
    shade = ambient + (1 - ambient) * np.clip(facing, 0, 1)
    pixels = np.dstack([colour * (shade * cover)[..., None], cover])
    return Sprite(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8), half, 1.5 + caps[0], 1.5 + caps[0] + length)


def draw(
    canvas: np.ndarray,
    owner: np.ndarray,
    sprites: dict[str, Sprite],
    points: np.ndarray,
    crop: np.ndarray,
    scale: float,
) -> None:
    """Draw one pose, farthest part first.

    Args:
        canvas: uint8 [H, W, 3], drawn on.
        owner: uint8 [H, W], gets the number of the part that covers each pixel.
        sprites: from `bake`.
        points: [POINTS, 3], picture axes in body heights (`walkers_body.look`).
        crop: [2, 3] affine from (right, down) in pixels at `scale` to the canvas.
    """
    nearness = {name: points[SPANS[name][0], 2] + points[SPANS[name][1], 2] + 2 * SPANS[name][2] for name in sprites}
    for name in sorted(sprites, key=nearness.__getitem__):
        start, end, _, _ = SPANS[name]
        _stamp(canvas, owner, OWNER[name], sprites[name], points[start, :2] * scale, points[end, :2] * scale, crop)


def _stamp(canvas, owner, number: int, sprite: Sprite, start, end, crop) -> None:
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = float(np.hypot(dx, dy))
    if length < 2.0:  # points at the camera
        dx, dy, length = 0.0, 2.0, 2.0
    ux, uy = dx / length, dy / length
    stretch = length / (sprite.end - sprite.start)
    # sprite (x, y) -> start + (x - centre) * (uy, -ux) + (y - sprite.start) * stretch * (ux, uy), then the crop
    a, b, c, d = uy, stretch * ux, -ux, stretch * uy
    e = start[0] - sprite.centre * a - sprite.start * b
    f = start[1] - sprite.centre * c - sprite.start * d
    (p, q, r), (s, t, u) = crop
    matrix = np.array(
        [[p * a + q * c, p * b + q * d, p * e + q * f + r], [s * a + t * c, s * b + t * d, s * e + t * f + u]],
        np.float64,
    )
    height, width = sprite.pixels.shape[:2]
    xs = matrix[0, 2] + np.array(
        [0, matrix[0, 0] * width, matrix[0, 1] * height, matrix[0, 0] * width + matrix[0, 1] * height]
    )
    ys = matrix[1, 2] + np.array(
        [0, matrix[1, 0] * width, matrix[1, 1] * height, matrix[1, 0] * width + matrix[1, 1] * height]
    )
    left, top = max(int(xs.min()) - 1, 0), max(int(ys.min()) - 1, 0)
    right, bottom = min(int(xs.max()) + 2, canvas.shape[1]), min(int(ys.max()) + 2, canvas.shape[0])
    if right <= left or bottom <= top:
        return
    matrix[:, 2] -= (left, top)
    warped = cv2.warpAffine(sprite.pixels, matrix, (right - left, bottom - top), flags=cv2.INTER_LINEAR)
    over(canvas[top:bottom, left:right], warped)
    owner[top:bottom, left:right][warped[..., 3] > 127] = number


def over(canvas: np.ndarray, layer: np.ndarray) -> None:
    """Lay premultiplied BGRA over a canvas of the same size, in place."""
    through = 255 - layer[..., 3]
    behind = cv2.multiply(canvas, cv2.merge([through, through, through]), scale=1 / 255)
    np.add(behind, layer[..., :3], out=canvas)
