"""What guides the local branch: the part heatmaps of tracklets over their frames."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from keyreid.pose.parts import part_names
from keyreid.shards.shard_set import ShardSet
from keyreid.visualization.strips import Strip, draw_strips, overlay


def guidance_picture(shards: ShardSet, positions: Sequence[int], frames: int = 6) -> Image.Image:
    """Evenly spaced frames of tracklets, and under them each part's heatmap as it is packed."""
    strips = []
    for position in positions:
        record = shards.tracklets[position]
        chosen = evenly_spaced(record.frames, frames)
        pictures = [shards.picture(position, frame) for frame in chosen]
        heatmaps = [shards.heatmaps(position, frame) / 255 for frame in chosen]
        rows = [("frame", pictures)]
        for part, name in enumerate(part_names(shards.parts)):
            maps = [overlay(picture, maps[part]) for picture, maps in zip(pictures, heatmaps, strict=True)]
            rows.append((name.replace("_", " "), maps))
        strips.append(Strip(describe(record), [str(frame) for frame in chosen], rows))
    note = "columns: frame numbers · red: the part's keypoints, faded: none"
    return draw_strips(strips, f"{shards.card['name']} · part heatmaps", note)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Up to `count` of `total` positions, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def describe(record) -> str:
    """A tracklet in a line: key, identity and camera."""
    return f"{record.key} · identity {record.identity} · camera {record.camera}"
