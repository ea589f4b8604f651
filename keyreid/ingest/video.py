"""Cut the tracks of a video, of a folder of its pictures, or of MOTChallenge sequences into tracklets of pictures.

A video is read once from its beginning to its end, however many people are in it.
"""

from __future__ import annotations

import configparser
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
from PIL import Image

from keyreid.datasets.listing import safe_key
from keyreid.datasets.mot import VIDEO_SUFFIXES, open_mot, sequences_root
from keyreid.datasets.tracklet import Frame, Tracklet, read_frame
from keyreid.errors import DataError
from keyreid.ingest.store import ImportedTracklet, add_source, check_target, source_name
from keyreid.progress import track

LEAST_INSIDE = 0.5  # share of a box that lies in the picture


@dataclass(frozen=True)
class VideoSettings:
    """Which boxes become pictures.

    Attributes:
        identity: what the tracks' ids say. none: nothing; track: a person, in this source alone; person: a person, the
            same one in every source that uses the id.
        min_width, min_height: least size of a box, pixels.
        min_length: least boxes of a track.
        min_visibility, min_confidence: least value of these columns, where the tracks have them.
        max_gap: a track is cut where the next box comes later than so many frames.
        max_frames: longer tracks are cut into equal tracklets.
        every: take one frame of so many.
        padding: a box grows by this share of its size on each side.
        classes: MOTChallenge classes; 1 is a pedestrian.
    """

    identity: Literal["none", "track", "person"] = "none"
    min_width: float = 24
    min_height: float = 48
    min_length: int = 4
    min_visibility: float = 0.0
    min_confidence: float = 0.0
    max_gap: int = 5
    max_frames: int = 64
    every: int = 1
    padding: float = 0.05
    classes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Imported:
    """What an import kept, and what it left out and why."""

    tracklets: int
    pictures: int
    cameras: list[str]
    left_out: dict[str, int]


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
    data = open_mot(
        file,
        tracks=None if tracks is None else str(tracks.resolve()),
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
    sequences = {number: sequence for sequence, number in data.names["camera"].items()}
    if camera is not None and len(sequences) > 1:
        raise DataError(f"{file}: --camera {camera}, but it holds {len(sequences)} sequences, each a camera of its own")
    folder = out / "crops" / name
    left_out: Counter[str] = Counter()
    plans = _plan(data.tracklets, data.names["identity"], sequences, camera, settings, folder, left_out)
    partial = folder.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _cut_all([(frame, partial / path.relative_to(folder)) for _, cuts in plans for frame, path in cuts])
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    tracklets = [
        ImportedTracklet(
            plan["name"], plan["camera"], plan["identity"], "", tuple((path, int(path.stem)) for _, path in cuts)
        )
        for plan, cuts in plans
    ]
    rates = _rates(file, sequences, camera, frames_per_second)
    about = {
        "kind": "video",
        "file": str(file.resolve()),
        "tracks": None if tracks is None else str(tracks.resolve()),
        "settings": asdict(settings),
        "left_out": dict(left_out),
    }
    add_source(out, name, tracklets, about, rates)
    cameras = sorted({tracklet.camera for tracklet in tracklets})
    return Imported(len(tracklets), sum(len(t.pictures) for t in tracklets), cameras, dict(left_out))


Plan = tuple[dict[str, str], list[tuple[Frame, Path]]]  # a tracklet's names, and its frames with their files


def _plan(
    tracklets: tuple[Tracklet, ...],
    people: dict[str, int],
    sequences: dict[int, str],
    camera: str | None,
    settings: VideoSettings,
    folder: Path,
    left_out: Counter[str],
) -> list[Plan]:
    """Which pictures to cut, tracklet by tracklet, and where they go."""
    track_of = {number: name for name, number in people.items()}
    sizes: dict[Path, tuple[int, int]] = {}
    pieces: Counter[int] = Counter()
    plans = []
    for tracklet in tracklets:
        sequence = sequences[tracklet.camera]
        place = camera or sequence
        track_id = track_of[tracklet.identity].removeprefix(f"{sequence}/")
        piece, pieces[tracklet.identity] = pieces[tracklet.identity], pieces[tracklet.identity] + 1
        inside = [frame for frame in tracklet.frames if _inside(frame, sizes) >= LEAST_INSIDE]
        left_out["boxes mostly outside the picture"] += len(tracklet.frames) - len(inside)
        chosen = inside[:: settings.every]
        if not chosen:
            continue
        own = safe_key(*([sequence] if len(sequences) > 1 else []), track_id, str(piece))
        identity = {"none": "", "track": f"{place}/{track_id}", "person": track_id}[settings.identity]
        cuts = [(frame, folder / own / f"{_number(frame):06d}.{_suffix(frame)}") for frame in chosen]
        plans.append(({"name": own, "camera": place, "identity": identity}, cuts))
    if not plans:
        raise DataError(f"{folder.name}: every box lies mostly outside its picture; do the tracks belong to it?")
    return plans


def _cut_all(cuts: list[tuple[Frame, Path]]) -> None:
    """Cut and write pictures in the order of the video."""
    cuts.sort(key=lambda cut: (str(cut[0].path), cut[0].video_frame or 0))
    for frame, path in track(cuts, len(cuts), "cutting", "pictures"):
        content, kind = read_frame(frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{kind}").write_bytes(content)


def _number(frame: Frame) -> int:
    """The frame's number: in the video from 0, of a picture as its name says."""
    if frame.video_frame is not None:
        return frame.video_frame
    digits = "".join(filter(str.isdigit, frame.path.stem))
    return int(digits) if digits else 0


def _suffix(frame: Frame) -> str:
    """The kind of picture that `read_frame` gives."""
    return "png" if frame.video_frame is None and frame.path.suffix.lower() == ".png" else "jpg"


def _inside(frame: Frame, sizes: dict[Path, tuple[int, int]]) -> float:
    """The share of a frame's box that lies in its picture."""
    if frame.box is None:
        return 1.0
    if frame.path not in sizes:
        sizes[frame.path] = _size(frame)
    width, height = sizes[frame.path]
    x, y, wide, high = frame.box
    shared = max(0.0, min(x + wide, width) - max(x, 0)) * max(0.0, min(y + high, height) - max(y, 0))
    return shared / (wide * high)


def _size(frame: Frame) -> tuple[int, int]:
    """Width and height of the picture or video."""
    if frame.video_frame is not None:
        capture = cv2.VideoCapture(str(frame.path))
        size = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        capture.release()
        if not all(size):
            raise DataError(f"{frame.path}: not a video that OpenCV can read")
        return size
    try:
        with Image.open(frame.path) as picture:
            return picture.size
    except OSError as error:
        raise DataError(f"{frame.path}: not a picture: {error}") from None


def _rates(file: Path, sequences: dict[int, str], camera: str | None, given: float | None) -> dict[str, float]:
    """Frames a second of each camera, where it is known."""
    rates: dict[str, float] = {}
    for sequence in sequences.values():
        folder = file if len(sequences) == 1 else file / sequence
        rate = given or (_video_rate(file) if file.suffix.lower() in VIDEO_SUFFIXES else _sequence_rate(folder))
        if rate:
            rates[camera or sequence] = rate
    return rates


def _video_rate(file: Path) -> float | None:
    capture = cv2.VideoCapture(str(file))
    rate = float(capture.get(cv2.CAP_PROP_FPS))
    capture.release()
    return rate if 0 < rate < 1000 else None


def _sequence_rate(folder: Path) -> float | None:
    info: Any = configparser.ConfigParser(interpolation=None)
    try:
        info.read(folder / "seqinfo.ini")
        return info.getfloat("Sequence", "frameRate", fallback=None)
    except (configparser.Error, ValueError):
        return None
