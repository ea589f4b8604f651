"""Bring a folder of folders, or a table of pictures, into an imported folder; pictures stay where they are."""

from collections import Counter
from itertools import compress
from pathlib import Path

from keyreid.datasets.folder import open_folder
from keyreid.datasets.frames import picture_size
from keyreid.errors import DataError
from keyreid.ingest.store import Imported, ImportedTracklet, add_source, check_target, source_name
from keyreid.progress import track


def import_folder(
    source: Path,
    out: Path,
    layout: str = "camera/identity/tracklet",
    test_share: float = 0.0,
    seed: int = 0,
    min_width: int = 1,
    min_height: int = 1,
    min_length: int = 1,
    name: str | None = None,
) -> Imported:
    """Add the tracklets of a folder or a CSV or Parquet table to an imported folder.

    Args:
        source, layout, test_share, seed: see `datasets.folder.open_folder`. Splits are drawn here, once.
        min_width, min_height: least size of a picture, pixels; smaller ones are left out.
        min_length: least pictures of a tracklet, after that.
        name: of the source; the same name replaces what it imported before. Default the file's.

    Raises:
        DataError: files are missing, are no pictures, or nothing is kept.
    """
    check_target(out)
    if out.resolve() == source.resolve():
        raise DataError(f"{out}: import into another folder than the source's own")
    data = open_folder(source, layout, test_share, seed)
    cameras, people = ({number: text for text, number in data.names[kind].items()} for kind in ("camera", "identity"))
    left_out: Counter[str] = Counter()
    kept = []
    for tracklet in track(data.tracklets, len(data.tracklets), "importing", "tracklets"):
        sizes = [picture_size(frame.path) for frame in tracklet.frames]
        large = [width >= min_width and height >= min_height for width, height in sizes]
        frames = list(compress(tracklet.frames, large))
        left_out["pictures too small"] += len(tracklet.frames) - len(frames)
        if len(frames) < min_length:
            left_out["tracklets too short"] += 1
            continue
        identity = "" if tracklet.identity is None else people[tracklet.identity]
        split = "" if tracklet.split == "all" else tracklet.split
        pictures = tuple((frame.path, number) for number, frame in enumerate(frames))
        kept.append(ImportedTracklet(tracklet.key, cameras[tracklet.camera], identity, split, pictures))
    settings = {
        **{"layout": layout, "test_share": test_share, "seed": seed},
        **{"min_width": min_width, "min_height": min_height, "min_length": min_length},
    }
    about = {"kind": "folder", "file": str(source.resolve()), "settings": settings}
    return add_source(out, name or source_name(source), kept, about, left_out)
