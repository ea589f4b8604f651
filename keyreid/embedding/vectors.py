"""Embedded tracklets and the file that keeps them, so that distances, protocols and pictures need no second pass."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from keyreid.embedding.distance import Embeddings
from keyreid.errors import DataError
from keyreid.evaluation.protocols import Side
from keyreid.files import replacing, writing


@dataclass(frozen=True)
class Vectors:
    """N embedded tracklets, in the order of the data set.

    Attributes:
        keys: str [N].
        identities: int64 [N]; -2 is unknown.
        cameras: int64 [N], numbers of the data set.
        frames: int64 [N], frames of each tracklet.
        vectors: float32 [N, D].
        visibility: float32 [N, P], the share of frames in which each part is seen.
        global_width: how many of the D entries are the global feature; P parts of equal width follow.
        dataset: name of the data set.
    """

    keys: np.ndarray
    identities: np.ndarray
    cameras: np.ndarray
    frames: np.ndarray
    vectors: np.ndarray
    visibility: np.ndarray
    global_width: int
    dataset: str = ""

    def __post_init__(self) -> None:
        lengths = {len(getattr(self, field.name)) for field in fields(self) if field.name in _ARRAYS}
        if len(lengths) > 1:
            shapes = ", ".join(f"{name} {np.shape(getattr(self, name))}" for name in _ARRAYS)
            raise DataError(f"vectors do not fit each other: {shapes}")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: np.ndarray | slice) -> Vectors:
        arrays = {name: getattr(self, name)[rows] for name in _ARRAYS}
        return Vectors(**arrays, global_width=self.global_width, dataset=self.dataset)

    def followed_by(self, other: Vectors) -> Vectors:
        """Both, one after the other."""
        arrays = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        return Vectors(**arrays, global_width=self.global_width, dataset=self.dataset)

    @property
    def side(self) -> Side:
        """Identities, cameras and frames, as protocols take them."""
        return Side(self.identities, self.cameras, self.frames)

    @property
    def embeddings(self) -> Embeddings:
        """Vectors and visibility, as distances take them."""
        return Embeddings(self.vectors, self.visibility, self.global_width)

    def rows_of(self, keys: list[str] | np.ndarray, source: str = "these vectors") -> np.ndarray:
        """int64 [n]: the rows of these tracklets.

        Raises:
            DataError: a tracklet is not among them.
        """
        place = {key: row for row, key in enumerate(self.keys.tolist())}
        missing = [key for key in keys if key not in place]
        if missing:
            raise DataError(f"{source} hold no tracklet {missing[0]} ({len(missing)} are missing): embed them first")
        return np.array([place[key] for key in keys], np.int64)

    def save(self, path: Path) -> None:
        """Write an `.npz` file; nothing in it is pickled.

        Raises:
            KeyreidError: it cannot be written.
        """
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, alone=True) as partial, partial.open("wb") as file:  # hours of work: never half of it
                np.savez(file, **arrays, global_width=self.global_width, dataset=self.dataset)

    @staticmethod
    def load(path: Path) -> Vectors:
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, damaged, or holds other arrays.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                return Vectors(**arrays, global_width=int(file["global_width"]), dataset=str(file["dataset"]))
        except FileNotFoundError:
            raise DataError(f"{path}: no such file") from None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: not a file of vectors ({error})") from None


_ARRAYS = ("keys", "identities", "cameras", "frames", "vectors", "visibility")
