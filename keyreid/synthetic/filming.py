"""One rendered tracklet: a person of `clothes` walks past a camera of `scene`."""

from typing import NamedTuple

import cv2
import numpy as np

from keyreid.synthetic import body, scene, sprites
from keyreid.synthetic.clothes import Person, dress


class Rendered(NamedTuple):
    """What one tracklet is."""

    pictures: list[bytes]  # JPEGs, one for each frame
    # float32 [T, 17, 3]: x, y in pixels; confidence 1 seen, 0.5 behind the own body, 0 hidden otherwise or outside
    keypoints: np.ndarray


class _Figure(NamedTuple):
    """A person set in motion before the camera: what drawing a frame needs."""

    sprites: dict[str, sprites.Sprite]
    points: np.ndarray  # [T, POINTS, 3]
    crops: np.ndarray  # [T, 2, 3]
    scale: float

    def draw(self, canvas: np.ndarray, owner: np.ndarray, t: int) -> None:
        sprites.draw(canvas, owner, self.sprites, self.points[t], self.crops[t], self.scale)


def random_stream(*numbers: int) -> np.random.Generator:
    """A generator that depends on the numbers alone, so that any process may draw any tracklet."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([n & 0xFFFFFFFF for n in numbers])))


def render_tracklet(
    person: Person | None, camera: scene.Camera, frames: int, rng: np.random.Generator, height: int, width: int
) -> Rendered:
    """Draw a tracklet of `person`; None gives a detection of no one, or of too little of someone (MARS's junk)."""
    junk = person is None
    yaw = camera.yaw + rng.choice([0.0, np.pi]) + rng.normal(0, 0.17)
    figure = _enter(person or dress(rng), camera, yaw, frames, rng, height, width, junk)
    company = None
    if rng.random() < 0.06:  # someone else in the picture
        company = _enter(dress(rng), camera, yaw + rng.choice([0.0, np.pi]), frames, rng, height, width, junk=True)
    company_in_front = rng.random() < 0.3
    obstacle = scene.occluder(rng, height, width, frames) if rng.random() < 0.1 else None
    backdrop = _backdrop(camera.street, frames, rng, height, width)
    develop = _developer(camera, rng, height, width)
    pictures, keypoints = [], np.zeros((frames, body.KEYPOINTS, 3), np.float32)
    owner = np.empty((height, width), np.uint8)
    empty = junk and rng.random() < 0.4
    for t, canvas in enumerate(backdrop):
        owner[:] = 0
        if company and not company_in_front:
            company.draw(canvas, owner, t)
            owner[:] = 0
        if not empty:
            _shade_ground(canvas, figure, t)
            figure.draw(canvas, owner, t)
        if company and company_in_front:
            veil = np.zeros_like(owner)
            company.draw(canvas, veil, t)
            owner[veil > 0] = sprites.OCCLUDER
        if obstacle:
            _obstruct(canvas, owner, obstacle, t)
        keypoints[t] = _true_keypoints(figure, t, owner)
        pictures.append(develop(canvas))
    if empty:
        keypoints[:] = 0
    return Rendered(pictures, keypoints)


def _enter(person: Person, camera, yaw: float, frames: int, rng, height: int, width: int, junk: bool) -> _Figure:
    """Let a person walk through the picture as a detector would frame them: roughly centred, roughly filling it."""
    steps = np.arange(frames)
    phase = rng.uniform(0, 2 * np.pi) + person.gait.cadence * rng.uniform(0.9, 1.1) * steps
    turning = yaw + rng.normal(0, 0.012) * (steps - frames / 2)
    pitch = float(np.clip(camera.pitch + rng.normal(0, 0.04), 0, 0.6))
    points = body.look(body.walk(person.build, person.gait, phase), turning, pitch)
    top, bottom = points[..., 1].min(axis=1).mean(), points[..., 1].max(axis=1).mean()
    scale = camera.tight * height * np.exp(rng.normal(0, 0.025)) / (bottom - top + 0.03)
    light = camera.light + rng.normal(0, 0.2, 3)
    ambient = float(np.clip(camera.ambient + rng.normal(0, 0.05), 0.4, 0.95))
    baked = sprites.bake(person, yaw, light / np.linalg.norm(light), ambient, scale)
    wander = np.cumsum(rng.normal(0, 0.006, (frames, 2)), axis=0)
    shift = rng.normal(0, (0.03, 0.012), 2)
    if junk:
        shift += rng.choice([-1, 1], 2) * rng.uniform((0.3, 0.0), (0.55, 0.35))
    crops = np.zeros((frames, 2, 3))
    crops[:, 0, 0] = np.exp(rng.normal(0.3, 0.06))  # boxes are squeezed to the picture's shape
    crops[:, 1, 1] = 1 + rng.normal(0, 0.006, frames)
    crops[:, 0, 2] = width * (0.5 + shift[0] + wander[:, 0])
    crops[:, 1, 2] = height * (0.5 + shift[1] + 0.5 * wander[:, 1]) - 0.5 * (top + bottom) * scale
    return _Figure(baked, points, crops, scale)


def _backdrop(street: np.ndarray, frames: int, rng, height: int, width: int):
    """Cut-outs of the street that pass by as the camera follows the person."""
    speed = rng.choice([-1, 1]) * rng.uniform(0.005, 0.05) * width
    room = street.shape[1] - width - abs(speed) * frames
    left = rng.uniform(0, max(room, 1)) + (abs(speed) * frames if speed < 0 else 0)
    top = int(rng.uniform(0, street.shape[0] - height))
    for t in range(frames):
        column = int(np.clip(left + speed * t, 0, street.shape[1] - width))
        yield street[top : top + height, column : column + width].copy()


def _shade_ground(canvas: np.ndarray, figure: _Figure, t: int) -> None:
    feet = figure.points[t, [body.LEFT_TOE, body.RIGHT_TOE, body.LEFT_HEEL, body.RIGHT_HEEL], :2] * figure.scale
    feet = feet @ figure.crops[t, :, :2].T + figure.crops[t, :, 2]
    (left, top), (right, bottom) = feet.min(axis=0), feet.max(axis=0)
    pad = 0.05 * figure.scale
    x0, x1 = max(int(left - pad), 0), min(int(right + pad), canvas.shape[1])
    y0, y1 = max(int(top - 0.3 * pad), 0), min(int(bottom + 0.6 * pad), canvas.shape[0])
    if x1 > x0 and y1 > y0:
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        half = (x1 - x0) // 2, (y1 - y0) // 2
        cv2.ellipse(mask, half, half, 0, 0, 360, 110, -1, cv2.LINE_AA)
        sprites.over(canvas[y0:y1, x0:x1], cv2.merge([np.zeros_like(mask)] * 3 + [mask]))


def _obstruct(canvas: np.ndarray, owner: np.ndarray, obstacle: scene.Occluder, t: int) -> None:
    left = round(obstacle.left + obstacle.speed * t)
    start, end = max(left, 0), min(left + obstacle.layer.shape[1], canvas.shape[1])
    if end > start:
        layer = obstacle.layer[:, start - left : end - left]
        sprites.over(canvas[:, start:end], layer)
        owner[:, start:end][layer[..., 3] > 127] = sprites.OCCLUDER


def _true_keypoints(figure: _Figure, t: int, owner: np.ndarray) -> np.ndarray:
    points, crop = figure.points[t, : body.KEYPOINTS], figure.crops[t]
    places = points[:, :2] * figure.scale @ crop[:, :2].T + crop[:, 2]
    columns, rows = np.floor(places).astype(int).T
    inside = (columns >= 0) & (columns < owner.shape[1]) & (rows >= 0) & (rows < owner.shape[0])
    covering = owner[np.where(inside, rows, 0), np.where(inside, columns, 0)]
    joints = np.arange(body.KEYPOINTS)
    confidence = np.where((covering == 0) | sprites.SHOWS[covering, joints], 1.0, 0.5)
    head = figure.points[t, [body.CROWN, body.CHIN], 2].mean()
    turned_away = (joints <= body.RIGHT_EAR) & (points[:, 2] < head - 0.012)
    confidence[turned_away] = 0.5
    confidence[~inside | (covering == sprites.OCCLUDER)] = 0.0
    return np.column_stack([places, confidence]).astype(np.float32)


def _developer(camera: scene.Camera, rng: np.random.Generator, height: int, width: int):
    """The camera's sensor and encoder under this tracklet's light: drawn picture -> JPEG bytes."""
    gain = np.exp(rng.normal(0, 0.06) + rng.normal(0, 0.025, 3))
    matrix = (camera.colour * gain[:, None] * [1, 1, 1, 255]).astype(np.float32)
    gamma = camera.gamma * np.exp(rng.normal(0, 0.05))
    curve = (255 * (np.arange(256) / 255) ** gamma + 0.5).astype(np.uint8)
    across, down = rng.normal(0, 0.07, 2)
    light = 1 + across * np.linspace(-1, 1, width)[None] + down * np.linspace(-1, 1, height)[:, None]
    if rng.random() < 0.12:  # the edge of a shadow falls over the picture
        slope, place, soft = rng.normal(0, 0.4), rng.uniform(0.2, 0.8), rng.uniform(0.02, 0.2)
        line = np.linspace(0, 1, height)[:, None] + slope * np.linspace(-0.5, 0.5, width)[None] - place
        light = light * (1 - rng.uniform(0.2, 0.5) / (1 + np.exp(-line / soft)))
    light = cv2.merge([light.astype(np.float32)] * 3)
    sigma = camera.blur * height / 256 * np.exp(rng.normal(0, 0.25))
    detail = float(np.clip(camera.detail * np.exp(rng.normal(0, 0.15)), 0.3, 1.0))
    small = (max(int(width * detail), 12), max(int(height * detail), 24))
    grain = np.round(rng.normal(0, camera.noise, (height + 32, width + 32, 3))).astype(np.int16)
    quality = [cv2.IMWRITE_JPEG_QUALITY, camera.quality]

    def develop(canvas: np.ndarray) -> bytes:
        picture = cv2.multiply(canvas, light, dtype=cv2.CV_8U)
        picture = cv2.LUT(cv2.transform(picture, matrix), curve)
        if sigma > 0.25:
            picture = cv2.GaussianBlur(picture, (0, 0), sigma)
        if detail < 0.95:
            picture = cv2.resize(cv2.resize(picture, small, interpolation=cv2.INTER_AREA), (width, height))
        top, left = rng.integers(0, 32, 2)
        picture = cv2.add(picture, grain[top : top + height, left : left + width], dtype=cv2.CV_8U)
        return cv2.imencode(".jpg", picture, quality)[1].tobytes()

    return develop
