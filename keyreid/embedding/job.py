"""Embed tracklets of shards into a vector file, in parts: resumable, and on any number of ranks with the same result.

Tracklets are cut, in their order, into parts of about PART_FRAMES frames; how many ranks there are does not change the
parts. Rank r of R embeds parts r, r + R, ... by itself, without talking to the others, and writes each as a file beside
the output (`OUT.parts/`). Whoever finds all parts there joins them. Run again, parts that are there are kept.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from keyreid.checkpoints.trained import Trained
from keyreid.distributed.ranks import Ranks
from keyreid.embedding.description import describe
from keyreid.embedding.features import about_vectors, extract
from keyreid.embedding.vectors import VectorFiles, read_about, write_vectors
from keyreid.errors import DataError
from keyreid.files import sha256
from keyreid.ownership import owned
from keyreid.progress import track
from keyreid.shards.shard_set import ShardSet

PART_FRAMES = 8192


@dataclass(frozen=True)
class EmbedSettings:
    """What is kept of each tracklet.

    Attributes:
        features: the whole evaluation vector, or its global part alone (for large galleries: 25 times smaller).
        pictures: keep a small picture of the middle frame, so that results can be shown.
    """

    features: Literal["whole", "global"] = "whole"
    dtype: Literal["float32", "float16"] = "float32"
    pictures: bool = True


class EmbeddingJob:
    """One output file and the parts it is made of; clip, clips of a tracklet and batch size are those of `trained`."""

    def __init__(
        self, trained: Trained, shards: ShardSet, positions: Sequence[int], out: Path, settings: EmbedSettings
    ) -> None:
        self.trained, self.shards, self.out, self.settings = trained, shards, out, settings
        self.positions = np.asarray(positions, np.int64)
        self.parts = cut(shards.index.frames[self.positions], PART_FRAMES)
        self.folder = out.with_name(f"{out.name}.parts")
        self.paths = [self.folder / f"part-{number:05d}.parquet" for number in range(len(self.parts))]
        self.cameras_known = trained.knows_cameras(shards)
        about = about_vectors(trained.network, shards, self.cameras_known, weights_identity(trained))
        width = about.width if settings.features == "whole" else about.global_width
        fingerprint = self._fingerprint(about.weights["sha256"])
        self.about = replace(about, width=width, dtype=settings.dtype, fingerprint=fingerprint)

    @property
    def done(self) -> bool:
        """Whether the output is there, made of the same tracklets by the same network and settings."""
        return self._is_ours(self.out)

    def run(self, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu") -> int:
        """Embed this rank's parts that are not there yet; gives how many it embedded."""
        if self.done:
            return 0
        mine = range(rank, len(self.parts), world_size)
        todo = [number for number in mine if not self._is_ours(self.paths[number])]
        if rank == 0 and len(todo) < len(mine):
            print(f"{len(mine) - len(todo)} of {len(mine)} parts are there already")
        self.trained.network.to(device)
        for number in track(todo, len(todo), "embedding", "parts", quiet=rank > 0 or len(todo) < 2):
            positions = self.positions[self.parts[number].start : self.parts[number].stop]
            alone, config = Ranks.alone(device), self.trained.config
            vectors = extract(self.trained.network, self.shards, positions, config, alone, self.cameras_known)
            described = describe(self.shards, positions, times=True, pictures=self.settings.pictures)
            kept = vectors.vectors[:, : self.about.width]
            part = replace(vectors, about=self.about, described=described, vectors=kept)
            write_vectors(self.paths[number], self.about, [part.table])
        return len(todo)

    def join(self) -> int | None:
        """Write the output where all parts are there; gives its rows, or None while parts are missing."""
        with owned(self.out.parent, "keyreid embed", f"{self.out.name}.parts", wait=True):
            if not self.done:
                if not all(map(self._is_ours, self.paths)):
                    return None
                columns = self.about.schema.names
                blocks = itertools.chain.from_iterable(VectorFiles([path]).blocks(columns) for path in self.paths)
                write_vectors(self.out, self.about, (table for _, table in blocks))
            shutil.rmtree(self.folder, ignore_errors=True)
        return len(self.positions)

    def _fingerprint(self, weights: str) -> str:
        config, settings = self.trained.config, self.settings
        decides = {
            "weights": weights,
            "shards": [shard["sha256"] for shard in self.shards.card["shards"]],
            "positions": hashlib.sha256(self.positions.tobytes()).hexdigest(),
            "clips": config.evaluation.clips,
            "guidance_from": config.data.guidance_from,
            "settings": [settings.features, settings.dtype, settings.pictures, self.cameras_known],
        }
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def _is_ours(self, path: Path) -> bool:
        try:
            return read_about(path).fingerprint == self.about.fingerprint
        except DataError:
            return False


def weights_identity(trained: Trained) -> dict[str, str]:
    """What vectors say of their network: `name`, the run and step or else the file's name, and `sha256` of the file."""
    about = trained.header.about if trained.header else {}
    name = " step ".join(str(about[key]) for key in ("run", "step") if key in about) if "run" in about else ""
    return {"name": name or trained.file.name, "sha256": sha256(trained.file)}


def cut(frames: Sequence[int] | np.ndarray, frames_a_part: int) -> list[range]:
    """Cut tracklets into runs of about so many frames, none empty."""
    number = (np.cumsum(frames, dtype=np.int64) - 1) // frames_a_part
    starts = np.flatnonzero(np.diff(number, prepend=-1)).tolist()
    return [range(start, end) for start, end in itertools.pairwise([*starts, len(frames)])]
