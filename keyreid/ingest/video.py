"""Cut the tracks of a video, of a folder of its pictures, or of MOTChallenge sequences into tracklets of pictures.

A video is read once from its beginning to its end, however many people are in it.
"""

import functools
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import cv2

from keyreid.datasets.frames import picture_size, read_frame, video_property
from keyreid.datasets.listing import safe_key
from keyreid.datasets.mot import VIDEO_SUFFIXES, open_mot, read_seqinfo, sequences_root
from keyreid.datasets.tracklet import Dataset, Frame
from keyreid.errors import DataError
from keyreid.ingest.store import Imported, ImportedTracklet, add_source, check_target, source_name
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
    check_target(out)
    name = name or source_name(file)
    file = sequences_root(file)
    tracks = tracks and tracks.resolve()
    data = _open(file, tracks, settings)
    sequences = list(data.names["camera"])
    if camera is not None and len(sequences) > 1:
        raise DataError(f"{file}: --camera {camera}, but it holds {len(sequences)} sequences, each a camera of its own")
    folder = out / "crops" / name
    left_out: Counter[str] = Counter()
    chosen = _choose(data, camera, settings, folder, left_out)
    _cut_all(chosen, folder)
    about = {
        "kind": "video",
        "file": str(file.resolve()),
        "tracks": tracks and str(tracks),
        "settings": asdict(settings),
    }
    rates = {camera or sequence: frames_per_second or _rate(file, sequence, len(sequences)) for sequence in sequences}
    return add_source(out, name, [one for one, _ in chosen], about, left_out, rates)


def _open(file: Path, tracks: Path | None, settings: VideoSettings) -> Dataset:
    return open_mot(
        file,
        tracks=tracks and str(tracks),
        split="all",
        classes=settings.classes,
        min_size=(settings.min_width, settings.min_height),
        min_length=settings.min_length,
        min_visibility=settings.min_visibility,
        min_confidence=settings.min_confidence,
        max_gap=settings.max_gap,
        max_frames=settings.max_frames * settings.every,
        padding=settings.padding,
    )


def _choose(
    data: Dataset, camera: str | None, settings: VideoSettings, folder: Path, left_out: Counter[str]
) -> list[tuple[ImportedTracklet, list[Frame]]]:
    """What is to be cut, tracklet by tracklet: the pictures' files, and the frames that they come from."""
    sequences, tracks = ({n: name for name, n in data.names[kind].items()} for kind in ("camera", "identity"))
    size_of = functools.cache(_size)
    pieces: Counter[int] = Counter()
    chosen = []
    for tracklet in data.tracklets:
        sequence = sequences[tracklet.camera]
        place = camera or sequence
        track_id = tracks[tracklet.identity].removeprefix(f"{sequence}/")
        piece, pieces[tracklet.identity] = pieces[tracklet.identity], pieces[tracklet.identity] + 1
        inside = [frame for frame in tracklet.frames if _share_inside(frame, size_of) >= LEAST_INSIDE]
        left_out["boxes mostly outside the picture"] += len(tracklet.frames) - len(inside)
        frames = inside[:: settings.every]
        if frames:
            name = safe_key(*([sequence] if len(sequences) > 1 else []), track_id, str(piece))
            identity = {"none": "", "track": f"{place}/{track_id}", "person": track_id}[settings.identity]
            pictures = tuple((folder / name / f"{_number(f):06d}.{_suffix(f)}", _number(f)) for f in frames)
            chosen.append((ImportedTracklet(name, place, identity, "", pictures), frames))
    if not chosen:
        raise DataError(f"{folder.name}: every box lies mostly outside its picture; do the tracks belong to it?")
    return chosen


def _cut_all(chosen: list[tuple[ImportedTracklet, list[Frame]]], folder: Path) -> None:
    """Cut and write pictures in the order of the video; they take the folder's place once all are there."""
    cuts = [(f, path) for one, frames in chosen for f, (path, _) in zip(frames, one.pictures, strict=True)]
    cuts.sort(key=lambda cut: (str(cut[0].path), cut[0].video_frame or 0))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for frame, path in track(cuts, len(cuts), "cutting", "pictures"):
        content, kind = read_frame(frame)
        path = partial / path.relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{kind}").write_bytes(content)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def _number(frame: Frame) -> int:
    """The frame's number: in the video from 0, of a picture as its name says."""
    if frame.video_frame is not None:
        return frame.video_frame
    return int("".join(filter(str.isdigit, frame.path.stem)) or 0)


def _suffix(frame: Frame) -> str:
    """The kind of picture that `read_frame` gives."""
    return "png" if frame.video_frame is None and frame.path.suffix.lower() == ".png" else "jpg"


def _share_inside(frame: Frame, size_of) -> float:
    """The share of a frame's box that lies in its picture."""
    if frame.box is None:
        return 1.0
    width, height = size_of(frame.path, frame.video_frame is not None)
    x, y, wide, high = frame.box
    shared = max(0.0, min(x + wide, width) - max(x, 0)) * max(0.0, min(y + high, height) - max(y, 0))
    return shared / (wide * high)


def _size(path: Path, video: bool) -> tuple[float, float]:
    """Width and height of a picture or video."""
    if not video:
        return picture_size(path)
    return video_property(path, cv2.CAP_PROP_FRAME_WIDTH), video_property(path, cv2.CAP_PROP_FRAME_HEIGHT)


def _rate(file: Path, sequence: str, sequences: int) -> float | None:
    """Frames a second of a video or sequence, where it says."""
    if file.suffix.lower() in VIDEO_SUFFIXES:
        rate = video_property(file, cv2.CAP_PROP_FPS)
        return rate if 0 < rate < 1000 else None
    try:
        folder = file if sequences == 1 else file / sequence
        return read_seqinfo(folder).getfloat("Sequence", "frameRate", fallback=None)
    except ValueError:
        return None
