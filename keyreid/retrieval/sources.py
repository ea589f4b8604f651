"""What can be embedded: shards as they are; folders, tables and videos with tracks are packed first."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keyreid.datasets import open_dataset, parse_options
from keyreid.datasets.mot import VIDEO_SUFFIXES
from keyreid.errors import ConfigError, DataError
from keyreid.shards.card import CARD_NAME
from keyreid.shards.pack import finish, pack, plan_shards
from keyreid.shards.writer import PackSettings


def is_shards(source: str) -> bool:
    """Whether a source is shards: a URL, or a folder with a dataset card."""
    return bool(re.match(r"[a-z0-9+]+://", source)) or (Path(source).expanduser() / CARD_NAME).is_file()


def check_source(source: str) -> Path:
    """The path of a source that is not shards.

    Raises:
        DataError: it is not there.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source}: neither shards, nor a folder, table or video")
    if path.is_dir() and list(path.glob("*.tar")):
        raise ConfigError(f"{source}: shards without their {CARD_NAME}: packing has not finished")
    return path


def reader_options(
    path: Path, dataset: str | None, given: Sequence[str], tracks: Path | None, camera: str | None
) -> tuple[str, dict[str, Any]]:
    """Which dataset reader takes a source, and its options.

    Args:
        dataset: default `mot` for a video, else `folder`.
        given: NAME=VALUE, the value in YAML.
        tracks, camera: of a video.

    Raises:
        ConfigError: an option is not of that form.
    """
    video = tracks is not None or path.suffix.lower() in VIDEO_SUFFIXES
    dataset = dataset or ("mot" if video else "folder")
    options: dict[str, Any] = {"identified": False, "split": "all"} if dataset == "mot" else {}
    if tracks is not None:
        options["tracks"] = str(tracks.expanduser().resolve())
    if camera is not None:
        options["camera"] = camera
    return dataset, options | parse_options(given)


def pack_source(
    source: Path, dataset: str, options: Mapping[str, Any], keypoints: Path | None, out: Path, processes: int = 1
) -> int:
    """Pack a dataset into shards at `out`; what an earlier try packed is kept.

    Args:
        dataset, options: as for `datasets.open_dataset`.
        keypoints: folder of keypoint files; default `source/keypoints` where it is there.

    Returns:
        How many tracklets have no keypoints: their part heatmaps are zero.

    Raises:
        DataError, ConfigError: the source cannot be read as that dataset.
    """
    data = open_dataset(dataset, source, **options)
    if keypoints is None and (source / "keypoints").is_dir():
        keypoints = source / "keypoints"
    plan = plan_shards(data, PackSettings(source, keypoints))
    pack(plan, out, processes)
    finish(plan, out)
    return sum(tracklet.keypoints is None for tracklet in data.tracklets) if keypoints is None else 0
