"""`keyreid shard`: pack a dataset into shards."""

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from keyreid.commands.options import DatasetName, ReaderOptions, Root, Share, parse_share
from keyreid.datasets import open_dataset, parse_options
from keyreid.ownership import owned

if TYPE_CHECKING:
    from keyreid.shards.layout import ShardLayout


def shard(
    dataset: DatasetName,
    root: Root,
    out: Annotated[Path | None, typer.Option(help="folder for the shards; default: shards/DATASET")] = None,
    keypoints: Annotated[
        Path | None, typer.Option(help="folder of keypoint files from `keyreid pose`; default: ROOT/keypoints")
    ] = None,
    heatmaps: Annotated[
        Path | None, typer.Option(help="folder of published heatmaps (.npy, named like the frames), or imported ones")
    ] = None,
    image: Annotated[Literal["keep", "jpeg"], typer.Option(help="jpeg: convert other pictures to JPEG")] = "keep",
    quality: Annotated[int, typer.Option(min=1, max=100, help="quality of converted JPEGs")] = 95,
    parts: Annotated[int, typer.Option(help="body parts; 6 also serves models with 3 or 4")] = 6,
    option: ReaderOptions = None,
    target_megabytes: Annotated[float, typer.Option(min=0.001, help="size of a shard")] = 256.0,
    order: Annotated[
        Literal["dataset", "identities"], typer.Option(help="identities: one after the other, drawn, for data.window")
    ] = "dataset",
    seed: Annotated[int, typer.Option(min=0, help="of --order identities")] = 0,
    processes: Annotated[int, typer.Option(min=0, help="0: one per CPU core")] = 0,
    share: Share = "0/1",
    append: Annotated[bool, typer.Option(help="pack only what is new in the dataset, into further shards")] = False,
    finish: Annotated[bool, typer.Option(help="pack nothing; check that all shards exist, write the card")] = False,
    dry_run: Annotated[bool, typer.Option(help="only show what would be written")] = False,
) -> None:
    """Pack a dataset into shards: tars of whole tracklets with heatmaps, an index beside each, and a dataset card.

    A dataset that has grown is packed on with --append: what was packed stays as it is, byte for byte.

    Run it again after an interruption: finished shards are kept. Output depends only on the dataset and these options.
    """
    from keyreid.shards.layout import plan_append, plan_shards
    from keyreid.shards.shard_set import ShardSet
    from keyreid.shards.writer import PackSettings

    root, part, options = root.expanduser(), parse_share(share), parse_options(option or [])
    data = open_dataset(dataset, root, **options)
    if keypoints is None and (root / "keypoints").is_dir():
        keypoints = root / "keypoints"
    folder = root.parent if root.is_file() else root
    drawn = seed if order == "identities" else None
    settings = PackSettings(folder, keypoints, heatmaps, image, quality, parts, drawn, dataset, options)
    out = out or Path("shards") / data.name
    target = int(target_megabytes * 1e6)
    layout = plan_append(data, settings, ShardSet.open(out), target) if append else plan_shards(data, settings, target)
    if layout is None:
        typer.echo(f"{out}: nothing is new: all {len(data.tracklets)} tracklets of {root} are packed")
        return
    without = _announce(layout, out)
    if dry_run:
        for name, tracklets in layout.shards:
            typer.echo(f"{name}: {len(tracklets)} tracklets, {tracklets[0].key} .. {tracklets[-1].key}")
        return
    if _pack(layout, out, part, processes or len(os.sched_getaffinity(0)), finish) and without:
        _say_loudly(f"{without} tracklets were packed without keypoints")


def _pack(layout: "ShardLayout", out: Path, share: tuple[int, int], processes: int, only_finish: bool) -> bool:
    """Whether the set is complete with this share."""
    from keyreid.shards import pack as packing

    if not only_finish:
        # Shares write other shards, side by side; whoever packs alone has the folder alone.
        with owned(out, "keyreid shard") if share[1] == 1 else contextlib.nullcontext():
            packing.check_destination(layout, out)
            written, kept = packing.pack(layout, out, processes, share)
        typer.echo(f"{written} shards written, {kept} were there already")
        if share[1] > 1 and packing.missing(layout, out):
            typer.echo("other shares are still to be packed; the last one to end writes the card")
            return False
    with owned(out, "keyreid shard", wait=True):
        packing.check_destination(layout, out)
        card = packing.finish(layout, out)
    size = sum(entry["bytes"] for entry in card["shards"]) / 1e9
    text = "{tracklets} tracklets of {identities} identities, {frames} frames, {frames_with_keypoints} with keypoints"
    typer.echo(f"{out}: {text.format_map(card['counts'])}; {len(card['shards'])} shards, {size:.3g} GB")
    return True


def _announce(layout: "ShardLayout", out: Path) -> int:
    """Say what will be packed; gives how many tracklets have no keypoints."""
    data, settings = layout.dataset, layout.settings
    frames = sum(len(tracklet.frames) for tracklet in data.tracklets)
    typer.echo(
        f"{data.name}: {len(data.tracklets)} tracklets, {frames} frames -> {len(layout.shards)} shards, "
        f"about {sum(layout.bytes) / 1e9:.3g} GB, in {out}"
    )
    without = 0 if settings.keypoints else sum(tracklet.keypoints is None for tracklet in data.tracklets)
    if without:
        zero = "keypoints are zeros" if settings.heatmaps else "part heatmaps are ZERO: the local branch learns nothing"
        _say_loudly(
            f"{without} of {len(data.tracklets)} tracklets have NO KEYPOINTS: their {zero}. "
            "Find them with `keyreid pose`, then pack with --keypoints DIR."
        )
    return without


def _say_loudly(text: str) -> None:
    line = "!" * 100
    typer.secho(f"{line}\n!!! {text}\n{line}", fg="red", bold=True, err=True)
