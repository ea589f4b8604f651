"""`keyreid embed`: vectors of tracklets in a Parquet file."""

import contextlib
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keyreid.commands.options import Overrides, RankCount, ReaderOptions, Verify, Weights
from keyreid.errors import ConfigError
from keyreid.plain_text import say

PACKED = "KEYREID_PACKED"  # tells the ranks that we start where the source has been packed

Source = Annotated[str, typer.Argument(help="Shards (folder or URL), a folder or table of pictures, or a video.")]
Out = Annotated[Path, typer.Option(help="Vector file to write (.parquet).")]
Selection = Literal["all", "train", "query", "gallery", "junk"]
Dataset = Annotated[str | None, typer.Option(help="Reader of a source that is not shards: folder, mot, mars, ...")]
Tracks = Annotated[Path | None, typer.Option(help="Tracks of a video or of a folder of its pictures.")]
Camera = Annotated[str | None, typer.Option(help="Name of the video's camera; default: the file's name.")]
Keypoints = Annotated[Path | None, typer.Option(help="Keypoint files of a folder or video; default: SOURCE/keypoints.")]
Features = Annotated[Literal["whole", "global"], typer.Option(help="global: only that feature, 25 times smaller.")]


def embed(
    weights: Weights,
    source: Source,
    out: Out,
    overrides: Overrides = None,
    split: Annotated[Selection, typer.Option(help="Which tracklets of the shards.")] = "all",
    dataset: Dataset = None,
    option: ReaderOptions = None,
    tracks: Tracks = None,
    camera: Camera = None,
    keypoints: Keypoints = None,
    features: Features = "whole",
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of the stored vectors.")] = "float32",
    pictures: Annotated[bool, typer.Option(help="Keep a small picture of each tracklet for ranked lists.")] = True,
    ranks: RankCount = None,
    verify: Verify = True,
) -> None:
    """Embed tracklets: one row each, with key, camera, times, vector and visibility.

    Run it again after an interruption, on any number of ranks: finished work is kept. Under torchrun or srun each rank
    takes its share; the last one to finish joins them.
    """
    from keyreid.distributed.launch import default_ranks, is_launched, run_ranks
    from keyreid.distributed.ranks import position
    from keyreid.embedding.job import EmbedSettings
    from keyreid.ownership import owned
    from keyreid.retrieval.sources import as_shards

    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: the name of a vector file ends in .parquet")
    with contextlib.nullcontext() if is_launched() else owned(out.parent, "keyreid embed", out.name):
        work = out.with_name(f"{out.name}.shards")
        shards = os.environ.get(PACKED) or as_shards(source, dataset, option or [], tracks, camera, keypoints, work)
        ranks = ranks or default_ranks()
        if ranks > 1 and not is_launched():
            os.environ[PACKED] = shards
            status = run_ranks(ranks, out.with_name(f"{out.name}.logs"))
            del os.environ[PACKED]
            if status:
                sys.exit(status)
        else:
            _embed(weights, shards, out, overrides or [], split, EmbedSettings(features, dtype, pictures), verify)
        if position()[0] == 0 and work.is_dir() and out.is_file():
            shutil.rmtree(work)


def _embed(weights: str, source: str, out: Path, overrides: list[str], split: Selection, settings: Any, verify: bool):
    import torch

    from keyreid.checkpoints.trained import open_trained
    from keyreid.distributed.ranks import position
    from keyreid.embedding.job import EmbeddingJob
    from keyreid.shards.shard_set import ShardSet

    rank, world_size, local_rank = position()
    trained = open_trained(weights, overrides=overrides, shards=source, verify=verify)
    shards = ShardSet.from_config(trained.config.data)
    positions = shards.select(split)
    if not len(positions):
        raise ConfigError(f"{source}: no tracklets in the split {split}")
    job = EmbeddingJob(trained, shards, positions, out, settings)
    if rank == 0:
        cameras = "those it was trained on" if job.cameras_known else "unknown to it: their mean is used"
        say(f"{job.about.weights['name']}: {len(positions)} tracklets of {source}; cameras are {cameras}")
    if job.done:
        print(f"{out}: nothing to do, it holds these vectors")
        return
    device = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    job.run(rank, world_size, device)
    if (rows := job.join()) is not None:
        size = out.stat().st_size / 1e6
        print(f"{out}: {rows} vectors of {job.about.width} numbers, {job.about.dtype}, {size:.1f} MB")
