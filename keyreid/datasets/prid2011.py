"""PRID2011 (Hirzer et al., SCIA 2011), multi-shot: people from two street cameras, 200 of whom both saw.

`ROOT/prid_2011/multi_shot/cam_a|cam_b/person_0001/*.png`. The usual protocol keeps the 178 people with enough frames in
both cameras and halves them ten times; there is no official list, so a `splits_prid2011.json` or `splits.json` beside
the data is used where there is one, and otherwise ten splits are drawn by `seed`. Figures of different splits differ.
"""

from __future__ import annotations

from pathlib import Path

from keyreid.datasets.ilids_vid import person_number
from keyreid.datasets.listing import halves
from keyreid.datasets.tracklet import Dataset
from keyreid.datasets.two_cameras import find_folder, read_json_splits, read_people
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
    shots = find_folder(root, ("prid_2011", "multi_shot"), "PRID2011 unpacks to prid_2011/multi_shot/cam_a and cam_b")
    tracklets = [
        t for t in read_people((shots / "cam_a", shots / "cam_b"), person_number) if t.identity <= SHARED_PEOPLE
    ]
    path = Path(splits) if splits else _find_splits(root)
    short = {tracklet.identity for tracklet in tracklets if len(tracklet.frames) < min_frames}
    kept = [tracklet for tracklet in tracklets if tracklet.identity not in short]
    people = {tracklet.identity for tracklet in kept}
    if len(people) < 2:
        raise DataError(f"{shots}: {len(people)} people have {min_frames} frames in both cameras; lower min_frames")
    chosen = read_json_splits(path, people, person_number) if path else halves(sorted(people), seed, 10)
    return Dataset("prid2011", tuple(kept), chosen, query_camera=1)


def _find_splits(root: Path) -> Path | None:
    places = (root / "splits_prid2011.json", root.parent / "splits_prid2011.json", root / "splits.json")
    return next((place for place in places if place.is_file()), None)
