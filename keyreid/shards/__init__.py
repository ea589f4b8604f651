"""Packed datasets: the format, the order of an epoch, and the readers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keyreid.config import Config
    from keyreid.shards.batch import ClipPlan
    from keyreid.shards.fetch import Reader
    from keyreid.shards.shard_set import ShardSet


def open_reader(
    shards: "ShardSet",
    batches: "Iterator[list[ClipPlan]]",
    config: "Config",
    device: str = "cpu",
    workers: int | None = None,
) -> "Reader":
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
        from keyreid.shards.dali import DaliReader as Kind
    elif config.data.reader == "stream":
        from keyreid.shards.plain import StreamReader as Kind
    else:
        from keyreid.shards.plain import PlainReader as Kind
    return Kind(shards, iter(batches), config, str(device), workers)
