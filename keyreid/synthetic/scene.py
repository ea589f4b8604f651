"""Where rendered pedestrians walk: cameras with their light, colours, view and street, and what stands in the way."""

from dataclasses import dataclass

import cv2
import numpy as np

from keyreid.synthetic import MATERIALS, pick

LOOKS, DIRECTIONS = MATERIALS["looks"], MATERIALS["directions"]


@dataclass(frozen=True)
class Camera:
    """A camera of the rendered street."""

    yaw: float  # from where it sees people who walk along the street, radians; half of them walk the other way
    pitch: float  # looks down by so many radians
    colour: np.ndarray  # [3, 4] affine map of BGR in [0, 1]
    gamma: float  # exponent
    blur: float  # standard deviation in pixels of a 256-pixel-high picture
    detail: float  # share of the picture's resolution that the lens and the distance leave
    noise: float  # standard deviation in grey levels
    quality: int  # of JPEG
    tight: float  # how much of the picture's height people fill
    light: np.ndarray  # where the light comes from: right, down, near
    ambient: float  # share of the light that comes from everywhere
    street: np.ndarray  # uint8 [h, w, 3], background, wider than a picture


def camera(number: int, rng: np.random.Generator, height: int, width: int) -> Camera:
    """The camera of that number (from 1): the first have the six looks of LOOKS in turn, all differ in the rest."""
    gain, saturation, turn, gamma, contrast, offset = LOOKS[(number - 1) % len(LOOKS)]
    extra = 0.25 if number > len(LOOKS) else 0.05
    gain = np.array(gain) * np.exp(rng.normal(0, extra, 3))
    return Camera(
        yaw=DIRECTIONS[(number - 1) % len(DIRECTIONS)] + rng.uniform(-0.1, 0.1),
        pitch=rng.uniform(0.05, 0.3),
        colour=colour_map(gain, saturation, turn + rng.normal(0, 40 * extra), contrast, offset),
        gamma=gamma * np.exp(rng.normal(0, extra)),
        blur=rng.uniform(0.3, 1.1),
        detail=rng.uniform(0.6, 1.0),
        noise=rng.uniform(1.5, 5),
        quality=int(rng.integers(55, 92)),
        tight=rng.uniform(0.87, 0.93),
        light=_light(rng),
        ambient=rng.uniform(0.6, 0.85),
        street=_street(rng, height, width),
    )


def colour_map(gain: np.ndarray, saturation: float, turn: float, contrast: float, offset: float) -> np.ndarray:
    """[3, 4]: hues turned by so many degrees, saturation, channel gains, then contrast about middle grey."""
    axis = np.full(3, 1 / np.sqrt(3))
    angle = np.deg2rad(turn)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    hue = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
    grey = np.tile([0.114, 0.587, 0.299], (3, 1))
    linear = contrast * np.diag(gain) @ (grey + saturation * (np.eye(3) - grey)) @ hue
    return np.column_stack([linear, np.full(3, 0.5 * (1 - contrast) + offset)])


def _light(rng: np.random.Generator) -> np.ndarray:
    light = np.array([rng.uniform(-0.9, 0.9), -rng.uniform(0.1, 0.8), rng.uniform(0.35, 1.0)])
    return light / np.linalg.norm(light)


def _noise(rng: np.random.Generator, height: int, width: int, grain: float) -> np.ndarray:
    """Smooth noise [height, width] of standard deviation about 1."""
    small = rng.normal(size=(max(int(height / grain), 2), max(int(width / grain), 2))).astype(np.float32)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _street(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A strip of street, 1.25 pictures high and 9 wide."""
    rows, columns = int(1.25 * height), 9 * width
    horizon = int(rows * rng.uniform(0.45, 0.75))
    strip = np.empty((rows, columns, 3), np.float32)
    wall, ground = rng.uniform(0.25, 0.8) + rng.normal(0, 0.07, (2, 3)) + [[0], [rng.uniform(-0.15, 0.1)]]
    strip[:horizon], strip[horizon:] = wall, ground
    _build(strip[:horizon], rng, width, wall)
    _pave(strip[horizon:], rng, width, ground)
    stains, dirt = (_noise(rng, rows, columns, grain) for grain in (0.09 * width, 0.02 * width + 1))
    strip *= (1 + 0.05 * stains + 0.035 * dirt)[..., None]
    return (np.clip(strip, 0.02, 0.98) * 255).astype(np.uint8)


def _build(wall: np.ndarray, rng: np.random.Generator, width: int, base: np.ndarray) -> None:
    """Bricks, windows, doors, trees and posts on the far side."""
    rows, columns = wall.shape[:2]
    at = 0
    while at < columns:  # one house after the other
        wide = int(width * rng.uniform(0.7, 2.5))
        house = wall[:, at : at + wide]
        house[:] = np.clip(base + rng.normal(0, 0.08) + rng.normal(0, 0.05, 3), 0.1, 0.95)
        kind = rng.integers(5)
        if kind == 0:  # bricks or slats
            pitch = max(int(width * rng.uniform(0.05, 0.12)), 2)
            house[::pitch] *= 0.75
            if rng.random() < 0.5:
                house[:, :: 2 * pitch] *= 0.8
        elif kind in (1, 2):  # windows
            glass = 0.5 * base + 0.5 * rng.uniform(0.08, 0.9, 3)
            w, h = int(width * rng.uniform(0.2, 0.5)), int(rows * rng.uniform(0.2, 0.5))
            for x in range(int(0.1 * width), wide, int(1.6 * w) + 1):
                for y in range(int(0.08 * rows), rows, int(1.5 * h) + 1):
                    for tone, thickness in ((glass, -1), (base * 0.75, max(width // 64, 1))):
                        cv2.rectangle(house, (x, y), (x + w, y + h), tone.tolist(), thickness)
        elif kind == 3:  # a tree or a hedge
            leaf = np.array([0.15, 0.4, 0.2]) + rng.normal(0, 0.08, 3)
            for _ in range(60):
                centre = (int(rng.uniform(0, wide)), int(rows * rng.uniform(0.0, 1.0)))
                tone = tuple(map(float, np.clip(leaf * rng.uniform(0.5, 1.5), 0.03, 0.9)))
                cv2.circle(house, centre, int(width * rng.uniform(0.04, 0.16)), tone, -1, cv2.LINE_AA)
        at += wide
    for _ in range(rng.integers(3, 9)):
        x, w = int(rng.uniform(0, columns)), max(int(width * rng.uniform(0.02, 0.12)), 1)
        wall[:, x : x + w] = np.clip(base * rng.uniform(0.5, 1.4) + rng.normal(0, 0.05, 3), 0, 1)


def _pave(ground: np.ndarray, rng: np.random.Generator, width: int, base: np.ndarray) -> None:
    """Slabs, kerbs, markings: lines that grow wider apart towards the viewer."""
    rows, columns = ground.shape[:2]
    depth = np.linspace(0, 1, rows, dtype=np.float32)
    ground *= (0.9 + 0.2 * depth)[:, None, None]
    kind = rng.integers(4)
    if kind <= 1:
        ground[(1 / (1.25 - depth) * rng.uniform(3, 7)) % 1 < 0.12] *= 0.8  # joints of slabs
        if kind == 1:
            ground[:, :: max(int(width * rng.uniform(0.2, 0.6)), 2)] *= 0.82
    elif kind == 2:
        row = int(rows * rng.uniform(0.05, 0.5))
        ground[row : row + max(rows // 14, 1)] = np.clip(rng.uniform(0.6, 0.95) + rng.normal(0, 0.04, 3), 0, 1)
    else:
        for x in range(0, columns, int(width * rng.uniform(0.5, 1.0))):
            ground[:, x : x + int(width * 0.2)] += 0.2 * rng.uniform(0.5, 1)


@dataclass(frozen=True)
class Occluder:
    """Something between the camera and the person: premultiplied BGRA as wide as its path over the picture."""

    layer: np.ndarray
    left: float  # where its left edge is in the first frame, pixels
    speed: float  # pixels a frame


def occluder(rng: np.random.Generator, height: int, width: int, frames: int) -> Occluder:
    """A post, a low thing (car, wall, bench) or a bush that hides a part of the body in some or all frames."""
    kind = pick(rng, "occluders")
    tone = np.clip(rng.uniform(0.08, 0.85) + rng.normal(0, 0.15, 3), 0.03, 0.95)
    shares = {"post": rng.uniform(0.1, 0.25), "low": rng.uniform(0.8, 2.5), "bush": rng.uniform(0.4, 0.8), "edge": 0.4}
    wide = int(width * shares[kind])
    layer = np.zeros((height, max(wide, 3), 4), np.float32)
    if kind == "post":
        layer[...] = [*tone, 1]
        layer[..., :3] *= (0.75 + 0.25 * np.sin(np.linspace(0, np.pi, layer.shape[1])))[None, :, None]
    elif kind == "edge":  # a truck or a corner, straight and high
        layer[int(height * rng.uniform(0, 0.4)) :] = [*tone, 1]
    elif kind == "low":
        top = int(height * rng.uniform(0.58, 0.85))
        layer[top:] = [*tone, 1]
        layer[top : top + max(height // 40, 1), :, :3] *= 1.25
        for _ in range(rng.integers(0, 4)):
            row = int(rng.uniform(top, height))
            layer[row : row + max(height // 30, 1), :, :3] *= rng.uniform(0.5, 1.2)
    else:
        leaf = np.array([0.12, 0.36, 0.18]) + rng.normal(0, 0.07, 3)
        top = rng.uniform(0.45, 0.75)
        for _ in range(90):
            x, y = rng.uniform(0.1, 0.9) * wide, height * rng.uniform(top, 1.05)
            shade = np.clip(leaf * rng.uniform(0.4, 1.6), 0.02, 0.95)
            radius = max(int(height * rng.uniform(0.02, 0.06)), 1)
            cv2.circle(layer, (int(x), int(y)), radius, (*map(float, shade), 1.0), -1, cv2.LINE_AA)
    layer[..., :3] = np.clip(layer[..., :3], 0, 1) * layer[..., 3:]
    middle = width * rng.uniform(0.2, 0.8)
    speed = rng.choice([-1, 1]) * width * rng.uniform(*((0, 0.03) if kind == "low" else (0.02, 0.12)))
    start = middle - wide / 2 - speed * rng.uniform(0.2, 0.8) * frames
    return Occluder((layer * 255 + 0.5).astype(np.uint8), start, speed)
