"""Tracks in videos or street pictures (MOTChallenge): people cut out along their boxes.

`root` is a video file, a folder of pictures, a sequence (`img1/`, `gt/gt.txt`, `seqinfo.ini`), a folder of sequences,
or a whole MOTChallenge set, of which `train` is taken: the part whose tracks are published.
Each sequence is a camera. Tracks are lines of frame (from 1), id, x, y, width, height, confidence, class, visibility,
of which the last three may be missing, or a CSV file whose first line names those columns in any order.
"""

import configparser
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from keyreid.datasets.listing import folders, inside, keys_of, pictures, plain_name, plain_names, whole_number
from keyreid.datasets.table import read_table
from keyreid.datasets.tracklet import Dataset, Frame, Split, Tracklet
from keyreid.errors import DataError

COLUMNS = ("frame", "id", "x", "y", "width", "height", "confidence", "class", "visibility")
OTHER_NAMES = {"left": "x", "top": "y", "w": "width", "h": "height", "track": "id"}
OTHER_NAMES |= {"conf": "confidence", "score": "confidence"}
DEFAULTS = {"confidence": 1.0, "class": -1, "visibility": 1.0}  # where tracks lack these columns
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"}


LARGEST = 1e7  # pixels of a box: no picture has so many


class TrackSequence(NamedTuple):
    """One camera's tracks, and its pictures by frame number, from 1, or its video."""

    name: str
    place: Path  # its folder, or the video
    tracks: Path
    pictures: dict[int, Path]
    video: Path | None = None


def open_mot(
    root: Path,
    tracks: str | None = None,
    camera: str | None = None,
    identified: bool = True,
    split: Literal["retrieval", "all", "train"] = "retrieval",
    classes: tuple[int, ...] = (1,),
    min_size: tuple[float, float] = (12, 24),
    min_length: int = 1,
    min_visibility: float = 0.0,
    min_confidence: float = 0.0,
    max_gap: int = 1,
    max_frames: int = 64,
    padding: float = 0.0,
) -> Dataset:
    """Cut tracks into tracklets.

    Args:
        tracks: for each sequence, a path below it or a path of its own; default gt/gt.txt. A video or a plain folder
            of pictures needs one.
        camera: the camera's name, for one video or folder; default the sequence's.
        identified: whether a track is a known person; otherwise its identity is unknown.
        split: retrieval: a person's first tracklet is a query, the others are in the gallery; or all, or train.
        classes: MOTChallenge classes that are kept (1 is pedestrian); rows of class -1 or without a class always are.
        min_size: least width and height of a box, pixels.
        min_length: least frames of a track that is kept.
        min_visibility, min_confidence: of a box; ground truth has confidence 0 for boxes to be ignored, so those with
            0 are always left out.
        max_gap: a track is cut where the next box comes later than so many frames; 1 bears no missing frame.
        max_frames: longer tracks are cut into equal tracklets of at most this many frames.
        padding: a box grows by this share of its size on each side.

    Raises:
        DataError: files are missing or of another form, or no box is left.
    """
    if max_gap < 1 or max_frames < 1:
        raise DataError(f"max_gap={max_gap}, max_frames={max_frames}: at least 1")
    sequences = find_sequences(root, tracks, camera)
    people: dict[str, int] = {}
    found: list[tuple[tuple[str, str, str], int | None, int, Split, tuple[Frame, ...]]] = []
    for number, sequence in enumerate(sequences, start=1):
        boxes = _read_tracks(sequence.tracks, classes, min_size, min_visibility, min_confidence)
        if sequence.video and (boxes["frame"] < 1).any():
            raise DataError(f"{sequence.tracks}: frame {boxes['frame'].min():.0f}; a video's frames count from 1")
        for track, rows in boxes.groupby("id", sort=True):
            pieces = list(_pieces(sequence, rows.sort_values("frame", kind="stable"), max_gap, max_frames, padding))
            if sum(map(len, pieces)) < min_length:
                continue
            identity = people.setdefault(f"{sequence.name}/{track}", len(people) + 1) if identified else None
            for piece, frames in enumerate(pieces):
                asks = identified and piece == 0 < len(pieces) - 1  # where there is another piece to be found
                own_split = ("query" if asks else "gallery") if split == "retrieval" else split
                found.append(((sequence.name, str(track), str(piece)), identity, number, own_split, frames))
    if not found:
        raise DataError(f"{root}: no box of the tracks is left; lower the bounds of size, length or visibility")
    cameras = {sequence.name: number for number, sequence in enumerate(sequences, start=1)}
    keys = keys_of([names for names, *_ in found])
    tracklets = tuple(Tracklet(key, *rest) for key, (_, *rest) in zip(keys, found, strict=True))
    return Dataset("mot", tracklets, names={"camera": cameras, "identity": people})


def _sequences_root(root: Path) -> Path:
    """Where the sequences are: `root`, or the `train` of a MOTChallenge set."""
    holds_none = root.is_dir() and not pictures(root) and not any(map(_is_sequence, (root, *folders(root))))
    return root / "train" if holds_none and (root / "train").is_dir() else root


def read_seqinfo(folder: Path) -> configparser.ConfigParser:
    """What `seqinfo.ini` says of a sequence; nothing where there is none, DataError where it is damaged."""
    info, path = configparser.ConfigParser(interpolation=None), folder / "seqinfo.ini"
    try:
        if path.exists():
            info.read_string(path.read_text(encoding="utf-8-sig"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    return info


def find_sequences(root: Path, tracks: str | None, camera: str | None) -> list[TrackSequence]:
    """The sequences of `root`, see the module; their names differ. Arguments and errors as of `open_mot`."""
    root, camera = _sequences_root(root), plain_name(camera or "")
    if root.is_file():
        if root.suffix.lower() not in VIDEO_SUFFIXES:
            raise DataError(f"{root}: not a video ({', '.join(sorted(VIDEO_SUFFIXES))})")
        return [TrackSequence(camera or plain_name(root.stem), root, _tracks_of(root.parent, tracks), {}, root)]
    if not root.is_dir():
        raise DataError(f"{root}: no such folder or video")
    if pictures(root) or _is_sequence(root):
        return [_read_sequence(root, tracks, camera)]
    inner = [folder for folder in folders(root) if _is_sequence(folder)]
    if not inner:
        known = "a MOTChallenge sequence (img1/, gt/gt.txt)"
        raise DataError(f"{root}: neither pictures, nor {known}, nor a folder of sequences")
    if camera and len(inner) > 1:
        raise DataError(f"{root}: camera={camera}, but each of its {len(inner)} sequences is a camera of its own name")
    sequences = [_read_sequence(folder, tracks, camera) for folder in inner]
    for name, times in Counter(sequence.name for sequence in sequences).most_common(1):
        if times > 1:
            raise DataError(f"{root}: {times} sequences are called {name!r}; give each its own name in seqinfo.ini")
    return sequences


def _is_sequence(folder: Path) -> bool:
    return (folder / "seqinfo.ini").is_file() or (folder / "img1").is_dir()


def _tracks_of(folder: Path, tracks: str | None) -> Path:
    below = folder / (tracks or "gt/gt.txt")
    for place in (below, Path(tracks or below)):
        if place.is_file():
            return place
    raise DataError(f"{below}: no such file; name the tracks with the option tracks=FILE")


def _read_sequence(folder: Path, tracks: str | None, camera: str | None) -> TrackSequence:
    info = read_seqinfo(folder)
    name = info.get("Sequence", "name", fallback="") or folder.name
    place = info.get("Sequence", "imDir", fallback="img1" if (folder / "img1").is_dir() else ".")
    place = inside(folder, place, folder / "seqinfo.ini")
    images = pictures(place)
    if not images:
        raise DataError(f"{place}: no pictures in it")
    numbers = [
        whole_number(path.stem) if path.stem.isdigit() else None for path in images
    ]  # 000001.jpg is frame 1, also where earlier ones are missing
    if None in numbers:
        numbers = list(range(1, len(images) + 1))
    if len(set(numbers)) < len(images):
        raise DataError(f"{place}: two pictures are of one frame, by the numbers that they are named after")
    return TrackSequence(
        camera or plain_name(name), folder, _tracks_of(folder, tracks), dict(zip(numbers, images, strict=True))
    )


def _read_tracks(
    path: Path, classes: tuple[int, ...], size: tuple[float, float], visibility: float, confidence: float
) -> pd.DataFrame:
    """The rows of a track file that are kept, with every column of COLUMNS."""
    with path.open("rb") as lines:
        headed = whole_number(lines.readline(1000).decode("utf-8-sig", "replace").split(",")[0].strip()) is None
    table = read_table(path, headed)
    names = [str(name).strip().lower() for name in table.columns] if headed else COLUMNS[: table.shape[1]]
    names = [OTHER_NAMES.get(name, name) for name in names]
    missing = [name for name in COLUMNS[:6] if names.count(name) != 1]
    if missing or len(set(names)) < len(names):
        wrong = f"no column {missing[0]}" if missing and missing[0] not in names else "two columns of one name"
        raise DataError(f"{path}: {wrong}; the columns are {', '.join(COLUMNS)}")
    table = table.iloc[:, : len(names)].set_axis(names, axis=1)
    table = table.assign(**{name: value for name, value in DEFAULTS.items() if name not in names})
    ids = {text: whole_number(text.strip()) for text in table["id"].unique()}
    table["id"] = table["id"].map(plain_names(ids, path) if None in ids.values() else ids)
    try:
        numeric = table.columns.intersection(COLUMNS).drop("id")
        table[numeric] = table[numeric].apply(pd.to_numeric).astype(float).fillna(DEFAULTS)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not a table of tracks: {error}") from None
    whole = (table[list(COLUMNS[2:6])].abs() < LARGEST).all(axis=1) & (table["id"] != "")
    whole &= (table["frame"].abs() < 2**53) & (table["frame"] % 1 == 0)
    if not whole.all():
        raise DataError(f"{path}: line {whole.idxmin() + 1 + headed} has no whole frame, id and box")
    untracked = table["id"].isin([-1, "-1"])
    if untracked.all():
        raise DataError(f"{path}: every id is -1: these are detections, not tracks; run a tracker first")
    table = table[
        ~untracked
        & (table[["width", "height"]] >= size).all(axis=1)
        & (table["visibility"] >= visibility)
        & (table["confidence"] >= confidence)
        & (table["confidence"] != 0)
        & (table["class"].isin(classes) | (table["class"] < 0))
    ]
    if (twice := table.duplicated(["frame", "id"])).any():
        line = twice.idxmax()
        again = f"id {table.at[line, 'id']} is in frame {table.at[line, 'frame']:.0f} already"
        raise DataError(f"{path}: line {line + 1 + headed}: {again}")
    return table


def _pieces(
    sequence: TrackSequence, rows: pd.DataFrame, max_gap: int, max_frames: int, padding: float
) -> Iterator[tuple[Frame, ...]]:
    """A track's frames, cut at gaps and then into equal tracklets."""
    numbers, frames = [], []
    for time, x, y, width, height in rows[["frame", "x", "y", "width", "height"]].to_numpy(float).tolist():
        number = int(time)
        box = (x - padding * width, y - padding * height, width * (1 + 2 * padding), height * (1 + 2 * padding))
        if sequence.video or number in sequence.pictures:
            numbers.append(number)
            video = sequence.video
            frames.append(Frame(video, box, number - 1) if video else Frame(sequence.pictures[number], box))
    for run in np.split(np.arange(len(frames)), np.flatnonzero(np.diff(numbers) > max_gap) + 1):
        for piece in np.array_split(run, -(-len(run) // max_frames)) if len(run) else []:
            yield tuple(frames[i] for i in piece)
