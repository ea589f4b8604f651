"""Windows: how many whole shards a lane reads from at a time, and what that asks of the way a set was packed."""

import math

import numpy as np

from keyreid.config import DataConfig
from keyreid.errors import ConfigError
from keyreid.shards.training_set import TrainingIdentities


class Windows:
    """The S shards that hold training tracklets, and how a lane's are cut into windows.

    Attributes:
        shard: int64 [S], position of each in the card.
        identities: int64 [S], training identities in each.
        groups: int64 [S], their groups of K tracklets, see sampling.py.
        shards: of a window, at least, unless a lane has fewer.
    """

    def __init__(self, training: TrainingIdentities, data: DataConfig) -> None:
        """Find them; ConfigError where identities lie in several shards, or there are too few for the lanes."""
        first, last = training.first_and_last_shard()
        if spilling := int((first != last).sum()):
            raise ConfigError(
                f"data.window={data.window}: {spilling} of {len(first)} training identities have tracklets in several "
                "shards; pack the dataset with --order identities, or set data.window=0"
            )
        self._wide, self._lanes = data.identities // data.lanes, data.lanes
        self.shard, unit, self.identities = np.unique(first, return_inverse=True, return_counts=True)
        self._labels = np.split(np.argsort(unit, kind="stable"), np.cumsum(self.identities)[:-1])
        groups = -(-training.count // data.tracklets)
        self.groups = np.bincount(unit, groups).astype(np.int64)
        self._most_groups = int(groups.max())  # of an identity
        self.shards = math.ceil(data.window / self.identities.mean())
        if len(self.shard) < data.lanes:
            raise ConfigError(f"data.lanes={data.lanes}, but only {len(self.shard)} shards hold training tracklets")
        few = int(np.sort(self.identities)[: self._fewest()].sum())
        if few < self._wide:
            raise ConfigError(
                f"data.window={data.window}: a window may hold {few} identities, a lane's step takes {self._wide} "
                "(data.identities / data.lanes); set a larger window, or pack larger shards"
            )

    def of_lane(self, units: np.ndarray) -> list[np.ndarray]:
        """A lane's shards, cut into windows."""
        return np.array_split(units, self._count(len(units)))

    def labels(self, units: np.ndarray) -> np.ndarray:
        """The training identities in some of the shards, ascending."""
        return np.sort(np.concatenate([self._labels[unit] for unit in units.tolist()]))

    def most_steps(self, units: np.ndarray) -> int:
        """A bound of the steps that a lane of these shards, or of lighter ones, has in an epoch."""
        windows = self._count(math.ceil(len(self.shard) / self._lanes))
        fewest_steps = -(-int(np.sort(self.groups)[: self._fewest()].sum()) // self._wide)
        # A window has as many steps as its groups fill, the last one perhaps not whole, or as its largest identity has.
        longer = max(0, self._most_groups - fewest_steps)
        return (int(self.groups[units].sum()) + windows * (self._wide - 1)) // self._wide + windows * longer

    def _count(self, shards: int) -> int:
        """Windows of a lane with so many shards."""
        return max(1, shards // self.shards)

    def _fewest(self) -> int:
        """Shards of the smallest window."""
        lanes = {len(self.shard) // self._lanes, math.ceil(len(self.shard) / self._lanes)}
        return min(shards // self._count(shards) for shards in lanes)
