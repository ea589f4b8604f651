"""Embed tracklets of shards into a vector file, in parts: resumable, and on any number of ranks with the same result.

Tracklets are cut, in their order, into parts of about PART_FRAMES frames; how many ranks there are does not change the
parts. Rank r of R embeds parts r, r + R, ... by itself, without talking to the others, and writes each as a file beside
the output (`OUT.parts/`). Whoever finds all parts there joins them. Run again, parts that are there are kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock

from keyreid.checkpoints.trained import Trained
from keyreid.embedding.features import extract
from keyreid.embedding.vector_file import VectorFiles, VectorsAbout, make_table, read_about, write_vectors
from keyreid.errors import DataError
from keyreid.files import sha256
from keyreid.progress import track
from keyreid.shards.shard_set import ShardSet

PART_FRAMES = 8192
PICTURE_HEIGHT = 160  # pixels of the pictures kept for ranked lists
PICTURE_QUALITY = 80
UNKNOWN_IDENTITY = -2


@dataclass(frozen=True)
class EmbedSettings:
    """What is kept of each tracklet.

    Attributes:
        features: the whole evaluation vector, or its global part alone (for large galleries: 25 times smaller).
        dtype: of the stored vectors.
        pictures: keep a small picture of the middle frame, so that results can be shown.
        cameras_known: the network was trained on these very cameras.
    """

    features: Literal["whole", "global"] = "whole"
    dtype: Literal["float32", "float16"] = "float32"
    pictures: bool = True
    cameras_known: bool = False


class EmbeddingJob:
    """One output file and the parts it is made of.

    Args:
        trained: network and configuration; the clip, clips a tracklet and batch size come from there.
        shards: what is embedded.
        positions: which tracklets of it.
        out: the vector file.
    """

    def __init__(
        self, trained: Trained, shards: ShardSet, positions: Sequence[int], out: Path, settings: EmbedSettings
    ) -> None:
        network = trained.network
        self.trained, self.shards, self.out, self.settings = trained, shards, out, settings
        self.parts = cut([shards.tracklets[position].frames for position in positions], PART_FRAMES)
        self.positions = list(positions)
        self.folder = out.with_name(f"{out.name}.parts")
        whole = network.width + network.parts * network.part_width
        digest = sha256(trained.file)
        self.about = VectorsAbout(
            width=whole if settings.features == "whole" else network.width,
            parts=network.parts,
            global_width=network.width,
            dataset=str(shards.card["name"]),
            weights={"name": _weights_name(trained), "sha256": digest},
            dtype=settings.dtype,
            fingerprint=self._fingerprint(digest),
        )
        self._names = {
            kind: {number: name for name, number in names.items()} for kind, names in shards.card["names"].items()
        }

    @property
    def done(self) -> bool:
        """Whether the output is there, made of the same tracklets by the same network and settings."""
        return self._is_ours(self.out)

    def run(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu") -> int:
        """Embed this rank's parts that are not there yet; gives how many it embedded."""
        if self.done:
            return 0
        mine = range(rank, len(self.parts), world_size)
        todo = [number for number in mine if not self._is_ours(self._path(number))]
        if rank == 0 and len(todo) < len(mine):
            print(f"{len(mine) - len(todo)} of {len(mine)} parts are there already")
        self.trained.network.to(device)
        for number in track(todo, len(todo), "embedding", "parts", quiet=rank > 0 or len(todo) < 2):
            positions = [self.positions[row] for row in self.parts[number]]
            write_vectors(self._path(number), self.about, iter([self._embed(positions, device)]))
        return len(todo)

    def join(self) -> int | None:
        """Write the output where all parts are there; gives its rows, or None while parts are missing."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.out.with_name(f".{self.out.name}.lock")):
            if not self.done:
                paths = [self._path(number) for number in range(len(self.parts))]
                if not all(map(self._is_ours, paths)):
                    return None
                write_vectors(self.out, self.about, _tables(paths))
            shutil.rmtree(self.folder, ignore_errors=True)
        return len(self.positions)

    def _embed(self, positions: list[int], device: torch.device | str) -> pa.Table:
        known = self.settings.cameras_known
        vectors = extract(
            self.trained.network, self.shards, positions, self.trained.config, device=device, cameras_known=known
        )
        assert vectors is not None  # one rank
        columns = self._describe(positions)
        return make_table(self.about, columns, vectors.visibility, vectors.vectors[:, : self.about.width])

    def _describe(self, positions: list[int]) -> dict[str, list[Any]]:
        """The columns beside vector and visibility."""
        rows: dict[str, list[Any]] = {}
        rates = self.shards.card.get("frames_per_second", {})
        for position in positions:
            record = self.shards.tracklets[position]
            known = record.identity != UNKNOWN_IDENTITY
            camera = self._names.get("camera", {}).get(record.camera)
            first, last = numbered_frames(self.shards.metadata(position))
            rate = rates.get(camera)
            values = {
                "key": record.key,
                "identity": record.identity if known else None,
                "identity_name": self._names.get("identity", {}).get(record.identity) if known else None,
                "camera": record.camera,
                "camera_name": camera or str(record.camera),
                "frames": record.frames,
                "first_frame": first,
                "last_frame": last,
                "start_seconds": first / rate if rate and first is not None else None,
                "end_seconds": last / rate if rate and last is not None else None,
                "picture": self._picture(position) if self.settings.pictures else None,
            }
            for name, value in values.items():
                rows.setdefault(name, []).append(value)
        return rows

    def _picture(self, position: int) -> bytes:
        """The middle frame as a small JPEG."""
        picture = self.shards.picture(position, self.shards.tracklets[position].frames // 2)
        height, width = picture.shape[:2]
        if height > PICTURE_HEIGHT:
            size = max(1, round(width * PICTURE_HEIGHT / height)), PICTURE_HEIGHT
            picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        quality = [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY]
        return cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)[1].tobytes()

    def _fingerprint(self, weights: str) -> str:
        config, settings = self.trained.config, self.settings
        decides = {
            "weights": weights,
            "shards": [shard["sha256"] for shard in self.shards.card["shards"]],
            "positions": hashlib.sha256(np.asarray(self.positions, np.int64).tobytes()).hexdigest(),
            "clips": config.evaluation.clips,
            "guidance_from": config.data.guidance_from,
            "settings": [settings.features, settings.dtype, settings.pictures, settings.cameras_known],
        }
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def _is_ours(self, path: Path) -> bool:
        try:
            return read_about(path).fingerprint == self.about.fingerprint
        except DataError:
            return False


def cut(frames: Sequence[int], frames_a_part: int) -> list[range]:
    """Cut tracklets into runs of about so many frames, none empty."""
    ends = np.cumsum(frames)
    if not len(ends):
        return []
    number = (ends - 1) // frames_a_part
    starts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(ends)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def numbered_frames(metadata: dict[str, Any]) -> tuple[int | None, int | None]:
    """First and last frame number of a tracklet: in its video, or as its pictures' names end with."""
    numbers = metadata.get("video_frames")
    if numbers is None:
        source = metadata["source"]
        names = source["files"] if "files" in source else [source["file"]]
        found = [re.search(r"(\d+)\.[A-Za-z]+$", name) for name in names]
        if not all(found):
            return None, None
        numbers = [int(match[1]) for match in found if match]
    return numbers[0], numbers[-1]


def _weights_name(trained: Trained) -> str:
    """What the weights are called: the run and step where the file says them, else the file's name."""
    about = trained.header.about if trained.header else {}
    if "run" in about:
        return " step ".join(str(about[name]) for name in ("run", "step") if name in about)
    return trained.file.name


def _tables(paths: Sequence[Path]) -> Iterator[pa.Table]:
    for path in paths:
        for _, table in VectorFiles([path]).blocks(read_about(path).schema.names):
            yield table
