"""`keyreid import`: your own videos, folders and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keyreid.plain_text import say

if TYPE_CHECKING:
    from keyreid.ingest.folder import Imported

ABOUT = "Bring your own videos and pictures into a folder that pose and shard read."
app = typer.Typer(help=ABOUT, no_args_is_help=True)

TRACKS = "Lines of frame, id, x, y, width, height[, confidence, class, visibility], or CSV with these names."
IDENTITY = "none: nothing. track: a person, only in this source. person: the same person in every source."
LAYOUT = "What the folder levels mean: split, camera, identity, tracklet, in any order."
TEST_SHARE = "Share of the identities used as test data, drawn once by --seed."
Out = Annotated[Path, typer.Option(help="Folder to write; more sources can be added to it.")]
Name = Annotated[str | None, typer.Option(help="The source's name; replaces its earlier import. Default: the file's.")]


@app.command("video")
def video(
    file: Annotated[Path, typer.Argument(help="A video, a folder of its pictures, or MOTChallenge sequence(s).")],
    out: Out,
    tracks: Annotated[Path | None, typer.Option(help=f"{TRACKS} Sequences bring theirs.")] = None,
    camera: Annotated[str | None, typer.Option(help="Any name. Default: the file's.")] = None,
    name: Name = None,
    identity: Annotated[Literal["none", "track", "person"], typer.Option(help=f"What an id says. {IDENTITY}")] = "none",
    min_width: Annotated[float, typer.Option(min=1, help="Minimum width of a box, pixels.")] = 24,
    min_height: Annotated[float, typer.Option(min=1, help="Minimum height of a box, pixels.")] = 48,
    min_length: Annotated[int, typer.Option(min=1, help="Fewest boxes in a track.")] = 4,
    min_visibility: Annotated[float, typer.Option(min=0, max=1, help="Minimum visibility of a box, if known.")] = 0.0,
    min_confidence: Annotated[float, typer.Option(help="Minimum confidence of a box, if known.")] = 0.0,
    max_gap: Annotated[int, typer.Option(min=1, help="Most frames to a track's next box, else it is cut.")] = 5,
    max_frames: Annotated[int, typer.Option(min=1, help="Longer tracks are cut into equal tracklets.")] = 64,
    every: Annotated[int, typer.Option(min=1, help="Use every Nth frame.")] = 1,
    padding: Annotated[float, typer.Option(min=0, help="Enlarge boxes by this share on each side.")] = 0.05,
    fps: Annotated[float | None, typer.Option(min=0, help="Frames per second; default: the video's own.")] = None,
) -> None:
    """Cut people out of a video along their tracks, as tracklets of pictures.

    Then: keyreid pose folder OUT --out OUT/keypoints; keyreid shard folder OUT.
    """
    from keyreid.ingest.video import VideoSettings, import_video

    bounds = (min_width, min_height, min_length, min_visibility, min_confidence)
    settings = VideoSettings(identity, *bounds, max_gap, max_frames, every, padding)
    _report(out, import_video(file.expanduser(), out.expanduser(), tracks, camera, settings, name, fps))


@app.command("folder")
def folder(
    source: Annotated[Path, typer.Argument(help="A folder of folders, or table (.csv, .parquet) with a column path.")],
    out: Out,
    layout: Annotated[str, typer.Option(help=LAYOUT)] = "camera/identity/tracklet",
    test_share: Annotated[float, typer.Option(min=0, max=1, help=TEST_SHARE)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    min_width: Annotated[int, typer.Option(min=1, help="Minimum width of a picture, pixels.")] = 1,
    min_height: Annotated[int, typer.Option(min=1, help="Minimum height of a picture, pixels.")] = 1,
    min_length: Annotated[int, typer.Option(min=1, help="Fewest pictures in a tracklet.")] = 1,
    name: Name = None,
) -> None:
    """Import a folder or a table of pictures, which stay where they are.

    Then: keyreid pose folder OUT --out OUT/keypoints; keyreid shard folder OUT.
    """
    from keyreid.ingest.folder import import_folder

    bounds = (min_width, min_height, min_length)
    _report(out, import_folder(source.expanduser(), out.expanduser(), layout, test_share, seed, *bounds, name))


def _report(out: Path, imported: "Imported") -> None:
    for reason, count in imported.left_out.items():
        if count:
            say(f"left out: {count} {reason}")
    cameras = f"camera{'s' * (len(imported.cameras) > 1)} {', '.join(imported.cameras)}"
    say(f"{out}: {imported.tracklets} tracklets, {imported.pictures} pictures, {cameras}")
