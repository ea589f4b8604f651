"""`keyreid import`: your own videos, folders and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from keyreid.ingest.folder import Imported

ABOUT = "Bring your own videos and pictures into a folder that pose and shard read."
app = typer.Typer(help=ABOUT, no_args_is_help=True)

TRACKS = "Lines of frame, id, x, y, width, height[, confidence, class, visibility], or CSV with these names."
IDENTITY = "none: nothing. track: a person, in this source alone. person: a person, the same in every source."
LAYOUT = "What the levels of folders are: split, camera, identity, tracklet, in any order."
TEST_SHARE = "Share of the identities that becomes test data, drawn once by --seed."
Out = Annotated[Path, typer.Option(help="Folder to write; further sources are added to it.")]
Name = Annotated[str | None, typer.Option(help="Of the source, whose earlier import it replaces. Default the file's.")]


@app.command("video")
def video(
    file: Annotated[Path, typer.Argument(help="A video, a folder of its pictures, or MOTChallenge sequence(s).")],
    out: Out,
    tracks: Annotated[Path | None, typer.Option(help=f"{TRACKS} Sequences bring theirs.")] = None,
    camera: Annotated[str | None, typer.Option(help="Any name. Default the file's.")] = None,
    name: Name = None,
    identity: Annotated[Literal["none", "track", "person"], typer.Option(help=f"What an id says. {IDENTITY}")] = "none",
    min_width: Annotated[float, typer.Option(min=1, help="Least width of a box, pixels.")] = 24,
    min_height: Annotated[float, typer.Option(min=1, help="Least height of a box, pixels.")] = 48,
    min_length: Annotated[int, typer.Option(min=1, help="Least boxes of a track.")] = 4,
    min_visibility: Annotated[float, typer.Option(min=0, max=1, help="Least visibility of a box, if known.")] = 0.0,
    min_confidence: Annotated[float, typer.Option(help="Least confidence of a box, if known.")] = 0.0,
    max_gap: Annotated[int, typer.Option(min=1, help="Frames to the next box before a track is cut; 1: next.")] = 5,
    max_frames: Annotated[int, typer.Option(min=1, help="Longer tracks are cut into equal tracklets.")] = 64,
    every: Annotated[int, typer.Option(min=1, help="Take one frame of so many.")] = 1,
    padding: Annotated[float, typer.Option(min=0, help="A box grows by this share of its size on each side.")] = 0.05,
    fps: Annotated[float | None, typer.Option(min=0, help="Frames a second; default what the video says.")] = None,
) -> None:
    """Cut the people of a video, by their tracks, into tracklets of pictures.

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
    seed: Annotated[int, typer.Option(help="Of that draw.")] = 0,
    min_width: Annotated[int, typer.Option(min=1, help="Least width of a picture, pixels.")] = 1,
    min_height: Annotated[int, typer.Option(min=1, help="Least height of a picture, pixels.")] = 1,
    min_length: Annotated[int, typer.Option(min=1, help="Least pictures of a tracklet.")] = 1,
    name: Name = None,
) -> None:
    """Take in a folder or a table of pictures, which stay where they are.

    Then: keyreid pose folder OUT --out OUT/keypoints; keyreid shard folder OUT.
    """
    from keyreid.ingest.folder import import_folder

    bounds = (min_width, min_height, min_length)
    _report(out, import_folder(source.expanduser(), out.expanduser(), layout, test_share, seed, *bounds, name))


def _report(out: Path, imported: "Imported") -> None:
    for reason, count in imported.left_out.items():
        if count:
            typer.echo(f"left out: {count} {reason}")
    cameras = f"camera{'s' * (len(imported.cameras) > 1)} {', '.join(imported.cameras)}"
    typer.echo(f"{out}: {imported.tracklets} tracklets, {imported.pictures} pictures, {cameras}")
