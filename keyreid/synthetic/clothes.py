"""What makes a rendered pedestrian someone: clothes with colours and patterns, hair, skin and bags.

Every garment is a texture around the body: rows run from top to bottom, columns run once around, from the back over
the person's right side, the front (the middle column) and the left side to the back again. Colours are BGR in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from keyreid.synthetic.body import Build, Gait

ROWS, COLUMNS = 64, 96
V, U = np.meshgrid(
    (np.arange(ROWS) + 0.5) / ROWS, ((np.arange(COLUMNS) + 0.5) / COLUMNS - 0.5) * 2 * np.pi, indexing="ij"
)

# Streets are mostly black, grey, white, blue and brown; the weight comes first.
DYES = (
    (2.0, (0.09, 0.09, 0.10)),
    (1.0, (0.25, 0.25, 0.26)),
    (1.0, (0.52, 0.52, 0.53)),
    (1.8, (0.90, 0.90, 0.90)),
    (1.8, (0.32, 0.17, 0.12)),  # navy
    (1.5, (0.58, 0.38, 0.24)),  # denim
    (1.2, (0.75, 0.40, 0.15)),  # blue
    (0.9, (0.87, 0.74, 0.58)),  # sky
    (1.3, (0.17, 0.13, 0.72)),  # red
    (0.8, (0.20, 0.12, 0.42)),  # burgundy
    (0.8, (0.70, 0.52, 0.88)),  # pink
    (0.8, (0.15, 0.50, 0.93)),  # orange
    (0.9, (0.25, 0.80, 0.93)),  # yellow
    (0.9, (0.22, 0.40, 0.38)),  # olive
    (1.0, (0.30, 0.55, 0.20)),  # green
    (0.8, (0.58, 0.58, 0.18)),  # teal
    (0.8, (0.60, 0.22, 0.45)),  # purple
    (1.2, (0.18, 0.28, 0.43)),  # brown
    (1.2, (0.60, 0.72, 0.80)),  # beige
)
SKINS = (
    (0.66, 0.76, 0.93),
    (0.55, 0.68, 0.88),
    (0.42, 0.56, 0.78),
    (0.30, 0.42, 0.63),
    (0.20, 0.29, 0.46),
    (0.13, 0.19, 0.31),
)
HAIRS = (
    (0.06, 0.06, 0.07),
    (0.10, 0.14, 0.20),
    (0.16, 0.26, 0.40),
    (0.35, 0.62, 0.82),
    (0.16, 0.24, 0.55),
    (0.62, 0.62, 0.63),
)
PATTERNS = ("hoops", "pinstripes", "check", "dots", "yoke", "sash", "fade", "band", "camouflage")


@dataclass(frozen=True)
class Part:
    """One drawn piece of the body.

    Attributes:
        texture: float32 [ROWS, COLUMNS, 3].
        widths: half widths from top to bottom, in units of the body's height.
        depth: front-to-back over side-to-side extent.
        round: whether the ends are half circles (limbs) or straight (hems).
    """

    texture: np.ndarray
    widths: tuple[float, ...]
    depth: float = 1.0
    round: bool = True


@dataclass
class Person:
    """An identity: build, gait and the drawn parts by name."""

    build: Build
    gait: Gait
    parts: dict[str, Part] = field(default_factory=dict)


def dress(rng: np.random.Generator) -> Person:
    """Draw a person; the same generator state gives the same person."""
    build, gait = Build.draw(rng), Gait.draw(rng)
    person = Person(build, gait)
    skin = _vary(SKINS[rng.integers(len(SKINS))], rng, 0.04)
    _dress_legs(person, skin, rng)
    sleeve_cloth = _dress_torso(person, skin, rng)
    _dress_arms(person, skin, sleeve_cloth, rng)
    _dress_head(person, skin, rng)
    _hand_bags(person, rng)
    return person


def _dye(rng: np.random.Generator, unlike: np.ndarray | None = None) -> np.ndarray:
    """A cloth colour; with `unlike`, one that can be told from it."""
    weights = np.array([weight for weight, _ in DYES])
    while True:
        colour = _vary(DYES[rng.choice(len(DYES), p=weights / weights.sum())][1], rng, 0.06)
        if unlike is None or np.abs(colour - unlike).max() > 0.25:
            return colour


def _vary(colour: tuple[float, ...], rng: np.random.Generator, amount: float) -> np.ndarray:
    tint = np.array(colour) * np.exp(rng.normal(0, 2 * amount)) + rng.normal(0, amount / 2, 3)
    return np.clip(tint, 0.03, 0.97)


def _cloth(rng: np.random.Generator, patterned: float, base: np.ndarray | None = None) -> np.ndarray:
    """A texture: one colour, or with probability `patterned` a pattern of two."""
    first = _dye(rng) if base is None else base
    second = _dye(rng, unlike=first)
    plain = np.broadcast_to(first, (ROWS, COLUMNS, 3))
    if rng.random() >= patterned:
        return _fold(plain, rng)
    mask = _pattern(PATTERNS[rng.integers(len(PATTERNS))], rng)
    return _fold(plain + mask[..., None] * (second - first), rng)


def _pattern(kind: str, rng: np.random.Generator) -> np.ndarray:
    """[ROWS, COLUMNS] share of the second colour."""
    rows, columns, phase = rng.uniform(3, 6.5), rng.integers(7, 14), rng.random()
    width = rng.uniform(0.35, 0.6)
    hoops = ((V * rows + phase) % 1 < width).astype(float)
    stripes = ((U / (2 * np.pi) * columns + phase) % 1 < width).astype(float)
    if kind == "hoops":
        return hoops
    if kind == "pinstripes":
        return stripes
    if kind == "check":
        return 0.5 * (hoops + stripes)
    if kind == "dots":
        return ((np.cos(2 * np.pi * V * rows) * np.cos(U * (columns // 2))) > 0.35).astype(float)
    if kind == "yoke":
        return (rng.uniform(0.3, 0.6) > V).astype(float)
    if kind == "sash":
        return (np.abs(V - 0.5 - rng.choice([-1, 1]) * 0.28 * np.sin(U)) < 0.12).astype(float)
    if kind == "fade":
        return V
    if kind == "band":
        return (np.abs(V - rng.uniform(0.3, 0.7)) < rng.uniform(0.08, 0.16)).astype(float)
    waves = sum(np.sin(rng.normal(0, 12) * V + rng.integers(-6, 7) * U + 6 * rng.random()) for _ in range(5))
    return (waves > 0.4).astype(float)  # camouflage


def _fold(texture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darken and lighten along a few creases."""
    creases = sum(
        np.sin(rng.normal(0, 9) * V + rng.integers(-4, 5) * U + 6 * rng.random()) * rng.uniform(0.01, 0.035)
        for _ in range(4)
    )
    return np.clip(texture * (1 + creases[..., None]), 0, 1).astype(np.float32)


def _paint(texture: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], np.asarray(colour, np.float32), texture).astype(np.float32)


def _mirrored(texture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(texture[:, ::-1])


def _dress_legs(person: Person, skin: np.ndarray, rng: np.random.Generator) -> None:
    girth = person.build.girth
    kind = rng.choice(["trousers", "shorts", "skirt", "dress"], p=[0.62, 0.16, 0.14, 0.08])
    cloth = _cloth(rng, patterned=0.35)
    bare = _fold(np.broadcast_to(skin if rng.random() < 0.75 else _dye(rng), cloth.shape), rng)  # skin or tights
    wide = rng.uniform(1.0, 1.35) if kind == "trousers" else 1.0
    if kind == "trousers" and rng.random() < 0.3:
        cloth = _paint(cloth, np.abs(U - np.pi / 2) < 0.45, _dye(rng, unlike=cloth.mean((0, 1))))  # outer side stripe
    thigh = cloth if kind in ("trousers", "shorts") else bare
    shank = cloth if kind == "trousers" else bare
    if kind == "trousers" and rng.random() < 0.2:
        shank = _paint(shank, rng.uniform(0.55, 0.85) < V, _dye(rng, unlike=cloth.mean((0, 1))))  # cuffs, boots
    elif rng.random() < 0.4:
        shank = _paint(shank, rng.uniform(0.55, 0.92) < V, _dye(rng, unlike=shank.mean((0, 1))))  # socks, boots
    widths_thigh = (0.057 * girth, 0.052 * girth, 0.04 * girth * wide)
    widths_shank = (0.039 * girth * wide, 0.036 * girth * wide, (0.022 if shank is bare else 0.027 * wide) * girth)
    shoe = np.broadcast_to(_dye(rng), cloth.shape)
    if rng.random() < 0.5:
        shoe = _paint(shoe, np.abs(U) > 2.2, _dye(rng, unlike=shoe[0, 0]))  # the sole: back of a toe that hangs
    for side, turn in (("left", lambda t: t), ("right", _mirrored)):
        person.parts[f"{side}_thigh"] = Part(turn(thigh), widths_thigh)
        person.parts[f"{side}_shank"] = Part(turn(shank), widths_shank)
        person.parts[f"{side}_foot"] = Part(turn(shoe.astype(np.float32)), (0.026, 0.029, 0.022))
    if kind in ("skirt", "dress"):
        flare = rng.uniform(1.0, 1.5)
        hips = (person.build.hips + 0.042) * girth**0.5
        person.parts["skirt"] = Part(cloth, (0.8 * hips, hips, hips * (1 + flare) / 2, hips * flare), 0.8, round=False)


def _dress_torso(person: Person, skin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Also gives the cloth of the sleeves."""
    girth, build = person.build.girth, person.build
    shirt = _cloth(rng, patterned=0.5)
    sleeves = shirt
    layer = rng.choice(["shirt", "open jacket", "zipped jacket", "vest"], p=[0.62, 0.14, 0.18, 0.06])
    if layer != "shirt":
        jacket = _cloth(rng, patterned=0.2)
        opening = {"open jacket": rng.uniform(0.35, 0.65), "zipped jacket": 0.0, "vest": rng.uniform(0.2, 0.4)}[layer]
        torso = np.where((np.abs(U) < opening)[..., None], shirt, jacket)
        if layer == "zipped jacket":
            torso = _paint(torso, np.abs(U) < 0.1, _dye(rng, unlike=jacket.mean((0, 1))))
        sleeves = shirt if layer == "vest" else jacket
    else:
        torso = shirt
        if rng.random() < 0.3:  # an emblem on the chest
            spot = (np.abs(U - rng.uniform(-0.4, 0.4)) < rng.uniform(0.3, 0.7)) & (
                np.abs(V - 0.32) < rng.uniform(0.06, 0.13)
            )
            torso = _paint(torso, spot, _dye(rng, unlike=torso.mean((0, 1))))
    if rng.random() < 0.15:  # a print on the back
        spot = (np.abs(U) > np.pi - rng.uniform(0.4, 0.8)) & (np.abs(V - 0.35) < rng.uniform(0.08, 0.18))
        torso = _paint(torso, spot, _dye(rng, unlike=torso.mean((0, 1))))
    if rng.random() < 0.3:
        torso = _paint(torso, np.abs(V - 0.93) < 0.045, _dye(rng))  # belt
    torso = _paint(torso, (np.abs(U) < 0.5) & (V < 0.09), skin)  # neckline
    top, hip = build.shoulders + 0.022, (build.hips + 0.045) * girth**0.5
    waist = 0.5 * (top + hip) * (0.86 + 0.25 * (girth - 1))
    outer = 1.1 if layer in ("open jacket", "zipped jacket") else 1.0
    widths = tuple(outer * width for width in (0.45 * top, 0.88 * top, top, 0.95 * top, waist, hip, 0.93 * hip))
    person.parts["torso"] = Part(torso.astype(np.float32), widths, 0.58 + 0.2 * (girth - 1), round=False)
    person.parts["neck"] = Part(_fold(np.broadcast_to(skin, torso.shape), rng), (0.026, 0.028))
    if layer in ("open jacket", "zipped jacket") and "skirt" not in person.parts and rng.random() < 0.45:  # a coat
        tail = np.roll(torso[::-1], 0, axis=0)[: ROWS // 2].repeat(2, axis=0)
        person.parts["skirt"] = Part(
            np.ascontiguousarray(tail), (0.95 * hip, 1.08 * hip, 1.16 * hip, 1.22 * hip), 0.75, round=False
        )
    return sleeves


def _dress_arms(person: Person, skin: np.ndarray, cloth: np.ndarray, rng: np.random.Generator) -> None:
    girth = person.build.girth
    bare = _fold(np.broadcast_to(skin, cloth.shape), rng)
    if rng.random() < 0.18:
        cloth = _cloth(rng, patterned=0.3)  # contrasting sleeves
    length = rng.choice([0.0, 0.6, 2.0], p=[0.07, 0.38, 0.55])  # in upper arms
    upper = np.where((length > V)[..., None], cloth, bare).astype(np.float32)
    if length == 0.6 and rng.random() < 0.3:
        upper = _paint(upper, np.abs(V - 0.57) < 0.06, _dye(rng, unlike=cloth.mean((0, 1))))  # trimmed sleeve
    lower = np.where((V < 0.74)[..., None], cloth, bare) if length > 1 else bare
    if length > 1 and rng.random() < 0.25:
        lower = _paint(lower, np.abs(V - 0.66) < 0.08, _dye(rng, unlike=cloth.mean((0, 1))))  # cuff
    thick = 1.12 if length > 1 else 1.0
    for side, turn in (("left", lambda t: t), ("right", _mirrored)):
        person.parts[f"{side}_upper_arm"] = Part(
            turn(upper), (0.033 * girth * thick, 0.031 * girth * thick, 0.027 * girth)
        )
        person.parts[f"{side}_forearm"] = Part(
            turn(lower.astype(np.float32)), (0.026 * girth, 0.023 * girth, 0.019, 0.02)
        )


def _dress_head(person: Person, skin: np.ndarray, rng: np.random.Generator) -> None:
    scale = person.build.head
    hair = _vary(HAIRS[rng.choice(len(HAIRS), p=[0.32, 0.24, 0.16, 0.12, 0.06, 0.10])], rng, 0.05)
    style = rng.choice(
        ["bald", "short", "long", "bun", "cap", "hood", "scarf"], p=[0.07, 0.36, 0.24, 0.09, 0.12, 0.06, 0.06]
    )
    head = np.broadcast_to(skin, (ROWS, COLUMNS, 3)).astype(np.float32)
    head = _paint(head, (np.abs(V - 0.48) < 0.05) & (np.abs(np.abs(U) - 0.4) < 0.17), 0.25 * skin)  # eyes
    head = _paint(head, (np.abs(V - 0.5) < 0.1) & (np.abs(U) < 0.1), 0.85 * skin)  # nose
    head = _paint(head, (np.abs(V - 0.74) < 0.03) & (np.abs(U) < 0.3), skin * (0.55, 0.55, 0.8))  # mouth
    if rng.random() < 0.18:
        head = _paint(
            head, (V > 0.66) & (np.abs(U) < 1.1) & ~((np.abs(V - 0.74) < 0.04) & (np.abs(U) < 0.3)), hair
        )  # beard
    if rng.random() < 0.2:
        head = _paint(
            head, (np.abs(V - 0.48) < 0.08) & (np.abs(np.abs(U) - 0.42) < 0.32), np.full(3, 0.08)
        )  # dark glasses
    covered = (V < 0.3) | ((np.abs(U) > 1.15) & (V < 0.78))
    if style == "hood" or style == "scarf":
        cloth = person.parts["torso"].texture[4, COLUMNS // 4] if style == "hood" else _dye(rng)
        head = _paint(head, (V < 0.22) | (np.abs(U) > 0.8), cloth)
    elif style != "bald":
        head = _paint(head, covered, hair)
    if style == "cap":
        head = _paint(head, V < 0.34, _dye(rng))
    person.parts["head"] = Part(head, tuple(scale * w for w in (0.044, 0.05, 0.05, 0.045, 0.034)))
    strand = _fold(np.broadcast_to(hair, head.shape), rng)
    if style == "long":
        person.parts["locks"] = Part(strand, tuple(scale * w for w in (0.045, 0.056, 0.062, 0.06, 0.05)), 0.6)
    elif style == "bun":
        person.parts["bun"] = Part(strand, (0.03, 0.036, 0.03))


def _hand_bags(person: Person, rng: np.random.Generator) -> None:
    kind = rng.choice(["none", "backpack", "shoulder bag", "hand bag"], p=[0.5, 0.2, 0.18, 0.12])
    cloth = _cloth(rng, patterned=0.35)
    strap = cloth.mean((0, 1)) * 0.8
    torso = person.parts["torso"]
    if kind == "backpack":
        person.parts["backpack"] = Part(cloth, (0.06, 0.078, 0.08, 0.082, 0.075), 0.75)
        straps = (np.abs(np.abs(U) - 0.75) < 0.16) & (V < 0.55)
    elif kind == "shoulder bag":
        person.parts["shoulder_bag"] = Part(cloth, (0.045, 0.055, 0.06, 0.058), 0.7, round=False)
        straps = np.abs(V - 0.5 - 0.42 * np.sin(-U) * np.where(np.abs(U) < np.pi / 2, 1, 1)) < 0.05
    elif kind == "hand bag":
        person.parts["hand_bag"] = Part(cloth, (0.02, 0.05, 0.062, 0.06), 0.5, round=False)
        return
    else:
        return
    person.parts["torso"] = Part(_paint(torso.texture, straps, strap), torso.widths, torso.depth, torso.round)
