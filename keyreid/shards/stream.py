"""The streaming reader: whole tars from front to back by the webdataset library, nothing kept on disk.

For evaluating and embedding remote shards once: each shard is read through a single time as long as the clips come in
the order of the set; a clip further back opens its shard again. For training, which jumps, use the other readers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_expander

from keyreid.config import Config
from keyreid.errors import DataError
from keyreid.shards import format
from keyreid.shards.batch import ClipPlan
from keyreid.shards.index import ShardSet
from keyreid.shards.plain import PlainReader


class StreamReader(PlainReader):
    """Iterates the batches of a plan, read by one worker; see `keyreid.shards.open_reader`."""

    def __init__(
        self, shards: ShardSet, batches: Iterator[list[ClipPlan]], config: Config, device: str, workers: int | None
    ) -> None:
        super().__init__(_StreamedShards(shards), batches, config, device, 0 if workers == 0 else 1)


class _StreamedShards(ShardSet):
    """The same set, whose members come from the tracklet that the stream is at."""

    def __init__(self, shards: ShardSet) -> None:
        self.__dict__.update(shards.__dict__)
        self._at = self._shard = -1
        self._sample: dict[str, Any] = {}
        self._samples: Iterator[dict[str, Any]] = iter(())

    def read_member(self, position: int, member: int) -> bytes:
        """A member's content, checked."""
        if position != self._at:
            self._go_to(position)
        name = self.member_name(position, member)
        # webdataset lower-cases what follows the key; all member names are lower case.
        content = self._sample.get(name)
        if content is None:
            raise self.fault(position, member, "is missing")
        return self._checked(content, int(self._first_member[position]) + member, position, member)

    def read_frame(self, position: int, frame: int) -> tuple[bytes, bytes]:
        """A frame's picture and its heatmaps, checked."""
        member = format.MEMBERS_BEFORE_FRAMES + format.MEMBERS_PER_FRAME * frame
        return self.read_member(position, member), self.read_member(position, member + 1)

    def _go_to(self, position: int) -> None:
        record = self.tracklets[position]
        if record.shard != self._shard or position < self._at:
            self._shard = record.shard
            source = {"url": self.shard_name(record.shard), "stream": _opened(self.shard_name(record.shard))}
            self._samples = group_by_keys(tar_file_expander([source]))
        self._at, self._sample = position, {}
        for sample in self._samples:
            if sample["__key__"] == record.key:
                self._sample = sample
                return
        self._shard = -1
        raise DataError(f"{self.shard_name(record.shard)}: tracklet {record.key} is not in the shard, or it is cut off")


def _opened(location: str) -> BinaryIO:
    try:
        if "://" in location:
            import fsspec

            return fsspec.open(location, "rb").open()
        return Path(location).expanduser().open("rb")
    except Exception as error:  # every protocol has its own
        raise DataError(f"{location}: {type(error).__name__}: {error}") from None
