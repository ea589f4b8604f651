"""Whom a run trains on: the training identities of a split, and the tracklets of any of them."""

import numpy as np

from keyreid.config import DataConfig
from keyreid.errors import ConfigError, DataError
from keyreid.shards.sampling import TrainingTracklets
from keyreid.shards.shard_set import ShardSet


class TrainingIdentities:
    """The C training identities, labelled in sorted order, without those held out.

    Attributes:
        count: int64 [C], training tracklets of each.
    """

    def __init__(self, shards: ShardSet, data: DataConfig) -> None:
        """Find them; DataError where there are none, ConfigError where there are fewer than a step needs."""
        self._shards, self._index, self._split = shards, shards.index, data.split_number
        count = shards.training_counts(data.split_number, data.holdout)
        self._person = np.flatnonzero(count)  # of each label
        self._label = np.cumsum(count > 0) - 1  # of each person
        self.count = count[self._person]
        if not len(self.count):
            raise DataError(f"{shards.location}: split {data.split_number} has no training tracklets")
        if data.identities > len(self.count):
            there = f"{shards.location} has {len(self.count)} training identities"
            raise ConfigError(f"data.identities={data.identities}, but {there}")

    def labels(self, positions: np.ndarray) -> np.ndarray:
        """The labels of training tracklets."""
        return self._label[self._index.person[positions]]

    def frames(self, positions: np.ndarray) -> np.ndarray:
        """How many frames tracklets have."""
        return self._index.frames[positions]

    def first_and_last_shard(self) -> tuple[np.ndarray, np.ndarray]:
        """The shards of each identity's first and last training tracklet: int64 [C] each."""
        rows = self.tracklets()
        return tuple(self._index.shard(rows.position[at]) for at in (rows.start, rows.start + rows.count - 1))

    def tracklets(self, labels: np.ndarray | None = None) -> TrainingTracklets:
        """The tracklets of all, or of those with these ascending labels, which are numbered anew there."""
        persons = self._person if labels is None else self._person[labels]
        count = self.count if labels is None else self.count[labels]
        positions = self._index.of_identities(persons)
        positions = positions[self._shards.in_split("train", self._split, positions)]
        columns = positions, np.repeat(np.arange(len(count)), count), self._shards.cameras[positions]
        return TrainingTracklets(*columns, self.frames(positions), count, np.cumsum(count) - count)
