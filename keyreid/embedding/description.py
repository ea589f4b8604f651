"""What a vector file says of its tracklets beside the vectors: who, where, when, and a small picture."""

import re
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from keyreid.embedding.vectors import description
from keyreid.shards.shard_set import ShardSet

PICTURE_HEIGHT = 160  # pixels of the pictures kept for ranked lists
PICTURE_QUALITY = 80


def describe(shards: ShardSet, positions: Sequence[int], times: bool = False, pictures: bool = False) -> pa.Table:
    """`vectors.description` of tracklets.

    Args:
        times: with frame numbers and seconds, for which each tracklet's metadata is read.
        pictures: with a picture of each middle frame.
    """
    names = (shards.card.get("names", {}).get(kind, {}) for kind in ("identity", "camera"))
    people, cameras = ({number: name for name, number in of.items()} for of in names)
    rows = np.asarray(positions, np.int64)
    identity, camera = shards.identities[rows], shards.cameras[rows]
    columns: dict[str, Any] = {"key": shards.index.keys(rows), "frames": shards.index.frames[rows]}
    columns |= {"identity": identity, "identity_name": [people.get(number) for number in identity.tolist()]}
    names = [cameras.get(number) or str(number) for number in camera.tolist()]
    columns |= {"camera": camera, "camera_name": names}
    if times:
        numbers = [numbered_frames(shards.metadata(position)) for position in positions]
        rates = shards.card.get("frames_per_second", {})
        rate = [rates.get(cameras.get(number)) for number in camera.tolist()]
        for end, frame, seconds in ((0, "first_frame", "start_seconds"), (1, "last_frame", "end_seconds")):
            columns[frame] = [number[end] for number in numbers]
            timed = zip(columns[frame], rate, strict=True)
            columns[seconds] = [number / each if each and number is not None else None for number, each in timed]
    if pictures:
        columns["picture"] = [_picture(shards, position) for position in positions]
    return description(columns)


def numbered_frames(metadata: dict[str, Any]) -> tuple[int | None, int | None]:
    """First and last frame number of a tracklet: in its video, or as its pictures' names end with."""
    numbers = metadata.get("video_frames")
    if numbers is None:
        source = metadata["source"]
        names = source["files"] if "files" in source else [source["file"]]
        found = [re.search(r"(\d{1,18})\.[A-Za-z]+$", name) for name in names]
        if not all(found):
            return None, None
        numbers = [int(match[1]) for match in found if match]
    return numbers[0], numbers[-1]


def _picture(shards: ShardSet, position: int) -> bytes:
    """The middle frame as a small JPEG."""
    picture = shards.picture(position, int(shards.index.frames[position]) // 2)
    height, width = picture.shape[:2]
    if height > PICTURE_HEIGHT:
        size = max(1, round(width * PICTURE_HEIGHT / height)), PICTURE_HEIGHT
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    quality = [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY]
    return cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
