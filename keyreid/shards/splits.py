"""Which tracklets a split holds, and which identities are held out of training."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from keyreid.errors import DataError
from keyreid.shards.index_file import ShardIndex
from keyreid.shards.members import SPLITS

Selection = Literal["train", "query", "gallery", "junk", "all", "holdout_query", "holdout_gallery"]


@dataclass(frozen=True)
class Splits:
    """The splits of a set of shards, from its card and its index."""

    location: str
    card: dict[str, Any]
    index: ShardIndex

    def select(self, split: Selection, number: int, holdout: float) -> np.ndarray:
        """Positions of a split's tracklets, int64, ascending; see `ShardSet.select`."""
        if split == "all":
            return np.arange(len(self.index.key))
        if split.startswith("holdout_"):
            return self._holdout(split, number, holdout)
        chosen = self._with_nobody_held_out(split, number)
        if split == "train" and holdout:
            chosen = chosen[~np.isin(self.index.identity[chosen], self._held_out(number, holdout))]
        return chosen

    def _with_nobody_held_out(self, split: str, number: int) -> np.ndarray:
        splits = self.card["splits"]
        if not splits:
            if number:
                raise DataError(f"{self.location}: data.split_number={number}, but the dataset has one split")
            return np.flatnonzero(self.index.split == SPLITS.index(split))
        if number >= len(splits):
            raise DataError(f"{self.location}: data.split_number={number}, but its splits are 0 to {len(splits) - 1}")
        if split == "junk":
            return np.arange(0)
        chosen = np.isin(self.index.identity, splits[number]["train" if split == "train" else "test"])
        if split != "train":
            chosen &= (self.index.camera == self.card["query_camera"]) == (split == "query")
        return np.flatnonzero(chosen)

    def _held_out(self, number: int, holdout: float) -> np.ndarray:
        """The identities held out, evenly spaced in sorted order."""
        identities = np.unique(self.index.identity[self._with_nobody_held_out("train", number)])
        count = round(holdout * len(identities))
        return identities[((np.arange(count) + 0.5) * len(identities) / count).astype(np.int64)]

    def _holdout(self, split: str, number: int, holdout: float) -> np.ndarray:
        positions = self._with_nobody_held_out("train", number)
        positions = positions[np.isin(self.index.identity[positions], self._held_out(number, holdout))]
        if not len(positions):
            raise DataError(f"{self.location}: no identities are held out; set data.holdout, for example to 0.1")
        identity, camera = self.index.identity[positions], self.index.camera[positions]
        if self.card["query_camera"] is not None:
            return positions[(camera == self.card["query_camera"]) == (split == "holdout_query")]
        if split == "holdout_gallery":
            return positions
        # Each identity's first tracklet of each camera, where two cameras saw it.
        first = np.sort(np.unique(np.stack([identity, camera]), axis=1, return_index=True)[1])
        seen, cameras = np.unique(identity[first], return_counts=True)
        return positions[first[np.isin(identity[first], seen[cameras > 1])]]
