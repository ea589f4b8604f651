"""`keyreid embed`: vectors of tracklets in a Parquet file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from keyreid.errors import ConfigError


def embed(
    weights: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint, exported .safetensors, or a published .pth.")
    ],
    source: Annotated[
        str, typer.Argument(help="Shards (folder or URL), a folder or table of pictures, or a video with --tracks.")
    ],
    out: Annotated[Path, typer.Option(help="Vector file to write (.parquet).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the weights' configuration: evaluation.clips=4 data.reader=plain ...", show_default=False
        ),
    ] = None,
    split: Annotated[
        Literal["all", "train", "query", "gallery", "junk"], typer.Option(help="Which tracklets of the shards.")
    ] = "all",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="How to read a source that is not shards: folder, mot, mars, ... Default: folder, or a video."
        ),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, an option of that dataset's reader.")] = None,
    tracks: Annotated[Path | None, typer.Option(help="Tracks of a video or of a folder of its pictures.")] = None,
    camera: Annotated[str | None, typer.Option(help="Name of the video's camera; default the file's.")] = None,
    keypoints: Annotated[
        Path | None, typer.Option(help="Keypoint files of a source that is not shards; default SOURCE/keypoints.")
    ] = None,
    features: Annotated[
        Literal["whole", "global"], typer.Option(help="global: the global feature alone, 25 times smaller.")
    ] = "whole",
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Of the stored vectors.")] = "float32",
    pictures: Annotated[bool, typer.Option(help="Keep a small picture of each tracklet for ranked lists.")] = True,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine. Default: one for each GPU, else one.")
    ] = None,
) -> None:
    """Embed tracklets: one row each, with key, camera, times, vector and visibility.

    Run it again after an interruption, on any number of ranks: what is done is kept. Under torchrun or srun each rank
    takes its share; the last one to end joins them.
    """
    from keyreid.distributed.launch import default_ranks, is_launched, run_ranks
    from keyreid.distributed.ranks import position
    from keyreid.retrieval.sources import check_source, is_shards

    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: the name of a vector file ends in .parquet")
    rank, world_size, local_rank = position()
    work = out.with_name(f"{out.name}.shards")
    if not is_shards(source):
        path = check_source(source)
        if is_launched():
            raise ConfigError(
                f"{source}: pack it into shards first (keyreid shard); several ranks cannot share packing"
            )
        source = _pack(path, dataset, option or [], tracks, camera, keypoints, work)
    elif given := [n for n, v in (("--tracks", tracks), ("--dataset", dataset), ("--keypoints", keypoints)) if v]:
        raise ConfigError(f"{source} is shards, which need no {given[0]}")
    ranks = ranks or default_ranks()
    if not is_launched() and ranks > 1:
        arguments = [
            *("embed", str(weights), source, "--out", str(out), "--split", split, "--features", features),
            *(
                "--dtype",
                dtype,
                "--pictures" if pictures else "--no-pictures",
                *(["--", *overrides] if overrides else []),
            ),
        ]
        status = run_ranks(ranks, out.with_name(f"{out.name}.logs"), arguments)
        if status:
            sys.exit(status)
    else:
        _embed(weights, source, out, overrides or [], split, (features, dtype, pictures), rank, world_size, local_rank)
    if rank == 0 and work.is_dir() and out.is_file():
        import shutil

        shutil.rmtree(work)


def _embed(
    weights: Path,
    source: str,
    out: Path,
    overrides: list[str],
    split: Any,
    kept: tuple[Any, Any, bool],
    rank: int,
    world_size: int,
    local_rank: int,
) -> None:
    import torch

    from keyreid.checkpoints.trained import open_trained
    from keyreid.embedding.embedding import EmbeddingJob, EmbedSettings
    from keyreid.shards.shard_set import ShardSet

    trained = open_trained(weights, overrides=overrides, shards=source)
    shards = ShardSet.from_config(trained.config.data)
    positions = shards.select(split)
    if not positions:
        raise ConfigError(f"{source}: no tracklets in the split {split}")
    settings = EmbedSettings(*kept, cameras_known=trained.knows_cameras(shards))
    job = EmbeddingJob(trained, shards, positions, out, settings)
    if rank == 0:
        cameras = "those it was trained on" if settings.cameras_known else "unknown to it: their mean is used"
        print(f"{job.about.weights['name']}: {len(positions)} tracklets of {source}; cameras are {cameras}")
    if job.done:
        print(f"{out}: nothing to do, it holds these vectors")
        return
    device = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    job.run(rank, world_size, device)
    rows = job.join()
    if rows is not None:
        size = out.stat().st_size / 1e6
        print(f"{out}: {rows} vectors of {job.about.width} numbers, {job.about.dtype}, {size:.1f} MB")


def _pack(
    path: Path,
    dataset: str | None,
    option: list[str],
    tracks: Path | None,
    camera: str | None,
    keypoints: Path | None,
    work: Path,
) -> str:
    """Pack a source that is not shards; gives where."""
    import yaml

    from keyreid.datasets.mot import VIDEO_SUFFIXES
    from keyreid.retrieval.sources import pack_source

    video = tracks is not None or path.suffix.lower() in VIDEO_SUFFIXES
    dataset = dataset or ("mot" if video else "folder")
    options: dict[str, Any] = {"identified": False, "split": "all"} if dataset == "mot" else {}
    if tracks is not None:
        options["tracks"] = str(tracks.expanduser().resolve())
    if camera is not None:
        options["camera"] = camera
    for text in option:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text}: write NAME=VALUE")
        options[name] = yaml.safe_load(value)
    without = pack_source(path, dataset, options, keypoints, work, len(os.sched_getaffinity(0)))
    if without:
        print(
            f"warning: {without} tracklets have no keypoints: the local branch is not guided. Find them with "
            f"`keyreid pose`, then embed with --keypoints DIR",
            file=sys.stderr,
        )
    return str(work)
