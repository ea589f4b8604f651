"""Cut the tracks of a video, of a folder of its pictures, or of MOTChallenge sequences into tracklets of pictures.

A video is read once from its beginning to its end, however many people are in it.
"""

import contextlib
import functools
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2

from keyreid.datasets import open_dataset
from keyreid.datasets.frames import picture_size, read_frame, video_property
from keyreid.datasets.listing import keys_of
from keyreid.datasets.mot import TrackSequence, find_sequences, read_seqinfo
from keyreid.datasets.tracklet import Dataset, Frame
from keyreid.errors import DataError
from keyreid.ingest.folder import Imported, Row, add_source, importing
from keyreid.progress import track

LEAST_INSIDE = 0.5  # share of a box that lies in the picture


@dataclass(frozen=True)
class VideoSettings:
    """Which boxes become pictures."""

    # What the tracks' ids say. none: nothing; track: a person, in this source alone; person: a person, the same one in
    # every source that uses the id.
    identity: Literal["none", "track", "person"] = "none"
    min_width: float = 24  # of a box, pixels
    min_height: float = 48
    min_length: int = 4  # boxes of a track
    min_visibility: float = 0.0  # least value of these columns, where the tracks have them
    min_confidence: float = 0.0
    max_gap: int = 5  # a track is cut where the next box comes later than so many frames
    max_frames: int = 64  # longer tracks are cut into equal tracklets
    every: int = 1  # take one frame of so many
    padding: float = 0.05  # a box grows by this share of its size on each side
    classes: tuple[int, ...] = (1,)  # of MOTChallenge; 1 is a pedestrian


def import_video(
    file: Path,
    out: Path,
    tracks: Path | None = None,
    camera: str | None = None,
    settings: VideoSettings | None = None,
    name: str | None = None,
    frames_per_second: float | None = None,
) -> Imported:
    """Write the pictures of people to `out/crops` and add them to its manifest and card.

    Args:
        file: a video, a folder of pictures, a MOTChallenge sequence or a folder of sequences.
        out: the imported folder; sources are added to it.
        tracks: MOTChallenge text (gt or tracker output), or CSV with a line of column names; sequences bring theirs.
        camera: its name; default the file's. Several videos may be of one camera.
        name: of the source; the same name replaces what it imported before. Default the file's.
        frames_per_second: default what the video or sequence says.

    Raises:
        DataError: files are missing or damaged, or nothing is kept.
    """
    settings = settings or VideoSettings()
    text = tracks and str(tracks.resolve())
    passed = ("classes", "min_length", "min_visibility", "min_confidence", "max_gap", "padding")
    options = {option: getattr(settings, option) for option in passed}
    options |= {"min_size": (settings.min_width, settings.min_height), "tracks": text, "camera": camera}
    options |= {"max_frames": settings.max_frames * settings.every}
    with importing(out, file, name) as name:
        data = open_dataset("mot", file, split="all", **options)
        sequences = find_sequences(file, text, camera)
        folder = out / "crops" / name
        left_out: Counter[str] = Counter()
        rows, frames = _choose(data, sequences, settings, folder, left_out)
        _cut_all(frames, [row.path for row in rows], folder)
        about = {"kind": "video", "file": str(file.resolve()), "tracks": text, "settings": asdict(settings)}
        rates = {sequence.name: frames_per_second or _rate(sequence) for sequence in sequences}
        return add_source(out, name, rows, about, left_out, rates)


def _choose(
    data: Dataset, sequences: list[TrackSequence], settings: VideoSettings, folder: Path, left_out: Counter[str]
) -> tuple[list[Row], list[Frame]]:
    """What is to be cut: the pictures as the manifest names them, and the frames that they come from."""
    places, people = ({n: name for name, n in data.names[kind].items()} for kind in ("camera", "identity"))
    number_of = {path: number for sequence in sequences for number, path in sequence.pictures.items()}
    size_of = functools.cache(_size)
    pieces: Counter[int] = Counter()
    ids, names = [], []
    for tracklet in data.tracklets:
        place, person = places[tracklet.camera], people[tracklet.identity]
        ids.append(person.removeprefix(f"{place}/"))
        names.append((*([place] if len(places) > 1 else []), ids[-1], str(pieces[tracklet.identity])))
        pieces[tracklet.identity] += 1
    rows, chosen = [], []
    for tracklet, track_id, name in zip(data.tracklets, ids, keys_of(names), strict=True):
        place, person = places[tracklet.camera], people[tracklet.identity]
        inside = [frame for frame in tracklet.frames if _share_inside(frame, size_of) >= LEAST_INSIDE]
        left_out["boxes mostly outside the picture"] += len(tracklet.frames) - len(inside)
        identity = {"none": "", "track": person, "person": track_id}[settings.identity]
        for frame in inside[:: settings.every]:
            # The number in the video from 0, or of a picture as its name says; the kind as `read_frame` gives it.
            number = number_of[frame.path] if frame.video_frame is None else frame.video_frame
            kind = "png" if frame.video_frame is None and frame.path.suffix.lower() == ".png" else "jpg"
            rows.append(Row(folder / name / f"{number:06d}.{kind}", "", place, identity, name, number))
            chosen.append(frame)
    if not rows:
        raise DataError(f"{folder.name}: every box lies mostly outside its picture; do the tracks belong to it?")
    return rows, chosen


def _cut_all(frames: Sequence[Frame], paths: Sequence[Path], folder: Path) -> None:
    """Cut and write pictures in the order of the video; they take the folder's place once all are there."""
    cuts = sorted(zip(frames, paths, strict=True), key=lambda cut: (str(cut[0].path), cut[0].video_frame or 0))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for frame, path in track(cuts, len(cuts), "cutting", "pictures"):
        content, kind = read_frame(frame)
        path = partial / path.relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{kind}").write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _share_inside(frame: Frame, size_of) -> float:
    """The share of a frame's box that lies in its picture."""
    width, height = size_of(frame.path, frame.video_frame is not None)
    x, y, wide, high = frame.box
    shared = max(0.0, min(x + wide, width) - max(x, 0)) * max(0.0, min(y + high, height) - max(y, 0))
    return shared / (wide * high)


def _size(path: Path, video: bool) -> tuple[float, float]:
    """Width and height of a picture or video."""
    if not video:
        return picture_size(path)
    return video_property(path, cv2.CAP_PROP_FRAME_WIDTH), video_property(path, cv2.CAP_PROP_FRAME_HEIGHT)


def _rate(sequence: TrackSequence) -> float | None:
    """Frames a second, where the video or the sequence says."""
    rate = None
    if sequence.video:
        rate = video_property(sequence.video, cv2.CAP_PROP_FPS)
    else:
        with contextlib.suppress(ValueError):
            rate = read_seqinfo(sequence.place).getfloat("Sequence", "frameRate", fallback=None)
    return rate if rate and 0 < rate < 1000 else None
