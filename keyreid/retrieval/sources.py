"""What can be embedded: shards as they are; folders, tables and videos with tracks are packed first."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from keyreid.datasets import open_dataset, parse_options
from keyreid.datasets.mot import VIDEO_SUFFIXES
from keyreid.distributed.launch import is_launched
from keyreid.errors import ConfigError, DataError
from keyreid.shards.card import CARD_NAME
from keyreid.shards.layout import plan_shards
from keyreid.shards.pack import finish, pack
from keyreid.shards.writer import PackSettings


def as_shards(
    source: str,
    dataset: str | None,
    given: Sequence[str],
    tracks: Path | None,
    camera: str | None,
    keypoints: Path | None,
    work: Path,
) -> str:
    """A source itself if it is shards (a URL, or a folder with a dataset card), else `work`, where it is packed.

    What an earlier try packed is kept.

    Args:
        dataset: which reader takes a source that is not shards; default `mot` for a video, else `folder`.
        given: NAME=VALUE, options of the reader, the value in YAML.
        tracks, camera: of a video.
        keypoints: folder of keypoint files; default `source/keypoints` where it is there.

    Raises:
        DataError, ConfigError: the source is not there or cannot be read as that dataset, or options do not fit it.
    """
    path = Path(source).expanduser()
    if re.match(r"[a-z0-9+]+://", source) or (path / CARD_NAME).is_file():
        for name, value in (("--tracks", tracks), ("--dataset", dataset), ("--keypoints", keypoints)):
            if value:
                raise ConfigError(f"{source} is shards, which need no {name}")
        return source
    if not path.exists():
        raise DataError(f"{source}: neither shards, nor a folder, table or video")
    if path.is_dir() and any(path.glob("*.tar")):
        raise ConfigError(f"{source}: shards without their {CARD_NAME}: packing has not finished")
    if is_launched():
        raise ConfigError(f"{source}: pack it into shards first (keyreid shard); several ranks cannot share packing")
    dataset = dataset or ("mot" if tracks or path.suffix.lower() in VIDEO_SUFFIXES else "folder")
    data = open_dataset(dataset, path, **_reader_options(dataset, given, tracks, camera))
    if keypoints is None and (path / "keypoints").is_dir():
        keypoints = path / "keypoints"
    plan = plan_shards(data, PackSettings(path, keypoints))
    pack(plan, work, len(os.sched_getaffinity(0)))
    finish(plan, work)
    without = 0 if keypoints else sum(tracklet.keypoints is None for tracklet in data.tracklets)
    if without:
        what = f"{without} tracklets have no keypoints: the local branch is not guided"
        print(f"warning: {what}. Find them with `keyreid pose`, then embed with --keypoints DIR", file=sys.stderr)
    return str(work)


def _reader_options(dataset: str, given: Sequence[str], tracks: Path | None, camera: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"identified": False, "split": "all"} if dataset == "mot" else {}
    options |= {} if tracks is None else {"tracks": str(tracks.expanduser().resolve())}
    options |= {} if camera is None else {"camera": camera}
    return options | parse_options(given)
