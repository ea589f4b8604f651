"""Packed datasets: the format, the order of an epoch, and the readers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from keyreid.config import Config
    from keyreid.shards.batch import ClipBatch, ClipPlan
    from keyreid.shards.fetch import Faults
    from keyreid.shards.shard_set import ShardSet


class Reader(Protocol):
    """What every reader is: an iterator of batches, one for each list of clips.

    Attributes:
        wait_seconds: how long the consumer has waited for batches.
        faults: what could not be read (`data.on_fault: skip`).
    """

    wait_seconds: float
    faults: Faults

    def __iter__(self) -> Iterator[ClipBatch]: ...

    def __next__(self) -> ClipBatch: ...

    def close(self) -> None:
        """End its threads or processes."""
        ...


def open_reader(
    shards: ShardSet,
    batches: Iterator[list[ClipPlan]],
    config: Config,
    device: str = "cpu",
    workers: int | None = None,
) -> Reader:
    """Open the reader that `data.reader` names.

    Args:
        batches: lists of clips, each of which becomes one batch; endless for training. Clips of a list have the same
            number of frames.
        device: where the batches go; on a GPU, DALI decodes there too.
        workers: instead of data.workers; 0 lets the plain reader work in this process.

    Raises:
        ConfigError: DALI is wanted and not installed, or the shards do not fit the model.
        DataError: while iterating: a member cannot be read; names the shard, the tracklet and the member.
    """
    if config.data.reader == "dali":
        from keyreid.shards.dali import DaliReader as Reader
    elif config.data.reader == "stream":
        from keyreid.shards.plain import StreamReader as Reader
    else:
        from keyreid.shards.plain import PlainReader as Reader
    return Reader(shards, iter(batches), config, str(device), workers)
