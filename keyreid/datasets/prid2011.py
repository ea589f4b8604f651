"""PRID2011 (Hirzer et al., SCIA 2011), multi-shot: people from two street cameras, 200 of whom both saw.

`ROOT/prid_2011/multi_shot/cam_a|cam_b/person_0001/*.png`. The usual protocol keeps the 178 people with enough frames in
both cameras and halves them ten times; there is no official list, so a `splits_prid2011.json` or `splits.json` beside
the data is used where there is one, and otherwise ten splits are drawn by `seed`. Figures of different splits differ.
"""

from __future__ import annotations

from pathlib import Path

from keyreid.datasets.tracklet import Dataset
from keyreid.datasets.two_cameras import draw_splits, find_splits, read_json_splits, read_people
from keyreid.errors import DataError

SHARED_PEOPLE = 200  # person_0001 .. person_0200 are the same in both cameras; higher numbers are different people


def open_prid2011(root: Path, min_frames: int = 27, splits: str | None = None, seed: int = 0) -> Dataset:
    """Read the people of both cameras; camera 1 (a) queries camera 2 (b).

    Args:
        min_frames: leave out people with fewer frames than this in either camera; 1 keeps all 200.
        splits: a JSON file of splits; default splits_prid2011.json or splits.json below `root`, else drawn by `seed`.

    Raises:
        DataError: a folder is missing, no one is left, or the splits do not fit.
    """
    everyone = read_people(root, ("prid_2011", "multi_shot"), ("cam_a", "cam_b"), "PRID2011")
    left_out = {t.identity for t in everyone if t.identity > SHARED_PEOPLE or len(t.frames) < min_frames}
    kept = tuple(tracklet for tracklet in everyone if tracklet.identity not in left_out)
    people = {tracklet.identity for tracklet in kept}
    if len(people) < 2:
        raise DataError(f"{root}: {len(people)} people have {min_frames} frames in both cameras; lower min_frames")
    path = Path(splits) if splits else find_splits(root, "splits_prid2011.json")
    chosen = read_json_splits(path, people) if path else draw_splits(people, seed, 10)
    return Dataset("prid2011", kept, chosen, query_camera=1)
