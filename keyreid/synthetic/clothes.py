"""What makes a rendered pedestrian someone: clothes with colours and patterns, hair, skin and bags.

Every garment is a texture around the body: rows run from top to bottom, columns run once around, from the back over
the person's right side, the front (the middle column) and the left side to the back again. Colours are BGR in [0, 1].
"""

from dataclasses import dataclass, field, replace

import numpy as np

from keyreid.synthetic import MATERIALS, pick
from keyreid.synthetic.body import Build, Gait

ROWS, COLUMNS = 64, 96
V, U = np.meshgrid(
    (np.arange(ROWS) + 0.5) / ROWS, ((np.arange(COLUMNS) + 0.5) / COLUMNS - 0.5) * 2 * np.pi, indexing="ij"
)


@dataclass(frozen=True)
class Piece:
    """One drawn piece of the body."""

    texture: np.ndarray  # float32 [ROWS, COLUMNS, 3]
    widths: tuple[float, ...]  # half widths from top to bottom, in units of the body's height
    depth: float = 1.0  # front-to-back over side-to-side extent
    round: bool = True  # whether the ends are half circles (limbs) or straight (hems)


@dataclass
class Person:
    """An identity: build, gait and the drawn pieces by name."""

    build: Build
    gait: Gait
    pieces: dict[str, Piece] = field(default_factory=dict)

    def wear_both(self, name: str, texture: np.ndarray, widths: tuple[float, ...]) -> None:
        """A piece on the left, and its mirror image on the right."""
        texture = texture.astype(np.float32)
        self.pieces[f"left_{name}"] = Piece(texture, widths)
        self.pieces[f"right_{name}"] = Piece(np.ascontiguousarray(texture[:, ::-1]), widths)


def dress(rng: np.random.Generator) -> Person:
    """Draw a person; the same generator state gives the same person."""
    person = Person(Build.draw(rng), Gait.draw(rng))
    skin = _vary(MATERIALS["skins"][rng.integers(len(MATERIALS["skins"]))], rng, 0.04)
    _dress_legs(person, skin, rng)
    _dress_arms(person, skin, _dress_torso(person, skin, rng), rng)
    _dress_head(person, skin, rng)
    _hand_bags(person, rng)
    return person


def _dye(rng: np.random.Generator, unlike: np.ndarray | None = None) -> np.ndarray:
    """A cloth colour; with `unlike`, one that can be told from that colour, or from a texture's mean."""
    weights, colours = zip(*MATERIALS["dyes"], strict=True)
    if unlike is not None and unlike.ndim == 3:
        unlike = unlike.mean((0, 1))
    while True:
        colour = _vary(colours[rng.choice(len(colours), p=np.array(weights) / np.sum(weights))], rng, 0.06)
        if unlike is None or np.abs(colour - unlike).max() > 0.25:
            return colour


def _vary(colour: list[float], rng: np.random.Generator, amount: float) -> np.ndarray:
    tint = np.array(colour) * np.exp(rng.normal(0, 2 * amount)) + rng.normal(0, amount / 2, 3)
    return np.clip(tint, 0.03, 0.97)


def _cloth(rng: np.random.Generator, patterned: float) -> np.ndarray:
    """A texture: one colour, or with probability `patterned` a pattern of two."""
    first = _dye(rng)
    second = _dye(rng, unlike=first)
    if rng.random() >= patterned:
        return _plain(first, rng)
    mask = _pattern(MATERIALS["patterns"][rng.integers(len(MATERIALS["patterns"]))], rng)
    return _fold(np.broadcast_to(first, (ROWS, COLUMNS, 3)) + mask[..., None] * (second - first), rng)


def _plain(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _fold(np.broadcast_to(colour, (ROWS, COLUMNS, 3)), rng)


def _pattern(kind: str, rng: np.random.Generator) -> np.ndarray:
    """[ROWS, COLUMNS] share of the second colour."""
    rows, columns, phase = rng.uniform(3, 6.5), rng.integers(7, 14), rng.random()
    width = rng.uniform(0.35, 0.6)
    hoops = ((V * rows + phase) % 1 < width).astype(float)
    stripes = ((U / (2 * np.pi) * columns + phase) % 1 < width).astype(float)
    shapes = {
        "hoops": lambda: hoops,
        "pinstripes": lambda: stripes,
        "check": lambda: 0.5 * (hoops + stripes),
        "dots": lambda: (np.cos(2 * np.pi * V * rows) * np.cos(U * (columns // 2))) > 0.35,
        "yoke": lambda: rng.uniform(0.3, 0.6) > V,
        "sash": lambda: np.abs(V - 0.5 - rng.choice([-1, 1]) * 0.28 * np.sin(U)) < 0.12,
        "fade": lambda: V,
        "band": lambda: np.abs(V - rng.uniform(0.3, 0.7)) < rng.uniform(0.08, 0.16),
        "camouflage": lambda: sum(_wave(rng, 12, 6) for _ in range(5)) > 0.4,
    }
    return shapes[kind]().astype(float)


def _wave(rng: np.random.Generator, steep: float, turns: int) -> np.ndarray:
    return np.sin(rng.normal(0, steep) * V + rng.integers(-turns, turns + 1) * U + 6 * rng.random())


def _fold(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken and lighten along a few creases."""
    creases = sum(_wave(rng, 9, 4) * rng.uniform(0.01, 0.035) for _ in range(4))
    return np.clip(texture * (1 + creases[..., None]), 0, 1).astype(np.float32)


def _paint(texture: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Colour, or another texture, where the mask is."""
    return np.where(mask[..., None], np.asarray(colour, np.float32), texture).astype(np.float32)


def _near(place: np.ndarray, middle: float, reach: float) -> np.ndarray:
    return np.abs(place - middle) < reach


def _dress_legs(person: Person, skin: np.ndarray, rng: np.random.Generator) -> None:
    girth = person.build.girth
    kind = pick(rng, "legs")
    cloth = _cloth(rng, patterned=0.35)
    bare = _plain(skin if rng.random() < 0.75 else _dye(rng), rng)  # skin or tights
    wide = rng.uniform(1.0, 1.35) if kind == "trousers" else 1.0
    if kind == "trousers" and rng.random() < 0.3:
        cloth = _paint(cloth, _near(U, np.pi / 2, 0.45), _dye(rng, unlike=cloth))  # outer side stripe
    thigh = cloth if kind in ("trousers", "shorts") else bare
    shank = cloth if kind == "trousers" else bare
    if kind == "trousers" and rng.random() < 0.2:
        shank = _paint(shank, rng.uniform(0.55, 0.85) < V, _dye(rng, unlike=cloth))  # cuffs, boots
    elif rng.random() < 0.4:
        shank = _paint(shank, rng.uniform(0.55, 0.92) < V, _dye(rng, unlike=shank))  # socks, boots
    ankle = 0.022 if shank is bare else 0.027 * wide
    shoe = np.broadcast_to(_dye(rng), cloth.shape)
    if rng.random() < 0.5:
        shoe = _paint(shoe, np.abs(U) > 2.2, _dye(rng, unlike=shoe[0, 0]))  # the sole: back of a toe that hangs
    person.wear_both("thigh", thigh, (0.057 * girth, 0.052 * girth, 0.04 * girth * wide))
    person.wear_both("shank", shank, (0.039 * girth * wide, 0.036 * girth * wide, ankle * girth))
    person.wear_both("foot", shoe, (0.026, 0.029, 0.022))
    if kind in ("skirt", "dress"):
        flare = rng.uniform(1.0, 1.5)
        hips = (person.build.hips + 0.042) * girth**0.5
        widths = (0.8 * hips, hips, hips * (1 + flare) / 2, hips * flare)
        person.pieces["skirt"] = Piece(cloth, widths, 0.8, round=False)


def _dress_torso(person: Person, skin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Also gives the cloth of the sleeves."""
    girth, build = person.build.girth, person.build
    torso = sleeves = shirt = _cloth(rng, patterned=0.5)
    layer = pick(rng, "layers")
    if layer != "shirt":
        jacket = _cloth(rng, patterned=0.2)
        opening = {"open jacket": rng.uniform(0.35, 0.65), "zipped jacket": 0.0, "vest": rng.uniform(0.2, 0.4)}[layer]
        torso = _paint(jacket, np.abs(U) < opening, shirt)
        if layer == "zipped jacket":
            torso = _paint(torso, np.abs(U) < 0.1, _dye(rng, unlike=jacket))
        sleeves = shirt if layer == "vest" else jacket
    elif rng.random() < 0.3:  # an emblem on the chest
        spot = _near(U, rng.uniform(-0.4, 0.4), rng.uniform(0.3, 0.7)) & _near(V, 0.32, rng.uniform(0.06, 0.13))
        torso = _paint(torso, spot, _dye(rng, unlike=torso))
    if rng.random() < 0.15:  # a print on the back
        spot = (np.abs(U) > np.pi - rng.uniform(0.4, 0.8)) & _near(V, 0.35, rng.uniform(0.08, 0.18))
        torso = _paint(torso, spot, _dye(rng, unlike=torso))
    if rng.random() < 0.3:
        torso = _paint(torso, _near(V, 0.93, 0.045), _dye(rng))  # belt
    torso = _paint(torso, (np.abs(U) < 0.5) & (V < 0.09), skin)  # neckline
    top, hip = build.shoulders + 0.022, (build.hips + 0.045) * girth**0.5
    waist = 0.5 * (top + hip) * (0.86 + 0.25 * (girth - 1))
    outer = 1.1 if layer in ("open jacket", "zipped jacket") else 1.0
    widths = tuple(outer * width for width in (0.45 * top, 0.88 * top, top, 0.95 * top, waist, hip, 0.93 * hip))
    person.pieces["torso"] = Piece(torso, widths, 0.58 + 0.2 * (girth - 1), round=False)
    person.pieces["neck"] = Piece(_plain(skin, rng), (0.026, 0.028))
    if outer > 1 and "skirt" not in person.pieces and rng.random() < 0.45:  # a coat
        tail = torso[::-1][: ROWS // 2].repeat(2, axis=0)
        widths = (0.95 * hip, 1.08 * hip, 1.16 * hip, 1.22 * hip)
        person.pieces["skirt"] = Piece(np.ascontiguousarray(tail), widths, 0.75, round=False)
    return sleeves


def _dress_arms(person: Person, skin: np.ndarray, cloth: np.ndarray, rng: np.random.Generator) -> None:
    girth = person.build.girth
    bare = _plain(skin, rng)
    if rng.random() < 0.18:
        cloth = _cloth(rng, patterned=0.3)  # contrasting sleeves
    length = pick(rng, "sleeves")
    upper = _paint(bare, length > V, cloth)
    if length == 0.6 and rng.random() < 0.3:
        upper = _paint(upper, _near(V, 0.57, 0.06), _dye(rng, unlike=cloth))  # trimmed sleeve
    lower = _paint(bare, V < 0.74, cloth) if length > 1 else bare
    if length > 1 and rng.random() < 0.25:
        lower = _paint(lower, _near(V, 0.66, 0.08), _dye(rng, unlike=cloth))  # cuff
    thick = 1.12 if length > 1 else 1.0
    person.wear_both("upper_arm", upper, (0.033 * girth * thick, 0.031 * girth * thick, 0.027 * girth))
    person.wear_both("forearm", lower, (0.026 * girth, 0.023 * girth, 0.019, 0.02))


def _dress_head(person: Person, skin: np.ndarray, rng: np.random.Generator) -> None:
    def width(*widths: float) -> tuple[float, ...]:
        return tuple(person.build.head * w for w in widths)

    shares, hairs = zip(*MATERIALS["hairs"], strict=True)
    hair = _vary(hairs[rng.choice(len(hairs), p=shares)], rng, 0.05)
    style = pick(rng, "heads")
    head = np.broadcast_to(skin, (ROWS, COLUMNS, 3)).astype(np.float32)
    mouth = _near(U, 0, 0.3)
    head = _paint(head, _near(V, 0.48, 0.05) & _near(np.abs(U), 0.4, 0.17), 0.25 * skin)  # eyes
    head = _paint(head, _near(V, 0.5, 0.1) & (np.abs(U) < 0.1), 0.85 * skin)  # nose
    head = _paint(head, _near(V, 0.74, 0.03) & mouth, skin * (0.55, 0.55, 0.8))
    if rng.random() < 0.18:
        head = _paint(head, (V > 0.66) & (np.abs(U) < 1.1) & ~(_near(V, 0.74, 0.04) & mouth), hair)  # beard
    if rng.random() < 0.2:
        head = _paint(head, _near(V, 0.48, 0.08) & _near(np.abs(U), 0.42, 0.32), np.full(3, 0.08))  # dark glasses
    if style in ("hood", "scarf"):
        cloth = person.pieces["torso"].texture[4, COLUMNS // 4] if style == "hood" else _dye(rng)
        head = _paint(head, (V < 0.22) | (np.abs(U) > 0.8), cloth)
    elif style != "bald":
        head = _paint(head, (V < 0.3) | ((np.abs(U) > 1.15) & (V < 0.78)), hair)
    if style == "cap":
        head = _paint(head, V < 0.34, _dye(rng))
    person.pieces["head"] = Piece(head, width(0.044, 0.05, 0.05, 0.045, 0.034))
    strand = _plain(hair, rng)
    if style == "long":
        person.pieces["locks"] = Piece(strand, width(0.045, 0.056, 0.062, 0.06, 0.05), 0.6)
    elif style == "bun":
        person.pieces["bun"] = Piece(strand, (0.03, 0.036, 0.03))


def _hand_bags(person: Person, rng: np.random.Generator) -> None:
    kind = pick(rng, "bags")
    cloth = _cloth(rng, patterned=0.35)
    if kind == "none":
        return
    person.pieces[kind.replace(" ", "_")] = Piece(cloth, **MATERIALS["bag_shapes"][kind])
    if kind != "hand bag":
        across = np.abs(V - 0.5 - 0.42 * np.sin(-U)) < 0.05
        straps = _near(np.abs(U), 0.75, 0.16) & (V < 0.55) if kind == "backpack" else across
        torso = person.pieces["torso"]
        person.pieces["torso"] = replace(torso, texture=_paint(torso.texture, straps, cloth.mean((0, 1)) * 0.8))
