"""`keyreid walkers`: draw pedestrians in the layout of MARS."""

import os
from pathlib import Path
from typing import Annotated

import typer


def walkers(
    out: Annotated[Path, typer.Argument(help="folder to write")],
    identities: Annotated[int, typer.Option(help="people, training and test together")] = 200,
    seed: Annotated[int, typer.Option(help="the same seed draws the same pictures")] = 0,
    cameras: Annotated[int, typer.Option(help="2 to 9")] = 6,
    tracklets: Annotated[int, typer.Option(help="most tracklets of one person at one camera")] = 2,
    frames: Annotated[tuple[int, int], typer.Option(help="fewest and most frames in a tracklet")] = (8, 20),
    test_share: Annotated[float, typer.Option(help="share of the identities kept for testing")] = 0.5,
    distractors: Annotated[
        int | None, typer.Option(help="test tracklets of people no query looks for; default: two per test identity")
    ] = None,
    junk: Annotated[int | None, typer.Option(help="badly placed boxes; default: a quarter of the distractors")] = None,
    size: Annotated[tuple[int, int], typer.Option(help="height and width of the pictures, pixels")] = (256, 128),
    processes: Annotated[int, typer.Option(help="0: one per CPU core; does not change the pictures")] = 0,
) -> None:
    """Draw pedestrians: a dataset in the layout of MARS, with true keypoints in OUT/keypoints."""
    from keyreid.synthetic.walkers import render

    drawn = {"frames": frames, "test_share": test_share, "distractors": distractors, "junk": junk}
    picture = {"height": size[0], "width": size[1]}
    processes = processes or len(os.sched_getaffinity(0))
    render(out, identities, cameras, seed, processes=processes, tracklets=tracklets, **drawn, **picture)
    typer.echo(f"{out}: walkers of {identities} identities in MARS's layout; true keypoints in {out}/keypoints")
