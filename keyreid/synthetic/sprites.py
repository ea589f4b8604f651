"""Drawing a rendered pedestrian: every piece of the body is baked once a tracklet and then moved from frame to frame.

Baking unrolls a piece's texture as the camera at this yaw sees it, shades it by the light and gives it a soft outline.
A frame then costs one small affine warp for each piece.
"""

from typing import NamedTuple

import cv2
import numpy as np

from keyreid.synthetic import MATERIALS, body
from keyreid.synthetic.clothes import COLUMNS, ROWS, Person, Piece

OCCLUDER = 255
# Piece: its two ends, how much nearer to the camera than its middle it is drawn (in body heights), and its keypoints.
SPANS: dict[str, tuple[int, int, float, list[int]]] = {
    name: (getattr(body, start), getattr(body, end), nearer, joints)
    for name, (start, end, nearer, joints) in MATERIALS["pieces"].items()
}
OWNER = {name: number for number, name in enumerate(SPANS, start=1)}  # 0 is background, 255 an occluder
SHOWS = np.zeros((256, body.KEYPOINTS), bool)  # owner -> which keypoints it shows
for _name, (_, _, _, _joints) in SPANS.items():
    SHOWS[OWNER[_name], _joints] = True


class Sprite(NamedTuple):
    """A baked piece: premultiplied BGRA and where the axis begins and ends in it."""

    pixels: np.ndarray
    centre: float
    start: float
    end: float


def bake(person: Person, yaw: float, light: np.ndarray, ambient: float, scale: float) -> dict[str, Sprite]:
    """Bake all pieces of a person for one tracklet, a camera at `yaw` radians and `scale` pixels of a body's height.

    `light` is the unit vector towards the light in picture axes (right, down, near); a share `ambient` is everywhere.
    """
    resting, baked = body.walk(person.build, person.gait, np.zeros(1))[0], {}
    for name, (start, end, _, _) in SPANS.items():
        if name in person.pieces:
            length = scale * max(np.linalg.norm(resting[end] - resting[start], axis=-1), 0.02)
            baked[name] = _bake(person.pieces[name], yaw, light, ambient, length, scale)
    return baked


def _bake(piece: Piece, yaw: float, light: np.ndarray, ambient: float, length: float, scale: float) -> Sprite:
    # The piece's cross-section is an ellipse: seen at `yaw` it is `wide` times its side-to-side width.
    wide = np.hypot(np.cos(yaw), piece.depth * np.sin(yaw))
    turned = np.arctan2(piece.depth * np.sin(yaw), np.cos(yaw))
    radii = wide * scale * np.asarray(piece.widths)
    caps = (radii[0], radii[-1]) if piece.round else (0.0, 0.0)
    height, half = int(np.ceil(length + sum(caps))) + 4, int(np.ceil(radii.max())) + 2
    down = np.arange(height, dtype=np.float32) - 1.5 - caps[0]  # pixels below the axis' start
    share = np.clip((down + caps[0]) / (length + sum(caps)), 0, 1)
    radius = np.interp(np.clip(down / length, 0, 1), np.linspace(0, 1, len(radii)), radii)
    if piece.round:
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
    rows = np.tile((share * ROWS - 0.5).astype(np.float32)[:, None], columns.shape[1])
    colour = cv2.remap(piece.texture, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    facing = light[0] * sine + light[2] * np.sqrt(1 - sine**2) + light[1] * (share[:, None] - 0.5) * 0.5
    shade = ambient + (1 - ambient) * np.clip(facing, 0, 1)
    pixels = np.dstack([colour * (shade * cover)[..., None], cover])
    return Sprite(np.clip(pixels * 255 + 0.5, 0, 255).astype(np.uint8), half, 1.5 + caps[0], 1.5 + caps[0] + length)


def draw(canvas: np.ndarray, owner: np.ndarray, sprites: dict[str, Sprite], points, crop, scale: float) -> None:
    """Draw one pose, farthest piece first, with what `bake` made.

    Args:
        canvas: uint8 [H, W, 3], drawn on.
        owner: uint8 [H, W], gets the number of the piece that covers each pixel.
        points: [POINTS, 3], picture axes in body heights (`body.look`).
        crop: [2, 3] affine from (right, down) in pixels at `scale` to the canvas.
    """
    nearness = {name: points[SPANS[name][0], 2] + points[SPANS[name][1], 2] + 2 * SPANS[name][2] for name in sprites}
    for name in sorted(sprites, key=nearness.__getitem__):
        start, end = (points[point, :2] * scale for point in SPANS[name][:2])
        _stamp(canvas, owner, OWNER[name], sprites[name], start, end, crop)


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
    x_row, y_row = [[m * a + n * c, m * b + n * d, m * e + n * f + shift] for m, n, shift in crop]
    matrix = np.array([x_row, y_row], np.float64)
    height, width = sprite.pixels.shape[:2]
    across, down = matrix[:, 0] * width, matrix[:, 1] * height
    xs, ys = matrix[:, 2:] + np.stack([np.zeros(2), across, down, across + down], axis=1)
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
