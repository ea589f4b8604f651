"""Small datasets whose every picture says which tracklet and frame it is, packed for tests of shards and readers."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from keyreid.config import Config, check_config
from keyreid.datasets.tracklet import Dataset, Frame, Tracklet
from keyreid.shards.index_file import ShardIndex
from keyreid.shards.layout import plan_shards
from keyreid.shards.members import SPLITS, members_of
from keyreid.shards.pack import finish, pack
from keyreid.shards.set_index import SetIndex
from keyreid.shards.shard_set import ShardSet
from keyreid.shards.storage import LocalShardFiles
from keyreid.shards.writer import PackSettings

WIDTH, HEIGHT = 32, 64
_BLOCK = 16, 8  # pixels of one bit: rows, columns
_BITS = 16


def coded_picture(code: int, width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: 4 x 4 grey blocks, one a bit of `code`, with a little noise; survives JPEG."""
    bits = (code >> np.arange(_BITS) & 1).reshape(4, 4)
    picture = np.kron(np.where(bits, 215, 40), np.ones(_BLOCK))
    picture = picture + np.random.default_rng(seed).integers(-15, 16, picture.shape)
    picture = np.repeat(picture[..., None], 3, 2).astype(np.uint8)
    return picture if (width, height) == (WIDTH, HEIGHT) else cv2.resize(picture, (width, height))


def read_code(image: np.ndarray, flip: bool, crop: np.ndarray) -> int:
    """The code of a reader's uint8 [3, H, W] picture, whose flip and crop are undone."""
    rows = (np.arange(4) + 0.5) * _BLOCK[0] - crop[0]
    columns = (np.arange(4) + 0.5) * _BLOCK[1]
    columns = (WIDTH - 1 - columns if flip else columns) - crop[1]
    bits = image[0][rows.astype(int)[:, None], columns.astype(int)] > 128
    return int((bits.reshape(-1) << np.arange(_BITS)).sum())


def make_dataset(
    root: Path,
    identities: int = 8,
    tracklets: int = 4,
    frames: tuple[int, int] = (2, 9),
    size: tuple[int, int] = (WIDTH, HEIGHT),
    suffix: str = ".jpg",
    cameras: int = 3,
    name: str = "toy",
) -> Dataset:
    """A dataset on disk: half of the identities train; the picture's code is 64 x the tracklet + the frame."""
    rng = np.random.default_rng(1)
    records = []
    for identity in range(identities):
        for number in range(tracklets):
            position, camera = len(records), number % cameras + 1
            key = f"{identity:04d}C{camera}T{number:04d}"
            total = int(rng.integers(*frames, endpoint=True))
            (root / key).mkdir(parents=True)
            paths = [root / key / f"{frame:03d}{suffix}" for frame in range(total)]
            for frame, path in enumerate(paths):
                picture = coded_picture(64 * position + frame, *size, seed=64 * position + frame)
                cv2.imwrite(str(path), picture, [cv2.IMWRITE_JPEG_QUALITY, 90] if suffix == ".jpg" else [])
            keypoints = np.concatenate([rng.uniform(0, size, (total, 17, 2)), rng.uniform(0, 1, (total, 17, 1))], 2)
            split = "train" if identity < identities // 2 else "query" if number == 0 else "gallery"
            pictures = tuple(Frame(path) for path in paths)
            records.append(Tracklet(key, identity, camera, split, pictures, keypoints.astype(np.float32)))
    return Dataset(name, tuple(records))


def pack_dataset(dataset: Dataset, root: Path, out: Path, target_bytes: int = 150_000, **settings) -> ShardSet:
    """Pack in this process and open the result."""
    plan = plan_shards(dataset, PackSettings(root, **settings), target_bytes)
    pack(plan, out, quiet=True)
    finish(plan, out)
    return ShardSet.open(out)


def read_named(shards: ShardSet, position: int, name: str) -> bytes:
    """A member of a tracklet by the name after `KEY.`; KeyError where it has none of that name."""
    names = {shards.index.member_name(position, n): n for n in range(members_of(shards.tracklets[position].frames))}
    return shards.read_member(position, names[name])


def make_config(shards: Path | str, **overrides) -> Config:
    """A configuration for the small pictures: clips of 4 x 64 x 32, patches of 16; overrides as `data__reader`."""
    values = {
        "data": {
            "shards": str(shards),
            "reader": "plain",
            "identities": 2,
            "tracklets": 2,
            "augment": {"pad_pixels": 3},
        },
        "clip": {"height": HEIGHT, "width": WIDTH},
        "model": {},
    }
    for name, value in overrides.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    return check_config(values, "test")


def index_only(
    identities: np.ndarray, cameras: np.ndarray, frames: np.ndarray, splits: list | None = None, split: str = "train"
) -> ShardSet:
    """A set of shards without the shards, for plans: one tracklet for each entry of the arrays."""
    total, members = int(frames.sum()), int(members_of(frames).sum())
    nothing = {"offset": np.zeros(members, "i8"), "size": np.zeros(members, "u4"), "crc": np.zeros(members, "u4")}
    pictures = {name: np.zeros(total, "u2") for name in ("picture", "width", "height", "visible")}
    keys = np.array([f"t{number}" for number in range(len(frames))])
    code = np.full(len(frames), SPLITS.index(split), "u1")
    index = ShardIndex({"parts": 6}, keys, identities, cameras, code, frames, **nothing, **pictures)
    card = {
        "cameras": sorted(set(cameras.tolist())),
        "splits": splits or [],
        "query_camera": 1 if splits else None,
        "shards": [],
    }
    return ShardSet("index only", card, SetIndex.joined([index]), LocalShardFiles([]))
